"""Intervals over seeds and prompts together, and p-values corrected for the number of comparisons.

  difference  d = sum_sp D_sp / sum_sp n_sp;  D_sp: sum over the held-out tokens of seed s and prompt p, n_sp their number
  resample    seeds and prompts are drawn with replacement, independently: cell (s, p) counts w_s w_p times. The standard
              deviation of d over the resamples is its standard error (Owen, "The pigeonhole bootstrap", 2007, arXiv
              0712.1111). Of n seeds a resample shows (n - 1) / n of their variance, of n prompts likewise.
  interval    d +- t se, p-value from t = d / se, by Student's t with one degree of freedom less than there are seeds: few
              seeds know their own spread badly, and percentiles of a bootstrap over few seeds are too narrow
  Holm        sorted p-values p_1 <= p_2 <= ...: adjusted p_i = max_{j <= i} min(1, (m - j + 1) p_j)

Not here: which arms are compared (arms.py), gains on fixed contexts (gains.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.special import stdtr, stdtrit
from torch import Tensor

from opd_ops.diagnostics.intervals import LEVEL, Interval, draw_weights

RESAMPLES = 2000


class Resamples(NamedTuple):
    """How often each seed and each prompt is in each resample."""

    seeds: Tensor  # (R, S) fp64
    prompts: Tensor  # (R, P) fp64

    @property
    def cells(self) -> Tensor:
        """(R, S P): how often each cell is in each resample, seed after seed."""
        return (self.seeds.unsqueeze(2) * self.prompts.unsqueeze(1)).flatten(1)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens. With one seed the standard error, and all that depends on it, is NaN."""

    value: float
    error: float
    n_seeds: int

    @property
    def interval(self) -> Interval:
        margin = self.error * float(stdtrit(self.n_seeds - 1, (1 + LEVEL) / 2)) if self.n_seeds > 1 else math.nan
        return Interval(self.value, self.value - margin, self.value + margin)

    @property
    def p_value(self) -> float:
        """Two-sided, that the true value is 0; 1 where it is not known."""
        if self.n_seeds < 2 or not self.error > 0:
            return 1.0
        return 2 * float(stdtr(self.n_seeds - 1, -abs(self.value) / self.error))


def draw_resamples(n_seeds: int, n_prompts: int, resamples: int = RESAMPLES) -> Resamples:
    """Raises: ValueError: fewer than 2 seeds or prompts."""
    return Resamples(draw_weights(n_seeds, resamples, 0), draw_weights(n_prompts, resamples, 1))


def estimate(sums: Tensor, counts: Tensor) -> Estimate:
    """The mean of (S, P) `sums` over (S, P) `counts` of tokens, with its standard error."""
    value = float(sums.sum() / counts.sum())
    n_seeds = len(sums)
    if n_seeds < 2:
        return Estimate(value, math.nan, n_seeds)
    drawn = draw_resamples(*sums.shape)
    means = [((drawn.seeds @ cells.double()) * drawn.prompts).sum(1) for cells in (sums, counts)]
    return Estimate(value, float((means[0] / means[1]).std()), n_seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """The adjusted p-values, in the order of `p_values`."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def visible_difference(error: float, n_seeds: int, n_comparisons: int, power: float = 0.8) -> float:
    """The true difference that the first step of Holm's test sees with this power, from a difference's standard error."""
    degrees = n_seeds - 1
    return float(error * (stdtrit(degrees, 1 - (1 - LEVEL) / 2 / n_comparisons) + stdtrit(degrees, power)))
