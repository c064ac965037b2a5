"""Device helpers that two or more kernels share: the model's transform of a stored logit, the
logarithm of a ratio near one, and the integer key that orders logits.

A stored logit x stands for  softcap * tanh(scale * x / softcap) / T,  or  scale * x / T  without
soft-cap (LinearHead in opd_ops/inputs/linear_head.py). Kernels never form that number. They hold
  z = _transform(x)  and one multiplier  k,  so that  2^(k (z - z_ref)) = e^(logit - logit_ref):
  without soft-cap  z = x,                          k = scale * log2(e) / T
  with soft-cap     z = softcap * tanh(scale * x / softcap),  k = log2(e) / T

tanh makes a stored -inf the logit -softcap / T. Order is that of the stored logits either way.
Python floats may arrive as fp64 (torch.compile before 2.15), hence the casts.

Not here: kernels and launchers (score.py, support.py, argmax.py, reverse_kl.py, forward_kl.py, jsd.py, rest.py); block
sizes (launch_table.py).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))
# FLOOR is the running maximum of a lane that has seen nothing but -inf; VOID the exponent of -inf.
# Both are finite, so that their products with 0 are 0, and so far apart that the difference of two
# exponents exceeds VOID / 2 only where one of the two logits is -inf and the other is not.
FLOOR = tl.constexpr(-(2.0**90))
VOID = tl.constexpr(-(2.0**120))
# 2^x is 0 in fp64 below about this: a probability that small makes no divergence infinite.
LOG2_ZERO = tl.constexpr(-745.0 / math.log(2.0))


class Transform(NamedTuple):
    """How one model's stored logits become logits: the four numbers its kernels take."""

    k: float  # multiplier of z in the base-2 exponent
    pre: float  # scale / softcap, the argument of tanh; unused without soft-cap
    cap: float  # softcap; unused without soft-cap
    has_cap: bool


def transform(scale: float, softcap: float | None, temperature: float) -> Transform:
    assert min(scale, temperature) > 0, "order of the stored logits must be that of the logits"
    if softcap is None:
        return Transform(scale * LOG2_E / temperature, 0.0, 0.0, False)
    return Transform(LOG2_E / temperature, scale / softcap, float(softcap), True)


