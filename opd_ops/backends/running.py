# Full-vocabulary statistics of two rows of logits, accumulated block by block of the vocabulary in one sweep.
#
#   Z = sum e^{s-m},  H = log Z - E_p[s-m],  KL(p||q) = E_p[g-c] - (Delta-c),  KL(q||p) = (Delta-c) - E_q[g-c]
#   with g = s-u the gap, Delta = logsumexp(s) - logsumexp(u), and m, c constants of the row     (algebra of TokenStats)
#
# Numerics: the textbook one-pass KL, E_p[s-u] - Delta, subtracts two large numbers. Here each block centres its gap at c,
#   the gap at the arg-max of s so far, before anything is summed; s-u is exact where the models nearly agree; and
#   blocks are joined in fp64. What is left to subtract is then as small as the KL itself.
# Non-finite: -inf logits make g infinite or NaN, so such rows are summed with those entries masked, and "p > 0 met q = 0"
#   is kept as a flag per row, because e^{s-m} may have underflowed there.
#
# Not here: the top-K lists (top_k.py), tiles and matmuls (streamed.py).
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ModelSums(NamedTuple):
    """One model's sums over some columns, (n,) each, with e = e^{x-m}."""

    maximum: Tensor  # m
    z: Tensor  # sum e
    x: Tensor  # sum e (x-m)
    gap: Tensor  # sum e (g-c)


class BlockSums(NamedTuple):
    """Both models' sums over some columns, and the centre c their gap sums are relative to."""

    student: ModelSums
    teacher: ModelSums
    centre: Tensor
    p_without_q: Tensor  # bool: some s > -inf where u = -inf
    q_without_p: Tensor


