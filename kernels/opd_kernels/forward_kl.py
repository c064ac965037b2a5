"""Forward KL on selected rows: its gradient with respect to the stored logits.

  g[v] = log p[v] - log q[v];  kl = -sum_v q[v] g[v]                            [nats]
  d kl / d logit[v] = p[v] - q[v];  at a top id with p > 1/2: minus the sum of the others
  out[rows[i], v] = weights[i] (p[v] - q[v]) dlogit/dx,  x the stored logit
  Source: arXiv:2306.13649 (forward KL); the whole vocabulary.

Shapes, grid, traffic: as in reverse_kl.py.

Numerics
  p - q = -p expm1(-g): where |g| < 1/2 a polynomial gives expm1 to 2^-22, so that close models
  lose no digits; elsewhere the subtraction itself is as exact.
  Where both models put nearly all mass on one id, p - q there is the difference of two numbers near 1. sum p = sum q:
  minus the sum of the others is the same number and loses no digit.
  p = 0 has a gradient of -q: finite, though kl is then +inf.

Not here: which rows (opd_ops/selection/selectors.py), weights (opd_ops/loss.py), the launch (reverse_kl.py).
Specification: autograd of opd_ops/backends/eager.py. Tests: tests/kernels/test_grad.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device import LN_2, _difference, _likely_top, _load_normalisers, _store_top, _tokens, transform
from .reverse_kl import launch_grad


@triton.jit
def _forward_kl_block(
    s_row, t_row, out_row, offs, V, top, coef, weight, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        s = tl.load(s_row + offs, mask=offs < V, other=float("-inf"))
        t = tl.load(t_row + offs, mask=offs < V, other=float("-inf"))
    else:
        s = tl.load(s_row + offs)
        t = tl.load(t_row + offs)
    p, q, gap, slope = _tokens(s, t, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm, CAP_S, CAP_T, SAME_K)
    diff = _difference(p, q, gap)
    grad = tl.where(weight == 0.0, 0.0, diff * (coef * slope))
    if MASKED:
        tl.store(out_row + offs, grad.to(out_row.dtype.element_ty), mask=offs < V)
        diff = tl.where(offs < V, diff, 0.0)
    else:
        tl.store(out_row + offs, grad.to(out_row.dtype.element_ty))
    return tl.where(offs == top, 0.0, diff)


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
    norm = _load_normalisers(score_ptr, M, pid_m)
    coef = weight * (k_s * LN_2)
    top = -1
    if HAS_TOP:
        top = _likely_top(top_ptr + pid_m, norm)

    lane = tl.arange(0, BLOCK_V)
    n_full = V // BLOCK_V
    total = _forward_kl_block(
        s_row, t_row, out_row, n_full * BLOCK_V + lane, V, top, coef, weight, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
        norm, CAP_S, CAP_T, SAME_K, True,
    )  # fmt: skip
    for b in range(n_full):
        total += _forward_kl_block(
            s_row, t_row, out_row, b * BLOCK_V + lane, V, top, coef, weight, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
            norm, CAP_S, CAP_T, SAME_K, False,
        )  # fmt: skip
    for v in range(V, W, BLOCK_V):
        tl.store(out_row + (v + lane), tl.zeros((BLOCK_V,), out_row.dtype.element_ty), mask=v + lane < W)
    if HAS_TOP:
        coef = tl.where(weight == 0.0, 0.0, coef)
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
