"""Entropy, KL and log-sum-exp of whole rows, in the shortest torch that is right at p = 0, forward and backward.

  H(p) = -sum p log p;  KL(a || b) = sum a (log a - log b);  0 log 0 = 0                                        [nats]
  a is 0 where e^{log a} is 0 in fp64, whatever the dtype: only above that does b = 0 make the KL infinite.

The specification (backends/eager.py) and the divergences' own definitions (divergences/) are written in these.
Not here: bounded memory (backends/streamed/running.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_ZERO = -745.0  # e^x is 0 in fp64 below about this


RELEASED_FLOOR = 1e-12  # what the released TA code puts for an id missing from a list
LEAST_LISTED = -745.0  # log of the smallest fp64 number: below, the released TA code's p is 0 and the id is not listed


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last dimension."""
    return -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the last dimension, never negative; a = 0 contributes 0, b = 0 under a > 0 gives +inf."""
    total = log_ratio_sum(log_a, log_b)
    # Rounding may take it below 0. There the value is 0, and the gradient that of the sum: a clamp would drop it.
    return torch.where(total < 0, total - total.detach(), total)


def log_ratio_sum(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) over the last dimension, of a and b that need not add up to 1: it may be negative."""
    absent = log_a < LOG_ZERO
    # where() before the product: a zero weight times an infinite difference would be NaN, forward and backward.
    difference = torch.where(absent, 0, log_a) - torch.where(absent, 0, log_b)
    # a > 0 wherever the difference is infinite, even if exp underflows in this dtype.
    infinite = difference == math.inf
    return torch.where(infinite, math.inf, log_a.exp() * torch.where(infinite, 0, difference)).sum(-1)


def logsumexp(x: Tensor) -> Tensor:
    """log sum e^x over the last dimension, kept as one of size 1; -inf, with a gradient of 0, where all are -inf."""
    nothing = (x == -math.inf).all(-1, keepdim=True)
    return torch.logsumexp(torch.where(nothing, 0, x), -1, keepdim=True).masked_fill(nothing, -math.inf)


def topk_entropy(listed: Tensor) -> Tensor:
    """(n,) entropy of the softmax over a list's (n, K) logits, over the log of how many ids have a probability there."""
    log_p = torch.log_softmax(listed, -1)
    length = (log_p > LEAST_LISTED).sum(-1).clamp_min(2)
    return entropy(log_p) / length.to(log_p.dtype).log()
