"""Quantiles of columns of statistics over the valid positions, exact and linearly interpolated: the fits of the normalisers.

  Q(a) = x[k] + f (x[k+1] - x[k]),  k + f = a (m - 1),  x the m finite values of the valid positions, ascending      in fp64
  m = 0: Q = +inf.  Q(0) is the smallest value, Q(1) the largest.
  valid    the teacher's log-sum-exp is finite, or the student's is not
  Source: arXiv 2605.26844 eq. 11 takes Q(.05) and Q(.95), arXiv 2604.14084 section 6 the extremes and Q(.98).
  FIT_ALL, as TA's released code: x are the values of all n rows, 0 where a value is not finite or not valid; a column may be
  the product of two.

Shapes: n rows of statistics, C columns with quantiles, L levels
  table        (>= 7, n)  in   fp32, the order of score.py's COLUMNS and support.py's SUPPORT_COLUMNS
  keys         (C L, n)   scratch, int32; only for n above the block of the launch table
  out          (C, L)     out  fp64

Grid: (C L,), a program for each quantile. Traffic: three columns of the table read once a program; keys as order.py says.
Results equal those of opd_ops/selection/normalisers.py (`_quantiles`) to the bit.

Not here: the search (order.py), normalisers and scores (place.py). Tests: tests/kernels/test_selection.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import _order_key, check_launch
from .order import ABSENT, LARGEST, _kth_largest, _value_of_key
from .score import COLUMNS

S_LSE = tl.constexpr(COLUMNS.index("student_logsumexp"))
T_LSE = tl.constexpr(COLUMNS.index("teacher_logsumexp"))
INF = tl.constexpr(float("inf"))
MAX_COLUMNS = 4
NO_FACTOR = tl.constexpr(127)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < INF


@triton.jit
def _is_valid(table_ptr, stride, i, mask):
    # a non-finite teacher must not hide a non-finite student; lanes outside of the mask are not valid
    s_lse = tl.load(table_ptr + S_LSE * stride + i, mask=mask, other=0.0)
    t_lse = tl.load(table_ptr + T_LSE * stride + i, mask=mask, other=INF)
    return _is_finite(t_lse) | (_is_finite(s_lse) == 0)


@triton.jit
def _finite_or_zero(x):
    return tl.where(_is_finite(x), x, 0.0)


@triton.jit
def _fitted_keys(table_ptr, stride, column, factor, first, n, FIT_ALL: tl.constexpr, BLOCK: tl.constexpr):
    i = (first + tl.arange(0, BLOCK)).to(tl.int64)
    inside = i < n
    valid = inside & _is_valid(table_ptr, stride, i, inside)
    if FIT_ALL:
        x = tl.load(table_ptr + column * stride + i, mask=valid, other=0.0)
        has_factor = factor != NO_FACTOR
        y = tl.load(table_ptr + tl.where(has_factor, factor, column) * stride + i, mask=valid, other=0.0)
        return tl.where(inside, _order_key(_finite_or_zero(tl.where(has_factor, x * y, x)), 0), ABSENT)
    x = tl.load(table_ptr + column * stride + i, mask=inside, other=INF)
    return tl.where(valid & _is_finite(x), _order_key(x, 0), ABSENT)


@triton.jit
def _sizes(keys):
    # how many keys there are; the smallest and the largest
    present = keys != ABSENT
    return tl.sum(present.to(tl.int32)), tl.min(tl.where(present, keys, LARGEST)), tl.max(keys)


@triton.jit
def _above(keys, key):
    # how many keys are larger, and the smallest of these
    larger = keys > key
    return tl.sum(larger.to(tl.int32)), tl.min(tl.where(larger, keys, LARGEST))


@triton.jit(do_not_specialize=["n", "stride", "columns", "factors"])
def _quantiles_fwd_kernel(
    table_ptr, keys_ptr, out_ptr, n, stride, columns, factors,
    LEVEL_0: tl.constexpr, LEVEL_1: tl.constexpr, LEVEL_2: tl.constexpr, LEVELS: tl.constexpr,
    FIT_ALL: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    column = ((columns >> (8 * (pid // LEVELS))) & 255).to(tl.int64)  # eight bits each
    factor = ((factors >> (8 * (pid // LEVELS))) & 255).to(tl.int64)
    which = pid % LEVELS
    level = tl.where(which == 0, tl.full((), LEVEL_0, tl.float64), tl.full((), LEVEL_1, tl.float64))
    level = tl.where(which == 2, tl.full((), LEVEL_2, tl.float64), level)
    stride = tl.cast(stride, tl.int64)
    own_keys = keys_ptr
    keys = tl.full((BLOCK,), ABSENT, tl.int32)
    if WHOLE:
        keys = _fitted_keys(table_ptr, stride, column, factor, 0, n, FIT_ALL, BLOCK)
        m, smallest, largest = _sizes(keys)
    else:
        own_keys = keys_ptr + pid.to(tl.int64) * n
        m, smallest, largest = 0, LARGEST, ABSENT
        for first in range(0, n, BLOCK):
            keys = _fitted_keys(table_ptr, stride, column, factor, first, n, FIT_ALL, BLOCK)
            i = first + tl.arange(0, BLOCK)
            tl.store(own_keys + i, keys, mask=i < n)
            sizes = _sizes(keys)
            m, smallest, largest = m + sizes[0], tl.minimum(smallest, sizes[1]), tl.maximum(largest, sizes[2])
        tl.debug_barrier()  # other threads read these keys
    place = level * tl.maximum(m - 1, 0).to(tl.float64)
    k = place.to(tl.int32)
    part = place - k.to(tl.float64)
    key = _kth_largest(keys, own_keys, n, m - k, tl.minimum(smallest, largest), largest, WHOLE, BLOCK)
    if WHOLE:
        n_above, following = _above(keys, key)
    else:
        n_above, following = 0, LARGEST
        for first in range(0, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            above = _above(tl.load(own_keys + i, mask=i < n, other=ABSENT), key)
            n_above, following = n_above + above[0], tl.minimum(following, above[1])
    low = _value_of_key(key).to(tl.float64)
    is_last_tie = (part > 0.0) & (n_above == m - 1 - k)
    high = tl.where(is_last_tie, _value_of_key(following).to(tl.float64), low)
    quantile = tl.where(is_last_tie, low + part * (high - low), low)
    tl.store(out_ptr + pid, tl.where(m > 0, quantile, INF))


def quantiles_fwd(
    table: Tensor,  # (>= 7, n) fp32, unit stride along n
    columns: Sequence[int | tuple[int, int]],  # row numbers of the table; a pair: the product of two rows, with `fit_all`
    levels: Sequence[float],  # two or three, in [0, 1]
    *,
    fit_all: bool = False,
) -> Tensor:
    """(columns, levels) fp64 quantiles of these columns."""
    n = table.shape[1]
    assert n <= 1 or table.stride(1) == 1, "unit stride along the rows"
    check_launch(table)
    assert 1 <= len(columns) <= MAX_COLUMNS
    assert len(levels) in (2, 3)
    out = torch.empty((len(columns), len(levels)), dtype=torch.float64, device=table.device)
    tile = launch_table.selection(n)
    whole = n <= tile.constants["BLOCK"]
    n_programs = out.numel()
    pairs = [(column, NO_FACTOR.value) if isinstance(column, int) else column for column in columns]
    assert fit_all or all(factor == NO_FACTOR.value for _, factor in pairs)
    packed = [sum(row << 8 * i for i, row in enumerate(rows)) for rows in zip(*pairs, strict=True)]
    keys = out if whole else torch.empty((n_programs, n), dtype=torch.int32, device=table.device)
    _quantiles_fwd_kernel[(n_programs,)](
        table, keys, out, n, table.stride(0), *packed, *(*map(float, levels), 1.0)[:3], LEVELS=len(levels),
        FIT_ALL=fit_all, WHOLE=whole, **tile.constants,
        num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
