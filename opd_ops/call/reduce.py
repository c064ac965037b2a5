"""The last stage of a call: the mean loss over the selected positions, or a loss per position, connected to the graph.

  loss = sum_t w_t l_t / total          losses_t = w_t l_t at the selected t, 0 elsewhere
  w_t: the caller's weight, times that of the weighting, times that of a ratio
  denominator "sequence": loss = 1/R sum_r 1/n_r sum_{t in r} losses_t, n_r the selected positions of response r, R responses

The forward of losses per position builds no graph. The caller differentiates a sum of c_t losses_t, and only the backward
learns the factors c_t. So the backward is a backend's gradient of the weighted sum over the selected positions, with weights
c_t w_t. Nothing is scored or selected again.
Not here: which positions are selected (choose.py), the losses themselves (losses.py), metrics (metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import may_look, number_in
from opd_ops.backends.shared.gradient_in_backward import GradientPlan, connected
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.call.choose import Chosen, warn_of_infinite_counts
from opd_ops.call.losses import Sampled, Settled, sampled, selected_losses, settle
from opd_ops.call.metrics import (
    Metrics,
    clip_metrics,
    loss_metrics,
    metrics_of_totals,
    ratio_metrics,
    routed_metrics,
    sampled_metrics,
    weight_metrics,
)
from opd_ops.distributed.ranks import Ranks
from opd_ops.divergences import SampledToken
from opd_ops.inputs.sequences import check_same_sequences, numbered_sequences
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.selection.stats import TokenStats


class SelectiveOPDOutput(NamedTuple):
    """The result of `selective_opd_loss`; (...) is the positions' shape."""

    loss: Tensor  # 0-dim, connected to the graph even when nothing is selected
    selected: Tensor  # (...) bool
    scores: Tensor  # (...) -inf where not valid
    stats: TokenStats  # columns (...), 0 where not valid
    metrics: Metrics  # detached 0-dim tensors


class TokenLosses(NamedTuple):
    """The result of `selective_opd_token_losses`; (...) is the positions' shape."""

    losses: Tensor  # (...) nats, connected to the graph; 0 where not selected
    selected: Tensor  # (...) bool
    scores: Tensor  # (...) -inf where not valid
    stats: TokenStats  # columns (...), 0 where not valid
    metrics: Metrics  # detached 0-dim tensors; "loss" is the mean over the selected positions


def mean_loss(chosen: Chosen, num_items_in_batch: Tensor | float | None) -> SelectiveOPDOutput:
    """The sum of the selected positions' losses, divided by the denominator that the settings name."""
    call, rows = chosen.call, chosen.rows
    kind, inplace = call.settings.denominator, call.settings.inplace_backward
    if call.ranks is None and not call.in_graph:  # if one rank of several raised, the others would wait for it
        _check_some_items(num_items_in_batch, chosen.selected)
    is_known = chosen.counts is not None and call.ranks is None
    if kind == "sequence":
        factors = _response_factors(chosen, num_items_in_batch)
    elif is_known:
        factors = _known_factors(chosen, num_items_in_batch)
    else:
        total = denominator(*_counts(chosen), num_items_in_batch, kind)
        factors = _ratio(1.0, total).to(chosen.scores.dtype).expand(len(rows))
    factors = factors if chosen.trained is None else torch.where(chosen.trained, factors, 0)
    tokens = sampled(chosen)
    row_weights = _row_weights(chosen, tokens, factors.dtype)
    factors = factors if row_weights is None else factors * row_weights
    weighted, losses = selected_losses(chosen, factors, _ids(tokens), inplace=inplace)
    if chosen.is_summed_by_kernels:
        return _summed_by_kernels(chosen, weighted, losses, row_weights)
    settled = settle(chosen, losses)
    if kind == "sequence":
        final = _response_factors(settled.chosen, num_items_in_batch)
        final = _trained(final if row_weights is None else final * row_weights, settled)
        if not torch.equal(final, factors):  # rows with an infinite loss have left the means of their responses
            weighted, _ = selected_losses(chosen, final, _ids(tokens), inplace=inplace)
    elif not (is_known and settled.is_final):
        # The correction is 1 if no infinite loss was dropped. Counts of ranks are added up only here, where they are final.
        total = denominator(*_counts(chosen), num_items_in_batch, kind)
        final_total = denominator(*_counts(settled.chosen), num_items_in_batch, kind, call.ranks)
        weighted = weighted * _ratio(total, final_total).to(weighted.dtype)
    chosen = settled.chosen
    loss = nan_if_nonfinite(weighted, chosen)
    terms = _trained(losses if row_weights is None else losses * row_weights, settled)
    metrics = _metrics(settled, tokens, loss, terms)
    return SelectiveOPDOutput(loss, chosen.selected, chosen.scores, chosen.stats, metrics)


