"""`TopK`: every direction, support and tail on every backend, from logits, heads and lists, against its equation and its
gradient in closed form on whole fp64 rows (support/divergence_oracle.py).

  Bounds: those of support/tolerances.py. Run: make test ARGS=tests/divergences/test_top_k.py

Not here: more properties of local_support and tail_aware (test_divergences.py), ranks that share out the vocabulary
(tests/inputs/test_vocabulary.py), units (tests/loss/test_cost_divergences.py).
"""

import pytest
import torch

from opd_ops import (
    JSD,
    ForwardKL,
    LocalSupport,
    ReverseKL,
    SampledLogprobs,
    SampledToken,
    TailAware,
    TopK,
    TopKLogprobs,
    score_positions,
    selective_opd_loss,
)
from opd_ops.backends import eager
from opd_ops.divergences.top_k import NO_TAIL
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists, plus_tokens
from tests.divergences.test_divergences import draw_tokens, run
from tests.support import divergence_oracle as oracle
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.hard_rows import drawn_rows
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_within, small_kl_bound

INF = float("inf")
K = 7
SUPPORTS = ("teacher", "student", "union", "intersection")
KINDS = [
    *(("reverse", tail, None) for tail in ("drop", "bucket", "mass", "sampled")),
    *(("forward", tail, None) for tail in ("drop", "bucket", "mass")),
    *(("jsd", tail, beta) for tail, beta in (("drop", 0.2), ("bucket", 0.5))),
]
ALL_CASES = [(direction, support, tail, beta) for direction, tail, beta in KINDS for support in SUPPORTS]
FEW_CASES = [
    ("reverse", "student", "sampled", None),
    ("reverse", "union", "mass", None),
    ("forward", "intersection", "bucket", None),
    ("jsd", "student", "drop", 0.2),
]
every_case = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: "-".join(map(str, case[:3])))
most_full = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in FEW_CASES else pytest.mark.full) for case in ALL_CASES],
    ids=lambda case: "-".join(case[:3]),
)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: "-".join(case[:3]))
TRITON = pytest.param("triton", marks=pytest.mark.full)
two_backends = pytest.mark.parametrize("backend", ["torch", "eager"])
few_backends = pytest.mark.parametrize("backend", ["torch", "eager", TRITON])


def divergence_of(case, k=K):
    direction, support, tail, beta = case
    return TopK(direction, support, tail, k, beta=beta)


def expected(case, s, u, tokens, k=K):
    direction, support, tail, beta = case
    options = {} if beta is None else {"beta": beta}
    return oracle.top_k(s, u, tokens, direction=direction, support=support, tail=tail, top_k=k, **options)


def check(case, s, u, backend, **options):
    tokens, weights = draw_tokens(s), torch.tensor([1.0, -0.5, 0.0, 2.0])
    x = leaf(s)
    out = run(divergence_of(case), x, u, backend, tokens, weights=weights, **options)
    out.loss.backward()
    losses, gradient = expected(case, s, u, tokens)
    assert_within(out.loss, (weights * losses).sum(), absolute=1e-5, relative=1e-4, name=str(case))
    assert_gradient(x.grad, weights.unsqueeze(1) * gradient)
    assert not x.grad[2].any()
    return x.grad


@two_backends
@every_case
def test_loss_and_gradient_of_logits_match_the_equations(case, backend):
    gradient = check(case, *logit_pair(4, 211, scale=3.0, seed=1), backend, workspace_bytes=9_000)
    if case[2] == "drop":
        assert (gradient == 0).sum(1).min() >= 211 - 2 * K


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case == FEW_CASES[0] else pytest.mark.full) for case in ALL_CASES],
    ids=lambda case: "-".join(case[:3]),
)
def test_kernels_match_the_equations(case):
    check(case, *logit_pair(4, 211, scale=3.0, seed=1), "triton")


def check_heads(case, backend, **options):
    student, teacher = head_pair((6,), 173, bias=True, softcap=9.0, seed=5)
    ours, double = leaf_head(student), leaf_head(student, torch.float64)
    s, u = (eager.logits(Source.of(x, 173, 0.8), torch.arange(6), torch.float64) for x in (double, to_double(teacher)))
    tokens = draw_tokens(s.detach())
    out = run(divergence_of(case), ours, teacher, backend, tokens, temperature=0.8, **options)
    out.loss.backward()
    losses, gradient = expected(case, s.detach(), u, tokens)
    s.backward(gradient)
    assert_within(out.loss, losses.sum(), absolute=6 * HEAD_ABSOLUTE, relative=1e-4, name=str(case))
    for got, want in zip(gradients(ours), gradients(double), strict=True):
        assert_gradient(got, want)


