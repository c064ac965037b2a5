"""The column `ier`: signal over noise of the reverse-KL gradient on C = S ∪ T ∪ {y}, in fp64, one program for each row.

  log p on S and at y, log q on T and at y; -12 where a list has no value; both renormalised on C
  c = log p - log q, between -30 and 30;  n = |C|;  b = sum_C (1 - p) c / (n - 1)
  ier = Var_p(c) / max(sum_C (1 - p) (c - b)^2 - Var_p(c), 1e-8)                            IER, arXiv 2609.24432

An id that is on a list takes its value there, the sampled token y too. Without a finite value of its own y still is in C.

Not here: the lists (support.py), exp and log of fp64 (list_columns.py).
Specification: opd_ops/backends/shared/candidates.py. Tests: tests/kernels/test_candidates.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import check_launch
from .list_columns import _exp, _f64, _log
from .score import Score
from .support import TopKLists

FLOOR = tl.constexpr(-12.0)
LARGEST_RATIO = tl.constexpr(30.0)
LEAST_NOISE = tl.constexpr(1e-8)


@triton.jit
def _known(value, is_on_list, lse, at_y, is_y):
    # fp64 log-probabilities, -12 where not known: of logits on a list, else of the token. NaN and -inf are not known.
    at_y = at_y - lse  # above 0 where a log-sum-exp of 16-bit logits is below the token's own logit
    x = tl.where(is_y, tl.where(at_y > 0.0, 0.0, at_y).to(tl.float64), float("-inf"))
    x = tl.where(is_on_list, value.to(tl.float64) - lse.to(tl.float64), x)
    is_known = x > float("-inf")
    return tl.where(is_known, x, _f64(FLOOR)), is_known


@triton.jit
def _renormalised(log_p, is_candidate):
    top = tl.max(tl.where(is_candidate, log_p, float("-inf")), 0)
    return log_p - (top + _log(tl.sum(tl.where(is_candidate, _exp(log_p - top), _f64(0.0)), 0)))


@triton.jit(do_not_specialize=["stride_y", "K"], do_not_specialize_on_alignment=["s_lse_ptr", "t_lse_ptr", "ier_ptr"])
def _ier_fwd_kernel(
    ids_ptr, logits_ptr, tokens_ptr, s_lse_ptr, t_lse_ptr, at_y_ptr, ier_ptr, stride_y, K,
    SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # SIZE: room for S, T and y, in this order
    pid = tl.program_id(0).to(tl.int64)
    ids_row = ids_ptr + pid * 2 * K
    logits_row = logits_ptr + pid * 4 * K
    s_lse = tl.load(s_lse_ptr + pid)
    t_lse = tl.load(t_lse_ptr + pid)
    s_at_y = tl.load(at_y_ptr + pid)
    t_at_y = tl.load(at_y_ptr + stride_y + pid)
    y = tl.load(tokens_ptr + pid).to(tl.int32)
    j = tl.arange(0, SIZE)
    ids = tl.where(j == 2 * K, y, tl.load(ids_row + j, mask=j < 2 * K, other=0))
    s_value = tl.zeros((SIZE,), tl.float32)
    t_value = tl.zeros((SIZE,), tl.float32)
    n_s = tl.zeros((SIZE,), tl.int32)
    n_t = tl.zeros((SIZE,), tl.int32)
    n_before = tl.zeros((SIZE,), tl.int32)
    for first in range(0, 2 * K, CHUNK):
        i = first + tl.arange(0, CHUNK)
        is_of_s = i < K
        # logits: s at S, t at S, s at T, t at T
        listed = tl.load(logits_row + tl.where(is_of_s, i, 2 * K + i), mask=i < 2 * K, other=0.0)
        listed_ids = tl.load(ids_row + i, mask=i < 2 * K, other=0)
        is_same = (ids[:, None] == listed_ids[None, :]) & (i < 2 * K)[None, :]
        is_in_s = is_same & is_of_s[None, :]
        is_in_t = is_same & (i >= K)[None, :]
        s_value += tl.sum(tl.where(is_in_s, listed[None, :], 0.0), 1)
        t_value += tl.sum(tl.where(is_in_t, listed[None, :], 0.0), 1)
        n_s += tl.sum(is_in_s.to(tl.int32), 1)
        n_t += tl.sum(is_in_t.to(tl.int32), 1)
        n_before += tl.sum((is_same & (i[None, :] < j[:, None])).to(tl.int32), 1)
    is_y = ids == y
    log_p, p_is_known = _known(s_value, n_s > 0, s_lse, s_at_y, is_y)
    log_q, q_is_known = _known(t_value, n_t > 0, t_lse, t_at_y, is_y)
    is_candidate = (p_is_known | q_is_known | is_y) & (n_before == 0) & (j <= 2 * K)
    log_p = _renormalised(log_p, is_candidate)
    p = tl.where(is_candidate, _exp(log_p), _f64(0.0))
    c = log_p - _renormalised(log_q, is_candidate)
    c = tl.where(c > _f64(LARGEST_RATIO), _f64(LARGEST_RATIO), c)
    c = tl.where(c < _f64(-LARGEST_RATIO), _f64(-LARGEST_RATIO), c)
    c = tl.where(is_candidate, c, _f64(0.0))
    from_mean = c - tl.sum(p * c, 0)
    signal = tl.sum(p * from_mean * from_mean, 0)
    spread = tl.where(is_candidate, _f64(1.0) - p, _f64(0.0))
    n_others = tl.maximum(tl.sum(is_candidate.to(tl.int32), 0) - 1, 1)
    from_b = c - tl.sum(spread * c, 0) / n_others.to(tl.float64)
    noise = tl.sum(spread * from_b * from_b, 0) - signal
    noise = tl.where(noise < _f64(LEAST_NOISE), _f64(LEAST_NOISE), noise)
    tl.store(ier_ptr + pid, (signal / noise).to(tl.float32))


def ier_fwd(
    lists: TopKLists,
    score: Score,  # of the same n rows
    tokens: Tensor,  # (n,) sampled ids, any integers, contiguous
    at_tokens: Tensor,  # (2, n) fp32 logits of student and teacher at these ids, rows of stride 1; -inf: masked
    out: Tensor,  # (n,) fp32, contiguous
) -> Tensor:
    """Fills `out`; returns it."""
    n, _, top_k = lists.ids.shape
    assert tokens.shape == out.shape == (n,)
    assert at_tokens.shape == (2, n)
    assert n <= 1 or at_tokens.stride(1) == 1, "unit stride along the rows"
    assert at_tokens.dtype == out.dtype == torch.float32
    check_launch(out, tokens=tokens, out=out)
    if n == 0:
        return out
    tile = launch_table.candidates(top_k)
    _ier_fwd_kernel[(n,)](
        lists.ids, lists.logits, tokens, score.student_logsumexp, score.teacher_logsumexp, at_tokens, out,
        at_tokens.stride(0), top_k, **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
