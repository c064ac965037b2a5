"""Reverse KL on selected rows: the two functions of its gradient.

  g[v] = log p[v] - log q[v];  kl = sum_v p[v] g[v]                             [nats]
  d kl / d logit[v] = p[v] (g[v] - kl)
  Source: arXiv:2605.26844, eq. 6; the whole vocabulary.

Numerics
  kl is known from the score. It enters as a constant, in one rounding with the difference of the normalisers.
  p = 0 gives a gradient of 0, before any product (0 * inf). A row with kl = +inf has no finite gradient: it gets zeros.

Not here: shapes, the kernel and its launch (gradient.py), forward KL (forward_kl.py).
"""

from functools import partial

import triton
import triton.language as tl

from . import gradient
from .device import LN_2, _load_normalisers


@triton.jit
def _reverse_kl_constants(score_ptr, sums_ptr, M, pid_m, beta):
    s_ref, s_log2z, t_ref, t_log2z, gap_log2z = _load_normalisers(score_ptr, M, pid_m)
    kl = tl.load(score_ptr + 5 * M + pid_m)
    norm = (s_ref, s_log2z, t_ref, t_log2z, gap_log2z + kl * 1.4426950408889634)
    return norm, 0.0, 1.4426950408889634, LN_2, kl == float("inf")


@triton.jit
def _reverse_kl_slope(log2_p, log2_q, gap, shift):
    # p (g - kl) in bits: the constants make `gap` g - kl
    p = tl.exp2(log2_p)
    return tl.where(p == 0.0, 0.0, p * gap)


reverse_kl_grad = partial(gradient.launch, _reverse_kl_constants, _reverse_kl_slope)
