"""The fixed-context diagnostic: how much closer to the teacher training brought the student, and on which tokens.

  G = KL(q || p_before) - KL(q || p_after) at the same positions of frozen answers     (arXiv 2605.26844 section 3)  [nats]
  relative gain = G / KL(q || p_before), winsorised at its 1 % and 99 % quantiles      (appendix C, the released tool)
  gain of a selector = mean of G over its best-scored positions; scores use the statistics *before* training, never G.

The selection is made once, on all answers, as training makes it on a batch. A bootstrap resample then draws prompts, each with
its selected positions. So an interval tells how the mean varies over prompts, for a fixed ranking and threshold.
Not here: the scores' equations (opd_ops/selection/selectors.py), the resampling (intervals.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.intervals import Interval, mean_intervals, quantiles
from opd_ops.inputs.sequences import sequence_ids
from opd_ops.scoring import select_positions
from opd_ops.selection.selectors import Selector, bound_selector, everything, named_selector, selection_options

LEAST_KL = 1e-6  # nats: the possible error of the library's KL; a ratio to a smaller KL has no meaning
TAILS = (0.01, 0.99)


@dataclass(frozen=True)
class SelectorGain:
    """The gain of training on the tokens that a selector would have chosen."""

    selector: str
    fraction: float
    n_selected: int
    gain: Interval  # mean G, nats per token
    relative_gain: Interval  # mean of the winsorised ratio
    kl_before: float  # mean KL(q || p_before) of these positions, nats: the largest possible mean gain


def gain(contexts: Contexts) -> Tensor:
    """(n_measured,) fp64: G of the measured positions, in nats; negative if the student moved away from the teacher.

    Raises: ValueError: there is no trained student.
    """
    if contexts.after_forward_kl is None:
        raise ValueError("after_forward_kl: got None, expected KL(q || p_after) of a trained student: a gain needs one")
    return (contexts.before.forward_kl.double() - contexts.after_forward_kl.double())[contexts.measured]


def relative_gain(contexts: Contexts) -> Tensor:
    """(n_measured,) fp64: G / max(KL before, 1e-6), clamped to its own 1 % and 99 % quantiles."""
    ratio = gain(contexts) / contexts.before.forward_kl.double()[contexts.measured].clamp_min(LEAST_KL)
    low, high = quantiles(ratio, TAILS)
    return ratio.clamp(low, high)


def named_selectors(selectors: Sequence[str] | Mapping[str, Selector]) -> dict[str, Selector]:
    """The selectors by name; a mapping may have your own.

    Raises: ValueError, TypeError: no selector, or an unknown one.
    """
    if isinstance(selectors, str) or not len(selectors):
        raise ValueError(f"selectors: got {selectors!r}, expected a list of names, or a mapping from names to callables")
    if isinstance(selectors, Mapping):
        return {name: named_selector(selector) for name, selector in selectors.items()}
    for name in selectors:
        if not isinstance(name, str):
            raise TypeError(f"selectors: got {name!r} in a list, expected names; pass a mapping from names to callables")
    return {name: named_selector(name) for name in selectors}


def scores_of(contexts: Contexts, name: str, selector: Selector, seed: int) -> Tensor:
    """(B, L) scores from the statistics before training; -inf where not measured. Selectors that draw use `seed`.

    Raises: ValueError: the statistics do not have a column that the selector needs.
    """
    stats = contexts.stats
    missing = [column for column in getattr(selector, "needs", ()) if getattr(stats, column) is None]
    if missing:
        raise ValueError(
            f"selectors: {name!r} needs the column {', '.join(missing)}, which before lacks; score with selector={name!r}, "
            "or leave it out"
        )
    ids = partial(sequence_ids, stats.valid.shape, None, stats.valid.device)
    scores = bound_selector(selector, torch.Generator().manual_seed(seed), ids)(stats)
    if not isinstance(scores, Tensor) or scores.shape != stats.valid.shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"selectors: {name!r} returned {got}, expected a tensor of scores of shape {tuple(stats.valid.shape)}")
    # In the dtype of the statistics, so that ties are the same as in training.
    return torch.where(stats.valid, scores.to(stats.reverse_kl.dtype), -torch.inf)


def selection(contexts: Contexts, scores: Tensor, selector: Selector, fraction: float) -> Tensor:
    """(B, L) bool: the best-scored positions, selected as training selects them from one batch."""
    return select_positions(
        scores,
        mask=contexts.measured,
        fraction=fraction,
        **selection_options(selector, contexts.stats),
    )


def gains_by_selector(
    contexts: Contexts, selectors: Mapping[str, Selector], fractions: Sequence[float], *, weights: Tensor, seed: int
) -> tuple[SelectorGain, ...]:
    """Mean gains with intervals: first over all positions ("all" at fraction 1), then for each selector and fraction."""
    labels: list[tuple[str, float]] = [("all", 1.0)]
    sets = [contexts.measured]
    for name, selector in selectors.items():
        if selector is everything:
            continue  # it is the first row; at a smaller fraction it would only select the earliest positions
        scores = scores_of(contexts, name, selector, seed)
        for fraction in fractions:
            labels.append((name, fraction))
            sets.append(selection(contexts, scores, selector, fraction))
    members = torch.stack([selected[contexts.measured] for selected in sets], 1)  # (n_measured, n_sets)
    clusters, kl = contexts.measured_clusters, contexts.before.forward_kl.double()[contexts.measured]
    absolute = mean_intervals(gain(contexts), members, clusters, weights)
    relative = mean_intervals(relative_gain(contexts), members, clusters, weights)
    counts = members.sum(0)
    kl_before = torch.where(members, kl.unsqueeze(1), 0).sum(0) / counts
    rows = zip(labels, counts.tolist(), absolute, relative, kl_before.tolist(), strict=True)
    return tuple(SelectorGain(name, fraction, n, mean, ratio, before) for (name, fraction), n, mean, ratio, before in rows)
