"""The Triton backend where ranks share out the vocabulary: kernels on each rank's part, with the whole's normalisers.

  P_r, Q_r: the mass of student and teacher in the part of rank r;  p_r, q_r: their softmaxes within it;
  Z_s,r, Z_t,r: their sums of e^logit over it;
  g_r = log Z_s,r - log Z_t,r: the part's gap;  g: the whole vocabulary's gap;  d_r = log P_r / Q_r = g_r - g
  KL(p||q) = sum_r P_r KL(p_r||q_r) + KL(P||Q),     KL(P||Q) = sum_r P_r (d_r + e^{-d_r} - 1)      (the chain rule)
  Var_p[log p - log q] = sum_r P_r (Var_r + (KL(p_r||q_r) + d_r - KL(p||q))^2), Var_r that of the part

No term of the KL is negative, and an error of d_r enters each term in second order: nothing large is subtracted.
The loss of reverse and forward KL: the ranks join the selected rows' normalisers to more digits. The gradient kernels then read
these in place of the part's normalisers: a reference of each row, the log-normaliser relative to it, and the gap. The student's
reference is its largest logit, the teacher's its log-sum-exp, both as stored logits and rounded to fp32.
The gradient of a row's most likely id a is minus the sum of the others (gradient.py). The rank that has a sums over its own
ids; the sum over the other ranks' ids follows from their statistics:
  reverse KL  sum_r P_r (KL(p_r||q_r) + d_r - KL(p||q)),   forward KL  sum_r P_r - Q_r                   (r: all other parts)
Not here: the all-gather (shared/joined.py), other losses, which backend "torch" computes on the same device (backend.py),
kernels' launches (dense.py, heads.py), gradients in autograd (dense_loss.py, heads_loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial

import torch
from opd_kernels.score import COLUMNS, Score
from opd_kernels.support import TopKLists
from torch import Tensor

from opd_ops.backends.interface import WeightedRows, is_computed
from opd_ops.backends.shared import joined
from opd_ops.backends.shared.joined import Part, Parts, joint_entropy, masses
from opd_ops.backends.shared.tiles import TileReader
from opd_ops.backends.shared.top_k import TopKList
from opd_ops.backends.streamed.summed import with_jsd
from opd_ops.backends.triton import dense, dense_loss, heads, heads_loss
from opd_ops.backends.triton.kernel_loss import KernelConstants, logsumexp, multiplier
from opd_ops.backends.triton.launches import top_k_lists
from opd_ops.divergences import Divergence, ReverseKL, WholeRow, weighted_sum, without_infinite
from opd_ops.inputs.sources import Shard, Source, Transform
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import SWEPT_COLUMNS, OwnStats, Scoring, TokenStats

EMPTY_COLUMNS = {name: -math.inf if name.endswith("logsumexp") else 0.0 for name in SWEPT_COLUMNS}
VARIANCE = {"ratio_variance": 0.0}  # one more of them, if it is asked for


def token_stats(student: Source, teacher: Source, shard: Shard, rows: Tensor, scoring: Scoring) -> TokenStats:
    """All statistics of the given positions over the whole vocabulary, (n,) each."""
    sent = EMPTY_COLUMNS | (VARIANCE if "ratio_variance" in scoring.columns else {})
    parts = Parts(partial(_part, student.detach(), teacher.detach(), sent.keys(), scoring.score_dtype), sent, joined_columns)
    stats = joined.token_stats(parts, shard, rows, scoring, torch.float32)
    return with_jsd(stats, student, teacher, rows, scoring.workspace) if "jsd" in scoring.columns else stats


def _part(
    student: Source,
    teacher: Source,
    sent: Collection[str],
    score_dtype: torch.dtype | None,
    rows: Tensor,
    top_k: int,
    workspace: Workspace,
) -> Part:
    """This rank's columns and lists of the rows, from its part of the vocabulary; `sent`: the names of the columns."""
    launches: list[tuple[Score, TopKLists]] = []
    optional = frozenset(sent) & VARIANCE.keys()
    scoring = Scoring(top_k, workspace, score_dtype, optional)
    if is_computed(student, teacher):
        table = heads.launch_columns(student, teacher, rows, scoring, keep=launches.append)
    else:
        width, temperature = student.transform.vocab_size, student.transform.temperature
        stored = student.leading, teacher.leading
        table = dense.launch_columns(*stored, rows, scoring, width, temperature, keep=launches.append)
    columns = {name: torch.cat([getattr(score, name) for score, _ in launches]) for name in SWEPT_COLUMNS}
    columns |= dict.fromkeys(optional, table[-1])
    names = ("s_ref", "s_log2z", "t_ref", "t_log2z", "log2z_gap")
    s_ref, s_log2z, t_ref, t_log2z, log2z_gap = (torch.cat([getattr(score, x) for score, _ in launches]) for x in names)
    models = _stored(student), _stored(teacher)
    columns["student_logsumexp"] = logsumexp(models[0], s_ref, s_log2z)
    columns["teacher_logsumexp"] = logsumexp(models[1], t_ref, t_log2z)
    # In fp32 the gap of models that differ by a constant of 1,000 would have an error of 3e-5.
    columns["logsumexp_gap"] = logsumexp(models[0], s_ref, log2z_gap) - logsumexp(models[1], t_ref, torch.zeros_like(t_ref))
    lists = TopKLists(
        torch.cat([x.ids for _, x in launches]), torch.cat([x.logits for _, x in launches]), launches[0][1].columns
    )
    return Part(columns, *top_k_lists(lists, student.transform.first_id))


