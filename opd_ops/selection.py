# Scores to a set of positions: the budget, and which positions fill it.
#
#   n = max(1, ceil(rho N))      scope "batch":    one budget for all N valid positions     arXiv 2605.26844 eq. 13
#   n_i = max(1, ceil(rho N_i))  scope "sequence": one per sequence                         arXiv 2604.14084 eq. 8
#   (eq. 8 rounds down; rounding up drops no rollout.) Ties go to the earlier position; no valid position, none kept.
#
# Everything stays on the device: no count is read on the host.
# Not here: the scores (selectors.py).
from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

SHORTLIST = 2  # positions that are scored again exactly after a ranking in 8 bits, in multiples of the budget


def sequence_ids(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(numel,) non-decreasing sequence number of each flattened position.

    One sequence per row of the last dimension, or, for packed rows, the spans between the entries of `cu_seqlens`.
    """
    places = torch.arange(shape.numel(), device=device)
    if cu_seqlens is not None:
        spans = torch.bucketize(places, cu_seqlens[1:].to(device=device, dtype=torch.long), right=True)
        # Empty spans leave no gap in the numbers, so that no number exceeds the count of positions.
        return torch.cat((spans[:1] * 0, (spans[1:] != spans[:-1]).cumsum(0)))
    return places.div(max(1, shape[-1] if len(shape) else 1), rounding_mode="floor")


def budget(n_valid: Tensor, fraction: float) -> Tensor:
    """max(1, ceil(fraction * n_valid)), and 0 where nothing is valid; exact.

    0.1 * 30 is 3.0000000000000004 in floating point. So the fraction is read as the ratio the user wrote, the simplest one
    that is within a millionth, and the product is of integers.
    """
    numerator, denominator = _ratio(fraction)
    n = -((-n_valid * numerator) // denominator)
    return torch.minimum(n.clamp_min(1), n_valid)


def most_selected(n: int, fraction: float) -> int:
    """The budget of n positions in one sequence if all are valid: as many as can be selected."""
    numerator, denominator = _ratio(fraction)
    return min(n, max(1, -((-n * numerator) // denominator)))


def _ratio(fraction: float) -> tuple[int, int]:
    found: tuple[int, int] = _simplest(fraction)
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _simplest(fraction: float) -> tuple[int, int]:
    return Fraction(fraction).limit_denominator(1_000_000).as_integer_ratio()


def select(
    scores: Tensor,
    valid: Tensor,
    fraction: float,
    ids: Tensor | None,
    *,
    keep_one_in: Tensor | None = None,
    threshold: Tensor | float | None = None,
) -> Tensor:
    """Which of the flattened positions are kept, (N,) bool.

    Args:
        scores: (N,) scores; -inf and NaN are never kept, though their positions count in the budget.
        valid: (N,) bool.
        ids: (N,) non-decreasing sequence numbers for one budget each, or None for one budget in all.
        keep_one_in: (N,) sequence numbers: the best position of each sequence that the budget left empty is added.
        threshold: the least score that is kept, in the place of a budget.
    """
    keys = torch.where(valid & ~scores.isnan(), scores, -math.inf)
    ids = torch.zeros_like(valid, dtype=torch.long) if ids is None else ids
    if threshold is None:
        selected = _best(keys, budget(_count(valid, ids), fraction), ids)
    else:
        selected = (keys >= threshold) & (keys > -math.inf)
    if keep_one_in is not None:
        empty = _count(selected, keep_one_in) == 0
        selected = selected | _best(keys, empty.long(), keep_one_in)
    return selected


def _count(flags: Tensor, ids: Tensor) -> Tensor:
    """How many flags each sequence has, (N,), one entry per possible sequence number."""
    return torch.zeros(max(1, len(flags)), dtype=torch.long, device=flags.device).index_add(0, ids, flags.long())


def _best(keys: Tensor, n: Tensor, ids: Tensor) -> Tensor:
    """The n[i] largest keys of each sequence i, earlier first among equals; -inf never."""
    order = torch.sort(keys, descending=True, stable=True).indices
    order = order[torch.sort(ids[order], stable=True).indices]  # by sequence, then by key, then by position
    size = _count(torch.ones_like(ids, dtype=torch.bool), ids)
    start = size.cumsum(0) - size
    rank = torch.arange(len(ids), device=ids.device) - start[ids]  # ids are sorted, so this is the rank within
    kept = torch.zeros_like(keys, dtype=torch.bool).index_copy(0, order, rank < n[ids])
    return kept & (keys > -math.inf)
