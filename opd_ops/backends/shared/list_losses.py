"""A divergence on a short list of ids: the lists, both models on them, and the two gradients that the logits' is made of.

  ids        the teacher's top-K, or the sampled token; LAST_ID where missing
  Terms      l,  dl/dx_k at the ids,  dl/drest,  of divergences/base.py's `OnSupport`, by autograd on (M, K) tensors in fp64

Nothing here is of size V. Not here: the logits' gradient (streamed/loss.py), the losses (divergences/support.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.backends.streamed.one_model import own_stats, rest
from opd_ops.divergences import OnSupport, Support
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import LAST_ID, Listed, tail


class Terms(NamedTuple):
    """What a divergence on a list gives the selected positions."""

    losses: Tensor  # (M,) fp64
    ids: Tensor  # (M, K)
    x: Tensor  # (M, K) student logits there
    dx: Tensor  # (M, K) compute dtype
    rest: Tensor | None  # (M,) fp64; None: the loss does not read it
    drest: Tensor | None  # (M,) compute dtype


def evaluate(part: OnSupport, at: Support, ids: Tensor, dtype: torch.dtype) -> Terms:
    """Losses and gradients, row by row."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in: these are small copies
        at = Support(*(column.detach().double().clone() for column in at))
        x, beside = at.student.requires_grad_(), at.student_rest.requires_grad_()
        losses = part.loss(at)
        dx, drest = torch.autograd.grad(losses.sum(), (x, beside), allow_unused=True)
    losses = losses.detach()
    # Where there is no loss there is no gradient, and where p = 0 neither: the formulas there are 0 * inf.
    nothing = losses == math.inf
    x, beside = x.detach(), beside.detach()
    dx = torch.zeros_like(x) if dx is None else dx
    dx = dx.masked_fill(nothing.unsqueeze(1) | (x == -math.inf), 0).to(dtype)
    if not part.reads_rest or drest is None:
        return Terms(losses, ids, x.to(dtype), dx, None, None)
    return Terms(losses, ids, x.to(dtype), dx, beside, drest.masked_fill(nothing, 0).to(dtype))


@torch.no_grad()
def support_terms(
    part: OnSupport,
    student: Source,
    teacher: Source | Listed,
    rows: Tensor,
    tokens: Tensor | None,
    *,
    workspace_bytes: int,
) -> Terms:
    """The terms of the rows; `tokens` (M,) are what the student sampled there, if the divergence is on them."""
    student = student.detach()
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))
    if isinstance(teacher, Listed):
        ids, log_q, log_tail = _listed(part, teacher.take(rows))
        entropy = torch.full_like(log_tail, math.nan)
    else:
        ids, log_q, log_tail, entropy = _swept(part, teacher.detach(), rows, tokens, workspace_bytes)
    x = logits_at(student, rows, ids, dtype, workspace_bytes)
    beside = rest(student, rows, ids, workspace_bytes=workspace_bytes) if part.reads_rest else x.new_zeros(len(rows))
    return evaluate(part, Support(x.double(), beside, log_q, log_tail, entropy), ids, dtype)


def _listed(part: OnSupport, teacher: Listed) -> tuple[Tensor, Tensor, Tensor]:
    found = teacher.top(part.length)
    log_q = found.logprobs.double()
    return found.ids, log_q, tail(log_q)


def _swept(
    part: OnSupport,
    teacher: Source,
    rows: Tensor,
    tokens: Tensor | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(teacher)
    own = own_stats(teacher, rows, top_k=part.length, workspace_bytes=workspace_bytes, score_dtype=torch.float32)
    lse, ids, logits = own.logsumexp.double(), own.ids, own.logits.double()
    if part.of_tokens:
        assert tokens is not None
        ids = tokens.long().unsqueeze(1)
        logits = logits_at(teacher, rows, ids, dtype, workspace_bytes).double()
    else:
        ids = ids.masked_fill(logits == -math.inf, LAST_ID)  # an entry that the teacher masks is not on its list
    log_tail = torch.zeros_like(lse)
    if part.reads_teacher_rest:
        log_tail = rest(teacher, rows, ids, workspace_bytes=workspace_bytes) - lse
    return ids, logits - lse.unsqueeze(1), log_tail, own.entropy.double()
