"""The statistics on the models' top-K supports: masses and the union KL.

  C = sum_S q;  overlap = sum_{S∩T} q;  D = KL(q|U || p|U), U = S ∪ T, both renormalised on U    [nats]
  Sources: arXiv 2605.26844 eqs. 9, 10, 17.

Not here: the top-K lists (top_k.py), full-vocabulary statistics (streamed/running.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.shared.top_k import TopKList
from opd_ops.divergences.equations import RELEASED_FLOOR, kl, topk_entropy


def support_columns(
    student: TopKList, teacher: TopKList, s_lse: Tensor, t_lse: Tensor, columns: frozenset[str]
) -> dict[str, Tensor]:
    """The support columns of `TokenStats`, (n,) fp64, from both lists and both (n,) fp64 log-sum-exps."""
    s_at_s, t_at_s = student.own.double(), student.other.double()
    t_at_t, s_at_t = teacher.own.double(), teacher.other.double()
    s_in_t = matches(student.ids, teacher.ids)[0]
    t_in_s, place = matches(teacher.ids, student.ids)
    q_at_s = torch.exp(t_at_s - t_lse.unsqueeze(1))

    # U as a list of 2K entries: S, then T with the entries of S masked.
    p_logits = torch.cat((s_at_s, s_at_t.masked_fill(t_in_s, -math.inf)), 1)
    q_logits = torch.cat((t_at_s, t_at_t.masked_fill(t_in_s, -math.inf)), 1)
    out = {
        "support_mass": q_at_s.sum(1),
        "student_support_mass": torch.exp(s_at_s - s_lse.unsqueeze(1)).sum(1),
        "overlap_mass": torch.where(s_in_t, q_at_s, 0).sum(1),
        "union_kl": kl(torch.log_softmax(q_logits, 1), torch.log_softmax(p_logits, 1)).clamp_min(0),
    }
    if "released_kl" in columns:
        floor = math.log(RELEASED_FLOOR)
        log_p = torch.log_softmax(s_at_s, 1).clamp_min(floor)  # on S
        log_q = torch.log_softmax(t_at_t, 1).clamp_min(floor)  # on T
        log_p_at_t = torch.where(t_in_s, log_p.gather(1, place), floor)
        only_s = torch.where(s_in_t, 0, RELEASED_FLOOR * (floor - log_p)).sum(1)
        out["released_kl"] = (log_q.exp() * (log_q - log_p_at_t)).sum(1) + only_s
    if "topk_entropy" in columns:
        out["topk_entropy"] = topk_entropy(s_at_s)
    if "top1_agreement" in columns:
        out["top1_agreement"] = (student.ids[:, 0] == teacher.ids[:, 0]).double()
    if "teacher_rank" in columns:
        is_first = (student.ids[:, :1] == teacher.ids) & (t_at_t > -math.inf)
        rank = torch.where(is_first.any(1), is_first.long().argmax(1), teacher.ids.shape[1]) + 1
        out["teacher_rank"] = rank.double()
    return out


def matches(ids: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each of the (n, K) ids is in its row of the (n, K') list `among`, and its first place there (else any place).

    `among` is sorted, because a table of all pairs takes K K' numbers a row.
    """
    ascending, order = torch.sort(among, dim=1, stable=True)  # stable: the first of equal ids
    place = torch.searchsorted(ascending, ids.contiguous()).clamp_max(among.shape[1] - 1)
    return ascending.gather(1, place) == ids, order.gather(1, place)
