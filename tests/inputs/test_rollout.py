"""Student statistics from the rollout: they replace the student's sweep of the score pass, and change nothing else.

  Compared: statistics, selection, loss and gradients with the same call without them; matmul FLOPs with r + 4 rho units;
  a real `generate` of a small random Llama. Kernels on the CPU for "triton".
  Run: make test ARGS=tests/inputs/test_rollout.py

Not here: how far a real model's rollout is from its training pass (benchmarks/cpu/ranking.py).
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_ops import LinearHead, RolloutRecorder, StudentStats, score_positions, selective_opd_loss
from opd_ops.backends import eager
from tests.support.cases import gradients, head_pair, leaf, leaf_head, logit_pair
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_stats, assert_within

BACKENDS = ["eager", "torch", "triton"]


def logits(head):
    x = head.scale * (head.hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


def heads(shape=(2, 3), vocab=131, **options):
    student, teacher = head_pair(shape, vocab, **options)
    return student, teacher, StudentStats.from_logits(logits(student).double(), temperature=0.8)


def known(stats):
    """What of the statistics does not take the student's whole row."""
    blank = torch.zeros_like(stats.reverse_kl)
    return stats._replace(reverse_kl=blank, forward_kl=blank)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", [{}, {"bias": True, "scale": 0.5}, {"softcap": 20.0}])
