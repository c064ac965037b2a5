"""What a call costs: matmul units, operators, waits, live bytes, bytes saved for backward; counted, never timed.

  units: 2 N V D FLOP each; two heads cost 2 + 4 rho forward and backward together, 2 + 3 rho with a frozen student head
  bytes: peak of what the call allocates <= workspace + O(N) + what the selected rows need + required gradients
  Run: make test ARGS=tests/loss/test_cost.py

Not here: seconds and resident memory (benchmarks/cpu/compare.py).
"""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.jit import JITFunction

from benchmarks.static.operators import Operators
from opd_ops import LinearHead, LogRatio, Routed, StudentStats, TailAware, TopKLogprobs, score_positions, selective_opd_loss
from tests.support import kernels
from tests.support.cases import head_pair, leaf, leaf_head, logit_pair
from tests.support.meters import LiveBytes, saved_bytes

VOCAB, DIM = 1501, 32
FRACTION = 0.05


def heads(n, dtype=torch.float32, **options):
    return head_pair((n,), VOCAB, student_dim=DIM, teacher_dim=DIM, dtype=dtype, **options)


def count_units(student, teacher, n, **options):
    with FlopCounterMode(display=False) as counter:
        selective_opd_loss(student, teacher, workspace_bytes=2**20, **options).loss.backward()
    return counter.get_total_flops() / (2 * n * VOCAB * DIM)


def count_operators(student, teacher, **options):
    """Operators of torch, forward and backward. Host time of a small call is some microseconds an operator.

    Views and allocations are not counted.
    """
    with Operators() as counter:
        selective_opd_loss(student, teacher, **options).loss.backward()
    return sum(counter.names.values())


@pytest.mark.parametrize(
    ("selector", "most"), [("teachability", 165), ("entropy", 150), ("tip", 168), ("teachability-released", 222), ("ier", 245)]
)
def test_a_call_of_torch_runs_no_more_operators_than_counted(selector, most):
    student, teacher = logit_pair(64, 512)
    tokens = torch.arange(64) if selector == "ier" else None
    assert count_operators(leaf(student), teacher, selector=selector, backend="torch", tokens=tokens) <= most


def test_heads_of_torch_run_no_more_operators_than_counted():
    """Some 50 of them prune the vocabulary for the top-K, as dense logits of more than 64 K ids do."""
    student, teacher = heads(64)
    assert count_operators(leaf_head(student), teacher, backend="torch") <= 215


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize(
    ("selector", "most", "n_launches"),
    [
        ("teachability", 25, 12),
        ("tip", 25, 12),
        ("entropy", 25, 11),
        ("ratio-variance", 30, 11),
        ("prefix", 45, 11),
        ("dial", 60, 11),
        ("log-ratio", 55, 11),
        ("ier", 50, 14),
        ("teachability-released", 40, 14),
        ("entropy-released", 40, 14),
    ],
)
def test_a_call_by_kernels_runs_few_operators_and_launches(selector, most, n_launches, masked, monkeypatch):
    """One tile of dense logits: 8 launches of kernels that read logits, up to 6 of other kernels."""
    launches = []
    monkeypatch.setattr(JITFunction, "run", lambda fn, *a, f=JITFunction.run, **k: launches.append(fn) or f(fn, *a, **k))
    student, teacher = logit_pair(64, 512)
    options = {"mask": torch.arange(64) % 7 != 0 if masked else None}
    options |= {"tokens": torch.arange(64)} if selector in ("dial", "log-ratio", "ier") else {}
    assert count_operators(leaf(student), teacher, selector=selector, backend="triton", **options) <= most
    assert kernels.IS_INTERPRETED or len(launches) == n_launches


def test_heads_by_kernels_run_few_operators():
    student, teacher = heads(64)
    assert count_operators(leaf_head(student), teacher, backend="triton") <= 50


class _Waits(TorchDispatchMode):
    """While active, counts the operators for whose result the CPU would wait if the tensors were on a GPU."""

    NAMES = frozenset({"nonzero", "_local_scalar_dense", "is_nonzero", "equal", "_unique2", "masked_select"})

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        is_by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.n += is_by_mask or name in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "n_models", "n_waits"),  # docs/reference/backends.md lists them
    [
        ({}, 1, 1),
        ({"mask": torch.arange(24) % 3 > 0}, 1, 2),
        ({"threshold": 0.3}, 1, 2),
        ({"selector": LogRatio("both"), "tokens": torch.arange(24)}, 1, 3),
        ({"check_finite": True}, 1, 2),
        ({"denominator": "sequence"}, 1, 2),
        ({}, 2, 8),
    ],
)
def test_how_often_the_cpu_waits_for_the_device(options, n_models, n_waits, monkeypatch):
    student, teacher = logit_pair(24, 130)
    teacher = teacher if n_models == 1 else Routed([teacher] * n_models, torch.arange(24) % n_models)
    for name, module in list(sys.modules.items()):
        if name.startswith("opd_ops.") and hasattr(module, "may_look"):
            monkeypatch.setattr(module, "may_look", lambda tensor: False)
    waits = _Waits()

    def listed(tensor, tolist=torch.Tensor.tolist):  # no operator of torch on a CPU
        waits.n += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    with waits:
        selective_opd_loss(leaf(student), teacher, backend="triton", **options).loss.backward()
    assert waits.n == n_waits


