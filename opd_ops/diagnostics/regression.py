"""The regression of the gain on teachability and on incompatibility: which of the two explains the gain.

  z(G) = b_1 z(D C) + b_2 z(D (1 - C)) + residual
  z(x) = (x - mean) / standard deviation;  D: union KL, C: support mass, both quantile-normalised (eq. 11)
  Least squares over tokens; intervals by cluster bootstrap      (arXiv 2605.26844 section 3, appendix C)

D and C are normalised once, on all tokens. Each resample computes its own z: its b solves R b = r, where R has the correlations
of the two regressors, and r their correlations with G. All come from the clusters' sums of products.
Not here: G (fixed_context.py), the two scores as selectors (opd_ops/selection/selectors.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.fixed_context import gain
from opd_ops.diagnostics.intervals import Interval, cluster_sums, interval
from opd_ops.selection.selectors import incompatibility, teachability

REGRESSORS = ("teachability", "incompatibility")
LEAST_DETERMINANT = 1e-10  # of the matrix R: below it the two regressors are equal up to rounding


class DegenerateError(ValueError):
    """The regression has no unique solution on these tokens."""


@dataclass(frozen=True)
class Regression:
    """Standardised coefficients: the change of G, in its standard deviations, per standard deviation of the regressor."""

    teachability: Interval
    incompatibility: Interval
    r_squared: Interval
    n_positions: int


def regress(contexts: Contexts, *, weights: Tensor) -> Regression:
    """The regression over the measured positions; `weights` (R, C) of `draw_weights`.

    Raises:
        DegenerateError: a column is constant, or the two regressors are multiples of each other. ValueError: no trained
            student.
    """
    stats, measured = contexts.stats, contexts.measured
    columns = torch.stack([teachability(stats)[measured], incompatibility(stats)[measured], gain(contexts)], 1).double()
    return ols(columns, contexts.measured_clusters, weights)


def ols(columns: Tensor, clusters: Tensor, weights: Tensor) -> Regression:
    """The regression for any (N, 3) columns, two regressors and the gain, with (N,) clusters."""
    spread, largest = columns.std(0, unbiased=False), columns.abs().amax(0)
    for name, flat in zip((*REGRESSORS, "gain"), (spread <= 1e-12 * largest).tolist(), strict=True):
        if flat:
            raise DegenerateError(
                f"regression: {name} is the same at all {len(columns)} positions, so nothing can be told from it"
            )
    # Centre and scale first, so that the sums of products below lose no digits.
    z = (columns - columns.mean(0)) / spread
    z = torch.cat((torch.ones_like(z[:, :1]), z), 1)
    products = cluster_sums(z.unsqueeze(2) * z.unsqueeze(1), clusters, weights.shape[1])
    whole = _solve(products.sum(0, keepdim=True))
    if not bool(whole.isfinite().all()):
        raise DegenerateError(
            f"regression: {REGRESSORS[0]} and {REGRESSORS[1]} are multiples of each other at all {len(columns)} positions "
            "(the support mass hardly varies), so their coefficients cannot be told apart"
        )
    resampled = _solve((weights @ products.flatten(1)).view(-1, 4, 4))
    first, second, r_squared = (
        interval(value, column) for value, column in zip(whole[0].tolist(), resampled.unbind(1), strict=True)
    )
    return Regression(first, second, r_squared, len(columns))


def _solve(products: Tensor) -> Tensor:
    """(R, 3) both coefficients and R^2, from (R, 4, 4) sums of products of (1, x1, x2, y); NaN without a unique solution."""
    moments = products / products[:, :1, :1]
    means = moments[:, 0, 1:]
    covariance = moments[:, 1:, 1:] - means.unsqueeze(2) * means.unsqueeze(1)
    deviation = covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    correlation = covariance / (deviation.unsqueeze(2) * deviation.unsqueeze(1))
    between, with_y = correlation[:, 0, 1], correlation[:, :2, 2]
    determinant = 1 - between.square()
    determinant = torch.where(determinant > LEAST_DETERMINANT, determinant, torch.nan)
    coefficients = (with_y - between.unsqueeze(1) * with_y.flip(1)) / determinant.unsqueeze(1)
    return torch.cat((coefficients, (coefficients * with_y).sum(1, keepdim=True)), 1)
