"""The `metrics` of a call for a training log, as detached 0-dim tensors that stay on the device.

  Means in nats over the valid or the selected positions, with their sums and counts: a host can add these up over
  micro-batches and ranks before it divides. NaN: this call does not know the statistic (selection/stats.py).

Not here: the loss and its denominator (reduce.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opd_ops.selection.stats import TokenStats

Metrics = dict[str, Tensor]


@torch.no_grad()
def loss_metrics(
    loss: Tensor,
    loss_sum: Tensor,
    selected: Tensor,
    scores: Tensor,
    stats: TokenStats,
    unmasked: Tensor | None,
    infinite: Tensor,
    *,
    is_bound: bool,
) -> Metrics:
    """The metrics of every divergence.

    Args:
        unmasked: Positions that the caller left valid; None: all. A NaN of the teacher makes such a position not valid.
        infinite: Positions with an infinite divergence.
        is_bound: Whether the support mass is only its lower bound, known from two lists.
    """
    among = torch.stack((selected, stats.valid, infinite)).view(3, -1)
    n_selected, n_valid, n_infinite = counts = among.sum(1)
    left_out = among[:2].logical_not()
    n_unmasked = selected.numel() if unmasked is None else unmasked.sum()
    mass = "support_mass_lower_bound" if is_bound else "support_mass"
    columns = torch.stack((stats.reverse_kl, stats.student_entropy, stats.support_mass, stats.teacher_entropy)).view(4, -1)
    totals = columns.masked_fill(left_out.unsqueeze(1), 0).sum(2)  # (2, 4)
    means = totals / counts[:2].clamp_min(1).unsqueeze(1)
    metrics = {"loss": loss.detach(), "loss_sum": loss_sum.detach()}
    names = "kl_selected", "entropy_selected", f"{mass}_selected", None, "kl_all", "entropy", mass, "teacher_entropy"
    for name, mean, total in zip(names, means.view(8).unbind(), totals.view(8).unbind(), strict=True):
        if name is not None:
            metrics[name], metrics[f"{name}_sum"] = mean, total
    lowest = scores.flatten().masked_fill(left_out[0], torch.inf)
    return metrics | {
        "n_valid": n_valid,
        "n_selected": n_selected,
        "n_infinite": n_infinite,  # divergence +inf: of all valid positions if known there, else of the selected ones
        "n_teacher_nonfinite": n_unmasked - n_valid,
        # +inf if no position is selected
        "score_threshold": lowest.amin() if lowest.numel() else lowest.new_full((), torch.inf),
    }


def metrics_of_totals(loss: Tensor, totals: Mapping[str, Tensor]) -> Metrics:
    """The metrics of `loss_metrics`, from a backend's totals."""
    names = {"mass": "support_mass", "mass_selected": "support_mass_selected"}
    names |= {f"{name}_sum": f"{known}_sum" for name, known in names.items()}
    named = {names.get(name, name): value for name, value in totals.items() if name != "scale"}
    return {"loss": loss.detach(), **named}


@torch.no_grad()
def routed_metrics(routes: Tensor, n: int, valid: Tensor, rows: Tensor, trained: Tensor, terms: Tensor) -> Metrics:
    """Counts and losses for each of n teachers.

    Args:
        routes: (N,) the teacher of each position; valid: (...) bool.
        rows, trained, terms: (M,) the chosen rows, which of them are trained on, and their weighted losses.
    """
    metrics: Metrics = {}
    for i in range(n):
        own = routes[rows] == i
        count, total = (trained & own).sum(), torch.where(own, terms, 0).sum()
        metrics |= {f"n_valid_teacher_{i}": (valid.flatten() & (routes == i)).sum(), f"n_selected_teacher_{i}": count}
        metrics |= {f"loss_teacher_{i}": total / count.clamp_min(1), f"loss_teacher_{i}_sum": total}
    return metrics


def sampled_metrics(log_p: Tensor, log_q: Tensor, trained: Tensor) -> Metrics:
    """An estimate of KL(p || q) from tokens drawn from p, at the rows that are `trained`; all arguments are (M,)."""
    return _means(trained, kl_sampled=log_p - log_q)


def clip_metrics(advantages: Tensor, clip: float, trained: Tensor) -> Metrics:
    """The share of the `trained` rows whose advantage the clip changes."""
    return _means(trained, advantage_clipped=advantages.abs() > clip)


def weight_metrics(weights: Tensor, trained: Tensor) -> Metrics:
    """The mean of the weighting's (M,) factors over the rows that are `trained`."""
    return _means(trained, weight=weights)


def ratio_metrics(ratios: Tensor, weights: Tensor, trained: Tensor) -> Metrics:
    """Ratios p(y) / mu(y) of the `trained` rows: mean, maximum, and the shares that have another weight, or a weight of 0."""
    is_dropped = (weights == 0) & (ratios != 0)
    means = _means(trained, ratio=ratios, ratio_clipped=(weights != ratios) & ~is_dropped, ratio_dropped=is_dropped)
    largest = torch.where(trained, ratios, 0)
    return means | {"ratio_max": largest.amax() if largest.numel() else largest.new_zeros(())}


@torch.no_grad()
def _means(trained: Tensor, **columns: Tensor) -> Metrics:
    """The mean over the rows that are `trained`, and the sum, of each (M,) column."""
    metrics: Metrics = {}
    for name, column in columns.items():
        total = torch.where(trained, column, 0).sum()
        metrics |= {name: total / trained.sum().clamp_min(1), f"{name}_sum": total}
    return metrics


def as_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """0-dim tensors of one device as numbers; the CPU waits for the device once."""
    values: list[float] = torch.stack([value.double() for value in metrics.values()]).tolist() if metrics else []
    return dict(zip(metrics, values, strict=True))
