# Exact top-K lists built block by block, and the statistics on them: support masses and the union KL.
#
#   C = sum_S q;  overlap = sum_{S∩T} q;  D = KL(q|U || p|U), U = S ∪ T, both renormalised on U    [nats]
#   Sources: arXiv 2605.26844 eqs. 9, 10, 17.  Order of a list: (logit descending, id ascending).
#
# Pruning: the K largest of a block lie in the K groups with the largest maxima (ties by lower group), so one maximum
# per group and K groups are all that is sorted, never the row.
# Not here: the oracle's plain full sort (eager.py), full-vocabulary statistics (running.py).
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.eager import RELEASED_FLOOR


class Support(NamedTuple):
    """One model's top-K ids with both models' logits there, each (n, K), in the list's order."""

    ids: Tensor  # int64
    own: Tensor
    other: Tensor

    @staticmethod
    def of_block(own: Tensor, other: Tensor, k: int, first_id: int, chunks: Sequence[slice]) -> Support:
        """Top min(k, B) of the (n, B) block `own`, whose columns are the ids from `first_id` on, a chunk of rows at a time."""
        found = [Support._of_chunk(own[chunk], other[chunk], k, first_id) for chunk in chunks]
        return Support(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @staticmethod
    def _of_chunk(own: Tensor, other: Tensor, k: int, first_id: int) -> Support:
        k = min(k, own.shape[1])
        columns = _candidates(own, k)
        inside = columns < own.shape[1]
        columns = columns.clamp_max(own.shape[1] - 1)
        values = own.gather(1, columns).masked_fill_(~inside, -math.inf)
        # Stable, and the candidates come in ascending id order, so equal logits keep the lower id first.
        order = torch.sort(values, dim=1, descending=True, stable=True).indices[:, :k]
        columns = columns.gather(1, order)
        return Support(columns + first_id, values.gather(1, order), other.gather(1, columns))

    def rows(self, part: slice) -> Support:
        return Support(self.ids[part], self.own[part], self.other[part])

    def merge(self, later: Support, k: int) -> Support:
        """Top-k of two lists; every id of `later` is larger than those here, so stability orders ties by id."""
        own = torch.cat((self.own, later.own), 1)
        order = torch.sort(own, dim=1, descending=True, stable=True).indices[:, :k]
        both = (torch.cat((a, b), 1).gather(1, order) for a, b in zip(self, later, strict=True))
        return Support(*both)


def _candidates(x: Tensor, k: int) -> Tensor:
    """(n, k * G) ascending columns of (n, B) that contain the row's top-k; those >= B are padding of the last group."""
    n, width = x.shape
    group = max(1, math.isqrt(width // k))  # minimises B/G + k*G, what gets sorted
    whole = width // group * group
    maxima = x[:, :whole].view(n, -1, group).amax(-1) if group > 1 else x[:, :whole]
    if whole < width:
        maxima = torch.cat((maxima, x[:, whole:].amax(-1, keepdim=True)), 1)
    best = torch.sort(maxima, dim=1, descending=True, stable=True).indices[:, :k]
    best = torch.sort(best, dim=1).values
    return (best.unsqueeze(-1) * group + torch.arange(group, device=x.device)).flatten(1)


def sorted_per_row(width: int, k: int) -> int:
    """How many numbers `Support.of_block` sorts per row: what its scratch memory is proportional to."""
    group = max(1, math.isqrt(width // k))
    return width // group + 1 + k * group


def support_columns(
    student: Support, teacher: Support, s_lse: Tensor, t_lse: Tensor, columns: frozenset[str]
) -> dict[str, Tensor]:
    """The support columns of `TokenStats`, (n,) fp64, from both lists and both (n,) fp64 log-sum-exps."""
    s_at_s, t_at_s = student.own.double(), student.other.double()
    t_at_t, s_at_t = teacher.own.double(), teacher.other.double()
    shared = student.ids.unsqueeze(2) == teacher.ids.unsqueeze(1)  # (n, K of S, K of T)
    s_in_t, t_in_s = shared.any(2), shared.any(1)
    q_at_s = torch.exp(t_at_s - t_lse.unsqueeze(1))

    # U as a list of 2K: S, then T without what S already has.
    p_logits = torch.cat((s_at_s, s_at_t.masked_fill(t_in_s, -math.inf)), 1)
    q_logits = torch.cat((t_at_s, t_at_t.masked_fill(t_in_s, -math.inf)), 1)
    out = {
        "support_mass": q_at_s.sum(1),
        "student_support_mass": torch.exp(s_at_s - s_lse.unsqueeze(1)).sum(1),
        "overlap_mass": torch.where(s_in_t, q_at_s, 0).sum(1),
        "union_kl": _kl(torch.log_softmax(q_logits, 1), torch.log_softmax(p_logits, 1)).clamp_min(0),
    }
    if "released_kl" in columns:
        floor = math.log(RELEASED_FLOOR)
        log_p = torch.log_softmax(s_at_s, 1).clamp_min(floor)  # on S
        log_q = torch.log_softmax(t_at_t, 1).clamp_min(floor)  # on T
        log_p_at_t = torch.where(shared, log_p.unsqueeze(2), floor).amax(1)
        only_s = torch.where(s_in_t, 0, RELEASED_FLOOR * (floor - log_p)).sum(1)
        out["released_kl"] = (log_q.exp() * (log_q - log_p_at_t)).sum(1) + only_s
    return out


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) over the last dimension; a = 0 contributes 0, b = 0 under a > 0 is +inf."""
    return torch.where(log_a == -math.inf, 0, log_a.exp() * (log_a - log_b)).sum(1)
