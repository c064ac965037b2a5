"""Score: all full-vocabulary statistics of a position, in one sweep over its two rows of logits (a second one only where a
logit is masked, infinite or NaN).

  p = softmax(s), q = softmax(t);  s, t the logits after scale, soft-cap and temperature
  lse_s = log sum e^s       H(p) = lse_s - E_p[s]        KL(p||q) = E_p[s - t] - (lse_s - lse_t)
  lse_t = log sum e^t       H(q) = lse_t - E_q[t]        KL(q||p) = (lse_s - lse_t) - E_q[s - t]
  Source: arXiv:2605.26844 eqs. 9-16 and arXiv:2604.14084 eq. 3 use these; natural logarithms, nats.
  With VARIANCE also Var_p[log p - log q] = Var_p[s - t]; without it, nothing of it is compiled.
  Also the largest stored logit of every group of GROUP = 128 consecutive logits, for support.py.

Shapes: N rows in the tables, n of them scored, V vocabulary, NG = ceil(V / 128) groups
  s_ptr, t_ptr  (N, V)    in   stored logits, fp32/bf16/fp16, unit stride along V, any row stride
  rows        (n,)        in   row numbers in [0, N), any order; None: rows 0 .. N-1
  columns     (12, n)     out  fp32, the order of COLUMNS
  variance    (n,)        out  fp32, only with VARIANCE
  group_max   (n, 2, NG rounded up to 16)  out  student, teacher; the stored type (fp32 if the models' types differ);
                          entries beyond NG are not written

Grid: (n * parts,). A program walks one part of a row in blocks of LANES * VEC * R logits, and the end of the row, which fills
no block, in blocks of LANES * TAIL_R. With parts > 1 (few rows) it writes its running values,
ten or twelve, and _merge_fwd_kernel joins all parts, in order.
Traffic: 2 V logits read once, 2 NG values and 48 bytes written.

Not here: how a lane holds its logits (words.py), running sums and columns (score_sums.py), rows with masked logits
(score_careful.py), top-K (support.py), gradients (gradient.py), block sizes (launch_table.py).
Specification: opd_ops/backends/eager.py. Tests: tests/kernels/test_score.py.
"""

# Numerics
#   Lane: the logits that one thread reads. Each lane has its own reference r = k max(z) in base 2
#   (device.py defines k and z) and its own sums. Lanes are joined once, after the loop. The loop has
#   no barrier; the two group maxima cost one shuffle per model and bit of QUAD.
#   x = k z - r is one fused multiply-add: its rounding error is relative to |x|, not to |k z|.
#   A block's sums are chains of R VEC fused multiply-adds that start at 0; they are added to the running sums once.
#   exp2 flushes below 2^-126.
#   The loop tests no logit. An exponent of -inf or NaN makes sum 2^x x NaN, since 0 * -inf is NaN; masks that are finite
#   show in the lane's smallest logit. Where either shows, score_careful.py computes the row once more.
#   FP contraction is off (enable_fp_fusion=False) and every fused multiply-add is written out:
#   fusing  m k - r  with r = fl(m k) would return the rounding error instead of 0.
#   Stored logits have the order of logits, since scale > 0 and tanh increases strictly.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import FLOOR, VOID, _is_masked, _transform, check_launch, row_step, rows_are_aligned, transform
from .score_careful import _careful_total
from .score_sums import N_PARTIALS, N_SPREAD, _add_pair, _join_lanes, _join_spread, _rescale, _spread_of, _write_columns
from .words import _first_minimum, _largest, _last_minimum, _load_logits, _running_minimum, _widen

