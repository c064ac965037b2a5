# Statistics of positions whose student statistics are known from the rollout: the teacher's head alone is swept.
#
#   teacher   log-sum-exp, entropy and T from one pass over its logits                     r units
#   both      logits on the other's top-K ids: K dot products a position and model         K / V of a unit
#   C, D and the overlap follow from the two lists (supports.py); KLs over the vocabulary do not: those columns are NaN.
#
# Not here: what the rollout knows (rollout.py), the teacher's pass itself (each backend's `own_stats`).
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from opd_ops.backends.supports import support_columns
from opd_ops.backends.tiling import PAIR_BYTES, UNION_BYTES
from opd_ops.backends.top_k import TopK
from opd_ops.sources import Source, compute_dtype, finish_logits, take_rows
from opd_ops.stats import OwnStats, TokenStats

if TYPE_CHECKING:  # rollout.py builds on backends/top_k.py
    from opd_ops.rollout import StudentStats


class _Backend(Protocol):
    def own_stats(
        self, source: Source, rows: Tensor, *, top_k: int, workspace_bytes: int, score_dtype: torch.dtype | None
    ) -> OwnStats: ...


def token_stats(
    backend: _Backend,
    student: Source,
    teacher: Source,
    rows: Tensor,
    known: StudentStats,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace_bytes: int,
    score_dtype: torch.dtype | None,
) -> TokenStats:
    """The columns at the rows, (n,) each; those that take the student's whole row are NaN."""
    student, teacher, dtype = student.detach(), teacher.detach(), compute_dtype(student, teacher)
    own = backend.own_stats(teacher, rows, top_k=top_k, workspace_bytes=workspace_bytes, score_dtype=score_dtype)
    s_lse, s_entropy = (column.flatten()[rows].to(dtype) for column in (known.logsumexp, known.entropy))
    ids, log_p = (take_rows(column, rows) for column in (known.ids.long(), known.logprobs.to(dtype)))
    s_list = TopK(ids, log_p, log_p).best(top_k)
    out: dict[str, Tensor] = {}
    per_row = UNION_BYTES * top_k + PAIR_BYTES * top_k**2 + sum(_gathered_bytes(source, top_k) for source in (student, teacher))
    size = max(1, workspace_bytes // per_row)
    for start in range(0, max(1, len(rows)), size):
        part = slice(start, min(start + size, len(rows)))
        s_at_s = s_list.own[part] + s_lse[part].unsqueeze(1)
        lists = (
            TopK(s_list.ids[part], s_at_s, _logits_at(teacher, rows[part], s_list.ids[part], dtype)),
            TopK(own.ids[part], own.logits[part], _logits_at(student, rows[part], own.ids[part], dtype)),
        )
        of_part = support_columns(*lists, s_lse[part].double(), own.logsumexp[part].double(), columns)
        for name, column in of_part.items():
            out.setdefault(name, column.new_empty(len(rows), dtype=dtype))[part] = column
    unknown = torch.full_like(s_lse, math.nan)
    return TokenStats(
        valid=torch.isfinite(own.logsumexp),
        student_entropy=s_entropy,
        teacher_entropy=own.entropy.to(dtype),
        reverse_kl=unknown,
        forward_kl=unknown,
        student_logsumexp=s_lse,
        teacher_logsumexp=own.logsumexp.to(dtype),
        logsumexp_gap=s_lse - own.logsumexp.to(dtype),
        **out,
    )


def _logits_at(source: Source, rows: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, K) logits of the rows at the (n, K) ids."""
    taken = take_rows(source.leading, rows)
    if source.weight is None:
        return finish_logits(taken.gather(1, ids).to(dtype), source.transform)
    with torch.autocast(taken.device.type, enabled=False):  # which would round these logits to 16 bits
        logits = torch.bmm(source.weight[ids].to(dtype), taken.to(dtype).unsqueeze(2)).squeeze(2)
    if source.bias is not None:
        logits += source.bias[ids]
    return finish_logits(logits, source.transform)


def _gathered_bytes(source: Source, top_k: int) -> int:
    """Scratch of `_logits_at` per row: the row, and the weight's rows as they are and in the compute dtype."""
    width = source.leading.shape[-1]
    return width * (8 + (12 * top_k if source.transform.is_head else 0))
