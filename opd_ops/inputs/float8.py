"""A head in 8 bits, only for ranking positions: e4m3 values with one fp32 scale per row.

  x ~ scale * value,  scale = max |row| / 448,  value in float8_e4m3fn
  logits ~ (hidden values @ weight values.T) * hidden scales * weight scales,  summed by the vendor's matmul
  The Triton backend quantises by a kernel, to the same numbers (kernels/opd_kernels/quantise.py).
  No loss is computed from these logits: the best 2 rho N positions are scored again from fp32 logits (call/score.py).

Not here: the tiles that read them (backends/shared/tiles.py), the error of the ranking (benchmarks/cpu/ranking.py).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.inputs.chunks import chunks

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the reciprocal of a smaller scale may be infinite: such rows become zero
ALIGNED = 64  # the matmul takes whole tiles of this many rows; the last rows are zero
WIDTH = 16  # the matmul takes rows whose width is a multiple of this
ROWS_AT_A_TIME = 256
CAPABILITY = (9, 0)  # Hopper: the first GPU with scales per row


class Float8Rows(NamedTuple):
    """A matrix in 8 bits. For a frozen head keep it between calls: `LinearHead(..., float8=Float8Rows.of(weight))`."""

    values: Tensor  # (rows up to a multiple of 64, D) float8_e4m3fn
    scales: Tensor  # (same number of rows, 1) fp32

    @staticmethod
    def shape_of(x: Tensor) -> tuple[int, int]:
        """The shape of the values of `x`."""
        return -(-x.shape[0] // ALIGNED) * ALIGNED, x.shape[1]

    @staticmethod
    def empty(x: Tensor) -> Float8Rows:
        """Uninitialised, for the rows of `x`."""
        shape = Float8Rows.shape_of(x)
        return Float8Rows(
            torch.empty(shape, dtype=DTYPE, device=x.device), torch.empty((shape[0], 1), dtype=torch.float32, device=x.device)
        )

    @staticmethod
    @torch.no_grad()
    def of(x: Tensor) -> Float8Rows:
        """Quantise (n, D) floating point, row by row. Zero rows fill n up to a multiple of 64."""
        out = Float8Rows.empty(x)
        for group in chunks(len(x), ROWS_AT_A_TIME):  # no fp32 copy of the whole matrix
            rows = x[group].float()
            scale = rows.abs().amax(1, keepdim=True) * (1 / LARGEST)
            scale = torch.where(scale >= SMALLEST_SCALE, scale, 1.0)
            out.values[group] = (rows * (1 / scale)).to(DTYPE)
            out.scales[group] = scale
        out.values[len(x) :] = 0
        out.scales[len(x) :] = 1
        return out

    def dequantised(self, n: int) -> Tensor:
        """(n, D) fp32: the first n rows."""
        return self.values[:n].float() * self.scales[:n]


def product(x: Float8Rows, w: Float8Rows, out: Tensor) -> Tensor:
    """Write x @ w.T into `out`, contiguous bf16: (n, rows of w), the first n rows of x."""
    n = len(out)
    scales = x.scales[:n], w.scales.T
    # Fast accumulation rounds long sums, by far less than the 8-bit operands; the logits only rank positions.
    return torch._scaled_mm(x.values[:n], w.values.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True, out=out)


def refusal(*weights: Tensor) -> str | None:
    """The reason why heads with these weights cannot be scored in 8 bits; None if they can."""
    if not weights:
        return "neither side is a LinearHead: there is no matmul to do in 8 bits"
    for weight in weights:
        if weight.shape[1] % WIDTH:
            return f"a head's hidden size is {weight.shape[1]}, expected a multiple of {WIDTH}"
        device = weight.device
        if device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < CAPABILITY:
                return f"the device has compute capability {capability[0]}.{capability[1]}, expected 9.0 (Hopper) or newer"
        elif not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"the heads are on {device}, expected an NVIDIA GPU, Hopper or newer"
    return None
