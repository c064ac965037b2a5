"""Cluster bootstrap: intervals of means over tokens that allow for tokens of one prompt not being independent.

  A resample draws C prompts of C with replacement, each with all its tokens; a mean over tokens is then
      sum_c w_c S_c / sum_c w_c n_c,    w_c: how often cluster c was drawn, S_c, n_c: its sum and count of tokens
  and the interval is between the 2.5 % and 97.5 % percentiles of the resamples   (arXiv 2605.26844, appendix C).

Every statistic is a function of sums over clusters, so a resample costs one product with the weights, not a pass over tokens.
Not here: which tokens (fixed_context.py, quadrants.py), the regression's function of the sums (regression.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
MOST_UNDEFINED = 0.05  # of the resamples may lack the statistic; beyond that the prompts are too few for an interval


@dataclass(frozen=True)
class Interval:
    """A statistic and its 95 % bootstrap interval; bounds of NaN: too few prompts hold such tokens to say."""

    value: float
    low: float
    high: float


def draw_weights(n_clusters: int, resamples: int, seed: int) -> Tensor:
    """(resamples, n_clusters) fp64: how often each cluster is in each resample.

    Raises: ValueError: fewer than 2 clusters, of which every resample would be the same.
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
    """The percentile interval of (resamples,) values, NaN where a resample does not have the statistic."""
    known = resampled[resampled.isfinite()]
    if len(resampled) - len(known) > MOST_UNDEFINED * len(resampled):
        return Interval(value, math.nan, math.nan)
    low, high = torch.quantile(known, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=known.dtype)).tolist()
    return Interval(value, low, high)


def mean_intervals(values: Tensor, among: Tensor, clusters: Tensor, weights: Tensor) -> list[Interval]:
    """The mean of `values` over each set of positions, with its interval.

    Args:
        values: (N,), the same for every set.
        among: (N, M) bool, a column per set; the sets stay as they are in every resample.
        clusters: (N,) in [0, C).
        weights: (R, C) of `draw_weights`.
    Returns: M intervals; of an empty set, all NaN.
    """
    sums = cluster_sums(torch.where(among, values.double().unsqueeze(1), 0), clusters, weights.shape[1])
    counts = cluster_sums(among, clusters, weights.shape[1])
    means = (sums.sum(0) / counts.sum(0)).tolist()
    resampled = (weights @ sums) / (weights @ counts)
    return [interval(mean, column) for mean, column in zip(means, resampled.unbind(1), strict=True)]
