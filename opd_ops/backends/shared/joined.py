"""Statistics over a vocabulary that several ranks hold, from what each knows of its own part: one all-gather a call.

  P_r, Q_r: the mass of student and teacher in the part of rank r;  p_r, q_r: their softmaxes within it;
  g_r = log Z_s,r - log Z_t,r: the part's gap;  g: that of the whole vocabulary;  d_r = log P_r / Q_r = g_r - g

  log Z = log sum_r Z_r                       H(p) = sum_r P_r (H(p_r) - log P_r)
  KL(p||q) = sum_r P_r KL(p_r||q_r) + KL(P||Q),     KL(P||Q) = sum_r P_r (d_r + e^{-d_r} - 1)      (the chain rule)
  top-K of all = top-K of everyone's top-K, order (logit descending, id ascending)

No term of the KL is negative, and each is of second order in what rounding does to d_r: nothing large is subtracted.
Every rank joins the same gathered numbers in the same order, so all have the same bits, and select the same positions.
Sent per row and rank: seven fp64 columns, and K ids with both models' logits of both lists (`row_bytes`).
Not here: how a rank reads its part (streamed/backend.py, triton/shards.py), who holds what (inputs/vocabulary.py), sums over
parts of losses and gradients (streamed/summed.py, logits_at.py, streamed/loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared.chunks import chunks
from opd_ops.backends.shared.supports import support_columns
from opd_ops.backends.shared.top_k import TopK
from opd_ops.backends.shared.workspace import CANDIDATE_BYTES, UNION_BYTES
from opd_ops.inputs.sources import Shard
from opd_ops.inputs.teacher_lists import LAST_ID
from opd_ops.selection.stats import SWEPT_COLUMNS, OwnStats, TokenStats


class Part(NamedTuple):
    """What one rank knows of n rows, from its part of the vocabulary alone."""

    columns: dict[str, Tensor]  # (n,) those of `SWEPT_COLUMNS`
    student: TopK  # (n, up to K), ids over the whole vocabulary
    teacher: TopK


def row_bytes(top_k: int, dtype: torch.dtype, *, models: int = 2) -> int:
    """What a rank sends of each row: of both models, or of one, whose log-sum-exp and entropy are its columns."""
    columns = len(SWEPT_COLUMNS) if models == 2 else 2
    return 8 * columns + models * top_k * (4 + models * dtype.itemsize)


def rows_at_a_time(shard: Shard, top_k: int, dtype: torch.dtype, workspace_bytes: int) -> int:
    """How many rows one all-gather is of: an eighth of the workspace holds what is sent, and the lists it is joined to."""
    per_row = shard.ranks.size * (row_bytes(top_k, dtype) + top_k * CANDIDATE_BYTES) + UNION_BYTES * top_k
    return max(1, workspace_bytes // 8 // per_row)


def token_stats(
    read: Callable[[Tensor, int, int], Part],
    shard: Shard,
    rows: Tensor,
    *,
    top_k: int,
    columns: frozenset[str],
    workspace_bytes: int,
    dtype: torch.dtype,
) -> TokenStats:
    """The columns of `TokenStats` over the whole vocabulary, but `jsd`, whose terms need the normalisers first
    (streamed/summed.py).

    `read(rows, top_k, workspace_bytes)` gives this rank's part of some rows; it is not asked where the part is empty.
    """
    out: dict[str, Tensor] = {}
    n, size = len(rows), rows_at_a_time(shard, top_k, dtype, workspace_bytes)
    pairs = max(1, workspace_bytes // 16 // (UNION_BYTES * top_k))
    for span in chunks(max(1, n), size):  # no row is a span too: nothing is sent, and columns are made
        of_rows = rows[span]
        if shard.width and len(of_rows):
            part = read(of_rows, min(top_k, shard.width), workspace_bytes - workspace_bytes // 8)
        else:
            part = _nothing(len(of_rows), dtype, rows.device)
        found, student, teacher = _joined(part, shard, top_k, dtype)
        found |= _reference(found, student, teacher)
        lse = found["student_logsumexp"].double(), found["teacher_logsumexp"].double()
        for chunk in chunks(max(1, len(of_rows)), pairs):
            lists = student.rows(chunk), teacher.rows(chunk)
            of_lists = support_columns(*lists, lse[0][chunk], lse[1][chunk], columns)
            for name, column in of_lists.items():
                found.setdefault(name, column.new_empty(len(of_rows)))[chunk] = column
        for name, column in found.items():
            out.setdefault(name, torch.empty(n, dtype=dtype, device=rows.device))[span] = column
    return TokenStats(valid=torch.isfinite(out["teacher_logsumexp"]), **out)


def own_stats(
    read: Callable[[], OwnStats], shard: Shard, rows: Tensor, *, top_k: int, workspace_bytes: int, dtype: torch.dtype
) -> OwnStats:
    """One model's statistics over the whole vocabulary; `read` gives those of this rank's part, with whole-vocabulary ids."""
    if not len(rows):
        none = torch.empty(0, dtype=dtype, device=rows.device)
        return OwnStats(none, none, rows.new_empty(0, top_k), none.view(0, 1).expand(0, top_k))
    if shard.width:
        mine = read()
    else:
        nothing = _nothing(len(rows), dtype, rows.device)
        mine = OwnStats(nothing.columns["student_logsumexp"], nothing.columns["student_entropy"], *nothing.student[:2])
    found = []
    for span in chunks(len(rows), rows_at_a_time(shard, top_k, dtype, workspace_bytes)):
        ids, own = _padded(mine.ids[span].int(), top_k, LAST_ID), _padded(mine.logits[span].to(dtype), top_k, -math.inf)
        everyone = _gathered(shard, [mine.logsumexp[span].double(), mine.entropy[span].double(), ids, own])
        lse, masses = _masses(everyone[0].squeeze(2))
        best = _list(everyone[2], everyone[3], everyone[3]).best(top_k)
        found.append(OwnStats(lse, _entropy(masses, everyone[1].squeeze(2)), best.ids, best.own))
    joined = OwnStats(*(torch.cat(column) for column in zip(*found, strict=True)))
    return joined._replace(logsumexp=joined.logsumexp.to(dtype), entropy=joined.entropy.to(dtype))


# --- one all-gather --------------------------------------------------------------------------------------------------


def _joined(part: Part, shard: Shard, top_k: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], TopK, TopK]:
    sent = [part.columns[name].double() for name in SWEPT_COLUMNS]
    for found in (part.student, part.teacher):
        sent += [_padded(found.ids.int(), top_k, LAST_ID)]
        sent += [_padded(logits.to(dtype), top_k, -math.inf) for logits in (found.own, found.other)]
    everyone = _gathered(shard, sent)
    columns = {name: column.squeeze(2) for name, column in zip(SWEPT_COLUMNS, everyone, strict=False)}
    lists = everyone[len(SWEPT_COLUMNS) :]
    return joined_columns(columns), _list(*lists[:3]).best(top_k), _list(*lists[3:]).best(top_k)


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


def _nothing(n: int, dtype: torch.dtype, device: torch.device) -> Part:
    """A part without an id in it."""
    none = TopK(*(torch.empty((n, 0), dtype=x, device=device) for x in (torch.long, dtype, dtype)))
    columns = {name: torch.zeros(n, dtype=torch.float64, device=device) for name in SWEPT_COLUMNS}
    for name in ("student_logsumexp", "teacher_logsumexp"):
        columns[name].fill_(-math.inf)
    return Part(columns, none, none)


# --- parts to the whole ----------------------------------------------------------------------------------------------


def joined_columns(of: dict[str, Tensor]) -> dict[str, Tensor]:
    """The (n,) columns of the whole vocabulary from the (ranks, n) fp64 ones of its parts."""
    s, t, gaps = of["student_logsumexp"], of["teacher_logsumexp"], of["logsumexp_gap"]
    (s_lse, p), (t_lse, q) = _masses(s), _masses(t)
    in_s, in_t = s != -math.inf, t != -math.inf  # a NaN is in
    shared = in_s & in_t
    gap = _gap(s_lse, t_lse, p, q, gaps, s, t, shared)
    d = torch.where(shared, gaps - gap, 0)
    near = d.abs() < 1  # elsewhere e^d may overflow, and P e^{-d} is Q itself
    of_p = torch.where(near, p * (torch.expm1(-d) + d), q - p + p * d)
    of_q = torch.where(near, q * (torch.expm1(d) - d), p - q - q * d)
    # In a part that one model alone has, P_r e^{-d_r} - P_r is what is left: the other's mass.
    reverse = torch.where(shared, _times(p, of["reverse_kl"]) + of_p, q)
    forward = torch.where(shared, _times(q, of["forward_kl"]) + of_q, p)
    # A part whose mass is 0 in fp64 makes nothing infinite.
    p_without_q = ((p > 0) & ((t == -math.inf) | (of["reverse_kl"] == math.inf))).any(0)
    q_without_p = ((q > 0) & ((s == -math.inf) | (of["forward_kl"] == math.inf))).any(0)
    reverse_kl, forward_kl = reverse.sum(0).clamp_min(0), forward.sum(0).clamp_min(0)
    return {
        "student_entropy": _entropy(p, of["student_entropy"]),
        "teacher_entropy": _entropy(q, of["teacher_entropy"]),
        "reverse_kl": reverse_kl.masked_fill(p_without_q & ~reverse_kl.isnan(), math.inf),
        "forward_kl": forward_kl.masked_fill(q_without_p & ~forward_kl.isnan(), math.inf),
        "student_logsumexp": s_lse,
        "teacher_logsumexp": t_lse,
        "logsumexp_gap": gap,
    }


def _reference(columns: dict[str, Tensor], student: TopK, teacher: TopK) -> dict[str, Tensor]:
    """The columns that gradients read, of whole rows; fp64 leaves them the digits of 1 - p_a down to 1e-11."""
    s, u, u_top = (x[:, 0].double() for x in (student.own, student.other, teacher.own))
    s, u = s.masked_fill(s == -math.inf, 0), torch.where(u == -math.inf, u_top.masked_fill(u_top == -math.inf, 0), u)
    log_ratio = (s - u) - columns["logsumexp_gap"]
    return {
        "reference_student": s,
        "reference_teacher": u,
        "reference_log_p": s - columns["student_logsumexp"],
        "reference_log_ratio": log_ratio,
        "reverse_kl_excess": (columns["reverse_kl"] - log_ratio).masked_fill(columns["reverse_kl"] == math.inf, 0),
    }


def _masses(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) log-sum-exp of the parts' (ranks, n), and each part's share of the mass."""
    whole = torch.logsumexp(lse, 0)
    return whole, torch.where(lse == -math.inf, 0, torch.exp(lse - whole))


