"""The interface of a divergence: a loss per position, as a sum over the vocabulary, a function of a short list of ids, or both.

  WholeRow    l = sum_v f(p_v, q_v)                   dl/ds_v = p_v ((f'_v - f'_a) - sum_w p_w (f'_w - f'_a)),  f' = df/dp
  OnSupport   l = f(x, z)                             dl/ds_v = df/dx_k at the list's ids, df/dz e^{s_v - z} at others
  s: student logits after temperature; a: the student's most likely id; x: s at the K ids of the list; z: log-sum-exp of s
  at all other ids. No tensor of size V is kept for either.
  The slope f'_v is taken relative to f'_a. So at a, where p may be near 1, only the mean slope is left: nothing cancels.

A new divergence is one small class of one of these kinds in a file of its own (CONTRIBUTING.md).
Not here: the divergences (whole.py, bounded.py, top_k.py, support.py, sampled.py, composite.py), how backends compute the two
forms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from opd_ops.divergences.ratio import Ratio


class Divergence(ABC):
    """A loss per position: `whole` + `on_support`; one of the two may be None."""

    name: ClassVar[str]
    column: str | None = None  # the column of TokenStats with its value; None: no column has it

    @property
    def whole(self) -> WholeRow | None:
        return None

    @property
    def on_support(self) -> OnSupport | None:
        return None

    @property
    def importance(self) -> Ratio | None:
        """How the ratio of p(y) to y's probability at sampling time weighs the loss; None: it does not."""
        return None

    @property
    def infinite_column(self) -> str | None:
        """The column of TokenStats that is +inf where the loss is; None: only the loss itself tells."""
        return None if self.whole is None else self.whole.column

    @property
    def reads_tokens(self) -> bool:
        """Whether the loss or its weight reads the token that the student sampled."""
        return self.importance is not None or (self.on_support is not None and self.on_support.with_token)

    @property
    def reads_whole_rows(self) -> bool:
        """Whether the loss needs a statistic of both whole rows, or sums over them."""
        return self.whole is not None or (self.on_support is not None and self.on_support.reads_reverse_kl)


class WholeRow(Divergence):
    """A divergence over the whole vocabulary, computed in blocks of columns."""

    @property
    def whole(self) -> WholeRow:
        return self

    @abstractmethod
    def loss(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(M,) losses of whole (M, V) rows, differentiable in `log_p`. This is the specification: clarity before speed."""

    @abstractmethod
    def slope(self, log_p: Tensor, log_ratio: Tensor) -> Tensor:
        """(M, B) df/dp at (p_v, q_v), up to a constant; finite where q = 0, any value where p = 0. May be `log_ratio`."""

    def dlogits(self, log_p: Tensor, log_ratio: Tensor, reference_slope: Tensor, mean_slope: Tensor) -> Tensor:
        """d loss / d student logits on a block of columns.

        Args:
            log_p: (M, B) the student's log-probabilities in the block; may be overwritten.
            log_ratio: (M, B) log p - log q, with the digits that subtracting the two would lose; may be overwritten.
            reference_slope: (M, 1) f'_a.
            mean_slope: (M, 1) sum p (f' - f'_a) over the whole vocabulary.
        Returns: (M, B). Entries where p = 0 may hold anything: the caller sets them to zero.
        """
        slope, p = self.slope(log_p, log_ratio), log_p.exp_()
        # A slope is infinite where q = 0. A finite loss has q = 0 only where p = 0: those entries are set to 0.
        return slope.sub_(reference_slope).sub_(mean_slope).mul_(p).masked_fill_(p == 0, 0)


class Summed(WholeRow):
    """A divergence whose value and mean slope need a sweep of their own over the selected rows."""

    @property
    def may_be_negative(self) -> bool:
        """Whether the sum may be below 0; if not, what rounding leaves below 0 becomes 0."""
        return False

    @abstractmethod
    def term(self, log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
        """(M, B) f(p_v, q_v) on a block, also at p = 0 and q = 0. `log_ratio`: log p - log q, 0 where p = q = 0."""


class Support(NamedTuple):
    """Both models on a list of K ids per position, and at all other ids (off the list). A missing id is -inf in both models."""

    student: Tensor  # (M, K) student logits at the ids
    student_off_list: Tensor  # (M,) log sum exp of the student's logits off the list
    teacher: Tensor  # (M, K) log q at the ids, q over the whole vocabulary
    teacher_off_list: Tensor  # (M,) log of the teacher's mass off the list
    teacher_entropy: Tensor  # (M,) H(q)
    reverse_kl: Tensor | None = None  # (M,) KL(p || q), a constant; None: unknown

    @property
    def student_logsumexp(self) -> Tensor:
        """(M,) over the whole vocabulary."""
        return torch.logsumexp(torch.cat((self.student, self.student_off_list.unsqueeze(1)), 1), 1)

    @property
    def log_p(self) -> Tensor:
        """(M, K) log p at the ids, p over the whole vocabulary."""
        return self.student - self.student_logsumexp.unsqueeze(1)


# The models whose top-K lists form the list of a divergence, for each `OnSupport.support` (backends/shared/list_ids.py).
SUPPORTS = {
    "teacher": ("teacher",),
    "student": ("student",),
    "union": ("student", "teacher"),
    "intersection": ("student", "teacher"),
    "token": (),
}


class OnSupport(Divergence):
    """A divergence on a short list of ids: of the models' top-K ids, of the token that the student sampled, or of both.

    `loss` is differentiable torch on (M, K) tensors in fp64. A constant added to `student` and `student_off_list` must not
    change it: backends subtract the largest logit. Every backend differentiates it and carries the gradients of the listed
    logits and of `student_off_list` on to the student's logits.
    """

    support: str = "teacher"  # which ids, a key of `SUPPORTS`
    top_k: int = 0  # the length of the models' lists
    with_token: bool = False  # the sampled token is the last id of the list, missing if it is on the list before
    reads_off_list: bool = True  # whether `loss` reads `student_off_list`, which takes a sweep of the student's head
    reads_teacher_off_list: bool = False  # whether `loss` reads `teacher_off_list`
    reads_entropy: bool = False  # whether `loss` reads `teacher_entropy`, which a sparse teacher does not have

    @property
    def on_support(self) -> OnSupport:
        return self

    @property
    def reads_reverse_kl(self) -> bool:
        """Whether `loss` reads `reverse_kl`, which a sparse teacher does not have."""
        return False

    @property
    def length(self) -> int:
        """The number of entries of the list, missing ones too."""
        return self.top_k * len(SUPPORTS[self.support]) // (2 if self.support == "intersection" else 1) + self.with_token

    @abstractmethod
    def loss(self, at: Support) -> Tensor:
        """(M,) losses, differentiable in `at.student` and `at.student_off_list`; +inf at positions without a finite loss."""


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """sum w l over positions, 0-dim; a position of weight 0 is left out, also with an infinite loss."""
    return (losses * weights).masked_fill(weights == 0, 0).sum()


def without_infinite(losses: Tensor, weights: Tensor) -> Tensor:
    """The weights, with 0 where the loss is infinite: such a position has no gradient and is not trained on."""
    return weights.masked_fill(losses.detach() == torch.inf, 0)
