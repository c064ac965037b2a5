"""The whole selective loss, forward and backward to dense logits, as the library does it and as one would in plain torch.

  teachability of every position (D on the union of both top-16 lists, C the teacher's mass on the student's), the best 5 %,
  reverse KL on those. A method returns the loss and its gradient with respect to the student's logits.
  ours, in place: with inplace_backward, the gradient replaces the student's logits.
  eager: full fp32 log-softmaxes without a graph, then the selected rows with one. compiled: torch.compile of its two halves.
  chunked autograd: as the TIP repository has it, chunks of 512 positions through full log-softmaxes that autograd keeps.

Not here: timing (logits.py), heads (cpu/methods.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from opd_ops import selective_opd_loss
from opd_ops.selection.normalisers import quantile_norm

FRACTION, TOP_K, CHUNK = 0.05, 16, 512
Method = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logits = student.detach().requires_grad_()
    loss = selective_opd_loss(logits, teacher, fraction=FRACTION, top_k=TOP_K, backend="triton").loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def ours_in_place(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves the gradient in the memory of `student`."""
    anchor = torch.zeros((), device=student.device, requires_grad=True)
    logits = _Produced.apply(anchor, student.data)
    loss = selective_opd_loss(logits, teacher, fraction=FRACTION, top_k=TOP_K, backend="triton", inplace_backward=True).loss
    loss.backward()
    return loss.detach(), student


class _Produced(torch.autograd.Function):
    """Logits as a model gives them, no leaf, without the copy that an operation would make."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def eager(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return _plain(student, teacher, _scores, _reverse_kl)


def compiled(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return _plain(student, teacher, *_compiled("eager" if student.device.type == "cpu" else "inductor"))


@cache
def _compiled(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return torch.compile(_scores, backend=backend), torch.compile(_reverse_kl, backend=backend)


def _plain(
    student: Tensor, teacher: Tensor, scores: Callable[..., Tensor], divergence: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        rows = _best(scores(student, teacher))
    logits = student.detach().requires_grad_()
    loss = divergence(logits[rows], teacher[rows]).mean()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def chunked_autograd(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logits = student.detach().requires_grad_()
    parts = list(zip(logits.split(CHUNK), teacher.split(CHUNK), strict=True))
    losses = torch.cat([_reverse_kl(s, t) for s, t in parts])
    with torch.no_grad():
        statistics = [_statistics(s, t) for s, t in parts]
        rows = _best(_teachability(*(torch.cat(column) for column in zip(*statistics, strict=True))))
    loss = losses[rows].mean()
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def _best(scores: Tensor) -> Tensor:
    return scores.topk(max(1, math.ceil(FRACTION * len(scores)))).indices


def _scores(student: Tensor, teacher: Tensor) -> Tensor:
    return _teachability(*_statistics(student, teacher))


def _teachability(union_kl: Tensor, support_mass: Tensor) -> Tensor:
    everyone = torch.ones_like(union_kl, dtype=torch.bool)
    return quantile_norm(union_kl, everyone) * quantile_norm(support_mass, everyone)


def _statistics(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    log_p, log_q = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
    s_ids, t_ids = log_p.topk(TOP_K).indices, log_q.topk(TOP_K).indices
    repeated = (t_ids.unsqueeze(2) == s_ids.unsqueeze(1)).any(2)
    ids = torch.cat((s_ids, t_ids), 1)
    hidden = torch.cat((torch.zeros_like(repeated), repeated), 1)
    p = log_p.gather(1, ids).masked_fill(hidden, -math.inf).log_softmax(1)
    q = log_q.gather(1, ids).masked_fill(hidden, -math.inf).log_softmax(1)
    union_kl = torch.where(hidden, 0.0, q.exp() * (q - p)).sum(1)
    return union_kl, log_q.gather(1, s_ids).exp().sum(1)


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours, in place": ours_in_place,
    "eager": eager,
    "compiled": compiled,
    "chunked autograd": chunked_autograd,
}
IN_PLACE = {"ours, in place"}  # whose gradient needs no memory of its own
