"""The running sums of one row of two models: how they follow a higher reference, how lanes are joined, and the columns.

  Running values of a lane or a row, relative to references r_s = k_s m_s and r_t = k_t m_t (device.py defines k and z):
    m_s, m_t   the largest z       sums = sum 2^x, sum 2^y, sum 2^x x, sum 2^y y, sum 2^x (x - y), sum 2^y (x - y)
    x = k_s z_s - r_s,  y = k_t z_t - r_t
  and two more numbers that are joined by their maximum (score.py and score_careful.py say which). With VARIANCE the sums have
  two more: the mean of d = x - y by 2^x, and sum 2^x (d - mean)^2. Within a block d is relative to d at the lane's largest x:
  the square that is subtracted is then at most the result times the number of the lane's logits. Blocks, lanes and parts are
  joined by Chan's rule, which subtracts nothing.
  With p = 2^x / sum 2^x:  E_p[x - y] is s - t in base 2, minus the references' difference, so that
    KL(p||q) = ln 2 E_p[x - y] - log(sum 2^x / sum 2^y),
  and both terms are as small as the models are close. Rounding may leave -1e-7; it is clamped to 0.

Columns for later kernels: the exact maximum z_ref and log2 sum 2^(k (z - z_ref)) give log p to 1e-7; a rounded
log-sum-exp of size 300 would not. log2z_gap is s_log2z - t_log2z without their rounding: it gives log p - log q of
close models.

Not here: the sweeps over the vocabulary (score.py, score_careful.py).
"""

import triton
import triton.language as tl

from .device import LN_2, LOG2_ZERO, _log_ratio

N_PARTIALS = tl.constexpr(10)  # running values of a part of a row, without the variance's
N_SPREAD = tl.constexpr(2)  # the variance's: a mean, and a sum of squares
TINY = tl.constexpr(1e-37)  # a divisor in the place of a sum that is 0


@triton.jit
def _add_pair(sums, x, y):
    # the sums with one more pair of exponents
    p = tl.exp2(x)
    q = tl.exp2(y)
    d = x - y
    return (
        sums[0] + p,
        sums[1] + q,
        tl.fma(p, x, sums[2]),
        tl.fma(q, y, sums[3]),
        tl.fma(p, d, sums[4]),
        tl.fma(q, d, sums[5]),
    )


@triton.jit
def _rescale(sums, down_s, down_t, c):
    # sums relative to references higher by -down_s and -down_t, plus c, which are relative to these already
    a_s = tl.exp2(down_s)
    a_t = tl.exp2(down_t)
    shift = down_s - down_t
    return (
        tl.fma(a_s, sums[0], c[0]),
        tl.fma(a_t, sums[1], c[1]),
        tl.fma(a_s, tl.fma(sums[0], down_s, sums[2]), c[2]),
        tl.fma(a_t, tl.fma(sums[1], down_t, sums[3]), c[3]),
        tl.fma(a_s, tl.fma(sums[0], shift, sums[4]), c[4]),
        tl.fma(a_t, tl.fma(sums[1], shift, sums[5]), c[5]),
    )


@triton.jit
def _spread_of(total, offset, first, second):
    # the mean and the sum of squares of a block, from sum 2^x, and sums of 2^x e and 2^x e^2 with e = d - offset
    mean = first / tl.maximum(total, TINY)
    return offset + mean, tl.maximum(second - mean * first, 0.0)


@triton.jit
def _join_spread(spread, old_sum, down_s, shift, block, block_sum):
    # Chan's rule: `spread`, relative to references higher by -down_s (d: to a difference higher by -shift), with a block's
    weight = tl.exp2(down_s) * old_sum
    block_mean, block_squares = block
    mean = tl.where(weight > 0.0, spread[0] + shift, block_mean)
    share = block_sum / tl.maximum(weight + block_sum, TINY)
    step = block_mean - mean
    squares = tl.fma(tl.exp2(down_s), spread[1], block_squares)
    return tl.fma(step, share, mean), tl.fma((step * (weight * share)), step, squares)


