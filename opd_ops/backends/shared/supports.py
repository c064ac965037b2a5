"""The statistics on the models' top-K supports: masses and the union KL.

  C = sum_S q;  overlap = sum_{S∩T} q;  D = KL(q|U || p|U), U = S ∪ T, both renormalised on U    [nats]
  Sources: arXiv 2605.26844 eqs. 9, 10, 17.

Not here: the top-K lists (top_k.py), full-vocabulary statistics (streamed/running.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.shared.grids import UNION_BYTES
from opd_ops.backends.shared.top_k import TopKList
from opd_ops.divergences.equations import LOG_ZERO, RELEASED_FLOOR, topk_entropy


def support_columns(student: TopKList, teacher: TopKList, lse: Tensor, columns: frozenset[str]) -> dict[str, Tensor]:
    """The support columns of `TokenStats`, (n,) fp64, from both lists and both models' (2, n) fp64 log-sum-exps."""
    k = student.ids.shape[1]
    # Both models (2, n, K + K') on S and then on T.
    logits = (
        torch.cat((student.own, teacher.other, student.other, teacher.own), 1).unflatten(1, (2, -1)).transpose(0, 1).double()
    )
    t_in_s = is_among(teacher.ids, student.ids)
    p = (logits - lse.unsqueeze(2)).exp_()
    masses = p[:, :, :k].sum(2)
    out = {
        "support_mass": masses[1],
        "student_support_mass": masses[0],
        "overlap_mass": p[1, :, k:].mul_(t_in_s).sum(1),
    }
    del p
    out |= list_columns(student, teacher, columns)
    logits[:, :, k:].masked_fill_(t_in_s, -math.inf)  # U: the entries of T that S has are left out
    return out | {"union_kl": _kl(torch.log_softmax(logits, 2))}


def list_columns(student: TopKList, teacher: TopKList, columns: frozenset[str]) -> dict[str, Tensor]:
    """Those of `stats.LIST_COLUMNS` that are in `columns`, (n,) fp64: they read each model's logits on its own list."""
    out = {}
    if columns & {"released_kl", "topk_entropy"}:
        log_p = torch.log_softmax(student.own.double(), 1)
        if "released_kl" in columns:
            out["released_kl"] = _released_kl(student.ids, log_p, teacher.ids, torch.log_softmax(teacher.own.double(), 1))
        if "topk_entropy" in columns:
            out["topk_entropy"] = topk_entropy(log_p)
    if "top1_agreement" in columns:
        out["top1_agreement"] = (student.ids[:, 0] == teacher.ids[:, 0]).double()
    if "teacher_rank" in columns:
        is_first = (student.ids[:, :1] == teacher.ids) & (teacher.own > -math.inf)
        rank = torch.where(is_first.any(1), is_first.long().argmax(1), teacher.ids.shape[1]) + 1
        out["teacher_rank"] = rank.double()
    return out


def _kl(log_p_and_q: Tensor) -> Tensor:
    """(n,) KL(q || p) of (2, n, K): `equations.kl` in fp64, where q > 0 unless its logarithm is below LOG_ZERO."""
    p, q = log_p_and_q.masked_fill(log_p_and_q[1] < LOG_ZERO, 0).unbind()  # zeros, because 0 * inf would be NaN
    return (q - p).mul_(log_p_and_q[1].exp()).sum(1).clamp_min_(0)


def _released_kl(s_ids: Tensor, log_p: Tensor, t_ids: Tensor, log_q: Tensor) -> Tensor:
    """(n,) KL of TA's released code, from each model's list renormalised alone: a missing id counts as `RELEASED_FLOOR`."""
    floor = math.log(RELEASED_FLOOR)
    (t_in_s, place), s_in_t = matches(t_ids, s_ids), is_among(s_ids, t_ids)
    log_p, log_q = log_p.clamp_min(floor), log_q.clamp_min(floor)
    log_p_at_t = log_p.gather(1, place).masked_fill_(~t_in_s, floor)
    only_s = ((floor - log_p) * RELEASED_FLOOR).masked_fill_(s_in_t, 0).sum(1)
    return (log_q.exp() * (log_q - log_p_at_t)).sum(1) + only_s


def is_among(ids: Tensor, among: Tensor) -> Tensor:
    """Whether each of the (n, K) ids is in its row of the (n, K') list `among`.

    By a table of all pairs, a byte each: where K' is larger than the other scratch of an id, by `matches`.
    """
    return (ids.unsqueeze(2) == among.unsqueeze(1)).any(2) if among.shape[1] <= UNION_BYTES else matches(ids, among)[0]


def matches(ids: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each of the (n, K) ids is in its row of the (n, K') list `among`, and its first place there (else any place).

    `among` is sorted, because a table of all pairs takes K K' numbers a row.
    """
    ascending, order = torch.sort(among, dim=1, stable=True)  # stable: the first of equal ids
    place = torch.searchsorted(ascending, ids.contiguous()).clamp_max_(among.shape[1] - 1)
    return ascending.gather(1, place) == ids, order.gather(1, place)