def _times(mass: Tensor, x: Tensor) -> Tensor:
    """mass * x, where no mass is 0 whatever x is; an infinite x is kept as a flag by the caller."""
    return torch.where((mass == 0) | (x == math.inf), 0, mass * x)


def _entropy(mass: Tensor, of_parts: Tensor) -> Tensor:
    return torch.where(mass == 0, 0, mass * (of_parts - mass.log())).sum(0).clamp_min(0)


def _gap(s_lse: Tensor, t_lse: Tensor, p: Tensor, q: Tensor, gaps: Tensor, s: Tensor, t: Tensor, shared: Tensor) -> Tensor:
    """log Z_s - log Z_t = c + log(1 + sum_r Q_r (e^{g_r - c} - 1)), c the gap of the part where most of p is.

    Which keeps the digits that the parts' gaps have where the models nearly agree; where they do not, or where a part has only
    one of them, the plain difference has enough.
    """
    place = torch.where(shared, p, -1.0).argmax(0, keepdim=True)
    c = gaps.gather(0, place)
    shift = torch.where(shared, gaps - c, 0)
    ratio = (q * torch.expm1(shift)).sum(0)
    plain = ((s != -math.inf) != (t != -math.inf)).any(0) | ~(ratio > -0.5) | ~torch.isfinite(ratio)
    return torch.where(plain, s_lse - t_lse, c.squeeze(0) + torch.log1p(ratio))
