"""Exact top-K lists of two models, built block by block of the vocabulary: each model's best ids and both models' logits.

  Order of a list: (logit descending, id ascending).  Source of the supports S and T: arXiv 2605.26844 eq. 9.

Two ways to rank a block, with equal results:
  pruned   (CPU) ranks only newcomers: logits above the bar, the K-th logit of the list so far. After the first block newcomers
           are few. The maxima of groups of columns find them, so that most of a block is read once.
  ranked   ranks only the K groups with the largest maxima (ties by lower group): they contain the block's K largest logits.
           No host synchronisation; also used on a CPU where pruning does not pay. In a narrow block on a CPU a group is some
           columns at equal distances, whose maxima cost a seventh; where groups tie for the K-th place, all columns are ranked.

Not here: the oracle's plain full sort (backends/eager.py), the statistics on the supports (supports.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.inputs.chunks import parts
from opd_ops.inputs.order import best_places
from opd_ops.inputs.teacher_lists import LAST_ID

PRUNED_GROUP = 64  # columns; maxima over 64 cost little more than over 128, and half as much is read again (benchmarks/LOG.md)
NARROW_GROUP = 8  # columns of a group of a narrow block
# Limits of pruning, in multiples of K. Beyond them (ties, or logits that rise with the id) it does not pay and lacks memory.
MOST_GROUPS = 2  # groups read again per row, on average
MOST_NEWCOMERS = 2  # newcomers per row, on average
MOST_OF_ROW = 3  # newcomers of any one row


class TopKList(NamedTuple):
    """One model's top-K ids and both models' logits there, each (n, K), in the list's order; or those of both, (2 n, K)."""

    ids: Tensor  # int64
    own: Tensor  # logits of the list's model
    other: Tensor  # logits of the other model

    def rows(self, group: slice) -> TopKList:
        if (group.start, group.stop) == (0, len(self.ids)):
            return self
        return TopKList(self.ids[group], self.own[group], self.other[group])

    def halves(self) -> tuple[TopKList, TopKList]:
        """The student's list and the teacher's, from those of both."""
        n = len(self.ids) // 2
        return self.rows(slice(0, n)), self.rows(slice(n, 2 * n))

    def best(self, k: int) -> TopKList:
        """The min(k, width) best entries, in order; the entries of `self` may be in any order."""
        places = best_places(self.own, self.ids, min(k, self.ids.shape[1]))
        return TopKList(*(column.gather(1, places) for column in self))

    def merged(self, more: TopKList, k: int) -> TopKList:
        return TopKList(*(torch.cat(pair, 1) for pair in zip(self, more, strict=True))).best(k)


def extended(best: TopKList | None, x: Tensor, k: int, first_id: int, candidates: int) -> TopKList:
    """The lists of all columns so far, from `best`, those of earlier columns (None: no column yet), and the next block.

    Args:
        x: (2, n, B) contiguous logits of both models; (1, n, B): of one, whose `other` is itself.
        k: length of the list, or less as long as fewer columns were seen.
        first_id: id of the block's first column.
        candidates: how many logits may be ranked at a time; bounds the scratch memory.
    """
    if x.device.type == "cpu" and (best is None or best.ids.shape[1] == k):
        newcomers = _pruned(x, best, k, first_id, candidates)
        if newcomers is not None:
            return newcomers.best(k) if best is None else best.merged(newcomers, k)
    ranked = _ranked(x, min(k, x.shape[2]), first_id, candidates)
    return ranked if best is None else best.merged(ranked, k)


