"""From scores to selected positions: the budget, and the positions that fill it.

  n = min(count, N), or
  n = max(1, ceil(rho N))      scope "batch":    one budget for all N valid positions     arXiv 2605.26844 eq. 13
  n_i = max(1, ceil(rho N_i))  scope "sequence": one per sequence                         arXiv 2604.14084 eq. 8
  scope "global": one budget for the valid positions of all ranks. Scope "sequence" also works over ranks that hold parts of
  the same sequences. (Eq. 8 rounds down; rounding up drops no rollout.)
  Ties are positions with equal scores: the position with the smaller place wins, if `places` are given, then the lower rank,
  then the earlier position. Without a valid position none is selected.

Over ranks a search finds the n-th best score, and with `places` the largest selected place among its ties: no scores are
gathered. One all-gather then tells how many ties each rank holds in each sequence.
The CPU reads no number of a tensor on a GPU. It reads counts of tensors in its own memory: that saves operators.
Not here: scores (selectors.py), sequences of positions (inputs/sequences.py), the search (distributed/order_statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import TypedDict

import torch
from torch import Tensor

from opd_ops.arguments import may_look, number_in, traced_as_constant
from opd_ops.distributed.order_statistics import order_statistics
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.sequences import check_same_sequences

SHORTLIST = 2  # the budget times this: positions that are scored again exactly after a ranking in 8 bits


@dataclass(frozen=True)
class Budget:
    """How many of the valid positions of a scope are selected: a share, or a count, or all from a threshold on."""

    fraction: float
    count: int | None = None  # at most so many; None: the fraction
    threshold: Tensor | float | None = None  # select scores of at least this, without a budget

    def of(self, n_valid: Tensor) -> Tensor:
        """max(1, ceil(fraction n_valid)), and 0 where nothing is valid; or min(count, n_valid). Exact.

        0.1 * 30 is 3.0000000000000004 in floating point. So the fraction becomes a ratio of integers: the nearest ratio with a
        denominator of at most a million, as the user wrote it. The product is then of integers.
        """
        if self.count is not None:
            return n_valid.clamp_max(self.count)
        numerator, denominator = as_ratio(self.fraction)
        if not numerator:  # the fraction is below every such ratio
            return n_valid.clamp_max(1)
        return -((n_valid * -numerator) // denominator)

    def most(self, n: int) -> int:
        """The budget of n valid positions: the largest budget that n positions can have."""
        numerator, denominator = self.ratio
        return min(n, numerator if not denominator else max(1, -((-n * numerator) // denominator)))

    @property
    def ratio(self) -> tuple[int, int]:
        """Numerator and denominator of the fraction, as kernels take them: (count, 0) for a count."""
        return as_ratio(self.fraction) if self.count is None else (min(self.count, 2**31 - 1), 0)  # kernels count in int32

    def times(self, factor: int) -> Budget:
        """So many times the budget."""
        count = None if self.count is None else factor * self.count
        return replace(self, fraction=min(1.0, factor * self.fraction), count=count)


def as_ratio(fraction: float) -> tuple[int, int]:
    numerator_and_denominator: tuple[int, int] = _nearest_ratio(fraction)
    return numerator_and_denominator


@traced_as_constant
def _nearest_ratio(fraction: float) -> tuple[int, int]:
    return _searched_ratio(fraction)


@lru_cache(maxsize=64)
def _searched_ratio(fraction: float) -> tuple[int, int]:
    return Fraction(fraction).limit_denominator(1_000_000).as_integer_ratio()


class SelectionOptions(TypedDict):
    """Options of `select_positions` that a selector sets by its attributes (selectors.py)."""

    keep_one_per_sequence: bool
    keep_scores: Tensor | None
    places: Tensor | None
    both_ends: bool


def select(
    scores: Tensor,
    valid: Tensor,
    budget: Budget,
    ids: Tensor | None,
    *,
    keep_one_in: Tensor | None = None,
    keep_scores: Tensor | None = None,
    places: Tensor | None = None,
    both_ends: bool = False,
) -> Tensor:
    """Which of the flattened positions are selected, (N,) bool.

    Args:
        scores: (N,) scores, -inf where not valid; -inf and NaN are never selected, though valid positions count in the budget.
        valid: (N,) bool.
        ids: (N,) non-decreasing sequence numbers, for one budget per sequence; None: one budget in all.
        keep_one_in: (N,) sequence numbers: a sequence without a selected position gets its best position.
        keep_scores: (N,) scores that define this best position; -inf and NaN of `scores` still exclude. None: `scores`.
        places: (N,) int64: of equal scores the smaller place wins, then the earlier position; None: the earlier position.
        both_ends: Half of the budget, rounded up, takes the highest scores, the other half the lowest of the others.
    """
    keys = _keys(scores)
    if budget.threshold is None:
        n: Tensor | int
        if ids is None and may_look(valid):
            n = budget.most(int(number_in(valid.sum())))
        else:
            n = budget.of(valid.sum().view(1) if ids is None else _count(valid, ids))
        highest = (n + 1) // 2 if both_ends else n
        selected = _best(keys, highest, ids, places)
        if both_ends:
            selected = selected | _best(_low_keys(keys, selected), n - highest, ids, places)
    else:
        selected = _at_least(keys, budget.threshold)
    if keep_one_in is not None:
        has_one = _count(selected, keep_one_in) > 0
        if not (may_look(has_one) and number_in(has_one[keep_one_in].all())):
            selected = selected | _best(_keep_keys(keys, keep_scores), (~has_one).long(), keep_one_in, places)
    return selected


def select_over_ranks(
    scores: Tensor,
    valid: Tensor,
    budget: Budget,
    ranks: Ranks,
    sequences: tuple[Tensor, int] | None,
    *,
    keep_one_in: Tensor | None = None,
    keep_scores: Tensor | None = None,
    places: Tensor | None = None,
    both_ends: bool = False,
) -> Tensor:
    """`select` of the positions of all ranks, in rank order: which of this rank's flattened positions are selected, (N,) bool.

    Args:
        sequences: (N,) non-decreasing sequence numbers and their count, for one budget per sequence. Ranks may hold parts of a
            sequence. None: one budget in all, and no sequence is spread over ranks.
        keep_one_in: (N,) this rank's sequence numbers; if `sequences` is given, its numbers are used instead.
        keep_scores, places: As in `select`; places below 2**24, since the search takes them as fp32.
    Raises: ValueError, on every rank: ranks with different numbers of sequences.
    Collectives, with a budget:
        `sequences`: a gather of an int64, for which the CPU waits;
        a search with one target per sequence (distributed/order_statistics.py), and with `places` a second one, in fp32;
        a gather of (n_sequences,) int64. With `both_ends` the last two come twice.
    With a threshold: none, but for `keep_one_in` with `sequences`: all of the above and a sum of (n_sequences,) int64.
    """
    keys = _keys(scores)
    threshold = budget.threshold
    if sequences is not None and (threshold is None or keep_one_in is not None):
        check_same_sequences(sequences[1], ranks, keys.device)
    ids, n = (torch.zeros_like(valid, dtype=torch.long), 1) if sequences is None else sequences
    if threshold is None:

        def highest(count: Tensor) -> Tensor:
            return (budget.of(count) + 1) // 2 if both_ends else budget.of(count)

        selected = _best_over_ranks(keys, valid, highest, ids, n, ranks, places)
        if both_ends:
            lowest = _low_keys(keys, selected)
            selected = selected | _best_over_ranks(lowest, valid, lambda x: budget.of(x) // 2, ids, n, ranks, places)
    else:
        selected = _at_least(keys, threshold)
    if keep_one_in is None:
        return selected
    keep_keys = _keep_keys(keys, keep_scores)
    if sequences is None:
        return selected | _best(keep_keys, (_count(selected, keep_one_in) == 0).long(), keep_one_in, places)
    if threshold is not None:  # a budget is at least 1, so that it leaves no sequence with a score empty
        empty = (ranks.sum(_count(selected, ids, n)) == 0).long()
        best = _best_over_ranks(keep_keys, valid, lambda count: torch.minimum(count, empty), ids, n, ranks, places)
        selected = selected | best
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
    """(N,) bool: the largest keys of each of the n sequences over all ranks; `budgets` maps counts of keys to budgets."""
    order = order_statistics(keys, valid, lambda count: (count - budgets(count)).unsqueeze(1), 1, ranks, groups=ids, n_groups=n)
    least = order.values.squeeze(1)[ids]  # the least selected key
    ties, first_ties = valid & (keys == least), torch.zeros_like(valid)
    # In ascending order the ties begin at index `below`, the selected keys at index `places`.
    n_wanted = (order.below + order.equal - order.places).squeeze(1).clamp_min(0)  # ties to be selected
    if places is not None:
        last = (n_wanted - 1).clamp_min(0).unsqueeze(1)
        place_order = order_statistics(places.float(), ties, lambda _: last, 1, ranks, groups=ids, n_groups=n)
        largest_place = place_order.values.squeeze(1)[ids]  # of the selected ties
        first_ties = ties & (places < largest_place) & (n_wanted > 0)[ids]
        ties = ties & (places == largest_place)
        n_wanted = n_wanted - place_order.below.squeeze(1)
    n_own = _count(ties, ids, n)
    n_on_lower_ranks = ranks.gather(n_own)[: ranks.rank].sum(0)
    index = ties.cumsum(0) - 1 - (n_own.cumsum(0) - n_own)[ids]  # of a tie in its sequence on this rank: ids do not decrease
    selected = (keys > least) | first_ties | (ties & (index < (n_wanted - n_on_lower_ranks)[ids]))
    return valid & (keys > -math.inf) & selected


def _keys(scores: Tensor) -> Tensor:
    """The scores, -inf for NaN."""
    return scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _low_keys(keys: Tensor, selected: Tensor) -> Tensor:
    """Keys that rank the lowest first, without those selected."""
    return (-keys).masked_fill(selected | (keys == -math.inf), -math.inf)


def _keep_keys(keys: Tensor, keep_scores: Tensor | None) -> Tensor:
    return keys if keep_scores is None else _keys(keep_scores.to(keys.dtype)).masked_fill(keys == -math.inf, -math.inf)


def _at_least(keys: Tensor, threshold: Tensor | float) -> Tensor:
    return (keys >= threshold) & (keys > -math.inf)


def _count(flags: Tensor, ids: Tensor, n: int | None = None) -> Tensor:
    """(n,) the number of flags set in each of the n sequences; n None: N entries, for every possible sequence number."""
    n = max(1, len(flags)) if n is None else n
    return torch.zeros(n, dtype=torch.long, device=flags.device).index_add(0, ids, flags.long())


def _best(keys: Tensor, n: Tensor | int, ids: Tensor | None, places: Tensor | None) -> Tensor:
    """(N,) bool: the n[i] largest keys of each sequence i, no -inf. Among ties: smaller place, then earlier position.

    `ids`: None: all keys are one sequence, and n is (1,), or a number that the CPU knows.
    """
    if places is None:
        ordered, order = torch.sort(keys, descending=True, stable=True)
    else:
        by_place = torch.sort(places, stable=True).indices
        ordered, by_key = torch.sort(keys[by_place], descending=True, stable=True)
        order = by_place[by_key]
    if isinstance(n, int):
        best = order[:n]
        if n and number_in(ordered[n - 1]) == -math.inf:
            best = best[ordered[:n] > -math.inf]
        return torch.zeros_like(keys, dtype=torch.bool).index_fill_(0, best, True)
    index, wanted = torch.arange(len(keys), device=keys.device), n
    if ids is not None:
        by_sequence = torch.sort(ids[order], stable=True).indices
        ordered, order = ordered[by_sequence], order[by_sequence]  # by sequence, key, place, position
        size = _count(torch.ones_like(ids, dtype=torch.bool), ids)
        index, wanted = index - (size.cumsum(0) - size)[ids], n[ids]  # the index in the sequence: ids do not decrease
    selected = (index < wanted).logical_and_(ordered > -math.inf)
    return torch.empty_like(selected).index_copy_(0, order, selected)
