"""Full-vocabulary statistics of two rows of logits, accumulated block by block of the vocabulary in one sweep.

  Each model's exponents are relative to its largest logit so far, at the ids a (student) and b (teacher):
    log Z_s = s_a + log1p(sum_{v != a} e^{s_v - s_a}),   H = log Z - s_a - E_p[s - s_a]
  Gaps are relative to the student's top id a:  g_v = (s_v - s_a) - (u_v - u_a),  r_a = log p_a - log q_a
    KL(p||q) = r_a + E_p[g],   KL(q||p) = -r_a - E_q[g]                                        (algebra of TokenStats)
    Var_p[log p - log q] = Var_p[g], if asked for: of sums A and B by Chan's rule, with W = sum e and the means of g,
    squares = squares_A + squares_B + (mean_A - mean_B)^2 W_A W_B / (W_A + W_B), which subtracts no large numbers

Numerics
  Each model's maximum is subtracted before the models are subtracted: models that differ by a constant lose no digit.
  The top entry adds exactly 1 to Z and exactly 0 to the other sums. It is left out of the sums, so that a row with p_a near 1
  keeps the digits of 1 - p_a. Blocks are joined in fp64.
  A masked entry (-inf) is left out of the sums. Where one model masks an entry and the other does not, the divergence is
  infinite if the other's probability there is above 0 in fp64. So the largest such logit of each model is kept, and compared
  at the end.

Not here: the top-K lists (shared/top_k.py), tiles (shared/tiles.py, score.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared.top_k import TopKList
from opd_ops.divergences.equations import LOG_ZERO

TINY = torch.finfo(torch.float64).tiny  # a divisor in the place of a sum that is 0


class RunningSums(NamedTuple):
    """Sums over some columns, in fp64, with e = e^{x - maximum}. Columns of (2, n): the student's row, then the teacher's."""

    maximum: Tensor  # (2, n) the largest logit so far
    z: Tensor  # (2, n) sum e
    x: Tensor  # (2, n) sum e (x - maximum)
    gap: Tensor  # (2, n) sum e g
    alone: Tensor  # (2, n) the largest logit among the entries that only the other model masks; -inf if there are none
    centre: Tensor  # (n,) s_a - u_a
    squares: Tensor | None = None  # (n,) sum e (g - mean)^2 of the student's row; None: not computed


def block_sums(
    s: Tensor, u: Tensor, s_best: TopKList, t_best: TopKList, first_id: int, scratch: Tensor, *, squares: bool = False
) -> RunningSums:
    """Sums of one block, with `squares` only if asked for.

    Args:
        s, u: (n, B) logits; the block begins at the id `first_id`.
        s_best, t_best: Each model's list of best ids in this and all earlier blocks; only the first entry is read.
        scratch: (3 C,), C >= B: C // B rows are summed at a time.
    """
    n, width = s.shape
    maximum = torch.stack((s_best.own[:, 0], t_best.own[:, 0]))
    finite = _finite(maximum)
    u_reference = _teacher_reference(s_best, finite[1])
    places = torch.stack((s_best.ids[:, :1], t_best.ids[:, :1])) - first_id
    outside = (places < 0) | (places >= width)
    # A top entry of this block is set to 0 before the sum of e; the bound +inf changes nothing.
    bounds = torch.zeros_like(places, dtype=s.dtype).masked_fill_(outside, math.inf)
    sums, alone = s.new_empty(2, 3, n), s.new_full((2, n), -math.inf)
    square_sums = s.new_empty(n) if squares else None
    step = min(n, scratch.numel() // (3 * width))
    work = scratch[: 3 * step * width].view(3, step, width).unbind()
    columns = (*finite.unsqueeze(2), u_reference.unsqueeze(1), *places.clamp_(0, width - 1), *bounds)
    # All views are created here, because creating them chunk by chunk costs as much as a pass over the logits.
    views = (x.split(step) for x in (s, u, *columns, *sums.view(6, n), *alone))
    chunks = [_Chunk(*chunk) for chunk in zip(*views, strict=True)]
    if square_sums is not None:
        chunks = [chunk._replace(squares=x) for chunk, x in zip(chunks, square_sums.split(step), strict=True)]
    # On a CPU, masks are used only where a sum is not finite. On a device this test would synchronise: masks are always used.
    on_cpu = s.device.type == "cpu"
    holds_top = [not x for x in outside.flatten(1).all(1).tolist()] if on_cpu else [True, True]
    masked_chunks = chunks
    if on_cpu:
        for chunk in chunks:
            chunk.sum(work, holds_top, masked=False)
        is_finite = torch.isfinite(sums).flatten(0, 1).all(0)
        masked_chunks = []
        if not bool(is_finite.all()):
            masked_chunks = [chunk for chunk, ok in zip(chunks, is_finite.split(step), strict=True) if not bool(ok.all())]
    for chunk in masked_chunks:
        chunk.sum(work, holds_top, masked=True)
    z, x, gap = sums.double().unbind(1)
    centre = finite[0].double() - u_reference.double()
    block_squares = None if square_sums is None else square_sums.double()
    return RunningSums(maximum.double(), z, x, gap, alone.double(), centre, block_squares)


class _Chunk(NamedTuple):
    """Some rows of a block, and views into which their sums are written."""

    s: Tensor  # (c, B)
    u: Tensor
    s_reference: Tensor  # (c, 1)
    t_reference: Tensor
    u_reference: Tensor
    s_top: Tensor  # (c, 1) column of the top entry
    t_top: Tensor
    s_bound: Tensor  # (c, 1) 0 where this block holds the top entry, else +inf
    t_bound: Tensor
    s_z: Tensor  # (c,)
    s_x: Tensor
    s_gap: Tensor
    t_z: Tensor
    t_x: Tensor
    t_gap: Tensor
    s_alone: Tensor
    t_alone: Tensor
    squares: Tensor | None = None

    def sum(self, work: Sequence[Tensor], holds_top: Sequence[bool], *, masked: bool) -> None:
        """Compute the sums. `masked`: leave out -inf logits. `work`: three buffers of (c or more, B)."""
        gap, shifted, weight = work if len(self.s) == len(work[0]) else (buffer[: len(self.s)] for buffer in work)
        torch.sub(self.s, self.s_reference, out=gap)
        gap.sub_(torch.sub(self.u, self.u_reference, out=shifted))
        s_masked = t_masked = None
        if masked:
            s_masked, t_masked = self.s == -math.inf, self.u == -math.inf
            torch.amax(self.s.masked_fill(~t_masked, -math.inf), 1, out=self.s_alone)
            torch.amax(self.u.masked_fill(~s_masked, -math.inf), 1, out=self.t_alone)
            gap.masked_fill_(s_masked | t_masked, 0.0)
        s_sums, t_sums = (self.s_z, self.s_x, self.s_gap), (self.t_z, self.t_x, self.t_gap)
        for logits, reference, is_masked, has_top, top, bound, (z, x, gap_sum) in (
            (self.s, self.s_reference, s_masked, holds_top[0], self.s_top, self.s_bound, s_sums),
            (self.u, self.t_reference, t_masked, holds_top[1], self.t_top, self.t_bound, t_sums),
        ):
            torch.exp(torch.sub(logits, reference, out=shifted), out=weight)
            if is_masked is not None:
                shifted.masked_fill_(is_masked, 0.0)  # 0 * -inf would be NaN
            torch.sum(shifted.mul_(weight), 1, out=x)
            torch.sum(torch.mul(weight, gap, out=shifted), 1, out=gap_sum)
            if self.squares is not None and logits is self.s:
                mean = gap_sum / weight.sum(1).clamp_min(torch.finfo(weight.dtype).tiny)
                torch.sum(torch.sub(gap, mean.unsqueeze(1), out=shifted).square_().mul_(weight), 1, out=self.squares)
            if has_top:
                weight.scatter_reduce_(1, top, bound, "amin")
            torch.sum(weight, 1, out=z)


def _teacher_reference(student: TopKList, teacher_maximum: Tensor) -> Tensor:
    """(n,) u_a; where the teacher masks a, its own largest logit (any finite number will do)."""
    u_a = student.other[:, 0]
    return torch.where(u_a == -math.inf, teacher_maximum, u_a)


def _finite(maximum: Tensor) -> Tensor:
    """The maximum, but 0 where all logits so far are -inf: e^{x - maximum} is then 0, not NaN."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def extended_sums(sums: RunningSums | None, block: RunningSums) -> RunningSums:
    """The sums with one more block (None: the first), whose maxima and centre are those of all blocks so far."""
    if sums is None:
        return block
    keeps_top = sums.maximum == block.maximum
    moved = _moved(sums, block.maximum, keeps_top, sums.centre - block.centre)
    alone, squares = torch.maximum(sums.alone, block.alone), None
    if block.squares is not None:
        assert moved.squares is not None
        z, gap = (torch.stack((x[0], y[0])) for x, y in ((moved.z, block.z), (moved.gap, block.gap)))
        both = torch.stack((moved.squares, block.squares))
        squares = _joined_squares(z, gap, both, torch.stack((keeps_top[0], ~keeps_top[0])))
    sums = RunningSums(block.maximum, moved.z + block.z, moved.x + block.x, moved.gap + block.gap, alone, block.centre)
    return sums._replace(squares=squares)


