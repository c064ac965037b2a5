"""Exact top-K lists of two models, built block by block of the vocabulary: each model's best ids, and both logits there.

  Order of a list: (logit descending, id ascending).  Source of the supports S and T: arXiv 2605.26844 eq. 9.

Two ways to take in a block, equal in what they find:
  pruned   (CPU) only logits that beat the K-th of the list so far are ranked, which after the first block are few; the
           maxima of groups of columns find them, so that most of a block is read once.
  ranked   the K groups of largest maxima contain the block's K largest (ties by lower group): only they are ranked.
           No look at the data from the host; also what is left where pruning does not pay.

Not here: the oracle's plain full sort (backends/eager.py), the statistics on the supports (supports.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.inputs.order import best_places
from opd_ops.inputs.teacher_lists import LAST_ID

PRUNED_GROUP = 64  # maxima over 64 neighbours cost little more than over 128 and find half as much to read again (LOG.md)
# Beyond these multiples of K a block is not worth pruning (ties, or logits that rise with the id), nor is there memory for it:
# groups to look into and newcomers found, per row on average; newcomers of any one row.
MOST_GROUPS, MOST_FOUND, MOST_OF_ROW = 2, 2, 3


class TopK(NamedTuple):
    """One model's top-K ids with both models' logits there, each (n, K), in the list's order."""

    ids: Tensor  # int64
    own: Tensor
    other: Tensor

    def rows(self, part: slice) -> TopK:
        return TopK(self.ids[part], self.own[part], self.other[part])

    def best(self, k: int) -> TopK:
        """The min(k, width) best in order, of entries in any order."""
        places = best_places(self.own, self.ids, min(k, self.ids.shape[1]))
        return TopK(*(column.gather(1, places) for column in self))

    def merged(self, more: TopK, k: int) -> TopK:
        return TopK(*(torch.cat(pair, 1) for pair in zip(self, more, strict=True))).best(k)


def extended(found: TopK | None, own: Tensor, other: Tensor, k: int, first_id: int, candidates: int) -> TopK:
    """The list of all columns so far: those of `found` (None: none) and of one more block, whose ids follow theirs.

    Args:
        own, other: (n, B) logits of the list's model and of the other one.
        k: length of the list, or less as long as fewer columns were seen.
        first_id: id of the block's first column.
        candidates: how many logits may be ranked at a time; bounds the scratch memory.
    """
    newcomers = None
    if own.device.type == "cpu" and (found is None or found.ids.shape[1] == k):
        newcomers = _pruned(own, other, found, k, first_id, candidates)
    if newcomers is None:
        newcomers = _ranked(own, other, min(k, own.shape[1]), first_id, candidates)
    return newcomers.best(k) if found is None else found.merged(newcomers, k)


