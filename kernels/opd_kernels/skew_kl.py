"""Skew KL on selected rows: the loss, and its gradient with respect to the stored logits.

  reverse  KL(p || m), m = (1 - alpha) q + alpha p:  slope f' = log(p / m) - alpha (p / m - 1)
  forward  KL(q || m), m = alpha q + (1 - alpha) p:  slope f' = -(1 - alpha) (q / m - 1)
  sums[0] = the loss, sums[1] = mean_slope = sum_v p[v] f'[v];  d loss / d logit[v] = p[v] (f'[v] - mean_slope)      [nats]
  Source: arXiv:2402.03898; f' up to a constant, so that it is 0 where p = q.

Shapes, grid and traffic: as of jsd.py, whose polynomial gives log(p / m) and log(q / m); `beta` is the teacher's share of m.
  p / m - 1 and q / m - 1 are powers of 2 less 1: an error of 1e-7 next to a slope of |log p - log q|.

Not here: the kernels and their launches (sums.py, gradient.py).
Specification: opd_ops/divergences/bounded.py. Tests: tests/kernels/test_skew_kl.py.
"""

from functools import partial

import triton
import triton.language as tl

from . import gradient, sums
from .device import LN_2, _load_normalisers
from .jsd import _jsd_sums_constants, _log2_one_plus, _mixture


@triton.jit
def _reverse_slope(d, a, own):
    # f' in nats; own: alpha, the student's share of m
    f = (a - _log2_one_plus(d)) + tl.minimum(d, 0.0)
    return f, f * LN_2 - own * (tl.exp2(f) - 1.0)


@triton.jit
def _forward_slope(d, c, own):
    # f' in nats; own: 1 - alpha, the student's share of m
    g = (c - _log2_one_plus(d)) - tl.maximum(d, 0.0)
    return g, own * (1.0 - tl.exp2(g))


@triton.jit
def _sums_constants(norm, beta):
    norm, shifts = _jsd_sums_constants(norm, beta)
    return norm, (shifts[0], shifts[1], 1.0 - beta)


@triton.jit
def _reverse_skew_terms(p, q, d, constants, total_p, total_q):
    f, slope = _reverse_slope(d, constants[0], constants[2])
    return tl.fma(p, f, total_p), tl.fma(p, slope, total_q)


@triton.jit
def _forward_skew_terms(p, q, d, constants, total_p, total_q):
    g, slope = _forward_slope(d, constants[1], constants[2])
    return tl.fma(q, g, total_p), tl.fma(p, slope, total_q)


@triton.jit
def _skew_results(total_p, total_q, beta):
    return total_p * LN_2, total_q


@triton.jit
def _reverse_skew_constants(score_ptr, sums_ptr, M, pid_m, beta):
    norm, a, _ = _mixture(_load_normalisers(score_ptr, M, pid_m), beta)
    return norm, (a, tl.load(sums_ptr + M + pid_m), 1.0 - beta), 1.0, 1.0, False


@triton.jit
def _forward_skew_constants(score_ptr, sums_ptr, M, pid_m, beta):
    norm, _, c = _mixture(_load_normalisers(score_ptr, M, pid_m), beta)
    return norm, (c, tl.load(sums_ptr + M + pid_m), 1.0 - beta), 1.0, 1.0, False


@triton.jit
def _reverse_skew_slope(log2_p, log2_q, gap, shift):
    # p (f' - mean_slope); d is finite, also for NaN (both logits -inf): its product with p = 0 is 0
    _, slope = _reverse_slope(tl.clamp(gap, -256.0, 256.0), shift[0], shift[2])
    return tl.exp2(log2_p) * (slope - shift[1])


@triton.jit
def _forward_skew_slope(log2_p, log2_q, gap, shift):
    _, slope = _forward_slope(tl.clamp(gap, -256.0, 256.0), shift[0], shift[2])
    return tl.exp2(log2_p) * (slope - shift[1])


reverse_skew_fwd = partial(sums.launch, _sums_constants, _reverse_skew_terms, _skew_results)
forward_skew_fwd = partial(sums.launch, _sums_constants, _forward_skew_terms, _skew_results)
reverse_skew_grad = partial(gradient.launch, _reverse_skew_constants, _reverse_skew_slope)
forward_skew_grad = partial(gradient.launch, _forward_skew_constants, _forward_skew_slope)
