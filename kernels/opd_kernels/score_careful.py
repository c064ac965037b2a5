"""The sweep of score.py for rows with NaN, an infinity, or a masked logit: slower, with a test of every logit.

  z = -inf where a logit is masked (device.py: _is_masked). Its exponent is VOID = -2^120, whose exponential is 0 and whose
  product with 0 is 0.
  alone = each model's largest z among the entries that the other model masks, -inf if there are none.
  KL(p||q) = +inf if p there is above 0 in fp64, and the same for KL(q||p) with q (score_sums.py: _write_columns).
  NaN (or +inf) makes that model's log-sum-exp and entropy and both KLs NaN. A row of -inf alone has log-sum-exp -inf and NaN
  for the other statistics.

Not here: rows of ordinary logits, group maxima (score.py).
"""

import triton
import triton.language as tl

from .device import FLOOR, VOID, _is_masked, _transform
from .score_sums import _add_pair, _join_lanes, _join_spread, _rescale, _spread_of
from .words import _columns


@triton.jit
def _load_masked(row_ptr, offs, last, pre, cap, CAP: tl.constexpr):
    # (LANES, WIDTH) z, -inf where masked and from `last` on
    x = tl.load(row_ptr + offs, mask=offs < last, other=float("-inf"))
    return tl.where(_is_masked(x, CAP) | (offs >= last), float("-inf"), _transform(x, pre, cap, CAP))


@triton.jit
def _clamped(z, k, ref):
    # x = k z - ref, at least VOID; NaN stays NaN
    return tl.maximum(tl.fma(z, k, -ref), VOID, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _careful_spread(zs, zt, total, k_s, ref_s, k_t, ref_t, WIDTH: tl.constexpr):
    # the mean and the sum of squares of d = x - y, by 2^x, of the entries that neither model masks
    top = tl.full(ref_s.shape, float("-inf"), tl.float32)
    offset = tl.zeros_like(ref_s)
    for i in tl.static_range(WIDTH):
        is_higher = (zs[i] > top) & (zt[i] > float("-inf"))
        top = tl.where(is_higher, zs[i], top)
        offset = tl.where(is_higher, _clamped(zs[i], k_s, ref_s) - _clamped(zt[i], k_t, ref_t), offset)
    sum_1 = tl.zeros_like(ref_s)
    sum_2 = tl.zeros_like(ref_s)
    for i in tl.static_range(WIDTH):
        x = _clamped(zs[i], k_s, ref_s)
        shared = (zs[i] > float("-inf")) & (zt[i] > float("-inf"))
        e = tl.where(shared, x - _clamped(zt[i], k_t, ref_t) - offset, 0.0)
        weighted = tl.exp2(x) * e
        sum_1 += weighted
        sum_2 = tl.fma(weighted, e, sum_2)
    return _spread_of(total, offset, sum_1, sum_2)


@triton.jit
def _careful_total(
    s_row, t_row, first, last, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    # the running values of the logits first .. last - 1; WIDTH logits a lane and iteration
    m_s = tl.full((LANES,), FLOOR, tl.float32)
    m_t = tl.full((LANES,), FLOOR, tl.float32)
    zero = tl.zeros((LANES,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    if VARIANCE:
        sums = sums + (zero, zero)
    alone_s = tl.full((LANES,), float("-inf"), tl.float32)
    alone_t = tl.full((LANES,), float("-inf"), tl.float32)
    for v in range(first, last, LANES * WIDTH):
        offs = v + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        zs = _columns(_load_masked(s_row, offs, last, pre_s, cap_s, CAP_S), WIDTH)
        zt = _columns(_load_masked(t_row, offs, last, pre_t, cap_t, CAP_T), WIDTH)
        old_ref_s = m_s * k_s
        old_ref_t = m_t * k_t
        for i in tl.static_range(WIDTH):
            alone_s = tl.maximum(alone_s, tl.where(zt[i] == float("-inf"), zs[i], float("-inf")))
            alone_t = tl.maximum(alone_t, tl.where(zs[i] == float("-inf"), zt[i], float("-inf")))
            m_s = tl.maximum(m_s, zs[i])
            m_t = tl.maximum(m_t, zt[i])
        ref_s = m_s * k_s
        ref_t = m_t * k_t
        c = (zero, zero, zero, zero, zero, zero)
        for i in tl.static_range(WIDTH):
            c = _add_pair(c, _clamped(zs[i], k_s, ref_s), _clamped(zt[i], k_t, ref_t))
        down_s = old_ref_s - ref_s
        down_t = old_ref_t - ref_t
        new_sums = _rescale(sums, down_s, down_t, c)
        if VARIANCE:
            block = _careful_spread(zs, zt, c[0], k_s, ref_s, k_t, ref_t, WIDTH)
            new_sums = new_sums + _join_spread((sums[6], sums[7]), sums[0], down_s, down_s - down_t, block, c[0])
        sums = new_sums
    return _join_lanes(m_s, m_t, sums, alone_s, alone_t, k_s, k_t, VARIANCE)
