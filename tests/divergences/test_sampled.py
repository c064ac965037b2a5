"""Losses on sampled tokens: their mean gradients over all tokens, and weights by the ratio to old probabilities, which any
divergence may have.

  Compared: means over all tokens y by their probabilities with the gradients of whole rows, in fp64 to 1e-10; weights with
  their equations, written once more here.
  Run: make test ARGS=tests/divergences/test_sampled.py

Not here: shapes, clip and baseline token by token (test_divergences.py), units (tests/estimates/test_compute.py).
"""

import math

import pytest
import torch

from opd_ops import (
    JSD,
    Extrapolated,
    ForwardKL,
    ImportanceWeighted,
    LinearHead,
    LocalSupport,
    ReverseKL,
    SampledLogprobs,
    SampledToken,
    StudentStats,
    TailAware,
    TopK,
    TopKLogprobs,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.backends import eager
from opd_ops.inputs.sources import Source
from tests.divergences.test_divergences import draw_tokens, run
from tests.support import divergence_oracle as oracle
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_within

INF = float("inf")
every_backend = pytest.mark.parametrize("backend", ["torch", "eager"])


def over_all_tokens(divergence, s, u, backend, drawn_from, **options):
    """(1, V) the gradient's mean over the tokens of one row, by the probabilities `drawn_from`, (V,)."""
    n = s.shape[1]
    rows = s.expand(n, n).clone().requires_grad_()
    run(divergence, rows, u.expand(n, n), backend, torch.arange(n), weights=drawn_from, top_k=4, **options).loss.backward()
    return rows.grad.sum(0, keepdim=True)


@every_backend
@pytest.mark.parametrize(
    ("divergence", "whole"),
    [
        (SampledToken(), oracle.reverse_kl),
        (SampledToken(baseline="kl"), oracle.reverse_kl),
        (SampledToken(shape="power", alpha=5.0), oracle.power),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_the_mean_gradient_over_the_students_tokens_is_that_of_whole_rows(divergence, whole, backend):
    s, u = logit_pair(1, 19, scale=1.5, dtype=torch.float64, seed=2)
    got = over_all_tokens(divergence, s, u, backend, s.softmax(1)[0])
    assert_gradient(got, whole(s, u)[1], 1e-10)


@every_backend
@pytest.mark.parametrize(
    ("divergence", "whole"),
    [
        (SampledToken(ratio="is"), oracle.reverse_kl),
        (SampledToken(ratio="is", baseline="kl"), oracle.reverse_kl),
        (SampledToken(ratio="tis", bounds=(0, 1e9)), oracle.reverse_kl),
        (ImportanceWeighted(JSD(), ratio="is"), oracle.jsd),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_ratio_gives_the_same_mean_over_tokens_of_another_sampler(divergence, whole, backend):
    s, u = logit_pair(1, 19, scale=1.5, dtype=torch.float64, seed=2)
    log_mu = (s + torch.randn(s.shape, generator=generator(4), dtype=s.dtype)).log_softmax(1)[0]
    got = over_all_tokens(divergence, s, u, backend, log_mu.exp(), old_logprobs=log_mu)
    assert_gradient(got, whole(s, u)[1], 1e-10)
    if isinstance(divergence, SampledToken):  # without the ratio the mean is another one
        biased = over_all_tokens(SampledToken(baseline=divergence.baseline), s, u, backend, log_mu.exp())
        assert (biased - whole(s, u)[1]).norm() > 0.1 * biased.norm()


N_RULE = 12
RULES = [
    ("is", None, lambda r, a: r),
    ("tis", None, lambda r, a: min(r, 2.0)),
    ("tis", (0.5, 1.5), lambda r, a: min(max(r, 0.5), 1.5)),
    ("icepop", (0.5, 1.5), lambda r, a: r if 0.5 <= r <= 1.5 else 0.0),
    ("ppo", None, lambda r, a: 0.0 if (a > 0 and r > 1.28) or (a < 0 and r < 0.8) else r),
]


def with_old_logprobs(s, u, seed=0):
    """Tokens, and their log-probabilities under a sampler that differs from p by factors of 0.2 to 3."""
    tokens = draw_tokens(s, seed)
    log_p = s.double().log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    ratios = torch.exp(torch.linspace(math.log(0.2), math.log(3.0), len(s), dtype=torch.float64))
    return tokens, (log_p - ratios.log()).clamp_max(0), log_p


@every_backend
@pytest.mark.parametrize(("ratio", "bounds", "rule"), RULES, ids=lambda x: "" if callable(x) else str(x))
def test_each_rule_weighs_the_policy_gradient(ratio, bounds, rule, backend):
    s, u = logit_pair(N_RULE, 61, scale=2.0, noise=1.5, seed=8)
    tokens, log_mu, log_p = with_old_logprobs(s, u)
    divergence = SampledToken(ratio=ratio, bounds=bounds, clip=1.0)
    x = leaf(s)
    out = run(divergence, x, u, backend, tokens, old_logprobs=log_mu)
    out.loss.backward()
    losses, gradient = oracle.sampled(s, u, tokens, clip=1.0)
    ratios = (log_p - log_mu).exp()
    advantages = u.double().log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1) - log_p
    weights = torch.tensor([rule(r, a) for r, a in zip(ratios.tolist(), advantages.tolist(), strict=True)], dtype=torch.float64)
    assert_within(out.loss, (weights * losses).sum(), absolute=1e-5, relative=1e-4, name=ratio)
    assert_gradient(x.grad, weights.unsqueeze(1) * gradient)
    assert not x.grad[weights == 0].any()
    dropped, clipped = weights == 0, (weights != ratios) & (weights != 0)
    changes = {"is": (0, 0), "tis": (0, 1), "icepop": (1, 0), "ppo": (1, 0)}[ratio]
    assert (bool(dropped.any()), bool(clipped.any())) == changes
    wanted = {"ratio": ratios, "ratio_dropped": dropped.double(), "ratio_clipped": clipped.double()}
    wanted["advantage_clipped"] = (advantages.abs() > 1.0).double()
    for name, column in wanted.items():
        assert_within(out.metrics[name], column.mean(), absolute=1e-6, relative=1e-5, name=name)
        assert_within(out.metrics[f"{name}_sum"], column.sum(), absolute=1e-6, relative=1e-5, name=name)
    assert_within(out.metrics["ratio_max"], ratios.max(), absolute=1e-6, relative=1e-5, name="ratio_max")
    assert out.metrics["n_selected"] == N_RULE  # a weight of 0 stays in the denominator


@every_backend
def test_the_largest_ratio_is_of_the_rows_that_are_trained_on(backend):
    s, u = logit_pair(N_RULE, 61, scale=2.0, noise=1.5, seed=8)
    tokens, log_mu, log_p = with_old_logprobs(s, u)
    ratios = (log_p - log_mu).exp()
    u[ratios.argmax(), tokens[ratios.argmax()]] = -INF  # its loss is infinite
    out = run(SampledToken(ratio="is"), s, u, backend, tokens, old_logprobs=log_mu)
    assert out.metrics["n_infinite"] == 1
    assert_within(out.metrics["ratio_max"], ratios.sort().values[-2], absolute=1e-6, relative=1e-5, name="ratio_max")


@pytest.mark.parametrize("baseline", ["none", "kl"])
def test_ppo_has_the_gradient_of_the_clipped_objective(baseline):
    s, u = logit_pair(N_RULE, 61, scale=2.0, noise=1.5, dtype=torch.float64, seed=8)
    tokens, log_mu, _ = with_old_logprobs(s, u)
    x, y = leaf(s), leaf(s)
    run(SampledToken(baseline=baseline, ratio="ppo"), x, u, "torch", tokens, old_logprobs=log_mu).loss.backward()
    log_p = y.log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    advantages = (u.log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1) - log_p).detach()
    if baseline == "kl":
        advantages = advantages + oracle.reverse_kl(s, u)[0]
    ratios = (log_p - log_mu).exp()
    (-torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.28) * advantages)).sum().backward()
    assert_gradient(x.grad, y.grad, 1e-10)


WEIGHTED = [
    (ReverseKL(), oracle.reverse_kl, {}),
    (ForwardKL(), oracle.forward_kl, {}),
    (JSD(0.3), oracle.jsd, {"beta": 0.3}),
    (TailAware(8), oracle.tail_aware, {"top_k": 8}),
    (LocalSupport(8), oracle.local_support, {"top_k": 8}),
]
ON_BACKENDS = [("torch", x) for x in range(5)] + [("eager", 0), ("eager", 3)]
ON_BACKENDS += [pytest.param("triton", x, marks=pytest.mark.full) for x in (0, 2)]


@pytest.mark.parametrize(("backend", "i"), ON_BACKENDS)
def test_the_ratio_is_a_detached_weight_of_any_divergence(backend, i):
    divergence, equation, parameters = WEIGHTED[i]
    s, u = logit_pair(4, 131, scale=2.0, seed=8)
    tokens, log_mu, log_p = with_old_logprobs(s, u)
    given = torch.tensor([1.0, -2.0, 0.5, 3.0])
    x, plain = leaf(s), leaf(s)
    options = {"weights": given, "old_logprobs": log_mu.float()}
    out = run(ImportanceWeighted(divergence, ratio="tis", bounds=(0.3, 2)), x, u, backend, tokens, **options)
    out.loss.backward()
    losses, gradient = equation(s, u, **parameters)
    weights = given * (log_p - log_mu).exp().clamp(0.3, 2)
    assert_within(out.loss, (weights * losses).sum(), absolute=1e-5, relative=1e-4, name=divergence.name)
    assert_gradient(x.grad, weights.unsqueeze(1) * gradient)
    alone = run(divergence, plain, u, backend, weights=given)
    assert torch.equal(out.selected, alone.selected)
    for name, column in alone.stats._asdict().items():
        assert column is None or torch.equal(getattr(out.stats, name), column), name


@pytest.mark.parametrize(
    ("backend", "dtype", "bound"),
    [
        ("torch", torch.float32, 1e-4),
        ("torch", torch.bfloat16, 2**-6),
        pytest.param("triton", torch.bfloat16, 2**-7, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("divergence", [SampledToken(ratio="is", baseline="kl"), ImportanceWeighted(ReverseKL(), ratio="is")])
def test_ratios_of_heads_are_those_of_fp32_logits(divergence, backend, dtype, bound):
    student, teacher = head_pair((4,), 131, bias=True, seed=5, dtype=dtype)
    rows = torch.arange(4)
    head, exact_head = leaf_head(student), leaf_head(student, torch.float64)
    s, u = (eager.logits(Source.of(x, 131, 1.0), rows, torch.float64) for x in (exact_head, to_double(teacher)))
    tokens, log_mu, log_p = with_old_logprobs(s.detach(), u)
    out = run(divergence, head, teacher, backend, tokens, old_logprobs=log_mu)
    out.loss.backward()
    is_token = isinstance(divergence, SampledToken)
    losses, gradient = oracle.sampled(s.detach(), u, tokens, baseline=True) if is_token else oracle.reverse_kl(s.detach(), u)
    ratios = (log_p - log_mu).exp()
    s.backward(ratios.unsqueeze(1) * gradient)
    assert_within(out.metrics["ratio_sum"], ratios.sum(), absolute=0.0, relative=1e-5, name="ratio_sum")
    assert_within(out.loss, (ratios * losses).sum(), absolute=40 * HEAD_ABSOLUTE, relative=1e-4, name="loss")
    for got, want in zip(gradients(head), gradients(exact_head), strict=True):
        assert_gradient(got, want, bound)


@pytest.mark.parametrize("divergence", [SampledToken(ratio="ppo", baseline="kl"), ImportanceWeighted(JSD())], ids=str)
def test_the_ratio_is_of_the_present_student_where_statistics_come_from_the_rollout(divergence):
    s, u = logit_pair(5, 61, scale=2.0, seed=3)
    older = s + 0.5 * torch.randn(s.shape, generator=generator(1))
    tokens, log_mu, _ = with_old_logprobs(s, u)
    losses = [
        run(divergence, s, u, "torch", tokens, old_logprobs=log_mu, student_stats=known).loss
        for known in (None, StudentStats.from_logits(older))
    ]
    assert_within(losses[1], losses[0], absolute=1e-6, relative=1e-5, name="loss")


@pytest.mark.parametrize("divergence", ["sampled", TopK("reverse", "student", "sampled", 8)], ids=str)
def test_kl_sampled_is_of_the_present_student_where_statistics_come_from_the_rollout(divergence):
    s, u = logit_pair(5, 61, scale=2.0, seed=3)
    older = StudentStats.from_logits(s + 0.5 * torch.randn(s.shape, generator=generator(1)))
    tokens = draw_tokens(s)
    got, want = (run(divergence, s, u, "torch", tokens, student_stats=x).metrics["kl_sampled_sum"] for x in (None, older))
    assert_within(got, want, absolute=1e-6, relative=1e-5, name="kl_sampled_sum")


@pytest.mark.full
def test_ppo_on_16_bit_heads_reads_the_sign_of_a_small_advantage_in_fp32():
    """Advantages of 1e-3 to 1e-2; the rounding of 16-bit logits of 10 is 3e-2."""
    student, _ = head_pair((24,), 61, seed=5, dtype=torch.bfloat16)
    noise = torch.randn(24, 8, generator=generator(1), dtype=torch.float64)
    teacher = LinearHead(
        torch.cat((student.hidden, noise.bfloat16()), 1),
        torch.cat((student.weight, 0.002 * noise[:8].repeat(8, 1)[:61].bfloat16()), 1),
    )
    s, u = (eager.logits(Source.of(to_double(x), 61, 1.0), torch.arange(24), torch.float64) for x in (student, teacher))
    tokens = draw_tokens(s)
    log_p, log_q = (x.log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1) for x in (s, u))
    advantages = log_q - log_p
    clear = advantages.abs() > 1e-4
    assert clear.sum() > 12
    assert advantages.abs().max() < 0.03
    options = {"mask": clear, "old_logprobs": (log_p - math.log(1.5)).float()}  # a ratio above the bounds: dropped if A > 0
    out = run(SampledToken(ratio="ppo"), leaf_head(student), teacher, "triton", tokens, **options)
    assert out.metrics["ratio_dropped_sum"] == (clear & (advantages > 0)).sum()


@pytest.mark.parametrize("divergence", [SampledToken(ratio="tis"), ImportanceWeighted(JSD(), ratio="icepop")], ids=str)
def test_a_constant_a_permutation_and_micro_batches_change_no_gradient(divergence):
    s, u = logit_pair(6, 41, scale=2.0, dtype=torch.float64, seed=4)
    tokens, log_mu, _ = with_old_logprobs(s, u)

    def gradient(student, teacher, ids, rows=slice(None)):
        x = leaf(student[rows])
        run(divergence, x, teacher[rows], "torch", ids[rows], old_logprobs=log_mu[rows]).loss.backward()
        return x.grad

    whole, order = gradient(s, u, tokens), torch.randperm(41, generator=generator(2))
    assert_gradient(gradient(s + 7.0, u - 3.0, tokens), whole, 1e-9)
    assert_gradient(gradient(s[:, order], u[:, order], order.argsort()[tokens]), whole[:, order], 1e-9)
    parts = [gradient(s, u, tokens, rows) for rows in (slice(0, 2), slice(2, 6))]
    assert_gradient(torch.cat(parts), whole, 1e-9)


def test_gradients_are_zero_off_the_selection_and_token_losses_are_the_loss():
    s, u = logit_pair(10, 61, scale=2.0, seed=4)
    tokens, log_mu, _ = with_old_logprobs(s, u)
    divergence = SampledToken(ratio="tis")
    options = {"divergence": divergence, "tokens": tokens, "old_logprobs": log_mu, "fraction": 0.3, "backend": "torch"}
    x, y = leaf(s), leaf(s)
    out = selective_opd_loss(x, u, **options)
    out.loss.backward()
    per_token = selective_opd_token_losses(y, u, **options)
    (per_token.losses.sum() / out.metrics["n_selected"]).backward()
    assert out.selected.sum() == 3
    assert not x.grad[~out.selected].any()
    assert_within(per_token.losses.sum() / 3, out.loss, absolute=1e-6, relative=1e-5, name="loss")
    assert_gradient(y.grad, x.grad, 1e-5)
    assert per_token.metrics["ratio_max"] == out.metrics["ratio_max"]


def test_the_student_of_a_lists_teacher_may_have_a_ratio():
    s, u = logit_pair(6, 61, scale=2.0, seed=4)
    tokens, log_mu, log_p = with_old_logprobs(s, u)
    log_q = u.log_softmax(1)
    best = log_q.topk(8, dim=1)
    ratios = (log_p - log_mu).exp()
    x = leaf(s)
    run(
        ImportanceWeighted(LocalSupport(8), "is"), x, TopKLogprobs(*best[::-1]), "torch", tokens, old_logprobs=log_mu
    ).loss.backward()
    assert_gradient(x.grad, ratios.unsqueeze(1) * oracle.local_support(s, u, top_k=8)[1])
    x, teacher = leaf(s), SampledLogprobs(tokens, log_q.gather(1, tokens.unsqueeze(1)).squeeze(1))
    run(SampledToken(ratio="is"), x, teacher, "torch", old_logprobs=log_mu).loss.backward()
    assert_gradient(x.grad, ratios.unsqueeze(1) * oracle.sampled(s, u, tokens)[1])


def test_a_ratio_weights_the_divergence_to_a_mixed_teacher():
    s, u = logit_pair(4, 61, scale=2.0, seed=4)
    tokens, log_mu, log_p = with_old_logprobs(s, u)
    mixed = Extrapolated(1.25, u, s + 1)
    losses = oracle.reverse_kl(s, 1.25 * u - 0.25 * (s + 1))[0]
    out = run(ImportanceWeighted(ReverseKL(), "is"), s, mixed, "torch", tokens, old_logprobs=log_mu)
    assert_within(out.loss, ((log_p - log_mu).exp() * losses).sum(), absolute=1e-5, relative=1e-4, name="loss")


def test_a_bounded_advantage_is_finite_where_the_teacher_masks_the_token():
    s, u = logit_pair(2, 61, scale=2.0, seed=4)
    tokens = draw_tokens(s)
    u[0, tokens[0]] = -INF
    cases = ({}, 1), ({"shape": "soft_log"}, 1), ({"shape": "tanh"}, 0), ({"shape": "power"}, 0)
    # With KL as the baseline the advantage would be inf - inf, with a clip the number of the clip.
    cases += ({"baseline": "kl"}, 1), ({"baseline": "kl", "clip": 2.0}, 1)
    for options, n_infinite in cases:
        x = leaf(s)
        out = run(SampledToken(**options), x, u, "torch", tokens)
        out.loss.backward()
        assert out.metrics["n_infinite"] == n_infinite
        assert x.grad.isfinite().all()
        assert bool(x.grad[0].any()) == (n_infinite == 0)


def test_a_clip_bounds_an_infinite_kl_where_the_token_itself_is_not_masked():
    s, u = logit_pair(2, 61, scale=2.0, seed=4)
    tokens = draw_tokens(s)
    u[:, (int(tokens[0]) + 1) % 61] = -INF
    u[1, tokens[1]] = -INF
    out = run(SampledToken(baseline="kl", clip=2.0), s, u, "torch", tokens)
    assert out.metrics["n_infinite"] == 1
    log_p = s.log_softmax(1)[0, tokens[0]]
    assert_within(out.loss, -2.0 * log_p, absolute=1e-5, relative=1e-5, name="A = clip")


def test_old_logprobs_are_checked():
    s, u = logit_pair(3, 20)
    tokens, log_mu, _ = with_old_logprobs(s, u)
    weighted = ImportanceWeighted(JSD())
    for divergence, more, message in (
        ("sampled", {}, "old_logprobs: got them, but divergence 'sampled' has no ratio that reads them; pass SampledToken"),
        (weighted, {"old_logprobs": None}, "old_logprobs: got None, but divergence 'importance_weighted' has the ratio 'tis'"),
        (weighted, {"tokens": None}, "tokens: got None, but divergence 'importance_weighted' reads the sampled token"),
        (weighted, {"old_logprobs": log_mu[:2]}, r"old_logprobs: got shape \(2,\), expected \(3,\)"),
        (
            weighted,
            {"old_logprobs": log_mu + 9},
            r"old_logprobs: got .* at position \(0,\) \(3 such positions\), expected log-prob",
        ),
        (weighted, {"old_logprobs": log_mu * math.nan}, r"old_logprobs: got nan at position \(0,\)"),
        (weighted, {"eos_ids": (1, 2)}, "eos_ids: old_logprobs are of one of the ids alone"),
    ):
        options = {"tokens": tokens, "old_logprobs": log_mu} | more
        with pytest.raises(ValueError, match=message):
            run(divergence, s, u, "torch", **options)
    with pytest.raises(TypeError, match=r"old_logprobs: got dtype torch.int64, expected a floating-point one"):
        run(weighted, s, u, "torch", tokens, old_logprobs=tokens)
    with pytest.raises(ValueError, match="got 'sampled' with baseline 'kl', a KL of whole rows, which SampledLogprobs cannot"):
        run(SampledToken(baseline="kl"), s, SampledLogprobs(tokens, log_mu), "torch")
    mask = torch.tensor([True, True, False])  # masked positions may hold anything
    assert run(weighted, s, u, "torch", tokens, mask=mask, old_logprobs=log_mu.masked_fill(~mask, math.nan)).loss.isfinite()
