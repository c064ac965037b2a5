"""The sampled tokens y of some rows, and a model's log-probabilities of them.

  log p(y) = s_y - log sum e^s: one dot product for each row of a head

Not here: logits at other ids (logits_at.py), what divergences make of the tokens (call/losses.py), selectors that read them
(selection/sampled.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import SampledLogits


def tokens_at(tokens: Tensor | None, student: Source, teacher: Source | TeacherLists, rows: Tensor) -> Tensor:
    """(n,) tokens that the student sampled at the rows, merged ids as the first of them. `tokens`: of all positions."""
    if isinstance(teacher, TeacherLists) and teacher.tokens is not None:
        return teacher.tokens[rows]
    assert tokens is not None
    at_rows, merged = tokens.flatten()[rows].long(), student.transform.merged
    for token_id in merged[1:]:
        at_rows = at_rows.masked_fill(at_rows == token_id, merged[0])
    return at_rows


def sampled_logits(student: Source, teacher: Source, rows: Tensor, tokens: Tensor, workspace: Workspace) -> SampledLogits:
    """The (n,) tokens with both models' logits."""
    dtype, ids = compute_dtype(student, teacher), tokens.unsqueeze(1)
    both = [logits_at(side.detach(), rows, ids, dtype, workspace).squeeze(1) for side in (student, teacher)]
    return SampledLogits(tokens, torch.stack(both))


def token_logprobs(
    side: Source | TeacherLists, rows: Tensor, tokens: Tensor, logsumexp: Tensor, workspace: Workspace
) -> Tensor:
    """(n,) log-probabilities of the (n,) tokens, in the dtype of `logsumexp`: (n,), read of a model that has logits."""
    if isinstance(side, TeacherLists):
        return side.logprobs[rows, -1].to(logsumexp.dtype)
    return logits_at(side.detach(), rows, tokens.unsqueeze(1), logsumexp.dtype, workspace).squeeze(1) - logsumexp
