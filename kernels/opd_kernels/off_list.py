"""One model's log-sum-exp of a row off a short list of ids, and the gradient of a loss that reads it.

  lse_off = log sum_{v off ids} e^logit[v]                                         [nats]
  For a loss f(logits at ids, lse_off): values = df/dlogits at ids, coef = df/drest, and
  d loss / d logit[v] = values[k] at v = ids[k],  coef e^(logit[v] - lse_off) off ids
  out[rows[i], v] (= or +=) d loss / d logit[v] dlogit/dx,  x the stored logit
  arXiv:2605.26844, eq. 9 renormalises on the list (support.py); here the ids off it are one more outcome.

Shapes: N tokens, M selected rows, V vocabulary, K <= 128
  x           (N, V)    in   stored logits, fp32/bf16/fp16, unit stride along V
  rows        (M,)      in   row numbers in [0, N), each at most once; None: rows 0 .. M-1
  ids         (M, K)    in   int32, ascending, each at most once, padded at the end with 2^31 - 1
  values      (M, K)    in   fp32, in the order of ids
  coef        (M,)      in   fp32; 0 makes every entry off ids 0, even if the row holds NaN
  columns     (2, M)    fp32 ref, log2z: lse_off = ln 2 (k ref + log2z), k of device.py
  out         (N, W)    out  at rows; W >= V. With add=False columns V .. W-1 become 0, and out may be x itself:
                             a program loads a block of its row before it stores that block, and no other row.
                             With add=True columns V .. W-1 stay unchanged.
  In the gradient x and out may be a block of the vocabulary whose first column has the id first_id;
  ids outside the block are skipped.

Grid: (M,). Traffic: V logits read by either kernel; V gradients written, and read first if add=True.

Ids: a program walks its row in blocks, with a cursor in the ids. While the cursor's id is in the block, its
  lane is masked (sum) or replaced (gradient): K times a row, not K times a logit.

Not here: which ids (support.py), values and coef (opd_ops/backends/triton/kernel_loss.py), block sizes (launch_table.py).
Specification: the equations above, by autograd (tests/support/kernel_oracle.py). Tests: tests/kernels/test_off_list.py.
"""

# Numerics
#   Lane: the logits that one thread reads. Each lane has its own maximum and sum; lanes are joined once, after
#   the loop, as in score.py. The maximum of a lane with only -inf or listed ids is FLOOR. There are two columns
#   because k ref + log2z, rounded, would lose the digits of log2z where lse_off is of size 300.
#   If no id is off the list, or all logits off it are -inf: log2z = -inf, ref is finite, and the gradient off ids
#   is 0. NaN (or +inf) off ids gives NaN. NaN at an id does not enter lse_off.
#   The gradient does not normalise its softmax: coef e^(logit - lse_off) <= coef.

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import (
    FLOOR,
    LN_2,
    _log2_prob,
    _log_ratio,
    _store_zeros,
    _transform,
    _transform_slope,
    check_launch,
    row_step,
    transform,
)

NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _next(ids_row, j, K):
    # a cursor in the ids: a place, and the id at this place
    return j, tl.load(ids_row + j, mask=j < K, other=NO_ID)


@triton.jit
def _from(ids_row, first, K, KP: tl.constexpr):
    # the cursor at the first id >= `first`
    j = tl.arange(0, KP)
    ids = tl.load(ids_row + j, mask=j < K, other=NO_ID)
    return _next(ids_row, tl.sum((ids < first).to(tl.int32), 0), K)


@triton.jit
def _off_list_fwd_block(
    state, cursor, x_row, ids_row, first, V, K, k, pre, cap,
    CAP: tl.constexpr, MASKED: tl.constexpr, LANES: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    # R * VEC logits a lane; neighbouring lanes load neighbouring 128 bits
    STEP: tl.constexpr = LANES * VEC
    offs = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]  # (LANES, VEC)
    z = ()
    for r in tl.static_range(R):
        v = first + r * STEP + offs
        if MASKED:
            x = tl.load(x_row + v, mask=v < V, other=float("-inf"))
            z = z + (tl.where(v < V, _transform(x, pre, cap, CAP), float("-inf")),)
        else:
            z = z + (_transform(tl.load(x_row + v), pre, cap, CAP),)
    j, id = cursor
    while id < tl.minimum(first + R * STEP, V):
        masked = ()
        for r in tl.static_range(R):
            masked = masked + (tl.where(offs == id - first - r * STEP, float("-inf"), z[r]),)
        z = masked
        j, id = _next(ids_row, j + 1, K)

    old, total = state
    top = old
    for r in tl.static_range(R):
        top = tl.maximum(top, tl.max(z[r], 1))
    ref = tl.broadcast_to((top * k)[:, None], z[0].shape)
    for r in tl.static_range(R):
        e = tl.exp2(tl.fma(z[r], k, -ref))
        if r == 0:
            sums = e
        else:
            sums += e
    return (top, tl.fma(total, tl.exp2(old * k - top * k), tl.sum(sums, 1))), (j, id)


