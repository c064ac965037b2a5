"""Generalised Jensen-Shannon divergence on selected rows: the loss, and its gradient with respect to the stored logits.

  m = beta q + (1 - beta) p,  0 < beta < 1                                      [nats]
  f[v] = log(p[v] / m[v]);  g[v] = log(q[v] / m[v]);  mean_slope = sum_v p[v] f[v]
  jsd = (1 - beta) mean_slope + beta sum_v q[v] g[v]
  d jsd / d logit[v] = (1 - beta) p[v] (f[v] - mean_slope)
  Source: arXiv:2306.13649, beta as there and in TRL; the whole vocabulary.

Shapes: N tokens, M selected rows, V vocabulary
  s, t        (N, V)    in   stored logits, fp32/bf16/fp16, unit stride along V
  rows        (M,)      in   row numbers in [0, N), each at most once; None: rows 0 .. M-1
  columns     (12, M)   in   score.py's columns of these rows
  sums        (2, M)    fp32 jsd, mean_slope: output of the loss, input of the gradient

Grid: (M,). Traffic: 2 V logits read by the loss.

Not here: the kernel of the gradient and its launch (gradient.py), normalisers (score.py).
Specification: the equations above, by autograd (tests/support/kernel_oracle.py). Tests: tests/kernels/test_jsd.py.
"""

# Numerics
#   With d = log p - log q + log((1 - beta) / beta),  f = -log(1 - beta) - log(1 + e^-d)  and
#   g = -log(beta) - log(1 + e^d); in base 2, both from one polynomial of 2^-|d|. d comes from stored
#   logits and normalisers, as in reverse_kl.py: it is exact where models are close. The constants -log(1 - beta) and
#   -log(beta) are replaced by the polynomial's own values at p = q. So f and g are exactly 0 there, and where they are
#   small the polynomial's error is relative. Rounding of d and 2^-|d|: 3e-7 at log p - log q = 1, for any beta.
#   Terms of either sign cancel within each sum, to KL(p || m) and KL(q || m); after that nothing cancels. An error e of
#   the difference of the normalisers moves the sums by beta e and -(1 - beta) e: the weights of the sums cancel it in the
#   loss, and f and mean_slope move alike in the gradient. The loss is clamped at 0.
#   Models that share no mass saturate: f and mean_slope agree, the true gradient vanishes, and rounding leaves
#   2e-7 (1 - beta) mean_slope of the weight.
#   Finite for all p and q: d is clamped to +-256, beyond which 2^-|d|, p or q is 0. So terms with p = 0, q = 0 or
#   both (d = inf - inf) are products of 0 and a finite number. NaN logits reach p or q, hence the loss, and
#   the gradient through mean_slope.

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gradient, launch_table
from .device import LN_2, _load_normalisers, _log2_probs, row_step, transform


@triton.jit
def _log2_one_plus(d):
    # log2(1 + 2^-|d|) = x (c0 + c1 x + ..), x = 2^-|d|: minimax on [0, 1]; error 5e-8, error of the slope 1e-5
    x = tl.exp2(tl.abs(d) * -1.0)  # triton 3.6 compiles a minus sign to one more subtraction
    series = tl.fma(x, -0.0093091251, tl.full(x.shape, 0.052058853, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, -0.13752113, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 0.24186459, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, -0.34730101, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 0.47868368, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, -0.72116578, tl.float32))
    series = tl.fma(series, x, tl.full(x.shape, 1.4426899, tl.float32))
    return series * x


@triton.jit
def _mixture(norm, beta):
    # The normalisers, with the gap's constant changed so that _log2_probs returns d as the gap; and the constants a, c:
    # log2(p / m) = a - log2(1 + 2^-d) and log2(q / m) = c - log2(1 + 2^d) are exactly 0 where p = q.
    s_ref, s_log2z, t_ref, t_log2z, gap_log2z = norm
    d = tl.full((1,), 0.0, tl.float32) + (tl.log2(1.0 - beta) - tl.log2(beta))
    last = _log2_one_plus(d)
    a = tl.sum(last - tl.minimum(d, 0.0), 0)
    c = tl.sum(last + tl.maximum(d, 0.0), 0)
    return (s_ref, s_log2z, t_ref, t_log2z, gap_log2z - tl.sum(d, 0)), a, c


