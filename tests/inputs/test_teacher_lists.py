"""Sparse teachers: top-K lists and sampled tokens' log-probabilities, in every form in which servers send them.

  Compared: with the same losses from the teacher's whole rows (support/divergence_oracle.py), and with statistics by hand from
  lists. Run: make test ARGS=tests/inputs/test_teacher_lists.py

Not here: divergences from logits (tests/divergences/test_divergences.py).
"""

import math

import pytest
import torch

from opd_ops import (
    LocalSupport,
    SampledLogprobs,
    SampledToken,
    StudentStats,
    TailAware,
    TopKForwardKL,
    TopKLogprobs,
    score_positions,
    selective_opd_loss,
)
from opd_ops.backends import eager
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists, tail
from tests.divergences.test_divergences import draw_tokens
from tests.support import divergence_oracle as oracle
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import assert_gradient, assert_stats, assert_within

INF = float("inf")
K = 12
ALL = {"selector": "all", "fraction": 1.0, "denominator": "valid", "num_items_in_batch": 1.0}
ON_LISTS = {
    "tail_aware": (TailAware(top_k=K), oracle.tail_aware),
    "local_support": (LocalSupport(top_k=K), oracle.local_support),
    "forward_kl_topk": (TopKForwardKL(top_k=K), oracle.forward_kl_topk),
}
on_lists = pytest.mark.parametrize("name", ON_LISTS)
every_backend = pytest.mark.parametrize("backend", ["torch", "eager", "triton"])


def top_k(u, k=K):
    """A server's answer, best first."""
    got = u.double().log_softmax(-1).topk(k, dim=-1)
    return got.indices, got.values.float()


def as_vllm(u, tokens, k=K, seed=0):
    """K + 1 columns in any order: the sampled token's, then the top K (which may repeat it), some of them missing."""
    ids, logprobs = top_k(u, k)
    token_logprobs = u.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).float()
    ids, logprobs = torch.cat((tokens.unsqueeze(-1), ids), -1), torch.cat((token_logprobs, logprobs), -1)
    padding = torch.tensor([-1, 0]).expand(*ids.shape[:-1], 2)
    ids, logprobs = torch.cat((ids, padding), -1), torch.cat((logprobs, torch.full(padding.shape, -INF)), -1)
    order = torch.rand(ids.shape, generator=generator(seed)).argsort(-1)
    return ids.gather(-1, order), logprobs.gather(-1, order)


@every_backend
@on_lists
def test_loss_from_a_top_k_teacher_is_that_of_its_whole_rows(name, backend):
    s, u = logit_pair(6, 211, scale=3.0, seed=1)
    divergence, equation = ON_LISTS[name]
    x = leaf(s)
    out = selective_opd_loss(x, TopKLogprobs(*top_k(u)), divergence=divergence, backend=backend, **ALL)
    out.loss.backward()
    losses, gradient = equation(s, u, top_k=K)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=name)
    assert_gradient(x.grad, gradient)


@pytest.mark.parametrize("backend", ["torch", "eager"])
@on_lists
def test_lists_may_come_in_any_order_with_the_sampled_token_and_missing_entries(name, backend):
    s, u = logit_pair(6, 211, scale=3.0, seed=1)
    divergence, equation = ON_LISTS[name]
    ids, logprobs = as_vllm(u, draw_tokens(s))
    out = selective_opd_loss(s, TopKLogprobs(ids, logprobs), divergence=divergence, backend=backend, **ALL)
    assert_within(out.loss, equation(s, u, top_k=K)[0].sum(), absolute=1e-5, relative=1e-4, name=name)
    int32 = selective_opd_loss(s, TopKLogprobs(ids.int(), logprobs), divergence=divergence, backend=backend, **ALL)
    assert torch.equal(int32.loss, out.loss)


@on_lists
def test_heads_learn_from_a_top_k_teacher(name):
    student, teacher = head_pair((3, 4), 211, bias=True, seed=5)
    rows = torch.arange(12)
    double = leaf_head(student, torch.float64)
    s = eager.logits(Source.of(double, 211, 1.0), rows, torch.float64)
    u = eager.logits(Source.of(to_double(teacher), 211, 1.0), rows, torch.float64)
    divergence, equation = ON_LISTS[name]
    result = leaf_head(student)
    listed = TopKLogprobs(*(x.view(3, 4, K) for x in top_k(u)))
    selective_opd_loss(result, listed, divergence=divergence, backend="torch", workspace_bytes=9_000, **ALL).loss.backward()
    s.backward(equation(s.detach(), u, top_k=K)[1])
    for got, want in zip(gradients(result), gradients(double), strict=True):
        assert_gradient(got, want)


