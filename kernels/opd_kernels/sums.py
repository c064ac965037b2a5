"""Two sums over the vocabulary on selected rows, for a divergence's loss and its mean slope: one kernel for all divergences.

  sums[0] = loss = sum_v f(p[v], q[v]),  sums[1] = mean_slope = sum_v p[v] f'[v], f' up to a constant      [nats]
  A divergence brings three functions: its constants of a row, what a block adds to two running sums, and the loss and the mean
  slope from these sums (jsd.py, skew_kl.py).

Shapes: N tokens, M selected rows, V vocabulary
  s, t        (N, V)    in   stored logits, fp32/bf16/fp16, unit stride along V
  rows        (M,)      in   row numbers in [0, N), each at most once; None: rows 0 .. M-1
  columns     (12, M)   in   score.py's columns of these rows
  sums        (2, M)    out  fp32

Grid: (M,). Traffic: 2 V logits read.

Not here: the gradient (gradient.py), normalisers (score.py), block sizes (launch_table.py).
Tests: tests/kernels/test_jsd.py, tests/kernels/test_skew_kl.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import _load_normalisers, _log2_probs, check_launch, row_step, transform


@triton.jit
def _sums_block(
    s_row, t_row, offs, V, constants, total_p, total_q, pre_s, cap_s, k_s, pre_t, cap_t, k_t, norm,
    TERMS: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, SAME_K: tl.constexpr, MASKED: tl.constexpr,
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
    return TERMS(p, q, d, constants, total_p, total_q)


@triton.jit(do_not_specialize=["M"])
def _sums_kernel(
    s_ptr, t_ptr, rows_ptr, score_ptr, sums_ptr, stride_sn, stride_tn, M, V, beta,
    k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CONSTANTS: tl.constexpr, TERMS: tl.constexpr, RESULTS: tl.constexpr,
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
    norm, constants = CONSTANTS(_load_normalisers(score_ptr, M, pid_m), beta)

    lane = tl.arange(0, BLOCK_V)
    n_full = V // BLOCK_V
    zeros = tl.zeros((BLOCK_V,), tl.float32)
    total_p, total_q = _sums_block(
        s_row, t_row, n_full * BLOCK_V + lane, V, constants, zeros, zeros, pre_s, cap_s, k_s, pre_t, cap_t, k_t,
        norm, TERMS, CAP_S, CAP_T, SAME_K, True,
    )  # fmt: skip
    for b in range(n_full):
        total_p, total_q = _sums_block(
            s_row, t_row, b * BLOCK_V + lane, V, constants, total_p, total_q, pre_s, cap_s, k_s, pre_t, cap_t,
            k_t, norm, TERMS, CAP_S, CAP_T, SAME_K, False,
        )  # fmt: skip
    loss, mean_slope = RESULTS(tl.sum(total_p, 0), tl.sum(total_q, 0), beta)
    nan_if_nan = norm[1] + norm[3]  # the clamp of d hides a NaN from a sum that reads one model; normalisers show it
    loss = tl.where(nan_if_nan != nan_if_nan, nan_if_nan, loss)
    tl.store(sums_ptr + pid_m, tl.maximum(loss, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(sums_ptr + M + pid_m, tl.where(loss == loss, mean_slope, loss))


def launch(
    constants: triton.JITFunction,
    terms: triton.JITFunction,
    results: triton.JITFunction,
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (M,) int32 or int64; None: all rows
    columns: Tensor,  # (12, M) fp32, Score.columns of these rows
    *,
    beta: float,  # the teacher's share of the mixture, inside (0, 1)
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> Tensor:
    """(2, M) fp32: each row's loss, and the mean slope that the gradient reads."""
    M = columns.shape[1]
    assert 0 < beta < 1
    assert student.stride(1) == teacher.stride(1) == 1, "unit stride along the vocabulary"
    assert columns.shape == (12, M)
    check_launch(student, rows=rows, columns=columns)
    sums = torch.empty((2, M), dtype=torch.float32, device=student.device)
    if M == 0:
        return sums
    s = transform(s_scale, s_softcap, temperature)
    t = transform(t_scale, t_softcap, temperature)
    tile = launch_table.grad()
    (stride_s, unit_s), (stride_t, unit_t) = row_step(student), row_step(teacher)
    _sums_kernel[(M,)](
        student, teacher, rows, columns, sums, stride_s, stride_t, M, vocab_size, beta,
        s.k, s.pre, s.cap, t.k, t.pre, t.cap, CONSTANTS=constants, TERMS=terms, RESULTS=results,
        HAS_ROWS=rows is not None, UNIT_S=unit_s, UNIT_T=unit_t, CAP_S=s.has_cap, CAP_T=t.has_cap, SAME_K=s.k == t.k,
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return sums
