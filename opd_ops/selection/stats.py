"""`TokenStats`: the statistics of each position, from one pass over both models' logits.

  With p = softmax(student), q = softmax(teacher) after temperature, scale and soft-cap; S, T the top-K ids of the
  student and of the teacher, order (logit descending, id ascending); U = S ∪ T.          [all in nats]
  Sources: arXiv 2605.26844 (TA) eqs. 9, 10, 17; arXiv 2604.14084 (TIP) eq. 3.

Not here: computing the columns (backends/), scores (selectors.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import may_look, number_in
from opd_ops.inputs.workspace import Workspace

WHOLE_ROW_COLUMNS = frozenset({"jsd", "ratio_variance"})  # optional columns that need both models' whole rows
LIST_COLUMNS = frozenset({"released_kl", "topk_entropy", "top1_agreement", "teacher_rank"})  # made of both top-K lists
BACKEND_COLUMNS = WHOLE_ROW_COLUMNS | LIST_COLUMNS  # optional columns that a backend computes
TOKEN_COLUMNS = frozenset({"student_logprob", "teacher_logprob", "ier"})  # of the sampled token (call/score.py)
OPTIONAL_COLUMNS = BACKEND_COLUMNS | TOKEN_COLUMNS | {"response_place"}
SWEPT_COLUMNS = (  # columns from one sweep of both models over the vocabulary
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "student_logsumexp",
    "teacher_logsumexp",
    "logsumexp_gap",
)

REFERENCE_COLUMNS = (
    "reference_student",
    "reference_teacher",
    "reference_log_p",
    "reference_log_ratio",
    "top_log_ratio",
    "reverse_kl_excess",
)


KL_REFERENCE_COLUMNS = frozenset(REFERENCE_COLUMNS) - {"top_log_ratio"}


def is_finite(x: Tensor) -> Tensor:
    """torch.isfinite in half as many operators."""
    return x.abs() < math.inf


def all_set(flags: Tensor) -> bool:
    """Whether a CPU sees that every flag is set. Elsewhere looking would make it wait."""
    return may_look(flags) and bool(number_in(flags.all()))


class TokenStats(NamedTuple):
    """Statistics per position, each of the mask's shape; fp32 (fp64 for fp64 inputs), 0 where not valid.

    `jsd` to `response_place` are None unless the selector or the weighting names them in `needs`. Only backend "torch" fills
    the last six columns; other backends leave them None. With `response_place` all positions of the responses are scored: the
    columns then hold masked positions too, and 0 outside the responses. `reverse_kl` and `forward_kl` take the student's whole
    row: with `student_stats` they are NaN at positions whose row was not read.
    """

    valid: Tensor  # bool: mask non-zero, and the teacher's softmax is finite or the student's is not
    student_entropy: Tensor  # H(p) = -sum p log p
    teacher_entropy: Tensor  # H(q)
    reverse_kl: Tensor  # KL(p || q); +inf where p > 0 meets q = 0
    forward_kl: Tensor  # KL(q || p); +inf where q > 0 meets p = 0
    student_logsumexp: Tensor  # log sum exp of the student's logits; NaN marks a blown-up student
    teacher_logsumexp: Tensor
    logsumexp_gap: Tensor  # student_logsumexp - teacher_logsumexp, with the digits that subtracting would lose
    support_mass: Tensor  # C = sum over S of q, q over the full vocabulary (TA eq. 10)
    student_support_mass: Tensor  # sum over S of p
    overlap_mass: Tensor  # sum over S ∩ T of q: a lower bound on C, known from two top-K lists (TA eq. 17)
    union_kl: Tensor  # D = KL(q || p), both renormalised on U (TA eq. 9)
    jsd: Tensor | None = None  # Jensen-Shannon divergence, beta = 1/2
    released_kl: Tensor | None = None  # D of TA's released code: selectors.py::Released
    topk_entropy: Tensor | None = None  # H(p renormalised on S') / ln |S'|, S' the ids of S with p > 0
    ratio_variance: Tensor | None = None  # Var_p[log p - log q]; +inf where p > 0 meets q = 0
    top1_agreement: Tensor | None = None  # 1 if both models have the same most likely id, else 0
    teacher_rank: Tensor | None = None  # place of the student's first id in the teacher's list: 1, 2, ...; K + 1: not on it
    student_logprob: Tensor | None = None  # log p(y), y the sampled token
    teacher_logprob: Tensor | None = None  # log q(y)
    ier: Tensor | None = None  # signal over noise of the gradient on S ∪ T ∪ {y} (backends/shared/candidates.py)
    response_place: Tensor | None = None  # int64: 1, 2, ... along its response; 0: in no response (inputs/positions.py)
    # `REFERENCE_COLUMNS`, for gradients of backend "torch"; a: the student's most likely id (backends/streamed/reference.py)
    reference_student: Tensor | None = None  # s_a
    reference_teacher: Tensor | None = None  # u_a, or the teacher's largest logit where it masks a
    reference_log_p: Tensor | None = None  # log p_a
    reference_log_ratio: Tensor | None = None  # log p_a - log q_a, with that other logit where the teacher masks a
    top_log_ratio: Tensor | None = None  # log p_a - log q_a: +inf where the teacher masks a
    reverse_kl_excess: Tensor | None = None  # reverse_kl - reference_log_ratio, computed as a sum; 0 where infinite

    @property
    def present(self) -> Tensor:
        """Bool: in a response, masked positions too."""
        assert self.response_place is not None
        return self.response_place > 0

    def clone(self) -> TokenStats:
        """A copy of the columns."""
        return self._map(torch.clone)

    def take(self, rows: Tensor) -> TokenStats:
        """The columns at `rows` of the flattened positions."""
        return self._map(lambda column: column.reshape(-1)[rows])

    def take_together(self, rows: Tensor) -> TokenStats:
        """`take` with fewer operators. Columns of a dtype share their memory: keeping one keeps all of them.

        Those that the gradients of reverse and forward KL read are apart from the others.
        """
        columns = {name: column for name, column in self._asdict().items() if column is not None}
        taken: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(column.dtype for column in columns.values()):
            names = [name for name, column in columns.items() if column.dtype == dtype]
            if len(names) == 1:
                taken[names[0]] = columns[names[0]].reshape(-1).index_select(0, rows)
                continue
            names.sort(key=lambda name: name in KL_REFERENCE_COLUMNS)
            values = torch.stack([columns[name] for name in names]).view(len(names), -1).index_select(1, rows)
            n_others = sum(name not in KL_REFERENCE_COLUMNS for name in names)
            parts = [values[:n_others], values[n_others:].clone()] if n_others < len(names) else [values]
            taken |= dict(zip(names, (row for part in parts for row in part.unbind()), strict=True))
        return TokenStats(**taken)

    def spread(self, rows: Tensor | None, shape: torch.Size) -> TokenStats:
        """Put (n,) columns at `rows` of `shape` (None: at every position, in order); 0 where not valid.

        All columns of one dtype are placed at once: a launch for each would cost more than the columns themselves.
        """
        is_valid = all_set(self.valid)
        if rows is None and is_valid:
            return self if len(shape) == 1 else self._map(lambda column: column.view(shape))
        columns = {name: column for name, column in self._asdict().items() if column is not None}
        placed: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(column.dtype for column in columns.values()):
            names = [name for name, column in columns.items() if column.dtype == dtype]
            if names == ["valid"]:
                values = self.valid.unsqueeze(0)
            else:
                values = torch.stack([columns[name] for name in names])
                values = values if is_valid else values.masked_fill_(~self.valid, 0)
            if rows is not None:
                values = values.new_zeros((len(names), shape.numel())).index_copy_(1, rows, values)
            placed |= dict(zip(names, values.view(len(names), *shape).unbind(0), strict=True))
        return TokenStats(**placed)

    def with_column(self, name: str, rows: Tensor, values: Tensor) -> TokenStats:
        """The columns, with new `values` of column `name` at `rows` of the flattened positions."""
        column = getattr(self, name)
        return self._replace(**{name: column.flatten().index_copy(0, rows, values.to(column.dtype)).view(column.shape)})

    def replaced(self, where: Tensor, columns: TokenStats) -> TokenStats:
        """The columns, with the values of `columns`, in order, at the positions of the bool `where`."""
        replaced = self._asdict()
        for name, values in columns._asdict().items():
            if values is not None:
                column = replaced[name]
                column = values.new_zeros(where.shape) if column is None else column
                replaced[name] = column.masked_scatter(where, values)
        return TokenStats(**replaced)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        columns = self._asdict().items()
        return TokenStats(**{name: function(column) for name, column in columns if column is not None})


class SampledLogits(NamedTuple):
    """The sampled tokens of n positions, and both models' logits of them."""

    tokens: Tensor  # (n,) int64
    logits: Tensor  # (2, n) student's and teacher's, fp32, or fp64 if an input is; -inf: masked

    def take(self, part: slice) -> SampledLogits:
        """Those of consecutive positions."""
        return SampledLogits(self.tokens[part], self.logits[:, part])


class Scoring(NamedTuple):
    """How a backend computes statistics."""

    top_k: int  # K
    workspace: Workspace
    score_dtype: torch.dtype | None = None  # of a head's logits; None: the backend's choice, which may be the head's 16 bits
    columns: frozenset[str] = frozenset()  # the optional columns to compute
    sampled: SampledLogits | None = None  # of the rows, where `columns` has "ier"


class OwnStats(NamedTuple):
    """One model's statistics at n positions, from its own logits."""

    logsumexp: Tensor  # (n,)
    entropy: Tensor  # (n,)
    ids: Tensor  # (n, K) top-K in order
    logits: Tensor  # (n, K) logits of these ids
