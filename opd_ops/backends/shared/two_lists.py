"""Statistics of positions where a model's whole row is not read: each model's top-K list is either known or swept for.

  student   known from the rollout (inputs/rollout.py), or one sweep of its head
  teacher   known from a server (inputs/teacher_lists.py), or one sweep of its head
  both      logits on the other's list: K dot products a position and model, K / V of a unit
  C, D and the overlap follow from the two lists (supports.py); KLs over the vocabulary do not: those columns are NaN.
  Of a server's teacher q is taken as 0 off its list: C is then its lower bound, the overlap (arXiv 2605.26844 eq. 17).

Not here: what is known (inputs/rollout.py, inputs/teacher_lists.py), one model's sweep (each backend's `own_stats`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops.backends.interface import Backend
from opd_ops.backends.shared.chunks import chunks
from opd_ops.backends.shared.grids import UNION_BYTES
from opd_ops.backends.shared.logits_at import gathered_bytes, logits_at
from opd_ops.backends.shared.supports import matches, support_columns
from opd_ops.backends.shared.top_k import TopK
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sources import Source, compute_dtype, take_rows
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, TokenStats

OWN_LIST_BYTES = 32  # per row and K: ids and logits of both models
SUPPORT_COLUMNS = ("support_mass", "student_support_mass", "overlap_mass", "union_kl")


def token_stats(
    backend: Backend,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    known: StudentStats | None,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace: Workspace,
    score_dtype: torch.dtype | None,
) -> TokenStats:
    """The columns at the rows, (n,) each; those that cannot be known are NaN."""
    sides = student.detach(), teacher.top(top_k) if isinstance(teacher, TeacherLists) else teacher.detach()
    longest = top_k if known is None else max(top_k, known.ids.shape[-1])  # which are put in order whole
    size = workspace.share(1, 4).count(OWN_LIST_BYTES * longest)
    spans = [
        _of_rows(
            backend,
            *sides,
            rows[span],
            known,
            top_k=top_k,
            columns=columns,
            workspace=workspace,
            score_dtype=score_dtype,
        )._asdict()
        for span in chunks(max(1, len(rows)), size)
    ]
    return TokenStats(**{name: torch.cat([span[name] for span in spans]) for name, x in spans[0].items() if x is not None})


def _of_rows(
    backend: Backend,
    student: Source,
    teacher: Source | TeacherLists,
    rows: Tensor,
    known: StudentStats | None,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace: Workspace,
    score_dtype: torch.dtype | None,
) -> TokenStats:
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))

    def swept(source: Source) -> OwnStats:
        found = backend.own_stats(source, rows, top_k=top_k, workspace=workspace, score_dtype=score_dtype)
        return found._replace(logsumexp=found.logsumexp.to(dtype), entropy=found.entropy.to(dtype))

    s = swept(student) if known is None else _from_rollout(known, rows, top_k, dtype)
    if isinstance(teacher, Source):
        t = swept(teacher)
        valid = torch.isfinite(t.logsumexp)
    else:
        listed = teacher.take(rows)
        t, valid = _from_server(listed), listed.valid
    unknown = torch.full_like(s.logsumexp, math.nan)
    if isinstance(teacher, TeacherLists) and teacher.is_sampled:
        out = dict.fromkeys(SUPPORT_COLUMNS, unknown)
        out["student_support_mass"] = torch.exp(s.logits - s.logsumexp.unsqueeze(1)).sum(1).to(dtype)
    else:
        out = _supports(student, teacher, rows, s, t, columns, workspace, dtype)
    return TokenStats(
        valid=valid,
        student_entropy=s.entropy,
        teacher_entropy=t.entropy,
        reverse_kl=unknown,
        forward_kl=unknown,
        student_logsumexp=s.logsumexp,
        teacher_logsumexp=t.logsumexp,
        logsumexp_gap=s.logsumexp - t.logsumexp,
        **out,
    )


def _from_rollout(known: StudentStats, rows: Tensor, top_k: int, dtype: torch.dtype) -> OwnStats:
    lse, entropy = (column.flatten()[rows].to(dtype) for column in (known.logsumexp, known.entropy))
    ids, log_p = take_rows(known.ids, rows).long(), take_rows(known.logprobs, rows).to(dtype)
    best = TopK(ids, log_p, log_p).best(top_k)
    return OwnStats(lse, entropy, best.ids, best.own + lse.unsqueeze(1))


def _from_server(teacher: TeacherLists) -> OwnStats:
    """Log-probabilities are logits whose log-sum-exp is 0; the entropy takes what is not listed."""
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
    k = max(s.ids.shape[1], t.ids.shape[1])
    per_row = UNION_BYTES * k + gathered_bytes(student, k)
    if isinstance(teacher, Source):
        per_row += gathered_bytes(teacher, k)
    size = workspace.count(per_row)
    out: dict[str, Tensor] = {}
    for part in chunks(len(rows), size) if len(rows) else [slice(0, 0)]:
        s_ids, t_ids, s_at_s, t_at_t = s.ids[part], t.ids[part], s.logits[part], t.logits[part]
        if isinstance(teacher, Source):
            t_at_s = logits_at(teacher, rows[part], s_ids, dtype, workspace)
        else:
            s_in_t, place = matches(s_ids, t_ids)
            t_at_s = torch.where(s_in_t, t_at_t.gather(1, place), -math.inf)
        s_at_t = logits_at(student, rows[part], t_ids, dtype, workspace)
        lists = TopK(s_ids, s_at_s, t_at_s), TopK(t_ids, t_at_t, s_at_t)
        of_part = support_columns(*lists, s.logsumexp[part].double(), t.logsumexp[part].double(), columns)
        for name, column in of_part.items():
            out.setdefault(name, column.new_empty(len(rows), dtype=dtype))[part] = column
    return out