def block_sums(s: Tensor, u: Tensor, s_top: Tensor, u_at_s_top: Tensor, u_top: Tensor, scratch: Tensor) -> BlockSums:
    """Sums of one block.

    Args:
        s, u: (n, B) logits.
        s_top, u_at_s_top: (n,) the largest student logit of this and all earlier blocks, and the teacher's logit there.
        u_top: (n,) the largest teacher logit of this and all earlier blocks.
        scratch: (3 C,), C >= B: C // B rows are summed at a time.
    """
    n, width = s.shape
    centre = torch.nan_to_num(s_top - u_at_s_top, nan=0.0, posinf=0.0, neginf=0.0)
    references = torch.stack((_finite(s_top), _finite(u_top), centre)).unsqueeze(2)
    sums = s.new_empty(6, n)
    absent = torch.zeros(2, n, dtype=torch.bool, device=s.device)
    step = min(n, scratch.numel() // (3 * width))
    work = scratch[: 3 * step * width].view(3, step, width).unbind()
    # All views are made here: made chunk by chunk, they cost as much as a pass over the logits.
    chunks = [_Chunk(*views) for views in zip(*(x.split(step) for x in (s, u, *references, *sums, *absent)), strict=True)]
    # On a CPU one look at the outcome spares the masks; on a device it would synchronise, so there masks are the rule.
    with_absent = chunks
    if s.device.type == "cpu":
        for chunk in chunks:
            chunk.sum(work, masked=False)
        finite = torch.isfinite(sums).all(0)
        with_absent = []
        if not bool(finite.all()):
            with_absent = [chunk for chunk, ok in zip(chunks, finite.split(step), strict=True) if not bool(ok.all())]
    for chunk in with_absent:
        chunk.sum(work, masked=True)
    return BlockSums(ModelSums(s_top, *sums[:3]), ModelSums(u_top, *sums[3:]), centre, *absent)


class _Chunk(NamedTuple):
    """Some rows of a block, and views of where their sums go."""

    s: Tensor  # (c, B)
    u: Tensor
    s_reference: Tensor  # (c, 1)
    u_reference: Tensor
    centre: Tensor
    s_z: Tensor  # (c,)
    s_x: Tensor
    s_gap: Tensor
    u_z: Tensor
    u_x: Tensor
    u_gap: Tensor
    p_without_q: Tensor
    q_without_p: Tensor

    def sum(self, work: Sequence[Tensor], *, masked: bool) -> None:
        """Compute the sums; `masked` leaves out -inf logits and sets the flags. `work`: three buffers of (c or more, B)."""
        gap, shifted, weight = work if len(self.s) == len(work[0]) else (buffer[: len(self.s)] for buffer in work)
        torch.sub(self.s, self.u, out=gap).sub_(self.centre)
        s_absent = u_absent = None
        if masked:
            s_absent, u_absent = self.s == -math.inf, self.u == -math.inf
            torch.any(u_absent & ~s_absent, 1, out=self.p_without_q)
            torch.any(s_absent & ~u_absent, 1, out=self.q_without_p)
            gap.masked_fill_(s_absent | u_absent, 0.0)
        for logits, reference, absent, z, x, of_gap in (
            (self.s, self.s_reference, s_absent, self.s_z, self.s_x, self.s_gap),
            (self.u, self.u_reference, u_absent, self.u_z, self.u_x, self.u_gap),
        ):
            torch.exp(torch.sub(logits, reference, out=shifted), out=weight)
            if absent is not None:
                shifted.masked_fill_(absent, 0.0)  # 0 * -inf would be NaN
            torch.sum(weight, 1, out=z)
            torch.sum(shifted.mul_(weight), 1, out=x)
            torch.sum(weight.mul_(gap), 1, out=of_gap)


def _finite(maximum: Tensor) -> Tensor:
    """A maximum that may be subtracted: 0 where all logits so far are -inf, whose every e^{x-m} is then 0 and not NaN."""
    return torch.where(maximum == -math.inf, 0.0, maximum)


class RunningSums:
    """The sums of all blocks so far, in fp64, relative to the running maxima and the running centre."""

    def __init__(self, n: int, device: torch.device) -> None:
        zero = torch.zeros(n, dtype=torch.float64, device=device)
        never = torch.zeros(n, dtype=torch.bool, device=device)
        nothing = ModelSums(torch.full_like(zero, -math.inf), zero, zero, zero)
        self._sums = BlockSums(nothing, nothing, zero, never, never)

    def add(self, block: BlockSums) -> None:
        """Join the sums of one more block."""
        a, b = self._sums, _widened(block)
        # The centre follows the student's running arg-max: it stays where the student's mass is.
        centre = torch.where(b.student.maximum > a.student.maximum, b.centre, a.centre)
        self._sums = BlockSums(
            _join(a.student, b.student, a.centre - centre, b.centre - centre),
            _join(a.teacher, b.teacher, a.centre - centre, b.centre - centre),
            centre,
            a.p_without_q | b.p_without_q,
            a.q_without_p | b.q_without_p,
        )

    def columns(self) -> dict[str, Tensor]:
        """The full-vocabulary columns of `TokenStats`, (n,) fp64."""
        (s_max, s_z, s_x, s_gap), (t_max, t_z, t_x, t_gap), centre, p_without_q, q_without_p = self._sums
        log_s_z, log_t_z = s_z.log(), t_z.log()
        gap = s_max - t_max + log_s_z - log_t_z  # Delta
        reverse_kl = (s_gap / s_z + (centre - gap)).clamp_min(0)
        forward_kl = ((gap - centre) - t_gap / t_z).clamp_min(0)
        return {
            "student_entropy": (log_s_z - s_x / s_z).clamp_min(0),
            "teacher_entropy": (log_t_z - t_x / t_z).clamp_min(0),
            "reverse_kl": reverse_kl.masked_fill(p_without_q & ~reverse_kl.isnan(), math.inf),
            "forward_kl": forward_kl.masked_fill(q_without_p & ~forward_kl.isnan(), math.inf),
            "student_logsumexp": s_max + log_s_z,
            "teacher_logsumexp": t_max + log_t_z,
            "logsumexp_gap": gap,
        }


def row_jsd(s: Tensor, u: Tensor) -> Tensor:
    """(n,) Jensen-Shannon divergence of whole (n, V) rows: a second look at them, with the normalisers known.

    With r = log p - log q:  1/2 sum p (log 2 - softplus(-r)) + 1/2 sum q (log 2 - softplus(r)).
    """
    log_p, log_q = torch.log_softmax(s, 1), torch.log_softmax(u, 1)
    ratio = log_p - log_q
    p_term = torch.nn.functional.softplus(-ratio).neg_().add_(math.log(2)).mul_(log_p.exp())
    q_term = torch.nn.functional.softplus(ratio).neg_().add_(math.log(2)).mul_(log_q.exp())
    p_term.masked_fill_(log_p == -math.inf, 0.0)
    q_term.masked_fill_(log_q == -math.inf, 0.0)
    return (p_term.sum(1, dtype=torch.float64) + q_term.sum(1, dtype=torch.float64)).div_(2).clamp_min_(0)


def _join(a: ModelSums, b: ModelSums, a_shift: Tensor, b_shift: Tensor) -> ModelSums:
    """Bring two sets of sums to the larger maximum and, by the shifts c_old - c_new, to one centre."""
    maximum = torch.maximum(a.maximum, b.maximum)
    z, x, gap = torch.zeros_like(a.z), torch.zeros_like(a.z), torch.zeros_like(a.z)
    for part, shift in ((a, a_shift), (b, b_shift)):
        factor = torch.exp(part.maximum - _finite(maximum))
        z = z + factor * part.z
        x = x + factor * (part.x + part.z * (_finite(part.maximum) - _finite(maximum)))
        gap = gap + factor * (part.gap + part.z * shift)
    return ModelSums(maximum, z, x, gap)


def _widened(block: BlockSums) -> BlockSums:
    """The same sums in fp64."""
    student, teacher = (ModelSums(*(column.double() for column in sums)) for sums in block[:2])
    return BlockSums(student, teacher, block.centre.double(), block.p_without_q, block.q_without_p)