@every_backend
def test_statistics_from_lists_take_the_teacher_as_zero_off_its_list(backend):
    s, u = logit_pair(7, 173, scale=3.0, seed=2)
    # The top K of the student, the whole list of the teacher.
    scores, stats = score_positions(s, TopKLogprobs(*top_k(u)), backend=backend, top_k=8)
    truncated = torch.full_like(u, -INF).scatter(1, u.topk(8).indices, u.topk(8).values)
    _, want = score_positions(s.double(), truncated.double(), backend="eager", top_k=8)
    _, whole = score_positions(s.double(), u.double(), backend="eager", top_k=8)
    for name in ("student_entropy", "student_logsumexp", "student_support_mass"):
        assert_within(getattr(stats, name), getattr(whole, name), absolute=1e-6, relative=1e-5, name=name)
    assert_within(stats.support_mass, whole.overlap_mass, absolute=1e-6, relative=1e-5, name="lower bound")
    assert bool((stats.support_mass <= whole.support_mass + 1e-6).all())
    assert_within(stats.union_kl, want.union_kl, absolute=1e-6, relative=1e-4, name="union_kl")
    assert bool(stats.reverse_kl.isnan().all() and stats.forward_kl.isnan().all() and stats.teacher_entropy.isnan().all())
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_released_teachability_from_lists_is_that_of_whole_rows(backend):
    s, u = logit_pair(9, 97, scale=3.0, seed=3)
    options = {"selector": "teachability-released", "backend": backend, "top_k": K}
    got, _ = score_positions(s, TopKLogprobs(*top_k(u)), **options)
    want, _ = score_positions(s, u, **options)
    assert_within(got, want, absolute=1e-4, relative=1e-4, name="scores")


def test_the_bound_on_support_mass_has_its_own_name_in_the_metrics():
    s, u = logit_pair(9, 97, scale=3.0, seed=3)
    out = selective_opd_loss(s, TopKLogprobs(*top_k(u)), divergence="tail_aware", fraction=0.5)
    assert "support_mass" not in out.metrics
    assert_within(
        out.metrics["support_mass_lower_bound_sum"], out.stats.support_mass.sum(), absolute=1e-6, relative=1e-6, name="bound"
    )
    assert out.metrics["support_mass_lower_bound_selected"].isfinite()


@pytest.mark.parametrize(("backend", "clip"), [("torch", None), ("torch", 0.3), ("eager", 0.3), ("triton", None)])
def test_loss_from_sampled_logprobs_is_that_of_whole_rows(backend, clip):
    s, u = logit_pair(8, 173, scale=3.0, seed=4)
    tokens = draw_tokens(s)
    log_q = u.double().log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    x = leaf(s)
    teacher = SampledLogprobs(tokens, log_q.float())
    out = selective_opd_loss(x, teacher, divergence=SampledToken(clip=clip), backend=backend, **ALL)
    out.loss.backward()
    losses, gradient = oracle.sampled(s, u, tokens, clip=clip or INF)
    assert_within(out.loss, losses.sum(), absolute=1e-4, relative=1e-4, name="loss")
    assert_gradient(x.grad, gradient)
    log_p = s.double().log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert_within(out.metrics["kl_sampled_sum"], (log_p - log_q).sum(), absolute=1e-5, relative=1e-5, name="kl_sampled")
    dense = selective_opd_loss(s, u, divergence=SampledToken(clip=clip), backend=backend, tokens=tokens, **ALL)
    assert_within(out.loss, dense.loss, absolute=1e-5, relative=1e-5, name="from logits")
    assert_within(out.metrics["kl_sampled"], dense.metrics["kl_sampled"], absolute=1e-5, relative=1e-5, name="kl_sampled")


