"""Inputs of the tests: peaked, correlated, normal logits and heads, as language models have them; never flat, never zero.

  student = scale * normal;  teacher = student + noise * normal.  KL grows with noise^2, entropy falls with scale.

Not here: how results are compared (tolerances.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ops import LinearHead


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def logit_pair(
    n: int,
    vocab: int,
    *,
    scale: float = 4.0,
    noise: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """(n, vocab) student and teacher logits, drawn in fp64 on `device` and rounded to `dtype`."""
    options = {"generator": generator(seed, device), "dtype": torch.float64, "device": device}
    student = scale * torch.randn(n, vocab, **options)
    teacher = student + noise * torch.randn(n, vocab, **options)
    return student.to(dtype), teacher.to(dtype)


def head_pair(
    shape: tuple[int, ...],
    vocab: int,
    *,
    student_dim: int = 24,
    teacher_dim: int = 40,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[LinearHead, LinearHead]:
    """Two heads of different width whose logits correlate: the teacher's hidden states contain the student's."""
    options = {"generator": generator(seed, device), "dtype": torch.float64, "device": device}

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, **options)

    s_hidden, s_weight = normal(*shape, student_dim), 0.8 * normal(vocab, student_dim)
    t_hidden = torch.cat((s_hidden, normal(*shape, teacher_dim - student_dim)), -1)
    t_weight = torch.cat((s_weight, 0.3 * normal(vocab, teacher_dim - student_dim)), -1)
    biases = (normal(vocab), normal(vocab)) if bias else (None, None)
    sides = []
    for hidden, weight, b in ((s_hidden, s_weight, biases[0]), (t_hidden, t_weight, biases[1])):
        b = None if b is None else b.to(dtype)
        sides.append(LinearHead(hidden.to(dtype), weight.to(dtype), b, scale=scale, softcap=softcap))
    return sides[0], sides[1]


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A fresh leaf that requires grad."""
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def leaf_head(head: LinearHead, dtype: torch.dtype | None = None) -> LinearHead:
    return LinearHead(
        leaf(head.hidden, dtype), leaf(head.weight, dtype), leaf(head.bias, dtype), scale=head.scale, softcap=head.softcap
    )


def to_double(side: Tensor | LinearHead) -> Tensor | LinearHead:
    if isinstance(side, Tensor):
        return side.double()
    bias = None if side.bias is None else side.bias.double()
    return LinearHead(side.hidden.double(), side.weight.double(), bias, scale=side.scale, softcap=side.softcap)


def gradients(head: LinearHead) -> list[Tensor]:
    """Gradients of the tensors of a head that have one."""
    return [t.grad for t in (head.hidden, head.weight, head.bias) if t is not None and t.grad is not None]