@triton.jit(do_not_specialize=["M", "K"])
def _off_list_fwd_kernel(
    x_ptr, rows_ptr, ids_ptr, columns_ptr, stride_xn, M, V, K, k, pre, cap,
    HAS_ROWS: tl.constexpr, UNIT_X: tl.constexpr, CAP: tl.constexpr, KP: tl.constexpr,
    LANES: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = LANES * R * VEC
    k = tl.cast(k, tl.float32)
    pid_m = tl.program_id(0).to(tl.int64)
    row = pid_m
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid_m).to(tl.int64)
    x_row = x_ptr + row * stride_xn * UNIT_X
    ids_row = ids_ptr + pid_m * K

    n_full = V // BLOCK
    # The masked end of the row comes first: the running values then have the layout of the loop.
    state, _ = _off_list_fwd_block(
        (tl.full((LANES,), FLOOR, tl.float32), tl.zeros((LANES,), tl.float32)),
        _from(ids_row, n_full * BLOCK, K, KP), x_row, ids_row, n_full * BLOCK, V, K, k, pre, cap,
        CAP, True, LANES, R, VEC,
    )  # fmt: skip
    cursor = _next(ids_row, tl.full((), 0, tl.int32), K)
    for b in range(n_full):
        state, cursor = _off_list_fwd_block(
            state, cursor, x_row, ids_row, b * BLOCK, V, K, k, pre, cap, CAP, False, LANES, R, VEC
        )  # fmt: skip
    lane_top, lane_sum = state
    top = tl.max(lane_top, 0)
    ref = top * k
    total = tl.sum(lane_sum * tl.exp2(lane_top * k - ref), 0)
    log2z = _log_ratio(total, 1.0) * 1.4426950408889634
    tl.store(columns_ptr + pid_m, top)
    # The sums are relative to k top rounded to fp32, but a later kernel subtracts top itself: log2z is corrected.
    tl.store(columns_ptr + M + pid_m, log2z - tl.fma(top, k, -ref))


@triton.jit
def _off_list_grad_block(
    cursor, x_row, out_row, ids_row, values_row, first, V, first_id, K, ref, log2z, coef, pre, cap, k,
    ADD: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK_V)
    offs = first + lane
    if MASKED:
        x = tl.load(x_row + offs, mask=offs < V, other=float("-inf"))
        if ADD:
            before = tl.load(out_row + offs, mask=offs < V, other=0.0)
    else:
        x = tl.load(x_row + offs)
        if ADD:
            before = tl.load(out_row + offs)
    z = _transform(x, pre, cap, CAP)
    grad = tl.where(coef == 0.0, 0.0, coef * tl.exp2(_log2_prob(z, k, ref, log2z)))
    j, id = cursor
    while id < first_id + tl.minimum(first + BLOCK_V, V):
        grad = tl.where(lane == id - first_id - first, tl.load(values_row + j), grad)
        j, id = _next(ids_row, j + 1, K)
    if CAP:
        grad = tl.where(grad == 0.0, 0.0, grad * _transform_slope(z, pre, cap, CAP))
    grad *= k * LN_2
    if ADD:
        grad += before.to(tl.float32)
    if MASKED:
        tl.store(out_row + offs, grad.to(out_row.dtype.element_ty), mask=offs < V)
    else:
        tl.store(out_row + offs, grad.to(out_row.dtype.element_ty))
    return j, id