def row_step(table: torch.Tensor) -> tuple[int, int]:
    """The row stride in units, and the elements of a unit: 16 bytes where rows are so far apart, else 1.

    Triton sees for itself only that a stride is a multiple of 16 elements, twice or four times 16 bytes; without this a
    vocabulary of 32,008 would be read two bytes at a time.
    """
    unit = 16 // table.element_size()
    return (table.stride(0) // unit, unit) if table.stride(0) % unit == 0 else (table.stride(0), 1)


def rows_are_aligned(*tables: torch.Tensor) -> bool:
    """Can every row be read 16 bytes at a time?"""
    return all(row_step(x)[1] > 1 and x.data_ptr() % 16 == 0 for x in tables)


@triton.jit
def _transform(x, pre, cap, HAS_CAP: tl.constexpr):
    z = x.to(tl.float32)
    if HAS_CAP:
        # tanh(a) = (1 - e) / (1 + e) with e = 2^(-2.885 |a|) <= 1, where 1 - e is exact near a = 0:
        # five times the accuracy of 1 - 2 / (1 + e^2a). |error| < 2^-22 cap.
        a = tl.cast(pre, tl.float32) * z
        e = tl.exp2(-2.8853900817779268 * tl.abs(a))
        th = (1.0 - e) / (1.0 + e)
        z = tl.cast(cap, tl.float32) * tl.where(a < 0, -th, th)
    return z


@triton.jit
def _is_masked(x, HAS_CAP: tl.constexpr):
    # Stored logits of -inf, or as low as the library transformers writes for it (opd_ops/inputs/sources.py: mask_limit). A
    # soft-cap makes finite logits of them.
    limit = -(2.0**120)
    if x.dtype == tl.float16:
        limit = -65504.0
    if HAS_CAP:
        limit = float("-inf")
        return x.to(tl.float32) < limit
    return x.to(tl.float32) <= limit


@triton.jit
def _transform_slope(z, pre, cap, HAS_CAP: tl.constexpr):
    # dz/dx up to the factor that k already carries: 1 without soft-cap (k holds scale / T); with
    # it scale (1 - (z / cap)^2), scale = pre * cap.
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_CAP:
        cap = tl.cast(cap, tl.float32)
        slope = (tl.cast(pre, tl.float32) * cap) * (1.0 - (z / cap) * (z / cap))
    return slope


@triton.jit
def _log_ratio(a, b):
    # log(a / b) for a, b >= 0. log2 of the hardware has an absolute error of 2^-22 near one, as
    # large as the KL of two models that agree; there the series 2 atanh(w), w = (a - b)/(a + b),
    # is used: |w| < 0.2 keeps the dropped term 2 w^13/13 below 2^-32.
    w = (a - b) / (a + b)
    w2 = w * w
    series = 1.0 + w2 * (0.33333334 + w2 * (0.2 + w2 * (0.14285715 + w2 * (0.11111111 + w2 * 0.09090909))))
    return tl.where(tl.abs(w) < 0.2, 2.0 * w * series, (tl.log2(a) - tl.log2(b)) * LN_2)


@triton.jit
def _order_key(x, SHIFT: tl.constexpr):
    # int32 that orders as the float does, -0 and +0 being equal; the low SHIFT bits, which are
    # constant for the stored type, are dropped. NaN orders beyond the infinity of its sign.
    z = x.to(tl.float32)
    z = tl.where(z == 0.0, 0.0, z)
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _kth_key(keys, K, low, high):
    # The K-th largest of int32 keys, which lies in [low, high], by bisection: no sort, a count for each
    # binary digit of high - low.
    while low < high:
        middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
        enough = tl.sum((keys >= middle).to(tl.int32)) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _pick(keys, K, low, high):
    # The K largest of (A, B) keys, the K-th of which lies in [low, high], equal ones in row-major order first:
    # which they are, and their place 0 .. K-1 in that order. Both running counts share one scan: at most 2^15 keys.
    kth = _kth_key(keys, K, low, high)
    packed = (keys > kth).to(tl.int32) * 65536 + (keys == kth).to(tl.int32)
    in_row = tl.sum(packed, 1)
    counts = tl.cumsum(packed, 1) + (tl.cumsum(in_row, 0) - in_row)[:, None]
    missing = K - (tl.sum(in_row, 0) >> 16)
    level_count = counts & 0xFFFF
    place = (counts >> 16) + tl.minimum(level_count, missing) - 1
    return (packed > 1) | ((packed == 1) & (level_count <= missing)), place


@triton.jit
def _log2_prob(z, k, ref, log2z):
    # log2 softmax, from the reference and the log-normaliser of score.py
    return tl.fma(z - ref, k, tl.broadcast_to(-log2z, z.shape))


@triton.jit
def _log2_probs(s, t, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
                CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr):  # fmt: skip
    # log2 p, log2 q, the gap log2 p - log2 q, and dz/dx of the student, per token of a block. The references are
    # subtracted first, so that models that differ by a constant lose nothing.
    s_ref, s_log2z, t_ref, t_log2z, gap_log2z = norm
    z_s = _transform(s, pre_s, cap_s, CAP_S)
    z_t = _transform(t, pre_t, cap_t, CAP_T)
    if SAME_K:
        gap = tl.fma((z_s - s_ref) - (z_t - t_ref), k_s, tl.broadcast_to(-gap_log2z, z_s.shape))
    else:
        gap = ((z_s - s_ref) * k_s - (z_t - t_ref) * k_t) - gap_log2z
    log2_p = _log2_prob(z_s, k_s, s_ref, s_log2z)
    log2_q = _log2_prob(z_t, k_t, t_ref, t_log2z)
    return log2_p, log2_q, gap, _transform_slope(z_s, pre_s, cap_s, CAP_S)


@triton.jit
def _tokens(s, t, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
            CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr):  # fmt: skip
    # p, q, the gap log p - log q in nats, and dz/dx of the student, per token of a block
    log2_p, log2_q, gap, slope = _log2_probs(s, t, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm, CAP_S, CAP_T, SAME_K)
    return tl.exp2(log2_p), tl.exp2(log2_q), gap * LN_2, slope


@triton.jit
def _difference(p, q, gap):
    # p - q = -p expm1(-gap): by a polynomial good to 2^-22 where |gap| < 1/2, so that close models
    # lose no digits; elsewhere the subtraction is as good. Also right where p or q is 0.
    x = -gap
    series = tl.fma(x, 1.9841270e-4, tl.full(x.shape, 1.3888889e-3, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 8.3333333e-3, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 4.1666667e-2, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 0.16666667, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 0.5, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 1.0, tl.float32))
    return tl.where((tl.abs(gap) < 0.5) & (p > 0.0), -p * (x * series), p - q)


@triton.jit
def _likely_top(top_ptr, norm):
    # The row's top id if p > 1/2 there, else -1: of a flat row the sum of all others has more rounding than any entry.
    return tl.where(norm[1] < 1.0, tl.load(top_ptr), -1)


@triton.jit
def _store_top(out_row, top, dlogit, coef, z, pre, cap, HAS_CAP: tl.constexpr):
    # The gradient of the top id, if there is one, whose z is the row's reference: over what another thread stored there.
    slope = 1.0
    if HAS_CAP:
        cap = tl.cast(cap, tl.float32)
        slope = (tl.cast(pre, tl.float32) * cap) * (1.0 - (z / cap) * (z / cap))
    grad = tl.where(coef == 0.0, 0.0, dlogit * (coef * slope))
    tl.debug_barrier()
    tl.store(out_row + top, grad.to(out_row.dtype.element_ty), mask=top >= 0)


@triton.jit
def _load_normalisers(score_ptr, n, i):
    # s_ref, s_log2z, t_ref, t_log2z, log2z_gap of row i of score.py's (12, n) columns
    return (
        tl.load(score_ptr + 7 * n + i),
        tl.load(score_ptr + 8 * n + i),
        tl.load(score_ptr + 9 * n + i),
        tl.load(score_ptr + 10 * n + i),
        tl.load(score_ptr + 11 * n + i),
    )