def test_labels_are_the_sampled_tokens_too():
    s, u = logit_pair(8, 173, seed=4)
    s, u, tokens = s.view(2, 4, -1), u.view(2, 4, -1), draw_tokens(s).view(2, 4)
    labels = torch.cat((torch.zeros(2, 1, dtype=torch.long), tokens), 1)[:, :4]  # unshifted: the last row has no target
    out = selective_opd_loss(s, u, divergence="sampled", labels=labels, selector="all", fraction=1.0)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[:, -1] = False
    want = selective_opd_loss(s, u, divergence="sampled", tokens=tokens, mask=mask, selector="all", fraction=1.0)
    assert torch.equal(out.loss, want.loss)
    shifted = selective_opd_loss(s, u, divergence="sampled", shift_labels=tokens, mask=mask, selector="all", fraction=1.0)
    assert torch.equal(shifted.loss, want.loss)


def with_absent(ids, logprobs, s, absent):
    """The lists, and before them the student's best token that is not listed, with the log-probability `absent`."""
    listed = torch.zeros_like(s, dtype=torch.bool).scatter(-1, ids, True)
    best = s.masked_fill(listed, -INF).argmax(-1, keepdim=True)
    return torch.cat((best, ids), -1), torch.cat((torch.full(best.shape, absent), logprobs), -1)


@every_backend
@on_lists
def test_an_entry_of_minus_9999_is_missing(name, backend):
    s, u = logit_pair(6, 211, scale=3.0, seed=1)
    divergence, options = ON_LISTS[name][0], {"backend": backend, **ALL}
    ids, logprobs = top_k(u, K - 1)
    got = []
    for absent in (-9999.0, -INF):
        x = leaf(s)
        out = selective_opd_loss(x, TopKLogprobs(*with_absent(ids, logprobs, s, absent)), divergence=divergence, **options)
        out.loss.backward()
        got.append((out.loss.detach(), x.grad, out.stats.support_mass, out.stats.union_kl))
    assert all(map(torch.equal, *got))
    assert got[0][1].any(1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])  # bf16 makes -9984 of -9999
def test_listed_drops_minus_9999_or_less_of_every_dtype(dtype):
    logprobs = torch.tensor([[-9999.0, -1.0, -12345.0, -9000.0]], dtype=dtype)
    got = TeacherLists.of(TopKLogprobs(torch.tensor([[1, 2, 3, 4]]), logprobs), 100, torch.float32)
    assert got.ids.tolist() == [[2, 4, LAST_ID, LAST_ID]]
    assert got.logprobs[0, 2:].tolist() == [-INF, -INF]


@every_backend
def test_a_sampled_token_of_minus_9999_is_dropped(backend):
    s, u = logit_pair(6, 211, scale=3.0, seed=1)
    tokens = draw_tokens(s)
    logprobs = u.double().log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1).float()
    logprobs[2] = -9999.0
    x = leaf(s)
    out = selective_opd_loss(x, SampledLogprobs(tokens, logprobs), divergence="sampled", backend=backend, **ALL)
    out.loss.backward()
    kept = torch.arange(6) != 2
    losses, gradient = oracle.sampled(s[kept], u[kept], tokens[kept])
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-5, name="loss")
    assert_gradient(x.grad[kept], gradient)
    assert not x.grad[2].any()
    assert out.selected.tolist() == kept.tolist()
    assert out.metrics["n_teacher_nonfinite"] == 1


@every_backend
def test_nan_in_a_list_is_an_error_with_its_position(backend):
    s, u = logit_pair(12, 97, scale=3.0)
    s, u, tokens = s.view(3, 4, -1), u.view(3, 4, -1), draw_tokens(s).view(3, 4)
    ids, logprobs = top_k(u)
    logprobs[1, 2, 5], logprobs[2, 3, 0] = math.nan, math.nan
    mask = ~logprobs.isnan().any(-1)
    options = {"divergence": TailAware(top_k=K), "backend": backend, **ALL}
    message = r"logprobs: got NaN at position \(1, 2\) \(2 such positions\), expected log-probabilities, -inf or id -1 where"
    with pytest.raises(ValueError, match=rf"TopKLogprobs\.{message}"):
        selective_opd_loss(s, TopKLogprobs(ids, logprobs), **options)
    token_options = {"divergence": "sampled", "backend": backend, **ALL}
    with pytest.raises(ValueError, match=rf"SampledLogprobs\.{message}"):
        selective_opd_loss(s, SampledLogprobs(tokens, torch.where(mask, -1.0, math.nan)), **token_options)
    # Rows outside the mask may hold anything, and an id of -1 beside anything is missing.
    got = selective_opd_loss(s, TopKLogprobs(ids, logprobs), mask=mask, **options).loss
    whole = selective_opd_loss(s, TopKLogprobs(ids, logprobs.nan_to_num(-1.0)), mask=mask, **options).loss
    assert torch.equal(got, whole)
    assert got > 0
    gone = TopKLogprobs(ids.masked_fill(logprobs.isnan(), -1), logprobs)
    assert selective_opd_loss(s, gone, **options).selected.all()


