"""Statistics of the Triton backend where a model is a LinearHead: from tiles of logits, bounded by the vendor's matmul.

  tile = some rows x the whole vocabulary: a matmul into a reused buffer, then score and support kernels on it    2 units
  (one unit = 2 N V D FLOP; selection/stats.py defines the statistics)

A 16-bit head's score tile holds 16-bit logits: they rank positions. The loss computes its logits again in fp32 (heads_loss.py).
Deterministic. No host synchronisation, no copy from the host.

Not here: the kernels (opd_kernels), a tile's logits (shared/tiles.py), dense logits on both sides (dense.py), fp32 heads on
any device (streamed/backend.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opd_kernels.quantise import quantise_rows
from opd_kernels.score import Score, score_fwd
from opd_kernels.support import TopKLists, support_fwd
from torch import Tensor

from opd_ops.backends.shared.grids import ranks_in_float8, score_tile, tile_dtype, weight_casts
from opd_ops.backends.shared.matmul import without_autocast
from opd_ops.backends.shared.tiles import TileReader, aligned_buffer
from opd_ops.backends.triton.launches import column_names, launch_options, on_device, write_columns
from opd_ops.inputs.chunks import groups
from opd_ops.inputs.float8 import Float8Rows
from opd_ops.inputs.sources import Source
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, Scoring


def _ranking_reader(source: Source, rows: Tensor, workspace: Workspace, score_dtype: torch.dtype | None) -> TileReader:
    dtype, quantise = tile_dtype(source, score_dtype), quantised if ranks_in_float8(source, score_dtype) else None
    return TileReader(source, rows, dtype, weight_casts(source, workspace), quantise=quantise)


def quantised(x: Tensor) -> Float8Rows:
    """`Float8Rows.of`, in one launch."""
    rows = Float8Rows.empty(x)
    with on_device(x.device):
        quantise_rows(x, rows.values.view(torch.uint8), rows.scales)
    return rows


def launch_columns(
    student: Source,
    teacher: Source,
    rows: Tensor,
    scoring: Scoring,
    *,
    keep: Callable[[tuple[Score, TopKLists]], None] | None = None,
) -> Tensor:
    """(columns, n) statistics of the given positions, in the order of `column_names`.

    `score_dtype` None: the head's own. `keep`: called with the kernels' outputs for each group of consecutive rows.
    """
    top_k, workspace, score_dtype, columns, sampled = scoring
    vocab = student.transform.vocab_size
    sides = [_ranking_reader(source, rows, workspace, score_dtype) for source in (student, teacher)]
    transforms = sides[0].transform, sides[1].transform
    size, span_size = score_tile(
        student, teacher, n=len(rows), top_k=top_k, optional=bool(columns), workspace=workspace, score_dtype=score_dtype
    )
    out = torch.empty((len(column_names(columns)), len(rows)), dtype=torch.float32, device=rows.device)
    with on_device(rows.device), without_autocast(rows.device):
        tiles = [aligned_buffer(size, vocab, x.dtype, rows.device) for x in sides]
        for group, span in groups(len(rows), span_size, size):
            n = group.stop - group.start
            for side in sides:
                side.take(span)
            s, u = (side.ranked(group, tile[:n]) for side, tile in zip(sides, tiles, strict=True))
            half = workspace.share(1, 2)
            outputs = write_columns(
                out[:, group],
                (s, u),
                None,
                transforms,
                columns=columns,
                top_k=top_k,
                workspace=half,
                sampled=None if sampled is None else sampled.take(group),
            )
            if keep is not None:
                keep(outputs)
    return out


def own_stats(source: Source, rows: Tensor, scoring: Scoring) -> OwnStats:
    """One model's statistics at the rows, from its logits alone."""
    top_k, workspace, score_dtype, _, _ = scoring
    vocab, n = source.transform.vocab_size, len(rows)
    side = _ranking_reader(source, rows, workspace, score_dtype)
    tile = score_tile(source, n=n, top_k=top_k, optional=False, workspace=workspace, score_dtype=score_dtype)
    ids = torch.empty((n, top_k), dtype=torch.long, device=rows.device)
    lse, entropy = torch.empty((2, n), dtype=torch.float32, device=rows.device)
    out = OwnStats(lse, entropy, ids, torch.empty((n, top_k), dtype=torch.float32, device=rows.device))
    options = launch_options(side.transform, side.transform)
    with torch.no_grad(), on_device(rows.device), without_autocast(rows.device):
        buffer = aligned_buffer(tile.rows, vocab, side.dtype, rows.device)
        for group, span in groups(n, tile.span, tile.rows):
            side.take(span)
            u = side.ranked(group, buffer[: group.stop - group.start])
            # The model is passed twice: the second load of each line hits the cache.
            score = score_fwd(u, u, None, **options)
            lists = support_fwd(u, u, None, score, top_k=top_k, **options)
            group_stats = OwnStats(score.teacher_logsumexp, score.teacher_entropy, lists.t_ids, lists.logits[:, 3])
            for column, values in zip(out, group_stats, strict=True):
                column[group] = values
    return out
