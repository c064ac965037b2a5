"""Score: all full-vocabulary statistics of a position, in one sweep over its two rows of logits (a second one only where one
model alone masks ids).

  p = softmax(s), q = softmax(t);  s, t the logits after scale, soft-cap and temperature
  lse_s = log sum e^s       H(p) = lse_s - E_p[s]        KL(p||q) = E_p[s - t] - (lse_s - lse_t)
  lse_t = log sum e^t       H(q) = lse_t - E_q[t]        KL(q||p) = (lse_s - lse_t) - E_q[s - t]
  Source: arXiv:2605.26844 eqs. 9-16 and arXiv:2604.14084 eq. 3 use these; natural logarithms, nats.
  Also the largest stored logit of every group of GROUP = 128 consecutive logits, for support.py.

Shapes: N rows in the tables, n of them scored, V vocabulary, NG = ceil(V / 128) groups
  s, t        (N, V)      in   stored logits, fp32/bf16/fp16, unit stride along V, any row stride
  rows        (n,)        in   row numbers in [0, N), any order; None: rows 0 .. N-1
  columns     (12, n)     out  fp32, the order of COLUMNS
  group_max   (n, 2, NG rounded up to 16)  out  student, teacher; the stored type (fp32 if the models' types differ);
                          entries beyond NG are not written

Grid: (n * parts,). A program walks one part of a row in blocks of LANES * VEC * R logits. With parts > 1 (few rows) it
writes its ten running values, and _merge_fwd_kernel joins all parts, in order.
Traffic: 2 V logits read once, 2 NG values and 48 bytes written.

Not here: top-K (support.py), gradients (reverse_kl.py, forward_kl.py), block sizes (launch_table.py).
Specification: opd_ops/backends/eager.py. Tests: tests/kernels/test_score.py.
"""

# Numerics
#   Lane: the logits that one thread reads. Each lane has its own reference r = k max(z) in base 2
#   (device.py defines k and z) and its own sums. Lanes are joined once, after the loop. The loop has
#   no barrier; the two group maxima cost one shuffle per model and bit of QUAD.
#   x = k z - r is one fused multiply-add: its rounding error is relative to |x|, not to |k z|.
#   The KLs do not cancel. With x, y the exponents of student and teacher, x - y is s - t minus the
#   references' difference:  KL(p||q) = ln 2 E_p[x - y] - log(sum 2^x / sum 2^y),  and both terms
#   are as small as the models are close. Rounding may leave -1e-7; it is clamped to 0.
#   A masked logit (device.py: _is_masked) becomes VOID = -2^120 or another exponent so low that its exponential
#   is 0 and its product with 0 is 0. Where only one model masks, |x - y| exceeds FAR k. Only then
#   the row is read once more: for each model's largest logit among the entries that the other model masks.
#   KL(p||q) = +inf if p there is above 0 in fp64, and the same for KL(q||p) with q. exp2 flushes below 2^-126.
#   NaN (or +inf) makes that model's log-sum-exp and entropy and both KLs NaN; a row of -inf
#   alone has log-sum-exp -inf and NaN for the other statistics.
#   FP contraction is off (enable_fp_fusion=False) and every fused multiply-add is written out:
#   fusing  m k - r  with r = fl(m k) would return the rounding error instead of 0.
#   Columns for later kernels: the exact maximum z_ref and log2 sum 2^(k (z - z_ref)) give log p to 1e-7; a rounded
#   log-sum-exp of size 300 would not. log2z_gap is s_log2z - t_log2z without their rounding: it gives log p - log q of
#   close models.
#   Stored logits have the order of logits, since scale > 0 and tanh increases strictly.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import FLOOR, LN_2, LOG2_ZERO, VOID, _is_masked, _log_ratio, _transform, row_step, rows_are_aligned, transform

GROUP = 128  # logits per group maximum
FAR = tl.constexpr(2.0**14)  # stored logits further apart than this may be masked: the highest masked logit is fp16's -65504
ALIGN = tl.constexpr(16)  # row stride of the maxima is a multiple of it, so that support.py reads them 16 bytes at a time
COLUMNS = (
    "student_logsumexp",
    "teacher_logsumexp",
    "logsumexp_gap",
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "s_ref",
    "s_log2z",
    "t_ref",
    "t_log2z",
    "log2z_gap",
)
N_PARTIALS = 10


