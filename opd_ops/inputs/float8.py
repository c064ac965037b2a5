"""A head in 8 bits, for ranking positions alone: e4m3 values with one fp32 scale a row.

  x ~ scale * value,  scale = max |row| / 448,  value in float8_e4m3fn
  logits ~ (hidden values @ weight values.T) * hidden scales * weight scales,  summed by the vendor's matmul
  Nothing that is trained on comes from these logits: the best 2 rho N positions are scored again, exactly (scoring.py).

Not here: the tiles that read them (backends/shared/tiles.py), what the ranking loses (benchmarks/cpu/ranking.py).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
ALIGNED = 64  # rows of the values: whole aligned tiles of the matmul, the last ones zero
WIDTH = 16  # the matmul takes rows of whole multiples of this
ROWS_AT_A_TIME = 256
CAPABILITY = (9, 0)  # Hopper: the first with scales per row


class Float8Rows(NamedTuple):
    """A matrix in 8 bits: `LinearHead(..., float8=Float8Rows.of(weight))` keeps that of a head that does not change."""

    values: Tensor  # (rows up to a multiple of 64, D) float8_e4m3fn
    scales: Tensor  # (the same, 1) fp32

    @staticmethod
    def shape_of(x: Tensor) -> tuple[int, int]:
        """The shape of the values of `x`."""
        return -(-x.shape[0] // ALIGNED) * ALIGNED, x.shape[1]

    @staticmethod
    @torch.no_grad()
    def of(x: Tensor) -> Float8Rows:
        """Quantise (n, D) floating point, row by row; rows are added up to a multiple of 64, all zero."""
        values = torch.zeros(Float8Rows.shape_of(x), dtype=DTYPE, device=x.device)
        scales = torch.ones((len(values), 1), device=x.device)
        for start in range(0, len(x), ROWS_AT_A_TIME):  # no fp32 copy of the whole
            part = slice(start, min(start + ROWS_AT_A_TIME, len(x)))
            rows = x[part].float()
            scale = rows.abs().amax(1, keepdim=True) / LARGEST
            scale = torch.where(scale > 0, scale, 1.0)
            values[part] = (rows / scale).to(DTYPE)
            scales[part] = scale
        return Float8Rows(values, scales)

    def dequantised(self, n: int) -> Tensor:
        """(n, D) fp32: what the first n rows stand for."""
        return self.values[:n].float() * self.scales[:n]


def product(x: Float8Rows, w: Float8Rows, out: Tensor) -> Tensor:
    """Write x @ w.T into `out`, contiguous bf16: (n, rows of w), the first n rows of x."""
    n = len(out)
    scales = x.scales[:n], w.scales.T
    # Fast accumulation keeps fewer bits of long sums, far fewer than the operands lost already; it only ranks.
    return torch._scaled_mm(x.values[:n], w.values.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True, out=out)


def refusal(*weights: Tensor) -> str | None:
    """Why heads of these weights cannot be scored in 8 bits here, or None."""
    if not weights:
        return "neither side is a LinearHead: there is no matmul to do in 8 bits"
    for weight in weights:
        if weight.shape[1] % WIDTH:
            return f"a head's hidden size is {weight.shape[1]}, expected a multiple of {WIDTH}"
        device = weight.device
        if device.type == "cuda" and torch.version.hip is None:
            found = torch.cuda.get_device_capability(device)
            if found < CAPABILITY:
                return f"the device has compute capability {found[0]}.{found[1]}, expected 9.0 (Hopper) or newer"
        elif not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"the heads are on {device}, expected an NVIDIA GPU, Hopper or newer"
    return None