def _joined_squares(z: Tensor, gap: Tensor, squares: Tensor, has_top: Tensor) -> Tensor:
    """(n,) sum e (g - mean)^2 over all parts, from (parts, n) sums relative to one maximum and centre (Chan's rule).

    `has_top`: which part has the top entry, which its z leaves out.
    """
    weight = z + has_top
    mean = (gap / weight.clamp_min(TINY)).masked_fill(weight == 0, 0)
    whole_mean = gap.sum(0) / weight.sum(0).clamp_min(TINY)
    return (squares + weight * (mean - whole_mean).square()).sum(0)


EMPTY_SUMS = {
    f"{model}_{field}": -math.inf if field in ("maximum", "alone") else 0.0
    for field in RunningSums._fields[:-2]
    for model in ("student", "teacher")
} | {"centre": 0.0}
"""The sums over no column, by the names under which ranks send them."""
SQUARES = {"squares": 0.0}
"""One more of them, sent if the column "ratio_variance" is asked for."""


def named_sums(sums: RunningSums) -> dict[str, Tensor]:
    """The sums as (n,) columns with the names of `EMPTY_SUMS`, and of `SQUARES` if they are computed."""
    columns = [column for pair in sums[:-2] for column in pair]
    named = dict(zip(EMPTY_SUMS, (*columns, sums.centre), strict=True))
    return named if sums.squares is None else named | {"squares": sums.squares}


