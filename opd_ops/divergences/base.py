"""What a divergence is: a loss per selected position, made of a sum over the whole vocabulary, of a function of a short list of
ids, or of both.

  WholeRow    l = sum_v f(p_v, q_v)                   dl/ds_v = p_v ((f'_v - f'_a) - sum_w p_w (f'_w - f'_a)),  f' = df/dp
  OnSupport   l = f(logits x_k at K ids, log-sum-exp off them)   dl/ds_v = df/dx_k at the ids, df/drest e^{s_v - rest} off
  s: student logits after temperature; a: the student's most likely id. Nothing of size V is kept for either.
  Slopes are relative to that of a: at a itself, where p may be near 1, the mean slope is left, and nothing is subtracted.

A new divergence is one small class of one of these kinds in a file of its own (CONTRIBUTING.md).
Not here: the divergences themselves (whole.py, support.py, composite.py), how backends compute the two forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Divergence(ABC):
    """A loss per position: `whole` + `support`, either of which may be None."""

    name: ClassVar[str]
    column: str | None = None  # the column of TokenStats that holds its value, if one does

    @property
    def whole(self) -> WholeRow | None:
        return None

    @property
    def support(self) -> OnSupport | None:
        return None

    @property
    def reads_tokens(self) -> bool:
        """Whether it is on the token that the student sampled."""
        return self.support is not None and self.support.of_tokens


class WholeRow(Divergence):
    """A divergence over the whole vocabulary, computed block by block of it."""

    @property
    def whole(self) -> WholeRow:
        return self

    @abstractmethod
    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The equation, (M,) of whole (M, V) rows; differentiable in `log_p`. The specification: clarity before speed."""

    @abstractmethod
    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        """(M, B) df/dp at (p_v, q_v), up to a constant, finite where q = 0. Where p = 0 anything will do."""

    def dlogits(self, log_p: Tensor, log_ratio: Tensor, reference_slope: Tensor, mean_slope: Tensor) -> Tensor:
        """d loss / d student logits on any block of columns.

        Args:
            log_p: (M, B) the student's log-probabilities in the block; may be overwritten.
            log_ratio: (M, B) log p - log q, with the digits that subtracting the two would lose; may be overwritten.
            reference_slope: (M, 1) f'_a.
            mean_slope: (M, 1) sum p (f' - f'_a) over the whole vocabulary.
        Returns: (M, B). Entries where p = 0 may hold anything: the caller sets them to zero.
        """
        slope, p = self.slope(log_p, log_ratio), log_p.exp_()
        # A slope is infinite where q = 0, which a finite divergence has only where p = 0.
        return slope.sub_(reference_slope).sub_(mean_slope).mul_(p).masked_fill_(p == 0, 0)


class Summed(WholeRow):
    """One whose value and mean slope take a sweep of their own over the selected rows."""

    @abstractmethod
    def term(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """(M, B) f(p_v, q_v) on a block, p = 0 and q = 0 included; `log_ratio` is log p - log q, and 0 where both are 0."""


class Support(NamedTuple):
    """Both models on a list of K ids per position, and off it. An id that is missing is -inf in both."""

    student: Tensor  # (M, K) student logits at the ids
    student_rest: Tensor  # (M,) log sum exp of the student's logits off the ids
    teacher: Tensor  # (M, K) log q at the ids, q over the whole vocabulary
    teacher_rest: Tensor  # (M,) log of the teacher's mass off the ids
    teacher_entropy: Tensor  # (M,) H(q)

    @property
    def student_logsumexp(self) -> Tensor:
        """(M,) over the whole vocabulary."""
        return torch.logsumexp(torch.cat((self.student, self.student_rest.unsqueeze(1)), 1), 1)

    @property
    def log_p(self) -> Tensor:
        """(M, K) log p at the ids, p over the whole vocabulary."""
        return self.student - self.student_logsumexp.unsqueeze(1)


class OnSupport(Divergence):
    """A divergence that reads the models on a short list of ids: the teacher's top-K, or the token that was sampled.

    `loss` is written once, in differentiable torch on (M, K) tensors in fp64; every backend differentiates it there and carries
    the two gradients on to the logits.
    """

    of_tokens: ClassVar[bool] = False  # the list is the sampled token, not the teacher's top-K
    reads_rest: ClassVar[bool] = True  # whether `loss` reads the student off the list: a sweep of its head
    reads_teacher_rest: ClassVar[bool] = False
    reads_entropy: ClassVar[bool] = False  # of the teacher: not known from a teacher that sends log-probabilities

    @property
    def support(self) -> OnSupport:
        return self

    @property
    def length(self) -> int:
        """K of the list: `top_k`, or 1 for the sampled token."""
        return 1 if self.of_tokens else int(self.top_k)  # type: ignore[attr-defined]

    @abstractmethod
    def loss(self, at: Support) -> Tensor:
        """(M,) losses, differentiable in `at.student` and `at.student_rest`; +inf where there is none."""


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """sum w l over positions, 0-dim; weight 0 leaves a position out, whatever its loss."""
    return torch.where(weights == 0, 0, losses * weights).sum()


def without_infinite(losses: Tensor, weights: Tensor) -> Tensor:
    """The weights, 0 where the loss is infinite: such a position has no gradient, and is not trained on."""
    return weights.masked_fill(losses.detach() == torch.inf, 0)