def _pruned(x: Tensor, best: TopKList | None, k: int, first_id: int, candidates: int) -> TopKList | None:
    """The newcomers of a block, padded by -inf to the most of any row; None if pruning does not pay.

    The bar is the K-th logit of `best`; a tie with it loses, because its id is higher. Without a list, the bar is just below
    the K-th largest group maximum: K columns reach it. NaN is above any bar: it must reach the statistics.
    """
    own = x.flatten(0, 1)
    n, width = own.shape
    grouped = width // PRUNED_GROUP * PRUNED_GROUP
    if best is None and grouped < k * PRUNED_GROUP:
        return None
    maxima = own[:, :grouped].unflatten(1, (-1, PRUNED_GROUP)).amax(2)
    if best is not None:
        bar = best.own[:, -1:]
    else:
        bar = torch.nextafter(maxima.topk(k, dim=1).values[:, -1:], maxima.new_tensor(-math.inf))
    row, group = _not_below(maxima, bar)
    if len(row) > MOST_GROUPS * n * k:
        return None

    # A place is row * width + column.
    first = row * width + group * PRUNED_GROUP
    groups_at_a_time = max(1, candidates // PRUNED_GROUP)
    places, room = [first.new_empty(0)], MOST_NEWCOMERS * n * k
    for part_first, part_row in zip(first.split(groups_at_a_time), row.split(groups_at_a_time), strict=True):
        places.append(_members_not_below(own, part_first, bar.index_select(0, part_row)) if len(part_first) else part_first)
        room -= len(places[-1])
        if room < 0:
            return None
    place = torch.cat(places)
    if grouped < width:
        row, column = _not_below(own[:, grouped:], bar)
        place = torch.cat((place, row * width + (column + grouped))).sort().values

    row = place.div(width, rounding_mode="floor")
    counts = torch.bincount(row, minlength=n)
    fewest, most = (int(x) for x in counts.aminmax())
    if most > MOST_OF_ROW * k or (best is None and fewest < k):
        return None
    before = counts.cumsum(0).sub_(counts)
    slot = torch.arange(len(row)).sub_(before.index_select(0, row)).add_(row, alpha=most)
    places_of_other = place if len(x) == 1 else (place + x[0].numel()).remainder_(x.numel())
    values = (x.view(-1).index_select(0, at) for at in (place, places_of_other))
    newcomers = (place - row * width + first_id, LAST_ID), *((x, -math.inf) for x in values)
    return TopKList(*(y.new_full((n * most,), padding).index_copy_(0, slot, y).view(n, most) for y, padding in newcomers))


def _not_below(x: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column numbers of the entries of (n, B) that are above the row's (n, 1) bar, or NaN."""
    row, column = torch.nonzero((x <= bar).logical_not_(), as_tuple=True)
    return row, column


def _members_not_below(own: Tensor, first: Tensor, bar: Tensor) -> Tensor:
    """Places of the logits above the (P, 1) bar, in the groups that begin at the (P,) places `first`."""
    # One row per start of 64 successive logits (rows overlap): reading a group is then one copy.
    runs = own.as_strided((own.numel() - PRUNED_GROUP + 1, PRUNED_GROUP), (1, 1))
    number, offset = _not_below(runs.index_select(0, first), bar)
    return first.index_select(0, number).add_(offset)


def _ranked(x: Tensor, k: int, first_id: int, candidates: int) -> TopKList:
    """The k best of a block, in order."""
    own = x.flatten(0, 1)
    size = max(1, candidates // ranked_per_row(own.shape[1], k))
    ranked = [_ranked_part(rows, k) for rows in parts(own, size, 0)]
    columns = ranked[0] if len(ranked) == 1 else torch.cat(ranked)
    at_own = columns.view(len(x), -1, k)
    other = x.gather(2, at_own.flip(0)).flip(0)  # the model of the other list at this list's columns
    return TopKList(columns + first_id if first_id else columns, own.gather(1, columns), other.view(-1, k))


def _ranked_part(own: Tensor, k: int) -> Tensor:
    """(n, k) columns of the k best of some rows of a block, in order."""
    if _group_size(own.shape[1], k) > 1:
        columns = _candidates(own, k)
        beyond = columns >= own.shape[1]
        values = own.gather(1, columns.clamp_max(own.shape[1] - 1)).masked_fill_(beyond, -math.inf)
    else:
        narrow = _narrow_candidates(own, k)
        if narrow is None:
            return best_places(own, torch.arange(own.shape[1], device=own.device), k)
        columns, values = narrow, own.gather(1, narrow)
    return columns.gather(1, best_places(values, columns, k))


def _narrow_candidates(x: Tensor, k: int) -> Tensor | None:
    """(n, G * k) column numbers that contain the row's top-k of a narrow (n, B); None where all columns are to be ranked."""
    width = x.shape[1] // NARROW_GROUP
    if x.device.type != "cpu" or x.shape[1] % NARROW_GROUP or width <= 2 * k:
        return None
    maxima, groups = x.view(len(x), NARROW_GROUP, width).amax(1).topk(k + 1, dim=1)
    if not bool((maxima[:, k - 1] > maxima[:, k]).all()):  # a tie, or NaN
        return None
    return (groups[:, :k].unsqueeze(1) + torch.arange(0, x.shape[1], width).unsqueeze(1)).flatten(1)


def _candidates(x: Tensor, k: int) -> Tensor:
    """(n, k * G) column numbers that contain the row's top-k of (n, B); numbers >= B are padding of the last group."""
    n, width = x.shape
    group = _group_size(width, k)
    grouped = width // group * group
    maxima = x[:, :grouped].view(n, -1, group).amax(-1)
    if grouped < width:
        maxima = torch.cat((maxima, x[:, grouped:].amax(-1, keepdim=True)), 1)
    best = best_places(maxima, torch.arange(maxima.shape[1], device=x.device), k)
    return (best.unsqueeze(-1) * group + torch.arange(group, device=x.device)).flatten(1)


def _group_size(width: int, k: int) -> int:
    """G, columns per group: near sqrt(B / k), which minimises B/G + k*G, the count of ranked numbers.

    A power of two: maxima over 32 or 64 neighbours run five times as fast as over 22. A narrow block is ranked whole (G = 1).
    """
    best = math.isqrt(width // k)
    return 1 if best < 8 else max(32, 1 << (best.bit_length() - 1))


def ranked_per_row(width: int, k: int) -> int:
    """How many numbers `_ranked` ranks per row; its scratch memory is proportional to this."""
    group = _group_size(width, k)
    return width // group + 1 + k * group
