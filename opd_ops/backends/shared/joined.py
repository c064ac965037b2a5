"""Statistics over a vocabulary that several ranks hold, from what each knows of its own part: one all-gather a call.

  top-K of all = top-K of everyone's top-K, order (logit descending, id ascending)
  log Z = log sum_r Z_r,   P_r = Z_r / Z,   H(p) = sum_r P_r (H(p_r) - log P_r)                (r: a rank's part)

Every rank joins the same gathered numbers in the same order, so all have the same bits, and select the same positions.
Sent per row and rank: fp64 columns, and K ids with both models' logits of both lists (`row_bytes`).
Not here: the columns of a part and how they are joined (streamed/running.py, triton/shards.py), who holds what
(inputs/vocabulary.py), sums over parts of losses and gradients (streamed/summed.py, logits_at.py, streamed/loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared.chunks import chunks
from opd_ops.backends.shared.grids import CANDIDATE_BYTES, UNION_BYTES
from opd_ops.backends.shared.supports import support_columns
from opd_ops.backends.shared.top_k import TopK
from opd_ops.inputs.sources import Shard
from opd_ops.inputs.teacher_lists import LAST_ID
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, TokenStats


class Part(NamedTuple):
    """What one rank knows of n rows, from its part of the vocabulary alone."""

    columns: dict[str, Tensor]  # (n,) each
    student: TopK  # (n, up to K), ids over the whole vocabulary
    teacher: TopK


class Parts(NamedTuple):
    """How a backend reads a part, and makes one whole of all of them."""

    read: Callable[[Tensor, int, Workspace], Part]  # rows, top_k, workspace; not asked where the part is empty
    empty: Mapping[str, float]  # the columns of a part, and what they are of a part without an id
    join: Callable[[dict[str, Tensor], TopK, TopK], dict[str, Tensor]]
    """Columns of `TokenStats` from the (ranks, n) fp64 columns of the parts and both lists of the whole vocabulary."""


def row_bytes(top_k: int, dtype: torch.dtype, *, columns: int, models: int = 2) -> int:
    """What a rank sends of each row: fp64 columns, and the lists of both models or of one."""
    return 8 * columns + models * top_k * (4 + models * dtype.itemsize)


def rows_at_a_time(shard: Shard, top_k: int, dtype: torch.dtype, workspace: Workspace, *, columns: int) -> int:
    """How many rows one all-gather is of: an eighth of the workspace holds what is sent, and the joined lists."""
    sent = row_bytes(top_k, dtype, columns=columns)
    per_row = shard.ranks.size * (sent + top_k * CANDIDATE_BYTES) + UNION_BYTES * top_k
    return workspace.share(1, 8).count(per_row)


def token_stats(
    parts: Parts,
    shard: Shard,
    rows: Tensor,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace: Workspace,
    dtype: torch.dtype,
) -> TokenStats:
    """The columns of `TokenStats` over the whole vocabulary, but `jsd`, whose terms need the normalisers first
    (streamed/summed.py).
    """
    out: dict[str, Tensor] = {}
    n, size = len(rows), rows_at_a_time(shard, top_k, dtype, workspace, columns=len(parts.empty))
    pairs = workspace.share(1, 16).count(UNION_BYTES * top_k)
    for span in chunks(max(1, n), size):  # no row is a span too: nothing is sent, and columns are made
        of_rows = rows[span]
        if shard.width and len(of_rows):
            part = parts.read(of_rows, min(top_k, shard.width), workspace.less(workspace.share(1, 8).nbytes))
        else:
            part = _empty(parts.empty, len(of_rows), dtype, rows.device)
        everyone, student, teacher = _gathered_part(part, shard, top_k, dtype)
        whole = parts.join(everyone, student, teacher)
        lse = whole["student_logsumexp"].double(), whole["teacher_logsumexp"].double()
        for chunk in chunks(max(1, len(of_rows)), pairs):
            lists = student.rows(chunk), teacher.rows(chunk)
            of_lists = support_columns(*lists, lse[0][chunk], lse[1][chunk], columns)
            for name, column in of_lists.items():
                whole.setdefault(name, column.new_empty(len(of_rows)))[chunk] = column
        for name, column in whole.items():
            out.setdefault(name, torch.empty(n, dtype=dtype, device=rows.device))[span] = column
    return TokenStats(valid=torch.isfinite(out["teacher_logsumexp"]), **out)


def own_stats(
    read: Callable[[], OwnStats], shard: Shard, rows: Tensor, *, top_k: int, workspace: Workspace, dtype: torch.dtype
) -> OwnStats:
    """One model's statistics over the whole vocabulary; `read` gives those of this rank's part, with whole-vocabulary ids."""
    if not len(rows):
        none = torch.empty(0, dtype=dtype, device=rows.device)
        return OwnStats(none, none, rows.new_empty(0, top_k), none.view(0, 1).expand(0, top_k))
    if shard.width:
        mine = read()
    else:
        empty = _empty({"logsumexp": -math.inf, "entropy": 0.0}, len(rows), dtype, rows.device)
        mine = OwnStats(empty.columns["logsumexp"], empty.columns["entropy"], *empty.student[:2])
    found = []
    for span in chunks(len(rows), rows_at_a_time(shard, top_k, dtype, workspace, columns=2)):
        ids, own = _padded(mine.ids[span].int(), top_k, LAST_ID), _padded(mine.logits[span].to(dtype), top_k, -math.inf)
        everyone = _gathered(shard, [mine.logsumexp[span].double(), mine.entropy[span].double(), ids, own])
        lse, mass = masses(everyone[0].squeeze(2))
        best = _list(everyone[2], everyone[3], everyone[3]).best(top_k)
        found.append(OwnStats(lse, joint_entropy(mass, everyone[1].squeeze(2)), best.ids, best.own))
    joined = OwnStats(*(torch.cat(column) for column in zip(*found, strict=True)))
    return joined._replace(logsumexp=joined.logsumexp.to(dtype), entropy=joined.entropy.to(dtype))


# --- one all-gather --------------------------------------------------------------------------------------------------


def _gathered_part(part: Part, shard: Shard, top_k: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], TopK, TopK]:
    """The (ranks, n) columns of all parts, and the lists of the whole vocabulary."""
    sent = [column.double() for column in part.columns.values()]
    for best in (part.student, part.teacher):
        sent += [_padded(best.ids.int(), top_k, LAST_ID)]
        sent += [_padded(logits.to(dtype), top_k, -math.inf) for logits in (best.own, best.other)]
    everyone = _gathered(shard, sent)
    columns = {name: column.squeeze(2) for name, column in zip(part.columns, everyone, strict=False)}
    lists = everyone[len(part.columns) :]
    return columns, _list(*lists[:3]).best(top_k), _list(*lists[3:]).best(top_k)


def _gathered(shard: Shard, tensors: Sequence[Tensor]) -> list[Tensor]:
    """(ranks, n, k) of each (n,) or (n, k) tensor, all sent at once."""
    tensors = [x.unsqueeze(1) if x.dim() == 1 else x for x in tensors]
    words = [x.contiguous().view(torch.int32) for x in tensors]
    everyone = shard.ranks.gather(torch.cat(words, 1)).split([x.shape[1] for x in words], 2)
    return [x.contiguous().view(like.dtype) for x, like in zip(everyone, tensors, strict=True)]


def _padded(x: Tensor, k: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, k - x.shape[1]), value=value)


def _list(ids: Tensor, own: Tensor, other: Tensor) -> TopK:
    """Everyone's lists in one, (n, ranks K)."""
    return TopK(*(x.transpose(0, 1).flatten(1) for x in (ids.long(), own, other)))


def _empty(columns: Mapping[str, float], n: int, dtype: torch.dtype, device: torch.device) -> Part:
    """A part without an id in it."""
    none = TopK(*(torch.empty((n, 0), dtype=x, device=device) for x in (torch.long, dtype, dtype)))
    filled = {name: torch.full((n,), value, dtype=torch.float64, device=device) for name, value in columns.items()}
    return Part(filled, none, none)


# --- masses ----------------------------------------------------------------------------------------------------------


def masses(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-sum-exp of the parts' (ranks, n), and each part's share of the mass."""
    whole = torch.logsumexp(lse, 0)
    return whole, torch.where(lse == -math.inf, 0, torch.exp(lse - whole))


def joint_entropy(mass: Tensor, of_parts: Tensor) -> Tensor:
    """(n,) sum_r P_r (H_r - log P_r), of the (ranks, n) masses and entropies of the parts."""
    return torch.where(mass == 0, 0, mass * (of_parts - mass.log())).sum(0).clamp_min(0)
