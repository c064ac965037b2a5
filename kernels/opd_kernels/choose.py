"""The budget's cut: which positions are selected, and the list of them.

  n = min(m, max(1, ceil(rho m))), or min(m, count)  of m valid positions, the best-scored; of equal scores the earlier one
  Source: arXiv 2605.26844 eq. 13, one budget for all; arXiv 2604.14084 eq. 8, one for each sequence (rounded up here).
  A score of -inf or NaN is never selected, though a valid position with it counts in m.

Shapes: N positions, G sequences, R rows of the list
  scores      (N,)      in   fp32
  valid       (N,)      in   uint8
  infinite    (N,)      in   uint8, only counted
  bounds      (G + 1,)  in   int64 or int32, where sequences begin, and N; None: sequences of `length` positions
  keys        (N,)      scratch, int32; only for programs of more positions than the block of the launch table
  selected    (N,)      out  uint8, 0 or 1
  rows        (R,)      out  int64: the selected positions in order, then others in order; entries beyond the last
                             selected position of sequences are not written
  counts      (3,)      out  int64: selected, valid, infinite

Grid: choose (1,) for one budget; for sequences (G + 1,), and then list (1,). Traffic: 6 bytes read a position and 1 written,
8 a row; keys as order.py says.
The host knows R beforehand (the largest budget) and learns the number of selected positions from `counts`.

Not here: scores (place.py), the search (order.py). Tests: tests/kernels/test_selection.py.
Specification: opd_ops/selection/budget.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import _order_key
from .order import ABSENT, LARGEST, _kth_largest
from .quantiles import _sizes

SCAN = 4096
COUNTS = ("selected", "valid", "infinite")


@triton.jit
def _score_keys(scores_ptr, valid_ptr, i, inside):
    # the keys of scores that may be selected, and whether a position is valid
    score = tl.load(scores_ptr + i, mask=inside, other=float("-inf"))
    valid = tl.load(valid_ptr + i, mask=inside, other=0) != 0
    return tl.where(valid & (score > float("-inf")), _order_key(score, 0), ABSENT), valid  # NaN compares false


@triton.jit(do_not_specialize=["N", "length", "numerator", "denominator", "n_rows"])
def _choose_fwd_kernel(
    scores_ptr, valid_ptr, infinite_ptr, bounds_ptr, keys_ptr, selected_ptr, rows_ptr, counts_ptr,
    N, length, numerator, denominator, n_rows,
    LISTS: tl.constexpr, HAS_BOUNDS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    begin = tl.cast(0, tl.int64)
    end = tl.cast(N, tl.int64)
    if HAS_BOUNDS:  # `length` counts sequences; the first takes what is before its bound, one more what is after the last
        begin = tl.where(pid == 0, 0, tl.load(bounds_ptr + pid).to(tl.int64))
        end = tl.where(pid == length, end, tl.load(bounds_ptr + pid + 1, mask=pid < length, other=0).to(tl.int64))
        begin = tl.minimum(tl.maximum(begin, 0), N)
        end = tl.minimum(tl.maximum(end, begin), N)
    elif not LISTS:
        begin = pid * length
        end = tl.minimum(begin + length, N)
    n = (end - begin).to(tl.int32)
    offset = tl.arange(0, BLOCK)
    keys = tl.full((BLOCK,), ABSENT, tl.int32)
    if WHOLE:
        keys, valid = _score_keys(scores_ptr, valid_ptr, begin + offset, offset < n)
        n_valid = tl.sum(valid.to(tl.int32))
        n_present, smallest, largest = _sizes(keys)
    else:
        n_valid, n_present, smallest, largest = 0, 0, LARGEST, ABSENT
        for first in range(0, n, BLOCK):
            inside = first + offset < n
            keys, valid = _score_keys(scores_ptr, valid_ptr, begin + first + offset, inside)
            tl.store(keys_ptr + begin + first + offset, keys, mask=inside)
            sizes = _sizes(keys)
            n_valid += tl.sum(valid.to(tl.int32))
            n_present, smallest, largest = n_present + sizes[0], tl.minimum(smallest, sizes[1]), tl.maximum(largest, sizes[2])
        tl.debug_barrier()  # other threads read these keys
    denominator = tl.cast(denominator, tl.int64)
    share = (tl.cast(n_valid, tl.int64) * numerator + denominator - 1) // tl.maximum(denominator, 1)
    wanted = tl.where(denominator == 0, tl.cast(numerator, tl.int64), share).to(tl.int32)
    wanted = tl.minimum(tl.minimum(tl.maximum(wanted, 1), n_valid), n_present)
    own_keys = keys_ptr if WHOLE else keys_ptr + begin
    key = _kth_largest(keys, own_keys, n, tl.maximum(wanted, 1), tl.minimum(smallest, largest), largest, WHOLE, BLOCK)
    if WHOLE:
        n_above = tl.sum((keys > key).to(tl.int32))
    else:
        n_above = 0
        for first in range(0, n, BLOCK):
            above = tl.load(own_keys + first + offset, mask=first + offset < n, other=ABSENT) > key
            n_above += tl.sum(above.to(tl.int32))
    missing = tl.where(wanted > 0, wanted - n_above, 0)  # ties to be selected
    n_earlier = 0  # selected ones before the block
    infinite = tl.zeros((SCAN,), tl.int32)
    lane = tl.arange(0, SCAN)  # fewer at a time: a scan takes more registers
    for first in range(0, n, SCAN):
        inside = first + lane < n
        score_keys = _score_keys(scores_ptr, valid_ptr, begin + first + lane, inside)[0]
        larger = (score_keys > key) & (wanted > 0)
        tie = (score_keys == key) & (score_keys != ABSENT)
        packed = larger.to(tl.int32) * 65536 + tie.to(tl.int32)  # two counts, 16 bits each
        counts = tl.cumsum(packed, 0)
        n_ties = counts & 0xFFFF
        taken = larger | (tie & (n_ties <= missing))
        n_taken = (counts >> 16) + tl.minimum(n_ties, missing)  # up to and with this position
        i = begin + first + lane
        tl.store(selected_ptr + i, taken.to(tl.uint8), mask=inside)
        if LISTS:
            n_taken += n_earlier
            place = tl.where(taken, n_taken - 1, wanted + (first + lane - n_taken))  # the others behind all taken ones
            tl.store(rows_ptr + place, i, mask=inside & (place < n_rows))
            infinite += tl.load(infinite_ptr + i, mask=inside, other=0).to(tl.int32)
        total = tl.sum(packed)
        n_new_ties = tl.minimum(total & 0xFFFF, missing)
        n_earlier += (total >> 16) + n_new_ties
        missing -= n_new_ties
    if LISTS:
        tl.store(counts_ptr, wanted.to(tl.int64))
        tl.store(counts_ptr + 1, n_valid.to(tl.int64))
        tl.store(counts_ptr + 2, tl.sum(infinite).to(tl.int64))


@triton.jit(do_not_specialize=["N", "n_rows"])
def _list_fwd_kernel(selected_ptr, valid_ptr, infinite_ptr, rows_ptr, counts_ptr, N, n_rows, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    n_selected, n_valid, n_infinite = 0, 0, 0
    for first in range(0, N, BLOCK):
        i = (first + offset).to(tl.int64)
        inside = i < N
        taken = tl.load(selected_ptr + i, mask=inside, other=0) != 0
        place = n_selected + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(rows_ptr + place, i, mask=taken & (place < n_rows))
        n_selected += tl.sum(taken.to(tl.int32))
        n_valid += tl.sum(tl.load(valid_ptr + i, mask=inside, other=0).to(tl.int32))
        n_infinite += tl.sum(tl.load(infinite_ptr + i, mask=inside, other=0).to(tl.int32))
    tl.store(counts_ptr, tl.cast(n_selected, tl.int64))
    tl.store(counts_ptr + 1, tl.cast(n_valid, tl.int64))
    tl.store(counts_ptr + 2, tl.cast(n_infinite, tl.int64))


class Choice(NamedTuple):
    selected: Tensor  # (N,) uint8
    rows: Tensor  # (R,) int64
    counts: Tensor  # (3,) int64, the order of COUNTS


def choose_fwd(
    scores: Tensor,  # (N,) fp32, contiguous
    valid: Tensor,  # (N,) uint8, contiguous
    infinite: Tensor,  # (N,) uint8, contiguous
    *,
    numerator: int,  # of the fraction, with `denominator`: below 2^20 both
    denominator: int,  # 0: `numerator` is the number to select
    n_rows: int,  # the length of the list
    length: int | None = None,  # one budget for each sequence of so many positions
    bounds: Tensor | None = None,  # one budget for each sequence between two of these bounds
) -> Choice:
    """The selected positions, by one budget, or one for each sequence."""
    n, device = scores.shape[0], scores.device
    selected = torch.empty(n, dtype=torch.uint8, device=device)
    rows = torch.empty(n_rows, dtype=torch.int64, device=device)
    counts = torch.empty(len(COUNTS), dtype=torch.int64, device=device)
    one_budget = length is None and bounds is None
    sequence_length = n if length is None else length
    n_programs = 1 if one_budget else bounds.shape[0] if bounds is not None else triton.cdiv(n, max(1, sequence_length))
    tile = launch_table.selection(sequence_length)
    whole = sequence_length <= tile.constants["BLOCK"]
    keys = counts if whole else torch.empty(n, dtype=torch.int32, device=device)
    if n_programs:
        _choose_fwd_kernel[(n_programs,)](
            scores, valid, infinite, bounds, keys, selected, rows, counts,
            n, sequence_length if bounds is None else n_programs - 1, numerator, denominator, n_rows,
            LISTS=one_budget, HAS_BOUNDS=bounds is not None, WHOLE=whole, **tile.constants,
            SCAN=min(SCAN, tile.constants["BLOCK"]), num_warps=tile.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    if not one_budget:
        tile = launch_table.selection(min(n, SCAN))
        _list_fwd_kernel[(1,)](
            selected, valid, infinite, rows, counts, n, n_rows, **tile.constants, num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return Choice(selected, rows, counts)
