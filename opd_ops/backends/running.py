# Full-vocabulary statistics of two rows of logits, accumulated block by block of the vocabulary in one sweep.
#
#   Z = sum e^{s-m},  H = log Z - E_p[s-m],  KL(p||q) = E_p[g-c] - (Delta-c),  KL(q||p) = (Delta-c) - E_q[g-c]
#   with g = s-u the gap, Delta = logsumexp(s) - logsumexp(u), and m, c constants of the row     (algebra of TokenStats)
#
# Numerics: the textbook one-pass KL, E_p[s-u] - Delta, subtracts two large numbers. Here each block centres its gap at c,
#   the gap at the block's own arg-max of s, before anything is summed; s-u is exact where the models nearly agree; and
#   blocks are joined in fp64. What is left to subtract is then as small as the KL itself.
# Non-finite: -inf logits make g infinite or NaN, so such a block is summed with those entries masked, and "p > 0 met
#   q = 0" is kept as a flag per row, because e^{s-m} may have underflowed there.
#
# Not here: the top-K supports (supports.py), tiles and matmuls (streamed.py).
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


def block_sums(s: Tensor, u: Tensor, top: Tensor, top_other: Tensor, gap: Tensor, weight: Tensor) -> BlockSums:
    """Sums of one (n, B) block; destroys `s` and `u`.

    Args:
        s, u: (n, B) logits. gap, weight: scratch of the same shape.
        top, top_other: (n,) the block's largest student logit and the teacher's logit there.
    """
    centre = torch.nan_to_num(top - top_other, nan=0.0, posinf=0.0, neginf=0.0)
    torch.sub(s, u, out=gap).sub_(centre.unsqueeze(1))
    s_absent = t_absent = None
    p_without_q = q_without_p = torch.zeros_like(top, dtype=torch.bool)
    # On a CPU one look spares four passes of masks; on a device it would synchronise, so there masks are the rule.
    if s.device.type != "cpu" or not bool(torch.isfinite(gap.sum())):
        s_absent, t_absent = s == -math.inf, u == -math.inf
        p_without_q, q_without_p = (t_absent & ~s_absent).any(1), (s_absent & ~t_absent).any(1)
        gap.masked_fill_(s_absent | t_absent, 0.0)
    teacher_top = u.amax(1)
    student = _model_sums(s, top, s_absent, gap, weight)
    return BlockSums(student, _model_sums(u, teacher_top, t_absent, gap, weight), centre, p_without_q, q_without_p)


def _model_sums(x: Tensor, maximum: Tensor, absent: Tensor | None, gap: Tensor, weight: Tensor) -> ModelSums:
    torch.exp(x.sub_(_finite(maximum).unsqueeze(1)), out=weight)
    if absent is not None:
        x.masked_fill_(absent, 0.0)  # 0 * -inf would be NaN
    return ModelSums(maximum, weight.sum(1), x.mul_(weight).sum(1), weight.mul_(gap).sum(1))


def _finite(maximum: Tensor) -> Tensor:
    """A maximum that may be subtracted: 0 for an all -inf block, whose every e^{x-m} is then 0 and not NaN."""
    return torch.where(maximum == -math.inf, 0.0, maximum)


class RunningSums:
    """The sums of all blocks so far, in fp64, relative to the running maxima and the running centre."""

    def __init__(self, n: int, device: torch.device) -> None:
        zero = torch.zeros(n, dtype=torch.float64, device=device)
        never = torch.zeros(n, dtype=torch.bool, device=device)
        nothing = ModelSums(torch.full_like(zero, -math.inf), zero, zero, zero)
        self._sums = BlockSums(nothing, nothing, zero, never, never)

    def add(self, parts: Sequence[BlockSums]) -> None:
        """Join one more block, given in parts that are consecutive rows."""
        a, b = self._sums, _concatenate(parts)
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


def _concatenate(parts: Sequence[BlockSums]) -> BlockSums:
    """The rows of all parts, widened to fp64."""

    def cat(tensors: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(tuple(tensors))
        return joined.double() if joined.is_floating_point() else joined

    def model(sums: Sequence[ModelSums]) -> ModelSums:
        return ModelSums(*(cat(column) for column in zip(*sums, strict=True)))

    return BlockSums(
        model([part.student for part in parts]),
        model([part.teacher for part in parts]),
        cat([part.centre for part in parts]),
        cat([part.p_without_q for part in parts]),
        cat([part.q_without_p for part in parts]),
    )
