"""Both models on a divergence's list of ids and off it, from sweeps of the models, and the loss on them.

  student   its list and its log-sum-exp off it from one sweep (of a union or an intersection from two)
  teacher   its list and normaliser from one sweep; without its list the normaliser is known from the score pass: no sweep.
            Its mass off the list is 1 - q_A, q_A the mass on it; rows where this has too few digits are swept

Not here: which ids form a list (shared/list_ids.py), the loss and its gradient on a list (shared/list_losses.py), the logits'
gradient (loss.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.arguments import may_look
from opd_ops.backends.shared.list_ids import best_of_sent, list_ids, sent_logprobs, without_masked
from opd_ops.backends.shared.list_losses import Terms, evaluate
from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.backends.streamed.off_list import off_list_logsumexp, top_k_off_list
from opd_ops.backends.streamed.one_model import own_stats
from opd_ops.backends.streamed.reference import Reference
from opd_ops.divergences import SUPPORTS, OnSupport, Support
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import TeacherLists, tail
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import Scoring, TokenStats

# 1 - q_A is off by 1e-7 in fp32. Down to this log of it log q_t is off by 1e-4, which gradients may be (docs/numerics.md).
LEAST_DIFFERENCE = math.log(2**-10)


@torch.no_grad()
def support_terms(
    divergence: OnSupport,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    tokens: Tensor | None,
    stats: TokenStats,
    *,
    workspace: Workspace,
) -> Terms:
    """The terms of the rows. `tokens`: (M,), the student's sampled tokens, if the divergence reads them.

    `stats`: of the rows; `Reference` columns only if they have the digits that a loss needs.
    """
    student = student.detach()
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))
    listed = teacher.take(rows) if isinstance(teacher, TeacherLists) else None
    tokens = tokens if divergence.with_token else None
    s_ids = off_list = None
    if "student" in SUPPORTS[divergence.support]:
        s_ids, off_list = _student_list(divergence, student, rows, listed, tokens, workspace)
    if listed is not None:
        ids = list_ids(divergence, s_ids, listed.top(divergence.top_k).ids, tokens)
        log_q = sent_logprobs(listed, ids).double()
        log_tail, entropy = tail(log_q), torch.full_like(log_q[:, 0], math.nan)
    else:
        assert isinstance(teacher, Source)
        ids, log_q, log_tail, entropy = _swept(divergence, teacher.detach(), rows, s_ids, tokens, stats, workspace)
    x = logits_at(student, rows, ids, dtype, workspace)
    if not divergence.reads_off_list:
        off_list = x.new_zeros(len(rows))
    elif off_list is None:
        off_list = off_list_logsumexp(student, rows, ids, workspace=workspace)
    return evaluate(divergence, Support(x.double(), off_list, log_q, log_tail, entropy, stats.reverse_kl), ids, dtype)


def _student_list(
    divergence: OnSupport,
    student: Source,
    rows: Tensor,
    listed: TeacherLists | None,
    tokens: Tensor | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor | None]:
    """(M, K) ids of the student's list, and its log-sum-exp off list and token; None: not known, or not of this list."""
    k = divergence.top_k
    if listed is not None and listed.chosen_by_student:
        logits = logits_at(student, rows, listed.listed_ids, compute_dtype(student), workspace)
        return best_of_sent(listed.listed_ids, logits, k), None
    if student.transform.shard is not None:
        own = own_stats(student, rows, Scoring(k, workspace))
        return without_masked(own.ids, own.logits), None
    ids, logits, off_list = top_k_off_list(student, rows, tokens, top_k=k, workspace=workspace)
    return without_masked(ids, logits), off_list if divergence.support == "student" else None


def _swept(
    divergence: OnSupport,
    teacher: Source,
    rows: Tensor,
    s_ids: Tensor | None,
    tokens: Tensor | None,
    stats: TokenStats,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, log q there, log of the teacher's mass off the ids and its entropy, from the teacher's logits."""
    reference = None if stats.reference_teacher is None else Reference(*(x.double() for x in Reference.of(stats)))
    t_ids, entropy = None, stats.teacher_entropy.double()
    if reference is None or "teacher" in SUPPORTS[divergence.support]:
        own = own_stats(teacher, rows, Scoring(max(1, divergence.top_k), workspace))
        t_ids, logits = without_masked(own.ids, own.logits), own.logits
        lse, entropy = own.logsumexp.double(), own.entropy.double()
    ids = list_ids(divergence, s_ids, t_ids, tokens)
    if ids is not t_ids:
        logits = logits_at(teacher, rows, ids, compute_dtype(teacher), workspace)
        if reference is not None:  # relative to one of the row's logits: more digits
            lse = reference.teacher - (reference.log_p - reference.log_ratio)
    log_q, log_tail = logits.double() - lse.unsqueeze(1), torch.zeros_like(lse)
    if divergence.reads_teacher_off_list:
        log_tail = _log_tail(teacher, rows, ids, log_q, lse, workspace)
    return ids, log_q, log_tail, entropy


def _log_tail(teacher: Source, rows: Tensor, ids: Tensor, log_q: Tensor, lse: Tensor, workspace: Workspace) -> Tensor:
    """(M,) log of the teacher's mass off the ids: of 1 - q_A, and of a sum over a sweep where that has too few digits."""
    log_tail, swept = tail(log_q), torch.arange(len(rows), device=rows.device)
    if may_look(log_tail) and teacher.transform.shard is None:  # ranks sweep together
        swept = swept[~(log_tail > LEAST_DIFFERENCE)]  # NaN too
    if not len(swept):
        return log_tail
    off_list = off_list_logsumexp(teacher, rows[swept], ids[swept], workspace=workspace)
    return log_tail.index_copy(0, swept, off_list - lse[swept])