@most_full
def test_loss_and_gradient_of_heads_match_the_equations(case):
    check_heads(case, "torch", workspace_bytes=20_000)


@pytest.mark.full
@few_cases
def test_kernels_match_the_equations_of_heads(case):
    check_heads(case, "triton")


@few_backends
@pytest.mark.parametrize("case", [FEW_CASES[0], ("forward", "intersection", "mass", None)], ids=["student", "intersection"])
def test_masked_entries_are_on_no_list(case, backend):
    s, u = logit_pair(4, 140, scale=3.0, seed=7)
    absent = torch.rand(140, generator=generator(1)) < 0.9
    s, u = s.masked_fill(absent, -INF), u.masked_fill(absent, -INF)
    tokens = draw_tokens(s)
    x = leaf(s)
    out = run(divergence_of(case, 20), x, u, backend, tokens)
    out.loss.backward()
    kept = ~absent
    places = torch.cumsum(kept.long(), 0) - 1
    losses, gradient = expected(case, s[:, kept], u[:, kept], places[tokens], 20)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=str(case))
    assert out.loss.isfinite()
    assert not x.grad[:, absent].any()
    assert_within(x.grad[:, kept], gradient, absolute=1e-5, relative=1e-3, name="gradient")  # all ids on the list: zero


@pytest.mark.parametrize("case", [("reverse", "union", "bucket", None), ("forward", "student", "mass", None), FEW_CASES[3]])
def test_gradient_passes_finite_differences(case):
    s, u = logit_pair(3, 23, scale=2.0, dtype=torch.float64, seed=11)

    def loss(x):
        return run(divergence_of(case, 5), x, u, "torch", top_k=5, workspace_bytes=2_000).loss

    assert torch.autograd.gradcheck(loss, (leaf(s),), eps=1e-6, atol=1e-7, fast_mode=True)


@two_backends
@pytest.mark.parametrize("support", SUPPORTS)
def test_the_sampled_tail_has_the_gradient_of_reverse_kl_on_average(support, backend):
    s, u = logit_pair(1, 19, scale=1.5, noise=2.0, dtype=torch.float64, seed=2)
    p, x = s.softmax(1).squeeze(0), s.expand(19, 19).clone().requires_grad_()
    divergence = TopK("reverse", support, "sampled", 4)
    run(divergence, x, u.expand(19, 19), backend, torch.arange(19), weights=p, top_k=4).loss.backward()
    assert_gradient(x.grad.sum(0, keepdim=True), oracle.reverse_kl(s, u)[1], 1e-10)


def test_the_sampled_tail_without_a_list_is_the_sampled_token():
    s, u = logit_pair(2, 60, scale=1.0, seed=4)
    s[:, :3], u[:, 3:6] = 9.0, 12.0  # no id in common
    tokens, got = torch.tensor([50, 51]), []
    for divergence in (TopK("reverse", "intersection", "sampled", 3), SampledToken()):
        x = leaf(s)
        run(divergence, x, u, "torch", tokens, top_k=3).loss.backward()
        got.append(x.grad)
    assert_gradient(got[0], got[1].double(), 1e-6)


@few_backends
@pytest.mark.parametrize("tail", ["drop", "bucket", "mass"])
def test_an_empty_intersection_leaves_mask_and_denominator(tail, backend):
    s, u = logit_pair(3, 97, scale=1.0, seed=4)
    s[1, :K], u[1, K : 2 * K] = 9.0, 12.0
    divergence, x = TopK("reverse", "intersection", tail, K), leaf(s)
    out = selective_opd_loss(x, u, divergence=divergence, selector="all", fraction=1.0, backend=backend)
    out.loss.backward()
    assert out.selected.tolist() == [True, False, True]
    assert out.metrics["n_infinite"] == 1
    losses, gradient = expected(("reverse", "intersection", tail, None), s[[0, 2]], u[[0, 2]], None)
    assert_within(out.loss, losses.mean(), absolute=1e-5, relative=1e-4, name=tail)
    assert_within(out.metrics["loss_sum"], losses.sum(), absolute=1e-5, relative=1e-4, name=tail)
    assert_gradient(x.grad[[0, 2]], gradient / 2)
    assert not x.grad[1].any()


