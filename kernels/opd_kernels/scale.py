"""A tensor times one number, in place; nothing is read or written where the number is 1.

  x = factor x

Shapes: any
  factor      (1,)      in   fp32, on the device: the host never reads it
  x           any       in and out   fp32/bf16/fp16; elements without gaps, in any order of dimensions

Grid: one program for each block of elements. Traffic: x read and written, or nothing.

Not here: which factor (opd_ops/backends/triton/heads_loss.py). Tests: tests/kernels/test_scale.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import check_launch


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
        tl.store(x_ptr + i, (x * factor).to(x_ptr.dtype.element_ty), mask=i < n)


def scale(x: Tensor, factor: Tensor) -> None:
    """Multiply `x` by `factor`, (1,) fp32, in place."""
    storage = x.as_strided((x.numel(),), (1,))
    assert x.numel() == 0 or 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) == x.numel(), (
        "elements without gaps"
    )
    check_launch(x)
    if x.numel() == 0:
        return
    tile = launch_table.scale()
    _scale_kernel[(triton.cdiv(x.numel(), tile.constants["BLOCK"]),)](
        storage, factor, x.numel(), **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False
    )
