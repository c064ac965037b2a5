"""Several models as one teacher: mixtures against the mixed logits in fp64, routed teachers against a call for each of them.

  Run: make test ARGS=tests/inputs/test_ensembles.py
Not here: the divergences themselves (divergences/test_divergences.py), ranks that share out the vocabulary
(test_vocabulary.py), units (loss/test_cost_divergences.py), the tiles of kernels (backends/triton/test_kernel_loss.py).
"""

import pytest
import torch

from opd_ops import (
    JSD,
    Extrapolated,
    ImportanceWeighted,
    LinearHead,
    Mixture,
    ReverseKL,
    Routed,
    SampledLogprobs,
    SampledToken,
    StudentStats,
    TopKLogprobs,
    score_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.backends import eager
from opd_ops.inputs.sources import Source
from tests.divergences.test_divergences import INF, draw_tokens, expected, run
from tests.support import divergence_oracle as oracle
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_within, relative_error

KINDS = {"geometric": (1.0, 0.6, -0.6), "arithmetic": (0.5, 0.3, 0.2)}
EQUATIONS = {"geometric": oracle.geometric, "arithmetic": oracle.arithmetic}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_backend = pytest.mark.parametrize("backend", ["torch", "eager"])
and_kernels = pytest.mark.parametrize("backend", ["torch", "eager", pytest.param("triton", marks=pytest.mark.full)])


def three(s, u, seed=3):
    """Two more models beside the teacher, correlated with it; the last one's logits have another constant."""
    noise = torch.randn((2, *s.shape), generator=generator(seed), dtype=s.dtype)
    return u, u + 0.7 * noise[0], s + noise[1] + 30


def finished(side, temperature=1.0):
    """fp64 logits of all positions of logits or a head."""
    return eager.logits(Source.of(to_double(side), None, temperature), torch.arange(len(to_rows(side))), torch.float64)


def to_rows(side):
    return side.hidden if isinstance(side, LinearHead) else side


BY_KERNELS = [
    pytest.param("triton", base, kind, marks=pytest.mark.full)
    for base, kind in (("jsd", "geometric"), ("reverse_kl", "arithmetic"))
]
EVERY = [
    (backend, base, kind) for backend in ("torch", "eager") for base in ("reverse_kl", "jsd", "tail_aware") for kind in KINDS
]


@pytest.mark.parametrize(("backend", "base", "kind"), [*EVERY, *BY_KERNELS])
def test_a_mixture_is_the_teacher_of_its_equation(base, kind, backend):
    s, u = logit_pair(2 if backend == "triton" else 5, 131, scale=3.0, seed=8)
    models, x = three(s, u), leaf(s)
    out = run(base, x, Mixture(models, KINDS[kind], kind), backend, temperature=1.3, workspace_bytes=4_000)
    out.loss.backward()
    mixed = EQUATIONS[kind]([model / 1.3 for model in models], KINDS[kind])
    losses, gradient = expected(base, s.double() / 1.3, mixed, None)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=base)
    assert_gradient(x.grad, gradient / 1.3)
    if base == "reverse_kl":  # the statistics are of the teacher that is trained towards
        assert_within(out.stats.reverse_kl, losses, absolute=1e-6, relative=1e-4, name="reverse_kl")
        want = -(mixed.softmax(1) * mixed.log_softmax(1)).sum(1)
        assert_within(out.stats.teacher_entropy, want, absolute=1e-5, relative=1e-5, name="teacher_entropy")


@every_backend
@every_kind
def test_a_mixture_of_heads_reads_soft_caps_biases_and_widths_of_each(kind, backend):
    student, teacher = head_pair((3,), 97, bias=True, softcap=11.0, seed=3)
    wide = torch.cat((teacher.weight, student.weight[:, :8]), 1)
    other = LinearHead(torch.cat((teacher.hidden + 0.3, student.hidden[:, :8]), 1), wide, softcap=7.0, scale=0.8)
    models = teacher, other, finished(student).float() + 0.5
    result = leaf_head(student)
    out = run("reverse_kl", result, Mixture(models, KINDS[kind], kind), backend, workspace_bytes=15_000)
    out.loss.backward()
    double = leaf_head(student, torch.float64)
    s = eager.logits(Source.of(double, 97, 1.0), torch.arange(3), torch.float64)
    losses, gradient = oracle.reverse_kl(s.detach(), EQUATIONS[kind]([finished(x) for x in models], KINDS[kind]))
    s.backward(gradient)
    assert_within(out.loss, losses.sum(), absolute=3 * HEAD_ABSOLUTE, relative=1e-4, name="loss")
    for got, want in zip(gradients(result), gradients(double), strict=True):
        assert_gradient(got, want)


