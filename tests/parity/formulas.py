"""The divergences of the parity suites in fp64, from their definitions. Both sides of every comparison are held to them.

  p = softmax(student), q = softmax(teacher), T = the teacher's top K
  jsd            beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; 0: KL(q||p), 1: KL(p||q)
                 (arXiv 2306.13649)
  local_support  KL(p|T || q|T), both renormalised on T
  tail_aware     KL of (p on T, the rest of p) from (q on T, the rest of q)
  top_k_forward  sum over T of q (log q - log p)
  variation      1/2 sum |p - q|

Gradients by autograd. Nothing here imports opd_ops' losses or a peer. 0 log 0 = 0.
Not here: inputs (tests/support/cases.py), bounds (tests/support/tolerances.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_ops import LinearHead


def logits_of(head: LinearHead) -> Tensor:
    logits = head.hidden @ head.weight.T
    logits = head.scale * (logits if head.bias is None else logits + head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row; entries with p = 0 add nothing, whatever q is."""
    return (log_p.exp() * torch.where(log_p == -math.inf, 0, log_p - log_q)).sum(-1)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        return kl(log_p, log_q) if beta else kl(log_q, log_p)
    dead = (log_p == -math.inf) & (log_q == -math.inf)  # logaddexp of two infinities has no gradient
    log_m = torch.logaddexp(log_p.masked_fill(dead, 0) + math.log(1 - beta), log_q.masked_fill(dead, 0) + math.log(beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)


def on_teacher_s_top_k(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p and log q at the teacher's top K, and the ids of that list."""
    ids = teacher.topk(k).indices
    return student.log_softmax(-1).gather(-1, ids), teacher.log_softmax(-1).gather(-1, ids), ids


def local_support(student: Tensor, teacher: Tensor, k: int, *, forward: bool = False) -> Tensor:
    log_p, log_q, _ = on_teacher_s_top_k(student, teacher, k)
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    return kl(log_q, log_p) if forward else kl(log_p, log_q)


def tail_aware(student: Tensor, teacher: Tensor, k: int, *, forward: bool = False) -> Tensor:
    sides = []
    on_list = torch.zeros_like(teacher, dtype=torch.bool).scatter(-1, teacher.topk(k).indices, True)
    for logits, top in zip((student, teacher), on_teacher_s_top_k(student, teacher, k), strict=False):
        off_list = logits.log_softmax(-1).masked_fill(on_list, -math.inf).logsumexp(-1, keepdim=True)
        sides.append(torch.cat((top, off_list), -1))
    log_p, log_q = sides
    return kl(log_q, log_p) if forward else kl(log_p, log_q)


def top_k_forward(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    log_p, log_q, _ = on_teacher_s_top_k(student, teacher, k)
    return kl(log_q, log_p)


def variation(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