def test_statistics_are_those_of_scoring_both_models(transform, backend):
    student, teacher, stats = heads(**transform)
    options = {"temperature": 0.8, "selector": "teachability-released"}
    scores, got = score_positions(student, teacher, student_stats=stats, backend=backend, **options)
    want_scores, want = score_positions(student, teacher, backend="eager", **options)
    assert_stats(known(got), known(want), absolute=HEAD_ABSOLUTE)
    assert got.reverse_kl.isnan().all()
    assert got.forward_kl.isnan().all()
    torch.testing.assert_close(scores, want_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_small_workspace_changes_nothing(backend):
    student, teacher, stats = heads((12,) if backend == "torch" else (4,))
    options = {"student_stats": stats, "temperature": 0.8, "backend": backend}
    (a, small), (b, large) = (score_positions(student, teacher, workspace_bytes=x, **options) for x in (2**14, 2**29))
    assert_stats(known(small), known(large))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_teacher_may_be_dense_and_ids_in_any_order():
    student, teacher, stats = heads()
    flipped = StudentStats(stats.logsumexp, stats.entropy, stats.ids.flip(-1).int(), stats.logprobs.flip(-1))
    for backend in BACKENDS:
        _, got = score_positions(student, logits(teacher), student_stats=flipped, temperature=0.8, backend=backend)
        _, want = score_positions(student, teacher, temperature=0.8, backend="eager")
        assert_stats(known(got), known(want), absolute=HEAD_ABSOLUTE)


@pytest.mark.parametrize("written", [-9999.0, -math.inf])
def test_an_entry_of_minus_9999_is_missing(written):
    student, teacher, stats = heads()
    shorter = replace(stats, ids=stats.ids[..., :-1], logprobs=stats.logprobs[..., :-1])
    masked = replace(stats, logprobs=torch.cat((shorter.logprobs, torch.full_like(stats.logprobs[..., :1], written)), -1))
    top_k = shorter.ids.shape[-1]
    _, got = score_positions(student, teacher, student_stats=masked, top_k=top_k + 1)
    _, want = score_positions(student, teacher, student_stats=shorter, top_k=top_k)
    assert (want.support_mass > 0).all()
    torch.testing.assert_close(got.support_mass, want.support_mass)
    torch.testing.assert_close(got.student_support_mass, want.student_support_mass)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("selector", ["teachability", "entropy", "compatibility"])
def test_the_loss_and_its_gradients_are_those_without(selector, backend):
    pair = heads(bias=True)
    student, plain = leaf_head(pair[0]), leaf_head(pair[0])
    options = {"temperature": 0.8, "fraction": 0.5, "selector": selector}
    got = selective_opd_loss(student, pair[1], student_stats=pair[2], backend=backend, **options)
    want = selective_opd_loss(plain, pair[1], backend="eager", **options)
    got.loss.backward()
    want.loss.backward()
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.metrics["kl_selected"], want.metrics["kl_selected"], rtol=1e-4, atol=1e-6)
    assert got.metrics["kl_all"].isnan()
    for result, wanted in zip(gradients(student), gradients(plain), strict=True):
        assert_gradient(result, wanted)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_divergence_found_late_is_not_trained_on(backend, divergence):
    student, teacher, _ = heads((6,))
    sides = [logits(student), logits(teacher)]
    other = 1 if divergence == "reverse_kl" else 0
    sides[other][2, sides[1 - other][2].argmin()] = -math.inf  # outside both supports: only the whole row shows it
    stats = StudentStats.from_logits(sides[0])
    if divergence == "reverse_kl":
        student = leaf_head(student)
        trained, sides = student.hidden, (student, sides[1])
    else:
        trained, sides = leaf(sides[0]), (None, teacher)
        sides = (trained, teacher)
    options = {"fraction": 1.0, "selector": "all", "backend": backend, "divergence": divergence}
    out = selective_opd_loss(*sides, student_stats=stats, **options)
    out.loss.backward()
    assert out.selected.tolist() == [True, True, False, True, True, True]
    assert getattr(out.stats, divergence)[2] == math.inf
    assert out.metrics["n_infinite"] == 1
    assert torch.isfinite(out.loss)
    assert trained.grad.isfinite().all()
    assert not trained.grad[2].any()
    assert trained.grad[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    student, teacher, stats = heads(bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = score_positions(student, teacher, student_stats=stats, temperature=0.8, backend=backend)
    assert torch.equal(scores, score_positions(student, teacher, student_stats=stats, temperature=0.8, backend=backend)[0])


@pytest.mark.parametrize(("backend", "units"), [("triton", 4), ("torch", 6)])
def test_it_costs_the_teacher_and_the_selected_rows(backend, units):
    n, vocab, dim, k, rho = 20, 140, 32, 4, 0.2
    student, teacher = head_pair((n,), vocab, student_dim=dim, teacher_dim=dim)
    stats = StudentStats.from_logits(logits(student), top_k=k)
    with FlopCounterMode(display=False) as counter:
        selective_opd_loss(
            leaf_head(student), teacher, student_stats=stats, fraction=rho, top_k=k, backend=backend
        ).loss.backward()
    expected = 1 + units * rho + 2 * k / vocab  # the dot products on the other's support
    assert counter.get_total_flops() / (2 * n * vocab * dim) == pytest.approx(expected, rel=1e-12)


def test_masked_rows_may_hold_anything():
    student, teacher, stats = heads((4,))
    for column in (stats.logsumexp, stats.entropy, stats.logprobs):
        column[3] = math.nan
    stats.ids[3] = -1
    mask = torch.arange(4) < 3
    scores, got = score_positions(student, teacher, student_stats=stats, temperature=0.8, mask=mask, backend="torch")
    assert scores[3] == -math.inf
    assert got.union_kl[:3].all()


def test_it_rejects_selectors_that_need_the_whole_row():
    student, teacher, stats = heads()
    for selector in ("tip", "overconfident", "divergence-reverse-kl", "multinomial"):
        with pytest.raises(ValueError, match=f"selector: got '{selector}', which needs the student's whole row.*teachability"):
            score_positions(student, teacher, student_stats=stats, selector=selector)


def test_it_rejects_a_selector_of_the_users_own_that_needs_the_whole_row():
    class ByJSD:
        needs = frozenset({"jsd"})

        def __call__(self, stats):
            return stats.jsd

    student, teacher, stats = heads()
    with pytest.raises(ValueError, match="selector: got 'ByJSD', which needs the student's whole row"):
        score_positions(student, teacher, student_stats=stats, selector=ByJSD())


def test_it_rejects_statistics_that_do_not_fit():
    student, teacher, stats = heads()
    for wrong, message in (
        ((stats.logsumexp,) * 4, "ids: got dtype torch.float64, expected an int32 or int64"),
        ((stats.logsumexp, stats.entropy[0], stats.ids, stats.logprobs), r"entropy: got shape \(3,\), expected \(2, 3\)"),
        ((stats.logsumexp, stats.entropy, stats.ids, stats.logprobs[..., :3]), r"logprobs: got shape \(2, 3, 3\)"),
        ((stats.logsumexp, stats.entropy, stats.ids[0], stats.logprobs), r"ids: got shape \(3, 16\), expected \(2, 3\) and K"),
        ((stats.ids, stats.entropy, stats.ids, stats.logprobs), "logsumexp: got dtype torch.int64, expected a floating"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"StudentStats.{message}"):
            StudentStats(*wrong)
    with pytest.raises(TypeError, match="student_stats: got dict, expected StudentStats"):
        score_positions(student, teacher, student_stats={})
    with pytest.raises(ValueError, match="student_stats: got 16 ids a position, expected at least top_k = 32"):
        score_positions(student, teacher, student_stats=stats, top_k=32)
    one = [LinearHead(head.hidden[:1], head.weight) for head in (student, teacher)]
    with pytest.raises(ValueError, match=r"student_stats.logsumexp: got shape \(2, 3\), expected \(1, 3\)"):
        score_positions(*one, student_stats=stats)
    wild = StudentStats(stats.logsumexp, stats.entropy, stats.ids + 100, stats.logprobs)
    with pytest.raises(ValueError, match=r"student_stats.ids: got 10\d \.\.\. \d+ at valid positions, expected 0 \.\.\. 130"):
        score_positions(student, teacher, student_stats=wild)
    with pytest.raises(ValueError, match="top_k: got 0, expected at least 1"):
        StudentStats.from_logits(stats.logprobs, top_k=0)
    with pytest.raises(ValueError, match="student_stats: are over the student's own vocabulary of 131, but the call compares"):
        score_positions(student, teacher, student_stats=stats, vocab_size=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_of_logits_match_eager_fp64(dtype):
    x, _ = logit_pair(4, 300, dtype=dtype)
    x[0, 5:9] = x[0].max() + 1  # ties: lower ids first
    x[1, 100:] = -math.inf
    got = StudentStats.from_logits(x.view(2, 2, 300), top_k=7, temperature=0.5)
    double = x.double() / 0.5
    assert_within(got.entropy.flatten(), eager.entropy(double), absolute=1e-6, relative=1e-5, name="entropy")
    assert_within(got.logsumexp.flatten(), double.logsumexp(1), absolute=1e-6, relative=1e-5, name="logsumexp")
    ids = eager.top_k_ids(double, 7)
    assert torch.equal(got.ids.view(4, 7), ids)
    assert StudentStats.from_logits(x[:0], top_k=7).ids.shape == (0, 7)
    assert_within(got.logprobs.view(4, 7), double.log_softmax(1).gather(1, ids), absolute=1e-5, relative=1e-5, name="logprobs")


def test_recorded_while_generate_samples_they_score_what_was_written():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=131, num_hidden_layers=2, eos_token_id=None, bos_token_id=1, pad_token_id=0, **size
    )
    student, teacher = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    for model in (student, teacher):
        model.lm_head.weight.data.mul_(40)  # peaked, as a trained model is
    prompt = torch.randint(3, 131, (2, 5))
    recorder = RolloutRecorder(top_k=8)
    tokens = student.generate(
        prompt, do_sample=True, max_new_tokens=6, temperature=0.7, top_p=0.9, logits_processor=[recorder], use_cache=True
    )
    stats = recorder.stats()
    assert stats.ids.shape == (2, 6, 8)
    with torch.no_grad():
        hidden = [model.model(tokens).last_hidden_state[:, 4:-1] for model in (student, teacher)]
    sides = [LinearHead(h, model.lm_head.weight.detach()) for h, model in zip(hidden, (student, teacher), strict=True)]
    scores, got = score_positions(*sides, student_stats=stats, top_k=8)
    want_scores, want = score_positions(*sides, top_k=8)
    assert_stats(known(got), known(want), absolute=2e-5)  # a cached decoding step against one pass over the whole sequence
    torch.testing.assert_close(scores, want_scores, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="RolloutRecorder: got no step"):
        RolloutRecorder().stats()


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("selector", ["dial", "log-ratio"])
def test_the_sampled_token_is_scored_by_the_present_student(backend, selector):
    """Its log-sum-exp is not the rollout's: adding a constant to a row changes no probability, so no score."""
    student, teacher = logit_pair(6, 61)
    tokens, known = student.argsort(1)[:, -3], StudentStats.from_logits(student)
    options = {"tokens": tokens, "student_stats": known, "selector": selector, "fraction": 0.5, "backend": backend}
    moved = student + torch.tensor([[3.0], [-2.0], [0.5], [9.0], [-4.0], [1.0]])
    out, want = selective_opd_loss(moved, teacher, **options), selective_opd_loss(student, teacher, **options)
    torch.testing.assert_close(out.scores, want.scores, rtol=1e-4, atol=1e-5)
    assert len(want.scores.unique()) == len(tokens)