def _response_factors(chosen: Chosen, num_items: Tensor | float | None) -> Tensor:
    """(M,) 1 / (R n_r), n_r the selected positions of the row's response, R the number of responses: with a valid position.

    Collectives: where ranks hold parts of sequences a sum of (2, n_sequences) int64, else of two int64.
    """
    call, dtype = chosen.call, chosen.scores.dtype
    ids, n = numbered_sequences(call.shape, call.batch.cu_seqlens, chosen.scores.device)
    flags = torch.stack((chosen.selected.flatten(), chosen.stats.valid.flatten())).long()
    counts = torch.zeros((2, n), dtype=torch.long, device=flags.device).index_add(1, ids, flags)
    ranks = call.ranks
    if ranks is not None and call.scope == "sequence":
        if call.settings.threshold is not None:  # a budget has compared the numbers of sequences before
            check_same_sequences(n, ranks, counts.device)
        counts, ranks = ranks.sum(counts), None
    n_selected, n_responses = counts[0], (counts[1] > 0).sum()
    total = denominator(n_selected.sum(), n_responses, num_items, "valid", ranks)
    return (_ratio(1.0, total) / n_selected.clamp_min(1)).to(dtype)[ids[chosen.rows]]


def _counts(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """The numbers of selected and of valid positions, 0-dim int64."""
    return chosen.selected.sum(), chosen.stats.valid.sum()


def _trained(values: Tensor, settled: Settled) -> Tensor:
    """The (M,) values, 0 at rows that are not trained on."""
    return values if settled.trained is None else torch.where(settled.trained, values, 0)


def _known_factors(chosen: Chosen, num_items: Tensor | float | None) -> Tensor:
    """(M,) 1 / `denominator`, where the CPU knows the counts."""
    assert chosen.counts is not None
    (n_selected, n_valid), kind = chosen.counts, chosen.call.settings.denominator
    n_items = n_valid if num_items is None else num_items
    if isinstance(n_items, Tensor):
        n_items = n_items.to(device=chosen.rows.device, dtype=torch.float64)
    total = _selected_share(n_items, n_selected, max(n_valid, 1), kind)
    if isinstance(total, Tensor):
        factor = _ratio(1.0, total).to(chosen.scores.dtype)
    else:
        factor = chosen.scores.new_full((), 1.0 / total if total else 0.0)
    return factor.expand(len(chosen.rows))


def _selected_share(n_items: Tensor | float, n_selected: Tensor | float, n_valid: Tensor | float, kind: str) -> Tensor | float:
    """The number of items, for kind "selected" the share of them that is selected; `n_valid` is at least 1."""
    return n_items * (n_selected / n_valid) if kind == "selected" else n_items


def _summed_by_kernels(chosen: Chosen, weighted: Tensor, losses: Tensor, row_weights: Tensor | None) -> SelectiveOPDOutput:
    """The output, after kernels have dropped infinite losses, corrected the mean and summed."""
    call, placed, counts = chosen.call, chosen.placed, chosen.counts
    assert placed is not None
    assert counts is not None
    totals = call.backend.totals(
        placed,
        chosen.selected,
        chosen.rows,
        losses,
        row_weights,
        call.unmasked,
        loss=call.divergence.column,
        by_selected=call.settings.denominator == "selected",
    )
    if may_look(losses):
        among = (counts[0], "selected") if call.divergence.infinite_column is None else (counts[1], "valid")
        warn_of_infinite_counts(int(totals["n_infinite"]), *among, call.divergence.name)
    # A copy: autograd saves it, and the caller may change the metrics, which share its memory, in place.
    scale = totals["scale"].clone().to(weighted.dtype)
    loss = weighted * scale
    metrics = metrics_of_totals(loss, totals)
    if chosen.weights is not None:
        metrics |= _weight_metrics(chosen, losses != torch.inf)
    return SelectiveOPDOutput(loss, chosen.selected, chosen.scores, chosen.stats, metrics)


def denominator(
    n_selected: Tensor, n_valid: Tensor, num_items: Tensor | float | None, kind: str, ranks: Ranks | None = None
) -> Tensor:
    """The divisor of the sum over the selected positions, 0-dim fp64; 1 if no position is selected."""
    if ranks is not None:
        n_selected, n_valid = ranks.sum(torch.stack((n_selected, n_valid))).unbind()
    n_selected, n_valid = n_selected.double(), n_valid.double()
    total = n_valid
    if isinstance(num_items, Tensor):
        total = num_items.to(device=n_valid.device, dtype=torch.float64)
    elif num_items is not None:  # filled on the device: with a copy the CPU would wait for the device
        total = torch.full((), num_items, dtype=torch.float64, device=n_valid.device)
    return torch.where(n_selected > 0, _selected_share(total, n_selected, n_valid.clamp_min(1), kind), 1.0)


def _ids(tokens: Sampled | None) -> Tensor | None:
    return None if tokens is None else tokens.tokens


def _row_weights(chosen: Chosen, tokens: Sampled | None, dtype: torch.dtype) -> Tensor | None:
    """(M,) factors of the losses: the caller's weights, the weighting's and the ratios', multiplied; None: all are 1."""
    position_weights = [x.detach().flatten()[chosen.rows] for x in (chosen.call.batch.weights, chosen.weights) if x is not None]
    if chosen.trained is not None:  # rows that only fill up the list of a graph may hold NaN
        position_weights = [torch.where(chosen.trained, x, 0) for x in position_weights]
    factors = [*position_weights, *([] if tokens is None or tokens.weights is None else [tokens.weights])]
    product = None
    for factor in factors:
        product = factor.to(dtype) if product is None else product * factor.to(dtype)
    return product


def _ratio(number: Tensor | float, total: Tensor) -> Tensor:
    """number / total; 0 for a total of 0. A host counts 0 in a step without a valid token."""
    return torch.where(total == 0, 0.0, number / total)


def _check_some_items(value: Tensor | float | None, selected: Tensor) -> None:
    """Refuse a count of 0 if positions are selected. A count on a device is not read: there the loss is 0."""
    if value is None:
        return
    number = (number_in(value) if may_look(value) else None) if isinstance(value, Tensor) else value
    if number == 0 and bool(selected.any()):
        raise ValueError(
            f"num_items_in_batch: got 0, but {int(selected.sum())} positions are selected; pass the count of valid tokens, at "
            "least that many, or a mask without a valid position"
        )


def nan_if_nonfinite(losses: Tensor, chosen: Chosen) -> Tensor:
    """The losses; all are NaN, with their gradients, if a valid position has no finite student softmax or a NaN score."""
    stats = chosen.stats
    # 0 where not valid, but with places along responses also masked positions have statistics.
    lse = stats.student_logsumexp if stats.response_place is None else stats.student_logsumexp.masked_fill(~stats.valid, 0)
    if not lse.numel():
        return losses
    (least, largest), best = lse.aminmax(), chosen.scores.amax()  # NaN if any is
    if may_look(losses) and not chosen.call.in_graph:
        is_finite = math.isfinite(number_in(largest)) and math.isfinite(number_in(least)) and not math.isnan(number_in(best))
        return losses if is_finite else losses * torch.nan
    is_ok = (least > -torch.inf) & (largest < torch.inf) & (best == best)
    return losses * torch.where(is_ok, 1.0, torch.nan).to(losses.dtype)


def _weight_metrics(chosen: Chosen, trained: Tensor) -> Metrics:
    return {} if chosen.weights is None else weight_metrics(chosen.weights.flatten()[chosen.rows], trained)


def _metrics(
    settled: Settled,
    tokens: Sampled | None,
    loss: Tensor,
    terms: Tensor,
) -> Metrics:
    """`loss`: the mean; `terms`: (M,) weighted losses, 0 where a row is not trained on."""
    chosen, support = settled.chosen, settled.chosen.call.divergence.on_support
    metrics = loss_metrics(
        loss,
        terms.sum(),
        chosen.selected,
        chosen.scores,
        chosen.stats,
        chosen.call.unmasked,
        chosen.infinite,
        is_bound=isinstance(chosen.call.teacher, TeacherLists),
    )
    teacher = chosen.call.teacher
    routes = teacher.routes if isinstance(teacher, Source) else None
    if tokens is None and routes is None and chosen.weights is None:
        return metrics
    trained = torch.ones_like(terms, dtype=torch.bool) if settled.trained is None else settled.trained
    metrics |= _weight_metrics(chosen, trained)
    if isinstance(teacher, Source) and routes is not None:
        metrics |= routed_metrics(routes, len(teacher.others), chosen.stats.valid, chosen.rows, trained, terms)
    if tokens is None:
        return metrics
    if tokens.log_q is not None:
        metrics |= sampled_metrics(tokens.log_p, tokens.log_q, trained)
    if tokens.advantages is not None and isinstance(support, SampledToken) and support.clip is not None:
        metrics |= clip_metrics(tokens.advantages, support.clip, trained)
    if tokens.ratios is not None and tokens.weights is not None:
        metrics |= ratio_metrics(tokens.ratios, tokens.weights, trained)
    return metrics


def token_losses(chosen: Chosen) -> TokenLosses:
    """The selected positions' losses, each times its weight."""
    call, rows = chosen.call, chosen.rows
    with torch.no_grad():
        tokens = sampled(chosen)
        _, losses = selected_losses(chosen, torch.ones_like(chosen.scores.flatten()[rows]), _ids(tokens))
        settled = settle(chosen, losses)
    chosen = settled.chosen
    trained = torch.ones_like(losses, dtype=torch.bool) if settled.trained is None else settled.trained
    teachers = tuple(t.detach() for t in call.teacher.tensors) if isinstance(call.teacher, Source) else ()
    plan = _TokenLossPlan(_with_tensors(chosen, None), len(call.student.tensors))
    losses = connected(plan, torch.where(trained, losses, 0), *call.student.tensors, *teachers, _ids(tokens), trained)
    read_again = (call.student, call.teacher) if isinstance(call.teacher, Source) else (call.student,)
    losses = unchanged(losses, rows, *read_again, workspace=call.workspace)
    row_weights = _row_weights(chosen, tokens, losses.dtype)
    if row_weights is not None:  # an infinite weight of a row that is not trained on must not make it NaN
        losses = losses * torch.where(trained, row_weights, 0)
    placed = torch.zeros_like(chosen.scores.flatten(), dtype=losses.dtype).index_put((rows,), losses).view(call.shape)
    placed = nan_if_nonfinite(placed, chosen)
    terms = losses.detach()
    metrics = _metrics(settled, tokens, terms.sum() / trained.sum().clamp_min(1), terms)
    return TokenLosses(placed, chosen.selected, chosen.scores, chosen.stats, metrics)


@dataclass(frozen=True)
class _TokenLossPlan(GradientPlan):
    """The backward takes a backend's gradient of the weighted sum of the losses; the incoming gradient is the weights."""

    chosen: Chosen  # with empty tensors in both sources
    n_student: int  # tensors of the student; the teacher's, the tokens and `trained` follow

    def gradients(self, saved: Sequence[Tensor], dlosses: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        student, teacher, (tokens, trained) = saved[: self.n_student], saved[self.n_student : -2], saved[-2:]
        needed = needs[: self.n_student]
        student = [tensor.detach().requires_grad_(need) for tensor, need in zip(student, needed, strict=True)]
        chosen = _with_tensors(self.chosen, (*student, *teacher))
        with torch.enable_grad():
            weighted, _ = selected_losses(chosen, torch.where(trained, dlosses, 0), tokens)
            computed = iter(torch.autograd.grad(weighted, [tensor for tensor in student if tensor.requires_grad]))
        return [next(computed) if need else None for need in needed]


def _with_tensors(chosen: Chosen, tensors: Sequence[Tensor] | None) -> Chosen:
    """The same with these tensors in both sources; None: empty ones. A teacher's lists stay: autograd does not see them."""
    student, teacher = chosen.call.student, chosen.call.teacher
    split = len(student.tensors)
    student = student.emptied() if tensors is None else student.with_tensors(tensors[:split])
    if isinstance(teacher, Source):
        teacher = teacher.emptied() if tensors is None else teacher.with_tensors(tensors[split:])
    return replace(chosen, call=replace(chosen.call, student=student, teacher=teacher))
