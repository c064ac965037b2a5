"""The column `ier`: signal over noise of the reverse-KL gradient, on the ids that both lists and the sampled token name.

  C = S ∪ T ∪ {y}; log p on S and at y, log q on T and at y; -12 where a list has no value; both renormalised on C
  c = log p - log q, between -30 and 30;  n = |C|;  b = sum_C (1 - p) c / (n - 1)
  ier = Var_p(c) / max(sum_C (1 - p) (c - b)^2 - Var_p(c), 1e-8)                            IER, arXiv 2609.24432
  b is the baseline of least variance: with L = 1/p - 1, sum_C (1 - p) (c - b)^2 = E_p[L (c - b)^2].

The score pass keeps no lists, so each model that is read here is swept once more. Backend "triton" makes the column in its
score pass, on one process and from both models' logits (opd_kernels/candidates.py).
Not here: the fusion with another score (selection/selectors.py), the lists (two_lists.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.interface import Backend
from opd_ops.backends.shared.grids import UNION_BYTES
from opd_ops.backends.shared.supports import matches
from opd_ops.backends.shared.two_lists import list_of_student, list_of_teacher
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.selection.stats import Scoring

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
        at_y = [x[part].double().unsqueeze(1) for x in logprobs]
        out[part] = on_candidates(s.ids, at_s, t.ids, at_t, tokens[part].unsqueeze(1), at_y).to(out.dtype)
    return out


def on_candidates(s_ids: Tensor, log_p: Tensor, t_ids: Tensor, log_q: Tensor, y: Tensor, at_y: list[Tensor]) -> Tensor:
    """(n,) fp64 from log p on S (n, K), log q on T (n, K'), and (n, 1) sampled ids with their [log p, log q]."""
    s_in_t, place = matches(s_ids, t_ids)
    t_in_s = matches(t_ids, s_ids)[0]
    q_at_s = torch.where(s_in_t, log_q.gather(1, place), -math.inf)
    p_at_t = torch.full_like(log_q, -math.inf)
    # Columns: S, T without S, y where it is in neither. The token's values are known in every column.
    p_at_t, q_at_s = torch.where(t_ids == y, at_y[0], p_at_t), torch.where((s_ids == y) & ~s_in_t, at_y[1], q_at_s)
    log_p = torch.cat((log_p, p_at_t, at_y[0]), 1)
    log_q = torch.cat((q_at_s, log_q, at_y[1]), 1)
    is_y = torch.cat((s_ids == y, t_ids == y, torch.ones_like(y, dtype=torch.bool)), 1)
    is_repeated = torch.cat((torch.zeros_like(s_in_t), t_in_s, (is_y[:, :-1]).any(1, keepdim=True)), 1)
    known_p, known_q = log_p > -math.inf, log_q > -math.inf
    is_candidate = (known_p | known_q | is_y) & ~is_repeated
    log_p, log_q = (
        torch.where(known, x, FLOOR).masked_fill(~is_candidate, -math.inf) for x, known in ((log_p, known_p), (log_q, known_q))
    )
    log_p, log_q = log_p.log_softmax(1), log_q.log_softmax(1)
    p = log_p.exp()
    c = (log_p - log_q).clamp(-LARGEST_RATIO, LARGEST_RATIO).masked_fill(~is_candidate, 0)
    signal = (p * (c - (p * c).sum(1, keepdim=True)).square()).sum(1)
    spread = (1 - p).masked_fill(~is_candidate, 0)
    n = is_candidate.sum(1, keepdim=True)
    b = (spread * c).sum(1, keepdim=True) / (n - 1).clamp_min(1)
    noise = (spread * (c - b).square()).sum(1) - signal
    return signal / noise.clamp_min(LEAST_NOISE)