@pytest.mark.parametrize("lam", [1.25, 0.5, 1.0, 0.0])
def test_extrapolated_is_a_mixture_of_weights_lambda_and_one_minus_lambda(lam):
    s, u = logit_pair(5, 131, scale=3.0, seed=8)
    r = s + 0.5 * torch.randn(s.shape, generator=generator(3))
    mixed = Extrapolated(lam, u, r)
    assert (mixed.kind, mixed.weights) == ("geometric", (lam, 1 - lam))
    outs = [run("reverse_kl", x, t, "torch") for x, t in ((leaf(s), mixed), (leaf(s), lam * u + (1 - lam) * r))]
    assert_within(outs[0].loss, outs[1].loss, absolute=1e-6, relative=1e-5, name="loss")
    if lam == 1.0:
        assert torch.equal(outs[0].loss, outs[1].loss)


def test_the_gradients_of_ensembles_in_float64():
    """Their sums over teachers are one KL to a mixture: family.md, to rounding."""
    s, u = logit_pair(4, 61, scale=2.0, seed=5, dtype=torch.float64)
    models, weights = three(s, u), (0.5, 0.3, 0.2)

    def gradient(divergence, teacher):
        x = leaf(s)
        run(divergence, x, teacher, "torch").loss.backward()
        return x.grad

    for divergence, kind in (("reverse_kl", "geometric"), ("forward_kl", "arithmetic")):
        want = sum(w * gradient(divergence, model) for w, model in zip(weights, models, strict=True))
        assert relative_error(gradient(divergence, Mixture(models, weights, kind)), want) < 1e-12
    for kind in KINDS:
        mixture = Mixture([model[:1, :13] for model in models], weights, kind)
        assert torch.autograd.gradcheck(lambda x, t=mixture: run("jsd", x, t, "torch", top_k=3).loss, leaf(s[:1, :13]))


@every_backend
@every_kind
def test_a_constant_of_one_model_and_an_order_of_them_change_no_loss(kind, backend):
    s, u = logit_pair(4, 61, seed=6)
    models, weights = three(s, u), KINDS[kind]
    want = run("reverse_kl", s, Mixture(models, weights, kind), backend).loss
    shifted = models[0], models[1] + 8, models[2] - 3
    order = [0, 2, 1] if kind == "geometric" else [2, 0, 1]
    for these, w in ((shifted, weights), ([models[i] for i in order], [weights[i] for i in order])):
        got = run("reverse_kl", s, Mixture(these, w, kind), backend).loss
        assert_within(got, want, absolute=1e-5, relative=1e-4, name="loss")


@every_backend
def test_masked_entries_of_a_mixture(backend):
    s, u = logit_pair(4, 50)
    r = u + 0.5 * s
    u[:, 7] = s[:, 7] = -INF
    s[:, 9] = -INF
    positive = r.clone()
    positive[:, 9] = torch.finfo(torch.float32).min
    masked = s.double().masked_fill(s == -INF, -INF)
    mixed = (0.6 * u.double() + 0.4 * r.double()).index_fill(1, torch.tensor([7, 9]), -INF)
    x = leaf(s)
    out = run("reverse_kl", x, Mixture((u, positive), (0.6, 0.4)), backend)
    out.loss.backward()
    losses, gradient = oracle.reverse_kl(masked, mixed)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name="loss")
    assert_gradient(x.grad, gradient)
    # A model of negative weight masks what the first one masks too: it stays masked.
    both = r.index_fill(1, torch.tensor([7]), -INF)
    assert run("reverse_kl", s, Extrapolated(1.25, u, both), backend).loss.isfinite()
    both[1, 3] = -INF  # away from the impossible there is no softmax
    assert run("reverse_kl", s, Extrapolated(1.25, u, both), backend).metrics["n_teacher_nonfinite"] == 1
    # In a mean of probabilities an entry is possible where one model can write it.
    means = Mixture((u, positive), (0.6, 0.4), "arithmetic")
    x = leaf(s.masked_fill(s == -INF, 0.5))
    out = run("reverse_kl", x, means, backend)
    out.loss.backward()
    losses, gradient = oracle.reverse_kl(
        x.detach().double(), oracle.arithmetic((u, positive.masked_fill(positive < -1e30, -INF)), (0.6, 0.4))
    )
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name="loss")
    assert_gradient(x.grad, gradient)