class Score(NamedTuple):
    columns: Tensor  # (12, n) fp32, the order of COLUMNS
    group_max: Tensor  # (n, 2, >= NG), student and teacher

    def __getattr__(self, name: str) -> Tensor:
        if name in COLUMNS:
            return self.columns[COLUMNS.index(name)]
        raise AttributeError(name)


@triton.jit
def _load_block(row_ptr, offs, limit, R: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    out = ()
    for r in tl.static_range(R):
        if MASKED:
            x = tl.load(row_ptr + offs + r * STEP, mask=offs + r * STEP < limit, other=float("-inf"))
        else:
            x = tl.load(row_ptr + offs + r * STEP)
        out = out + (x.to(tl.float32),)
    return out


@triton.jit
def _lane_max(x, R: tl.constexpr):
    top = x[0]
    for r in tl.static_range(1, R):
        top = tl.maximum(top, x[r])
    return tl.max(top, 1)


@triton.jit
def _group_max(lane, GROUPS: tl.constexpr, QUAD: tl.constexpr):
    # (LANES,) -> (LANES,), each lane holding the maximum of the QUAD lanes of its group
    pairs = tl.reshape(lane, (GROUPS, QUAD))
    top = tl.broadcast_to(tl.max(pairs, 1)[:, None], (GROUPS, QUAD))
    return tl.reshape(top, (GROUPS * QUAD,))


@triton.jit
def _exponents(z, k, ref):
    # x = k z - ref, (LANES, VEC); NaN stays NaN
    x = tl.fma(z, k, tl.broadcast_to(-ref[:, None], z.shape))
    return tl.maximum(x, VOID, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rescale(old, m_s, m_t, k_s, k_t):
    # a lane's sums relative to the references of the new maxima m_s, m_t
    o_s, o_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t = old
    down_s = o_s * k_s - m_s * k_s
    down_t = o_t * k_t - m_t * k_t
    a_s = tl.exp2(down_s)
    a_t = tl.exp2(down_t)
    shift = down_s - down_t
    x_s = a_s * tl.fma(sum_s, down_s, x_s)
    x_t = a_t * tl.fma(sum_t, down_t, x_t)
    gap_s = a_s * tl.fma(sum_s, shift, gap_s)
    gap_t = a_t * tl.fma(sum_t, shift, gap_t)
    return a_s * sum_s, a_t * sum_t, x_s, x_t, gap_s, gap_t


@triton.jit
def _sums(zs, zt, m_s, m_t, k_s, k_t, R: tl.constexpr):
    # this block's sums in every lane, relative to k_s m_s and k_t m_t
    ref_s = m_s * k_s
    ref_t = m_t * k_t
    for r in tl.static_range(R):
        x = _exponents(zs[r], k_s, ref_s)
        y = _exponents(zt[r], k_t, ref_t)
        p = tl.exp2(x)
        q = tl.exp2(y)
        d = x - y
        if r == 0:
            sp, sq, spx, sqy, spd, sqd, d_max, d_min = p, q, p * x, q * y, p * d, q * d, d, d
        else:
            sp += p
            sq += q
            spx = tl.fma(p, x, spx)
            sqy = tl.fma(q, y, sqy)
            spd = tl.fma(p, d, spd)
            sqd = tl.fma(q, d, sqd)
            d_max = tl.maximum(d_max, d)
            d_min = tl.minimum(d_min, d)
    return (
        tl.sum(sp, 1), tl.sum(sq, 1), tl.sum(spx, 1), tl.sum(sqy, 1), tl.sum(spd, 1), tl.sum(sqd, 1),
        tl.max(d_max, 1), tl.min(d_min, 1),
    )  # fmt: skip


@triton.jit
def _block(
    state, s_row, t_row, gmax_lane, b, limit, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, MASKED: tl.constexpr,
    R: tl.constexpr, GROUPS: tl.constexpr, QUAD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    # One block. QUAD neighbouring threads share a group: thread j of them reads the chunks j, j + QUAD, ..
    # of VEC logits of the group's 128, so that a load of the warp reads full sectors.
    STEP: tl.constexpr = QUAD * VEC
    G: tl.constexpr = R * STEP
    lane = tl.arange(0, GROUPS * QUAD)
    group = lane // QUAD
    quad = lane % QUAD
    first = b * (GROUPS * G) + group * G + quad * VEC
    offs = first[:, None] + tl.arange(0, VEC)[None, :]  # (LANES, VEC)
    zs = _load_block(s_row, offs, limit, R, STEP, MASKED)
    zt = _load_block(t_row, offs, limit, R, STEP, MASKED)

    lane_s = _lane_max(zs, R)
    lane_t = _lane_max(zt, R)
    # lanes 0 and 1 of a group write its two maxima: no layout change
    top = tl.where(quad == 0, _group_max(lane_s, GROUPS, QUAD), _group_max(lane_t, GROUPS, QUAD))
    write = quad < 2
    if MASKED:
        write = write & ((b * GROUPS + group) * G < limit)
    tl.store(gmax_lane + b * GROUPS, top.to(gmax_lane.dtype.element_ty), mask=write)

    if CAP_S or CAP_T:
        zs = _cap_block(zs, offs, limit, pre_s, cap_s, CAP_S, MASKED, R, STEP)
        zt = _cap_block(zt, offs, limit, pre_t, cap_t, CAP_T, MASKED, R, STEP)
        lane_s = _transform(lane_s, pre_s, cap_s, CAP_S)
        lane_t = _transform(lane_t, pre_t, cap_t, CAP_T)

    o_s, o_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t, d_max, d_min = state
    m_s = tl.maximum(o_s, lane_s)
    m_t = tl.maximum(o_t, lane_t)
    a = _rescale((o_s, o_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t), m_s, m_t, k_s, k_t)
    c = _sums(zs, zt, m_s, m_t, k_s, k_t, R)
    return (
        m_s, m_t, a[0] + c[0], a[1] + c[1], a[2] + c[2], a[3] + c[3], a[4] + c[4], a[5] + c[5],
        tl.maximum(d_max, c[6]), tl.minimum(d_min, c[7]),
    )  # fmt: skip


@triton.jit
def _cap_block(z, offs, limit, pre, cap, CAP: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr):
    # tanh turns the -inf of a column beyond V into -softcap: write -inf again
    out = ()
    for r in tl.static_range(R):
        x = _transform(z[r], pre, cap, CAP)
        if MASKED:
            x = tl.where(offs + r * STEP < limit, x, float("-inf"))
        out = out + (x,)
    return out


@triton.jit
def _join_lanes(state, k_s, k_t):
    # (LANES,) running values of one row -> the same ten values of the whole row, scalars
    m_s, m_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t, alone_s, alone_t = state
    top_s = tl.max(m_s, 0)
    top_t = tl.max(m_t, 0)
    a = _rescale((m_s, m_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t), top_s, top_t, k_s, k_t)
    return (
        top_s, top_t, tl.sum(a[0], 0), tl.sum(a[1], 0), tl.sum(a[2], 0), tl.sum(a[3], 0),
        tl.sum(a[4], 0), tl.sum(a[5], 0), tl.max(alone_s, 0), tl.max(alone_t, 0),
    )  # fmt: skip


@triton.jit
def _alone(
    state, s_row, t_row, first, last, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    # The running values, with d_max and d_min replaced: by each model's largest z among the entries that only the other model
    # masks, -inf if there are none. d_max and d_min tell whether there may be any; most rows have none and skip the loop.
    m_s, m_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t, d_max, d_min = state
    alone_s = tl.full((LANES,), float("-inf"), tl.float32)
    alone_t = tl.full((LANES,), float("-inf"), tl.float32)
    far = FAR * tl.minimum(k_s, k_t)
    if (tl.max(d_max, 0) > far) | (tl.min(d_min, 0) < -far):
        for v in range(first, last, LANES):
            offs = v + tl.arange(0, LANES)
            s = tl.load(s_row + offs, mask=offs < last, other=float("-inf"))
            t = tl.load(t_row + offs, mask=offs < last, other=float("-inf"))
            s_masked = _is_masked(s, CAP_S) | (offs >= last)
            t_masked = _is_masked(t, CAP_T) | (offs >= last)
            z_s = _transform(s, pre_s, cap_s, CAP_S)
            z_t = _transform(t, pre_t, cap_t, CAP_T)
            alone_s = tl.maximum(alone_s, tl.where(t_masked & (s_masked == 0), z_s, float("-inf")))
            alone_t = tl.maximum(alone_t, tl.where(s_masked & (t_masked == 0), z_t, float("-inf")))
    return m_s, m_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t, alone_s, alone_t


@triton.jit
def _write_columns(out_ptr, stride, total, k_s, k_t):
    top_s, top_t, sum_s, sum_t, x_s, x_t, gap_s, gap_t, alone_s, alone_t = total
    ref_s = top_s * k_s
    ref_t = top_t * k_t
    log_zs = _log_ratio(sum_s, 1.0)
    log_zt = _log_ratio(sum_t, 1.0)
    dz = _log_ratio(sum_s, sum_t)
    NAN = float("nan")
    INF = float("inf")
    both = (sum_s > 0.0) & (sum_t > 0.0)  # false for NaN too
    reverse = (gap_s / sum_s) * LN_2 - dz
    forward = dz - (gap_t / sum_t) * LN_2
    reverse = tl.maximum(reverse, 0.0, propagate_nan=tl.PropagateNan.ALL)
    forward = tl.maximum(forward, 0.0, propagate_nan=tl.PropagateNan.ALL)
    log2_p = (alone_s * k_s - ref_s) - log_zs * 1.4426950408889634
    log2_q = (alone_t * k_t - ref_t) - log_zt * 1.4426950408889634
    reverse = tl.where(both, tl.where((log2_p > LOG2_ZERO) & (reverse == reverse), INF, reverse), NAN)
    forward = tl.where(both, tl.where((log2_q > LOG2_ZERO) & (forward == forward), INF, forward), NAN)
    ent_s = tl.maximum(log_zs - (x_s / sum_s) * LN_2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    ent_t = tl.maximum(log_zt - (x_t / sum_t) * LN_2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr, ref_s * LN_2 + log_zs)
    tl.store(out_ptr + stride, ref_t * LN_2 + log_zt)
    tl.store(out_ptr + 2 * stride, (ref_s - ref_t) * LN_2 + dz)
    tl.store(out_ptr + 3 * stride, ent_s)
    tl.store(out_ptr + 4 * stride, ent_t)
    tl.store(out_ptr + 5 * stride, reverse)
    tl.store(out_ptr + 6 * stride, forward)
    # The sums are relative to k top rounded to fp32, but a later kernel subtracts top itself: log2z is corrected.
    rest_s = tl.fma(top_s, k_s, -ref_s)
    rest_t = tl.fma(top_t, k_t, -ref_t)
    tl.store(out_ptr + 7 * stride, top_s)
    tl.store(out_ptr + 8 * stride, log_zs * 1.4426950408889634 - rest_s)
    tl.store(out_ptr + 9 * stride, top_t)
    tl.store(out_ptr + 10 * stride, log_zt * 1.4426950408889634 - rest_t)
    tl.store(out_ptr + 11 * stride, dz * 1.4426950408889634 - (rest_s - rest_t))


@triton.jit(do_not_specialize=["stride_out", "parts"])
def _score_fwd_kernel(
    s_ptr, t_ptr, rows_ptr, out_ptr, gmax_ptr, stride_sn, stride_tn, stride_out, parts, V,
    k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    HAS_ROWS: tl.constexpr, SPLIT: tl.constexpr, UNIT_S: tl.constexpr, UNIT_T: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    R: tl.constexpr, GROUPS: tl.constexpr, QUAD: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = R * QUAD * VEC
    BLOCK: tl.constexpr = GROUPS * G
    k_s = tl.cast(k_s, tl.float32)
    k_t = tl.cast(k_t, tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    pid_n = pid
    n_full = V // BLOCK
    b_first = 0
    b_last = n_full
    limit = V
    if SPLIT:
        pid_n = pid // parts
        part = (pid % parts).to(tl.int32)
        b_first = (n_full * part) // parts
        b_last = (n_full * (part + 1)) // parts
        limit = tl.where(part == parts - 1, V, 0)
    row = pid_n
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid_n).to(tl.int64)
    s_row = s_ptr + row * stride_sn * UNIT_S
    t_row = t_ptr + row * stride_tn * UNIT_T
    stride_g = tl.cdiv(V, G * ALIGN) * ALIGN
    lane = tl.arange(0, GROUPS * QUAD)
    gmax_lane = gmax_ptr + pid_n * (2 * stride_g) + (lane % QUAD * stride_g + lane // QUAD)

    m = tl.full((GROUPS * QUAD,), FLOOR, tl.float32)
    z = tl.zeros((GROUPS * QUAD,), tl.float32)
    # The masked end of the row comes first: the running values then have the layout of the loop.
    state = _block(
        (m, m, z, z, z, z, z, z, z, z), s_row, t_row, gmax_lane, n_full, limit,
        k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, True, R, GROUPS, QUAD, VEC,
    )  # fmt: skip
    for b in range(b_first, b_last):
        state = _block(
            state, s_row, t_row, gmax_lane, b, limit,
            k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, False, R, GROUPS, QUAD, VEC,
        )  # fmt: skip
    last = V
    if SPLIT:
        last = tl.where(part == parts - 1, V, b_last * BLOCK)
    state = _alone(
        state, s_row, t_row, b_first * BLOCK, last, k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, GROUPS * QUAD
    )
    total = _join_lanes(state, k_s, k_t)
    if SPLIT:
        for i in tl.static_range(10):
            tl.store(out_ptr + pid * 10 + i, total[i])
    else:
        _write_columns(out_ptr + pid_n, stride_out, total, k_s, k_t)


@triton.jit(do_not_specialize=["stride_out", "parts"])
def _merge_fwd_kernel(part_ptr, out_ptr, stride_out, parts, k_s, k_t, PARTS: tl.constexpr):
    k_s = tl.cast(k_s, tl.float32)
    k_t = tl.cast(k_t, tl.float32)
    pid_n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PARTS)
    ptr = part_ptr + (pid_n * parts + lane) * 10
    state = ()
    for i in tl.static_range(10):
        state = state + (tl.load(ptr + i, mask=lane < parts, other=FLOOR if i < 2 else float("-inf") if i > 7 else 0.0),)
    _write_columns(out_ptr + pid_n, stride_out, _join_lanes(state, k_s, k_t), k_s, k_t)


def score_fwd(
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (n,) int32 or int64; None: all rows
    *,
    out: Tensor | None = None,  # (12, n) fp32, unit stride along n; None: a new tensor
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> Score:
    """The columns named in COLUMNS and the group maxima, at the given rows."""
    assert student.stride(1) == teacher.stride(1) == 1, "unit stride along the vocabulary"
    n = student.shape[0] if rows is None else rows.shape[0]
    stride_g = triton.cdiv(vocab_size, GROUP * ALIGN.value) * ALIGN.value
    same = student.dtype == teacher.dtype
    columns = torch.empty((len(COLUMNS), n), dtype=torch.float32, device=student.device) if out is None else out
    assert columns.shape == (len(COLUMNS), n)
    assert n <= 1 or columns.stride(1) == 1, "unit stride along the rows"
    group_max = torch.empty((n, 2, stride_g), dtype=student.dtype if same else torch.float32, device=student.device)
    if n == 0:
        return Score(columns, group_max)
    s = transform(s_scale, s_softcap, temperature)
    t = transform(t_scale, t_softcap, temperature)
    aligned = rows_are_aligned(student, teacher)
    tile = launch_table.score(student.dtype, teacher.dtype, aligned=aligned, capped=s.has_cap or t.has_cap)
    parts = launch_table.score_parts(n, vocab_size, tile, student.device)
    written = columns
    if parts > 1:
        written = torch.empty((n, parts, N_PARTIALS), dtype=torch.float32, device=student.device)
    (stride_s, unit_s), (stride_t, unit_t) = row_step(student), row_step(teacher)
    _score_fwd_kernel[(n * parts,)](
        student, teacher, rows, written, group_max, stride_s, stride_t, columns.stride(0), parts, vocab_size,
        s.k, s.pre, s.cap, t.k, t.pre, t.cap,
        HAS_ROWS=rows is not None, SPLIT=parts > 1, UNIT_S=unit_s, UNIT_T=unit_t, CAP_S=s.has_cap, CAP_T=t.has_cap,
        **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    if parts > 1:
        _merge_fwd_kernel[(n,)](
            written, columns, columns.stride(0), parts, s.k, t.k,
            PARTS=triton.next_power_of_2(parts), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return Score(columns, group_max)
