"""TopKLists: exact top-K of both models, and the statistics on these supports.

  S, T: ids of the K largest logits of student and teacher, order (logit descending, id ascending)
  support_mass C = sum_S q                    (arXiv:2605.26844 eq. 10; q over the whole vocabulary)
  student_support_mass = sum_S p,  overlap_mass = sum_{S & T} q       (eq. 17)
  union_kl D = KL(q|U || p|U), U = S | T, both renormalised on U      (eq. 9, forward KL)

Shapes: n rows, V vocabulary, NG = ceil(V / 128) groups, K <= 128, K <= V
  s, t       (N, V)      in   stored logits; rows (n,) in, or None
  group_max  (n, 2, >= NG)  in   score.py
  columns    (12, n)     in   score.py
  ids        (n, 2, K)   out  int32, S then T, in order
  logits     (n, 4, K)   out  fp32 after scale, soft-cap and temperature: s at S, t at S, s at T, t at T
  columns    (4, n)      out  fp32, the order of SUPPORT_COLUMNS
  optional   (n,)        out  fp32, each column of list_columns.py that is asked for

Three kernels, because a thread reads numbers that other threads wrote:
  groups  (2n programs)  the K groups with the largest maxima, ties to the lower group. They contain the
          top-K: K group maxima precede every element outside them, each larger, or equal with a lower id.
  topk    (2n programs; n for each model if their types differ)  the K largest of those 128 K candidates, ties to the lower
          id, written as places among the candidates.
  stats   (n programs)   orders each list by counting, gathers logits, reduces.
groups and topk search twice: the K runs of RUN neighbouring keys with the largest maxima, then the keys of these runs, which
contain the K largest keys for the same reason. Between the two the list of runs passes through the memory of the output.
Traffic: 2 NG maxima, 2 * 128 K logits, the runs of both again, 8 K gathered logits per row: 4 % of the row at K = 16.

Not here: the choice of K (opd_ops/selection/selectors.py), full-vocabulary statistics (score.py).
Specification: opd_ops/backends/eager.py. Tests: tests/kernels/test_support.py.
"""

# Numerics
#   Selection compares integers (device.py: _order_key), so it is exact for any values. Bisection between a lower bound
#   and the largest key finds the K-th: 7 (groups) and 5 (topk) rounds on normal bf16 logits at V = 152k and K = 16, 23
#   and 21 in fp32; never more rounds than a key has bits. Stored logits are ranked. They have the order of the logits,
#   because scale > 0 and tanh increases strictly, without the ties that rounding a soft-cap would add.
#   -inf ranks last, by id. NaN ranks beyond the infinities. The result always has K different ids inside the vocabulary.
#   On U, D = sum q(log q - log p) + sum p - sum q. The last two sums differ only by the rounding of the normalisers,
#   and cancel its effect on the first sum. Clamped at 0.
#   Masked logits (device.py: _is_masked) are -inf. D = +inf if an id of U has s = -inf and q > 0 in fp64.

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_table
from .device import LN_2, LOG2_ZERO, _is_masked, _log2_prob, _order_key, _pick, _transform, check_launch, row_step, transform
from .list_columns import LIST_COLUMNS, _store_list_columns
from .score import GROUP, Score

SUPPORT_COLUMNS = ("support_mass", "student_support_mass", "overlap_mass", "union_kl")
LIST_POINTERS = [f"{name}_ptr" for name in LIST_COLUMNS]
INT_MIN = tl.constexpr(-(2**31))
INT_MAX = tl.constexpr(2**31 - 1)
SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits that are constant once a stored number is fp32


class TopKLists(NamedTuple):
    ids: Tensor  # (n, 2, K) int32, S and T in order
    logits: Tensor  # (n, 4, K) fp32: s at S, t at S, s at T, t at T
    columns: Tensor  # (4, n) fp32, the order of SUPPORT_COLUMNS

    @property
    def s_ids(self) -> Tensor:
        return self.ids[:, 0]

    @property
    def t_ids(self) -> Tensor:
        return self.ids[:, 1]

    def __getattr__(self, name: str) -> Tensor:
        if name in SUPPORT_COLUMNS:
            return self.columns[SUPPORT_COLUMNS.index(name)]
        raise AttributeError(name)


