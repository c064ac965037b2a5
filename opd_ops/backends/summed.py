# A divergence that is a sum over the vocabulary, of rows whose normalisers are known: its value and the pull of its gradient.
#
#   l = sum_v f(p_v, q_v),   pull = sum_v p_v f'(p_v, q_v)                                    (divergences/base.py, `Summed`)
#
# One sweep of both models, block by block. Ranks that share out the vocabulary add up their parts: one all-reduce of 24 bytes
# a row.
# Not here: reverse and forward KL, which the score pass knows (streamed.py), the gradient (streamed_loss.py).
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends import pages
from opd_ops.backends.reading import Rows, slices
from opd_ops.backends.tiling import gradient_grid
from opd_ops.divergences import JSD, Summed
from opd_ops.sources import Source, compute_dtype
from opd_ops.stats import TokenStats


class Sums(NamedTuple):
    """A divergence over whole rows, and the number that its gradient needs of each."""

    losses: Tensor  # (M,)
    pull: Tensor  # (M,)


@torch.no_grad()
def summed(
    whole: Summed, student: Source, teacher: Source, rows: Tensor, lse: Tensor, gap: Tensor, workspace_bytes: int
) -> Sums:
    """Of the rows, whose student log-sum-exp and gap are given, (M,) each."""
    dtype = compute_dtype(student, teacher)
    grid = gradient_grid(student, teacher, len(rows), workspace_bytes=workspace_bytes, two_parts=True)
    sides = [Rows(source.detach(), rows, dtype, grid.columns) for source in (student, teacher)]
    buffers = [pages.empty((grid.rows * grid.columns,), dtype, rows.device) for _ in sides]
    sums = torch.zeros(3, len(rows), dtype=torch.float64, device=rows.device)
    lse, gap = lse.unsqueeze(1), gap.unsqueeze(1)
    with torch.autocast(rows.device.type, enabled=False):
        for block in slices(slice(0, student.transform.vocab_size), grid.columns):
            for group in slices(slice(0, len(rows)), grid.rows):
                s, u = (side.read(group, block, buffer) for side, buffer in zip(sides, buffers, strict=True))
                log_ratio = torch.sub(s, u).sub_(gap[group])
                no_p = s == -math.inf
                log_ratio.masked_fill_(no_p & (u == -math.inf), 0)
                log_p, log_q = s.sub_(lse[group]), u.sub_(lse[group] - gap[group])
                sums[0, group] += whole.term(log_p, log_q, log_ratio).sum(1)
                slope, p = whole.slope(log_p, log_ratio), log_p.exp_()
                sums[1, group] += slope.mul_(p).masked_fill_(no_p, 0).sum(1)
                sums[2, group] += p.sum(1)
    if student.transform.shard is not None:
        student.transform.shard.ranks.sum(sums)
    # sum p is 1 but for the rounding of the normaliser: divided by it, the gradient of every row sums to 0.
    return Sums(sums[0].clamp_min(0).to(dtype), (sums[1] / sums[2]).to(dtype))


def with_jsd(stats: TokenStats, student: Source, teacher: Source, rows: Tensor, workspace_bytes: int) -> TokenStats:
    """The rows' columns and their Jensen-Shannon divergence, whose terms need the normalisers of the whole vocabulary."""
    half: Summed = JSD(0.5)
    found = summed(half, student, teacher, rows, stats.student_logsumexp, stats.logsumexp_gap, workspace_bytes)
    return stats._replace(jsd=found.losses)