@and_kernels
@every_kind
def test_bf16_heads_of_a_mixture_have_the_fp32_gradient_of_their_rows(kind, backend):
    student, teacher = head_pair((3,), 201, seed=4, dtype=torch.bfloat16)
    other = LinearHead(teacher.hidden * 0.9, teacher.weight)
    mixture = Mixture((teacher, other), KINDS[kind][:2] if kind == "geometric" else (0.7, 0.3), kind)
    result = leaf_head(student)
    run("reverse_kl", result, mixture, backend, workspace_bytes=60_000).loss.backward()
    s = finished(student).requires_grad_()
    mixed = EQUATIONS[kind]([finished(x) for x in (teacher, other)], mixture.weights)
    gradient = oracle.reverse_kl(s.detach(), mixed)[1]
    assert_gradient(result.hidden.grad, gradient @ student.weight.double(), 4e-3)


def routed(s, u, heads=False):
    models = three(s, u)[:2]
    index = torch.randint(0, 2, s.shape[:-1], generator=generator(2))
    return models, index


@every_backend
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "tail_aware", "sampled"])
def test_routed_losses_are_those_of_each_row_s_teacher(name, backend):
    s, u = logit_pair(11, 131, scale=3.0, seed=8)
    models, index = routed(s, u)
    tokens, x = draw_tokens(s), leaf(s)
    out = run(name, x, Routed(models, index), backend, tokens)
    out.loss.backward()
    losses, gradient = expected(name, s, torch.where(index.unsqueeze(1) == 0, *models), tokens)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=name)
    assert_gradient(x.grad, gradient)
    for i in range(2):
        assert out.metrics[f"n_selected_teacher_{i}"] == out.metrics[f"n_valid_teacher_{i}"] == (index == i).sum()
        want = losses[index == i].sum()
        assert_within(out.metrics[f"loss_teacher_{i}_sum"], want, absolute=1e-5, relative=1e-4, name="sum")
        assert_within(out.metrics[f"loss_teacher_{i}"], want / (index == i).sum(), absolute=1e-5, relative=1e-4, name="mean")


