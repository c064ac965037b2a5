"""How results are compared with the fp64 oracle: the one place with numbers, all from the library's contract.

  gradients:  ||g - g64|| / ||g64|| <= 1e-4, and below KL 1e-3 <= max(1e-4, 3e-6 / sqrt(2 KL))
  statistics: |x - x64| <= 1e-6 + 1e-5 |x64|;  KL: |x - x64| <= 1e-6 + 1e-4 KL, and never negative

Relative norms of unreduced or summed quantities only: an all-zero gradient fails every one of these
(tests/support/test_tolerances.py), as it would not with an absolute tolerance on a mean.
Not here: inputs (cases.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops import TokenStats
from opd_ops.selection.stats import REFERENCE_COLUMNS

GRADIENT = 1e-4
HEAD_ABSOLUTE = 5e-6  # an fp32 matmul's logits of up to 32 are themselves rounded by 2e-6
KL_COLUMNS = ("reverse_kl", "forward_kl", "union_kl", "jsd", "released_kl")


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in fp64; 0/0 is 0, anything else over 0 is infinite."""
    error, norm = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return error / norm if norm else (0.0 if error == 0.0 else math.inf)


def assert_gradient(got: Tensor | None, want: Tensor | None, bound: float = GRADIENT) -> None:
    assert got is not None
    assert want is not None
    assert got.shape == want.shape
    assert want.norm() > 0, "the oracle's gradient is zero: this comparison would prove nothing"
    error = relative_error(got, want)
    assert error <= bound, f"relative error of the gradient {error:.2e} > {bound:.2e}"


def small_kl_bound(kl: float) -> float:
    """The gradient's bound where rounding of log p - log q rules."""
    return max(GRADIENT, 3e-6 / math.sqrt(2 * kl)) if kl < 1e-3 else GRADIENT


def assert_within(got: Tensor, want: Tensor, *, absolute: float, relative: float, name: str) -> None:
    got, want = got.double(), want.double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    same = (got == want) | (got.isnan() & want.isnan())  # infinities and NaN must agree exactly
    error = torch.where(same, 0.0, (got - want).abs())
    allowed = absolute + relative * want.abs().nan_to_num(posinf=0.0)
    worst = (error - allowed).argmax() if error.numel() else None
    assert bool((error <= allowed).all()), f"{name}: got {got.flatten()[worst]:.9g}, expected {want.flatten()[worst]:.9g}"


def assert_stats(got: TokenStats, want: TokenStats, *, absolute: float = 1e-6) -> None:
    """Every column of the contract, against the oracle's."""
    assert torch.equal(got.valid, want.valid)
    for name, expected in want._asdict().items():
        column = getattr(got, name)
        skips = column is None or expected is None if name in REFERENCE_COLUMNS else column is None and expected is None
        if name == "valid" or skips:
            continue
        is_kl = name in KL_COLUMNS
        assert_within(column, expected, absolute=absolute, relative=1e-4 if is_kl else 1e-5, name=name)
        if is_kl or name.endswith("entropy"):
            assert bool((column >= 0).all()), f"{name}: negative"
