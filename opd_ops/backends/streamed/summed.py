"""A divergence that is a sum over the vocabulary: its value and its mean slope, from rows with known normalisers.

  l = sum_v f(p_v, q_v),   mean slope = sum_v p_v (f'(p_v, q_v) - f'_a),  a the student's top id    (divergences/base.py)

One sweep of both models, block by block. Ranks that share out the vocabulary add up the sums of their parts: one all-reduce of
24 bytes a row.
Not here: reverse and forward KL, which are columns of the score pass (score.py), the gradient (loss.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared import pages
from opd_ops.backends.shared.grids import gradient_grid
from opd_ops.backends.shared.matmul import without_autocast
from opd_ops.backends.shared.tiles import TileReader
from opd_ops.backends.streamed.reference import Reference
from opd_ops.divergences import JSD, Summed
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import TokenStats


class Sums(NamedTuple):
    """Values of a divergence over whole rows, and the mean slopes that its gradient reads."""

    losses: Tensor  # (M,)
    mean_slope: Tensor  # (M,)


@torch.no_grad()
def summed(whole: Summed, student: Source, teacher: Source, rows: Tensor, reference: Reference, workspace: Workspace) -> Sums:
    """Values and mean slopes at the rows. `reference`: the normalisers of these rows."""
    dtype = compute_dtype(student, teacher)
    grid = gradient_grid(student, teacher, len(rows), workspace=workspace, two_parts=True)
    sides = [TileReader(source.detach(), rows, dtype, grid.columns) for source in (student, teacher)]
    buffers = [pages.empty((grid.rows * grid.columns,), dtype, rows.device) for _ in sides]
    sums = torch.zeros(3, len(rows), dtype=torch.float64, device=rows.device)
    with without_autocast(rows.device):
        for block in chunks(student.transform.vocab_size, grid.columns):
            for group in chunks(len(rows), grid.rows):
                s, u = (side.logits(group, block, buffer) for side, buffer in zip(sides, buffers, strict=True))
                group_reference = reference.rows(group)
                no_p, no_q = s == -math.inf, u == -math.inf
                log_q = (u - group_reference.teacher).add_(group_reference.log_p - group_reference.log_ratio)
                log_p, log_ratio = group_reference.log_probabilities(s, u)
                log_ratio.masked_fill_(no_p & no_q, 0)
                sums[0, group] += whole.term(log_p, log_q, log_ratio).sum(1)
                slope = whole.slope(log_p, log_ratio).sub_(whole.slope(group_reference.log_p, group_reference.top_log_ratio))
                p = log_p.exp_()
                sums[1, group] += slope.mul_(p).masked_fill_(no_p, 0).sum(1)
                sums[2, group] += p.sum(1)
    if student.transform.shard is not None:
        student.transform.shard.ranks.sum(sums)
    # sum p differs from 1 by the normaliser's rounding. The mean slope is divided by it: each row's gradient then sums to 0.
    losses = sums[0] if whole.may_be_negative else sums[0].clamp_min(0)
    return Sums(losses.to(dtype), (sums[1] / sums[2]).to(dtype))


def with_jsd(stats: TokenStats, student: Source, teacher: Source, rows: Tensor, workspace: Workspace) -> TokenStats:
    """`stats` with the column "jsd", whose terms need the normalisers of the whole vocabulary."""
    divergence: Summed = JSD(0.5)
    sums = summed(divergence, student, teacher, rows, Reference.of(stats), workspace)
    return stats._replace(jsd=sums.losses)