@triton.jit
def _max_of_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def _sum_of_6(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def _join_lanes(m_s, m_t, sums, more_s, more_t, k_s, k_t, VARIANCE: tl.constexpr):
    # (LANES,) running values of one row -> the ten of the whole row (twelve with VARIANCE), scalars. One reduction for all
    # maxima and one for all sums: each costs its barriers once.
    top_s, top_t, more_s, more_t = tl.reduce((m_s, m_t, more_s, more_t), 0, _max_of_4)
    zero = tl.zeros_like(m_s)
    scaled = _rescale(sums, m_s * k_s - top_s * k_s, m_t * k_t - top_t * k_t, (zero, zero, zero, zero, zero, zero))
    total = tl.reduce(scaled, 0, _sum_of_6)
    row = top_s, top_t, total[0], total[1], total[2], total[3], total[4], total[5], more_s, more_t
    if VARIANCE:
        down_s = m_s * k_s - top_s * k_s
        shift = down_s - (m_t * k_t - top_t * k_t)
        mean = total[4] / tl.maximum(total[0], TINY)
        step = tl.where(scaled[0] > 0.0, sums[6] + shift - mean, 0.0)
        squares = tl.sum(tl.fma(scaled[0] * step, step, tl.exp2(down_s) * sums[7]), 0)
        row = row + (mean, squares)
    return row


@triton.jit
def _write_columns(out_ptr, stride, variance_ptr, total, k_s, k_t, VARIANCE: tl.constexpr):
    # `total`: of a row; its ninth and tenth: each model's largest z among the entries that the other model masks, -inf if none.
    top_s, top_t, sum_s, sum_t, x_s, x_t = total[0], total[1], total[2], total[3], total[4], total[5]
    gap_s, gap_t, alone_s, alone_t = total[6], total[7], total[8], total[9]
    ref_s = top_s * k_s
    ref_t = top_t * k_t
    log_zs = _log_ratio(sum_s, 1.0)
    log_zt = _log_ratio(sum_t, 1.0)
    dz = _log_ratio(sum_s, sum_t)
    NAN = float("nan")
    INF = float("inf")
    both = (sum_s > 0.0) & (sum_t > 0.0)  # false for NaN too
    reverse = (gap_s / sum_s) * LN_2 - dz
    forward = dz - (gap_t / sum_t) * LN_2
    reverse = tl.maximum(reverse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    forward = tl.maximum(forward, 0.0, propagate_nan=tl.PropagateNan.ALL)
    log2_p = (alone_s * k_s - ref_s) - log_zs * 1.4426950408889634
    log2_q = (alone_t * k_t - ref_t) - log_zt * 1.4426950408889634
    reverse = tl.where(both, tl.where((log2_p > LOG2_ZERO) & (reverse == reverse), INF, reverse), NAN)
    forward = tl.where(both, tl.where((log2_q > LOG2_ZERO) & (forward == forward), INF, forward), NAN)
    if VARIANCE:
        is_infinite = (log2_p > LOG2_ZERO) & (sum_s == sum_s) & (sum_t == sum_t)
        variance = tl.where(is_infinite, INF, (total[11] / sum_s) * (LN_2 * LN_2))
        tl.store(variance_ptr, tl.where(both, variance, NAN))
    ent_s = tl.maximum(log_zs - (x_s / sum_s) * LN_2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    ent_t = tl.maximum(log_zt - (x_t / sum_t) * LN_2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr, ref_s * LN_2 + log_zs)
    tl.store(out_ptr + stride, ref_t * LN_2 + log_zt)
    tl.store(out_ptr + 2 * stride, (ref_s - ref_t) * LN_2 + dz)
    tl.store(out_ptr + 3 * stride, ent_s)
    tl.store(out_ptr + 4 * stride, ent_t)
    tl.store(out_ptr + 5 * stride, reverse)
    tl.store(out_ptr + 6 * stride, forward)
    # The sums are relative to k top rounded to fp32, but a later kernel subtracts top itself: log2z is corrected.
    rounding_s = tl.fma(top_s, k_s, -ref_s)
    rounding_t = tl.fma(top_t, k_t, -ref_t)
    tl.store(out_ptr + 7 * stride, top_s)
    tl.store(out_ptr + 8 * stride, log_zs * 1.4426950408889634 - rounding_s)
    tl.store(out_ptr + 9 * stride, top_t)
    tl.store(out_ptr + 10 * stride, log_zt * 1.4426950408889634 - rounding_t)
    tl.store(out_ptr + 11 * stride, dz * 1.4426950408889634 - (rounding_s - rounding_t))
