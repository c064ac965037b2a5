"""Statistics over a vocabulary that ranks share out, joined from the statistics of each rank's part: one all-gather a call.

  top-K of the whole = top-K of all parts' top-K lists, order (logit descending, id ascending)
  log Z = log sum_r Z_r,   P_r = Z_r / Z,   H(p) = sum_r P_r (H(p_r) - log P_r)                (r: a rank's part)

Every rank joins the same gathered numbers in the same order, so all ranks have the same bits and select the same positions.
Sent per row and rank: fp64 columns, and two lists of K ids with both models' logits (`row_bytes`).
Not here: the columns of a part and their join (streamed/running.py, triton/shards.py), the split of the vocabulary
(inputs/vocabulary.py), sums over parts of losses and gradients (streamed/summed.py, logits_at.py, streamed/loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared.grids import CANDIDATE_BYTES, UNION_BYTES
from opd_ops.backends.shared.supports import support_columns
from opd_ops.backends.shared.top_k import TopKList
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Shard
from opd_ops.inputs.teacher_lists import LAST_ID
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, Scoring, TokenStats, is_finite


class Part(NamedTuple):
    """One rank's columns and lists of n rows, from its part of the vocabulary alone."""

    columns: dict[str, Tensor]  # (n,) each
    student: TopKList  # (n, up to K), ids over the whole vocabulary
    teacher: TopKList


class Parts(NamedTuple):
    """How a backend computes the columns of a part, and joins the columns of all parts."""

    read: Callable[[Tensor, int, Workspace], Part]  # of (rows, top_k, workspace); not called where the part has no id
    empty: Mapping[str, float]  # the columns' names, and their values in a part without an id
    join: Callable[[dict[str, Tensor], TopKList, TopKList], dict[str, Tensor]]
    """Columns of `TokenStats`, from the (ranks, n) fp64 columns of the parts and both lists of the whole vocabulary."""


def row_bytes(top_k: int, dtype: torch.dtype, *, columns: int, models: int = 2) -> int:
    """Bytes that a rank sends for each row: fp64 columns, and the lists of both models or of one."""
    return 8 * columns + models * top_k * (4 + models * dtype.itemsize)


def rows_at_a_time(shard: Shard, top_k: int, dtype: torch.dtype, workspace: Workspace, *, columns: int) -> int:
    """Rows per all-gather: the gathered numbers and the joined lists fit an eighth of the workspace."""
    sent = row_bytes(top_k, dtype, columns=columns)
    per_row = shard.ranks.size * (sent + top_k * CANDIDATE_BYTES) + UNION_BYTES * top_k
    return workspace.share(1, 8).count(per_row)


def token_stats(
    parts: Parts,
    shard: Shard,
    rows: Tensor,
    scoring: Scoring,
    dtype: torch.dtype,
) -> TokenStats:
    """The columns of `TokenStats` over the whole vocabulary, but not `jsd`: its terms need the normalisers first
    (streamed/summed.py). `dtype`: of the columns.
    """
    top_k, workspace, _, columns, _ = scoring
    out: dict[str, Tensor] = {}
    n, size = len(rows), rows_at_a_time(shard, top_k, dtype, workspace, columns=len(parts.empty))
    list_rows = workspace.share(1, 16).count(UNION_BYTES * top_k)
    for span in chunks(max(1, n), size):  # no rows are one empty span, so that all columns exist
        span_rows = rows[span]
        if shard.width and len(span_rows):
            part = parts.read(span_rows, min(top_k, shard.width), workspace.less(workspace.share(1, 8).nbytes))
        else:
            part = _empty(parts.empty, len(span_rows), dtype, rows.device)
        gathered, student, teacher = _gathered_part(part, shard, top_k, dtype)
        whole = parts.join(gathered, student, teacher)
        lse = torch.stack((whole["student_logsumexp"], whole["teacher_logsumexp"])).double()
        for chunk in chunks(max(1, len(span_rows)), list_rows):
            lists = student.rows(chunk), teacher.rows(chunk)
            supports = support_columns(*lists, lse[:, chunk], columns)
            for name, column in supports.items():
                whole.setdefault(name, column.new_empty(len(span_rows)))[chunk] = column
        for name, column in whole.items():
            out.setdefault(name, torch.empty(n, dtype=dtype, device=rows.device))[span] = column
    return TokenStats(valid=is_finite(out["teacher_logsumexp"]), **out)


