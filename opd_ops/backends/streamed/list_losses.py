"""Both models on a divergence's list of ids and off it, from one sweep of each model, and the loss on them.

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
    divergence: OnSupport,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    tokens: Tensor | None,
    *,
    reverse_kl: Tensor,
    workspace: Workspace,
) -> Terms:
    """The terms of the rows. `tokens`: (M,), the student's sampled tokens, if the divergence reads them; `reverse_kl`: (M,)."""
    student = student.detach()
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))
    if isinstance(teacher, TeacherLists):
        ids, log_q, log_tail = _listed(divergence, teacher.take(rows))
        entropy = torch.full_like(log_tail, math.nan)
    else:
        ids, log_q, log_tail, entropy = _swept(divergence, teacher.detach(), rows, tokens, workspace)
    x = logits_at(student, rows, ids, dtype, workspace)
    off_list = x.new_zeros(len(rows))
    if divergence.reads_off_list:
        off_list = off_list_logsumexp(student, rows, ids, workspace=workspace)
    return evaluate(divergence, Support(x.double(), off_list, log_q, log_tail, entropy, reverse_kl), ids, dtype)


def _listed(divergence: OnSupport, teacher: TeacherLists) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log q there, and log of the teacher's mass off the ids, from the lists that the teacher sent."""
    best = teacher.top(divergence.length)
    log_q = best.logprobs.double()
    return best.ids, log_q, tail(log_q)


def _swept(
    divergence: OnSupport,
    teacher: Source,
    rows: Tensor,
    tokens: Tensor | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the teacher's logits, and the teacher's entropy."""
    dtype = compute_dtype(teacher)
    stats = own_stats(teacher, rows, top_k=divergence.length, workspace=workspace, score_dtype=torch.float32)
    lse, ids, logits = stats.logsumexp.double(), stats.ids, stats.logits.double()
    if divergence.of_tokens:
        assert tokens is not None
        ids = tokens.long().unsqueeze(1)
        logits = logits_at(teacher, rows, ids, dtype, workspace).double()
    else:
        ids = ids.masked_fill(logits == -math.inf, LAST_ID)  # an entry that the teacher masks is not on its list
    log_tail = torch.zeros_like(lse)
    if divergence.reads_teacher_off_list:
        log_tail = off_list_logsumexp(teacher, rows, ids, workspace=workspace) - lse
    return ids, logits - lse.unsqueeze(1), log_tail, stats.entropy.double()
