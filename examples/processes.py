"""The demonstration on several processes: how they find each other, who answers what, what they send.

  rank r of R answers questions [r B / R, (r + 1) B / R) of a step's B, so that ranks hold them in the order of one process
  dL/dw = sum_r dL_r/dw, because the ranks' losses, each with the denominator of all (scope "global"), add up to L

A step sends what selection does (docs/guides/several-gpus.md), one all-reduce a parameter, and one all-gather of a few metrics.
Every rank keeps a whole model and optimizer; they stay equal to the bit, as all apply the same summed gradients.
Not here: the step itself (prompt_distillation.py), the collectives (opd_ops/distributed/ranks.py), sharded models
(opd_ops/trainer/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_ops.distributed.ranks import Ranks
from opd_ops.trainer.order import seed_of

Item = TypeVar("Item")


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torch's launcher started, over gloo; without it, this one alone."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks.world()
    finally:
        dist.destroy_process_group()


def share(items: Sequence[Item], ranks: Ranks) -> Sequence[Item]:
    """This rank's part, in the order of all."""
    return items[len(items) * ranks.rank // ranks.size : len(items) * (ranks.rank + 1) // ranks.size]


def seed_of_rank(seed: int, ranks: Ranks) -> int:
    """Each rank has its own seed; rank 0 uses the run's seed."""
    return seed_of(seed, ranks.rank) if ranks.rank else seed


def add_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Every gradient becomes the sum over ranks. A rank with nothing selected has gradients too: zeros."""
    for parameter in model.parameters():
        ranks.sum(parameter.grad)


def metrics_by_rank(metrics: Mapping[str, Tensor], ranks: Ranks) -> list[dict[str, float]]:
    """Each rank's numbers, in their order."""
    every = ranks.gather(torch.stack([value.double() for value in metrics.values()]))
    return [dict(zip(metrics, values, strict=True)) for values in every.tolist()]


def together(by_rank: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of all ranks' tokens: losses, sums and counts add up, means are made of these, the least score is kept."""
    if len(by_rank) == 1:
        return dict(by_rank[0])
    totals = {name: sum(metrics[name] for metrics in by_rank) for name in by_rank[0]}
    for name in totals.keys() - {"loss"}:  # the mean of "loss_sum" has the loss's own denominator
        if f"{name}_sum" in totals:
            count = totals["n_selected" if name.endswith("_selected") else "n_valid"]
            totals[name] = totals[f"{name}_sum"] / max(1, count)
    return totals | {"score_threshold": min(metrics["score_threshold"] for metrics in by_rank)}