def _pruned(own: Tensor, other: Tensor, found: TopK | None, k: int, first_id: int, candidates: int) -> TopK | None:
    """What of a block beats the K-th of `found`, (n, most of any row), padded by -inf; None if that is too much to pay.

    A tie with the K-th loses, because its id is higher. With nothing found yet, the bar is just below the K-th largest group
    maximum, which K columns reach. NaN counts as beating any bar: it must reach the statistics.
    """
    n, width = own.shape
    whole = width // PRUNED_GROUP * PRUNED_GROUP
    maxima = own[:, :whole].unflatten(1, (-1, PRUNED_GROUP)).amax(2)
    if found is not None:
        bar = found.own[:, -1:]
    elif maxima.shape[1] >= k:
        bar = torch.nextafter(maxima.topk(k, dim=1).values[:, -1:], maxima.new_tensor(-math.inf))
    else:
        return None
    row, group = _not_below(maxima, bar)
    if len(row) > MOST_GROUPS * n * k:
        return None

    # Places count through the block row by row.
    first = row * width + group * PRUNED_GROUP
    at_a_time = max(1, candidates // PRUNED_GROUP)
    places, room = [first.new_empty(0)], MOST_FOUND * n * k
    for of_first, of_row in zip(first.split(at_a_time), row.split(at_a_time), strict=True):
        places.append(_members_not_below(own, of_first, bar.index_select(0, of_row)) if len(of_first) else of_first)
        room -= len(places[-1])
        if room < 0:
            return None
    place = torch.cat(places)
    if whole < width:
        row, column = _not_below(own[:, whole:], bar)
        place = torch.cat((place, row * width + (column + whole))).sort().values

    row = place.div(width, rounding_mode="floor")
    counts = torch.bincount(row, minlength=n)
    fewest, most = (int(x) for x in counts.aminmax())
    if most > MOST_OF_ROW * k or (found is None and fewest < k):
        return None
    before = counts.cumsum(0).sub_(counts)
    slot = torch.arange(len(row)).sub_(before.index_select(0, row)).add_(row, alpha=most)
    values = (x.view(-1).index_select(0, place) for x in (own, other))
    newcomers = (place - row * width + first_id, LAST_ID), *((x, -math.inf) for x in values)
    return TopK(*(x.new_full((n * most,), padding).index_copy_(0, slot, x).view(n, most) for x, padding in newcomers))


def _not_below(x: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column numbers of (n, B) entries above the row's (n, 1) bar, or NaN."""
    row, column = torch.nonzero((x <= bar).logical_not_(), as_tuple=True)
    return row, column


def _members_not_below(own: Tensor, first: Tensor, bar: Tensor) -> Tensor:
    """Places of the logits above the (P, 1) bar in the groups that begin at the (P,) places `first`."""
    # Every run of 64 logits, overlapping ones too, as a row of its own: reading a group is then one copy.
    runs = own.as_strided((own.numel() - PRUNED_GROUP + 1, PRUNED_GROUP), (1, 1))
    number, offset = _not_below(runs.index_select(0, first), bar)
    return first.index_select(0, number).add_(offset)


def _ranked(own: Tensor, other: Tensor, k: int, first_id: int, candidates: int) -> TopK:
    """The k best of a block, (n, k)."""
    size = max(1, candidates // ranked_per_row(own.shape[1], k))
    parts = [_ranked_part(x, y, k) for x, y in zip(own.split(size), other.split(size), strict=True)]
    best = TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return best._replace(ids=best.ids + first_id)


def _ranked_part(own: Tensor, other: Tensor, k: int) -> TopK:
    columns = _candidates(own, k)
    beyond = columns >= own.shape[1]
    values = own.gather(1, columns.clamp_max(own.shape[1] - 1)).masked_fill_(beyond, -math.inf)
    best = best_places(values, columns, k)
    columns = columns.gather(1, best)
    return TopK(columns, values.gather(1, best), other.gather(1, columns))


def _candidates(x: Tensor, k: int) -> Tensor:
    """(n, k * G) columns of (n, B) that contain the row's top-k; those >= B are padding of the last group."""
    n, width = x.shape
    group = _group_size(width, k)
    whole = width // group * group
    maxima = x[:, :whole].view(n, -1, group).amax(-1) if group > 1 else x[:, :whole]
    if whole < width:
        maxima = torch.cat((maxima, x[:, whole:].amax(-1, keepdim=True)), 1)
    numbers = torch.arange(maxima.shape[1], device=x.device).expand_as(maxima)
    best = best_places(maxima, numbers, k)
    return (best.unsqueeze(-1) * group + torch.arange(group, device=x.device)).flatten(1)


def _group_size(width: int, k: int) -> int:
    """G: a power of two, because maxima over 32 or 64 neighbours run five times as fast as over 22; near sqrt(B / k), which
    minimises B/G + k*G, what gets ranked. A narrow block is ranked whole."""
    best = math.isqrt(width // k)
    return 1 if best < 8 else max(32, 1 << (best.bit_length() - 1))


def ranked_per_row(width: int, k: int) -> int:
    """How many numbers `_ranked` ranks per row: what its scratch memory is proportional to."""
    group = _group_size(width, k)
    return width // group + 1 + k * group
