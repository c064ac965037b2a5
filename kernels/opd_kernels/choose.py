"""The budget's cut: which positions are selected, and the list of them.

  n = min(m, max(1, ceil(rho m))), or min(m, count)  of m valid positions, the best-scored; of equal scores the earlier one
  Source: arXiv 2605.26844 eq. 13, one budget for all; arXiv 2604.14084 eq. 8, one for each sequence (rounded up here).
  A score of -inf or NaN is never selected, though a valid position with it counts in m.
  places       of equal scores the smaller place wins, then the earlier position
  keep_scores  one budget for all; then a sequence without a selected position gets its best position by these scores

Shapes: N positions, G sequences, R rows of the list
  scores      (N,)      in   fp32
  valid       (N,)      in   uint8
  infinite    (N,)      in   uint8, only counted
  places      (N,)      in   int64, or None
  keep_scores (N,)      in   fp32, or None
  bounds      (G + 1,)  in   int64 or int32, where sequences begin, and N; None: sequences of `length` positions
  keys        (N,)      scratch, int32; only for programs of more positions than the block of the launch table
  selected    (N,)      out  uint8, 0 or 1
  rows        (R,)      out  int64: the selected positions in order, then others in order
  counts      (3,)      out  int64: selected, valid, infinite

Grid: choose (1,) for one budget, with places then list (1,); for sequences choose (G + 1,) and list (1,); with keep_scores
choose (1,), keep (G + 1,) and list (1,). Traffic: 6 bytes read a position and 1 written, 8 a row; 8 more read for places, 9
for keep_scores; keys as order.py says.
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
from .device import _order_key, check_launch
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


@triton.jit
def _span(pid, bounds_ptr, N, length, HAS_BOUNDS: tl.constexpr):
    # the positions of sequence `pid`; with bounds, `length` counts sequences
    if HAS_BOUNDS:  # the first takes what is before its bound, one more what is after the last
        begin = tl.where(pid == 0, 0, tl.load(bounds_ptr + pid).to(tl.int64))
        end = tl.load(bounds_ptr + pid + 1, mask=pid < length, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), N)
        end = tl.minimum(tl.maximum(tl.where(pid == length, N, end), begin), N)
    else:
        begin = pid * length
        end = tl.minimum(begin + length, N)
    return begin, end


@triton.jit
def _place_keys(keys, key, places_ptr, i, inside):
    # keys of the ties with `key`: the larger, the smaller their place
    tie = inside & (keys == key)
    place = tl.load(places_ptr + i, mask=tie, other=0).to(tl.int32)
    return tl.where(tie, -place, ABSENT)


@triton.jit(
    do_not_specialize=["N", "length", "numerator", "denominator", "n_rows"], do_not_specialize_on_alignment=["infinite_ptr"]
)
def _choose_fwd_kernel(
    scores_ptr, valid_ptr, infinite_ptr, places_ptr, bounds_ptr, keys_ptr, selected_ptr, rows_ptr, counts_ptr,
    N, length, numerator, denominator, n_rows,
    ONE_BUDGET: tl.constexpr, LISTS: tl.constexpr, HAS_PLACES: tl.constexpr, HAS_BOUNDS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    begin = tl.cast(0, tl.int64)
    end = tl.cast(N, tl.int64)
    if not ONE_BUDGET:
        begin, end = _span(tl.program_id(0).to(tl.int64), bounds_ptr, N, tl.cast(length, tl.int64), HAS_BOUNDS)
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
    last_place = 0
    if HAS_PLACES:  # the same among the ties, by place
        if WHOLE:
            keys = _place_keys(keys, key, places_ptr, begin + offset, offset < n)
            _, smallest, largest = _sizes(keys)
        else:
            smallest, largest = LARGEST, ABSENT
            tl.debug_barrier()  # other threads have read these keys
            for first in range(0, n, BLOCK):
                inside = first + offset < n
                keys = tl.load(own_keys + first + offset, mask=inside, other=ABSENT)
                keys = _place_keys(keys, key, places_ptr, begin + first + offset, inside)
                tl.store(own_keys + first + offset, keys, mask=inside)
                sizes = _sizes(keys)
                smallest, largest = tl.minimum(smallest, sizes[1]), tl.maximum(largest, sizes[2])
            tl.debug_barrier()
        low = tl.minimum(smallest, largest)
        last_place = -_kth_largest(keys, own_keys, n, tl.maximum(missing, 1), low, largest, WHOLE, BLOCK)
        if WHOLE:
            n_above = tl.sum((keys > -last_place).to(tl.int32))
        else:
            n_above = 0
            for first in range(0, n, BLOCK):
                above = tl.load(own_keys + first + offset, mask=first + offset < n, other=ABSENT) > -last_place
                n_above += tl.sum(above.to(tl.int32))
        missing = tl.where(wanted > 0, missing - n_above, 0)
    n_earlier = 0  # selected ones before the block
    infinite = tl.zeros((SCAN,), tl.int32)
    lane = tl.arange(0, SCAN)  # fewer at a time: a scan takes more registers
    for first in range(0, n, SCAN):
        inside = first + lane < n
        score_keys = _score_keys(scores_ptr, valid_ptr, begin + first + lane, inside)[0]
        larger = (score_keys > key) & (wanted > 0)
        tie = (score_keys == key) & (score_keys != ABSENT)
        if HAS_PLACES:
            place = tl.load(places_ptr + begin + first + lane, mask=tie, other=0).to(tl.int32)
            larger |= tie & (place < last_place) & (wanted > 0)
            tie &= place == last_place
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


@triton.jit(do_not_specialize=["N", "length"], do_not_specialize_on_alignment=["keep_scores_ptr"])
def _keep_fwd_kernel(
    scores_ptr, keep_scores_ptr, valid_ptr, bounds_ptr, selected_ptr, N, length,
    HAS_BOUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, end = _span(tl.program_id(0).to(tl.int64), bounds_ptr, N, tl.cast(length, tl.int64), HAS_BOUNDS)
    n_selected = tl.zeros((BLOCK,), tl.int32)
    best = tl.full((BLOCK,), ABSENT, tl.int32)
    place = tl.zeros((BLOCK,), tl.int64)
    n = (end - begin).to(tl.int32)
    for first in range(0, n, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        i, inside = begin + lane, lane < n
        n_selected += tl.load(selected_ptr + i, mask=inside, other=0).to(tl.int32)
        eligible = _score_keys(scores_ptr, valid_ptr, i, inside)[0] != ABSENT
        keep = tl.load(keep_scores_ptr + i, mask=eligible, other=float("-inf"))
        key = tl.where(keep > float("-inf"), _order_key(keep, 0), ABSENT)
        place = tl.where(key > best, i, place)
        best = tl.maximum(best, key)
    largest = tl.max(best)
    earliest = tl.min(tl.where(best == largest, place, N))
    tl.store(selected_ptr + earliest, 1, mask=(tl.sum(n_selected) == 0) & (largest != ABSENT))


@triton.jit(do_not_specialize=["N", "n_rows"], do_not_specialize_on_alignment=["infinite_ptr"])
def _list_fwd_kernel(selected_ptr, valid_ptr, infinite_ptr, rows_ptr, counts_ptr, N, n_rows, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    n_selected, n_valid, n_infinite = 0, 0, 0
    for first in range(0, N, BLOCK):
        i = (first + offset).to(tl.int64)
        inside = i < N
        n_selected += tl.sum(tl.load(selected_ptr + i, mask=inside, other=0).to(tl.int32))
        n_valid += tl.sum(tl.load(valid_ptr + i, mask=inside, other=0).to(tl.int32))
        n_infinite += tl.sum(tl.load(infinite_ptr + i, mask=inside, other=0).to(tl.int32))
    n_earlier = 0  # selected ones before the block
    for first in range(0, N, BLOCK):
        i = (first + offset).to(tl.int64)
        inside = i < N
        taken = tl.load(selected_ptr + i, mask=inside, other=0) != 0
        n_taken = n_earlier + tl.cumsum(taken.to(tl.int32), 0)
        place = tl.where(taken, n_taken - 1, n_selected + (first + offset - n_taken))  # the others behind all taken ones
        tl.store(rows_ptr + place, i, mask=inside & (place < n_rows))
        n_earlier += tl.sum(taken.to(tl.int32))
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
    n_rows: int,  # the length of the list, at most N
    length: int | None = None,  # sequences of so many positions, each with a budget
    bounds: Tensor | None = None,  # sequences between two of these bounds, each with a budget
    places: Tensor | None = None,  # (N,) int64, contiguous: of equal scores the smaller place wins; with one budget
    keep_scores: Tensor | None = None,  # (N,) fp32, contiguous: one budget for all; each sequence keeps its best by these
) -> Choice:
    """The selected positions, by one budget, or one for each sequence."""
    check_launch(scores, scores=scores, valid=valid, infinite=infinite, bounds=bounds, places=places, keep_scores=keep_scores)
    n, device = scores.shape[0], scores.device
    selected = torch.empty(n, dtype=torch.uint8, device=device)
    rows = torch.empty(n_rows, dtype=torch.int64, device=device)
    counts = torch.empty(len(COUNTS), dtype=torch.int64, device=device)
    one_budget = (length is None and bounds is None) or keep_scores is not None
    lists = one_budget and keep_scores is None and places is None  # with places, a list in the same kernel would spill
    assert places is None or one_budget
    longest = n if length is None else length
    n_sequences = triton.cdiv(n, max(1, longest)) if bounds is None else bounds.shape[0]
    per_sequence = longest if bounds is None else n_sequences - 1  # a kernel's `length`
    n_together = n if one_budget else longest  # positions that one program cuts
    tile = launch_table.selection(n_together)
    whole = n_together <= tile.constants["BLOCK"]
    keys = counts if whole else torch.empty(n, dtype=torch.int32, device=device)
    n_programs = 1 if one_budget else n_sequences
    if n_programs:
        _choose_fwd_kernel[(n_programs,)](
            scores, valid, infinite, places, bounds, keys, selected, rows, counts,
            n, per_sequence, numerator, denominator, n_rows,
            ONE_BUDGET=one_budget, LISTS=lists, HAS_PLACES=places is not None, HAS_BOUNDS=bounds is not None,
            WHOLE=whole, **tile.constants, SCAN=min(SCAN, tile.constants["BLOCK"]), num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    if keep_scores is not None and n_sequences:
        tile = launch_table.place()
        _keep_fwd_kernel[(n_sequences,)](
            scores, keep_scores, valid, bounds, selected, n, per_sequence, HAS_BOUNDS=bounds is not None, **tile.constants,
            num_warps=tile.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    if not lists:
        tile = launch_table.selection(min(n, SCAN))
        _list_fwd_kernel[(1,)](
            selected, valid, infinite, rows, counts, n, n_rows, **tile.constants, num_warps=tile.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return Choice(selected, rows, counts)
