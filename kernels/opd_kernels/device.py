"""Helpers that two or more kernels share: what launchers demand of tensors, the transform from a stored logit to a logit, the
logarithm of a ratio near one, and the integer key that orders logits.

A stored logit x stands for the logit  softcap * tanh(scale * x / softcap) / T,  or  scale * x / T  without soft-cap
(LinearHead in opd_ops/inputs/linear_head.py). Kernels do not compute the logit. They compute
  z = _transform(x)  and use one multiplier  k,  so that  2^(k (z - z_ref)) = e^(logit - logit_ref):
  without soft-cap  z = x,                          k = scale * log2(e) / T
  with soft-cap     z = softcap * tanh(scale * x / softcap),  k = log2(e) / T

tanh turns a stored -inf into the logit -softcap / T. Logits have the order of stored logits in both cases.
Python floats may arrive as fp64 (torch.compile before 2.15), hence the casts.
A pointer to a row of a table is 16-byte aligned only for some numbers of positions. Where loads and stores stay the same,
`do_not_specialize_on_alignment` names it: Triton would compile the same code twice.

Not here: kernels and launchers (score.py, support.py, argmax.py, reverse_kl.py, forward_kl.py, jsd.py, skew_kl.py,
off_list.py, zero_rows.py, scale.py); block sizes (launch_table.py).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))
# FLOOR: the running maximum of a lane before its first finite logit. VOID: the exponent of -inf.
# Both are finite, so that their products with 0 are 0. They are far apart: the difference of two
# exponents exceeds |VOID| / 2 only where one of the two logits is -inf and the other is not.
FLOOR = tl.constexpr(-(2.0**90))
VOID = tl.constexpr(-(2.0**120))
# Below about this x, 2^x is 0 in fp64: a probability that small makes no divergence infinite.
LOG2_ZERO = tl.constexpr(-745.0 / math.log(2.0))


class Exp2Transform(NamedTuple):
    """How one model's stored logits become logits: the four numbers that kernels take."""

    k: float  # multiplier of z in the base-2 exponent
    pre: float  # scale / softcap, the argument of tanh; unused without soft-cap
    cap: float  # softcap; unused without soft-cap
    has_cap: bool


def transform(scale: float, softcap: float | None, temperature: float) -> Exp2Transform:
    """The kernels' numbers of one model."""
    assert min(scale, temperature) > 0, "order of the stored logits must be that of the logits"
    if softcap is None:
        return Exp2Transform(scale * LOG2_E / temperature, 0.0, 0.0, False)
    return Exp2Transform(LOG2_E / temperature, scale / softcap, float(softcap), True)


