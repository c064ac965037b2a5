"""The fourth stage of a call: a backend computes the losses of the chosen rows. Rows with an infinite loss are then dropped.

Not here: the choice of rows (choose.py), the mean of the losses (reduce.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import may_look
from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.call.choose import Chosen, warn_of_infinite
from opd_ops.call.score import is_finite
from opd_ops.inputs.teacher_lists import TeacherLists


class Settled(NamedTuple):
    """The chosen positions after their losses are known."""

    chosen: Chosen  # statistics and selection updated by the losses
    trained: Tensor  # (M,) bool: which rows are trained on; no row with an infinite loss
    infinite: Tensor  # (...) bool: valid positions whose divergence is +inf
    log_ratios: Tensor | None  # (M,) log p(y) - log q(y), y the sampled tokens; None: the divergence does not read y


def selected_losses(chosen: Chosen, weights: Tensor, tokens: Tensor | None, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """sum weights l, connected to the student's tensors, and the losses l. weights, tokens and l are (M,)."""
    call = chosen.call
    return call.backend.selected_loss(
        call.student,
        call.teacher,
        chosen.rows,
        weights,
        chosen.stats.take(chosen.rows),
        divergence=call.divergence,
        tokens=tokens,
        workspace=call.workspace,
        inplace=inplace,
    )


def sampled_tokens(chosen: Chosen) -> Tensor | None:
    """(M,) tokens that the student sampled, merged ids as the first of them; None: the divergence does not read tokens."""
    call = chosen.call
    if not call.divergence.reads_tokens:
        return None
    if isinstance(call.teacher, TeacherLists):
        assert call.teacher.tokens is not None
        return call.teacher.tokens[chosen.rows]
    assert call.positions.tokens is not None
    tokens, merged = call.positions.tokens.flatten()[chosen.rows].long(), call.student.transform.merged
    for token_id in merged[1:]:
        tokens = tokens.masked_fill(tokens == token_id, merged[0])
    return tokens


def _log_ratios(chosen: Chosen, tokens: Tensor) -> Tensor:
    """(M,) log p(y) - log q(y) of the tokens y."""
    ids, logprobs, stats = tokens.unsqueeze(1), [], chosen.stats
    for source, lse in ((chosen.call.student, stats.student_logsumexp), (chosen.call.teacher, stats.teacher_logsumexp)):
        if isinstance(source, TeacherLists):
            logprobs.append(source.logprobs[chosen.rows, -1])
        else:
            workspace = chosen.call.workspace
            logits = logits_at(source.detach(), chosen.rows, ids, stats.student_logsumexp.dtype, workspace)
            logprobs.append(logits.squeeze(1) - lse.flatten()[chosen.rows])
    return logprobs[0] - logprobs[1]


def settle(chosen: Chosen, losses: Tensor, tokens: Tensor | None) -> Settled:
    """Update statistics and selection by the (M,) losses: rows with an infinite loss are not trained on."""
    call, stats, rows, flat = chosen.call, chosen.stats, chosen.rows, chosen.selected.flatten()
    # The loss may have more digits than the statistic that ranked the row.
    column = call.divergence.column
    if column is not None:
        ranked = getattr(stats, column).flatten()[rows]
        values = losses if chosen.trained is None else torch.where(chosen.trained, losses, ranked)
        stats = stats.with_column(column, rows, values)
    # Scoring may not have seen an infinite loss: it read no student row, read it in 16 bits, or did not sum this divergence.
    finite = losses != torch.inf
    trained = finite if chosen.trained is None else finite & chosen.trained
    infinite = (stats.valid & ~is_finite(stats, call.divergence)).flatten()
    infinite = infinite.index_put((rows,), infinite[rows] | (flat[rows] & (losses == torch.inf)))
    selected = flat.index_put((rows,), flat[rows] & trained)
    shape = chosen.selected.shape
    if may_look(rows):
        is_known = call.divergence.whole is not None and call.divergence.whole.column is not None
        # Without such a column only the losses of selected rows are known.
        among = (stats.valid.flatten(), "valid") if is_known else (flat, "selected")
        warn_of_infinite(infinite, *among, call.divergence.name)
    chosen = replace(chosen, selected=selected.view(shape), stats=stats)
    return Settled(chosen, trained, infinite.view(shape), None if tokens is None else _log_ratios(chosen, tokens))
