"""Full-vocabulary statistics of two rows of logits, accumulated block by block of the vocabulary in one sweep.

  Each model's exponents are relative to its largest logit so far, at the ids a (student) and b (teacher):
    log Z_s = s_a + log1p(sum_{v != a} e^{s_v - s_a}),   H = log Z - s_a - E_p[s - s_a]
  Gaps are relative to the student's top id a:  g_v = (s_v - s_a) - (u_v - u_a),  r_a = log p_a - log q_a
    KL(p||q) = r_a + E_p[g],   KL(q||p) = -r_a - E_q[g]                                        (algebra of TokenStats)

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


class ModelSums(NamedTuple):
    """One model's sums over some columns without its top entry, (n,) each, with e = e^{x - maximum}."""

    maximum: Tensor  # the largest logit so far
    z: Tensor  # sum e
    x: Tensor  # sum e (x - maximum)
    gap: Tensor  # sum e g
    alone: Tensor  # the largest logit among the entries that only the other model masks; -inf if there are none


class BlockSums(NamedTuple):
    """Both models' sums over some columns."""

    student: ModelSums
    teacher: ModelSums
    centre: Tensor  # s_a - u_a, fp64


def block_sums(s: Tensor, u: Tensor, s_best: TopKList, t_best: TopKList, first_id: int, scratch: Tensor) -> BlockSums:
    """Sums of one block.

    Args:
        s, u: (n, B) logits; the block begins at the id `first_id`.
        s_best, t_best: Each model's list of best ids in this and all earlier blocks; only the first entry is read.
        scratch: (3 C,), C >= B: C // B rows are summed at a time.
    """
    n, width = s.shape
    s_top, t_top = s_best.own[:, 0], t_best.own[:, 0]
    u_reference = _teacher_reference(s_best, t_best)
    references = torch.stack((_finite(s_top), _finite(t_top), u_reference)).unsqueeze(2)
    places = [best.ids[:, :1] - first_id for best in (s_best, t_best)]
    inside = [(place >= 0) & (place < width) for place in places]
    tops = [x.clamp(0, width - 1) for x in places] + [torch.where(x, 0.0, math.inf).to(s.dtype) for x in inside]
    sums, alone = s.new_empty(6, n), s.new_full((2, n), -math.inf)
    step = min(n, scratch.numel() // (3 * width))
    work = scratch[: 3 * step * width].view(3, step, width).unbind()
    # All views are created here, because creating them chunk by chunk costs as much as a pass over the logits.
    chunks = [_Chunk(*views) for views in zip(*(x.split(step) for x in (s, u, *references, *tops, *sums, *alone)), strict=True)]
    # On a CPU, masks are used only where a sum is not finite. On a device this test would synchronise: masks are always used.
    on_cpu = s.device.type == "cpu"
    holds_top = [not on_cpu or bool(x.any()) for x in inside]
    masked_chunks = chunks
    if on_cpu:
        for chunk in chunks:
            chunk.sum(work, holds_top, masked=False)
        finite = torch.isfinite(sums).all(0)
        masked_chunks = []
        if not bool(finite.all()):
            masked_chunks = [chunk for chunk, ok in zip(chunks, finite.split(step), strict=True) if not bool(ok.all())]
    for chunk in masked_chunks:
        chunk.sum(work, holds_top, masked=True)
    s_sums, t_sums = (
        ModelSums(top, x[0], x[1], x[2], low) for top, x, low in zip((s_top, t_top), sums.view(2, 3, n), alone, strict=True)
    )
    return BlockSums(s_sums, t_sums, _finite(s_top).double() - u_reference.double())


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
            if has_top:
                weight.scatter_reduce_(1, top, bound, "amin")
            torch.sum(weight, 1, out=z)


def _teacher_reference(student: TopKList, teacher: TopKList) -> Tensor:
    """(n,) u_a; where the teacher masks a, its own largest logit (any finite number will do)."""
    return torch.where(student.other[:, 0] == -math.inf, _finite(teacher.own[:, 0]), student.other[:, 0])


def _finite(maximum: Tensor) -> Tensor:
    """The maximum, but 0 where all logits so far are -inf: e^{x - maximum} is then 0, not NaN."""
    return torch.where(maximum == -math.inf, 0.0, maximum)


class RunningSums:
    """The sums of all blocks so far, in fp64, relative to the largest logits so far."""

    def __init__(self, n: int, device: torch.device) -> None:
        zero = torch.zeros(n, dtype=torch.float64, device=device)
        low = torch.full_like(zero, -math.inf)
        self.total = BlockSums(ModelSums(low, zero, zero, zero, low), ModelSums(low, zero, zero, zero, low), zero)

    def add(self, block: BlockSums) -> None:
        """Join the sums of one more block. The block's maxima and centre are those of all blocks so far."""
        before, shift = self.total, self.total.centre - block.centre
        student, teacher = (
            _plus(_moved(a, b.maximum.double(), a.maximum == b.maximum, shift), b)
            for a, b in zip(before[:2], block[:2], strict=True)
        )
        self.total = BlockSums(student, teacher, block.centre)


EMPTY_SUMS = {
    f"{model}_{field}": -math.inf if field in ("maximum", "alone") else 0.0
    for model in ("student", "teacher")
    for field in ModelSums._fields
} | {"centre": 0.0}
"""The sums over no column, by the names under which ranks send them."""


def named_sums(sums: BlockSums) -> dict[str, Tensor]:
    """The sums as columns with the names of `EMPTY_SUMS`."""
    return dict(zip(EMPTY_SUMS, (*sums.student, *sums.teacher, sums.centre), strict=True))


def joined_sums(parts: dict[str, Tensor], student: TopKList, teacher: TopKList) -> dict[str, Tensor]:
    """`statistics` of the whole vocabulary, from the (ranks, n) sums of its parts, joined like blocks."""
    columns = [parts[name] for name in EMPTY_SUMS]
    width, u_reference = len(ModelSums._fields), _teacher_reference(student, teacher).double()
    centre = _finite(student.own[:, 0]).double() - u_reference
    models = []
    for model in (ModelSums(*columns[:width]), ModelSums(*columns[width:-1])):
        maximum, owner = model.maximum.max(0)
        keeps_top = torch.zeros_like(model.maximum, dtype=torch.bool).scatter_(0, owner.unsqueeze(0), True)
        moved = _moved(model, maximum, keeps_top, columns[-1] - centre)
        models.append(ModelSums(maximum, moved.z.sum(0), moved.x.sum(0), moved.gap.sum(0), moved.alone.amax(0)))
    return statistics(BlockSums(models[0], models[1], centre), student)


def statistics(sums: BlockSums, student: TopKList) -> dict[str, Tensor]:
    """The full-vocabulary columns of `TokenStats`, (n,) fp64, with the columns that gradients read."""
    s, t, centre = sums
    s_total, t_total = _total(s), _total(t)
    s_log_z, t_log_z = (torch.where(x.maximum == -math.inf, -math.inf, x.z.log1p()) for x in (s, t))
    s_lse, t_lse = s.maximum + s_log_z, t.maximum + t_log_z
    u_reference = _finite(s.maximum) - centre
    log_ratio = (t.maximum - u_reference) + (t_log_z - s_log_z)  # r_a
    s_gap = s.gap / s_total
    reverse_kl = (s_gap + log_ratio).clamp_min(0)
    forward_kl = (-log_ratio - t.gap / t_total).clamp_min(0)
    infinite = _is_infinite(s, s_lse, reverse_kl)
    return {
        "student_entropy": (s_log_z - s.x / s_total).clamp_min(0),
        "teacher_entropy": (t_log_z - t.x / t_total).clamp_min(0),
        "reverse_kl": reverse_kl.masked_fill(infinite, math.inf),
        "forward_kl": forward_kl.masked_fill(_is_infinite(t, t_lse, forward_kl), math.inf),
        "student_logsumexp": s_lse,
        "teacher_logsumexp": t_lse,
        "logsumexp_gap": centre - log_ratio,
        "reference_student": _finite(s.maximum),
        "reference_teacher": u_reference,
        "reference_log_p": -s_log_z,
        "reference_log_ratio": log_ratio,
        "top_log_ratio": log_ratio.masked_fill(student.other[:, 0] == -math.inf, math.inf),
        "reverse_kl_excess": s_gap.masked_fill(infinite, 0),
    }


def _is_infinite(model: ModelSums, lse: Tensor, kl: Tensor) -> Tensor:
    return (model.alone - lse > LOG_ZERO) & ~kl.isnan()


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


def _total(model: ModelSums) -> Tensor:
    """Z relative to the maximum: 1 for the top entry, plus z; 0 where all logits so far are -inf."""
    return torch.where(model.maximum == -math.inf, 0.0, 1 + model.z)


def _moved(model: ModelSums, maximum: Tensor, keeps_top: Tensor, shift: Tensor) -> ModelSums:
    """The sums relative to `maximum`, and to a centre that is lower by `shift`.

    `keeps_top`: False where the top entry so far is no longer the top entry.
    """
    total, change = _total(model), _finite(model.maximum) - _finite(maximum)
    factor = torch.exp(model.maximum - _finite(maximum))
    return ModelSums(
        maximum,
        factor * torch.where(keeps_top, model.z, total),
        factor * (model.x + total * change),
        factor * (model.gap + total * shift),
        model.alone,
    )


def _plus(a: ModelSums, b: ModelSums) -> ModelSums:
    """The sums a + b, both relative to the same maximum and centre."""
    return ModelSums(b.maximum.double(), a.z + b.z, a.x + b.x, a.gap + b.gap, torch.maximum(a.alone, b.alone.double()))