@and_kernels
def test_one_budget_selects_over_the_rows_of_all_teachers(backend):
    """As a call with the rows of each teacher put into one tensor; other rows of a teacher hold anything."""
    s, u = (x.view(3, 9, 131) for x in logit_pair(27, 131, seed=9))
    models, index = routed(s, u)
    whole = torch.where(index.unsqueeze(-1) == 0, *models)
    torn = [model.masked_fill((index != i).unsqueeze(-1), float("nan")) for i, model in enumerate(models)]
    mask = torch.rand(index.shape, generator=generator(1)) > 0.3
    options = {
        "mask": mask,
        "fraction": 0.3,
        "backend": backend,
        "weights": 0.5 + torch.rand(index.shape, generator=generator(4)),
    }
    index = index.masked_fill(~mask, -7)  # of positions that are not valid any number
    outs = []
    for x, teacher in ((leaf(s), Routed(torn, index.int())), (leaf(s), whole)):
        out = selective_opd_loss(x, teacher, **options)
        out.loss.backward()
        outs.append((out, x.grad))
    (got, got_grad), (want, want_grad) = outs
    assert torch.equal(got.selected, want.selected)
    assert_within(got.loss, want.loss, absolute=1e-6, relative=1e-5, name="loss")
    assert relative_error(got_grad, want_grad) < 1e-5
    assert not got_grad[~got.selected].any()
    assert got.metrics["n_selected_teacher_0"] + got.metrics["n_selected_teacher_1"] == got.metrics["n_selected"]
    total = got.metrics["loss_teacher_0_sum"] + got.metrics["loss_teacher_1_sum"]
    assert_within(total, got.metrics["loss_sum"], absolute=1e-6, relative=1e-5, name="loss_sum")
    x = leaf(s)
    per_token = selective_opd_token_losses(x, Routed(torn, index), **options)
    (per_token.losses.sum() / per_token.selected.sum()).backward()
    assert relative_error(x.grad, want_grad) < 1e-5


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
def test_heads_and_mixtures_are_routed_by_sequence_with_statistics_of_the_rollout(backend):
    student, teacher = head_pair((4, 2), 97, seed=3)
    other = LinearHead(teacher.hidden - 0.2, teacher.weight, softcap=9.0)
    teachers = [teacher, Mixture((teacher, other), (0.5, 0.5), "arithmetic"), other]
    index = torch.tensor([2, 0, 1, 0])  # a teacher per sequence
    tokens = draw_tokens(finished(LinearHead(student.hidden.flatten(0, 1), student.weight))).view(4, 2)
    known = StudentStats.from_logits(student.hidden @ student.weight.T)
    cases = ((JSD(0.3), None), ("reverse_kl", known), (SampledToken(baseline="kl"), known))
    for divergence, stats in cases[-1:] if backend == "triton" else cases:
        result, parts = leaf_head(student), leaf_head(student)
        options = {"fraction": 1.0, "selector": "all", "backend": backend, "divergence": divergence}
        out = selective_opd_loss(result, Routed(teachers, index), tokens=tokens, student_stats=stats, **options)
        out.loss.backward()
        total = 0
        for i, one in enumerate(teachers):
            mask = (index == i).unsqueeze(1).expand(4, 2)
            total = (
                total
                + selective_opd_loss(
                    parts, one, tokens=tokens, mask=mask, num_items_in_batch=8, denominator="valid", **options
                ).loss
            )
        total.backward()
        assert_within(out.loss, total, absolute=1e-5, relative=1e-4, name="loss")
        for got, want in zip(gradients(result), gradients(parts), strict=True):
            assert relative_error(got, want) < 1e-4


def test_routed_ratios_and_scores_are_those_of_each_row_s_teacher():
    s, u = logit_pair(9, 61, scale=2.0, seed=4)
    models, index = routed(s, u)
    whole, tokens = torch.where(index.unsqueeze(1) == 0, *models), draw_tokens(s)
    old = s.log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1) - 0.3
    for divergence in (SampledToken(ratio="ppo"), ImportanceWeighted(ReverseKL())):
        outs = [run(divergence, s, t, "torch", tokens, old_logprobs=old) for t in (Routed(models, index), whole)]
        assert_within(*(out.loss for out in outs), absolute=1e-5, relative=1e-4, name="loss")
        for name, value in outs[1].metrics.items():
            assert_within(outs[0].metrics[name], value, absolute=1e-5, relative=1e-4, name=name)
    for selector in ("teachability", "teachability-released"):
        scores = [score_positions(s, t, selector=selector)[0] for t in (Routed(models, index), whole)]
        assert_within(*scores, absolute=1e-6, relative=1e-5, name=selector)


LOGITS = torch.ones(4, 9)
LIST = TopKLogprobs(torch.ones(4, 2, dtype=torch.long), -torch.ones(4, 2))
INDEX = torch.tensor([0, 1, 0, 1])


