"""Correctness of the path from heads on the device, against the float64 oracle on the same device.

  Cases: stored types; one group of rows, several, the second look; transforms; a vocabulary of no round number; statistics
  from the rollout; 8-bit scoring; a step replayed from a CUDA graph and one compiled by inductor, against the plain call.
  Bounds: tests/support/tolerances.py; 16-bit gradients 5e-3, the rounding of operands and results.

Not here: the kernels one by one (check.py), the same on a CPU (tests/backends/triton/test_heads.py), timing (heads.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.check import CannotRunError, attempt
from benchmarks.gpu.timing import Bench
from opd_ops import Float8Rows, LinearHead, StudentStats, score_positions, selective_opd_loss
from opd_ops.backends.triton import heads as triton_heads
from opd_ops.call import prepare
from opd_ops.inputs import float8
from tests.support.cases import gradients, head_pair, leaf_head, to_double
from tests.support.tolerances import HEAD_ABSOLUTE, assert_gradient, assert_stats, assert_within, relative_error

GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}
Check = Callable[[Bench], None]


def _pair(bench: Bench, dtype: torch.dtype, **options: Any) -> tuple[LinearHead, LinearHead]:
    shape, vocab = ((2, 2), 131) if bench.dry else ((4, 10), 50_257)
    return head_pair(shape, vocab, student_dim=32, teacher_dim=48, dtype=dtype, device=bench.device, **options)


def statistics(dtype: torch.dtype, **options: Any) -> Check:
    def check(bench: Bench) -> None:
        student, teacher = _pair(bench, dtype, **options)
        _, actual = score_positions(student, teacher, backend="triton", score_dtype="float32")
        _, expected = score_positions(to_double(student), to_double(teacher), backend="eager")
        assert_stats(actual, expected, absolute=HEAD_ABSOLUTE)

    return check


def gradient(dtype: torch.dtype, workspace_bytes: int, divergence: str = "reverse_kl", **options: Any) -> Check:
    def check(bench: Bench) -> None:
        heads = _pair(bench, dtype, **options)
        student, double = leaf_head(heads[0]), leaf_head(heads[0], torch.float64)
        common = {"fraction": 0.5, "divergence": divergence}
        size = workspace_bytes if bench.dry else 100 * workspace_bytes
        actual = selective_opd_loss(student, heads[1], backend="triton", workspace_bytes=size, score_dtype="float32", **common)
        expected = selective_opd_loss(double, to_double(heads[1]), backend="eager", **common)
        actual.loss.backward()
        expected.loss.backward()
        assert torch.equal(actual.selected, expected.selected), "the selected positions differ"
        assert_within(actual.loss[None], expected.loss[None], absolute=1e-6, relative=1e-4, name="loss")
        for result, wanted in zip(gradients(student), gradients(double), strict=True):
            assert_gradient(result, wanted, GRADIENT[dtype])

    return check


def rollout(bench: Bench) -> None:
    student, teacher = _pair(bench, torch.float32)
    stats = StudentStats.from_logits(student.hidden.double() @ student.weight.double().T)
    actual, _ = score_positions(student, teacher, student_stats=stats, backend="triton")
    expected, _ = score_positions(to_double(student), to_double(teacher), backend="eager")
    assert relative_error(actual, expected) < 1e-3, f"scores differ by {relative_error(actual, expected):.1e}"


def eight_bits(bench: Bench) -> None:
    student, _ = _pair(bench, torch.bfloat16)
    reason = float8.refusal(student.weight)
    if reason is not None:
        raise CannotRunError(reason)
    hidden = student.hidden.flatten(0, -2)
    x, w = triton_heads.quantised(hidden), triton_heads.quantised(student.weight)
    for rows, given in ((x, hidden), (w, student.weight)):
        expected = Float8Rows.of(given)
        bits, expected_bits = (x.values.view(torch.uint8) for x in (rows, expected))
        assert torch.equal(bits, expected_bits), "the kernel's 8 bits are not those of torch's conversion"
        assert torch.equal(rows.scales, expected.scales), "the kernel's scales are not those of torch"
    out = float8.product(x, w, torch.empty((len(hidden), len(w.values)), dtype=torch.bfloat16, device=bench.device))
    expected = x.dequantised(len(out)).double() @ w.dequantised(len(w.values)).double().T
    assert relative_error(out, expected) < 5e-3, f"relative error {relative_error(out, expected):.1e}"


def _step(bench: Bench) -> tuple[Callable[[], torch.Tensor], LinearHead]:
    heads = _pair(bench, torch.bfloat16)
    student = leaf_head(heads[0])

    def step() -> torch.Tensor:
        return selective_opd_loss(student, heads[1], fraction=0.25, backend="triton").loss

    return step, student


def _run(step: Callable[[], torch.Tensor], student: LinearHead) -> list[torch.Tensor]:
    student.hidden.grad = student.weight.grad = None
    loss = step()
    loss.backward()
    return [loss.detach(), *gradients(student)]


@contextmanager
def as_in_a_graph() -> Iterator[None]:
    """The library takes the operations that it captures: its list of rows has another length there."""
    kept = prepare.is_in_graph
    prepare.is_in_graph = lambda device: True
    try:
        yield
    finally:
        prepare.is_in_graph = kept


def cuda_graph(bench: Bench) -> None:
    step, student = _step(bench)
    expected = [x.clone() for x in _run(step, student)]
    if bench.dry:
        with as_in_a_graph():
            for a, b in zip(_run(step, student), expected, strict=True):
                assert relative_error(a, b) < 1e-5, f"the step to capture differs by {relative_error(a, b):.1e}"
        raise CannotRunError("a CPU captures no graph")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), as_in_a_graph():  # compiles, and makes the workspaces, of what is captured
        for _ in range(3):
            _run(step, student)
    torch.cuda.current_stream().wait_stream(stream)
    student.hidden.grad = student.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
        loss.backward()
    for x in gradients(student):
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([loss.detach(), *gradients(student)], expected, strict=True):
        assert torch.equal(a, b), f"a replay differs by {relative_error(a, b):.1e}"


def compiled(bench: Bench) -> None:
    step, student = _step(bench)
    expected = [x.clone() for x in _run(step, student)]
    torch._dynamo.reset()
    traced = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager" if bench.dry else "inductor")
    for a, b in zip(_run(traced, student), expected, strict=True):
        assert relative_error(a, b) < 1e-5, f"a compiled step differs by {relative_error(a, b):.1e}"


CHECKS: dict[str, Check] = {
    **{f"statistics, {dtype}": statistics(dtype) for dtype in GRADIENT},
    "statistics, bias, scale, soft-cap": statistics(torch.bfloat16, bias=True, scale=0.5, softcap=20.0),
    **{f"gradient, {dtype}": gradient(dtype, 2**29) for dtype in GRADIENT},
    "gradient, several groups": gradient(torch.float32, 2**14),
    "gradient, logit gradients kept": gradient(torch.bfloat16, 2**14),
    "gradient, second look": gradient(torch.bfloat16, 2**10),
    "gradient, forward KL, bias, soft-cap": gradient(torch.bfloat16, 2**29, "forward_kl", bias=True, softcap=20.0),
    "statistics from the rollout": rollout,
    "8-bit product": eight_bits,
    "CUDA graph": cuda_graph,
    "torch.compile": compiled,
}


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per case."""
    for name, check in CHECKS.items():
        yield attempt(bench, "heads", name, lambda check=check: check(bench))
