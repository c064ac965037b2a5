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
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.backends.shared.top_k import TopKList
from opd_ops.divergences.equations import LOG_ZERO
from opd_ops.inputs.chunks import parts
from opd_ops.selection.stats import is_finite

TINY = torch.finfo(torch.float64).tiny  # a divisor in the place of a sum that is 0


class RunningSums(NamedTuple):
    """Sums over some columns, in fp64, with e = e^{x - maximum}. Columns of (2, n): the student's row, then the teacher's."""

    maximum: Tensor  # (2, n) the largest logit so far
    z: Tensor  # (2, n) sum e
    x: Tensor  # (2, n) sum e (x - maximum)
    gap: Tensor  # (2, n) sum e g
    alone: Tensor | None  # (2, n) the largest logit among the entries that only the other model masks; -inf if there are none
    centre: Tensor  # (n,) s_a - u_a
    squares: Tensor | None = None  # (n,) sum e (g - mean)^2 of the student's row; None: not computed
    # `alone` is None where no logit of these rows is masked, which only a CPU looks for.


class Tops(NamedTuple):
    """Each model's best id in the columns so far."""

    logits: Tensor  # (2, n) of the model itself
    ids: Tensor  # (2, n)
    teacher: Tensor  # (n,) u_a, the teacher's logit of the student's best id

    @staticmethod
    def of(student: TopKList, teacher: TopKList) -> Tops:
        own, ids = torch.stack((student.own[:, 0], teacher.own[:, 0])), torch.stack((student.ids[:, 0], teacher.ids[:, 0]))
        return Tops(own, ids, student.other[:, 0])

    @staticmethod
    def from_both(lists: TopKList) -> Tops:
        """From lists of (2 n, K)."""
        own, ids, other = (column.select(1, 0).view(2, -1) for column in (lists.own, lists.ids, lists.other))
        return Tops(own, ids, other[0])

    @staticmethod
    def from_one(best: TopKList) -> Tops:
        """One model in the place of both."""
        return Tops(best.own[:, 0].expand(2, -1), best.ids[:, 0].expand(2, -1), best.own[:, 0])


