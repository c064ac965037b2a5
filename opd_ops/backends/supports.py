# Exact top-K lists built block by block, and the statistics on them: support masses and the union KL.
#
#   C = sum_S q;  overlap = sum_{S∩T} q;  D = KL(q|U || p|U), U = S ∪ T, both renormalised on U    [nats]
#   Sources: arXiv 2605.26844 eqs. 9, 10, 17.  Order of a list: (logit descending, id ascending).
#
# Pruning: the K largest of a block lie in the K groups with the largest maxima (ties by lower group), so one maximum
# per group and K groups are all that is ranked, never the row.
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
        beyond = columns >= own.shape[1]
        readable = columns.clamp_max(own.shape[1] - 1)
        values = own.gather(1, readable).masked_fill_(beyond, -math.inf)
        best = _best(values, columns, k)
        columns = columns.gather(1, best)
        return Support(columns + first_id, values.gather(1, best), other.gather(1, columns))

    def rows(self, part: slice) -> Support:
        return Support(self.ids[part], self.own[part], self.other[part])

    def merge(self, other: Support, k: int) -> Support:
        """Top-k of two lists over different ids."""
        ids, own = torch.cat((self.ids, other.ids), 1), torch.cat((self.own, other.own), 1)
        best = _best(own, ids, min(k, ids.shape[1]))
        return Support(ids.gather(1, best), own.gather(1, best), torch.cat((self.other, other.other), 1).gather(1, best))


def _best(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """(n, k) places of the row's best, in the order (value descending, id ascending).

    An fp32 value and its id fit one int64 key, whose top-k has no ties left to break: some ten times the speed of a stable
    sort. fp64 takes the sort.
    """
    if values.dtype == torch.float32:
        bits = (values + 0.0).view(torch.int32).long()  # + 0.0: -0.0 equals 0.0
        ordered = bits ^ ((bits >> 63) & 0x7FFFFFFF)  # increasing in the value, negative ones too
        return torch.topk((ordered << 32) | (0x7FFFFFFF - ids), k, dim=1).indices
    by_id = torch.argsort(ids, dim=1)
    by_value = torch.sort(values.gather(1, by_id), dim=1, descending=True, stable=True).indices[:, :k]
    return by_id.gather(1, by_value)


def _candidates(x: Tensor, k: int) -> Tensor:
    """(n, k * G) columns of (n, B) that contain the row's top-k; those >= B are padding of the last group."""
    n, width = x.shape
    group = _group_size(width, k)
    whole = width // group * group
    maxima = x[:, :whole].view(n, -1, group).amax(-1) if group > 1 else x[:, :whole]
    if whole < width:
        maxima = torch.cat((maxima, x[:, whole:].amax(-1, keepdim=True)), 1)
    numbers = torch.arange(maxima.shape[1], device=x.device).expand_as(maxima)
    best = _best(maxima, numbers, k)
    return (best.unsqueeze(-1) * group + torch.arange(group, device=x.device)).flatten(1)


def _group_size(width: int, k: int) -> int:
    """G: a power of two, because maxima over 32 or 64 neighbours run five times as fast as over 22; near sqrt(B / k), which
    minimises B/G + k*G, what gets ranked. A narrow block is ranked whole."""
    best = math.isqrt(width // k)
    return 1 if best < 8 else max(32, 1 << (best.bit_length() - 1))


def ranked_per_row(width: int, k: int) -> int:
    """How many numbers `Support.of_block` ranks per row: what its scratch memory is proportional to."""
    group = _group_size(width, k)
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