def test_nan_in_a_list_that_is_not_looked_at_makes_the_position_invalid():
    ids, logprobs = top_k(logit_pair(4, 97, scale=3.0)[1])
    ids[1], logprobs[2, 3] = -1, math.nan
    assert TeacherLists.of(TopKLogprobs(ids, logprobs), 97, torch.float32).valid.tolist() == [True, False, False, True]


@every_backend
def test_positions_without_a_listed_entry_are_not_valid(backend):
    s, u = logit_pair(4, 97, scale=3.0)
    ids, logprobs = top_k(u)
    ids[1], logprobs[2] = -1, -INF
    x = leaf(s)
    out = selective_opd_loss(x, TopKLogprobs(ids, logprobs), divergence="tail_aware", backend=backend, **ALL)
    out.loss.backward()
    assert out.selected.tolist() == [True, False, False, True]
    assert out.metrics["n_teacher_nonfinite"] == 2
    assert out.loss.isfinite()
    assert not x.grad[[1, 2]].any()
    with pytest.raises(ValueError, match=r"teacher: got logits without a finite softmax at position \(1,\)"):
        selective_opd_loss(x, TopKLogprobs(ids, logprobs), divergence="tail_aware", check_finite=True, **ALL)


@every_backend
def test_ids_beyond_the_common_vocabulary_are_missing(backend):
    s, u = logit_pair(3, 90, scale=3.0)
    ids, logprobs = top_k(u)
    beyond = torch.tensor([90, 151_936]).expand(3, 2)
    more = TopKLogprobs(torch.cat((ids, beyond), 1), torch.cat((logprobs, torch.full((3, 2), -9.0)), 1))
    options = {"divergence": TopKForwardKL(top_k=K), "backend": backend, **ALL}
    got, want = (selective_opd_loss(s, teacher, **options).loss for teacher in (more, TopKLogprobs(ids, logprobs)))
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_with_rollout_statistics_scoring_reads_no_head(backend):
    s, u = logit_pair(9, 97, scale=3.0, seed=6)
    listed, known = TopKLogprobs(*top_k(u)), StudentStats.from_logits(s)
    options = {"divergence": TailAware(top_k=K), "backend": backend, "fraction": 0.4}
    got = selective_opd_loss(s, listed, student_stats=known, **options)
    want = selective_opd_loss(s, listed, **options)
    known_of_both = {name: want.stats.valid.float() for name in ("reverse_kl", "forward_kl", "teacher_entropy")}
    assert_stats(got.stats._replace(**known_of_both), want.stats._replace(**known_of_both))
    assert torch.equal(got.selected, want.selected)
    assert_within(got.loss, want.loss, absolute=1e-6, relative=1e-5, name="loss")


def test_listed_is_in_order_with_each_id_once():
    ids = torch.tensor([[5, 3, 5, -1, 7, 0, 200]])
    logprobs = torch.tensor([[-2.0, -1.0, -2.0, -0.1, -2.0, -INF, -0.2]])
    got = TeacherLists.of(TopKLogprobs(ids, logprobs), 100, torch.float32)
    assert got.ids.tolist() == [[3, 5, 7, LAST_ID, LAST_ID, LAST_ID, LAST_ID]]
    assert got.logprobs.tolist() == [[-1.0, -2.0, -2.0, -INF, -INF, -INF, -INF]]


def test_listed_keeps_the_likelier_of_equal_ids_in_any_order():
    ids, logprobs = torch.tensor([[5, 5, 2], [5, 2, 5]]), torch.tensor([[-2.0, -1.0, -3.0], [-1.0, -3.0, -2.0]])
    got = TeacherLists.of(TopKLogprobs(ids, logprobs), 100, torch.float32)
    assert got.ids.tolist() == [[5, 2, LAST_ID]] * 2
    assert got.logprobs[:, 0].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@every_backend
