"""Forward KL on selected rows: the two functions of its gradient.

  g[v] = log p[v] - log q[v];  kl = -sum_v q[v] g[v]                            [nats]
  d kl / d logit[v] = p[v] - q[v]
  Source: arXiv:2306.13649 (forward KL); the whole vocabulary.

Numerics
  p - q = -p expm1(-g). Where |g| < 1/46, two terms of the series give expm1 to 8e-5 of itself at most, and to 2e-6 at a
  tenth of that; close models lose no digits. Elsewhere p - q itself is exact to 8e-5 or better.
  p = 0 has a gradient of -q: finite, though kl is then +inf.

Not here: shapes, the kernel and its launch (gradient.py), reverse KL (reverse_kl.py).
"""

from functools import partial

import triton
import triton.language as tl

from . import gradient
from .device import _load_normalisers

CLOSE = tl.constexpr(2.0**-5)  # bits between log p and log q: below, p - q is computed by a series


@triton.jit
def _forward_kl_constants(score_ptr, sums_ptr, M, pid_m, beta):
    return _load_normalisers(score_ptr, M, pid_m), 0.0, 1.0, 1.0, False


@triton.jit
def _forward_kl_slope(log2_p, log2_q, gap, shift):
    # p - q
    p = tl.exp2(log2_p)
    # -expm1(-g) in bits: g' (ln 2 - (ln 2)^2 g' / 2)
    series = tl.fma(gap, -0.24022650695910072, tl.full(gap.shape, 0.6931471805599453, tl.float32))
    return tl.where(tl.abs(gap) < CLOSE, p * (gap * series), p - tl.exp2(log2_q))


forward_kl_grad = partial(gradient.launch, _forward_kl_constants, _forward_kl_slope)
