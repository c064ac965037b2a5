"""Statistics of positions where a model's whole row is not read: each model's top-K list is either sent or swept for.

  student   its list comes with the rollout (inputs/rollout.py), or from one sweep of its head
  teacher   its list comes from a server (inputs/teacher_lists.py), or from one sweep of its head
  both      logits on the other model's list: K dot products per position and model, K / V of a sweep
  The two lists give C, D and the overlap (supports.py), but not KLs over the vocabulary: these columns are NaN.
  A server's teacher has q = 0 off its list here: C is then its lower bound, the overlap (arXiv 2605.26844 eq. 17).

Not here: the sent lists (inputs/rollout.py, inputs/teacher_lists.py), one model's sweep (each backend's `own_stats`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.interface import Backend
from opd_ops.backends.shared.grids import UNION_BYTES
from opd_ops.backends.shared.logits_at import gathered_bytes, logits_at
from opd_ops.backends.shared.supports import matches, support_columns
from opd_ops.backends.shared.top_k import TopKList
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sources import Source, compute_dtype, take_rows
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists, is_missing
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import WHOLE_ROW_COLUMNS, OwnStats, Scoring, TokenStats

OWN_LIST_BYTES = 32  # per row and K: ids, and both models' logits
SUPPORT_COLUMNS = ("support_mass", "student_support_mass", "overlap_mass", "union_kl")


def token_stats(
    backend: Backend,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    rollout: StudentStats | None,
    scoring: Scoring,
) -> TokenStats:
    """The columns at the rows, (n,) each; NaN in columns that two lists do not give. `rollout`: the student's sent lists."""
    top_k = scoring.top_k
    sides = student.detach(), teacher.top(top_k) if isinstance(teacher, TeacherLists) else teacher.detach()
    longest = top_k if rollout is None else max(top_k, rollout.ids.shape[-1])  # a sent list is sorted whole
    size = scoring.workspace.share(1, 4).count(OWN_LIST_BYTES * longest)
    spans = [_span_stats(backend, *sides, rows[span], rollout, scoring)._asdict() for span in chunks(max(1, len(rows)), size)]
    return TokenStats(**{name: torch.cat([span[name] for span in spans]) for name, x in spans[0].items() if x is not None})


def _span_stats(
    backend: Backend,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    rollout: StudentStats | None,
    scoring: Scoring,
) -> TokenStats:
    columns = scoring.columns
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))
    s = list_of_student(backend, student, rows, rollout, scoring, dtype)
    t = list_of_teacher(backend, teacher, rows, scoring, dtype)
    valid = torch.isfinite(t.logsumexp) if isinstance(teacher, Source) else teacher.take(rows).valid
    nan_column = torch.full_like(s.logsumexp, math.nan)
    unknown = columns & WHOLE_ROW_COLUMNS
    if isinstance(teacher, TeacherLists) and teacher.is_sampled:
        unknown = columns
        out = dict.fromkeys(SUPPORT_COLUMNS, nan_column)
        out["student_support_mass"] = torch.exp(s.logits - s.logsumexp.unsqueeze(1)).sum(1).to(dtype)
    else:
        out = _supports(student, teacher, rows, s, t, columns, scoring.workspace, dtype)
    return TokenStats(
        valid=valid,
        student_entropy=s.entropy,
        teacher_entropy=t.entropy,
        reverse_kl=nan_column,
        forward_kl=nan_column,
        student_logsumexp=s.logsumexp,
        teacher_logsumexp=t.logsumexp,
        logsumexp_gap=s.logsumexp - t.logsumexp,
        **out,
        **dict.fromkeys(unknown, nan_column),
    )


def list_of_student(
    backend: Backend, student: Source, rows: Tensor, rollout: StudentStats | None, scoring: Scoring, dtype: torch.dtype
) -> OwnStats:
    """The student's list at the rows, as it was sent, else by a sweep."""
    if rollout is None:
        return _swept(backend, student, rows, scoring, dtype)
    return _from_rollout(rollout, rows, scoring.top_k, dtype)


def list_of_teacher(
    backend: Backend, teacher: Source | TeacherLists, rows: Tensor, scoring: Scoring, dtype: torch.dtype
) -> OwnStats:
    """The teacher's list at the rows, as it was sent, else by a sweep."""
    if isinstance(teacher, Source):
        return _swept(backend, teacher, rows, scoring, dtype)
    return _from_server(teacher.take(rows))


def _swept(backend: Backend, source: Source, rows: Tensor, scoring: Scoring, dtype: torch.dtype) -> OwnStats:
    stats = backend.own_stats(source, rows, scoring)
    return stats._replace(logsumexp=stats.logsumexp.to(dtype), entropy=stats.entropy.to(dtype))


def _from_rollout(rollout: StudentStats, rows: Tensor, top_k: int, dtype: torch.dtype) -> OwnStats:
    lse, entropy = (column.flatten()[rows].to(dtype) for column in (rollout.logsumexp, rollout.entropy))
    ids, log_p = take_rows(rollout.ids, rows).long(), take_rows(rollout.logprobs, rows).to(dtype)
    missing = is_missing(log_p)
    ids, log_p = ids.masked_fill(missing, LAST_ID), log_p.masked_fill(missing, -math.inf)
    best = TopKList(ids, log_p, log_p).best(top_k)
    return OwnStats(lse, entropy, best.ids, best.own + lse.unsqueeze(1))


def _from_server(teacher: TeacherLists) -> OwnStats:
    """Log-probabilities are logits with a log-sum-exp of 0. The entropy is NaN: it needs the ids off the list."""
    zero = teacher.logprobs.new_zeros(len(teacher.ids))
    return OwnStats(zero, zero + math.nan, teacher.ids, teacher.logprobs)


def _supports(
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    s: OwnStats,
    t: OwnStats,
    columns: frozenset[str],
    workspace: Workspace,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The support columns, (n,) each, from both lists and each model's logits on the other's list."""
    k = max(s.ids.shape[1], t.ids.shape[1])
    per_row = UNION_BYTES * k + gathered_bytes(student, k)
    if isinstance(teacher, Source):
        per_row += gathered_bytes(teacher, k)
    size = workspace.count(per_row)
    out: dict[str, Tensor] = {}
    for part in chunks(max(1, len(rows)), size):
        s_ids, t_ids, s_at_s, t_at_t = s.ids[part], t.ids[part], s.logits[part], t.logits[part]
        if isinstance(teacher, Source):
            t_at_s = logits_at(teacher, rows[part], s_ids, dtype, workspace)
        else:
            s_in_t, place = matches(s_ids, t_ids)
            t_at_s = torch.where(s_in_t, t_at_t.gather(1, place), -math.inf)
        s_at_t = logits_at(student, rows[part], t_ids, dtype, workspace)
        lists = TopKList(s_ids, s_at_s, t_at_s), TopKList(t_ids, t_at_t, s_at_t)
        values = support_columns(*lists, torch.stack((s.logsumexp[part], t.logsumexp[part])).double(), columns)
        for name, column in values.items():
            out.setdefault(name, column.new_empty(len(rows), dtype=dtype))[part] = column
    return out