def test_no_position_gives_a_connected_zero(backend, shape):
    s = leaf(torch.randn(*shape, 60))
    listed = TopKLogprobs(torch.zeros(*shape, 5, dtype=torch.long), torch.zeros(*shape, 5))
    token = SampledLogprobs(torch.zeros(shape, dtype=torch.long), torch.zeros(shape))
    for teacher, divergence in ((listed, "tail_aware"), (listed, "local_support"), (token, "sampled")):
        selector = "all" if teacher is token else "teachability"
        loss = selective_opd_loss(s, teacher, divergence=LocalSupport(top_k=5) if divergence == "local_support" else divergence,
                                  selector=selector, backend=backend).loss  # fmt: skip
        assert loss == 0
        loss.backward()
        assert s.grad.shape == s.shape


def test_tokens_must_be_those_of_a_sampled_teacher():
    s, _ = logit_pair(3, 60)
    teacher = SampledLogprobs(torch.tensor([1, 2, 3]), -torch.ones(3))
    with pytest.raises(ValueError, match="tokens: differ from the ids of SampledLogprobs at 1 positions, the first 2 of the"):
        selective_opd_loss(s, teacher, divergence="sampled", selector="all", tokens=torch.tensor([1, 2, 4]))
    mask = torch.tensor([1, 1, 0])  # where not valid, tokens may differ
    out = selective_opd_loss(s, teacher, mask=mask, divergence="sampled", selector="all", tokens=torch.tensor([1, 2, 4]))
    assert out.loss.isfinite()


def test_listed_merges_equivalent_ids_into_the_first():
    ids, logprobs = torch.tensor([[4, 9, 2, 4]]), torch.tensor([[0.25, 0.125, 0.5, 0.25]]).log()
    got = TeacherLists.of(TopKLogprobs(ids, logprobs), 100, torch.float32, merged=(9, 4))
    assert got.ids.tolist() == [[2, 9, LAST_ID, LAST_ID]]
    assert_within(got.logprobs[0, :2].exp(), torch.tensor([0.5, 0.375]), absolute=1e-6, relative=0, name="mass")


def test_tail_is_exact_where_the_list_holds_nearly_all_or_nothing():
    for mass in (1e-12, 0.3, 0.5, 0.7, 1 - 1e-6):
        listed = torch.tensor([[mass / 2, mass / 2]], dtype=torch.float64).log()
        assert tail(listed).item() == pytest.approx(math.log1p(-mass), rel=1e-9)
    full = torch.tensor([[0.5, 0.5 + 1e-6]], dtype=torch.float64).log()  # rounding may exceed 1
    assert tail(full).exp().item() == pytest.approx(2**-23)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "total_variation", "entropy_aware", "sampled"])
def test_top_k_teacher_rejects_what_it_cannot_give(divergence):
    s, u = logit_pair(3, 60)
    with pytest.raises(
        ValueError, match=f"'{divergence}', which TopKLogprobs cannot give; expected one of: local_support, tail_aware"
    ):
        selective_opd_loss(s, TopKLogprobs(*top_k(u)), divergence=divergence)


def test_top_k_teacher_points_from_reverse_kl_to_tail_aware():
    s, u = logit_pair(3, 60)
    with pytest.raises(ValueError, match="tail_aware is reverse KL with all that is not listed as one outcome"):
        selective_opd_loss(s, TopKLogprobs(*top_k(u)))
    with pytest.raises(ValueError, match="'sampled' takes SampledLogprobs"):
        selective_opd_loss(s, TopKLogprobs(*top_k(u)), divergence="sampled")


@pytest.mark.parametrize("divergence", ["reverse_kl", "tail_aware", "local_support"])
def test_sampled_teacher_rejects_all_but_sampled(divergence):
    s, _ = logit_pair(3, 60)
    teacher = SampledLogprobs(torch.tensor([1, 2, 3]), torch.full((3,), -1.0))
    with pytest.raises(ValueError, match=f"'{divergence}', which SampledLogprobs cannot give; expected one of: sampled"):
        selective_opd_loss(s, teacher, divergence=divergence, selector="all")


