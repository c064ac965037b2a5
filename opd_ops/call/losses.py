"""The fourth stage of a call: the losses that the backend gives of the chosen rows, and what is known once they are.

Not here: which rows (choose.py), what is made of the losses (reduce.py).
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
    """The chosen positions once their losses are known."""

    chosen: Chosen  # with the statistics and the selection that follow from the losses
    trained: Tensor  # (M,) bool: which rows are trained on
    infinite: Tensor  # (...) bool: valid positions whose divergence is +inf
    log_ratios: Tensor | None  # (M,) log p(y) - log q(y) of the sampled tokens y, if the divergence is on them


def selected_losses(chosen: Chosen, weights: Tensor, tokens: Tensor | None, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """sum weights l, connected to the student's tensors, and l; both weights and l are (M,), as `sampled_tokens`."""
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
    """(M,) the token that the student sampled at each row, merged ids as their first; None: the divergence is not on it."""
    call = chosen.call
    if not call.divergence.reads_tokens:
        return None
    if isinstance(call.teacher, TeacherLists):
        return call.teacher.ids[chosen.rows, 0]
    assert call.positions.tokens is not None
    tokens, merged = call.positions.tokens.flatten()[chosen.rows].long(), call.student.transform.merged
    for x in merged[1:]:
        tokens = tokens.masked_fill(tokens == x, merged[0])
    return tokens


def _log_ratios(chosen: Chosen, tokens: Tensor) -> Tensor:
    """(M,) log p(y) - log q(y) of the tokens y."""
    ids, logprobs, stats = tokens.unsqueeze(1), [], chosen.stats
    for source, lse in ((chosen.call.student, stats.student_logsumexp), (chosen.call.teacher, stats.teacher_logsumexp)):
        if isinstance(source, TeacherLists):
            logprobs.append(source.logprobs[chosen.rows, 0])
        else:
            workspace = chosen.call.workspace
            logits = logits_at(source.detach(), chosen.rows, ids, stats.student_logsumexp.dtype, workspace)
            logprobs.append(logits.squeeze(1) - lse.flatten()[chosen.rows])
    return logprobs[0] - logprobs[1]


def settle(chosen: Chosen, losses: Tensor, tokens: Tensor | None) -> Settled:
    """What is known once the (M,) losses are: those that turn out to be infinite are not trained on."""
    call, stats, rows, flat = chosen.call, chosen.stats, chosen.rows, chosen.selected.flatten()
    # What is trained on may be known to more digits than what ranked it.
    column = call.divergence.column
    if column is not None:
        ranked = getattr(stats, column).flatten()[rows]
        stats = stats.with_column(column, rows, losses if chosen.kept is None else torch.where(chosen.kept, losses, ranked))
    # Nor was it known to be finite, if the student's row was not read, or read in 16 bits, or is summed only here.
    trained = losses != torch.inf
    trained = trained if chosen.kept is None else trained & chosen.kept
    infinite = (stats.valid & ~is_finite(stats, call.divergence)).flatten()
    infinite = infinite.index_put((rows,), infinite[rows] | (flat[rows] & (losses == torch.inf)))
    selected = flat.index_put((rows,), flat[rows] & trained)
    shape = chosen.selected.shape
    if may_look(rows):
        is_known = call.divergence.whole is not None and call.divergence.whole.column is not None
        among = (stats.valid.flatten(), "valid") if is_known else (flat, "selected")  # others are known where selected alone
        warn_of_infinite(infinite, *among, call.divergence.name)
    chosen = replace(chosen, selected=selected.view(shape), stats=stats)
    return Settled(chosen, trained, infinite.view(shape), None if tokens is None else _log_ratios(chosen, tokens))
