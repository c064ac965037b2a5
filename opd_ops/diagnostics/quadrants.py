"""TIP's quadrants: tokens by the student's entropy and by its disagreement with the teacher.

  Q1: entropy high, KL high    Q2: entropy high, KL low    Q3: entropy low, KL high (overconfident)    Q4: both low
  entropy = H(p), KL = KL(p || q) in nats; high: above the median of the measured positions.
  (arXiv 2604.14084 section 3 names them without thresholds; the released code of arXiv 2605.26844 splits at the medians.)

Not here: selectors made of the same two (opd_ops/selection/selectors.py: tip, overconfident), the map as a picture (plots.py).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.fixed_context import gain
from opd_ops.diagnostics.intervals import Interval, mean_intervals

NAMES = ("Q1", "Q2", "Q3", "Q4")
MEANINGS = ("unsure, disagrees", "unsure, agrees", "sure, disagrees: overconfident", "sure, agrees")
MOST_TOKENS = 8  # most frequent ones to name


@dataclass(frozen=True)
class Quadrant:
    """One of the four."""

    name: str
    meaning: str  # of the student
    n: int
    share_of_tokens: float
    share_of_kl: float  # of the sum of KL(p || q); NaN if that is 0
    gain: Interval | None  # mean G; None without a trained student
    frequent: tuple[tuple[str, int], ...]  # the most frequent tokens and how often they are there


@dataclass(frozen=True)
class Quadrants:
    """All four, and where they meet."""

    entropy_median: float  # nats
    kl_median: float  # nats
    quadrants: tuple[Quadrant, ...]


def quadrant_numbers(entropy: Tensor, kl: Tensor) -> Tensor:
    """(N,) 0 to 3 for Q1 to Q4, of (N,) entropies and KLs; a value at the median is low."""
    return 2 * (entropy <= entropy.quantile(0.5)).long() + (kl <= kl.quantile(0.5)).long()


def quadrants(contexts: Contexts, *, weights: Tensor | None) -> Quadrants:
    """The quadrants of the measured positions; `weights` (R, C) of `draw_weights` for the gains, None without them."""
    measured = contexts.measured
    entropy, kl = (x[measured].double() for x in (contexts.before.student_entropy, contexts.before.reverse_kl))
    number = quadrant_numbers(entropy, kl)
    among = number.unsqueeze(1) == torch.arange(len(NAMES))
    gains: list[Interval] | list[None] = [None] * len(NAMES)
    if weights is not None:
        gains = mean_intervals(gain(contexts), among, contexts.measured_clusters, weights)
    texts = [contexts.tokens[row][i] for row, i in measured.nonzero().tolist()]
    total = float(kl.sum())
    found = []
    for i, (name, meaning) in enumerate(zip(NAMES, MEANINGS, strict=True)):
        inside = among[:, i]
        n, sum_ = int(inside.sum()), float(kl[inside].sum())
        frequent = Counter(text for text, is_in in zip(texts, inside.tolist(), strict=True) if is_in)
        share = sum_ / total if total > 0 else math.nan
        found.append(Quadrant(name, meaning, n, n / len(kl), share, gains[i], tuple(frequent.most_common(MOST_TOKENS))))
    return Quadrants(float(entropy.quantile(0.5)), float(kl.quantile(0.5)), tuple(found))