def own_stats(read: Callable[[], OwnStats], shard: Shard, rows: Tensor, scoring: Scoring, dtype: torch.dtype) -> OwnStats:
    """One model's statistics over the whole vocabulary. `read`: computes this rank's part, with ids of the whole vocabulary."""
    top_k, workspace = scoring.top_k, scoring.workspace
    if not len(rows):
        empty_column = torch.empty(0, dtype=dtype, device=rows.device)
        empty_logits = empty_column.view(0, 1).expand(0, top_k)
        return OwnStats(empty_column, empty_column, rows.new_empty(0, top_k), empty_logits)
    if shard.width:
        own_part = read()
    else:
        empty = _empty({"logsumexp": -math.inf, "entropy": 0.0}, len(rows), dtype, rows.device)
        own_part = OwnStats(empty.columns["logsumexp"], empty.columns["entropy"], *empty.student[:2])
    spans = []
    for span in chunks(len(rows), rows_at_a_time(shard, top_k, dtype, workspace, columns=2)):
        columns = own_part.logsumexp[span].double(), own_part.entropy[span].double()
        ids = _padded(own_part.ids[span].int(), top_k, LAST_ID)
        own = _padded(own_part.logits[span].to(dtype), top_k, -math.inf)
        all_lse, all_entropy, all_ids, all_own = _gathered(shard, [*columns, ids, own])
        lse, mass = masses(all_lse.squeeze(2))
        best = _list(all_ids, all_own, all_own).best(top_k)
        spans.append(OwnStats(lse, joint_entropy(mass, all_entropy.squeeze(2)), best.ids, best.own))
    joined = OwnStats(*(torch.cat(column) for column in zip(*spans, strict=True)))
    return joined._replace(logsumexp=joined.logsumexp.to(dtype), entropy=joined.entropy.to(dtype))


# --- one all-gather --------------------------------------------------------------------------------------------------


def _gathered_part(part: Part, shard: Shard, top_k: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], TopKList, TopKList]:
    """The (ranks, n) columns of all parts, and the lists of the whole vocabulary."""
    sent = [column.double() for column in part.columns.values()]
    for best in (part.student, part.teacher):
        sent += [_padded(best.ids.int(), top_k, LAST_ID)]
        sent += [_padded(logits.to(dtype), top_k, -math.inf) for logits in (best.own, best.other)]
    gathered = _gathered(shard, sent)
    columns = {name: column.squeeze(2) for name, column in zip(part.columns, gathered, strict=False)}
    lists = gathered[len(part.columns) :]
    return columns, _list(*lists[:3]).best(top_k), _list(*lists[3:]).best(top_k)


def _gathered(shard: Shard, tensors: Sequence[Tensor]) -> list[Tensor]:
    """(ranks, n, k) of each (n,) or (n, k) tensor, by one all-gather."""
    tensors = [x.unsqueeze(1) if x.dim() == 1 else x for x in tensors]
    words = [x.contiguous().view(torch.int32) for x in tensors]
    gathered = shard.ranks.gather(torch.cat(words, 1)).split([x.shape[1] for x in words], 2)
    return [x.contiguous().view(like.dtype) for x, like in zip(gathered, tensors, strict=True)]


def _padded(x: Tensor, k: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, k - x.shape[1]), value=value)


def _list(ids: Tensor, own: Tensor, other: Tensor) -> TopKList:
    """All ranks' lists as one list, (n, ranks K)."""
    return TopKList(*(x.transpose(0, 1).flatten(1) for x in (ids.long(), own, other)))


def _empty(columns: Mapping[str, float], n: int, dtype: torch.dtype, device: torch.device) -> Part:
    """A part without an id."""
    empty_list = TopKList(*(torch.empty((n, 0), dtype=x, device=device) for x in (torch.long, dtype, dtype)))
    filled = {name: torch.full((n,), value, dtype=torch.float64, device=device) for name, value in columns.items()}
    return Part(filled, empty_list, empty_list)


# --- masses ----------------------------------------------------------------------------------------------------------


def masses(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-sum-exp of the whole, and (ranks, n) masses of the parts, from the parts' (ranks, n) log-sum-exps."""
    whole = torch.logsumexp(lse, 0)
    return whole, torch.where(lse == -math.inf, 0, torch.exp(lse - whole))


def joint_entropy(mass: Tensor, entropy: Tensor) -> Tensor:
    """(n,) sum_r P_r (H_r - log P_r), from the parts' (ranks, n) masses and entropies."""
    return torch.where(mass == 0, 0, mass * (entropy - mass.log())).sum(0).clamp_min(0)
