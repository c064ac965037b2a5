"""Scores to a set of positions: the budget, and which positions fill it.

  n = max(1, ceil(rho N))      scope "batch":    one budget for all N valid positions     arXiv 2605.26844 eq. 13
  n_i = max(1, ceil(rho N_i))  scope "sequence": one per sequence                         arXiv 2604.14084 eq. 8
  scope "global": one for the valid positions of all ranks; and "sequence" over ranks that hold parts of the same sequences
  (eq. 8 rounds down; rounding up drops no rollout.) Ties go to the earlier position, of the lower rank first; with `places`
  first to the smaller place. No valid position, none kept.

Over ranks the n-th best score is found without gathering scores, and the largest place among its ties that is kept likewise;
one count of what ties then is gathered a rank and sequence.
Everything stays on the device: no count is read on the host.
Not here: the scores (selectors.py), which positions are a sequence (inputs/sequences.py), the n-th best over ranks
(distributed/order_statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TypedDict

import torch
from torch import Tensor

from opd_ops.distributed.order_statistics import order_statistics
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.sequences import check_same_sequences

SHORTLIST = 2  # positions that are scored again exactly after a ranking in 8 bits, in multiples of the budget


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


class SelectionOptions(TypedDict):
    """What a selector asks of `select_positions` beside its scores; selectors.py lists the attributes that say so."""

    keep_one_per_sequence: bool
    keep_scores: Tensor | None
    places: Tensor | None


def select(
    scores: Tensor,
    valid: Tensor,
    fraction: float,
    ids: Tensor | None,
    *,
    keep_one_in: Tensor | None = None,
    keep_scores: Tensor | None = None,
    places: Tensor | None = None,
    threshold: Tensor | float | None = None,
) -> Tensor:
    """Which of the flattened positions are kept, (N,) bool.

    Args:
        scores: (N,) scores; -inf and NaN are never kept, though their positions count in the budget.
        valid: (N,) bool.
        ids: (N,) non-decreasing sequence numbers for one budget each, or None for one budget in all.
        keep_one_in: (N,) sequence numbers: the best position of each sequence that the budget left empty is added.
        keep_scores: (N,) what is best there, of the positions that `scores` does not rule out; None: `scores`.
        places: (N,) int64: equal scores go to the smaller of them, then to the earlier position; None: to that at once.
        threshold: the least score that is kept, in the place of a budget.
    """
    keys = _keys(scores, valid)
    ids = torch.zeros_like(valid, dtype=torch.long) if ids is None else ids
    if threshold is None:
        selected = _best(keys, budget(_count(valid, ids), fraction), ids, places)
    else:
        selected = _at_least(keys, threshold)
    if keep_one_in is not None:
        empty = _count(selected, keep_one_in) == 0
        selected = selected | _best(_keep_keys(keys, keep_scores), empty.long(), keep_one_in, places)
    return selected


def select_over_ranks(
    scores: Tensor,
    valid: Tensor,
    fraction: float,
    ranks: Ranks,
    sequences: tuple[Tensor, int] | None,
    *,
    keep_one_in: Tensor | None = None,
    keep_scores: Tensor | None = None,
    places: Tensor | None = None,
    threshold: Tensor | float | None = None,
) -> Tensor:
    """`select` of what all ranks hold, in their order: which of this rank's flattened positions are kept, (N,) bool.

    Args:
        sequences: (N,) non-decreasing numbers and how many there are, with parts of each sequence on any rank, for one budget
            each; None: one budget in all, and sequences are whole on their rank.
        keep_one_in: (N,) this rank's own sequence numbers; with `sequences` not None those are looked at instead.
        keep_scores, places: as of `select`; places below 2**24, as a search takes them as fp32.
    Raises: ValueError, on every rank: ranks with different numbers of sequences.
    Collectives: a search with one target a sequence (distributed/order_statistics.py), with `places` a second one, in fp32,
    and a gather of
        (n_sequences,) int64; none with a threshold, but for `keep_one_in` with `sequences`: then a sum of (n_sequences,) int64
        and all of these. Before a search of `sequences` one gather of an int64, which the host waits for.
    """
    keys = _keys(scores, valid)
    if sequences is not None and (threshold is None or keep_one_in is not None):
        check_same_sequences(sequences[1], ranks, keys.device)
    ids, n = (torch.zeros_like(valid, dtype=torch.long), 1) if sequences is None else sequences
    if threshold is None:
        selected = _best_over_ranks(keys, valid, lambda count: budget(count, fraction), ids, n, ranks, places)
    else:
        selected = _at_least(keys, threshold)
    if keep_one_in is None:
        return selected
    keep_keys = _keep_keys(keys, keep_scores)
    if sequences is None:
        return selected | _best(keep_keys, (_count(selected, keep_one_in) == 0).long(), keep_one_in, places)
    if threshold is not None:  # a budget is at least 1: it leaves no sequence empty that has a score
        empty = (ranks.sum(_count(selected, ids, n)) == 0).long()
        one = _best_over_ranks(keep_keys, valid, lambda count: torch.minimum(count, empty), ids, n, ranks, places)
        selected = selected | one
    return selected


def _best_over_ranks(
    keys: Tensor,
    valid: Tensor,
    budgets: Callable[[Tensor], Tensor],
    ids: Tensor,
    n: int,
    ranks: Ranks,
    places: Tensor | None,
) -> Tensor:
    """The largest keys of each of the n sequences over all ranks, as many as `budgets` makes of their counts."""
    found = order_statistics(keys, valid, lambda count: (count - budgets(count)).unsqueeze(1), 1, ranks, groups=ids, n_groups=n)
    least = found.values.squeeze(1)[ids]
    ties, before = valid & (keys == least), torch.zeros_like(valid)  # what comes before all ties, though it equals them
    # In ascending order what equals the least kept one begins at `below`, and what is kept at `places`.
    wanted = (found.below + found.equal - found.places).squeeze(1).clamp_min(0)
    if places is not None:
        last = (wanted - 1).clamp_min(0).unsqueeze(1)
        among = order_statistics(places.float(), ties, lambda _: last, 1, ranks, groups=ids, n_groups=n)
        latest = among.values.squeeze(1)[ids]
        before = ties & (places < latest) & (wanted > 0)[ids]
        ties = ties & (places == latest)
        wanted = wanted - among.below.squeeze(1)
    own = _count(ties, ids, n)
    earlier = ranks.gather(own)[: ranks.rank].sum(0)
    place = ties.cumsum(0) - 1 - (own.cumsum(0) - own)[ids]  # ids do not decrease
    kept = (keys > least) | before | (ties & (place < (wanted - earlier)[ids]))
    return valid & (keys > -math.inf) & kept


def _keys(scores: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid & ~scores.isnan(), scores, -math.inf)


def _keep_keys(keys: Tensor, keep_scores: Tensor | None) -> Tensor:
    return keys if keep_scores is None else _keys(keep_scores.to(keys.dtype), keys > -math.inf)


def _at_least(keys: Tensor, threshold: Tensor | float) -> Tensor:
    return (keys >= threshold) & (keys > -math.inf)


def _count(flags: Tensor, ids: Tensor, n: int | None = None) -> Tensor:
    """How many flags each of the n sequences has, (n,); None: (N,), one entry per possible sequence number."""
    n = max(1, len(flags)) if n is None else n
    return torch.zeros(n, dtype=torch.long, device=flags.device).index_add(0, ids, flags.long())


def _best(keys: Tensor, n: Tensor, ids: Tensor, places: Tensor | None) -> Tensor:
    """The n[i] largest keys of each sequence i, smaller place and then earlier position first among equals; -inf never."""
    if places is None:
        order = torch.sort(keys, descending=True, stable=True).indices
    else:
        order = torch.sort(places, stable=True).indices
        order = order[torch.sort(keys[order], descending=True, stable=True).indices]
    order = order[torch.sort(ids[order], stable=True).indices]  # by sequence, then by key, then by place and position
    size = _count(torch.ones_like(ids, dtype=torch.bool), ids)
    start = size.cumsum(0) - size
    rank = torch.arange(len(ids), device=ids.device) - start[ids]  # ids are sorted, so this is the rank within
    kept = torch.zeros_like(keys, dtype=torch.bool).index_copy(0, order, rank < n[ids])
    return kept & (keys > -math.inf)
