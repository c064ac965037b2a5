"""Cluster bootstrap: intervals of means over tokens, where tokens of one prompt are not independent.

  A cluster is the set of all tokens of one prompt. A resample draws C of the C clusters with replacement; its mean is
      sum_c w_c S_c / sum_c w_c n_c,    w_c: how often cluster c was drawn; S_c, n_c: sum and number of its tokens
  The interval lies between the 2.5 % and 97.5 % percentiles of the resamples   (arXiv 2605.26844, appendix C).

Every statistic is a function of sums over clusters, so a resample costs one product with the weights, not a pass over tokens.
Not here: the sets of tokens (fixed_context.py, quadrants.py), the regression (regression.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
MOST_UNDEFINED = 0.05  # share of resamples that may lack the statistic; beyond it there are too few prompts for an interval


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % bootstrap interval. Bounds are NaN if too few prompts have such tokens."""

    value: float
    low: float
    high: float


def draw_weights(n_clusters: int, resamples: int, seed: int) -> Tensor:
    """(resamples, n_clusters) fp64: how often each cluster is in each resample.

    Raises: ValueError: fewer than 2 clusters: all resamples would be equal.
    """
    if n_clusters < 2:
        raise ValueError(f"clusters: got {n_clusters}, expected at least 2 different prompts to resample")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_clusters, (resamples, n_clusters), generator=generator)
    return torch.zeros(resamples, n_clusters, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1).double().expand(drawn.shape)
    )


def cluster_sums(values: Tensor, clusters: Tensor, n_clusters: int) -> Tensor:
    """(n_clusters, ...) fp64 sums of the rows of (N, ...) `values`."""
    return torch.zeros(n_clusters, *values.shape[1:], dtype=torch.float64).index_add_(0, clusters, values.double())


def interval(value: float, resampled: Tensor) -> Interval:
    """The percentile interval of (resamples,) values; a value is NaN if the resample lacks the statistic."""
    defined = resampled[resampled.isfinite()]
    if len(resampled) - len(defined) > MOST_UNDEFINED * len(resampled):
        return Interval(value, math.nan, math.nan)
    low, high = quantiles(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Interval(value, low, high)


def quantiles(x: Tensor, levels: Sequence[float]) -> Tensor:
    """(len(levels),) linearly interpolated quantiles of (N,) values; NaN if a value is. torch.quantile takes up to 2^24."""
    ordered = x.sort().values  # NaN is the last
    places = torch.tensor(levels, dtype=torch.float64) * (len(x) - 1)
    between = torch.lerp(ordered[places.floor().long()], ordered[places.ceil().long()], places.frac().to(x.dtype))
    return torch.where(ordered[-1].isnan(), ordered[-1], between)


def mean_intervals(values: Tensor, members: Tensor, clusters: Tensor, weights: Tensor) -> list[Interval]:
    """The mean of `values` over each set of positions, with its interval.

    Args:
        values: (N,), the same for every set.
        members: (N, M) bool, one column per set; all resamples use the same sets.
        clusters: (N,) in [0, C).
        weights: (R, C) of `draw_weights`.
    Returns: M intervals; for an empty set all numbers are NaN.
    """
    sums = cluster_sums(torch.where(members, values.double().unsqueeze(1), 0), clusters, weights.shape[1])
    counts = cluster_sums(members, clusters, weights.shape[1])
    means = (sums.sum(0) / counts.sum(0)).tolist()
    resampled = (weights @ sums) / (weights @ counts)
    return [interval(mean, column) for mean, column in zip(means, resampled.unbind(1), strict=True)]