def row_step(table: torch.Tensor) -> tuple[int, int]:
    """The row stride in units, and the elements per unit: 16 bytes if the stride is a multiple of 16 bytes, else 1 element.

    Triton by itself only detects a stride that is a multiple of 16 elements, which are 32 or 64 bytes. Without units, a
    vocabulary of 32,008 would be read two bytes at a time.
    """
    unit = 16 // table.element_size()
    return (table.stride(0) // unit, unit) if table.stride(0) % unit == 0 else (table.stride(0), 1)


def rows_are_aligned(*tables: torch.Tensor) -> bool:
    """Whether every row can be read 16 bytes at a time."""
    return all(row_step(x)[1] > 1 and x.data_ptr() % 16 == 0 for x in tables)


def check_launch(table: torch.Tensor, **contiguous: torch.Tensor | None) -> None:
    """Refuse what kernels would read wrongly in silence: Triton launches on the current device, and kernels know no strides of
    the tensors that are given by name.
    """
    assert not table.is_cuda or table.get_device() == torch.cuda.current_device(), (
        f"got tensors on {table.device}, expected the current device, cuda:{torch.cuda.current_device()}; "
        f"launch inside torch.cuda.device({table.get_device()})"
    )
    for name, tensor in contiguous.items():
        assert tensor is None or tensor.is_contiguous(), f"{name}: got strides {tensor.stride()}, expected a contiguous tensor"


@triton.jit
def _transform(x, pre, cap, HAS_CAP: tl.constexpr):
    z = x.to(tl.float32)
    if HAS_CAP:
        # tanh(|a|) = (1 - e) / (1 + e) with e = 2^(-2.885 |a|) <= 1. 1 - e is exact near a = 0: five times
        # as accurate as 1 - 2 / (1 + e^2a). |error| < 2^-22 cap.
        a = tl.cast(pre, tl.float32) * z
        e = tl.exp2(-2.8853900817779268 * tl.abs(a))
        th = (1.0 - e) / (1.0 + e)
        z = tl.cast(cap, tl.float32) * tl.where(a < 0, -th, th)
    return z


@triton.jit
def _is_masked(x, HAS_CAP: tl.constexpr):
    # Whether a stored logit is -inf, or as low as the library transformers writes for -inf (opd_ops/inputs/sources.py:
    # mask_limit). A soft-cap makes such logits finite: then no logit is masked.
    limit = -(2.0**120)
    if x.dtype == tl.float16:
        limit = -65504.0
    if HAS_CAP:
        limit = float("-inf")
        return x.to(tl.float32) < limit
    return x.to(tl.float32) <= limit


@triton.jit
def _transform_slope(z, pre, cap, HAS_CAP: tl.constexpr):
    # dz/dx: 1 without soft-cap (k holds scale / T); with soft-cap scale (1 - (z / cap)^2), scale = pre * cap.
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_CAP:
        cap = tl.cast(cap, tl.float32)
        slope = (tl.cast(pre, tl.float32) * cap) * (1.0 - (z / cap) * (z / cap))
    return slope


@triton.jit
def _log_ratio(a, b):
    # log(a / b) for a, b >= 0. The hardware's log2 has an absolute error of 2^-22 near one, as large
    # as the KL of two models that agree. Near one the series 2 atanh(w), w = (a - b)/(a + b), is used:
    # with |w| < 0.2 the dropped term 2 w^13/13 is below 2^-32.
    w = (a - b) / (a + b)
    w2 = w * w
    series = 1.0 + w2 * (0.33333334 + w2 * (0.2 + w2 * (0.14285715 + w2 * (0.11111111 + w2 * 0.09090909))))
    return tl.where(tl.abs(w) < 0.2, 2.0 * w * series, (tl.log2(a) - tl.log2(b)) * LN_2)


@triton.jit
def _order_key(x, SHIFT: tl.constexpr):
    # int32 with the order of the float, -0 equal to +0. The low SHIFT bits, which are constant for
    # the stored type, are dropped. NaN orders beyond the infinity of its sign.
    z = x.to(tl.float32)
    z = tl.where(z == 0.0, 0.0, z)
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _kth_key(keys, K, low, high):
    # The K-th largest of int32 keys, by bisection of [low, high], which contains it: no sort, one count
    # for each binary digit of high - low.
    while low < high:
        middle = ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
        enough = tl.sum((keys >= middle).to(tl.int32)) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _pick(keys, K, low, high):
    # The K largest of (A, B) keys; [low, high] contains the K-th, and of equal keys the first in row-major order is
    # taken. Returns whether each key is taken, and its place 0 .. K-1 in row-major order of the taken keys. Both running
    # counts share one scan, 16 bits each: at most 2^15 keys.
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
    # log2 p, log2 q, the gap log2 p - log2 q, and dz/dx of the student, per id of a block. The references are
    # subtracted first: models that differ by a constant lose no digit.
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
def _likely_top(top_ptr, norm):
    # The row's top id if p > 1/2 there, else -1: in a flat row the sum of the others has more rounding than one entry.
    return tl.where(norm[1] < 1.0, tl.load(top_ptr), -1)


@triton.jit
def _block_of(top, n_full, BLOCK_V: tl.constexpr):
    # the full block that holds the id; n_full if none does, or if top is -1
    return tl.where(top < 0, n_full, tl.minimum(top // BLOCK_V, n_full))


@triton.jit
def _store_zeros(out_row, first, W, BLOCK_V: tl.constexpr):
    # zeros in the columns first .. W-1
    lane = tl.arange(0, BLOCK_V)
    for v in range(first, W, BLOCK_V):
        tl.store(out_row + (v + lane), tl.zeros((BLOCK_V,), out_row.dtype.element_ty), mask=v + lane < W)


@triton.jit
def _store_top(out_row, top, dlogit, coef, z, pre, cap, HAS_CAP: tl.constexpr):
    # Stores the gradient of the top id (top >= 0), over the value that another thread stored there; z: the row's reference.
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