def test_routed_takes_one_position_without_dimensions():
    s, u = logit_pair(1, 131, seed=9)
    (first, second), _ = routed(s, u)
    out = selective_opd_loss(s[0], Routed((first[0], second[0]), torch.tensor(1)))
    assert_within(out.loss, selective_opd_loss(s, second).loss, absolute=1e-6, relative=1e-5, name="loss")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mixture((LOGITS,), (1.0,)), ValueError, "Mixture.teachers: got 1, expected a sequence of two teachers or mor"),
        (lambda: Mixture(LOGITS, (1.0,)), TypeError, "Mixture.teachers: got Tensor, expected a sequence"),
        (lambda: Mixture((LOGITS, LIST), (0.5, 0.5)), ValueError, r"Mixture.teachers\[1\]: got TopKLogprobs, which knows a pa"),
        (lambda: Mixture((LOGITS, Routed((LOGITS, LOGITS), INDEX)), (1, 1)), TypeError, r"teachers\[1\]: got Routed, expected"),
        (lambda: Mixture((LOGITS, LOGITS), (1.0,)), ValueError, r"weights: got \(1.0,\), expected one for each of the 2 teach"),
        (lambda: Mixture((LOGITS, LOGITS), 1.0), TypeError, "Mixture.weights: got float, expected a sequence"),
        (lambda: Mixture((LOGITS, LOGITS), (INF, 1)), ValueError, "Mixture.weights: .*, expected finite numbers"),
        (lambda: Mixture((LOGITS, LOGITS), (0.5, 0.5), "mean"), ValueError, "Mixture.kind: got 'mean', expected one of: geome"),
        (lambda: Mixture((LOGITS, LOGITS), (1.5, -0.5), "arithmetic"), ValueError, "above 0: with a negative weight a mean of"),
        (lambda: Mixture((LOGITS, LOGITS), (0.5, 0.6), "arithmetic"), ValueError, "of sum 1.1, expected the sum 1: probabilit"),
        (lambda: Extrapolated(INF, LOGITS, LOGITS), ValueError, "Extrapolated.lam: got inf, expected a finite number"),
        (lambda: Routed((LOGITS, SampledLogprobs(INDEX, -torch.ones(4))), INDEX), ValueError, "lists of several teachers are"),
        (lambda: Routed((LOGITS, "teacher"), INDEX), TypeError, r"Routed.teachers\[1\]: got str"),
        (lambda: Routed((LOGITS, LOGITS), [0, 1]), TypeError, "Routed.index: got list, expected an int32 or int64 tensor"),
        (lambda: Routed((LOGITS, LOGITS), torch.ones(4)), TypeError, "Routed.index: got dtype torch.float32"),
    ],
)  # fmt: skip
def test_ensembles_reject(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (Mixture((LOGITS, LOGITS[:2]), (1, 1)), {}, r"Mixture.teachers\[1\]: got positions of shape \(2,\), expected those"),
        (Mixture((LOGITS, LOGITS[:, :5]), (1, 1)), {}, r"Mixture.teachers\[1\]: has a vocabulary of 5, expected at least the"),
        (Routed((LOGITS, Mixture((LOGITS, LOGITS[:2]), (1, 1))), INDEX), {}, r"Routed.teachers\[1\].teachers\[1\]: got positi"),
        (Routed((LOGITS, LOGITS), INDEX[:2]), {}, r"Routed.index: got shape \(2,\), expected the positions' shape \(4,\)"),
        (Routed((LOGITS, LOGITS), INDEX + 1), {}, r"Routed.index: got 2 at position 1 .* expected 0 ... 1"),
        (Routed((LOGITS, LOGITS), INDEX), {"inplace_backward": True, "backend": "triton"}, "get the gradients of several teac"),
    ],
)  # fmt: skip
def test_a_call_with_an_ensemble_rejects(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        selective_opd_loss(leaf(LOGITS) * 1.0, teacher, top_k=4, **options)


def test_exact_scores_of_mixed_dense_logits_are_fp32():
    """A mixture is computed in its tile: in 16 bits its normaliser would lose two digits."""
    student, first = (x.bfloat16() for x in logit_pair(6, 131))
    second = logit_pair(6, 131, seed=5)[1].bfloat16()
    teacher = Mixture((first, second), (1.25, -0.25))
    _, exact = score_positions(student.double(), Mixture((first.double(), second.double()), (1.25, -0.25)))
    _, stats = score_positions(student, teacher, backend="triton", score_dtype="float32")
    assert (stats.teacher_logsumexp - exact.teacher_logsumexp).abs().max() < 1e-4


def test_a_selector_of_whole_responses_needs_a_teacher_at_masked_positions_too():
    teacher = Routed((LOGITS, LOGITS), INDEX.clone().index_fill(0, torch.tensor([1]), 7))
    mask = torch.ones(len(INDEX), dtype=torch.bool).index_fill(0, torch.tensor([1]), False)
    score_positions(LOGITS, teacher, mask=mask, top_k=4)
    with pytest.raises(ValueError, match=r"Routed.index: got 7 at position 1 .* expected 0 ... 1"):
        score_positions(LOGITS, teacher, mask=mask, selector="teachability-released", top_k=4)
