"""`estimate` against what a call really uses: counted matmul FLOP, live bytes, bytes saved by autograd.

  Run: make test ARGS=tests/estimates/test_compute.py

Not here: bytes moved, a model of the traffic that no CPU can count; here it is only held to its lower bound.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_ops import (
    ImportanceWeighted,
    LinearHead,
    LocalSupport,
    ReverseKL,
    SampledToken,
    StudentStats,
    TailAware,
    TopK,
    estimate,
    selective_opd_loss,
)
from opd_ops.backends.shared import grids
from opd_ops.divergences import resolve_divergence
from opd_ops.estimates.compute import SAVED_SCALAR_BYTES
from tests.support.cases import head_pair, leaf, leaf_head
from tests.support.meters import LiveBytes, saved_bytes

N, V, DS, DT = 8, 200, 32, 48
CASES = [
    {},
    {"dtype": torch.float32},
    {"trainable_head": False},
    {"backend": "torch"},
    {"backend": "torch", "trainable_head": False, "dtype": torch.float32},
    {"student_stats": True},
    {"student_stats": True, "backend": "torch"},
    {"selector": "dial"},
    {"selector": "ier"},
    {"selector": "ier", "backend": "torch"},
    {"selector": "log-ratio", "student_stats": True, "backend": "torch"},
    {"score_dtype": "float8"},
    {"score_dtype": "float8", "student_stats": True},
    pytest.param({"score_dtype": "float32", "fraction": 1.0, "workspace_bytes": 7_000}, marks=pytest.mark.full),
]

OTHERS = [
    *("forward_kl", "jsd", "skew_kl", "forward_kl_topk", "entropy_aware", "sampled"),
    *(TailAware(8), TopK("reverse", "student", "bucket", 8)),  # short lists: no row of a teacher without a tail
    SampledToken(baseline="kl", ratio="ppo"),
    ImportanceWeighted(ReverseKL()),
    ImportanceWeighted(TailAware(8), ratio="icepop"),
]


def call(*, n=N, dtype=torch.bfloat16, trainable_head=True, student_stats=False, **options):
    """A function that makes the call, and the tensors that go in."""
    student, teacher = head_pair((n,), V, student_dim=DS, teacher_dim=DT, dtype=dtype)
    known = StudentStats.from_logits(student.hidden @ student.weight.T) if student_stats else None
    student = leaf_head(student) if trainable_head else LinearHead(leaf(student.hidden), student.weight)
    inputs = [student.hidden, student.weight, teacher.hidden, teacher.weight]
    options = {"fraction": 0.25, "backend": "triton", "workspace_bytes": 2**17, "student_stats": known, **options}
    if "selector" in options:
        options["tokens"] = torch.arange(n) % V
    return lambda: selective_opd_loss(student, teacher, **options).loss, inputs


def estimated(**options):
    return estimate(N, V, DS, DT, **{"fraction": 0.25, "workspace_bytes": 2**17, **options})


@pytest.mark.parametrize("options", CASES)
def test_flops_are_those_counted(options):
    run, _ = call(**options)
    with FlopCounterMode(display=False) as counter:
        run().backward()
    got = estimated(**options)
    assert counter.get_total_flops() == got.flops
    assert got.matmul_units == pytest.approx(got.flops / (2 * N * V * DS))
    in_8_bits = counter.get_flop_counts()["Global"].get(torch.ops.aten._scaled_mm, 0)
    assert in_8_bits == got.float8_flops


@pytest.mark.parametrize(
    ("divergence", "backend"),
    [
        *((divergence, "torch") for divergence in OTHERS),
        *(pytest.param(x, "triton", marks=pytest.mark.full) for x in OTHERS if x != "skew_kl"),  # which has no kernel
    ],
    ids=str,
)
def test_flops_of_other_divergences_are_those_counted(divergence, backend):
    tokens = torch.arange(N) % V
    old = None if resolve_divergence(divergence).importance is None else -torch.ones(N)
    run, _ = call(divergence=divergence, backend=backend, tokens=tokens, old_logprobs=old, trainable_head=False)
    with FlopCounterMode(display=False) as counter:
        run().backward()
    assert counter.get_total_flops() == estimated(divergence=divergence, backend=backend, trainable_head=False).flops


def test_flops_of_a_list_alone_are_at_most_those_estimated():
    run, _ = call(divergence=LocalSupport(8), backend="torch")
    with FlopCounterMode(display=False) as counter:
        run().backward()
    got = estimated(divergence=LocalSupport(8), backend="torch").flops
    assert 0.9 * got < counter.get_total_flops() <= got


@pytest.mark.parametrize("options", CASES)
def test_a_call_saves_and_holds_no_more_than_estimated(options, prompt_launches):
    run, inputs = call(**options)
    got = estimated(**options)
    with LiveBytes() as meter:
        with saved_bytes(inputs) as saved:
            loss = run()
        held = meter.live
        loss.backward()
    # On a CPU "torch" saves no weights of rows where all are equal and no loss is infinite.
    assert 0.8 * got.saved_bytes - SAVED_SCALAR_BYTES < saved["bytes"] <= got.saved_bytes
    assert got.gradient_bytes < meter.peak <= got.peak_bytes
    assert held <= got.held_bytes + grids.KERNEL_ROW_BYTES * N


def test_the_units_of_the_design():
    sizes = 16_384, 151_936, 2048, 4096  # r = 2
    rho = 820 / 16_384
    assert estimate(*sizes).matmul_units == pytest.approx(3 + 5 * rho)
    assert estimate(*sizes, trainable_head=False).matmul_units == pytest.approx(3 + 4 * rho)
    assert estimate(*sizes, student_stats=True).matmul_units == pytest.approx(2 + 5 * rho, rel=1e-3)
    same = 16_384, 151_936, 2048, 2048
    assert estimate(*same).matmul_units == pytest.approx(2 + 4 * rho)
    assert estimate(*same, trainable_head=False).matmul_units == pytest.approx(2 + 3 * rho)
    assert estimate(*same, student_stats=True).matmul_units == pytest.approx(1 + 4 * rho, rel=1e-3)


def test_traffic_is_at_least_the_logits_and_grows_as_the_workspace_shrinks():
    sizes = 16_384, 151_936, 2048, 4096
    logits = 2 * 2 * 2 * 16_384 * 151_936  # both models, 16 bits, written and read
    got = [estimate(*sizes, workspace_bytes=x).bytes_moved for x in (2**32, 2**29, 2**26)]
    assert logits < got[0] < got[1] < got[2]
    assert got[1] < 5 * logits  # most of the rest: weights, once per tile


def test_estimate_rejects_what_does_not_fit():
    for options, message in (
        ({"N": 0}, "N: got 0, expected at least 1"),
        ({"fraction": 2}, r"fraction: got 2, expected a number in \(0, 1\]"),
        ({"backend": "eager"}, "backend: got 'eager', expected one of: triton, torch"),
        ({"top_k": 100}, "top_k: got 100, expected at most the vocabulary size, 99"),
        ({"backend": "torch", "score_dtype": "float8"}, "score_dtype: got 'float8', which needs backend='triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(**{"N": 4, "V": 99, "Ds": 8, "Dt": 8, **options})


def test_estimate_rejects_what_is_no_floating_point_dtype():
    for dtype in ("bfloat16", torch.int8):
        with pytest.raises(TypeError, match=r"dtype: got .*, expected a floating-point torch\.dtype"):
            estimate(4, 99, 8, 8, dtype=dtype)


def test_the_group_of_the_sizing_is_that_of_the_kernels():
    from opd_kernels.score import GROUP

    assert int(GROUP) == grids.GROUP


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (33, {"backend": "torch"}),
        (401, {"backend": "torch"}),
        (401, {"backend": "torch", "dtype": torch.float32}),
        (401, {"backend": "torch", "dtype": torch.float64}),
        (401, {"backend": "torch", "trainable_head": False}),
        (401, {"backend": "torch", "student_stats": True}),
        *((401, {"backend": "torch", "divergence": name}) for name in ("jsd", "tail_aware", "entropy_aware", "local_support")),
        (401, {"backend": "torch", "dtype": torch.float64, "divergence": "entropy_aware"}),
        (33, {"backend": "triton", "divergence": "tail_aware"}),
        (33, {"backend": "triton"}),
        (33, {"backend": "triton", "trainable_head": False, "dtype": torch.float32}),
        (33, {"backend": "triton", "student_stats": True}),
    ],
)
def test_a_call_of_many_rows_saves_no_more_than_estimated(n, options, prompt_launches):
    run, inputs = call(fraction=1.0, n=n, **options)
    with saved_bytes(inputs) as saved:
        loss = run()
    got = estimate(n, V, DS, DT, **{"fraction": 1.0, "workspace_bytes": 2**17, **options})
    assert loss.item() > 0
    # On a CPU "torch" saves no weights of rows where all are equal and no loss is infinite.
    assert 0.8 * got.saved_bytes - SAVED_SCALAR_BYTES < saved["bytes"] <= got.saved_bytes
