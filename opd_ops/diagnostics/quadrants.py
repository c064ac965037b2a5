"""TIP's quadrants: tokens by the student's entropy and by its KL to the teacher.

  Q1: entropy high, KL high    Q2: entropy high, KL low    Q3: entropy low, KL high (overconfident)    Q4: both low
  entropy = H(p), KL = KL(p || q) in nats; high: above the median of the measured positions.
  (arXiv 2604.14084 section 3 defines them without thresholds; the released code of arXiv 2605.26844 splits at the medians.)

Not here: selectors by entropy and KL (opd_ops/selection/selectors.py: tip, overconfident), the quadrant map (plots.py).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.fixed_context import gain
from opd_ops.diagnostics.intervals import Interval, mean_intervals, quantiles

NAMES = ("Q1", "Q2", "Q3", "Q4")
MEANINGS = ("unsure, disagrees", "unsure, agrees", "sure, disagrees: overconfident", "sure, agrees")
MOST_TOKENS = 8  # number of frequent tokens to list for each quadrant


@dataclass(frozen=True)
class Quadrant:
    """One quadrant and its tokens."""

    name: str
    meaning: str  # of the student
    n: int
    share_of_tokens: float
    share_of_kl: float  # share of the sum of KL(p || q); NaN if that sum is 0
    gain: Interval | None  # mean G; None without a trained student
    frequent: tuple[tuple[str, int], ...]  # (text, count) of the most frequent tokens


@dataclass(frozen=True)
class Quadrants:
    """All four quadrants, and the medians that divide them."""

    entropy_median: float  # nats
    kl_median: float  # nats
    quadrants: tuple[Quadrant, ...]


def quadrant_numbers(entropy: Tensor, kl: Tensor) -> Tensor:
    """(N,) numbers 0 to 3 for Q1 to Q4, from (N,) entropies and KLs; a value equal to the median is low."""
    return 2 * (entropy <= quantiles(entropy, [0.5])).long() + (kl <= quantiles(kl, [0.5])).long()


def quadrants(contexts: Contexts, *, weights: Tensor | None) -> Quadrants:
    """The quadrants of the measured positions. `weights`: (R, C) of `draw_weights`, for the gains; None: no gains."""
    measured = contexts.measured
    entropy = contexts.before.student_entropy[measured].double()
    kl = contexts.before.reverse_kl[measured].double()
    members = quadrant_numbers(entropy, kl).unsqueeze(1) == torch.arange(len(NAMES))  # (n_measured, 4)
    gains: list[Interval] | list[None] = [None] * len(NAMES)
    if weights is not None:
        gains = mean_intervals(gain(contexts), members, contexts.measured_clusters, weights)
    texts = [contexts.tokens[row][i] for row, i in measured.nonzero().tolist()]
    total_kl = float(kl.sum())
    rows = []
    for i, (name, meaning) in enumerate(zip(NAMES, MEANINGS, strict=True)):
        inside = members[:, i]
        n, kl_inside = int(inside.sum()), float(kl[inside].sum())
        counts = Counter(text for text, is_inside in zip(texts, inside.tolist(), strict=True) if is_inside)
        share = kl_inside / total_kl if total_kl > 0 else math.nan
        rows.append(Quadrant(name, meaning, n, n / len(kl), share, gains[i], tuple(counts.most_common(MOST_TOKENS))))
    return Quadrants(float(quantiles(entropy, [0.5])), float(quantiles(kl, [0.5])), tuple(rows))