@triton.jit(do_not_specialize=["M", "K", "first_id"])
def _off_list_grad_kernel(
    x_ptr, rows_ptr, ids_ptr, values_ptr, coef_ptr, columns_ptr, out_ptr, stride_xn, stride_on, M, V, W, K, first_id,
    k, pre, cap,
    HAS_ROWS: tl.constexpr, UNIT_X: tl.constexpr, UNIT_O: tl.constexpr,
    ADD: tl.constexpr, CAP: tl.constexpr, KP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    k = tl.cast(k, tl.float32)
    pid_m = tl.program_id(0).to(tl.int64)
    row = pid_m
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid_m).to(tl.int64)
    x_row = x_ptr + row * stride_xn * UNIT_X
    out_row = out_ptr + row * stride_on * UNIT_O
    ids_row = ids_ptr + pid_m * K
    values_row = values_ptr + pid_m * K
    coef = tl.load(coef_ptr + pid_m)
    ref = tl.load(columns_ptr + pid_m)
    log2z = tl.load(columns_ptr + M + pid_m)
    log2z = tl.where(log2z == float("-inf"), 0.0, log2z)  # every logit off ids is -inf: 0 avoids inf - inf

    n_full = V // BLOCK_V
    last = n_full * BLOCK_V
    _off_list_grad_block(
        _from(ids_row, first_id + last, K, KP), x_row, out_row, ids_row, values_row, last, V, first_id, K,
        ref, log2z, coef, pre, cap, k, ADD, CAP, True, BLOCK_V,
    )  # fmt: skip
    cursor = _from(ids_row, first_id, K, KP)
    for b in range(n_full):
        cursor = _off_list_grad_block(
            cursor, x_row, out_row, ids_row, values_row, b * BLOCK_V, V, first_id, K, ref, log2z, coef, pre, cap, k,
            ADD, CAP, False, BLOCK_V,
        )  # fmt: skip
    if not ADD:
        _store_zeros(out_row, V, W, BLOCK_V)


def off_list_fwd(
    logits: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    rows: Tensor | None,  # (M,) int32 or int64; None: all rows
    ids: Tensor,  # (M, K) int32, ascending, padded with 2^31 - 1
    *,
    vocab_size: int,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """(2, M) fp32: ref and log2z, from which lse_off = ln 2 (k ref + log2z), k = device.transform(..).k."""
    M, K = ids.shape
    assert logits.stride(1) == 1, "unit stride along the vocabulary"
    assert 1 <= K <= 128
    assert ids.dtype == torch.int32
    check_launch(logits, rows=rows, ids=ids)
    columns = torch.empty((2, M), dtype=torch.float32, device=logits.device)
    if M == 0:
        return columns
    model = transform(scale, softcap, temperature)
    tile = launch_table.off_list(logits.dtype)
    stride_x, unit_x = row_step(logits)
    _off_list_fwd_kernel[(M,)](
        logits, rows, ids, columns, stride_x, M, vocab_size, K, model.k, model.pre, model.cap,
        HAS_ROWS=rows is not None, UNIT_X=unit_x, CAP=model.has_cap, KP=triton.next_power_of_2(K),
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return columns


def off_list_grad(
    logits: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary; or a block of the vocabulary
    rows: Tensor | None,  # (M,) int32 or int64; None: all rows
    ids: Tensor,  # (M, K) int32, the same as in off_list_fwd
    values: Tensor,  # (M, K) fp32, d loss / d logits at ids
    coef: Tensor,  # (M,) fp32, d loss / d lse_off
    columns: Tensor,  # (2, M) fp32, from off_list_fwd over the whole vocabulary
    *,
    out: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary; may be logits, if add is false
    add: bool,
    first_id: int,  # the id of the first column of logits and out
    vocab_size: int,
    temperature: float,
    scale: float,
    softcap: float | None,
) -> None:
    """Write the gradient into whole rows of `out`, at `rows`, or add it there."""
    M, K = ids.shape
    assert logits.stride(1) == out.stride(1) == 1, "unit stride along the vocabulary"
    assert 1 <= K <= 128
    assert values.shape == (M, K)
    assert coef.shape == (M,)
    assert columns.shape == (2, M)
    assert ids.dtype == torch.int32
    assert values.dtype == coef.dtype == columns.dtype == torch.float32
    check_launch(logits, rows=rows, ids=ids, values=values, coef=coef, columns=columns)
    if M == 0:
        return
    model = transform(scale, softcap, temperature)
    tile = launch_table.off_list_grad()
    (stride_x, unit_x), (stride_o, unit_o) = row_step(logits), row_step(out)
    _off_list_grad_kernel[(M,)](
        logits, rows, ids, values, coef, columns, out, stride_x, stride_o, M, vocab_size, out.shape[1],
        K, first_id, model.k, model.pre, model.cap,
        HAS_ROWS=rows is not None, UNIT_X=unit_x, UNIT_O=unit_o, ADD=add, CAP=model.has_cap, KP=triton.next_power_of_2(K),
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
