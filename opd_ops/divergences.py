# The losses that may be applied to the selected positions: one small class each, value and gradient.
#
#   reverse_kl   l = KL(p || q) = sum p (log p - log q)     dl/ds_v = p_v [(log p_v - log q_v) - l]
#   forward_kl   l = KL(q || p) = sum q (log q - log p)     dl/ds_v = p_v - q_v
#   s: student logits after temperature. arXiv 2605.26844 eq. 6; arXiv 2306.13649.
#
# Not here: the values, which are columns of TokenStats that every backend computes; the mean over positions (loss.py).
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence(ABC):
    """A divergence whose per-position value is a column of `TokenStats`, with its gradient in closed form."""

    name: ClassVar[str]
    column: ClassVar[str]

    @abstractmethod
    def dlogits(self, log_p: Tensor, log_ratio: Tensor, loss: Tensor) -> Tensor:
        """d loss / d student logits on any block of columns.

        Args:
            log_p: (M, B) the student's log-probabilities in the block; may be overwritten.
            log_ratio: (M, B) log p - log q, with the digits that subtracting the two would lose; may be overwritten.
            loss: (M, 1) the divergence itself, over the whole vocabulary.
        Returns: (M, B). Entries where p = 0 may hold anything: the caller sets them to zero.
        """


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher), mode-seeking; the default."""

    name = "reverse_kl"
    column = "reverse_kl"

    def dlogits(self, log_p: Tensor, log_ratio: Tensor, loss: Tensor) -> Tensor:
        return log_ratio.sub_(loss).mul_(log_p.exp_())


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student), mass-covering."""

    name = "forward_kl"
    column = "forward_kl"

    def dlogits(self, log_p: Tensor, log_ratio: Tensor, loss: Tensor) -> Tensor:
        # p - q = p (1 - e^-ratio) = -p expm1(-ratio) keeps its digits where the models agree, but overflows or loses
        # p's digits where q >> p: there it is the plain difference of the two exponentials.
        q = torch.exp(log_p - log_ratio)
        p = log_p.exp_()
        return torch.where(log_ratio > -1.0, -p * torch.expm1(-log_ratio), p - q)


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """sum w l over positions, 0-dim; weight 0 leaves a position out, whatever its loss."""
    return torch.where(weights == 0, 0, losses * weights).sum()


DIVERGENCES: dict[str, Divergence] = {d.name: d for d in (ReverseKL(), ForwardKL())}


def resolve_divergence(divergence: str | Divergence) -> Divergence:
    """A divergence by name (its defaults) or as it is; ValueError and TypeError list the known names."""
    if isinstance(divergence, Divergence):
        return divergence
    known = ", ".join(sorted(DIVERGENCES))
    if not isinstance(divergence, str):
        raise TypeError(f"divergence: got {type(divergence).__name__}, expected a Divergence or one of: {known}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: got {divergence!r}, expected one of: {known}")
    return DIVERGENCES[divergence]
