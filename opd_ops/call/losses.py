"""The fourth stage of a call: a backend computes the losses of the chosen rows. Rows with an infinite loss are then dropped.

  w l instead of l where the divergence has a ratio: w is a constant made of p(y) / mu(y) (divergences/ratio.py), y the sampled
  token, mu its probability at sampling time (`old_logprobs`)

Not here: the choice of rows (choose.py), the mean of the losses (reduce.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import may_look, number_in
from opd_ops.backends.interface import WeightedRows
from opd_ops.backends.shared.token_logprobs import token_logprobs, tokens_at
from opd_ops.call.choose import Chosen, warn_of_infinite
from opd_ops.divergences import SampledToken
from opd_ops.inputs.sources import Source
from opd_ops.selection.stats import Scoring


class Settled(NamedTuple):
    """The chosen positions after their losses are known."""

    chosen: Chosen  # statistics, selection and infinite positions updated by the losses
    trained: Tensor | None  # (M,) bool: which rows are trained on, no row with an infinite loss; None: all
    is_final: bool  # whether the CPU knows that all chosen rows are trained on


class Sampled(NamedTuple):
    """The sampled tokens y of the chosen rows, (M,) each, without a gradient; None: the divergence does not read it."""

    tokens: Tensor
    log_p: Tensor  # log p(y)
    log_q: Tensor | None  # log q(y)
    advantages: Tensor | None  # before the clip
    ratios: Tensor | None  # p(y) / mu(y)
    weights: Tensor | None  # made of the ratios, factors of the losses


def selected_losses(chosen: Chosen, weights: Tensor, tokens: Tensor | None, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """sum weights l, connected to the student's tensors, and the losses l. weights, tokens and l are (M,)."""
    call, stats, rows = chosen.call, chosen.stats, chosen.rows
    selected = WeightedRows(rows, weights, stats.take_together(rows), tokens)
    return call.backend.selected_loss(call.student, call.teacher, selected, call.divergence, call.workspace, inplace=inplace)


@torch.no_grad()
def sampled(chosen: Chosen) -> Sampled | None:
    """The sampled tokens of the chosen rows; None: neither the divergence nor its ratio reads them."""
    call, divergence, old = chosen.call, chosen.call.divergence, chosen.call.batch.old_logprobs
    if not divergence.reads_tokens:
        return None
    tokens, support, rule = (
        tokens_at(call.positions.tokens, call.student, call.teacher, chosen.rows),
        divergence.on_support,
        divergence.importance,
    )
    names = "student_logsumexp", "teacher_logsumexp", "reverse_kl"
    columns = {name: getattr(chosen.stats, name).flatten()[chosen.rows] for name in names} | _exact_columns(chosen)
    log_p = token_logprobs(call.student, chosen.rows, tokens, columns["student_logsumexp"], call.workspace)
    log_q = advantages = ratios = weights = None
    if support is not None and support.with_token:
        log_q = token_logprobs(call.teacher, chosen.rows, tokens, columns["teacher_logsumexp"], call.workspace)
    if isinstance(support, SampledToken) and log_q is not None:
        advantages = support.advantage(log_p, log_q, columns["reverse_kl"])
    if rule is not None and old is not None:
        ratios = torch.exp(log_p - old.detach().flatten()[chosen.rows].to(log_p.dtype))
        weights = rule.weights(ratios, advantages)
        if chosen.trained is not None:  # rows that only fill up the list of a graph may hold NaN
            weights = torch.where(chosen.trained, weights, 0)
    return Sampled(tokens, log_p, log_q, advantages, ratios, weights)


def _exact_columns(chosen: Chosen) -> dict[str, Tensor]:
    """Columns of the rows, read once more from fp32 logits where the statistics are not exact enough.

    Statistics of the rollout are of an older student, and a backend's scores may come from 16-bit logits. A ratio needs more
    digits of log p than they have, and "ppo" also the sign of the advantage: of log p - log q.
    """
    call, rule, dtype = chosen.call, chosen.call.divergence.importance, chosen.stats.student_logsumexp.dtype
    student, teacher, rows = call.student.detach(), call.teacher, chosen.rows
    in_16_bits = rule is not None and call.backend.scores_selected_rows(call.student, call.teacher)
    if rule is not None and rule.kind == "ppo" and in_16_bits and isinstance(teacher, Source):
        exact = call.backend.token_stats(student, teacher.detach(), rows, Scoring(1, call.workspace, torch.float32))
        return {name: getattr(exact, name) for name in ("student_logsumexp", "teacher_logsumexp", "reverse_kl")}
    if call.student_stats is None and not in_16_bits:
        return {}
    own = call.backend.own_stats(student, rows, Scoring(1, call.workspace, torch.float32))
    return {"student_logsumexp": own.logsumexp.to(dtype)}


def settle(chosen: Chosen, losses: Tensor) -> Settled:
    """Update statistics and selection by the (M,) losses: rows with an infinite loss are not trained on."""
    call, stats, rows = chosen.call, chosen.stats, chosen.rows
    # The loss may have more digits than the statistic that ranked the row.
    column = call.divergence.column
    if column is not None:
        values = losses
        if chosen.trained is not None:
            values = torch.where(chosen.trained, losses, getattr(stats, column).flatten()[rows])
        stats = stats.with_column(column, rows, values)
    # Without such a column only the losses of selected rows are known.
    is_known = call.divergence.infinite_column is not None
    among, kind = (stats.valid, "valid") if is_known else (chosen.selected, "selected")
    can_look = may_look(losses) and not call.in_graph
    if chosen.trained is None and can_look and (not len(rows) or number_in(losses.amax()) < torch.inf):
        if chosen.counts is None:
            warn_of_infinite(chosen.infinite, among, kind, call.divergence.name)
        return Settled(replace(chosen, stats=stats), None, True)
    # Scoring may not have seen an infinite loss: it read no student row, read it in 16 bits, or did not sum this divergence.
    finite = losses != torch.inf
    trained, flat = finite if chosen.trained is None else finite & chosen.trained, chosen.selected.flatten()
    infinite = chosen.infinite.flatten()
    infinite = infinite.index_put((rows,), infinite[rows] | (flat[rows] & (losses == torch.inf)))
    selected = flat.index_put((rows,), flat[rows] & trained)
    shape = chosen.selected.shape
    infinite = infinite.view(shape)
    if can_look:
        warn_of_infinite(infinite, among, kind, call.divergence.name)
    return Settled(replace(chosen, selected=selected.view(shape), stats=stats, infinite=infinite), trained, False)