@few_backends
@few_cases
def test_a_constant_or_another_order_of_ids_changes_nothing(case, backend):
    s, u = logit_pair(4, 131, scale=3.0, seed=6)
    tokens, order = draw_tokens(s), torch.randperm(131, generator=generator(2))
    places, got = torch.argsort(order), []
    for x, t, y in ((s, u, tokens), (s + 64.0, u - 32.0, tokens), (s[:, order], u[:, order], places[tokens])):
        x = leaf(x)
        out = run(divergence_of(case), x, t, backend, y)
        out.loss.backward()
        got.append((out.loss, x.grad))
    (loss, gradient), shifted, permuted = got
    for other, its_gradient in (shifted, (permuted[0], permuted[1][:, places])):
        assert_within(other, loss, absolute=3e-5, relative=1e-4, name=str(case))
        assert_gradient(its_gradient, gradient.double(), 1e-4)


@two_backends
@few_cases
def test_unselected_positions_have_no_gradient_and_micro_batches_add_up(case, backend):
    s, u = logit_pair(8, 131, scale=3.0, seed=6)
    tokens, x, parts = draw_tokens(s), leaf(s), leaf(s)
    options = {"divergence": divergence_of(case), "backend": backend, "selector": "entropy", "scope": "sequence"}
    options |= {"fraction": 0.5, "denominator": "valid", "num_items_in_batch": 8.0}
    out = selective_opd_loss(x.view(2, 4, -1), u.view(2, 4, -1), tokens=tokens.view(2, 4), **options)
    out.loss.backward()
    for part in (slice(0, 4), slice(4, 8)):
        rows = parts[part].unsqueeze(0), u[part].unsqueeze(0)
        selective_opd_loss(*rows, tokens=tokens[part].unsqueeze(0), **options).loss.backward()
    selected = out.selected.flatten()
    assert selected.sum() == 4
    assert not x.grad[~selected].any()
    assert x.grad[selected].any(1).all()
    assert_gradient(parts.grad, x.grad.double(), 1e-6)


@pytest.mark.parametrize("support", ["student", "intersection"])
def test_a_list_of_the_whole_vocabulary_gives_the_divergence_itself(support):
    s, u = logit_pair(3, 37, scale=2.0, seed=3)
    for direction, whole in (("reverse", ReverseKL()), ("forward", ForwardKL()), ("jsd", JSD(0.3))):
        want = run(whole, s, u, "eager").loss
        for tail in ("drop", "bucket", "mass"):
            if (direction, tail) in NO_TAIL:
                continue
            divergence = TopK(direction, support, tail, 37, beta=0.3 if direction == "jsd" else None)
            assert_within(run(divergence, s, u, "torch").loss, want, absolute=1e-5, relative=1e-5, name=tail)


@two_backends
@few_cases
def test_ids_that_mean_the_same_are_one_entry(case, backend):
    s, u = logit_pair(4, 90, scale=2.0, seed=8)
    s[:, 5], s[:, 70], u[:, 70] = 4.0, 3.0, 4.5
    tokens = draw_tokens(s)
    tokens[0] = 70
    x, double = leaf(s), leaf(s, torch.float64)
    out = run(divergence_of(case), x, u, backend, tokens, eos_ids=(5, 70), workspace_bytes=6_000)
    out.loss.backward()
    others = [i for i in range(90) if i != 70]
    merged = [
        torch.cat((y[:, :5], torch.logsumexp(y[:, [5, 70]], 1, keepdim=True), y[:, 6:]), 1)[:, others] for y in (double, u)
    ]
    places = torch.tensor([5 if i == 70 else i - (i > 70) for i in range(90)])
    losses, gradient = expected(case, merged[0].detach(), merged[1].double(), places[tokens])
    merged[0].backward(gradient)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=str(case))
    assert_gradient(x.grad, double.grad)


@pytest.mark.parametrize("backend", ["torch", *(pytest.param(x, marks=pytest.mark.full) for x in ("eager", "triton"))])
@few_cases
def test_every_hard_row_keeps_the_contract(case, backend):
    s, u = drawn_rows(torch.float32)[:2]
    tokens = torch.multinomial(s.double().softmax(1), 1, generator=generator(0)).squeeze(1)
    x = leaf(s)
    out = run(divergence_of(case), x, u, backend, tokens, selector="entropy", top_k=K)
    out.loss.backward()
    losses, gradient = expected(case, s, u, tokens)
    compared = out.selected & losses.isfinite() & (gradient.norm(dim=1) > 1e-7)
    assert compared.sum() > 100
    kls = oracle.reverse_kl(s, u)[0].clamp_min(1e-12)
    for row in compared.nonzero().squeeze(1):
        assert_gradient(x.grad[row], gradient[row], small_kl_bound(kls[row].item()))