def block_sums(x: Tensor, tops: Tops, first_id: int, scratch: Tensor, *, is_first: bool, squares: bool = False) -> RunningSums:
    """Sums of one block, with `squares` only if asked for.

    Args:
        x: (2, n, B) logits of both models; the block begins at the id `first_id`.
        tops: Of this and all earlier blocks.
        scratch: (5 C,), C >= B: C // B rows are summed at a time.
        is_first: Whether there is no earlier block, so that both tops are in this one.
    """
    _, n, width = x.shape
    on_cpu, holds_top = x.device.type == "cpu", True
    places = tops.ids.unsqueeze(2)
    places = places - first_id if first_id else places
    # A top entry of this block is set to 0 before the sum of e; the bound +inf changes nothing.
    bounds = torch.zeros_like(places, dtype=x.dtype)
    if not is_first:
        outside = (places < 0) | (places >= width)
        bounds.masked_fill_(outside, math.inf)
        places = places.clamp(0, width - 1)
        holds_top = not (on_cpu and bool(outside.all()))
    sums, step = x.new_empty(3, 2, n), min(n, scratch.numel() // (5 * width))
    work = scratch[: 5 * step * width].view(5, step, width)
    square_sums = x.new_empty(n) if squares else None
    # All views are created here, because creating them chunk by chunk costs as much as a pass over the logits.
    columns = parts(x, step, 1), parts(places, step, 1), parts(bounds, step, 1), parts(sums, step, 2)

    def chunks(maximum: Tensor, u_reference: Tensor) -> list[_Chunk]:
        references = parts(maximum.unsqueeze(2), step, 1), parts(u_reference.unsqueeze(1), step, 0)
        views = [_Chunk(*views) for views in zip(*references, *columns, strict=True)]
        if square_sums is None:
            return views
        return [chunk._replace(squares=out) for chunk, out in zip(views, parts(square_sums, step, 0), strict=True)]

    # On a CPU, masks are used only where a sum is not finite. On a device this test would synchronise: masks are always used.
    maximum, u_reference, alone = tops.logits, tops.teacher, None
    finite = maximum
    if on_cpu:
        for chunk in chunks(maximum, u_reference):
            chunk.sum(work, holds_top)
    if not (on_cpu and math.isfinite(float(sums.sum()))):
        finite = _finite(maximum)
        u_reference = torch.where(u_reference == -math.inf, finite[1], u_reference)
        alone = x.new_full((2, n), -math.inf)
        done = parts(is_finite(sums).flatten(0, 1).all(0), step, 0) if on_cpu else None
        for i, (chunk, alone_of_chunk) in enumerate(zip(chunks(finite, u_reference), parts(alone, step, 1), strict=True)):
            if done is None or not bool(done[i].all()):
                chunk.sum(work, holds_top, alone_of_chunk)
        alone = alone.double()
    rows = torch.cat((maximum, sums.view(6, n), finite, u_reference.expand(2, n))).double().view(6, 2, n)
    own, z, x_sums, gap_sums, reference, teacher_reference = rows.unbind()
    block_squares = None if square_sums is None else square_sums.double()
    return RunningSums(own, z, x_sums, gap_sums, alone, reference[0] - teacher_reference[0], block_squares)


class _Chunk(NamedTuple):
    """Some rows of a block, and a view into which their sums are written."""

    maximum: Tensor  # (2, c, 1)
    u_reference: Tensor  # (c, 1)
    x: Tensor  # (2, c, B)
    top: Tensor  # (2, c, 1) columns of the top entries
    bound: Tensor  # (2, c, 1) 0 where this block holds the top entry, else +inf
    sums: Tensor  # (3, 2, c)
    squares: Tensor | None = None  # (c,)

    def sum(self, work: Tensor, holds_top: bool, alone: Tensor | None = None) -> None:
        """Compute the sums. `alone`: (2, c), to be written; -inf logits are then left out. `work`: (5, c or more, B)."""
        n = self.x.shape[1]
        work = work if n == work.shape[1] else work[:, :n]
        gap, shifted, weight = work[0], work[1:3], work[3:]
        torch.sub(self.x, self.maximum, out=shifted)
        torch.sub(shifted[0], torch.sub(self.x[1], self.u_reference, out=weight[0]), out=gap)
        torch.exp(shifted, out=weight)
        if alone is not None:
            masked = self.x == -math.inf
            for i in range(2):
                torch.amax(self.x[i].masked_fill(~masked[1 - i], -math.inf), 1, out=alone[i])
            gap.masked_fill_(masked[0] | masked[1], 0.0)
            shifted.masked_fill_(masked, 0.0)  # 0 * -inf would be NaN
        _sum_rows(shifted.mul_(weight), self.sums[1])
        _sum_rows(torch.mul(weight, gap, out=shifted), self.sums[2])
        if self.squares is not None:
            mean = self.sums[2, 0] / weight[0].sum(1).clamp_min_(torch.finfo(weight.dtype).tiny)
            distance = torch.sub(gap, mean.unsqueeze(1), out=shifted[0])
            torch.sum(distance.square_().mul_(weight[0]), 1, out=self.squares)
        if holds_top:
            weight.scatter_reduce_(2, self.top, self.bound, "amin")
        _sum_rows(weight, self.sums[0])


def _sum_rows(values: Tensor, out: Tensor) -> None:
    """Sums of (2, c, B) in (2, c); of one row model by model, because torch shares one row between threads, but not two."""
    if values.shape[1] > 1:
        torch.sum(values, 2, out=out)
        return
    for i in range(2):
        torch.sum(values[i], 1, out=out[i])


def _finite(maximum: Tensor) -> Tensor:
    """The maximum, but 0 where all logits so far are -inf: e^{x - maximum} is then 0, not NaN."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def extended_sums(sums: RunningSums | None, block: RunningSums) -> RunningSums:
    """The sums with one more block (None: the first), whose maxima and centre are those of all blocks so far."""
    if sums is None:
        return block
    keeps_top = sums.maximum == block.maximum
    moved = _moved(sums, block.maximum, keeps_top, sums.centre - block.centre)
    alone, squares = sums.alone if block.alone is None else block.alone, None
    if sums.alone is not None and block.alone is not None:
        alone = torch.maximum(sums.alone, block.alone)
    if block.squares is not None:
        assert moved.squares is not None
        z, gap = (torch.stack((x[0], y[0])) for x, y in ((moved.z, block.z), (moved.gap, block.gap)))
        both = torch.stack((moved.squares, block.squares))
        squares = _joined_squares(z, gap, both, torch.stack((keeps_top[0], ~keeps_top[0])))
    z, x, gap = moved.z + block.z, moved.x + block.x, moved.gap + block.gap
    return RunningSums(block.maximum, z, x, gap, alone, block.centre, squares)


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
    alone = torch.full_like(sums.maximum, -math.inf) if sums.alone is None else sums.alone
    columns = [column for pair in (sums.maximum, sums.z, sums.x, sums.gap, alone) for column in pair]
    named = dict(zip(EMPTY_SUMS, (*columns, sums.centre), strict=True))
    return named if sums.squares is None else named | {"squares": sums.squares}


def joined_sums(parts: dict[str, Tensor], student: TopKList, teacher: TopKList) -> dict[str, Tensor]:
    """`statistics` of the whole vocabulary, from the (ranks, n) sums of its parts, joined like blocks."""
    stacked = torch.stack([parts[name] for name in EMPTY_SUMS])
    pairs = stacked[:-1].unflatten(0, (-1, 2)).transpose(1, 2)  # (fields, ranks, 2, n)
    every = RunningSums(pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], stacked[-1].unsqueeze(1))
    every = every._replace(squares=parts.get("squares"))
    tops = Tops.of(student, teacher)
    finite = _finite(tops.logits).double()
    centre = finite[0] - torch.where(tops.teacher == -math.inf, finite[1], tops.teacher.double())
    maximum, owner = every.maximum.max(0)
    keeps_top = torch.zeros_like(every.maximum, dtype=torch.bool).scatter_(0, owner.unsqueeze(0), True)
    moved = _moved(every, maximum, keeps_top, every.centre - centre)
    squares = None
    if moved.squares is not None:
        has_top = keeps_top[:, 0] & (every.maximum[:, 0] > -math.inf)
        squares = _joined_squares(moved.z[:, 0], moved.gap[:, 0], moved.squares, has_top)
    sums = RunningSums(maximum, moved.z.sum(0), moved.x.sum(0), moved.gap.sum(0), pairs[4].amax(0), centre, squares)
    return statistics(sums, tops)[0]


def statistics(sums: RunningSums, tops: Tops) -> tuple[dict[str, Tensor], Tensor]:
    """The full-vocabulary columns of `TokenStats`, (n,) fp64, with those that gradients read; and both log-sum-exps, (2, n)."""
    total, log_z, top = 1 + sums.z, sums.z.log1p(), sums.maximum[0]
    if sums.alone is not None:
        empty = sums.maximum == -math.inf
        total, log_z, top = total.masked_fill(empty, 0), log_z.masked_fill(empty, -math.inf), top.masked_fill(empty[0], 0)
    lse = sums.maximum + log_z
    entropy = (log_z - sums.x / total).clamp_min(0)
    u_reference = top - sums.centre
    log_ratio = top_log_ratio = (sums.maximum[1] - u_reference) + (log_z[1] - log_z[0])  # r_a
    gap = sums.gap / total
    divergences = gap + log_ratio
    divergences[1].neg_()
    divergences, excess = divergences.clamp_min_(0), gap[0]  # KL(p||q), KL(q||p)
    optional = {} if sums.squares is None else {"ratio_variance": sums.squares / total[0]}
    if sums.alone is not None:
        infinite = (sums.alone - lse > LOG_ZERO) & ~divergences.isnan()
        divergences, excess = divergences.masked_fill(infinite, math.inf), excess.masked_fill(infinite[0], 0)
        optional = {name: column.masked_fill(infinite[0], math.inf) for name, column in optional.items()}
        top_log_ratio = log_ratio.masked_fill(tops.teacher == -math.inf, math.inf)
    columns = optional | {
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
        "top_log_ratio": top_log_ratio,
        "reverse_kl_excess": excess,
    }
    return columns, lse


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
