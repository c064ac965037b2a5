"""A teacher of other ids as lists at the student's positions: `mapped_teacher`. inputs/id_map.py has the rules.

  A = the student's K most likely shared ids;  log q at m(v), v in A: K dot products, and one sweep of each model's aligned rows

By torch's own operations on any device, without a graph.
Not here: the map and the alignment (inputs/id_map.py), the loss on the lists (divergences/top_k.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opd_ops.arguments import (
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_K,
    DEFAULT_WORKSPACE_BYTES,
    check_integer,
    check_positive,
    may_look,
    per_position,
)
from opd_ops.backends.shared.logits_at import logits_at
from opd_ops.backends.streamed.one_model import own_stats
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.id_map import IdMap, MappedTeacher
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.sources import Source, compute_dtype, take_rows
from opd_ops.inputs.teacher_lists import TopKLogprobs, is_missing
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, Scoring


@torch.no_grad()
def mapped_teacher(
    id_map: IdMap,
    student: Tensor | LinearHead,
    teacher: Tensor | LinearHead,
    index: Tensor,
    *,
    top_k: int = DEFAULT_TOP_K,
    temperature: float = DEFAULT_TEMPERATURE,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> MappedTeacher:
    """The teacher's log-probabilities of the student's likeliest shared ids, at the positions that both have.

    Args:
        student: (..., T, V) logits or a `LinearHead`, with its own ids and positions.
        teacher: (..., T', V') likewise.
        index: (..., T) int64: of each position of the student, the teacher's position 0 ... T' - 1 that predicts the same token
            after the same text (`IdMap.align`); -1: not aligned.
        top_k: K, or the number of shared ids if that is smaller.
        temperature: The call's.
    Returns: `MappedTeacher`. A call takes `teacher=mapped.lists`, `mask=mask & mapped.mask` and
        divergence=TopK("reverse", "student", "drop", top_k).
    Raises: ValueError, TypeError: an argument that does not fit, by name.
    """
    own, other = (Source.of(side, None, check_positive("temperature", temperature)) for side in (student, teacher))
    width = len(id_map.student_to_teacher)
    if own.width < width or int(id_map.student_to_teacher.max()) >= other.width:
        raise ValueError(
            f"id_map: maps {width} ids of the student to ids up to {int(id_map.student_to_teacher.max())} of the teacher, but "
            f"the models have {own.width} and {other.width}"
        )
    per_position("index", index, own.shape, own.device)
    if own.shape[:-1] != other.shape[:-1] or not own.shape:
        raise ValueError(
            f"teacher: got positions {tuple(other.shape)}, the student's are {tuple(own.shape)}; expected the same texts, "
            "so that only the last dimension differs"
        )
    length = other.shape[-1]
    if may_look(index) and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < length:
        raise ValueError(f"index: got {int(index.min())} ... {int(index.max())}, expected -1 ... {length - 1}")
    k = min(check_integer("top_k", top_k, least=1), id_map.n_shared)
    own = own._replace(transform=replace(own.transform, vocab_size=width)).detach()
    to_teacher, workspace = id_map.student_to_teacher.to(own.device), Workspace(workspace_bytes)
    mask = index >= 0
    rows = mask.flatten().nonzero().squeeze(1)
    other_rows = rows // own.shape[-1] * length + index.flatten()[rows]
    ids, is_complete = _shared_ids(own, to_teacher >= 0, rows, k, workspace)
    dtype = compute_dtype(other)
    normaliser = own_stats(other.detach(), other_rows, Scoring(1, workspace)).logsumexp
    log_q = (logits_at(other.detach(), other_rows, to_teacher[ids], dtype, workspace) - normaliser.unsqueeze(1)).to(dtype)
    mask = mask.flatten().index_put((rows,), is_complete & ~is_missing(log_q).any(1)).view(mask.shape)
    all_ids = torch.full((mask.numel(), k), -1, dtype=torch.long, device=own.device).index_copy(0, rows, ids)
    logprobs = torch.full((mask.numel(), k), -torch.inf, dtype=dtype, device=own.device).index_copy(0, rows, log_q.clamp_max(0))
    shape = (*own.shape, k)
    metrics = {"aligned": mask.double().mean(), "listed_mass": log_q.double().exp().sum() / max(1, len(rows))}
    return MappedTeacher(TopKLogprobs(all_ids.view(shape), logprobs.view(shape), temperature, of="student"), mask, metrics)


def _shared_ids(student: Source, is_shared: Tensor, rows: Tensor, k: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """(n, k) the student's most likely ids among the shared ones, and (n,) bool: whether it masks none of them."""
    half, n = workspace.share(1, 2), len(is_shared)
    unshared = torch.zeros(n, dtype=torch.float32, device=rows.device).masked_fill(~is_shared, -torch.inf)
    if student.weight is not None:
        # A bias of -inf masks an id. A soft-cap would make it finite again, but does not change the order.
        bias = unshared if student.bias is None else student.bias[:n] + unshared
        plain = replace(student.transform, softcap=None, scale=1.0, temperature=1.0)
        head = student._replace(bias=bias, transform=plain)
        return _complete(own_stats(head, rows, Scoring(k, workspace)))
    lists = [torch.empty((0, k), dtype=torch.long, device=rows.device)]
    complete = [torch.empty(0, dtype=torch.bool, device=rows.device)]
    for part in chunks(len(rows), half.count(16 * n)):
        logits = take_rows(student.leading, rows[part])[:, :n] + unshared
        every = torch.arange(len(logits), device=rows.device)
        ids, is_complete = _complete(own_stats(Source.of(logits), every, Scoring(k, half)))
        lists.append(ids)
        complete.append(is_complete)
    return torch.cat(lists), torch.cat(complete)


def _complete(stats: OwnStats) -> tuple[Tensor, Tensor]:
    return stats.ids, ~(stats.logits == -torch.inf).any(1)  # NaN stays, so that the loss sees it