# --- lists -----------------------------------------------------------------------------------------------------------


def sent(u, ids, **options):
    """The teacher's answer for the (n, K) ids."""
    return TopKLogprobs(ids, u.double().log_softmax(1).gather(1, ids).float(), **options)


def with_token(ids, tokens, seed=3):
    """K + 1 columns in any order; the token may come twice."""
    ids = torch.cat((tokens.unsqueeze(1), ids), 1)
    return ids.gather(1, torch.rand(ids.shape, generator=generator(seed)).argsort(1))


def check_lists(case, backend):
    s, u = logit_pair(6, 173, scale=2.0, seed=1)
    tokens, x = draw_tokens(s), leaf(s)
    of = "student" if case[1] == "student" else "teacher"
    ids = (s if of == "student" else u).topk(K, dim=1).indices
    tokens[0] = ids[0, 2]  # on the list
    out = run(divergence_of(case), x, sent(u, with_token(ids, tokens) if case[2] == "sampled" else ids, of=of), backend, tokens)
    out.loss.backward()
    losses, gradient = expected(case, s, u, tokens)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=str(case))
    assert_gradient(x.grad, gradient)
    if case[2] == "sampled":
        whole = run(divergence_of(case), s, u, backend, tokens)
        name = "kl_sampled_sum"
        assert_within(out.metrics[name], whole.metrics[name], absolute=1e-5, relative=1e-4, name=name)


@two_backends
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in FEW_CASES or case[2] == "sampled" else pytest.mark.full)
        for case in ALL_CASES
        if case[1] != "union"
    ],
    ids=lambda case: "-".join(case[:3]),
)
def test_loss_from_lists_is_that_of_whole_rows(case, backend):
    check_lists(case, backend)


@pytest.mark.parametrize(
    "case",
    [
        FEW_CASES[0],
        *(pytest.param(case, marks=pytest.mark.full) for case in (FEW_CASES[2], ("reverse", "teacher", "sampled", None))),
    ],
)
def test_kernels_take_lists(case):
    check_lists(case, "triton")


@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_heads_learn_from_lists_of_the_student_s_choice(backend):
    student, teacher = head_pair((6,), 173, bias=True, seed=5)
    ours, double = leaf_head(student), leaf_head(student, torch.float64)
    s, u = (eager.logits(Source.of(x, 173, 1.0), torch.arange(6), torch.float64) for x in (double, to_double(teacher)))
    tokens = draw_tokens(s.detach())
    lists = sent(u, with_token(s.detach().topk(K, dim=1).indices, tokens), of="student")
    run(divergence_of(FEW_CASES[0]), ours, lists, backend, tokens, workspace_bytes=20_000).loss.backward()
    s.backward(expected(FEW_CASES[0], s.detach(), u, tokens)[1])
    for got, want in zip(gradients(ours), gradients(double), strict=True):
        assert_gradient(got, want)


@two_backends
def test_the_student_s_ids_give_the_support_mass_itself(backend):
    s, u = logit_pair(6, 173, scale=3.0, seed=1)
    _, got = score_positions(s, sent(u, s.topk(K, dim=1).indices, of="student"), backend=backend, top_k=K)
    _, want = score_positions(s, u, backend=backend, top_k=K)
    assert_within(got.support_mass, want.support_mass, absolute=1e-6, relative=1e-5, name="C")


@pytest.mark.parametrize("absent", [-INF, -9999.0, "id"])
def test_a_missing_entry_of_the_student_s_ids_is_an_error_with_its_position(absent):
    s, u = logit_pair(4, 97, scale=3.0)
    lists = sent(u, s.topk(K, dim=1).indices, of="student")
    if absent == "id":
        lists.ids[2, 3] = -1
    else:
        lists.logprobs[2, 3] = absent
    mask, divergence = torch.ones(4, dtype=torch.bool), TopK("reverse", "student", "mass", K)
    message = (
        r"TopKLogprobs: got a missing entry at position \(2,\) \(1 such positions\), expected a log-probability of every id"
    )
    with pytest.raises(ValueError, match=message):
        run(divergence, s, lists, "torch", mask=mask)
    mask[2] = False
    assert run(divergence, s, lists, "torch", mask=mask).loss > 0
    lists_of_call = TeacherLists.of(lists, 97, torch.float32)
    assert lists_of_call.valid.tolist() == [True, True, False, True]  # where the call cannot look: not valid, as NaN


