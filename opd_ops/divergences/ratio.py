"""Importance ratios: how the probability at sampling time weighs a position's loss.

  r = p(y) / mu(y),  y the sampled token, mu its probability when it was sampled, p its probability now
  is       w = r                                       the mean over y ~ mu of w times a function of y is its mean over y ~ p
  tis      w = clamp(r, low, high)                     (0, 2) as in slime; SDPO, arXiv 2601.20802, has min(r, 2)
  icepop   w = r, 0 outside of [low, high]             (0, 2) as in slime
  ppo      w = r, 0 where A > 0 and r > high, or A < 0 and r < low: where PPO's clipped objective has no gradient
                                                       (0.8, 1.28) as in slime; A is the token's advantage (sampled.py)
  w is a constant: it has no gradient.

Not here: log p(y) and log mu(y) of a call's positions (opd_ops/call/losses.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import check_choice, plain, real, shown

NONE = "none"
DEFAULT_BOUNDS = {"is": (0.0, math.inf), "tis": (0.0, 2.0), "icepop": (0.0, 2.0), "ppo": (0.8, 1.28)}


@dataclass(frozen=True)
class Ratio:
    """A rule that makes weights of ratios, with its bounds."""

    kind: str
    low: float
    high: float

    def weights(self, ratios: Tensor, advantages: Tensor | None) -> Tensor:
        """(M,) weights of the (M,) ratios. `advantages`: (M,), if the rule reads them."""
        if self.kind == "tis":
            return ratios.clamp(self.low, self.high)
        if self.kind == "icepop":
            return torch.where((ratios < self.low) | (ratios > self.high), 0, ratios)
        if self.kind == "ppo":
            assert advantages is not None
            clipped = ((advantages > 0) & (ratios > self.high)) | ((advantages < 0) & (ratios < self.low))
            return torch.where(clipped, 0, ratios)
        return ratios


def check_ratio(owner: str, kind: object, bounds: object, kinds: Sequence[str]) -> tuple[float, float] | None:
    """The bounds as Python's numbers, checked with their kind; None: the default of the kind."""
    check_choice(f"{owner}.ratio", kind, kinds)
    if bounds is None:
        return None
    name = f"{owner}.bounds"
    if kind not in ("tis", "icepop", "ppo"):
        raise ValueError(f"{name}: got {shown(bounds)}, but ratio {kind!r} has no bounds; leave them out")
    bounds = plain(bounds)
    pair = tuple(real(x) for x in bounds) if isinstance(bounds, Sequence) and not isinstance(bounds, str) else ()
    if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
        raise ValueError(f"{name}: got {shown(bounds)}, expected (low, high) with 0 <= low < high, like {DEFAULT_BOUNDS[kind]}")
    if kind == "ppo" and not pair[0] <= 1 <= pair[1]:
        raise ValueError(f"{name}: got {shown(bounds)}, expected 1 between them: on-policy tokens have ratio 1")
    return pair


def ratio_of(kind: str, bounds: tuple[float, float] | None) -> Ratio | None:
    """The rule of that name; None for "none"."""
    return None if kind == NONE else Ratio(kind, *(bounds or DEFAULT_BOUNDS[kind]))