def joined_sums(parts: dict[str, Tensor], student: TopKList, teacher: TopKList) -> dict[str, Tensor]:
    """`statistics` of the whole vocabulary, from the (ranks, n) sums of its parts, joined like blocks."""
    stacked = torch.stack([parts[name] for name in EMPTY_SUMS])
    pairs = stacked[:-1].unflatten(0, (-1, 2)).transpose(1, 2)  # (fields, ranks, 2, n)
    every = RunningSums(pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], stacked[-1].unsqueeze(1))
    if "squares" in parts:
        every = every._replace(squares=parts["squares"])
    best = torch.stack((student.own[:, 0], teacher.own[:, 0])).double()
    centre = _finite(best[0]) - _teacher_reference(student, _finite(teacher.own[:, 0])).double()
    maximum, owner = every.maximum.max(0)
    keeps_top = torch.zeros_like(every.maximum, dtype=torch.bool).scatter_(0, owner.unsqueeze(0), True)
    moved = _moved(every, maximum, keeps_top, every.centre - centre)
    sums = RunningSums(maximum, moved.z.sum(0), moved.x.sum(0), moved.gap.sum(0), moved.alone.amax(0), centre)
    if moved.squares is not None:
        has_top = keeps_top[:, 0] & (every.maximum[:, 0] > -math.inf)
        sums = sums._replace(squares=_joined_squares(moved.z[:, 0], moved.gap[:, 0], moved.squares, has_top))
    return statistics(sums, student)