@pytest.mark.parametrize("selector", ["tip", "overconfident", "divergence-reverse-kl", "multinomial"])
def test_top_k_teacher_rejects_selectors_of_whole_rows(selector):
    s, u = logit_pair(3, 60)
    with pytest.raises(ValueError, match=f"'{selector}', which needs the teacher's whole row, .*expected one of: teachability"):
        selective_opd_loss(s, TopKLogprobs(*top_k(u)), divergence="tail_aware", selector=selector)


def test_a_selector_rejects_lists_without_the_sampled_token():
    s, u = logit_pair(4, 61)
    lists, tokens = TopKLogprobs(*top_k(u)), u.argmax(1)
    assert score_positions(s, lists, tokens=tokens, selector="dial", top_k=K)[0].isfinite().all()
    tokens[2] = u[2].argmin()
    with pytest.raises(ValueError, match=r"got no log-probability of the sampled token at position \(2,\) \(1 such"):
        score_positions(s, lists, tokens=tokens, selector="dial", top_k=K)


@pytest.mark.parametrize("selector", ["teachability", "compatibility", "teachability-released", "tip"])
def test_sampled_teacher_rejects_selectors_of_the_teacher(selector):
    s, _ = logit_pair(3, 60)
    teacher = SampledLogprobs(torch.tensor([1, 2, 3]), torch.full((3,), -1.0))
    with pytest.raises(ValueError, match=f"'{selector}', .*expected one of: entropy, dial, log-ratio, random, all, prefix"):
        selective_opd_loss(s, teacher, divergence="sampled", selector=selector)
    for allowed in ("entropy", "dial", "log-ratio", "random", "all", "prefix", lambda stats: stats.student_support_mass):
        assert selective_opd_loss(s, teacher, divergence="sampled", selector=allowed).loss.isfinite()


@pytest.mark.parametrize("kind", [TopKLogprobs, SampledLogprobs])
@pytest.mark.parametrize(
    ("ids", "logprobs", "options", "error", "message"),
    [
        (torch.ones(2, 3), -torch.ones(2, 3), {}, TypeError, "ids: got dtype torch.float32, expected an int32 or int64"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), {}, TypeError, "logprobs: got dtype torch.int64, expected a float"),
        (torch.ones(2, 3).long(), -torch.ones(2, 4), {}, ValueError, r"logprobs: got shape \(2, 4\), expected that of the ids"),
        (torch.ones(2, 3).long(), 2 * torch.ones(2, 3), {}, ValueError, "logprobs: got 2, expected log-probabilities"),
        (torch.ones(2, 3).long(), -torch.ones(2, 3), {"temperature": 0}, ValueError, "temperature: got 0, expected"),
    ],
)
def test_sparse_teacher_rejects(kind, ids, logprobs, options, error, message):
    with pytest.raises(error, match=f"{kind.__name__}.{message}"):
        kind(ids, logprobs, **options)


def test_call_rejects_a_sparse_teacher_of_other_positions_or_temperature():
    s, u = logit_pair(3, 60)
    with pytest.raises(ValueError, match=r"teacher: got positions of shape \(2,\), expected those of the student, \(3,\)"):
        selective_opd_loss(s, TopKLogprobs(*top_k(u[:2])), divergence="tail_aware")
    with pytest.raises(ValueError, match="temperature: got 2, but TopKLogprobs holds log-probabilities at 1; ask the server"):
        selective_opd_loss(s, TopKLogprobs(*top_k(u)), divergence="tail_aware", temperature=2.0)
    with pytest.raises(ValueError, match=r"TopKLogprobs.ids: got shape \(\), expected \(..., K\) with K >= 1"):
        TopKLogprobs(torch.tensor(1), torch.tensor(-1.0))


def test_temperature_of_the_lists_is_that_of_the_call():
    s, u = logit_pair(5, 97, scale=3.0)
    ids, logprobs = top_k(u.double() / 2)
    out = selective_opd_loss(
        s, TopKLogprobs(ids, logprobs, temperature=2.0), divergence=TailAware(top_k=K), temperature=2.0, **ALL
    )
    assert_within(out.loss, oracle.tail_aware(s / 2, u / 2, top_k=K)[0].sum(), absolute=1e-5, relative=1e-4, name="loss")
