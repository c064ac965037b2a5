"""Both models on a divergence's list of ids and off it, by sweeps of one model at a time, and the loss there.

Not here: the loss and its gradient on a list (shared/list_losses.py), the logits' gradient (loss.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.shared.list_losses import Terms, evaluate
from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.backends.streamed.off_list import off_list_logsumexp
from opd_ops.backends.streamed.one_model import own_stats
from opd_ops.divergences import OnSupport, Support
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists, tail
from opd_ops.inputs.workspace import Workspace


@torch.no_grad()
def support_terms(
    part: OnSupport,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    tokens: Tensor | None,
    *,
    workspace: Workspace,
) -> Terms:
    """The terms of the rows; `tokens` (M,) are what the student sampled there, if the divergence is on them."""
    student = student.detach()
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))
    if isinstance(teacher, TeacherLists):
        ids, log_q, log_tail = _listed(part, teacher.take(rows))
        entropy = torch.full_like(log_tail, math.nan)
    else:
        ids, log_q, log_tail, entropy = _swept(part, teacher.detach(), rows, tokens, workspace)
    x = logits_at(student, rows, ids, dtype, workspace)
    beside = off_list_logsumexp(student, rows, ids, workspace=workspace) if part.reads_rest else x.new_zeros(len(rows))
    return evaluate(part, Support(x.double(), beside, log_q, log_tail, entropy), ids, dtype)


def _listed(part: OnSupport, teacher: TeacherLists) -> tuple[Tensor, Tensor, Tensor]:
    found = teacher.top(part.length)
    log_q = found.logprobs.double()
    return found.ids, log_q, tail(log_q)


def _swept(
    part: OnSupport,
    teacher: Source,
    rows: Tensor,
    tokens: Tensor | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(teacher)
    own = own_stats(teacher, rows, top_k=part.length, workspace=workspace, score_dtype=torch.float32)
    lse, ids, logits = own.logsumexp.double(), own.ids, own.logits.double()
    if part.of_tokens:
        assert tokens is not None
        ids = tokens.long().unsqueeze(1)
        logits = logits_at(teacher, rows, ids, dtype, workspace).double()
    else:
        ids = ids.masked_fill(logits == -math.inf, LAST_ID)  # an entry that the teacher masks is not on its list
    log_tail = torch.zeros_like(lse)
    if part.reads_teacher_rest:
        log_tail = off_list_logsumexp(teacher, rows, ids, workspace=workspace) - lse
    return ids, logits - lse.unsqueeze(1), log_tail, own.entropy.double()
