"""The sweep of score.py for rows with NaN, an infinity, or a masked logit: slower, with a test of every logit.

  A masked logit (device.py: _is_masked) gets the exponent VOID = -2^120: its exponential is 0, and its product with 0 is 0.
  alone = each model's largest z among the entries that the other model masks, -inf if there are none.
  KL(p||q) = +inf if p there is above 0 in fp64, and the same for KL(q||p) with q (score_sums.py: _write_columns).
  NaN (or +inf) makes that model's log-sum-exp and entropy and both KLs NaN. A row of -inf alone has log-sum-exp -inf and NaN
  for the other statistics.

Not here: rows of ordinary logits, group maxima (score.py).
"""

import triton
import triton.language as tl

from .device import FLOOR, VOID, _is_masked, _transform
from .score_sums import _join_lanes, _rescale


@triton.jit
def _careful_exponents(z, masked, k, ref):
    # x = k z - ref, (LANES, WIDTH); NaN stays NaN, and no product overflows
    x = tl.fma(z, k, tl.broadcast_to(-ref[:, None], z.shape))
    return tl.where(masked, VOID, tl.maximum(x, VOID, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _careful_total(
    s_row, t_row, first, last, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # the ten running values of the logits first .. last - 1; WIDTH logits a lane and iteration
    m_s = tl.full((LANES,), FLOOR, tl.float32)
    m_t = tl.full((LANES,), FLOOR, tl.float32)
    zero = tl.zeros((LANES,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    alone_s = tl.full((LANES,), float("-inf"), tl.float32)
    alone_t = tl.full((LANES,), float("-inf"), tl.float32)
    for v in range(first, last, LANES * WIDTH):
        offs = v + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        s = tl.load(s_row + offs, mask=offs < last, other=float("-inf"))
        t = tl.load(t_row + offs, mask=offs < last, other=float("-inf"))
        s_masked = _is_masked(s, CAP_S) | (offs >= last)
        t_masked = _is_masked(t, CAP_T) | (offs >= last)
        z_s = _transform(s, pre_s, cap_s, CAP_S)
        z_t = _transform(t, pre_t, cap_t, CAP_T)
        alone_s = tl.maximum(alone_s, tl.max(tl.where(t_masked & (s_masked == 0), z_s, float("-inf")), 1))
        alone_t = tl.maximum(alone_t, tl.max(tl.where(s_masked & (t_masked == 0), z_t, float("-inf")), 1))
        o_s, o_t = m_s, m_t
        m_s = tl.maximum(m_s, tl.max(tl.where(s_masked, float("-inf"), z_s), 1))
        m_t = tl.maximum(m_t, tl.max(tl.where(t_masked, float("-inf"), z_t), 1))
        x = _careful_exponents(z_s, s_masked, k_s, m_s * k_s)
        y = _careful_exponents(z_t, t_masked, k_t, m_t * k_t)
        p = tl.exp2(x)
        q = tl.exp2(y)
        d = x - y
        c = tl.sum(p, 1), tl.sum(q, 1), tl.sum(p * x, 1), tl.sum(q * y, 1), tl.sum(p * d, 1), tl.sum(q * d, 1)
        sums = _rescale(sums, o_s * k_s - m_s * k_s, o_t * k_t - m_t * k_t, c)
    return _join_lanes(m_s, m_t, sums, alone_s, alone_t, k_s, k_t)
