"""The column `ier`: signal over noise of the reverse-KL gradient, on the ids that both lists and the sampled token name.

  C = S ∪ T ∪ {y}; log p on S and at y, log q on T and at y; -12 where a list has no value; both renormalised on C
  c = log p - log q, between -30 and 30;  n = |C|;  b = sum_C (1 - p) c / (n - 1)
  ier = Var_p(c) / max(sum_C (1 - p) (c - b)^2 - Var_p(c), 1e-8)                            IER, arXiv 2609.24432
  b is the baseline of least variance: with L = 1/p - 1, sum_C (1 - p) (c - b)^2 = E_p[L (c - b)^2].

A score pass of both models' whole rows has both lists: `ier_of_lists`, on "triton" a kernel (opd_kernels/candidates.py).
Elsewhere each model whose list was not sent is swept once more: `ier`.
Not here: the fusion with another score (selection/selectors.py), the lists (two_lists.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.interface import Backend
from opd_ops.backends.shared.grids import UNION_BYTES
from opd_ops.backends.shared.supports import is_among, matches
from opd_ops.backends.shared.top_k import TopKList
from opd_ops.backends.shared.two_lists import list_of_student, list_of_teacher
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.selection.stats import SampledLogits, Scoring

FLOOR = -12.0  # log-probability of an id that a list does not have
LARGEST_RATIO = 30.0  # nats
LEAST_NOISE = 1e-8


def ier(
    backend: Backend,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    rollout: StudentStats | None,
    tokens: Tensor,
    logprobs: tuple[Tensor, Tensor],
    scoring: Scoring,
) -> Tensor:
    """(n,) column at the rows. `tokens`, `logprobs`: (n,) sampled ids, and both models' log-probabilities of them."""
    out = torch.empty_like(logprobs[0])
    top_k = scoring.top_k
    teacher = teacher.top(top_k) if isinstance(teacher, TeacherLists) else teacher.detach()
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))
    for part in chunks(max(1, len(rows)), scoring.workspace.share(1, 4).count(UNION_BYTES * top_k)):
        s = list_of_student(backend, student.detach(), rows[part], rollout, scoring, dtype)
        t = list_of_teacher(backend, teacher, rows[part], scoring, dtype)
        at_s, at_t = (x.logits.double() - x.logsumexp.double().unsqueeze(1) for x in (s, t))
        at_y = torch.stack([x[part] for x in logprobs]).double().unsqueeze(2)
        out[part] = on_candidates(s.ids, at_s, t.ids, at_t, tokens[part].unsqueeze(1), at_y).to(out.dtype)
    return out


def ier_of_lists(student: TopKList, teacher: TopKList, lse: Tensor, tokens: SampledLogits) -> Tensor:
    """(n,) fp64 column, from both lists and both models' (2, n) fp64 log-sum-exps."""
    at_s, at_t = (best.own.double() - total.unsqueeze(1) for best, total in zip((student, teacher), lse, strict=True))
    at_y = (tokens.logits.double() - lse).clamp_max_(0).unsqueeze(2)
    return on_candidates(student.ids, at_s, teacher.ids, at_t, tokens.tokens.unsqueeze(1), at_y)


def on_candidates(s_ids: Tensor, log_p: Tensor, t_ids: Tensor, log_q: Tensor, y: Tensor, at_y: Tensor) -> Tensor:
    """(n,) fp64 from log p on S (n, K), log q on T (n, K'), (n, 1) sampled ids and both models' (2, n, 1) values of them."""
    s_in_t, place = matches(s_ids, t_ids)
    q_at_s = log_q.gather(1, place).masked_fill_(~s_in_t, -math.inf)
    # Columns: S, T, y. A model knows the ids of its list, and y in every column.
    ids = torch.cat((s_ids, t_ids, y), 1)
    lists = torch.cat((log_p, torch.full_like(log_q, -math.inf)), 1), torch.cat((q_at_s, log_q), 1)
    values = torch.cat((torch.stack(lists), at_y), 2)
    is_y, is_known = ids == y, values > -math.inf
    values = torch.where(is_y & ~is_known, at_y, values).nan_to_num_(nan=FLOOR, neginf=FLOOR)
    is_repeated = torch.cat((torch.zeros_like(s_in_t), is_among(t_ids, s_ids), is_y[:, :-1].any(1, keepdim=True)), 1)
    is_left_out = is_repeated | ~(is_known.any(0) | is_y)
    log_p, log_q = values.masked_fill_(is_left_out, -math.inf).log_softmax(2).unbind()
    p = log_p.exp()
    c = (log_p - log_q).clamp_(-LARGEST_RATIO, LARGEST_RATIO).masked_fill_(is_left_out, 0)
    signal = (p * (c - (p * c).sum(1, keepdim=True)).square_()).sum(1)
    spread = (1 - p).masked_fill_(is_left_out, 0)
    n_others = ids.shape[1] - 1 - is_left_out.sum(1, keepdim=True)
    b = (spread * c).sum(1, keepdim=True) / n_others.clamp_min_(1)
    noise = (spread * (c - b).square_()).sum(1) - signal
    return signal / noise.clamp_min_(LEAST_NOISE)
