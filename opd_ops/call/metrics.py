"""The `metrics` of a call: what a training loop logs, as detached 0-dim tensors that stay on the device.

  Means in nats over the valid or the selected positions, and the raw sums and counts they are made of, so that a host can
  sum over micro-batches and ranks before it divides. NaN: made of a statistic that this call does not know
  (selection/stats.py).

Not here: the loss and its denominator (loss.py).
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
    given: Tensor | None,
    infinite: Tensor,
    *,
    is_bound: bool,
) -> Metrics:
    """`given` is the caller's mask as bool, or None: what teacher NaNs then took away is counted against it.

    `infinite`: where the divergence is; `is_bound`: the support mass is its lower bound, known from two lists.
    """
    n_valid, n_selected = stats.valid.sum(), selected.sum()
    n_given = torch.full_like(n_valid, selected.numel()) if given is None else given.sum()
    mass = "support_mass_lower_bound" if is_bound else "support_mass"
    sums = {
        "kl_selected": (stats.reverse_kl, selected, n_selected),
        "kl_all": (stats.reverse_kl, stats.valid, n_valid),
        "entropy_selected": (stats.student_entropy, selected, n_selected),
        "entropy": (stats.student_entropy, stats.valid, n_valid),
        "teacher_entropy": (stats.teacher_entropy, stats.valid, n_valid),
        f"{mass}_selected": (stats.support_mass, selected, n_selected),
        mass: (stats.support_mass, stats.valid, n_valid),
    }
    metrics = {"loss": loss.detach(), "loss_sum": loss_sum.detach()}
    for name, (column, among, count) in sums.items():
        total = torch.where(among, column, 0).sum()
        metrics[name] = total / count.clamp_min(1)
        metrics[f"{name}_sum"] = total
    lowest = torch.where(selected, scores, torch.inf).flatten()
    return metrics | {
        "n_valid": n_valid,
        "n_selected": n_selected,
        "n_infinite": infinite.sum(),  # the divergence is +inf: known of all valid ones, or found where selected
        "n_teacher_nonfinite": n_given - n_valid,
        "score_threshold": torch.cat((lowest, lowest.new_full((1,), torch.inf))).amin(),  # +inf: nothing selected
    }


@torch.no_grad()
def sampled_metrics(log_ratio: Tensor, trained: Tensor) -> Metrics:
    """An estimate of KL(p || q) from tokens that were drawn from p, at the (M,) positions that were trained on."""
    total = torch.where(trained, log_ratio, 0).sum()
    return {"kl_sampled": total / trained.sum().clamp_min(1), "kl_sampled_sum": total}


def as_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """0-dim tensors of one device as numbers, by one host synchronisation for all of them."""
    values: list[float] = torch.stack([value.double() for value in metrics.values()]).tolist() if metrics else []
    return dict(zip(metrics, values, strict=True))
