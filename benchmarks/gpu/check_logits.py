"""Correctness of the library from dense logits on the device, against the float64 oracle on the same device.

  selective_opd_loss by reverse and forward KL: loss, selection and gradient through autograd, exact zeros off the selection;
  the same with inplace_backward; models of different stored types; a NaN of either model; offsets beyond 2^31.
  Bounds: tests/support/tolerances.py; of a 16-bit gradient one rounding (check.py).

Not here: the kernels one by one (check.py), other divergences (check_divergences.py), heads (check_heads.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.check import GRADIENT, CannotRunError, attempt
from benchmarks.gpu.timing import Bench
from opd_ops import selective_opd_loss
from tests.support.cases import leaf, logit_pair
from tests.support.tolerances import assert_gradient, assert_within

Check = Callable[[Bench], None]
B16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _pair(bench: Bench, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    n, vocab = (4, 131) if bench.dry else (16, 151_936)
    s, t = logit_pair(n, vocab, seed=1, device=bench.device)
    return s.to(dtypes[0]), t.to(dtypes[1])


def _loss(student: Tensor, teacher: Tensor, **options: Any) -> Any:
    return selective_opd_loss(student, teacher, **{"fraction": 0.5, "backend": "triton"} | options)


def loss(divergence: str, s_dtype: torch.dtype, t_dtype: torch.dtype, *, inplace: bool = False) -> Check:
    def check(bench: Bench) -> None:
        s, t = _pair(bench, (s_dtype, t_dtype))
        student, double = leaf(s), leaf(s, torch.float64)
        logits = student * 1 if inplace else student  # made by an operation that does not read it again
        actual = _loss(logits, t, divergence=divergence, inplace_backward=inplace)
        expected = _loss(double, t.double(), divergence=divergence, backend="eager")
        actual.loss.backward()
        expected.loss.backward()
        assert torch.equal(actual.selected, expected.selected), "the selected positions differ"
        assert_within(actual.loss[None], expected.loss[None], absolute=1e-6, relative=1e-4, name="loss")
        assert_gradient(student.grad, double.grad, GRADIENT[s_dtype])
        assert not student.grad[~actual.selected].any(), "a position off the selection has a gradient"
        if inplace:
            assert torch.equal(logits.detach(), student.grad), "the gradient is not in the logits' memory"

    return check


def students_nan(bench: Bench) -> None:
    s, t = _pair(bench, (B16, B16))
    s[1, 7] = torch.nan
    assert bool(_loss(s, t).loss.isnan()), "the student's NaN does not reach the loss"


def teachers_nan(bench: Bench) -> None:
    s, t = _pair(bench, (B16, B16))
    t[1, 7] = torch.nan
    student, double = leaf(s), leaf(s, torch.float64)
    actual, expected = _loss(student, t, fraction=1.0), _loss(double, t.double(), fraction=1.0, backend="eager")
    actual.loss.backward()
    expected.loss.backward()
    assert torch.equal(actual.selected, expected.selected), "the selected positions differ"
    assert not bool(actual.selected[1]), "a position without a teacher is selected"
    assert_within(actual.loss[None], expected.loss[None], absolute=1e-6, relative=1e-4, name="loss")
    assert_gradient(student.grad, double.grad, GRADIENT[B16])


def beyond_2_to_31(bench: Bench) -> None:
    """Two positions of a batch whose last row begins past element 2^31; what is masked is NaN and must not be read."""
    n, vocab = (6, 131) if bench.dry else (16_384, 151_936)
    if not bench.fits(4.4 * n * vocab * B16.itemsize):
        raise CannotRunError(f"it takes {4 * n * vocab * B16.itemsize / 1e9:.0f} GB of memory")
    rows = [0, n - 1]
    few = logit_pair(2, vocab, seed=2, dtype=B16, device=bench.device)
    s, t = (torch.full((n, vocab), torch.nan, dtype=B16, device=bench.device) for _ in range(2))
    for whole, x in zip((s, t), few, strict=True):
        whole[rows] = x
    mask = torch.zeros(n, dtype=torch.bool, device=bench.device)
    mask[rows] = True
    student, double = s.requires_grad_(), leaf(s[rows], torch.float64)
    actual = _loss(student, t, mask=mask, fraction=1.0)
    expected = _loss(double, t[rows].double(), fraction=1.0, backend="eager")
    actual.loss.backward()
    expected.loss.backward()
    assert torch.equal(actual.selected, mask), "the selected positions differ"
    assert_within(actual.loss[None], expected.loss[None], absolute=1e-6, relative=1e-4, name="loss")
    assert_gradient(student.grad[rows], double.grad, GRADIENT[B16])
    for part in student.grad[1:-1].split(1024):
        assert not part.any(), "a masked position has a gradient"


KINDS = ("reverse_kl", "forward_kl")
CHECKS: dict[str, Check] = {
    **{f"{kind}, {str(dtype)[6:]}": loss(kind, dtype, dtype) for kind in KINDS for dtype in GRADIENT},
    **{f"{kind}, in place, {str(dtype)[6:]}": loss(kind, dtype, dtype, inplace=True) for kind in KINDS for dtype in (B16, F32)},
    **{f"{kind}, bf16 beside fp32": loss(kind, B16, F32) for kind in KINDS},
    **{f"{kind}, fp32 beside fp16": loss(kind, F32, F16) for kind in KINDS},
    "the student's NaN": students_nan,
    "the teacher's NaN": teachers_nan,
}


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per case."""
    for name, check in CHECKS.items():
        yield attempt(bench, "logits", name, lambda check=check: check(bench))


def last(bench: Bench) -> Iterator[dict[str, Any]]:
    """By itself, for the end, as check.py's of the same name."""
    yield attempt(bench, "logits", "offsets beyond 2^31", lambda: beyond_2_to_31(bench))
