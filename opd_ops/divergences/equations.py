"""Entropy, KL and log-sum-exp of whole rows: short torch that is exact at p = 0 and p near 1, forward and backward.

  H(p) = -sum p log p;  KL(a || b) = sum a (log a - log b), for measures + b - a;  0 log 0 = 0                  [nats]
  In every dtype a counts as 0 where e^{log a} is 0 in fp64: there b = 0 does not make the KL infinite.
  log m, m = w q + (1 - w) p, and log(p / m), which is exact where p and q agree; so is p^alpha - q^alpha

The specification (backends/eager.py) and the divergences (divergences/) use these functions.
Not here: bounded memory (backends/streamed/running.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_ZERO = -745.0  # e^x is 0 in fp64 below about this
RELEASED_FLOOR = 1e-12  # probability that TA's released code takes for an id missing from a list
LEAST_LISTED = -745.0  # log of the smallest fp64 number: below, p is 0 in TA's released code and the id is not listed


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p over the last dimension."""
    return -(log_p.exp() * log_p).masked_fill(log_p == -math.inf, 0).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the last dimension, never negative; a = 0 adds 0; b = 0 with a > 0 gives +inf."""
    return _not_negative(log_ratio_sum(log_a, log_b))


def mass_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) + b - a: the KL of two measures, which need not add up to 1; never negative, 0 where they agree."""
    return _not_negative(log_ratio_sum(log_a, log_b) + (log_b.exp() - log_a.exp()).sum(-1))


def _not_negative(total: Tensor) -> Tensor:
    # Rounding may make a sum negative. Then the value is 0 with the gradient of the sum; a clamp would drop the gradient.
    return torch.where(total < 0, total - total.detach(), total)


def log_ratio_sum(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) over the last dimension; a and b need not add up to 1, so the sum may be negative."""
    return log_ratio_terms(log_a, log_b).sum(-1)


def log_ratio_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), entry by entry."""
    absent = log_a < LOG_ZERO
    # Zeros before the product: a zero weight times an infinite difference would be NaN, forward and backward.
    difference = log_a.masked_fill(absent, 0) - log_b.masked_fill(absent, 0)
    # a > 0 wherever the difference is infinite, even if exp underflows in this dtype.
    infinite = difference == math.inf
    return (log_a.exp() * difference.masked_fill(infinite, 0)).masked_fill(infinite, math.inf)


def log_mixture(log_p: Tensor, log_q: Tensor, q_share: float) -> Tensor:
    """log(q_share q + (1 - q_share) p), q_share in (0, 1); any number where p = q = 0."""
    both_masked = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp has a NaN gradient there
    p, q = log_p.masked_fill(both_masked, 0), log_q.masked_fill(both_masked, 0)
    return torch.logaddexp(q + math.log(q_share), p + math.log1p(-q_share))


def log_over_mixture(log_ratio: Tensor, own: float) -> Tensor:
    """log(p/m), m = own p + (1 - own) q, from log p - log q; 0 where the models agree, -inf where p = 0 < q."""
    # -log(own + (1 - own) e^-ratio), by log1p where the models agree and m is nearly p
    near = -torch.log1p((1 - own) * torch.expm1(-log_ratio.clamp_min(-1.0)))
    far = -torch.logaddexp(torch.full_like(log_ratio, math.log(own)), math.log1p(-own) - log_ratio)
    return torch.where(log_ratio > -1.0, near, far)


def power_difference(log_p: Tensor, log_ratio: Tensor, alpha: float) -> Tensor:
    """p^alpha - q^alpha from log p and log p - log q; any value where p = 0."""
    # by expm1, relative to the larger of the two
    relative = torch.expm1(log_ratio.abs().mul_(-alpha)).mul_(-log_ratio.sign())
    return relative.mul_((log_p - log_ratio.clamp_max(0)).mul_(alpha).exp_())


def logsumexp(x: Tensor) -> Tensor:
    """log sum e^x over the last dimension, which becomes size 1; -inf with gradient 0 where all x are -inf."""
    all_masked = (x == -math.inf).all(-1, keepdim=True)
    return torch.logsumexp(x.masked_fill(all_masked, 0), -1, keepdim=True).masked_fill(all_masked, -math.inf)


def relative_to_top(x: Tensor) -> Tensor:
    """(n, V) logits minus the row's largest logit, which becomes the constant 0.

    No loss depends on a constant added to a row. The largest logit's gradient becomes minus the sum of the others'
    gradients, and so keeps its digits where p is near 1.
    """
    top = x.argmax(1, keepdim=True)
    largest = x.gather(1, top)
    is_masked = largest == -math.inf
    zero = torch.where(is_masked, -math.inf, largest.detach() * 0)  # NaN stays NaN
    return (x - largest.masked_fill(is_masked, 0)).scatter(1, top, zero)


def ratio_variance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Var_p[log p - log q] over the last dimension; p = 0 adds 0; q = 0 with p > 0 gives +inf."""
    absent = log_p < LOG_ZERO
    log_ratio = log_p.masked_fill(absent, 0) - log_q.masked_fill(absent, 0)
    mean = (log_p.exp() * log_ratio).sum(-1, keepdim=True)
    variance = (log_p.exp() * (log_ratio - mean).square()).sum(-1)
    return variance.masked_fill((log_ratio == math.inf).any(-1), math.inf)


def topk_entropy(log_p: Tensor) -> Tensor:
    """(n,) entropy of (n, K) log-probabilities over a list, divided by the log of the number of ids with p > 0."""
    length = (log_p > LEAST_LISTED).sum(-1).clamp_min(2)
    return entropy(log_p) / length.to(log_p.dtype).log()
