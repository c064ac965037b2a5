"""Forward KL on selected rows: its gradient with respect to the stored logits.

  g[v] = log p[v] - log q[v];  kl = -sum_v q[v] g[v]                            [nats]
  d kl / d logit[v] = p[v] - q[v];  at a top id with p > 1/2: minus the sum of the others
  out[rows[i], v] = weights[i] (p[v] - q[v]) dlogit/dx,  x the stored logit
  Source: arXiv:2306.13649 (forward KL); the whole vocabulary.

Shapes, grid, traffic: as in reverse_kl.py.

Numerics
  p - q = -p expm1(-g). Where |g| < 1/46, two terms of the series give expm1 to 8e-5 of itself at most, and to 2e-6 at a
  tenth of that; close models lose no digits. Elsewhere p - q itself is exact to 8e-5 or better.
  Where both models put nearly all mass on one id, p - q there is the difference of two numbers near 1. sum p = sum q:
  minus the sum of the others is the same number and loses no digit.
  p = 0 has a gradient of -q: finite, though kl is then +inf.

Not here: which rows (opd_ops/selection/selectors.py), weights (opd_ops/loss.py), the launch (reverse_kl.py).
Specification: autograd of opd_ops/backends/eager.py. Tests: tests/kernels/test_grad.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device import (
    LN_2,
    _block_of,
    _likely_top,
    _load_normalisers,
    _log2_probs,
    _store_top,
    _store_zeros,
    transform,
)
from .reverse_kl import launch_grad

CLOSE = tl.constexpr(2.0**-5)  # bits between log p and log q: below, p - q is computed by a series


@triton.jit
def _forward_kl_block(
    s_row, t_row, out_row, offs, V, top, coef, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr, MASKED: tl.constexpr, HAS_TOP: tl.constexpr,
):  # fmt: skip
    # Writes the gradient of a block; returns p - q, 0 at `top`.
    if MASKED:
        s = tl.load(s_row + offs, mask=offs < V, other=float("-inf"))
        t = tl.load(t_row + offs, mask=offs < V, other=float("-inf"))
    else:
        s = tl.load(s_row + offs)
        t = tl.load(t_row + offs)
    log2_p, log2_q, gap, slope = _log2_probs(s, t, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm, CAP_S, CAP_T, SAME_K)
    p = tl.exp2(log2_p)
    # -expm1(-g) in bits: g' (ln 2 - (ln 2)^2 g' / 2)
    series = tl.fma(gap, -0.24022650695910072, tl.full(gap.shape, 0.6931471805599453, tl.float32))
    diff = tl.where(tl.abs(gap) < CLOSE, p * (gap * series), p - tl.exp2(log2_q))
    grad = (diff * (coef * slope)).to(out_row.dtype.element_ty)
    if MASKED:
        tl.store(out_row + offs, grad, mask=offs < V)
        diff = tl.where(offs < V, diff, 0.0)
    else:
        tl.store(out_row + offs, grad)
    if HAS_TOP:
        diff = tl.where(offs == top, 0.0, diff)
    return diff


@triton.jit(do_not_specialize=["M"])
def _forward_kl_grad_kernel(
    s_ptr, t_ptr, rows_ptr, weights_ptr, score_ptr, top_ptr, elsewhere_ptr, out_ptr, stride_sn, stride_tn, stride_on, M, V, W,
    k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    HAS_ROWS: tl.constexpr, HAS_TOP: tl.constexpr, HAS_ELSEWHERE: tl.constexpr,
    UNIT_S: tl.constexpr, UNIT_T: tl.constexpr, UNIT_O: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    k_s = tl.cast(k_s, tl.float32)
    k_t = tl.cast(k_t, tl.float32)
    pid_m = tl.program_id(0).to(tl.int64)
    row = pid_m
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid_m).to(tl.int64)
    s_row = s_ptr + row * stride_sn * UNIT_S
    t_row = t_ptr + row * stride_tn * UNIT_T
    out_row = out_ptr + row * stride_on * UNIT_O
    weight = tl.load(weights_ptr + pid_m)
    if weight == 0.0:
        _store_zeros(out_row, 0, W, BLOCK_V)
    else:
        norm = _load_normalisers(score_ptr, M, pid_m)
        coef = weight * (k_s * LN_2)
        lane = tl.arange(0, BLOCK_V)
        n_full = V // BLOCK_V
        n_left = n_full
        top = -1
        if HAS_TOP:
            top = _likely_top(top_ptr + pid_m, norm)
            top_block = _block_of(top, n_full, BLOCK_V)
            n_left -= (top_block < n_full).to(tl.int32)
        total = _forward_kl_block(
            s_row, t_row, out_row, n_full * BLOCK_V + lane, V, top, coef, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
            norm, CAP_S, CAP_T, SAME_K, True, HAS_TOP,
        )  # fmt: skip
        # The block of the top id comes before the loop, which then compares no id with it.
        if HAS_TOP:  # noqa: SIM102 without a top there is no `top_block`
            if top_block < n_full:
                total += _forward_kl_block(
                    s_row, t_row, out_row, top_block * BLOCK_V + lane, V, top, coef, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
                    norm, CAP_S, CAP_T, SAME_K, False, True,
                )  # fmt: skip
        for i in range(n_left):
            b = i
            if HAS_TOP:
                b += (i >= top_block).to(tl.int32)
            total += _forward_kl_block(
                s_row, t_row, out_row, b * BLOCK_V + lane, V, top, coef, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
                norm, CAP_S, CAP_T, SAME_K, False, False,
            )  # fmt: skip
        _store_zeros(out_row, V, W, BLOCK_V)
        if HAS_TOP:
            others = tl.sum(total, 0)
            if HAS_ELSEWHERE:
                others += tl.load(elsewhere_ptr + pid_m)
            _store_top(out_row, top, -others, coef, norm[0], pre_s, cap_s, CAP_S)


def forward_kl_grad(
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (M,) int32 or int64; None: all rows
    weights: Tensor,  # (M,) fp32, d total / d each row's loss
    columns: Tensor,  # (12, M) fp32, Score.columns of these rows
    *,
    top: Tensor | None,  # (M,) int32, argmax_fwd of these rows; None: student, teacher and out are a block of the vocabulary
    elsewhere: Tensor | None = None,  # (M,) fp32, the sum over ids that are not in these tables; None: they hold all ids
    out: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary; may be student
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> None:
    """Write the gradient into whole rows of `out`, at `rows`."""
    launch_grad(
        _forward_kl_grad_kernel, student, teacher, rows, weights, columns, top, elsewhere, out, vocab_size,
        transform(s_scale, s_softcap, temperature), transform(t_scale, t_softcap, temperature),
    )  # fmt: skip