def test_a_token_that_is_not_listed_is_an_error_with_its_position():
    s, u = logit_pair(4, 97, scale=3.0)
    ids, divergence = u.topk(K, dim=1).indices, TopK("reverse", "teacher", "sampled", K)
    tokens = ids[:, 3].clone()
    assert run(divergence, s, sent(u, ids), "torch", tokens).loss.isfinite()
    tokens[1] = u[1].argmin()
    message = r"got no log-probability of the sampled token at position \(1,\) .* pass K \+ 1 columns"
    with pytest.raises(ValueError, match=message):
        run(divergence, s, sent(u, ids), "torch", tokens)
    lists = TeacherLists.of(sent(u, ids), 97, torch.float32)
    lists = TeacherLists(*plus_tokens(lists.ids, lists.logprobs, tokens, ()), with_token=True)
    assert lists.valid.tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="tokens: got None, but divergence 'topk_reverse_teacher_sampled' reads the sampled"):
        run(divergence, s, sent(u, ids), "torch")


@pytest.mark.parametrize(
    ("support", "of", "message"),
    [
        ("student", "teacher", r"'topk_reverse_student_bucket', which TopKLogprobs .* pass TopKLogprobs\(..., of='student'\)"),
        ("union", "teacher", "the teacher's own list leaves out ids of the student's"),
        ("teacher", "student", r"'tail_aware', which .* expected one of: TopK\(support='student'\)"),
        ("intersection", "student", r"expected one of: TopK\(support='student'\)"),
    ],
)
def test_a_list_refuses_supports_that_it_does_not_have(support, of, message):
    s, u = logit_pair(3, 60)
    with pytest.raises(ValueError, match=message):
        run(TopK(support=support, top_k=4), s, sent(u, s.topk(4, dim=1).indices, of=of), "torch")


def test_sampled_logprobs_refuse_a_list():
    s, u = logit_pair(3, 60)
    teacher = SampledLogprobs(draw_tokens(s), -torch.ones(3))
    with pytest.raises(
        ValueError, match=r"'topk_reverse_student_sampled', which SampledLogprobs cannot give; expected .*sampled"
    ):
        run(TopK("reverse", "student", "sampled"), s, teacher, "torch")
    with pytest.raises(ValueError, match=r"TopKLogprobs.of: got 'both', expected 'teacher' or 'student'"):
        sent(u, s.topk(4, dim=1).indices, of="both")


# --- the class -------------------------------------------------------------------------------------------------------


def test_two_of_them_have_names():
    assert LocalSupport() == TopK("reverse", "teacher", "drop", 32)
    assert TailAware(5) == TopK("reverse", "teacher", "bucket", 5)
    assert [d.name for d in (LocalSupport(3), TailAware(), TopK("jsd", "union", "drop"))] == [
        "local_support",
        "tail_aware",
        "topk_jsd_union_drop",
    ]


@pytest.mark.parametrize(("beta", "direction"), [(0, "forward"), (1.0, "reverse")])
def test_jsd_at_its_ends_is_a_kl(beta, direction):
    s, u = logit_pair(4, 61)
    got = [run(d, s, u, "torch").loss for d in (TopK("jsd", beta=beta), TopK(direction))]
    assert torch.equal(*got)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "both"}, "TopK.direction: got 'both', expected one of: reverse, forward, jsd"),
        ({"support": "token"}, "TopK.support: got 'token', expected one of: teacher, student, union, intersection"),
        ({"tail": "keep"}, "TopK.tail: got 'keep', expected one of: drop, bucket, mass, sampled"),
        (
            {"tail": "cut"},
            "which leaves out q_A - p_A: .* drives the student's mass off the list; 'mass' adds that term; expected",
        ),
        (
            {"direction": "forward", "tail": "cut"},
            r"which is TopKForwardKL\(top_k=...\), .* expected one of: drop, bucket, mass",
        ),
        ({"direction": "forward", "tail": "sampled"}, "would weight a token drawn from p by q/p, which has no bound"),
        ({"direction": "jsd", "tail": "mass"}, "which no source defines; expected one of: drop, bucket"),
        ({"beta": 0.5}, "TopK.beta: got 0.5, expected None with direction 'reverse'"),
        ({"direction": "jsd", "beta": 1.5}, r"TopK.beta: got 1.5, expected a number in \[0, 1\]"),
        ({"top_k": 0}, "TopK.top_k: got 0, expected at least 1"),
    ],
)
def test_top_k_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        TopK(**options)