GROUP = 128  # logits per group maximum
ALIGN = tl.constexpr(16)  # row stride of the maxima is a multiple of it, so that support.py reads them 16 bytes at a time
TAIL_QUAD = tl.constexpr(32)  # lanes that share a group at the end of a row, each with TAIL_R of its logits
TAIL_R = tl.constexpr(GROUP // 32)
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


class Score(NamedTuple):
    """The results of the score pass over n rows; `score.student_entropy` is the column of that name."""

    columns: Tensor  # (12, n) fp32, the order of COLUMNS
    group_max: Tensor  # (n, 2, >= NG), student and teacher

    def __getattr__(self, name: str) -> Tensor:
        if name in COLUMNS:
            return self.columns[COLUMNS.index(name)]
        raise AttributeError(name)


@triton.jit
def _group_max(lane, GROUPS: tl.constexpr, QUAD: tl.constexpr):
    # (LANES,) -> (LANES,), each lane holding the maximum of the QUAD lanes of its group
    lanes = tl.reshape(lane, (GROUPS, QUAD))
    top = tl.broadcast_to(tl.max(lanes, 1)[:, None], (GROUPS, QUAD))
    return tl.reshape(top, (GROUPS * QUAD,))


@triton.jit
def _store_group_max(gmax_row, stride_g, group, is_group, lane_s, lane_t, GROUPS: tl.constexpr, QUAD: tl.constexpr):
    # lanes 0 and 1 of a group write its two maxima: no layout change
    side = tl.arange(0, GROUPS * QUAD) % QUAD
    top = tl.where(side == 0, _group_max(lane_s, GROUPS, QUAD), _group_max(lane_t, GROUPS, QUAD))
    tl.store(gmax_row + side * stride_g + group, top.to(gmax_row.dtype.element_ty), mask=(side < 2) & is_group)


@triton.jit
def _sums(zs, zt, first, limit, ref_s, ref_t, k_s, k_t, STEP: tl.constexpr, MASKED: tl.constexpr):
    # the sums of this block's logits in every lane, relative to ref_s and ref_t
    zero = tl.zeros_like(ref_s)
    sums = (zero, zero, zero, zero, zero, zero)
    for i in tl.static_range(len(zs)):
        x = tl.fma(zs[i], k_s, -ref_s)
        y = tl.fma(zt[i], k_t, -ref_t)
        if MASKED:
            inside = first + i * STEP < limit
            x = tl.where(inside, x, VOID)
            y = tl.where(inside, y, VOID)
        sums = _add_pair(sums, x, y)
    return sums


@triton.jit
def _spread(zs, zt, top, total, first, limit, ref_s, ref_t, k_s, k_t, STEP: tl.constexpr, MASKED: tl.constexpr):
    # the mean and the sum of squares of d = x - y in this block, by 2^x; `top`: each lane's largest zs, `total`: its sum 2^x
    offset = tl.zeros_like(ref_s)
    sum_1 = tl.zeros_like(ref_s)
    sum_2 = tl.zeros_like(ref_s)
    for i in tl.static_range(len(zs)):
        d = tl.fma(zs[i], k_s, -ref_s) - tl.fma(zt[i], k_t, -ref_t)
        is_top = zs[i] == top
        if MASKED:
            is_top = is_top & (first + i * STEP < limit)
        offset = tl.where(is_top, d, offset)
    for i in tl.static_range(len(zs)):
        x = tl.fma(zs[i], k_s, -ref_s)
        e = x - tl.fma(zt[i], k_t, -ref_t) - offset
        if MASKED:
            inside = first + i * STEP < limit
            x = tl.where(inside, x, VOID)
            e = tl.where(inside, e, 0.0)
        weighted = tl.exp2(x) * e
        sum_1 += weighted
        sum_2 = tl.fma(weighted, e, sum_2)
    return _spread_of(total, offset, sum_1, sum_2)


@triton.jit
def _transform_all(z, pre, cap, CAP: tl.constexpr):
    out = ()
    for i in tl.static_range(len(z)):
        out = out + (_transform(z[i], pre, cap, CAP),)
    return out


@triton.jit
def _add_block(
    state, zs, zt, lane_s, lane_t, first, limit, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    # The running values with a block of stored logits, of which lane_s and lane_t are each lane's largest. The products of
    # maxima and k are carried along.
    o_s, o_t, old_ref_s, old_ref_t, sums = state
    m_s = tl.maximum(o_s, _transform(lane_s, pre_s, cap_s, CAP_S))
    m_t = tl.maximum(o_t, _transform(lane_t, pre_t, cap_t, CAP_T))
    ref_s = m_s * k_s
    ref_t = m_t * k_t
    zs = _transform_all(zs, pre_s, cap_s, CAP_S)
    zt = _transform_all(zt, pre_t, cap_t, CAP_T)
    c = _sums(zs, zt, first, limit, ref_s, ref_t, k_s, k_t, STEP, MASKED)
    down_s = old_ref_s - ref_s
    down_t = old_ref_t - ref_t
    new_sums = _rescale(sums, down_s, down_t, c)
    if VARIANCE:
        top = _transform(lane_s, pre_s, cap_s, CAP_S)
        block = _spread(zs, zt, top, c[0], first, limit, ref_s, ref_t, k_s, k_t, STEP, MASKED)
        new_sums = new_sums + _join_spread((sums[6], sums[7]), sums[0], down_s, down_s - down_t, block, c[0])
    return m_s, m_t, ref_s, ref_t, new_sums


@triton.jit
def _tail_block(
    state, low_s, low_t, s_row, t_row, gmax_row, stride_g, b, limit, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, LANES: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    # A block that the end of the row may cut: one logit at a time
    GROUPS: tl.constexpr = LANES // TAIL_QUAD
    G: tl.constexpr = TAIL_QUAD * TAIL_R
    lane = tl.arange(0, LANES)
    first = b * (GROUPS * G) + lane // TAIL_QUAD * G + lane % TAIL_QUAD
    zs = ()
    zt = ()
    for r in tl.static_range(TAIL_R):
        offs = first + r * TAIL_QUAD
        z_s = tl.load(s_row + offs, mask=offs < limit, other=float("-inf")).to(tl.float32)
        z_t = tl.load(t_row + offs, mask=offs < limit, other=float("-inf")).to(tl.float32)
        low_s = tl.minimum(low_s, tl.where(offs < limit, z_s, 0.0))
        low_t = tl.minimum(low_t, tl.where(offs < limit, z_t, 0.0))
        zs = zs + (z_s,)
        zt = zt + (z_t,)
    lane_s = _largest(zs, tl.float32, 1, False)
    lane_t = _largest(zt, tl.float32, 1, False)
    group = b * GROUPS + lane // TAIL_QUAD
    _store_group_max(gmax_row, stride_g, group, group * G < limit, lane_s, lane_t, GROUPS, TAIL_QUAD)
    state = _add_block(
        state, zs, zt, lane_s, lane_t, first, limit, k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, TAIL_QUAD, True,
        VARIANCE,
    )  # fmt: skip
    return state, low_s, low_t


@triton.jit
def _block(
    state, low_s, low_t, s_row, t_row, gmax_row, stride_g, b, limit, k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, PACKED: tl.constexpr,
    R: tl.constexpr, GROUPS: tl.constexpr, QUAD: tl.constexpr, VEC: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    # A whole block. QUAD neighbouring threads share a group: thread j of them reads the chunks j, j + QUAD, ..
    # of VEC logits of the group's 128, so that a load of the warp reads full sectors.
    S: tl.constexpr = s_row.dtype.element_ty
    T: tl.constexpr = t_row.dtype.element_ty
    STEP: tl.constexpr = QUAD * VEC
    G: tl.constexpr = R * STEP
    lane = tl.arange(0, GROUPS * QUAD)
    first = b * (GROUPS * G) + lane // QUAD * G + lane % QUAD * VEC
    xs = _load_logits(s_row, first, R, STEP, VEC)
    xt = _load_logits(t_row, first, R, STEP, VEC)
    lane_s = _largest(xs, S, VEC, PACKED)
    lane_t = _largest(xt, T, VEC, PACKED)
    if not CAP_S:  # a soft-cap masks no logit
        low_s = _running_minimum(low_s, xs, S, VEC)
    if not CAP_T:
        low_t = _running_minimum(low_t, xt, T, VEC)
    _store_group_max(gmax_row, stride_g, b * GROUPS + lane // QUAD, True, lane_s, lane_t, GROUPS, QUAD)
    # Logits become fp32 only here: until then two of them take one register.
    zs = _widen(xs, S, VEC)
    zt = _widen(xt, T, VEC)
    state = _add_block(
        state, zs, zt, lane_s, lane_t, first, limit, k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, STEP, False, VARIANCE
    )
    return state, low_s, low_t


@triton.jit
def _is_ordinary(total, S: tl.constexpr, T: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr):
    # Whether every sum is finite and no logit masked; total[8] and total[9] are minus each model's smallest stored logit.
    size = 0.0
    for i in tl.static_range(2, 8):
        size += tl.abs(total[i])
    return (size < float("inf")) & (_is_masked((-total[8]).to(S), CAP_S) == 0) & (_is_masked((-total[9]).to(T), CAP_T) == 0)


@triton.jit(do_not_specialize=["stride_out", "parts"])
def _score_fwd_kernel(
    s_ptr, t_ptr, rows_ptr, out_ptr, variance_ptr, gmax_ptr, stride_sn, stride_tn, stride_out, parts, V,
    k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    HAS_ROWS: tl.constexpr, SPLIT: tl.constexpr, UNIT_S: tl.constexpr, UNIT_T: tl.constexpr,
    CAP_S: tl.constexpr, CAP_T: tl.constexpr, PACKED: tl.constexpr,
    R: tl.constexpr, GROUPS: tl.constexpr, QUAD: tl.constexpr, VEC: tl.constexpr, VARIANCE: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = R * QUAD * VEC
    LANES: tl.constexpr = GROUPS * QUAD
    BLOCK: tl.constexpr = GROUPS * G
    TAIL: tl.constexpr = LANES * TAIL_R
    S: tl.constexpr = s_ptr.dtype.element_ty
    T: tl.constexpr = t_ptr.dtype.element_ty
    k_s = tl.cast(k_s, tl.float32)
    k_t = tl.cast(k_t, tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    pid_n = pid
    n_full = V // BLOCK
    b_first = 0
    b_last = n_full
    last = V
    if SPLIT:
        pid_n = pid // parts
        part = (pid % parts).to(tl.int32)
        b_first = (n_full * part) // parts
        b_last = (n_full * (part + 1)) // parts
        last = tl.where(part == parts - 1, V, b_last * BLOCK)
    row = pid_n
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid_n).to(tl.int64)
    s_row = s_ptr + row * stride_sn * UNIT_S
    t_row = t_ptr + row * stride_tn * UNIT_T
    stride_g = tl.cdiv(V, G * ALIGN) * ALIGN
    gmax_row = gmax_ptr + pid_n * (2 * stride_g)

    m = tl.full((LANES,), FLOOR, tl.float32)
    zero = tl.zeros((LANES,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero)
    if VARIANCE:
        sums = sums + (zero, zero)
    state = (m, m, m * k_s, m * k_t, sums)
    low_s = zero
    low_t = zero
    for b in range(b_last * (BLOCK // TAIL), tl.cdiv(last, TAIL)):
        state, low_s, low_t = _tail_block(
            state, low_s, low_t, s_row, t_row, gmax_row, stride_g, b, last,
            k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, LANES, VARIANCE,
        )  # fmt: skip
    low_s = _first_minimum(low_s, S, VEC, PACKED)
    low_t = _first_minimum(low_t, T, VEC, PACKED)
    for b in range(b_first, b_last):
        state, low_s, low_t = _block(
            state, low_s, low_t, s_row, t_row, gmax_row, stride_g, b, last,
            k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, PACKED, R, GROUPS, QUAD, VEC, VARIANCE,
        )  # fmt: skip
    total = _join_lanes(state[0], state[1], state[4], -_last_minimum(low_s, S), -_last_minimum(low_t, T), k_s, k_t, VARIANCE)
    if _is_ordinary(total, S, T, CAP_S, CAP_T):
        alone = float("-inf")
        if VARIANCE:
            mean, squares = total[10], total[11]
            total = total[0], total[1], total[2], total[3], total[4], total[5], total[6], total[7], alone, alone, mean, squares
        else:
            total = total[0], total[1], total[2], total[3], total[4], total[5], total[6], total[7], alone, alone
    else:
        total = _careful_total(
            s_row, t_row, b_first * BLOCK, last, k_s, pre_s, cap_s, k_t, pre_t, cap_t, CAP_S, CAP_T, LANES, VEC, VARIANCE
        )
    if SPLIT:
        WIDTH: tl.constexpr = N_PARTIALS + N_SPREAD * VARIANCE
        for i in tl.static_range(WIDTH):
            tl.store(out_ptr + pid * WIDTH + i, total[i])
    else:
        _write_columns(out_ptr + pid_n, stride_out, variance_ptr + pid_n if VARIANCE else None, total, k_s, k_t, VARIANCE)


@triton.jit(do_not_specialize=["stride_out", "parts"])
def _merge_fwd_kernel(
    part_ptr, out_ptr, variance_ptr, stride_out, parts, k_s, k_t, PARTS: tl.constexpr, VARIANCE: tl.constexpr
):
    WIDTH: tl.constexpr = N_PARTIALS + N_SPREAD * VARIANCE
    k_s = tl.cast(k_s, tl.float32)
    k_t = tl.cast(k_t, tl.float32)
    pid_n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PARTS)
    ptr = part_ptr + (pid_n * parts + lane) * WIDTH
    v = ()
    for i in tl.static_range(WIDTH):
        v = v + (tl.load(ptr + i, mask=lane < parts, other=FLOOR if i < 2 else float("-inf") if (i == 8 or i == 9) else 0.0),)
    sums = (v[2], v[3], v[4], v[5], v[6], v[7])
    if VARIANCE:
        sums = sums + (v[10], v[11])
    total = _join_lanes(v[0], v[1], sums, v[8], v[9], k_s, k_t, VARIANCE)
    _write_columns(out_ptr + pid_n, stride_out, variance_ptr + pid_n if VARIANCE else None, total, k_s, k_t, VARIANCE)


def score_fwd(
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (n,) int32 or int64; None: all rows
    *,
    out: Tensor | None = None,  # (12, n) fp32, unit stride along n; None: a new tensor
    variance: Tensor | None = None,  # (n,) fp32, unit stride: takes Var_p[log p - log q]; None: it is not computed
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> Score:
    """The columns named in COLUMNS and the group maxima, at the given rows."""
    assert student.stride(1) == teacher.stride(1) == 1, "unit stride along the vocabulary"
    check_launch(student, rows=rows, variance=variance)
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
    packed = launch_table.takes_ptx(_score_fwd_kernel, student.device)
    parts = launch_table.score_parts(n, vocab_size, tile, student.device)
    written = columns
    if parts > 1:
        width = N_PARTIALS.value + (0 if variance is None else N_SPREAD.value)
        written = torch.empty((n, parts, width), dtype=torch.float32, device=student.device)
    (stride_s, unit_s), (stride_t, unit_t) = row_step(student), row_step(teacher)
    _score_fwd_kernel[(n * parts,)](
        student, teacher, rows, written, variance, group_max, stride_s, stride_t, columns.stride(0), parts, vocab_size,
        s.k, s.pre, s.cap, t.k, t.pre, t.cap,
        HAS_ROWS=rows is not None, SPLIT=parts > 1, UNIT_S=unit_s, UNIT_T=unit_t, CAP_S=s.has_cap, CAP_T=t.has_cap,
        PACKED=packed, VARIANCE=variance is not None, **tile.constants, num_warps=tile.num_warps, enable_fp_fusion=False,
        **(tile.limits() if variance is None else {}),
    )  # fmt: skip
    if parts > 1:
        _merge_fwd_kernel[(n,)](
            written, columns, variance, columns.stride(0), parts, s.k, t.k,
            PARTS=triton.next_power_of_2(parts), VARIANCE=variance is not None, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return Score(columns, group_max)