@triton.jit
def _jsd_fwd_block(
    s_row, t_row, offs, V, a, c, total_p, total_q, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if MASKED:
        s = tl.load(s_row + offs, mask=offs < V, other=float("-inf"))
        t = tl.load(t_row + offs, mask=offs < V, other=float("-inf"))
    else:
        s = tl.load(s_row + offs)
        t = tl.load(t_row + offs)
    log2_p, log2_q, d, _ = _log2_probs(s, t, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm, CAP_S, CAP_T, SAME_K)
    p = tl.exp2(log2_p)
    q = tl.exp2(log2_q)
    if MASKED:  # a soft-cap turns the -inf of a column beyond V into a finite logit
        p = tl.where(offs < V, p, 0.0)
        q = tl.where(offs < V, q, 0.0)
    d = tl.clamp(d, -256.0, 256.0)  # finite, also for NaN (both logits -inf)
    last = _log2_one_plus(d)
    f = (a - last) + tl.minimum(d, 0.0)
    g = (c - last) - tl.maximum(d, 0.0)
    return tl.fma(p, f, total_p), tl.fma(q, g, total_q)


@triton.jit(do_not_specialize=["M"])
def _jsd_fwd_kernel(
    s_ptr, t_ptr, rows_ptr, score_ptr, sums_ptr, stride_sn, stride_tn, M, V, beta,
    k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    HAS_ROWS: tl.constexpr, UNIT_S: tl.constexpr, UNIT_T: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr, BLOCK_V: tl.constexpr,
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
    norm, a, c = _mixture(_load_normalisers(score_ptr, M, pid_m), beta)

    lane = tl.arange(0, BLOCK_V)
    n_full = V // BLOCK_V
    zeros = tl.zeros((BLOCK_V,), tl.float32)
    total_p, total_q = _jsd_fwd_block(
        s_row, t_row, n_full * BLOCK_V + lane, V, a, c, zeros, zeros, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
        norm, CAP_S, CAP_T, SAME_K, True,
    )  # fmt: skip
    for b in range(n_full):
        total_p, total_q = _jsd_fwd_block(
            s_row, t_row, b * BLOCK_V + lane, V, a, c, total_p, total_q, pre_s, cap_s, k_s, pre_t, cap_t,
            k_t, norm, CAP_S, CAP_T, SAME_K, False,
        )  # fmt: skip
    mean_slope = tl.sum(total_p, 0) * LN_2
    jsd = tl.fma(1.0 - beta, mean_slope, beta * (tl.sum(total_q, 0) * LN_2))
    tl.store(sums_ptr + pid_m, tl.maximum(jsd, 0.0, propagate_nan=tl.PropagateNan.ALL))
    # the clamp of d hides a NaN of the teacher from mean_slope: write NaN here
    tl.store(sums_ptr + M + pid_m, tl.where(jsd == jsd, mean_slope, jsd))


@triton.jit
def _jsd_constants(score_ptr, sums_ptr, M, pid_m, beta):
    norm, a, _ = _mixture(_load_normalisers(score_ptr, M, pid_m), beta)
    mean_slope = tl.load(sums_ptr + M + pid_m) * 1.4426950408889634
    return norm, a - mean_slope, 1.4426950408889634, (1.0 - beta) * LN_2, False


@triton.jit
def _jsd_slope(log2_p, log2_q, gap, shift):
    # p (f - mean_slope) in bits: the constants make `gap` d
    d = tl.maximum(gap, -256.0)  # finite, also for NaN (both logits -inf): its product with p = 0 is 0
    return tl.exp2(log2_p) * ((shift - _log2_one_plus(d)) + tl.minimum(d, 0.0))


def jsd_fwd(
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (M,) int32 or int64; None: all rows
    columns: Tensor,  # (12, M) fp32, Score.columns of these rows
    *,
    beta: float,  # weight of the teacher in the mixture, inside (0, 1)
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> Tensor:
    """(2, M) fp32: each row's divergence, and the mean_slope that the gradient reads."""
    M = columns.shape[1]
    assert 0 < beta < 1
    assert student.stride(1) == teacher.stride(1) == 1, "unit stride along the vocabulary"
    assert columns.shape == (12, M)
    assert columns.is_contiguous()
    sums = torch.empty((2, M), dtype=torch.float32, device=student.device)
    if M == 0:
        return sums
    s = transform(s_scale, s_softcap, temperature)
    t = transform(t_scale, t_softcap, temperature)
    tile = launch_table.grad()
    (stride_s, unit_s), (stride_t, unit_t) = row_step(student), row_step(teacher)
    _jsd_fwd_kernel[(M,)](
        student, teacher, rows, columns, sums, stride_s, stride_t, M, vocab_size, beta,
        s.k, s.pre, s.cap, t.k, t.pre, t.cap,
        HAS_ROWS=rows is not None, UNIT_S=unit_s, UNIT_T=unit_t, CAP_S=s.has_cap, CAP_T=t.has_cap, SAME_K=s.k == t.k,
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return sums


def jsd_grad(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None,
    weights: Tensor,
    columns: Tensor,
    sums: Tensor,  # (2, M) fp32, of jsd_fwd with the same beta
    *,
    beta: float,
    **arguments,
) -> None:
    """Write the gradient into whole rows of `out`, at `rows`; other arguments as of gradient.py's `launch`."""
    assert 0 < beta < 1
    gradient.launch(_jsd_constants, _jsd_slope, student, teacher, rows, weights, columns, sums=sums, beta=beta, **arguments)