def statistics(sums: RunningSums, student: TopKList) -> dict[str, Tensor]:
    """The full-vocabulary columns of `TokenStats`, (n,) fp64, with the columns that gradients read."""
    total, log_z = _total(sums), sums.z.log1p().masked_fill(sums.maximum == -math.inf, -math.inf)
    lse = sums.maximum + log_z
    entropy = (log_z - sums.x / total).clamp_min(0)
    top = _finite(sums.maximum[0])
    u_reference = top - sums.centre
    log_ratio = (sums.maximum[1] - u_reference) + (log_z[1] - log_z[0])  # r_a
    s_gap, t_gap = (sums.gap / total).unbind()
    divergences = torch.stack((s_gap + log_ratio, -log_ratio - t_gap)).clamp_min(0)  # KL(p||q), KL(q||p)
    infinite = (sums.alone - lse > LOG_ZERO) & ~divergences.isnan()
    divergences = divergences.masked_fill(infinite, math.inf)
    optional = {}
    if sums.squares is not None:
        optional["ratio_variance"] = (sums.squares / total[0]).masked_fill(infinite[0], math.inf)
    return optional | {
        "student_entropy": entropy[0],
        "teacher_entropy": entropy[1],
        "reverse_kl": divergences[0],
        "forward_kl": divergences[1],
        "student_logsumexp": lse[0],
        "teacher_logsumexp": lse[1],
        "logsumexp_gap": sums.centre - log_ratio,
        "reference_student": top,
        "reference_teacher": u_reference,
        "reference_log_p": -log_z[0],
        "reference_log_ratio": log_ratio,
        "top_log_ratio": log_ratio.masked_fill(student.other[:, 0] == -math.inf, math.inf),
        "reverse_kl_excess": s_gap.masked_fill(infinite[0], 0),
    }


def row_jsd(s: Tensor, u: Tensor) -> Tensor:
    """(n,) Jensen-Shannon divergence of whole (n, V) rows; it reads the rows a second time, with their normalisers.

    With r = log p - log q:  1/2 sum p (log 2 - softplus(-r)) + 1/2 sum q (log 2 - softplus(r)).
    """
    log_p, log_q = torch.log_softmax(s, 1), torch.log_softmax(u, 1)
    ratio = log_p - log_q
    p_term = torch.nn.functional.softplus(-ratio).neg_().add_(math.log(2)).mul_(log_p.exp())
    q_term = torch.nn.functional.softplus(ratio).neg_().add_(math.log(2)).mul_(log_q.exp())
    p_term.masked_fill_(log_p == -math.inf, 0.0)
    q_term.masked_fill_(log_q == -math.inf, 0.0)
    return (p_term.sum(1, dtype=torch.float64) + q_term.sum(1, dtype=torch.float64)).div_(2).clamp_min_(0)


def _total(sums: RunningSums) -> Tensor:
    """Z relative to the maximum: 1 for the top entry, plus z; 0 where all logits so far are -inf."""
    return (1 + sums.z).masked_fill(sums.maximum == -math.inf, 0.0)


def _moved(sums: RunningSums, maximum: Tensor, keeps_top: Tensor, shift: Tensor) -> RunningSums:
    """The sums relative to `maximum`, and to a centre that is lower by `shift`.

    `keeps_top`: False where the top entry so far is no longer the top entry.
    """
    total, finite = _total(sums), _finite(maximum)
    factor = torch.exp(sums.maximum - finite)
    return RunningSums(
        maximum,
        factor * torch.where(keeps_top, sums.z, total),
        factor * (sums.x + total * (_finite(sums.maximum) - finite)),
        factor * (sums.gap + total * shift),
        sums.alone,
        sums.centre,
        None if sums.squares is None else factor.select(-2, 0) * sums.squares,
    )
