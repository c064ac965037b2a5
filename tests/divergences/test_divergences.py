"""Every divergence on every backend, value and gradient, against its equation and its gradient's on whole fp64 rows
(support/divergence_oracle.py), for logits and for heads.

  Bounds: those of support/tolerances.py. Run: make test ARGS=tests/divergences/test_divergences.py

Not here: sparse teachers (tests/inputs/test_teacher_lists.py), drawn combinations (tests/loss/test_hardening.py), units
(tests/loss/test_cost.py).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from opd_ops import (
    JSD,
    EntropyAware,
    ForwardKL,
    ImportanceWeighted,
    LinearHead,
    LocalSupport,
    Power,
    ReverseKL,
    SampledToken,
    SkewKL,
    TailAware,
    TopKForwardKL,
    TotalVariation,
    selective_opd_loss,
)
from opd_ops.backends import eager
from opd_ops.divergences import DIVERGENCES, OnSupport, Summed, WholeRow
from opd_ops.inputs.sources import Source
from tests.support import divergence_oracle as oracle
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_within, small_kl_bound

INF = float("inf")
ALL = {"selector": "all", "fraction": 1.0}
# name: the divergence, its equation with the same parameters
CASES = {
    "reverse_kl": (ReverseKL(), oracle.reverse_kl, {}),
    "forward_kl": (ForwardKL(), oracle.forward_kl, {}),
    "jsd": (JSD(), oracle.jsd, {}),
    "jsd-0.1": (JSD(0.1), oracle.jsd, {"beta": 0.1}),
    "jsd-0.9": (JSD(beta=0.9), oracle.jsd, {"beta": 0.9}),
    "total_variation": (TotalVariation(), oracle.total_variation, {}),
    "jsd-clip": (JSD(entry_clip=0.02), oracle.clipped_jsd, {"entry_clip": 0.02}),
    "jsd-0.9-clip": (JSD(0.9, entry_clip=0.1), oracle.clipped_jsd, {"beta": 0.9, "entry_clip": 0.1}),
    "skew_kl": (SkewKL(), oracle.skew_kl, {}),
    "skew_kl-0.6": (SkewKL(alpha=0.6), oracle.skew_kl, {"alpha": 0.6}),
    "skew_kl-forward": (SkewKL(0.1, "forward"), oracle.skew_kl, {"direction": "forward"}),
    "skew_kl-forward-0.6": (SkewKL(0.6, "forward"), oracle.skew_kl, {"alpha": 0.6, "direction": "forward"}),
    "power": (Power(), oracle.power, {}),
    "power-0.3": (Power(alpha=0.3), oracle.power, {"alpha": 0.3}),
    "local_support": (LocalSupport(), oracle.local_support, {}),
    "local_support-1": (LocalSupport(top_k=2), oracle.local_support, {"top_k": 2}),
    "tail_aware": (TailAware(), oracle.tail_aware, {}),
    "tail_aware-1": (TailAware(top_k=1), oracle.tail_aware, {"top_k": 1}),
    "forward_kl_topk": (TopKForwardKL(), oracle.forward_kl_topk, {}),
    "sampled": (SampledToken(), oracle.sampled, {}),
    "sampled-clip": (SampledToken(clip=0.5), oracle.sampled, {"clip": 0.5}),
    "sampled-soft_log": (SampledToken(shape="soft_log"), oracle.sampled, {"shape": "soft_log"}),
    "sampled-tanh": (SampledToken(shape="tanh"), oracle.sampled, {"shape": "tanh"}),
    "sampled-power": (SampledToken(shape="power", alpha=0.5), oracle.sampled, {"shape": "power", "alpha": 0.5}),
    "sampled-baseline": (SampledToken(clip=2.0, baseline="kl"), oracle.sampled, {"clip": 2.0, "baseline": True}),
    "entropy_aware": (EntropyAware(), oracle.entropy_aware, {}),
    "entropy_aware-2": (
        EntropyAware(alpha=2.5, tau=1.5, top_k=5),
        oracle.entropy_aware,
        {"alpha": 2.5, "tau": 1.5, "top_k": 5},
    ),
}
# Other parameters of a divergence that has a case: in the short suite only their equations are compared.
VARIANTS = ["jsd-0.9-clip", "skew_kl-0.6", "skew_kl-forward-0.6", "power-0.3", "sampled-soft_log", "sampled-tanh"]
every_divergence = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.full) if case in VARIANTS else case for case in CASES]
)
every_backend = pytest.mark.parametrize("backend", ["torch", "eager"])


def expected(case, s, u, tokens):
    """Losses and the gradient of their sum, of finished fp64 logits (n, V)."""
    _, equation, parameters = CASES[case]
    return equation(s, u, tokens, **parameters) if "sampled" in case else equation(s, u, **parameters)


def draw_tokens(s, seed=0):
    """Tokens as a student would sample them."""
    return torch.multinomial(s.double().softmax(1), 1, generator=generator(seed)).squeeze(1)


def run(divergence, student, teacher, backend, tokens=None, **options):
    """The output of a call that trains every position, its loss their sum."""
    options = {**ALL, "denominator": "valid", "num_items_in_batch": 1.0, "tokens": tokens, **options}
    return selective_opd_loss(student, teacher, divergence=divergence, backend=backend, **options)


def test_every_name_is_tested():
    assert set(DIVERGENCES) <= set(CASES)


@every_backend
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("vocab", "noise"), [(131, 1.0), (409, 0.3)])
def test_loss_and_gradient_of_logits_match_the_equations(case, backend, vocab, noise):
    s, u = logit_pair(6, vocab, noise=noise, scale=3.0, seed=vocab)
    tokens = draw_tokens(s)
    x = leaf(s)
    out = run(CASES[case][0], x, u, backend, tokens)
    out.loss.backward()
    losses, gradient = expected(case, s, u, tokens)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=case)
    assert_gradient(x.grad, gradient)


@every_backend
@every_divergence
def test_weighted_rows_each_get_their_own_gradient(case, backend):
    s, u = logit_pair(5, 157, scale=3.0, seed=3)
    tokens, weights = draw_tokens(s), torch.tensor([1.0, 0.25, 3.0, 0.0, 2.0])
    x = leaf(s)
    out = run(CASES[case][0], x, u, backend, tokens, weights=weights)
    out.loss.backward()
    losses, gradient = expected(case, s, u, tokens)
    assert_within(out.loss, (weights * losses).sum(), absolute=1e-5, relative=1e-4, name=case)
    assert_gradient(x.grad, weights.unsqueeze(1) * gradient)
    assert not x.grad[3].any()


@pytest.mark.parametrize("extra", [{}, {"bias": True, "scale": 0.7, "softcap": 9.0}])
@every_divergence
def test_loss_and_gradient_of_heads_match_fp64(case, extra):
    student, teacher = head_pair((7,), 173, seed=5, **extra)
    s, u = (eager.logits(Source.of(to_double(x), 173, 0.8), torch.arange(7), torch.float64) for x in (student, teacher))
    tokens = draw_tokens(s)
    result, oracle_head = leaf_head(student), leaf_head(student, torch.float64)
    out = run(CASES[case][0], result, teacher, "torch", tokens, temperature=0.8, workspace_bytes=20_000)
    out.loss.backward()
    losses, gradient = expected(case, s, u, tokens)
    assert_within(out.loss, losses.sum(), absolute=7 * HEAD_ABSOLUTE, relative=1e-4, name=case)
    eager.logits(Source.of(oracle_head, 173, 0.8), torch.arange(7), torch.float64).backward(gradient)
    for got, want in zip(gradients(result), gradients(oracle_head), strict=True):
        assert_gradient(got, want)


# Not `sampled`: its advantage is held constant, so that its gradient is no derivative of its value.
@pytest.mark.parametrize("case", [case for case in CASES if "sampled" not in case])
def test_gradient_of_the_streamed_backend_passes_gradcheck(case):
    s, u = logit_pair(3, 23, scale=2.0, dtype=torch.float64, seed=11)
    divergence = CASES[case][0]
    if getattr(divergence, "length", 0) > 23 or case == "local_support":
        divergence = LocalSupport(top_k=9)

    def loss(x):
        return run(divergence, x, u, "torch", top_k=5, workspace_bytes=2_000).loss

    assert torch.autograd.gradcheck(loss, (leaf(s),), eps=1e-6, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize(
    "case",
    [
        *("jsd", "jsd-0.1", "jsd-0.9", "local_support", "tail_aware", "total_variation"),
        *("skew_kl", "skew_kl-forward", "power"),
        *(pytest.param(x, marks=pytest.mark.full) for x in ("skew_kl-0.6", "skew_kl-forward-0.6", "power-0.3")),
    ],
)
@pytest.mark.parametrize(("scale", "noise"), [(3, 1e-3), (0.1, 1e-3), (60, 0.01), (60, 5), (15, 60)])
def test_divergence_does_not_cancel(case, scale, noise):
    s, u = logit_pair(3, 401, scale=scale, noise=noise, seed=2)
    x = leaf(s)
    out = run(CASES[case][0], x, u, "torch")
    out.loss.backward()
    losses, gradient = expected(case, s, u, None)
    assert_within(out.loss, losses.sum(), absolute=3e-6, relative=1e-4, name=case)
    assert out.loss >= 0
    assert_gradient(x.grad, gradient, small_kl_bound(max(1e-12, losses.mean().item())))


@every_backend
@every_divergence
def test_masked_entries_are_outside_of_every_divergence(case, backend):
    s, u = logit_pair(4, 140, scale=3.0, seed=7)
    absent = torch.rand(140, generator=generator(1)) < 0.4
    tokens = draw_tokens(s.masked_fill(absent, -INF))
    s, u = s.masked_fill(absent, -INF), u.masked_fill(absent, -INF)
    x = leaf(s)
    out = run(CASES[case][0], x, u, backend, tokens, workspace_bytes=3_000)
    out.loss.backward()
    kept = ~absent
    places = torch.cumsum(kept.long(), 0) - 1
    losses, gradient = expected(case, s[:, kept], u[:, kept], places[tokens])
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=case)
    assert_gradient(x.grad[:, kept], gradient)
    assert not x.grad[:, absent].any()


@every_backend
@pytest.mark.parametrize(
    "case", ["jsd", "jsd-0.1", "jsd-clip", "total_variation", "skew_kl", "skew_kl-forward", "power", "power-0.3"]
)
def test_bounded_divergences_stay_finite_where_one_model_is_zero(case, backend):
    s, u = logit_pair(4, 130, scale=3.0, seed=9)
    s[:, :20], u[:, 10:40] = -INF, -INF
    x = leaf(s)
    out = run(CASES[case][0], x, u, backend)
    out.loss.backward()
    losses, gradient = expected(case, s, u, None)
    assert out.metrics["n_infinite"] == 0
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=case)
    assert_gradient(x.grad, gradient)


@every_backend
@pytest.mark.parametrize("case", ["local_support-1", "forward_kl_topk", "entropy_aware"])
def test_infinite_losses_are_left_out_and_counted(case, backend):
    s, u = logit_pair(3, 130, scale=3.0, noise=0.5, seed=9)
    best = u[1].topk(2).indices
    s[1, best] = -INF  # the student cannot produce what the teacher lists
    if case == "entropy_aware":
        u[1] = u[1] / 3  # above tau
    x = leaf(s)
    out = run(CASES[case][0], x, u, backend)
    out.loss.backward()
    assert out.metrics["n_infinite"] == 1
    assert out.selected.tolist() == [True, False, True]
    losses, gradient = expected(case, s[[0, 2]], u[[0, 2]], None)
    assert_within(out.loss, losses.sum(), absolute=1e-5, relative=1e-4, name=case)
    assert_gradient(x.grad[[0, 2]], gradient)
    assert not x.grad[1].any()


@every_backend
@every_divergence
def test_a_blown_up_student_makes_the_loss_nan(case, backend):
    s, u = logit_pair(3, 60, seed=1)
    tokens = draw_tokens(s)
    s[1, 7] = math.nan
    divergence = LocalSupport(top_k=3) if case == "local_support-1" else CASES[case][0]
    assert run(divergence, s, u, backend, tokens).loss.isnan()


@every_backend
@every_divergence
def test_bf16_gradient_is_no_worse_than_eager(case, backend):
    s, u = logit_pair(6, 301, scale=3.0, dtype=torch.bfloat16, seed=4)
    tokens = draw_tokens(s)
    x = leaf(s)
    run(CASES[case][0], x, u, backend, tokens).loss.backward()
    assert x.grad.dtype == torch.bfloat16
    _, gradient = expected(case, s, u, tokens)
    rounded = (gradient.to(torch.bfloat16).double() - gradient).norm() / gradient.norm()
    assert_gradient(x.grad, gradient, 2 * rounded.item())


@every_backend
def test_jsd_at_its_ends_is_a_kl(backend):
    s, u = logit_pair(4, 61)
    for beta, kl in ((0, ForwardKL()), (1.0, ReverseKL())):
        ends = [
            (JSD(beta), kl),
            (EntropyAware(divergence=JSD(beta)), EntropyAware(divergence=kl)),
        ]
        for jsd, want in ends:
            assert torch.equal(run(jsd, s, u, backend).loss, run(want, s, u, backend).loss)


@every_backend
@pytest.mark.parametrize(
    "case", ["reverse_kl", "jsd", "jsd-clip", "skew_kl", "skew_kl-forward", "power", "tail_aware", "local_support"]
)
def test_models_that_differ_by_a_constant_have_nothing_to_learn(case, backend):
    s, _ = logit_pair(4, 61, scale=1.0)
    x = leaf(s)
    out = run(CASES[case][0], x, s + 3.7, backend)  # in fp32 the shift rounds
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0, abs=1e-6)
    assert x.grad.norm() < 1e-5


@every_backend
@pytest.mark.parametrize("case", ["tail_aware", "sampled", "forward_kl_topk", "entropy_aware", "local_support"])
def test_gradients_stay_finite_where_a_model_is_its_list_alone(case, backend):
    s, u = logit_pair(4, 61, scale=2.0, noise=0.5)
    s[0, 1:] = -INF  # one possible token
    u[1, 3:] = -INF  # the teacher has no tail
    tokens = torch.zeros(4, dtype=torch.long)
    student, teacher = LinearHead(leaf(s), leaf(torch.eye(61))), u  # a weight gradient mixes rows
    s_head = LinearHead(leaf(torch.nan_to_num(s, neginf=-1e4)), student.weight)
    for side in (leaf(s), s_head):
        out = run(CASES[case][0], side, teacher, backend, tokens)
        out.loss.backward()
        got = [side.grad] if isinstance(side, torch.Tensor) else [side.hidden.grad, side.weight.grad]
        assert out.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in got)


@every_backend
@every_divergence
def test_losses_are_known_in_inference_mode(case, backend):
    s, u = logit_pair(3, 61)
    tokens = draw_tokens(s)
    divergence = LocalSupport(top_k=9) if case == "local_support" else CASES[case][0]
    want = run(divergence, s, u, backend, tokens).loss
    with torch.inference_mode():
        assert torch.equal(run(divergence, s.clone(), u, backend, tokens).loss, want)


@every_backend
def test_tokens_outside_the_vocabulary_are_not_valid(backend):
    s, u = logit_pair(4, 61)
    x = leaf(s)
    out = run("sampled", x, u, backend, torch.tensor([3, -100, 61, 5]))
    out.loss.backward()
    assert out.selected.tolist() == [True, False, False, True]
    assert out.metrics["n_valid"] == 2
    assert out.metrics["kl_sampled"].isfinite()
    assert not x.grad[[1, 2]].any()


def test_a_divergence_must_say_what_it_sums():
    class Unknown(WholeRow):
        name = "unknown"

        def loss(self, log_p, log_q):
            return log_p.sum(-1)

        def slope(self, log_p, log_ratio):
            return log_p

    with pytest.raises(TypeError, match="divergence: got Unknown, which says nowhere what it sums; make it a `Summed`"):
        run(Unknown(), *logit_pair(2, 61), "torch")


def test_sampled_rejects_tokens_that_are_none():
    s, u = logit_pair(2, 61)
    with pytest.raises(TypeError, match=r"labels: got dtype torch.float32, expected token ids as int64"):
        selective_opd_loss(s, u, divergence="sampled", shift_labels=torch.ones(2))
    with pytest.raises(TypeError, match=r"divergence: got JSD, expected an instance, like JSD\(beta=0.3\), or one of"):
        run(JSD, s, u, "torch")


@every_backend
def test_entropy_aware_adds_only_above_tau(backend):
    s, u = logit_pair(8, 97, scale=2.0, seed=6)
    teacher_entropy = -(u.double().softmax(1) * u.double().log_softmax(1)).sum(1)
    tau = teacher_entropy.sort().values[3:5].mean().item()
    divergence = EntropyAware(alpha=0.5, tau=tau, divergence=ForwardKL())
    x = leaf(s)
    out = run(divergence, x, u, backend)
    out.loss.backward()
    _, added = oracle.entropy_aware(s, u, alpha=0.5, tau=tau)
    added = added - oracle.reverse_kl(s, u)[1]
    assert 0 < int((added.abs().sum(1) > 0).sum()) < 8
    assert_gradient(x.grad, oracle.forward_kl(s, u)[1] + added)


@pytest.mark.parametrize("case", ["jsd", "local_support", "tail_aware", "sampled", "entropy_aware"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_in_16_bits_get_gradients_of_their_dtype(case, dtype):
    student, teacher = head_pair((9,), 211, bias=True, seed=2, dtype=dtype)
    rows = torch.arange(9)
    tokens = draw_tokens(eager.logits(Source.of(student, 211, 1.0), rows, torch.float32))
    result, double = leaf_head(student), leaf_head(student, torch.float64)
    run(CASES[case][0], result, teacher, "torch", tokens, workspace_bytes=30_000).loss.backward()
    s, u = (eager.logits(Source.of(x, 211, 1.0), rows, torch.float64) for x in (double, to_double(teacher)))
    s.backward(expected(case, s.detach(), u, tokens)[1])
    bound = 2 * torch.finfo(dtype).eps
    for got, want in zip(gradients(result), gradients(double), strict=True):
        assert got.dtype == dtype
        assert_gradient(got, want, bound)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: JSD(beta=1.5), ValueError, r"JSD.beta: got 1.5, expected a number in \[0, 1\]"),
        (lambda: JSD(entry_clip=0), ValueError, "JSD.entry_clip: got 0, expected a finite number > 0, or None"),
        (lambda: JSD(1.0, entry_clip=0.05), ValueError, "JSD.entry_clip: got 0.05 with beta 1, a KL; expected 0 < beta < 1"),
        (lambda: SkewKL(alpha=0), ValueError, r"SkewKL.alpha: got 0, expected a number in \(0, 1\); at 0 it is ReverseKL\(\)"),
        (lambda: SkewKL(direction="both"), ValueError, "SkewKL.direction: got 'both', expected one of: reverse, forward"),
        (lambda: Power(alpha=-1), ValueError, "Power.alpha: got -1, expected a finite number > 0"),
        (lambda: TailAware(top_k=0), ValueError, "TopK.top_k: got 0, expected at least 1"),
        (lambda: LocalSupport(top_k=2.0), TypeError, "TopK.top_k: got 2.0, expected an integer"),
        (lambda: SampledToken(clip=0), ValueError, "SampledToken.clip: got 0, expected a finite number > 0"),
        (
            lambda: SampledToken(shape="reverse_kl"),
            ValueError,
            "SampledToken.shape: got 'reverse_kl', which is the same for every",
        ),
        (lambda: SampledToken(shape="square"), ValueError, "SampledToken.shape: got 'square', expected one of: log, soft_log"),
        (lambda: SampledToken(baseline="mean"), ValueError, "SampledToken.baseline: got 'mean', expected one of: none, kl"),
        (
            lambda: SampledToken(baseline="kl", shape="tanh"),
            ValueError,
            "SampledToken.baseline: got 'kl' with shape 'tanh', whose mean is not -KL; expected shape 'log'",
        ),
        (lambda: SampledToken(alpha=0), ValueError, "SampledToken.alpha: got 0, expected a finite number > 0"),
        (
            lambda: SampledToken(ratio="mis"),
            ValueError,
            "SampledToken.ratio: got 'mis', expected one of: none, is, tis, icepop",
        ),
        (
            lambda: SampledToken(ratio="is", bounds=(0, 2)),
            ValueError,
            r"SampledToken.bounds: got \(0, 2\), but ratio 'is' has no bounds; leave them out",
        ),
        (
            lambda: SampledToken(ratio="tis", bounds=(2, 1)),
            ValueError,
            r"SampledToken.bounds: got \(2, 1\), expected \(low, high\) with 0 <= low < high, like \(0.0, 2.0\)",
        ),
        (lambda: SampledToken(ratio="tis", bounds=2.0), ValueError, r"SampledToken.bounds: got 2.0, expected \(low, high\)"),
        (
            lambda: SampledToken(ratio="ppo", bounds=(1.1, 1.3)),
            ValueError,
            "expected 1 between them: on-policy tokens have ratio",
        ),
        (
            lambda: ImportanceWeighted(SampledToken()),
            TypeError,
            r"ImportanceWeighted.divergence: got SampledToken, .*; write SampledToken\(ratio=...\)",
        ),
        (lambda: ImportanceWeighted("jsd"), TypeError, "ImportanceWeighted.divergence: got str, expected another divergence"),
        (lambda: ImportanceWeighted(JSD(), "ppo"), ValueError, "'ppo', which clips by the sign of a token's advantage"),
        (
            lambda: ImportanceWeighted(JSD(), "none"),
            ValueError,
            "ImportanceWeighted.ratio: got 'none', expected one of: is, tis",
        ),
        (lambda: EntropyAware(alpha=0.0), ValueError, "EntropyAware.alpha: got 0.0, expected a finite number > 0"),
        (lambda: EntropyAware(divergence=TailAware()), TypeError, "EntropyAware.divergence: got TopK"),
    ],
)
def test_divergence_rejects(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_divergence_of_a_call_rejects():
    s, u = logit_pair(3, 20)
    with pytest.raises(ValueError, match="'local_support' has top_k 32, expected at most the vocabulary size, 20"):
        run("local_support", s, u, "torch")
    with pytest.raises(ValueError, match="tokens: got None, but divergence 'sampled' reads the sampled token"):
        run("sampled", s, u, "torch")
    with pytest.raises(ValueError, match=r"inplace_backward: got True, .* reverse or forward KL; this call .* 'jsd'"):
        run("jsd", leaf(s) * 1.0, u, "triton", inplace_backward=True)


def test_the_divergences_of_contributing_work_on_every_backend():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    code = re.search(r"## Adding a divergence.*?```python\n(.*?)```", text, re.DOTALL)[1]
    names = {"dataclass": dataclass, "Summed": Summed, "OnSupport": OnSupport}
    exec(code, names)
    s, u = logit_pair(4, 67, scale=2.0, dtype=torch.float64)
    for divergence in (names["SquaredHellinger"](), names["TeachersChoice"]()):
        got = {}
        for backend in ("torch", "eager"):
            x = leaf(s)
            out = run(divergence, x, u, backend, workspace_bytes=2_000)
            out.loss.backward()
            got[backend] = out.loss, x.grad
        assert_within(got["torch"][0], got["eager"][0], absolute=1e-9, relative=1e-9, name=divergence.name)
        assert_gradient(got["torch"][1], got["eager"][1], 1e-8)