def own_stats(source: Source, shard: Shard, rows: Tensor, scoring: Scoring) -> OwnStats:
    """One model's statistics at the rows over the whole vocabulary."""

    def read() -> OwnStats:
        stats = heads.own_stats(source, rows, scoring._replace(top_k=min(scoring.top_k, shard.width)))
        return stats._replace(ids=stats.ids + shard.first)

    return joined.own_stats(read, shard, rows, scoring, torch.float32)


def selected_loss(
    student: Source,
    teacher: Source,
    shard: Shard,
    selected: WeightedRows,
    divergence: Divergence,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of reverse or forward KL over the positions, connected to this rank's part, and the (M,) losses."""
    assert divergence.whole is not None
    with torch.no_grad():
        constants = _constants(student, teacher, shard, selected.rows, divergence.whole, workspace)
    if is_computed(student, teacher):
        return heads_loss.selected_loss(student, teacher, selected, divergence, workspace, constants)
    assert constants.columns is not None
    losses = constants.columns[COLUMNS.index(divergence.whole.name)]
    total = dense_loss.column_loss(student, teacher, selected.rows, losses, divergence.whole, workspace, constants=constants)
    return weighted_sum(total, without_infinite(losses, selected.weights)), losses


def _constants(
    student: Source, teacher: Source, shard: Shard, rows: Tensor, divergence: WholeRow, workspace: Workspace
) -> KernelConstants:
    """The numbers of the whole vocabulary that the gradient of this rank's part reads."""
    tops, elsewhere = [], []

    def join(parts: dict[str, Tensor], s_list: TopKList, t_list: TopKList) -> dict[str, Tensor]:
        columns = joined_columns(parts, s_list, t_list)
        top = s_list.ids[:, 0] - shard.first
        tops.append(torch.where((top >= 0) & (top < shard.width), top, -1).int())
        terms = _part_gradients(parts, columns, divergence)
        terms[shard.ranks.rank] = 0  # not subtracted from the sum: it would cancel
        elsewhere.append(terms.sum(0).float())
        return columns

    # Statistics again, because the score pass may have read 16-bit logits.
    read = partial(_part, student.detach(), teacher.detach(), EMPTY_COLUMNS.keys(), torch.float32)
    parts = Parts(read, EMPTY_COLUMNS, join)
    exact = joined.token_stats(parts, shard, rows, Scoring(1, workspace), torch.float64)
    return KernelConstants.from_columns(_columns(student, teacher, exact), torch.cat(tops), elsewhere=torch.cat(elsewhere))


def _columns(student: Source, teacher: Source, exact: TokenStats) -> Tensor:
    """(12, M) fp32, the columns of score.py over the whole vocabulary, from fp64 statistics."""
    bits = 1 / math.log(2)
    columns = {name: getattr(exact, name) for name in SWEPT_COLUMNS}
    references = []
    assert exact.reference_student is not None
    sides = (
        ("s", student, exact.student_logsumexp, exact.reference_student),
        ("t", teacher, exact.teacher_logsumexp, exact.teacher_logsumexp),
    )
    for prefix, source, lse, near in sides:
        k = multiplier(_stored(source))
        reference = (near * bits / k).float()
        columns[f"{prefix}_ref"], columns[f"{prefix}_log2z"] = reference, lse * bits - k * reference.double()
        references.append(k * reference.double())
    # The gap in bits, less the difference of the references.
    columns["log2z_gap"] = exact.logsumexp_gap * bits - (references[0] - references[1])
    return torch.stack([columns[name].float() for name in COLUMNS])


def _stored(source: Source) -> Transform:
    """The transform from the logits that kernels read to finished logits."""
    return TileReader(source, torch.empty(0, dtype=torch.long), torch.float32, 1).transform


# --- parts to the whole ----------------------------------------------------------------------------------------------


def joined_columns(parts: dict[str, Tensor], student: TopKList, teacher: TopKList) -> dict[str, Tensor]:
    """The (n,) columns of the whole vocabulary, and the columns that a JSD reads, from the parts' (ranks, n) fp64 columns."""
    s, t, gaps = parts["student_logsumexp"], parts["teacher_logsumexp"], parts["logsumexp_gap"]
    (s_lse, p), (t_lse, q) = masses(s), masses(t)
    in_s, in_t = s != -math.inf, t != -math.inf  # a NaN is in
    shared = in_s & in_t
    gap = _gap(s_lse, t_lse, p, q, gaps, s, t, shared)
    d = torch.where(shared, gaps - gap, 0)
    near = d.abs() < 1  # elsewhere e^d may overflow, and P e^{-d} is Q itself
    p_term = torch.where(near, p * (torch.expm1(-d) + d), q - p + p * d)
    q_term = torch.where(near, q * (torch.expm1(d) - d), p - q - q * d)
    # In a part that one model masks whole, the term is the other model's mass: the limit of P_r e^{-d_r} - P_r is Q_r.
    reverse = torch.where(shared, _times(p, parts["reverse_kl"]) + p_term, q)
    forward = torch.where(shared, _times(q, parts["forward_kl"]) + q_term, p)
    # A part with a mass of 0 in fp64 makes no KL infinite.
    p_without_q = ((p > 0) & ((t == -math.inf) | (parts["reverse_kl"] == math.inf))).any(0)
    q_without_p = ((q > 0) & ((s == -math.inf) | (parts["forward_kl"] == math.inf))).any(0)
    reverse_kl, forward_kl = reverse.sum(0).clamp_min(0), forward.sum(0).clamp_min(0)
    optional = {}
    if "ratio_variance" in parts:
        variances = parts["ratio_variance"] + (parts["reverse_kl"] + d - reverse_kl).square()
        variance = torch.where(shared, _times(p, variances), 0).sum(0)
        optional["ratio_variance"] = variance.masked_fill(p_without_q & ~reverse_kl.isnan(), math.inf)
    return optional | {
        "student_entropy": joint_entropy(p, parts["student_entropy"]),
        "teacher_entropy": joint_entropy(q, parts["teacher_entropy"]),
        "reverse_kl": reverse_kl.masked_fill(p_without_q & ~reverse_kl.isnan(), math.inf),
        "forward_kl": forward_kl.masked_fill(q_without_p & ~forward_kl.isnan(), math.inf),
        "student_logsumexp": s_lse,
        "teacher_logsumexp": t_lse,
        "logsumexp_gap": gap,
        **_reference(s_lse, gap, student, teacher),
    }


def _part_gradients(parts: dict[str, Tensor], whole: dict[str, Tensor], divergence: WholeRow) -> Tensor:
    """(ranks, n) sums over each part of the gradient of reverse or forward KL with respect to the finished logits."""
    p, q = (masses(parts[f"{model}_logsumexp"])[1] for model in ("student", "teacher"))
    d = parts["logsumexp_gap"] - whole["logsumexp_gap"]
    if isinstance(divergence, ReverseKL):
        return _times(p, parts["reverse_kl"] + d - whole["reverse_kl"])
    return torch.where(d.abs() < 1, -p * torch.expm1(-d), p - q)


def _reference(s_lse: Tensor, gap: Tensor, student: TopKList, teacher: TopKList) -> dict[str, Tensor]:
    """The columns that a JSD over whole rows reads: exact enough for its value, not for a gradient of saturated rows."""
    s, u, u_top = (x[:, 0].double() for x in (student.own, student.other, teacher.own))
    is_masked = u == -math.inf
    s, u = s.masked_fill(s == -math.inf, 0), torch.where(is_masked, u_top.masked_fill(u_top == -math.inf, 0), u)
    log_ratio = (s - u) - gap
    return {
        "reference_student": s,
        "reference_teacher": u,
        "reference_log_p": s - s_lse,
        "reference_log_ratio": log_ratio,
        "top_log_ratio": log_ratio.masked_fill(is_masked, math.inf),
    }


def _times(mass: Tensor, x: Tensor) -> Tensor:
    """mass * x; 0 where the mass is 0 or x is +inf. The caller marks rows with an infinite x."""
    return torch.where((mass == 0) | (x == math.inf), 0, mass * x)


def _gap(s_lse: Tensor, t_lse: Tensor, p: Tensor, q: Tensor, gaps: Tensor, s: Tensor, t: Tensor, shared: Tensor) -> Tensor:
    """log Z_s - log Z_t = c + log(1 + sum_r Q_r (e^{g_r - c} - 1)), c the gap of the part with most of p.

    Where the models nearly agree, this keeps the digits of the parts' gaps. Where they do not agree, or where a model masks a
    whole part, the plain difference has digits enough.
    """
    place = torch.where(shared, p, -1.0).argmax(0, keepdim=True)
    c = gaps.gather(0, place)
    shift = torch.where(shared, gaps - c, 0)
    ratio = (q * torch.expm1(shift)).sum(0)
    plain = ((s != -math.inf) != (t != -math.inf)).any(0) | ~(ratio > -0.5) | ~torch.isfinite(ratio)
    return torch.where(plain, s_lse - t_lse, c.squeeze(0) + torch.log1p(ratio))
