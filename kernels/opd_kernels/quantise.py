"""Rows in 8 bits: e4m3 numbers (4 bits of exponent, 3 of mantissa), one scale a row; opd_ops/inputs/float8.py defines them.

  scale  = max |row| / 448; 1 where that is below 2^-126 or NaN
  values = row / scale, the nearest e4m3 number, ties to even; NaN beyond 464

Shapes: n rows, D columns, m >= n
  x           (n, D)    in   fp32/bf16/fp16, any strides
  values      (m, D)    out  uint8, the bits of e4m3; contiguous; rows n .. m-1 become 0
  scales      (m, 1)    out  fp32; 1 in the rows n .. m-1

Grid: (m,). Traffic: x read once from memory (the second sweep of a row finds it in L1 or L2), a byte a number written.

Numerics
  Numbers are rounded as integers, so that GPUs without 8-bit types compile it too, and the result has the bits of torch's.
  Of magnitudes as int32 NaN is the largest: one maximum finds it too.

Not here: the matmul (the vendor's), when to score in 8 bits (opd_ops/call/score.py). Tests: tests/kernels/test_quantise.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import check_launch

INVERSE_LARGEST = tl.constexpr(1 / 448)
SMALLEST_SCALE = tl.constexpr(2.0**-126)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SMALLEST_NORMAL = tl.constexpr(0x3C800000)  # bits of 2^-6
OVERFLOW = tl.constexpr(0x43F00000)  # bits of 480, which would be e4m3's NaN


@triton.jit
def _e4m3(y):
    # the bits of the nearest e4m3 number, int32
    bits = y.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & MAGNITUDE, OVERFLOW)
    # fp32's exponent counts from -127, e4m3's from -7
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below the smallest normal number e4m3 has steps of 2^-9, as fp32 has from 2^14 on.
    few = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return tl.where(size < SMALLEST_NORMAL, few, normal) | ((bits >> 24) & 0x80)


@triton.jit(do_not_specialize=["n"])
def _quantise_kernel(x_ptr, values_ptr, scales_ptr, stride_xn, stride_xd, n, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xn
    values_row = values_ptr + row * D
    lane = tl.arange(0, BLOCK)
    width = tl.where(row < n, D, 0)
    largest = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, width, BLOCK):
        x = tl.load(x_row + (first + lane).to(tl.int64) * stride_xd, mask=first + lane < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & MAGNITUDE)
    scale = tl.max(largest, 0).to(tl.float32, bitcast=True) * INVERSE_LARGEST
    scale = tl.where(scale >= SMALLEST_SCALE, scale, 1.0)
    tl.store(scales_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for first in range(0, D, BLOCK):
        x = tl.load(x_row + (first + lane).to(tl.int64) * stride_xd, mask=first + lane < width, other=0.0).to(tl.float32)
        tl.store(values_row + first + lane, _e4m3(x * inverse).to(tl.uint8), mask=first + lane < D)


def quantise_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """Write `x`, (n, D), in 8 bits into `values`, (m, D) uint8, and `scales`, (m, 1) fp32."""
    n, width = x.shape
    assert values.shape[0] == scales.shape[0] >= n
    assert values.shape[1] == width
    check_launch(x, values=values, scales=scales)
    if values.numel() == 0:
        return
    tile = launch_table.quantise()
    _quantise_kernel[(len(values),)](
        x, values, scales, x.stride(0), x.stride(1), n, width,
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
