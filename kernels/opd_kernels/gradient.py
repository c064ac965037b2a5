"""The gradient of a divergence with respect to the stored logits of selected rows: one kernel for all divergences.

  out[rows[i], v] = weights[i] p[v] slope[v] dlogit/dx,  x the stored logit       [nats]
  slope: centred, sum_v p[v] slope[v] = 0; at a top id with p > 1/2: minus the sum of the others
  A divergence brings two functions: its constants of a row, and p slope of a block (reverse_kl.py, forward_kl.py, jsd.py,
  skew_kl.py).

Shapes: N tokens, M selected rows, V vocabulary
  s, t        (N, V)    in   stored logits, fp32/bf16/fp16, unit stride along V
  rows        (M,)      in   row numbers in [0, N), each at most once; None: rows 0 .. M-1
  weights     (M,)      in   fp32; 0 writes zeros, even if the row holds NaN
  columns     (12, M)   in   score.py's columns of these rows
  sums        (2, M)    in   fp32, of sums.py; None: the divergence reads columns alone
  top         (M,)      in   int32, argmax.py, -1: not in these tables; None: s, t and out are a block of the vocabulary
  elsewhere   (M,)      in   fp32, sum of d loss / d logit over the ids of a shared vocabulary that are not in these tables;
                             None: there are none
  out         (N, W)    out  at rows; W >= V, columns V .. W-1 become 0. May be s or t itself: a program
                             loads a block of its row before it stores that block, and no other row.

Grid: (M,). Traffic: 2 V logits read, W gradients written.

Numerics
  Normalisers are known from the score, so nothing is rescaled.
  At the top id the slope is the difference of two numbers that agree where p is near 1. A row's gradient sums to 0:
  minus the sum of the others is the same number and loses no digit.
  NaN logits give NaN gradients, but where the row's weight is 0.

Not here: which rows (opd_ops/call/choose.py), weights (opd_ops/call/reduce.py), block sizes (launch_table.py).
Specification: autograd of opd_ops/backends/eager.py. Tests: tests/kernels/test_grad.py, test_jsd.py, test_skew_kl.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import (
    LN_2,
    _block_of,
    _likely_top,
    _log2_probs,
    _store_top,
    _store_zeros,
    check_launch,
    row_step,
    rows_are_aligned,
    transform,
)
from .words import _load_words


@triton.jit
def _gradient_block(
    s_row, t_row, out_row, b, V, top, coef, shift, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
    SLOPE: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr,
    MASKED: tl.constexpr, HAS_TOP: tl.constexpr, WORDS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Writes the gradient of block b; returns p slope in SLOPE's unit, 0 at `top`.
    offs = b * BLOCK_V + tl.arange(0, BLOCK_V)
    if MASKED:
        s = tl.load(s_row + offs, mask=offs < V, other=float("-inf"))
        t = tl.load(t_row + offs, mask=offs < V, other=float("-inf"))
    elif WORDS:
        s = _load_words(s_row, b, BLOCK_V)
        t = _load_words(t_row, b, BLOCK_V)
    else:
        s = tl.load(s_row + offs)
        t = tl.load(t_row + offs)
    log2_p, log2_q, gap, dlogit_dx = _log2_probs(s, t, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm, CAP_S, CAP_T, SAME_K)
    dlogit = SLOPE(log2_p, log2_q, gap, shift)
    grad = (dlogit * (coef * dlogit_dx)).to(out_row.dtype.element_ty)
    if MASKED:
        tl.store(out_row + offs, grad, mask=offs < V)
        dlogit = tl.where(offs < V, dlogit, 0.0)
    elif WORDS:  # the sum in this order takes four instructions a block less
        tl.store((out_row + tl.arange(0, BLOCK_V)) + b * BLOCK_V, grad)
    else:
        tl.store(out_row + offs, grad)
    if HAS_TOP:
        dlogit = tl.where(offs == top, 0.0, dlogit)
    return dlogit


@triton.jit(do_not_specialize=["M"])
def _gradient_kernel(
    s_ptr, t_ptr, rows_ptr, weights_ptr, score_ptr, sums_ptr, top_ptr, elsewhere_ptr, out_ptr,
    stride_sn, stride_tn, stride_on, M, V, W, beta, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CONSTANTS: tl.constexpr, SLOPE: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_TOP: tl.constexpr, HAS_ELSEWHERE: tl.constexpr,
    UNIT_S: tl.constexpr, UNIT_T: tl.constexpr, UNIT_O: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr, WORDS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    k_s = tl.cast(k_s, tl.float32)
    k_t = tl.cast(k_t, tl.float32)
    beta = tl.cast(beta, tl.float32)
    pid_m = tl.program_id(0).to(tl.int64)
    row = pid_m
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid_m).to(tl.int64)
    s_row = s_ptr + row * stride_sn * UNIT_S
    t_row = t_ptr + row * stride_tn * UNIT_T
    out_row = out_ptr + row * stride_on * UNIT_O
    # norm: for _log2_probs; shift: for SLOPE; unit: 1 nat in SLOPE's unit; factor: of the loss, per unit
    norm, shift, unit, factor, is_infinite = CONSTANTS(score_ptr, sums_ptr, M, pid_m, beta)
    weight = tl.load(weights_ptr + pid_m)
    if (weight == 0.0) | is_infinite:
        _store_zeros(out_row, 0, W, BLOCK_V)
    else:
        coef = weight * factor * (k_s * LN_2)
        n_full = V // BLOCK_V
        n_left = n_full
        top = -1
        if HAS_TOP:
            top = _likely_top(top_ptr + pid_m, norm)
            top_block = _block_of(top, n_full, BLOCK_V)
            n_left -= (top_block < n_full).to(tl.int32)
        total = _gradient_block(
            s_row, t_row, out_row, n_full, V, top, coef, shift, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
            norm, SLOPE, CAP_S, CAP_T, SAME_K, True, HAS_TOP, WORDS, BLOCK_V,
        )  # fmt: skip
        # The block of the top id comes before the loop, which then compares no id with it.
        if HAS_TOP:  # noqa: SIM102 without a top there is no `top_block`
            if top_block < n_full:
                total += _gradient_block(
                    s_row, t_row, out_row, top_block, V, top, coef, shift, pre_s, cap_s, k_s,
                    pre_t, cap_t, k_t, norm, SLOPE, CAP_S, CAP_T, SAME_K, False, True, WORDS, BLOCK_V,
                )  # fmt: skip
        for i in range(n_left):
            b = i
            if HAS_TOP:
                b += (i >= top_block).to(tl.int32)
            total += _gradient_block(
                s_row, t_row, out_row, b, V, top, coef, shift, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
                norm, SLOPE, CAP_S, CAP_T, SAME_K, False, False, WORDS, BLOCK_V,
            )  # fmt: skip
        _store_zeros(out_row, V, W, BLOCK_V)
        if HAS_TOP:
            others = tl.sum(total, 0)
            if HAS_ELSEWHERE:
                others += tl.load(elsewhere_ptr + pid_m) * unit
            _store_top(out_row, top, -others, coef, norm[0], pre_s, cap_s, CAP_S)


def launch(
    constants: triton.JITFunction,
    slope: triton.JITFunction,
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (M,) int32 or int64; None: all rows
    weights: Tensor,  # (M,) fp32, d total / d each row's loss
    columns: Tensor,  # (12, M) fp32, Score.columns of these rows, of the whole vocabulary
    sums: Tensor | None = None,  # (2, M) fp32, of sums.py with the same beta
    *,
    top: Tensor | None,  # (M,) int32, argmax_fwd of these rows; None: student, teacher and out are a block of the vocabulary
    elsewhere: Tensor | None = None,  # (M,) fp32, the sum over ids that are not in these tables; None: they hold all ids
    out: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary; may be student
    beta: float = 0.0,
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> None:
    """Write the gradient into whole rows of `out`, at `rows`."""
    M = weights.shape[0]
    assert out.stride(1) == student.stride(1) == teacher.stride(1) == 1, "unit stride along the vocabulary"
    assert columns.shape == (12, M)
    assert sums is None or sums.shape == (2, M)
    check_launch(out, rows=rows, weights=weights, columns=columns, sums=sums, top=top, elsewhere=elsewhere)
    assert weights.dtype == torch.float32
    if M == 0:
        return
    s = transform(s_scale, s_softcap, temperature)
    t = transform(t_scale, t_softcap, temperature)
    tile = launch_table.grad()
    (stride_s, unit_s), (stride_t, unit_t), (stride_o, unit_o) = (row_step(x) for x in (student, teacher, out))
    _gradient_kernel[(M,)](
        student, teacher, rows, weights, columns, sums, top, elsewhere, out, stride_s, stride_t, stride_o,
        M, vocab_size, out.shape[1], beta, s.k, s.pre, s.cap, t.k, t.pre, t.cap, CONSTANTS=constants, SLOPE=slope,
        HAS_ROWS=rows is not None, HAS_TOP=top is not None, HAS_ELSEWHERE=elsewhere is not None,
        UNIT_S=unit_s, UNIT_T=unit_t, UNIT_O=unit_o,
        CAP_S=s.has_cap, CAP_T=t.has_cap, SAME_K=s.k == t.k,
        WORDS=student.dtype == teacher.dtype == out.dtype != torch.float32 and rows_are_aligned(student, teacher, out),
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
