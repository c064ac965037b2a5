"""Zeros in the rows of a table that are not to be kept, 16 bytes at a time, whatever the rows' alignment.

  out[i, :] = 0 where keep[i] = 0; no other row is written or read

Shapes: N rows, W columns
  keep        (N,)      in   uint8
  out         (N, W)    out  fp32/bf16/fp16, unit stride along W

Grid: (N,). Traffic: W elements written in each row that is zeroed.

A row begins and ends anywhere. Up to 31 bytes at either end are written element by element. The middle begins at a multiple of
32 bytes, the size of a sector of memory, and is written as 32-bit words.
Not here: the gradient in the rows that are kept (gradient.py, off_list.py).
Tests: tests/kernels/test_zero_rows.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import check_launch


@triton.jit
def _zero_rows_kernel(out_ptr, keep_ptr, stride_on, W, SIZE: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(keep_ptr + row) == 0:
        out_row = out_ptr + row * stride_on
        begin = out_row.to(tl.int64)
        end = begin + W * SIZE
        first = (begin + 31) // 32 * 32
        last = end // 32 * 32
        lane = tl.arange(0, 32)
        zero = tl.zeros((32,), out_ptr.dtype.element_ty)
        tl.store(out_row + lane, zero, mask=begin + lane * SIZE < tl.minimum(first, end))
        tail = W - tl.minimum((end - last) // SIZE, W).to(tl.int32) + lane
        tl.store(out_row + tail, zero, mask=(tail < W) & (begin + tail * SIZE >= first))
        # Both are multiples by construction, which the compiler loses sight of: with these hints it stores 128 bits at a time.
        words = tl.multiple_of(first.to(tl.pointer_type(tl.int32)), 32)
        n_words = tl.multiple_of((last - first) // 4, 8)
        word = tl.arange(0, WORDS)
        for w in range(0, n_words, WORDS):
            tl.store(words + w + word, tl.zeros((WORDS,), tl.int32), mask=w + word < n_words)


def zero_rows(out: Tensor, keep: Tensor) -> None:
    """Zero the rows of `out` whose entry of `keep` is 0."""
    assert out.stride(1) == 1, "unit stride along the columns"
    assert keep.shape == (out.shape[0],)
    check_launch(out, keep=keep)
    if out.numel() == 0:
        return
    tile = launch_table.zero_rows()
    _zero_rows_kernel[(out.shape[0],)](
        out,
        keep,
        out.stride(0),
        out.shape[1],
        SIZE=out.element_size(),
        **tile.constants,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )
