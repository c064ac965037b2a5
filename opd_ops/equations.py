# Entropy, KL and log-sum-exp of whole rows, in the shortest torch that is right at p = 0, forward and backward.
#
#   H(p) = -sum p log p;  KL(a || b) = sum a (log a - log b);  0 log 0 = 0                                        [nats]
#
# The specification (backends/eager.py) and the divergences' own definitions (divergences/) are written in these.
# Not here: bounded memory (backends/running.py).
from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last dimension."""
    return -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the last dimension, never negative; a = 0 contributes 0, b = 0 under a > 0 gives +inf."""
    found = log_ratio_sum(log_a, log_b)
    # Rounding may take it below 0. There the value is 0, and the gradient that of the sum: a clamp would drop it.
    return torch.where(found < 0, found - found.detach(), found)


def log_ratio_sum(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) over the last dimension, of a and b that need not add up to 1: it may be negative."""
    absent = log_a == -math.inf
    # where() before the product: a zero weight times an infinite difference would be NaN, forward and backward.
    difference = torch.where(absent, 0, log_a) - torch.where(absent, 0, log_b)
    # a > 0 by definition wherever the difference is infinite, even if exp underflows.
    infinite = difference == math.inf
    return torch.where(infinite, math.inf, log_a.exp() * torch.where(infinite, 0, difference)).sum(-1)


def logsumexp(x: Tensor) -> Tensor:
    """log sum e^x over the last dimension, kept as one of size 1; -inf, with a gradient of 0, where all are -inf."""
    nothing = (x == -math.inf).all(-1, keepdim=True)
    return torch.logsumexp(torch.where(nothing, 0, x), -1, keepdim=True).masked_fill(nothing, -math.inf)