@triton.jit
def _pick_list(list_ptr, keys, K, low, high, N: tl.constexpr):
    # Writes the places of the K largest of (A, B) keys, ascending, to list_ptr and reads them back: entries j = 0 .. N - 1,
    # each in all threads that need it; those from K on are 0.
    A: tl.constexpr = keys.shape[0]
    B: tl.constexpr = keys.shape[1]
    picked, place = _pick(keys, K, low, high)
    tl.store(list_ptr + place, tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :], mask=picked)
    tl.debug_barrier()
    j = tl.arange(0, N)
    listed = tl.load(list_ptr + j, mask=j < K, other=0)
    tl.debug_barrier()  # the list is overwritten by the final one
    return listed


@triton.jit(do_not_specialize=["n_groups", "KG"])
def _support_groups_fwd_kernel(
    gmax_ptr, groups_ptr, stride, n_groups, KG,
    NG: tl.constexpr, SETS: tl.constexpr, RUN: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    RUNS: tl.constexpr = NG // RUN
    LOWEST: tl.constexpr = INT_MIN >> SHIFT
    pid = tl.program_id(0).to(tl.int64)
    gmax_row = gmax_ptr + pid * stride
    groups_row = groups_ptr + pid * KG
    g = tl.arange(0, RUNS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    # 128-bit loads: stride is a multiple of 16; maxima beyond n_groups get the lowest key
    x = tl.load(gmax_row + g, mask=g < stride, other=float("-inf"))
    tops = tl.max(tl.where(g < n_groups, _order_key(x, SHIFT), LOWEST), 1)
    # Lower bound: set i is the tops i, i + SETS, ..; there are SETS >= KG sets. The KG-th largest of all tops is at least
    # the smallest of the sets' maxima (an empty set has the lowest key).
    sets = tl.max(tl.reshape(tops, (RUNS // SETS, SETS)), 0)
    high = tl.max(sets, 0)
    n_runs = tl.minimum(KG, tl.cdiv(n_groups, RUN))
    runs = _pick_list(groups_row, tl.reshape(tops, (1, RUNS)), n_runs, tl.min(sets, 0), high, SETS)
    is_run = tl.arange(0, SETS) < n_runs
    g = runs[:, None] * RUN + tl.arange(0, RUN)[None, :]  # (SETS, RUN), ascending
    inside = is_run[:, None] & (g < n_groups)
    x = tl.load(gmax_row + g, mask=inside, other=float("-inf"))
    keys = tl.where(inside, _order_key(x, SHIFT), LOWEST)
    # The same bound from the tops of the picked runs, if there are KG of them.
    least = tl.min(tl.where(is_run, tl.max(keys, 1), INT_MAX), 0)
    picked, place = _pick(keys, KG, tl.where(n_runs < KG, LOWEST, least), high)
    tl.store(groups_row + place, g, mask=picked)


@triton.jit(do_not_specialize=["K", "KG", "first_side"])
def _support_topk_fwd_kernel(
    s_ptr, t_ptr, rows_ptr, groups_ptr, unordered_ptr, stride_sn, stride_tn, V, K, KG, first_side,
    HAS_ROWS: tl.constexpr, SIDES: tl.constexpr, UNIT_S: tl.constexpr, UNIT_T: tl.constexpr,
    GROUP: tl.constexpr, KGP: tl.constexpr, KP: tl.constexpr, RUN: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    # SIDES = 2: of both models; 1: of the model `first_side`, whose logits are s and t
    IN_GROUP: tl.constexpr = GROUP // RUN  # runs
    LOWEST: tl.constexpr = INT_MIN >> SHIFT
    pid = tl.program_id(0).to(tl.int64)
    row = pid // SIDES
    side = first_side + pid % SIDES
    place_of = row * 2 + side  # in the outputs
    if HAS_ROWS:
        row = tl.load(rows_ptr + row).to(tl.int64)
    x_row = tl.where(side == 0, s_ptr + row * stride_sn * UNIT_S, t_ptr + row * stride_tn * UNIT_T)
    groups_row = groups_ptr + place_of * KG
    unordered_row = unordered_ptr + place_of * K
    j = tl.arange(0, KGP)
    group = tl.load(groups_row + j, mask=j < KG, other=0)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (KGP, GROUP), ascending
    inside = (j < KG)[:, None] & (ids < V)
    x = tl.load(x_row + ids, mask=inside, other=float("-inf"))
    keys = tl.where(inside, _order_key(x, SHIFT), LOWEST)
    tops = tl.max(tl.reshape(keys, (KGP, IN_GROUP, RUN)), 2)  # (KGP, IN_GROUP)
    # The groups' maxima bound the K-th top from below, if there are K groups: few keys lie above it.
    in_group = tl.max(tops, 1)
    least = tl.min(tl.where(j < KG, in_group, INT_MAX), 0)
    least = tl.where(KG < K, LOWEST, least)
    high = tl.max(in_group, 0)
    n_runs = tl.minimum(K, KG * IN_GROUP)
    runs = _pick_list(unordered_row, tops, n_runs, least, high, KP)
    is_run = tl.arange(0, KP) < n_runs
    group = tl.load(groups_row + runs // IN_GROUP, mask=is_run, other=0)
    place_in = tl.arange(0, RUN)[None, :]
    ids = (group * GROUP + runs % IN_GROUP * RUN)[:, None] + place_in  # (KP, RUN), ascending
    inside = is_run[:, None] & (ids < V)
    x = tl.load(x_row + ids, mask=inside, other=float("-inf"))
    keys = tl.where(inside, _order_key(x, SHIFT), LOWEST)
    least = tl.min(tl.where(is_run, tl.max(keys, 1), INT_MAX), 0)
    picked, place = _pick(keys, K, tl.where(n_runs < K, LOWEST, least), high)
    tl.store(unordered_row + place, runs[:, None] * RUN + place_in, mask=picked)


@triton.jit
def _list(x_row, unordered_ptr, groups_ptr, j, mask_k, GROUP: tl.constexpr):
    # ids and keys of entries j of an unordered list; entries outside mask_k: largest int32, lowest key
    place = tl.load(unordered_ptr + j, mask=mask_k, other=0)
    group = tl.load(groups_ptr + place // GROUP, mask=mask_k, other=0)
    ids = tl.where(mask_k, group * GROUP + place % GROUP, 2147483647)
    x = tl.load(x_row + ids, mask=mask_k, other=float("-inf"))
    return ids, tl.where(mask_k, _order_key(x, 0), INT_MIN)


@triton.jit
def _before(keys, ids, chunk_keys, chunk_ids):
    # how many entries of the chunk precede each entry in the order (logit descending, id ascending)
    a, b = chunk_keys[None, :], keys[:, None]
    before = (a > b) | ((a == b) & (chunk_ids[None, :] < ids[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@triton.jit
def _place_lists(
    s_row, t_row, unordered_row, groups_row, s_ids, s_keys, t_ids, t_keys, K, KG,
    GROUP: tl.constexpr, KP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # The place of each entry in its ordered list, and how often its id is in the other list. By chunks,
    # since K * K comparisons at once do not fit the registers at K = 128.
    s_place = tl.zeros((KP,), tl.int32)
    t_place = tl.zeros((KP,), tl.int32)
    s_in_t = tl.zeros((KP,), tl.int32)
    t_in_s = tl.zeros((KP,), tl.int32)
    for c in range(0, KP, CHUNK):
        j = c + tl.arange(0, CHUNK)
        s_c, s_key_c = _list(s_row, unordered_row, groups_row, j, j < K, GROUP)
        t_c, t_key_c = _list(t_row, unordered_row + K, groups_row + KG, j, j < K, GROUP)
        s_place += _before(s_keys, s_ids, s_key_c, s_c)
        t_place += _before(t_keys, t_ids, t_key_c, t_c)
        s_in_t += tl.sum((s_ids[:, None] == t_c[None, :]).to(tl.int32), 1)
        t_in_s += tl.sum((t_ids[:, None] == s_c[None, :]).to(tl.int32), 1)
    return s_place, t_place, s_in_t, t_in_s


@triton.jit
def _logit(x, pre, cap, CAP: tl.constexpr):
    # z of a stored logit, -inf where masked
    return tl.where(_is_masked(x, CAP), float("-inf"), _transform(x, pre, cap, CAP))


@triton.jit
def _union_terms(a, b, keep):
    # per id of U: q (log2 q - log2 p), q, p, and whether p = 0 < q; a = log2 p, b = log2 q
    both = keep & (a > float("-inf")) & (b > float("-inf"))
    nan = keep & ((a != a) | (b != b))
    p = tl.where(keep, tl.exp2(a), 0.0)
    q = tl.where(keep, tl.exp2(b), 0.0)
    term = tl.where(both | nan, q * (b - a), 0.0)
    lost = keep & (a == float("-inf")) & (b > LOG2_ZERO)
    return term, q, p, lost


@triton.jit
def _union_kl(s_at_s, t_at_s, s_at_t, t_at_t, keep_s, keep_t, k_s, k_t):
    low = float("-inf")
    top_s = tl.maximum(tl.max(tl.where(keep_s, s_at_s, low), 0), tl.max(tl.where(keep_t, s_at_t, low), 0))
    top_t = tl.maximum(tl.max(tl.where(keep_s, t_at_s, low), 0), tl.max(tl.where(keep_t, t_at_t, low), 0))
    a_s = (s_at_s - top_s) * k_s
    b_s = (t_at_s - top_t) * k_t
    a_t = (s_at_t - top_s) * k_s
    b_t = (t_at_t - top_t) * k_t
    z_s = tl.sum(tl.where(keep_s, tl.exp2(a_s), 0.0), 0) + tl.sum(tl.where(keep_t, tl.exp2(a_t), 0.0), 0)
    z_t = tl.sum(tl.where(keep_s, tl.exp2(b_s), 0.0), 0) + tl.sum(tl.where(keep_t, tl.exp2(b_t), 0.0), 0)
    u = _union_terms(a_s - tl.log2(z_s), b_s - tl.log2(z_t), keep_s)
    v = _union_terms(a_t - tl.log2(z_s), b_t - tl.log2(z_t), keep_t)
    kl = tl.sum(u[0] * LN_2 + (u[2] - u[1]), 0) + tl.sum(v[0] * LN_2 + (v[2] - v[1]), 0)
    kl = tl.maximum(kl, 0.0, propagate_nan=tl.PropagateNan.ALL)
    lost = tl.sum(u[3].to(tl.int32), 0) + tl.sum(v[3].to(tl.int32), 0)
    return tl.where((lost > 0) & (kl == kl), float("inf"), kl)


@triton.jit(do_not_specialize=["stride_c", "K", "KG"], do_not_specialize_on_alignment=LIST_POINTERS)
def _support_stats_fwd_kernel(
    s_ptr, t_ptr, rows_ptr, groups_ptr, unordered_ptr, score_ptr, ids_ptr, logits_ptr, out_ptr,
    released_kl_ptr, topk_entropy_ptr, top1_agreement_ptr, teacher_rank_ptr,
    stride_sn, stride_tn, stride_c, K, KG,
    k_s, pre_s, cap_s, k_t, pre_t, cap_t,
    HAS_ROWS: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, GROUP: tl.constexpr, KP: tl.constexpr,
    CHUNK: tl.constexpr, HAS_LIST_COLUMNS: tl.constexpr,
):  # fmt: skip
    k_s = tl.cast(k_s, tl.float32)
    k_t = tl.cast(k_t, tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    row = pid
    if HAS_ROWS:
        row = tl.load(rows_ptr + pid).to(tl.int64)
    j = tl.arange(0, KP)
    mask_k = j < K
    s_row = s_ptr + row * stride_sn
    t_row = t_ptr + row * stride_tn
    unordered_row = unordered_ptr + pid * 2 * K
    groups_row = groups_ptr + pid * 2 * KG
    s_ids, s_keys = _list(s_row, unordered_row, groups_row, j, mask_k, GROUP)
    t_ids, t_keys = _list(t_row, unordered_row + K, groups_row + KG, j, mask_k, GROUP)
    s_place, t_place, s_in_t, t_in_s = _place_lists(
        s_row, t_row, unordered_row, groups_row, s_ids, s_keys, t_ids, t_keys, K, KG, GROUP, KP, CHUNK
    )
    x_ss = tl.load(s_row + s_ids, mask=mask_k, other=float("-inf"))
    x_ts = tl.load(t_row + s_ids, mask=mask_k, other=float("-inf"))
    x_st = tl.load(s_row + t_ids, mask=mask_k, other=float("-inf"))
    x_tt = tl.load(t_row + t_ids, mask=mask_k, other=float("-inf"))
    s_at_s = _logit(x_ss, pre_s, cap_s, CAP_S)
    t_at_s = _logit(x_ts, pre_t, cap_t, CAP_T)
    s_at_t = _logit(x_st, pre_s, cap_s, CAP_S)
    t_at_t = _logit(x_tt, pre_t, cap_t, CAP_T)

    tl.store(ids_ptr + pid * 2 * K + s_place, s_ids, mask=mask_k)
    tl.store(ids_ptr + pid * 2 * K + K + t_place, t_ids, mask=mask_k)
    logits_row = logits_ptr + pid * 4 * K
    tl.store(logits_row + s_place, s_at_s * k_s * LN_2, mask=mask_k)
    tl.store(logits_row + K + s_place, t_at_s * k_t * LN_2, mask=mask_k)
    tl.store(logits_row + 2 * K + t_place, s_at_t * k_s * LN_2, mask=mask_k)
    tl.store(logits_row + 3 * K + t_place, t_at_t * k_t * LN_2, mask=mask_k)
    if HAS_LIST_COLUMNS:
        _store_list_columns(
            released_kl_ptr, topk_entropy_ptr, top1_agreement_ptr, teacher_rank_ptr, pid, K, s_ids, t_ids, s_place, t_place,
            s_in_t > 0, t_in_s > 0, s_at_s * k_s * LN_2, s_at_t * k_s * LN_2, t_at_t * k_t * LN_2, mask_k,
        )  # fmt: skip

    s_ref = tl.load(score_ptr + 7 * stride_c + pid)
    s_log2z = tl.load(score_ptr + 8 * stride_c + pid)
    t_ref = tl.load(score_ptr + 9 * stride_c + pid)
    t_log2z = tl.load(score_ptr + 10 * stride_c + pid)
    q_s = tl.where(mask_k, tl.exp2(_log2_prob(t_at_s, k_t, t_ref, t_log2z)), 0.0)
    p_s = tl.where(mask_k, tl.exp2(_log2_prob(s_at_s, k_s, s_ref, s_log2z)), 0.0)
    tl.store(out_ptr + pid, tl.sum(q_s, 0))
    tl.store(out_ptr + stride_c + pid, tl.sum(p_s, 0))
    tl.store(out_ptr + 2 * stride_c + pid, tl.sum(tl.where(s_in_t > 0, q_s, 0.0), 0))
    kl = _union_kl(s_at_s, t_at_s, s_at_t, t_at_t, mask_k, mask_k & (t_in_s == 0), k_s, k_t)
    # a NaN that is on no list still makes the normalisers NaN
    known = (s_log2z == s_log2z) & (t_log2z == t_log2z)
    tl.store(out_ptr + 3 * stride_c + pid, tl.where(known, kl, float("nan")))


def support_fwd(
    student: Tensor,  # (N, >= vocab_size), unit stride along the vocabulary
    teacher: Tensor,  # (N, >= vocab_size)
    rows: Tensor | None,  # (n,), the rows given to score_fwd
    score: Score,
    *,
    out: Tensor | None = None,  # (4, n) fp32, of the strides of score.columns; None: a new tensor
    optional: Mapping[str, Tensor] | None = None,  # by a name in LIST_COLUMNS, (n,) fp32 of stride 1 to write
    top_k: int,
    vocab_size: int,
    temperature: float,
    s_scale: float,
    t_scale: float,
    s_softcap: float | None,
    t_softcap: float | None,
) -> TopKLists:
    """Both supports in order, both models' logits there, and the columns of SUPPORT_COLUMNS."""
    assert 1 <= top_k <= min(128, vocab_size), f"top_k: got {top_k}, expected 1 .. min(128, {vocab_size})"
    assert student.stride(1) == teacher.stride(1) == 1, "unit stride along the vocabulary"
    check_launch(student, rows=rows, **(optional or {}))
    n, _, stride = score.group_max.shape
    n_groups = triton.cdiv(vocab_size, GROUP)
    new = {"device": student.device}
    ids = torch.empty((n, 2, top_k), dtype=torch.int32, **new)
    logits = torch.empty((n, 4, top_k), dtype=torch.float32, **new)
    columns = torch.empty((len(SUPPORT_COLUMNS), n), dtype=torch.float32, **new) if out is None else out
    assert columns.shape == (len(SUPPORT_COLUMNS), n)
    assert columns.stride() == score.columns.stride(), "the strides of the score's columns"
    if n == 0:
        return TopKLists(ids, logits, columns)
    n_picked = min(top_k, n_groups)
    groups = torch.empty((n, 2, n_picked), dtype=torch.int32, **new)
    places = torch.empty_like(ids)  # among the 128 n_picked candidates
    tile = launch_table.support(top_k, n_groups)
    n_sets, all_groups = triton.next_power_of_2(n_picked), max(GROUP, triton.next_power_of_2(n_groups))
    _support_groups_fwd_kernel[(2 * n,)](
        score.group_max, groups, stride, n_groups, n_picked,
        NG=all_groups, SETS=n_sets, RUN=min(launch_table.run(n_sets, all_groups), all_groups // n_sets),
        SHIFT=SHIFT[score.group_max.dtype], num_warps=tile.groups_warps, enable_fp_fusion=False,
    )  # fmt: skip
    pairs = [(student, teacher)] if student.dtype == teacher.dtype else [(student, student), (teacher, teacher)]
    sides = 2 // len(pairs)
    for first_side, (x, y) in enumerate(pairs):
        (stride_x, unit_x), (stride_y, unit_y) = row_step(x), row_step(y)
        _support_topk_fwd_kernel[(sides * n,)](
            x, y, rows, groups, places, stride_x, stride_y, vocab_size, top_k, n_picked, first_side,
            HAS_ROWS=rows is not None, SIDES=sides, UNIT_S=unit_x, UNIT_T=unit_y,
            GROUP=GROUP, KGP=n_sets, KP=triton.next_power_of_2(top_k), RUN=16, SHIFT=SHIFT[x.dtype],
            num_warps=tile.topk_warps, enable_fp_fusion=False,
        )  # fmt: skip
    s = transform(s_scale, s_softcap, temperature)
    t = transform(t_scale, t_softcap, temperature)
    list_columns = [None if optional is None else optional.get(name) for name in LIST_COLUMNS]
    _support_stats_fwd_kernel[(n,)](
        student, teacher, rows, groups, places, score.columns, ids, logits, columns, *list_columns,
        student.stride(0), teacher.stride(0), score.columns.stride(0), top_k, n_picked, s.k, s.pre, s.cap, t.k, t.pre, t.cap,
        HAS_ROWS=rows is not None, CAP_S=s.has_cap, CAP_T=t.has_cap, GROUP=GROUP, KP=triton.next_power_of_2(top_k),
        CHUNK=min(16, triton.next_power_of_2(top_k)), HAS_LIST_COLUMNS=any(x is not None for x in list_columns),
        num_warps=tile.stats_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return TopKLists(ids, logits, columns)
