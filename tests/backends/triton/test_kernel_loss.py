"""The divergences on the Triton backend: by kernels where they have one, on dense logits and on tiles of heads.

  Compared: with the equations on fp64 rows (support/divergence_oracle.py). Counted: matmul units, 2 + 4 rho for all, because a
  tile holds the selected rows' logits while everything is made of it.
  Run: make test ARGS=tests/backends/triton/test_kernel_loss.py

Not here: the kernels alone (tests/kernels/), reverse and forward KL (test_backend.py, test_heads.py).
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_ops import (
    JSD,
    EntropyAware,
    Extrapolated,
    ImportanceWeighted,
    LinearHead,
    LocalSupport,
    ReverseKL,
    StudentStats,
    TailAware,
    TopKLogprobs,
    selective_opd_loss,
)
from opd_ops.backends import eager
from opd_ops.backends.ensembles import RoutedBackend
from opd_ops.backends.interface import Needs
from opd_ops.backends.triton import heads_loss as triton_heads_loss
from opd_ops.backends.triton import kernel_loss
from opd_ops.backends.triton.backend import TRITON
from opd_ops.divergences import DIVERGENCES
from opd_ops.inputs.sources import Mixing, Source
from tests.divergences.test_divergences import CASES, draw_tokens, expected, run
from tests.support import divergence_oracle as oracle
from tests.support.cases import gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.meters import LiveBytes
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_within

KERNELS = [
    "jsd-0.1",
    "skew_kl",
    "skew_kl-forward",
    "local_support-1",
    "tail_aware",
    "forward_kl_topk",
    "sampled",
    "entropy_aware-2",
]
WITHOUT = ["total_variation", "jsd-clip", "power-0.3"]
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("case", KERNELS + WITHOUT)
def test_loss_and_gradient_of_logits_match_the_equations(case):
    s, u = logit_pair(3, 301, scale=3.0, seed=1)
    tokens, weights = draw_tokens(s), torch.tensor([0.5, -2.0, 0.0])
    x = leaf(s)
    out = run(CASES[case][0], x, u, "triton", tokens, weights=weights, workspace_bytes=1)
    out.loss.backward()
    losses, gradient = expected(case, s, u, tokens)
    assert_within(out.loss, (weights * losses).sum(), absolute=1e-5, relative=1e-4, name=case)
    assert_gradient(x.grad, weights.unsqueeze(1) * gradient)
    assert not x.grad[2].any()


def assert_head_losses(case, dtype, bound, *, n=4, **options):
    """Compare a call on two heads with the equations; the output of the call."""
    student, teacher = head_pair((n,), 301, bias=True, seed=5, dtype=dtype)
    rows = torch.arange(n)
    result, double = leaf_head(student), leaf_head(student, torch.float64)
    s = eager.logits(Source.of(double, 301, 1.0), rows, torch.float64)
    u = eager.logits(Source.of(to_double(teacher), 301, 1.0), rows, torch.float64)
    tokens = draw_tokens(s.detach())
    out = run(CASES[case][0], result, teacher, "triton", tokens, **options)
    out.loss.backward()
    losses, gradient = expected(case, s.detach(), u, tokens)
    s.backward(gradient)
    assert_within(out.loss, losses.sum(), absolute=n * HEAD_ABSOLUTE, relative=1e-4, name=case)
    for got, want in zip(gradients(result), gradients(double), strict=True):
        assert got.dtype == dtype
        assert_gradient(got, want, bound)
    return out


@pytest.mark.parametrize("case", [*KERNELS, WITHOUT[0], *(pytest.param(x, marks=pytest.mark.full) for x in WITHOUT[1:])])
def test_loss_and_gradient_of_heads_match_fp64(case):
    assert_head_losses(case, torch.float32, 1e-4)


@pytest.mark.parametrize("case", ["jsd-0.1", "sampled", "entropy_aware-2"])
@pytest.mark.parametrize("workspace_bytes", [pytest.param(2**20, marks=pytest.mark.full), 4_000])
def test_16_bit_heads_are_trained_on_fp32_logits(case, workspace_bytes, monkeypatch):
    looks = []
    second_look = triton_heads_loss._SelectedRows._second_look
    monkeypatch.setattr(triton_heads_loss._SelectedRows, "_second_look", lambda *x: (looks.append(1), second_look(*x)))
    assert_head_losses(case, torch.bfloat16, 2**-7, workspace_bytes=workspace_bytes)
    assert len(looks) == (workspace_bytes == 4_000)  # the weight gradient by blocks of the vocabulary


@pytest.mark.parametrize("divergence", ["jsd", "local_support", "tail_aware", "sampled", "entropy_aware"])
def test_units_of_two_heads_are_those_of_reverse_kl(divergence):
    n, vocab, dim, fraction = 6, 301, 16, 0.5
    student, teacher = head_pair((n,), vocab, student_dim=dim, teacher_dim=dim)
    ids = torch.arange(n)
    with FlopCounterMode(display=False) as counter:
        selective_opd_loss(
            leaf_head(student), teacher, divergence=divergence, tokens=ids, fraction=fraction, backend="triton"
        ).loss.backward()
    units = counter.get_total_flops() / (2 * n * vocab * dim)
    metric_units = 2 * n * fraction * dim * 2 / (2 * n * vocab * dim) if divergence == "sampled" else 0  # kl_sampled
    assert units == pytest.approx(2 + 4 * fraction + metric_units, rel=1e-12)


@pytest.mark.parametrize("divergence", ["jsd", "entropy_aware"])
def test_head_peak_is_workspace_plus_gradients_plus_order_n(divergence, prompt_launches):
    n, vocab, workspace_bytes = 6, 4001, 2**18
    student, teacher = head_pair((n,), vocab, student_dim=16, teacher_dim=16)
    student = leaf_head(student)
    with LiveBytes() as meter:
        selective_opd_loss(
            student, teacher, divergence=divergence, fraction=0.5, backend="triton", workspace_bytes=workspace_bytes
        ).loss.backward()
    required = 4 * (student.weight.numel() + student.hidden.numel())
    assert required < meter.peak <= required + workspace_bytes + 8 * 60 * n


@pytest.mark.parametrize("divergence", [TailAware(top_k=8), LocalSupport(top_k=8)])
def test_a_listed_teacher_and_a_head(divergence):
    student, teacher = head_pair((5,), 301, bias=True, softcap=12.0, seed=5)
    rows = torch.arange(5)
    result, double = leaf_head(student), leaf_head(student, torch.float64)
    s = eager.logits(Source.of(double, 301, 1.0), rows, torch.float64)
    u = eager.logits(Source.of(to_double(teacher), 301, 1.0), rows, torch.float64)
    best = u.log_softmax(1).topk(8, dim=1)
    out = run(divergence, result, TopKLogprobs(best.indices, best.values.float()), "triton", workspace_bytes=9_000)
    out.loss.backward()
    losses, gradient = getattr(oracle, divergence.name)(s.detach(), u, top_k=8)
    s.backward(gradient)
    assert_within(out.loss, losses.sum(), absolute=5 * HEAD_ABSOLUTE, relative=1e-4, name=divergence.name)
    for got, want in zip(gradients(result), gradients(double), strict=True):
        assert_gradient(got, want)


@pytest.mark.parametrize("is_head", [True, False])
def test_a_mixed_teacher_is_read_in_tiles(is_head):
    student, teacher = head_pair((5,), 301, bias=True, scale=0.8, seed=5)
    reference = LinearHead(teacher.hidden + 0.3, teacher.weight, softcap=7.0)
    rows = torch.arange(5)
    double = leaf_head(student, torch.float64)
    s = eager.logits(Source.of(double, 301, 0.7), rows, torch.float64)
    u, r = (eager.logits(Source.of(to_double(x), 301, 1.0), rows, torch.float64) for x in (teacher, reference))
    mixed = (1.25 * u - 0.25 * r) / 0.7
    result = leaf_head(student) if is_head else leaf(s.detach().float() * 0.7)
    sides = (teacher, reference) if is_head else (u.float(), r.float())
    out = run("reverse_kl", result, Extrapolated(1.25, *sides), "triton", temperature=0.7, workspace_bytes=30_000)
    out.loss.backward()
    losses, gradient = oracle.reverse_kl(s.detach(), mixed)
    assert_within(out.loss, losses.sum(), absolute=5 * HEAD_ABSOLUTE, relative=1e-4, name="loss")
    assert_within(out.stats.reverse_kl, losses, absolute=HEAD_ABSOLUTE, relative=1e-4, name="reverse_kl")
    if not is_head:
        assert_gradient(result.grad, gradient / 0.7)
        return
    s.backward(gradient)
    for got, want in zip(gradients(result), gradients(double), strict=True):
        assert_gradient(got, want)


@pytest.mark.parametrize("case", ["entropy_aware-2", "total_variation"])
def test_statistics_of_the_rollout_are_not_what_is_trained_on(case):
    student, teacher = head_pair((3,), 131, seed=5)
    rows = torch.arange(3)
    s, u = (eager.logits(Source.of(to_double(x), 131, 1.0), rows, torch.float64) for x in (student, teacher))
    got = leaf_head(student)
    out = run(CASES[case][0], got, teacher, "triton", student_stats=StudentStats.from_logits(s.float()))
    out.loss.backward()
    assert_within(out.loss, expected(case, s, u, None)[0].sum(), absolute=3 * HEAD_ABSOLUTE, relative=1e-4, name=case)
    assert all(gradient.isfinite().all() for gradient in gradients(got))


def test_without_a_kernel_16_bit_heads_are_trained_on_fp32_logits_too():
    assert_head_losses("total_variation", torch.bfloat16, 2**-7)


def test_infinite_losses_are_left_out_of_logits_and_heads():
    s, u = logit_pair(3, 130, scale=3.0, noise=0.5, seed=9)
    s[1, u[1].topk(2).indices] = -torch.inf
    x = leaf(s)
    out = run(CASES["forward_kl_topk"][0], x, u, "triton")
    out.loss.backward()
    assert out.metrics["n_infinite"] == 1
    assert out.selected.tolist() == [True, False, True]
    assert_gradient(x.grad[[0, 2]], oracle.forward_kl_topk(s[[0, 2]], u[[0, 2]])[1])
    assert not x.grad[1].any()


def test_a_blown_up_student_makes_the_loss_nan():
    s, u = logit_pair(1, 40, seed=1)
    s[0, 7] = torch.nan
    for case in ("jsd-0.1", "tail_aware", "local_support-1", "entropy_aware"):
        assert run(CASES[case][0], s, u, "triton").loss.isnan()


def test_what_has_no_kernel():
    assert kernel_loss.refusal(DIVERGENCES["total_variation"]) == "TotalVariation has no kernel"
    assert kernel_loss.refusal(JSD(entry_clip=0.05)) == "JSD with entry_clip has no kernel"
    assert kernel_loss.refusal(TailAware(top_k=129)) == "its list has 129 ids, kernels take at most 128"
    assert kernel_loss.refusal(EntropyAware()) is None
    s, u = logit_pair(2, 150)
    for divergence, equation in ((TailAware(top_k=129), oracle.tail_aware), (DIVERGENCES["total_variation"], None)):
        losses = equation(s, u, top_k=129)[0] if equation else oracle.total_variation(s, u)[0]
        assert_within(run(divergence, s, u, "triton").loss, losses.sum(), absolute=1e-5, relative=1e-4, name="loss")


def test_the_log_says_what_another_backend_computes(caplog):
    student, teacher = logit_pair(3, 61)
    with caplog.at_level("DEBUG", logger="opd_ops"):
        for divergence in ("jsd", "total_variation"):
            selective_opd_loss(student, teacher, fraction=0.5, top_k=4, backend="triton", divergence=divergence)
    handed = [record.getMessage() for record in caplog.records if "by backend 'torch'" in record.getMessage()]
    assert handed == ["backend 'triton': the loss 'total_variation' by backend 'torch' (TotalVariation has no kernel)"]


@pytest.mark.parametrize("divergence", ["jsd", ImportanceWeighted(ReverseKL())], ids=str)
def test_torch_compile_rejects_divergences_without_an_operator(divergence):
    s, u = logit_pair(4, 60)
    options = {} if divergence == "jsd" else {"tokens": torch.arange(4), "old_logprobs": -torch.ones(4)}

    def loss(x):
        return selective_opd_loss(x, u, divergence=divergence, backend="triton", fraction=0.5, **options).loss

    with pytest.raises(Exception, match=r"divergence is .*, which torch.compile cannot trace here"):
        torch.compile(loss, fullgraph=True, dynamic=False, backend="eager")(s)


def test_the_documentation_says_which_losses_have_kernels():
    section = (ROOT / "docs" / "reference" / "backends.md").read_text().split("## Losses by kernels\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    stated = {name: place.strip() == "kernels" for names, place in rows for name in re.findall(r"`(\w+)`", names)}
    assert stated == {name: kernel_loss.refusal(divergence) is None for name, divergence in DIVERGENCES.items()}
    assert f"more than {kernel_loss.MAX_LIST} ids" in section


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_kernels_compute_the_same_losses_for_a_mixture_of_teachers_as_for_one(kind):
    """docs/reference/backends.md: a Mixture changes nothing in the table; kernels read mixed tiles, of any number of models."""
    s, u = (Source.of(x) for x in logit_pair(2, 31))
    mixing = Mixing((0.5, 0.3, 0.2), kind)
    mixture = u._replace(transform=replace(u.transform, mixing=mixing), others=(s, u))
    routed = RoutedBackend(TRITON)
    for divergence in DIVERGENCES.values():
        assert TRITON.hands_over(s, mixture, divergence) == TRITON.hands_over(s, u, divergence)
        needs = Needs(divergence, 5)
        assert TRITON.refusal(s, mixture, needs) is None
        fp64_mixture = mixture._replace(others=(s, u._replace(leading=u.leading.double())))
        assert "teacher has dtype torch.float64" in TRITON.refusal(s, fp64_mixture, needs)
    assert routed.scores_selected_rows(s, mixture)
    assert not routed.scores_selected_rows(s, u)