@pytest.mark.parametrize("fraction", [0.05, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_heads_cost_two_plus_four_rho_units(fraction, dtype):
    student, teacher = heads(100, dtype)
    assert count_units(leaf_head(student), teacher, 100, fraction=fraction) == pytest.approx(2 + 4 * fraction, rel=1e-12)


def test_sharing_few_rows_between_threads_costs_the_same_units(two_threads):
    student, teacher = head_pair((200,), 1536, student_dim=DIM, teacher_dim=DIM)  # an even vocabulary: VOCAB is not shared
    with FlopCounterMode(display=False) as counter:
        selective_opd_loss(leaf_head(student), teacher, fraction=FRACTION).loss.backward()
    assert torch.ops.aten.bmm in counter.get_flop_counts()["Global"]
    assert counter.get_total_flops() == pytest.approx((2 + 4 * FRACTION) * 2 * 200 * 1536 * DIM, rel=1e-12)


@pytest.mark.parametrize("fraction", [0.05, 0.25, 1.0])
def test_a_frozen_student_head_costs_two_plus_three_rho_units(fraction):
    student, teacher = heads(100)
    frozen = LinearHead(leaf(student.hidden), student.weight)
    assert count_units(frozen, teacher, 100, fraction=fraction) == pytest.approx(2 + 3 * fraction, rel=1e-12)


def test_masked_rows_cost_nothing():
    student, teacher = heads(200)
    mask = torch.arange(200) % 2
    units = count_units(leaf_head(student), teacher, 200, fraction=FRACTION, mask=mask)
    assert units == pytest.approx((2 + 4 * FRACTION) / 2, rel=1e-12)


@pytest.mark.parametrize(("selector", "dot_products"), [("multinomial", 0), ("ier", 2)])
def test_optional_statistics_cost_no_further_sweep(selector, dot_products):
    student, teacher = heads(100)
    units = count_units(leaf_head(student), teacher, 100, fraction=FRACTION, selector=selector, tokens=torch.arange(100))
    assert units == pytest.approx(2 + 4 * FRACTION + dot_products / VOCAB, rel=1e-12)


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("workspace_bytes", [2**20, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_peak_is_workspace_plus_gradients_plus_order_n(n, workspace_bytes, dtype):
    student, teacher = heads(n, dtype)
    student = leaf_head(student)
    with LiveBytes() as meter:
        selective_opd_loss(student, teacher, fraction=FRACTION, workspace_bytes=workspace_bytes).loss.backward()
    size = student.weight.element_size()
    required = size * (student.weight.numel() + student.hidden.numel())
    selected = 4 * n * FRACTION * 3 * DIM  # both hidden states and dH of the selected rows in fp32
    per_position = 8 * 60 * n  # statistics, masks, sort keys and their fp64 temporaries: some 60 numbers a position
    assert meter.peak > required
    assert meter.peak - required <= workspace_bytes + selected + per_position
    assert meter.largest <= max(workspace_bytes // 4, student.weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_peak_keeps_to_the_workspace_when_every_row_is_selected(dtype):
    n, dim, workspace_bytes = 600, 256, 2**20
    student, teacher = head_pair((n,), 400, student_dim=dim, teacher_dim=dim, dtype=dtype)
    student = leaf_head(student)
    with LiveBytes() as meter:
        selective_opd_loss(student, teacher, fraction=1.0, workspace_bytes=workspace_bytes).loss.backward()
    required = student.weight.element_size() * (student.weight.numel() + student.hidden.numel())
    sums = 4 * n * dim if dtype == torch.bfloat16 else 0  # the gradient of 16-bit hidden states, before it is rounded
    assert meter.peak > required
    assert meter.peak - required <= workspace_bytes + sums + 8 * 60 * n


@pytest.mark.parametrize("case", ["plateau", "rising"])
@pytest.mark.parametrize("top_k", [16, 128])
def test_logits_that_do_not_pay_to_prune_cost_no_more_memory(case, top_k):
    n, vocab, workspace_bytes = 128, 20_000, 2**23
    student, teacher = logit_pair(n, vocab)
    if case == "plateau":
        student[:, : 128 * top_k] = teacher[:, : 128 * top_k] = 30.0
    else:
        student, teacher = student.sort(1).values, teacher.sort(1).values
    with LiveBytes() as meter:
        _, stats = score_positions(student, teacher, top_k=top_k, backend="torch", workspace_bytes=workspace_bytes)
    assert bool((stats.support_mass > 0).all())
    assert workspace_bytes // 4 < meter.peak <= workspace_bytes + 8 * 60 * n


@pytest.mark.parametrize("n", [100, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_peak_is_workspace_plus_the_gradient(n, dtype):
    student, teacher = logit_pair(n, VOCAB, dtype=dtype)
    student = leaf(student.view(10, -1, VOCAB).transpose(0, 1))  # no layout may cost a copy of all logits
    teacher = teacher.view(10, -1, VOCAB).transpose(0, 1)
    with LiveBytes() as meter:
        selective_opd_loss(student, teacher, fraction=FRACTION, workspace_bytes=2**20).loss.backward()
    required = student.numel() * student.element_size()
    assert meter.peak - required <= 2**20 + 8 * 60 * n


def test_scores_alone_make_no_tensor_of_all_logits():
    student, teacher = heads(900)
    with LiveBytes() as meter:
        score_positions(student, teacher, workspace_bytes=2**21)
    assert meter.largest < 900 * VOCAB / 5
    assert meter.peak <= 2**21 + 8 * 60 * 900


@pytest.mark.parametrize("n", [200, 800])
def test_saved_for_backward_is_a_few_numbers_per_selected_row(n):
    student, teacher = heads(n, bias=True)
    student = leaf_head(student)
    inputs = [t for head in (student, teacher) for t in (head.hidden, head.weight, head.bias)]
    with saved_bytes(inputs) as saved:
        loss = selective_opd_loss(student, teacher, fraction=FRACTION, workspace_bytes=2**20).loss
    assert 0 < saved["bytes"] <= 32 * FRACTION * n + 64  # row number, loss, log-sum-exp, gap; and the scalars of the mean
    loss.backward()


def test_nothing_of_the_workspace_outlives_the_forward():
    student, teacher = heads(600)
    student = leaf_head(student)
    with LiveBytes() as meter:
        out = selective_opd_loss(student, teacher, fraction=FRACTION, workspace_bytes=2**21)
        assert meter.live <= 200 * 600
    assert out.loss.requires_grad


@pytest.mark.parametrize("length", [16, 256])
def test_long_lists_of_a_teacher_take_the_workspace_and_themselves_in_order(length):
    n, vocab, width, workspace_bytes = 300, 512, 256, 2**18
    student, teacher = logit_pair(n, vocab)
    logprobs, ids = teacher.log_softmax(-1).topk(width)
    lists = TopKLogprobs(ids, logprobs)
    divergence = TailAware(top_k=length)
    with LiveBytes() as meter:
        selective_opd_loss(student, lists, divergence=divergence, fraction=FRACTION, workspace_bytes=workspace_bytes)
    in_order = 12 * n * length  # int64 ids and fp32 log-probabilities, of the entries that the divergence reads
    selected = 8 * 20 * n * FRACTION * length  # of these entries, both models' numbers in fp64, their gradients and temporaries
    assert workspace_bytes // 4 < meter.peak
    assert meter.peak <= workspace_bytes + in_order + selected + 8 * 60 * n


@pytest.mark.parametrize("sides", ["logits", "lists"])
def test_a_long_top_k_makes_no_table_of_all_pairs(sides):
    n, vocab, top_k, workspace_bytes = 4, 4096, 2500, 2**20
    student, teacher = logit_pair(n, vocab)
    if sides == "lists":
        logprobs, ids = teacher.log_softmax(-1).topk(top_k)
        teacher = TopKLogprobs(ids, logprobs)
    options = {"top_k": top_k, "selector": "entropy", "backend": "torch", "workspace_bytes": workspace_bytes}
    with LiveBytes() as meter:
        _, stats = score_positions(student, teacher, **options)
    assert bool((stats.union_kl > 0).all())
    assert meter.largest < top_k**2 / 4
    assert meter.peak <= 2 * workspace_bytes  # one row of so many ids takes more than its share


def test_long_statistics_of_a_rollout_are_put_in_order_within_the_workspace():
    n, vocab, width, workspace_bytes = 512, 600, 512, 2**19
    student, teacher = logit_pair(n, vocab)
    logprobs, ids = teacher.log_softmax(-1).topk(16)
    known = StudentStats.from_logits(student, top_k=width)
    options = {"student_stats": known, "workspace_bytes": workspace_bytes, "divergence": TailAware(top_k=16)}
    with LiveBytes() as meter:
        scores, _ = score_positions(student, TopKLogprobs(ids, logprobs), **options)
    assert scores.std() > 0
    assert meter.peak <= workspace_bytes + (8 * 60 + 12 * 16) * n  # it was 9 times the workspace
