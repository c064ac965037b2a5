# Forward KL on selected rows: the loss, recomputed, and its gradient with respect to the stored logits.
#
#   g[v] = log p[v] - log q[v];  kl = -sum_v q[v] g[v]                            [nats]
#   d kl / d logit[v] = p[v] - q[v]
#   out[rows[i], v] = weights[i] (p[v] - q[v]) dlogit/dx,  x the stored logit
#   Source: arXiv:2306.13649 (forward KL); the whole vocabulary.
#
# Shapes, grid, traffic: those of reverse_kl.py.
#
# Numerics
#   p - q = -p expm1(-g): where |g| < 1/2 a polynomial gives expm1 to 2^-22, so that close models
#   lose no digits; elsewhere the subtraction itself is as good.
#   Where both models put all on one token, sums near 1 are rounded to 6e-8, and so is p - q there: at scale 60 and KL
#   1e-5 that is 5e-3 of the gradient's norm (eager fp32: 1e-3).
#   loss = sum -q g + (p - q), the second sum cancelling the rounding of the normalisers. Clamped.
#   q = 0 contributes p to that sum, p = 0 a gradient of -q: finite, though kl is then +inf.
#
# Not here: which rows (opd_ops/selectors.py), weights (opd_ops/loss.py), the launch (reverse_kl.py).
# Specification: autograd of opd_ops/backends/eager.py. Tests: tests/test_kernel_grad.py.

import triton
import triton.language as tl
from torch import Tensor

from .device import LN_2, _difference, _load_normalisers, _tokens, transform
from .reverse_kl import launch_grad


@triton.jit
def _forward_kl_block(
    s_row, t_row, out_row, offs, V, coef, weight, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
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
    term = tl.where(q == 0.0, p, tl.fma(-q, gap, diff))
    if MASKED:
        tl.store(out_row + offs, grad.to(out_row.dtype.element_ty), mask=offs < V)
        term = tl.where(offs < V, term, 0.0)
    else:
        tl.store(out_row + offs, grad.to(out_row.dtype.element_ty))
    return term


@triton.jit(do_not_specialize=["M"])
def _forward_kl_grad_kernel(
    s_ptr, t_ptr, rows_ptr, weights_ptr, score_ptr, out_ptr, loss_ptr, stride_sn, stride_tn, stride_on, M, V, W,
    k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    HAS_ROWS: tl.constexpr, UNIT_S: tl.constexpr, UNIT_T: tl.constexpr, UNIT_O: tl.constexpr,
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
    kl = tl.load(score_ptr + 6 * M + pid_m)
    norm = _load_normalisers(score_ptr, M, pid_m)
    coef = weight * (k_s * LN_2)

    lane = tl.arange(0, BLOCK_V)
    n_full = V // BLOCK_V
    total = _forward_kl_block(
        s_row, t_row, out_row, n_full * BLOCK_V + lane, V, coef, weight, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
        norm, CAP_S, CAP_T, SAME_K, True,
    )  # fmt: skip
    for b in range(n_full):
        total += _forward_kl_block(
            s_row, t_row, out_row, b * BLOCK_V + lane, V, coef, weight, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
            norm, CAP_S, CAP_T, SAME_K, False,
        )  # fmt: skip
    for v in range(V, W, BLOCK_V):
        tl.store(out_row + (v + lane), tl.zeros((BLOCK_V,), out_row.dtype.element_ty), mask=v + lane < W)
    loss = tl.maximum(tl.sum(total, 0), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(loss_ptr + pid_m, tl.where(kl == float("inf"), kl, loss))


def forward_kl_grad(
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (M,) int32 or int64, or None for all
    weights: Tensor,  # (M,) fp32, the gradient of the total with respect to each row's loss
    columns: Tensor,  # (12, M) fp32, Score.columns of these rows
    *,
    out: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary; may be student
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> Tensor:
    """Writes the gradient into `out` at `rows`, whole rows of it, and returns the (M,) losses."""
    return launch_grad(
        _forward_kl_grad_kernel, student, teacher, rows, weights, columns, out, vocab_size,
        transform(s_scale, s_softcap, temperature), transform(t_scale, t_softcap, temperature),
    )  # fmt: skip
