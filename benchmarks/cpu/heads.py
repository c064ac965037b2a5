"""The inputs of every measurement: a student's and a teacher's head that behave like language models', built without logits.

  logits of position i:  s_i = W_s h_i,  u_i = W_t k_i          N positions, V vocabulary entries, hidden sizes Ds, Dt
  h_i = sum_j a_ij W_s[id_ij] + common,   k_i = (h_i's first d entries + noise, noise),  W_t = (W_s's first d columns, new)

Rows of W_s are nearly orthogonal, so h_i gives its candidates id_ij the logits a_ij (at most 14 to 19) above a Gaussian
floor whose log-sum-exp is about 12.5: a few peaked tokens and a long tail. Candidates follow Zipf's law, so positions share
them, and one drawn twice makes a position that is nearly certain. W_t repeats d = min(Ds, Dt) columns of W_s and k_i those
entries of h_i, so with Dt >= Ds the models agree up to the noise and a shift between candidates, both of a strength that
differs from position to position. Default sizes: student entropy 0 to 2.1 nats, reverse KL 0 to 1.9 (5 % to 95 %),
medians 1.2 and 0.3; the quantiles of each run are in its JSON.
Not here: what is done with them (methods.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 20261122
CANDIDATES = 6


@dataclass(frozen=True)
class Sizes:
    n: int  # positions
    vocab: int
    student_dim: int
    teacher_dim: int

    @property
    def gradient_bytes(self) -> int:
        """fp32 gradients that the caller asks for: of the student's weight and of its hidden states."""
        return 4 * self.student_dim * (self.vocab + self.n)

    @property
    def unit_flops(self) -> int:
        """One head-matmul unit: the student's logits, 2 N V Ds."""
        return 2 * self.n * self.vocab * self.student_dim

    @property
    def score_units(self) -> float:
        """Both models' logits once, in units: 1 + Dt / Ds."""
        return 1 + self.teacher_dim / self.student_dim


@dataclass(frozen=True)
class Heads:
    """Two heads; the student's tensors require gradients."""

    student_hidden: Tensor  # (N, Ds)
    student_weight: Tensor  # (V, Ds)
    teacher_hidden: Tensor  # (N, Dt)
    teacher_weight: Tensor  # (V, Dt)

    def to(self, dtype: torch.dtype) -> Heads:
        student = (t.detach().to(dtype).requires_grad_() for t in (self.student_hidden, self.student_weight))
        return Heads(*student, self.teacher_hidden.to(dtype), self.teacher_weight.to(dtype))

    def clear_gradients(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None


def build_heads(sizes: Sizes, seed: int = SEED) -> Heads:
    """fp32 heads on the CPU; the same seed and sizes give the same numbers. Needs no memory beyond them but O(N D)."""
    draw = torch.Generator().manual_seed(seed)
    student_weight = _normal((sizes.vocab, sizes.student_dim), draw, sizes.student_dim**-0.5)
    teacher_weight = _normal((sizes.vocab, sizes.teacher_dim), draw, sizes.student_dim**-0.5)
    shared = min(sizes.student_dim, sizes.teacher_dim)
    teacher_weight[:, :shared] = student_weight[:, :shared]

    ids = _zipf((sizes.n, CANDIDATES), sizes.vocab, draw)
    first = 14 + 5 * torch.rand(sizes.n, 1, generator=draw)
    gaps = torch.rand(sizes.n, CANDIDATES, generator=draw) * 3 * torch.rand(sizes.n, 1, generator=draw)
    gaps[:, 0] = 0
    amplitudes = first - gaps.cumsum(1)  # descending
    student_hidden = 0.3 * _normal((sizes.student_dim,), draw, 1.0).expand(sizes.n, -1).clone()
    teacher_hidden = _normal((sizes.n, sizes.teacher_dim), draw, 1.0)
    teacher_hidden *= 0.2 + 1.0 * torch.rand(sizes.n, 1, generator=draw)  # the teacher's own opinion, per position
    shift = 2 * torch.randn(sizes.n, CANDIDATES, generator=draw) * torch.rand(sizes.n, 1, generator=draw)
    teacher_hidden[:, :shared] += student_hidden[:, :shared]
    for j in range(CANDIDATES):
        rows = student_weight[ids[:, j]]
        student_hidden += amplitudes[:, j : j + 1] * rows
        teacher_hidden[:, :shared] += (amplitudes + shift)[:, j : j + 1] * rows[:, :shared]
    return Heads(student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight)


def _normal(shape: tuple[int, ...], draw: torch.Generator, scale: float) -> Tensor:
    return torch.empty(shape).normal_(0.0, scale, generator=draw)


def _zipf(shape: tuple[int, int], vocab: int, draw: torch.Generator) -> Tensor:
    """Ids with P(id) about 1 / (id + 1): the inverse of a logarithmic distribution function."""
    return ((vocab + 1.0) ** torch.rand(shape, generator=draw, dtype=torch.float64) - 1).long().clamp_(0, vocab - 1)
