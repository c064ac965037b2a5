"""Generalised Jensen-Shannon divergence on selected rows: the loss, and its gradient with respect to the stored logits.

  m = beta q + (1 - beta) p,  0 < beta < 1                                      [nats]
  f[v] = log(p[v] / m[v]);  g[v] = log(q[v] / m[v]);  mean_slope = sum_v p[v] f[v]
  jsd = (1 - beta) mean_slope + beta sum_v q[v] g[v]
  d jsd / d logit[v] = (1 - beta) p[v] (f[v] - mean_slope)
  Source: arXiv:2306.13649, beta as there and in TRL; the whole vocabulary.

Shapes: N tokens, M selected rows, V vocabulary
  s, t        (N, V)    in   stored logits, fp32/bf16/fp16, unit stride along V
  rows        (M,)      in   row numbers in [0, N), each at most once; None: rows 0 .. M-1
  columns     (12, M)   in   score.py's columns of these rows
  sums        (2, M)    fp32 jsd, mean_slope: output of the loss, input of the gradient

Grid: (M,). Traffic: 2 V logits read by the loss.

Not here: the kernels and their launches (sums.py, gradient.py), normalisers (score.py).
Specification: the equations above, by autograd (tests/support/kernel_oracle.py). Tests: tests/kernels/test_jsd.py.
"""

# Numerics
#   With d = log p - log q + log((1 - beta) / beta),  f = -log(1 - beta) - log(1 + e^-d)  and
#   g = -log(beta) - log(1 + e^d); in base 2, both from one polynomial of 2^-|d|. d comes from stored
#   logits and normalisers, as in reverse_kl.py: it is exact where models are close. The constants -log(1 - beta) and
#   -log(beta) are replaced by the polynomial's own values at p = q. So f and g are exactly 0 there, and where they are
#   small the polynomial's error is relative. Rounding of d and 2^-|d|: 3e-7 at log p - log q = 1, for any beta.
#   Terms of either sign cancel within each sum, to KL(p || m) and KL(q || m); after that nothing cancels. An error e of
#   the difference of the normalisers moves the sums by beta e and -(1 - beta) e: the weights of the sums cancel it in the
#   loss, and f and mean_slope move alike in the gradient. The loss is clamped at 0.
#   Models that share no mass saturate: f and mean_slope agree, the true gradient vanishes, and rounding leaves
#   2e-7 (1 - beta) mean_slope of the weight.
#   Finite for all p and q: d is clamped to +-256, beyond which 2^-|d|, p or q is 0. So terms with p = 0, q = 0 or
#   both (d = inf - inf) are products of 0 and a finite number. NaN logits reach p or q, hence the loss, and
#   the gradient through mean_slope.

from functools import partial

import triton
import triton.language as tl

from . import gradient, sums
from .device import LN_2, _load_normalisers


@triton.jit
def _log2_one_plus(d):
    # log2(1 + 2^-|d|) = x (c0 + c1 x + ..), x = 2^-|d|: minimax on [0, 1]; error 5e-8, error of the slope 1e-5
    x = tl.exp2(tl.abs(d) * -1.0)  # triton 3.6 compiles a minus sign to one more subtraction
    series = tl.fma(x, -0.0093091251, tl.full(x.shape, 0.052058853, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, -0.13752113, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 0.24186459, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, -0.34730101, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 0.47868368, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, -0.72116578, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 1.4426899, tl.float32))
    return series * x


@triton.jit
def _mixture(norm, beta):
    # The normalisers, with the gap's constant changed so that _log2_probs returns d as the gap; and the constants a, c:
    # log2(p / m) = a - log2(1 + 2^-d) and log2(q / m) = c - log2(1 + 2^d) are exactly 0 where p = q.
    s_ref, s_log2z, t_ref, t_log2z, gap_log2z = norm
    d = tl.full((1,), 0.0, tl.float32) + (tl.log2(1.0 - beta) - tl.log2(beta))
    last = _log2_one_plus(d)
    a = tl.sum(last - tl.minimum(d, 0.0), 0)
    c = tl.sum(last + tl.maximum(d, 0.0), 0)
    return (s_ref, s_log2z, t_ref, t_log2z, gap_log2z - tl.sum(d, 0)), a, c


@triton.jit
def _jsd_sums_constants(norm, beta):
    norm, a, c = _mixture(norm, beta)
    return norm, (a, c)


@triton.jit
def _jsd_terms(p, q, d, constants, total_p, total_q):
    # sums of p f and q g, in bits
    a, c = constants
    last = _log2_one_plus(d)
    f = (a - last) + tl.minimum(d, 0.0)
    g = (c - last) - tl.maximum(d, 0.0)
    return tl.fma(p, f, total_p), tl.fma(q, g, total_q)


@triton.jit
def _jsd_results(total_p, total_q, beta):
    mean_slope = total_p * LN_2
    return tl.fma(1.0 - beta, mean_slope, beta * (total_q * LN_2)), mean_slope


@triton.jit
def _jsd_constants(score_ptr, sums_ptr, M, pid_m, beta):
    norm, a, _ = _mixture(_load_normalisers(score_ptr, M, pid_m), beta)
    mean_slope = tl.load(sums_ptr + M + pid_m) * 1.4426950408889634
    return norm, a - mean_slope, 1.4426950408889634, (1.0 - beta) * LN_2, False


@triton.jit
def _jsd_slope(log2_p, log2_q, gap, shift):
    # p (f - mean_slope) in bits: the constants make `gap` d
    d = tl.maximum(gap, -256.0)  # finite, also for NaN (both logits -inf): its product with p = 0 is 0
    return tl.exp2(log2_p) * ((shift - _log2_one_plus(d)) + tl.minimum(d, 0.0))


jsd_fwd = partial(sums.launch, _jsd_sums_constants, _jsd_terms, _jsd_results)
jsd_grad = partial(gradient.launch, _jsd_constants, _jsd_slope)
