"""The sampled tokens y of some rows, and both models' log-probabilities of them.

  log p(y) = s_y - log sum e^s,   log q(y) = u_y - log sum e^u: one dot product for each row and model that is a head

Not here: what divergences make of them (losses.py), which selectors read them (selection/sampled.py).
"""

from __future__ import annotations

from torch import Tensor

from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.call.prepare import Call
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.selection.stats import TOKEN_COLUMNS, TokenStats


def tokens_at(call: Call, rows: Tensor) -> Tensor:
    """(n,) tokens that the student sampled at the rows, merged ids as the first of them."""
    if isinstance(call.teacher, TeacherLists) and call.teacher.tokens is not None:
        return call.teacher.tokens[rows]
    assert call.positions.tokens is not None
    tokens, merged = call.positions.tokens.flatten()[rows].long(), call.student.transform.merged
    for token_id in merged[1:]:
        tokens = tokens.masked_fill(tokens == token_id, merged[0])
    return tokens


def logprobs_at(call: Call, side: Source | TeacherLists, rows: Tensor, tokens: Tensor, logsumexp: Tensor) -> Tensor:
    """(n,) log-probabilities of the tokens, in the dtype of `logsumexp`: (n,) of a model that has logits."""
    if isinstance(side, TeacherLists):
        return side.logprobs[rows, -1].to(logsumexp.dtype)
    logits = logits_at(side.detach(), rows, tokens.unsqueeze(1), logsumexp.dtype, call.workspace)
    return logits.squeeze(1) - logsumexp


def with_token_columns(call: Call, rows: Tensor, stats: TokenStats) -> TokenStats:
    """The (n,) columns with those of the sampled token that the selector or the weighting reads."""
    names = TOKEN_COLUMNS & call.needs
    if not names:
        return stats
    tokens, columns = tokens_at(call, rows), {}
    sides = {
        "student_logprob": (call.student, stats.student_logsumexp),
        "teacher_logprob": (call.teacher, stats.teacher_logsumexp),
    }
    for name in sorted(names):  # in one order on all ranks
        side, logsumexp = sides[name]
        # A log-sum-exp of 16-bit logits may be below the token's own logit.
        columns[name] = logprobs_at(call, side, rows, tokens, logsumexp).clamp_max(0)
    return stats._replace(**columns)
