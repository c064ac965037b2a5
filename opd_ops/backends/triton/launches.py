"""Shared by all launches of kernels: their options, their scratch per row, and the columns of TokenStats from two tables.

  A table is (N, V) stored logits of one model, unit stride along V; the options say how stored logits become logits.

Launches are cut into groups of rows, so that scratch fits `workspace`.
Not here: dense logits as tables (dense.py, layout.py), tiles of a head's logits (heads.py), kernels (opd_kernels).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from opd_kernels.candidates import ier_fwd
from opd_kernels.score import COLUMNS, Score, score_fwd
from opd_kernels.support import SUPPORT_COLUMNS, TopKLists, support_fwd
from torch import Tensor

from opd_ops.backends.shared.top_k import TopKList
from opd_ops.backends.streamed.running import row_jsd
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Transform, finish_logits
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import SampledLogits

JSD_BUFFERS = 10  # fp32 rows of V alive at once in row_jsd


def launch_options(student: Transform, teacher: Transform) -> dict[str, float | int | None]:
    """The keywords that every launcher takes."""
    return {
        "vocab_size": student.vocab_size,
        "temperature": student.temperature,
        "s_scale": student.scale,
        "t_scale": teacher.scale,
        "s_softcap": student.softcap,
        "t_softcap": teacher.softcap,
    }


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' device the current one: launches go to the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def column_names(columns: frozenset[str]) -> tuple[str, ...]:
    """The columns that launches compute, in order. `columns`: the optional columns to compute."""
    return (*COLUMNS, *SUPPORT_COLUMNS, *sorted(columns))


def parse_columns(optional: str) -> frozenset[str]:
    """The set of optional columns from the string "a,b", in which operators of torch take it."""
    return frozenset(filter(None, optional.split(",")))


def write_columns(
    out: Tensor,
    tables: tuple[Tensor, Tensor],
    rows: Tensor | None,
    transforms: tuple[Transform, Transform],
    *,
    columns: frozenset[str],
    top_k: int,
    workspace: Workspace,
    sampled: SampledLogits | None = None,
) -> tuple[Score, TopKLists]:
    """Fill `out`, (columns, n) in the order of `column_names`, with the statistics of the tables' rows (None: all, in order).

    Returns: the kernels' outputs. `sampled`: the rows' tokens, if `columns` has "ier".
    `workspace` bounds the scratch of the optional columns; the launch itself takes `score_bytes` a row besides.
    """
    options = launch_options(*transforms)
    score_out, support_out, others = out.split((len(COLUMNS), len(SUPPORT_COLUMNS), len(columns)))
    optional = dict(zip(sorted(columns), others, strict=True))
    score = score_fwd(*tables, rows, out=score_out, variance=optional.get("ratio_variance"), **options)
    lists = support_fwd(*tables, rows, score, out=support_out, optional=optional, top_k=top_k, **options)
    if sampled is not None:
        ier_fwd(lists, score, *sampled, optional["ier"])
    if "jsd" in columns:
        optional["jsd"].copy_(_jsd(tables, rows, transforms, workspace))
    return score, lists


def top_k_lists(lists: TopKLists, first_id: int = 0) -> tuple[TopKList, TopKList]:
    """Student's and teacher's list; the kernels counted ids from `first_id`."""
    s_at_s, t_at_s, s_at_t, t_at_t = lists.logits.unbind(1)
    ids = lists.ids.long() + first_id if first_id else lists.ids.long()
    return TopKList(ids[:, 0], s_at_s, t_at_s), TopKList(ids[:, 1], t_at_t, s_at_t)


def _jsd(
    tables: tuple[Tensor, Tensor], rows: Tensor | None, transforms: tuple[Transform, Transform], workspace: Workspace
) -> Tensor:
    """(n,) by torch, on a group of whole rows at a time: no kernel, because only a sampling selector asks for it."""
    vocab = transforms[0].vocab_size
    n = len(tables[0]) if rows is None else len(rows)
    out = torch.empty(n, dtype=torch.float32, device=tables[0].device)
    for part in chunks(len(out), workspace.count(JSD_BUFFERS * 4 * vocab)):
        taken = (table[part] if rows is None else table[rows[part]] for table in tables)
        copies = (x[:, :vocab].to(torch.float32, copy=True) for x in taken)
        sides = zip(copies, transforms, tables, strict=True)
        s, u = (finish_logits(x, transform, table.dtype) for x, transform, table in sides)
        out[part] = row_jsd(s, u).float()
    return out
