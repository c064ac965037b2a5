"""Several models as the teacher of a call: `Mixture` of them at every position, `Routed` with one of them for each position.

  Mixture   "geometric"    u = sum_m w_m u_m, u_m the logits of model m: q is proportional to prod_m q_m^w_m
            "arithmetic"   log q = log sum_m w_m q_m, sum_m w_m = 1
  Routed    q at position t is that of model index[t]

  With weights that sum to 1, sum_m w_m KL(p || q_m) has the gradient of KL(p || geometric), and sum_m w_m KL(q_m || p) the
  gradient of KL(arithmetic || p). `Extrapolated` is the geometric mixture of weights lam and 1 - lam (G-OPD, arXiv 2602.12125);
  weights 1, a, -a are those of W2S-OPD (arXiv 2607.26246).

Not here: the mixing itself (`mix` in sources.py), its specification (`mixture` in backends/eager.py), the rows of each routed
model (backends/ensembles.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import check_choice, check_layout, plain, real, shown
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.teacher_lists import SampledLogprobs, SparseTeacher, TopKLogprobs

SUM = 1e-6  # how far the sum of arithmetic weights may be from 1


@dataclass(frozen=True, eq=False)
class Mixture:
    """One teacher made of several models at the same positions. Statistics and selection use this teacher too.

    Args:
        teachers: Logits (..., V) or `LinearHead`s, two or more. They receive no gradient.
        weights: A number for each. "geometric": finite, of either sign; "arithmetic": above 0, with the sum 1.
        kind: "geometric": the weighted sum of the logits. "arithmetic": the weighted mean of the probabilities; from each model
            the normalisers are read first, by one more sweep.

    An entry that the first model or one with a weight above 0 masks (-inf) has probability 0 in a geometric mixture. Elsewhere
    the logits of models with a negative weight must be finite: else the position is not valid.
    """

    teachers: Sequence[Tensor | LinearHead]
    weights: Sequence[float]
    kind: str = "geometric"

    def __post_init__(self) -> None:
        check_choice("Mixture.kind", self.kind, ("geometric", "arithmetic"))
        object.__setattr__(self, "teachers", _sequence("Mixture", self.teachers))
        for i, teacher in enumerate(self.teachers):
            _check_member(f"Mixture.teachers[{i}]", teacher, "a mixture has no equation for it")
        weights = plain(self.weights)
        if not isinstance(weights, Sequence):
            raise TypeError(f"Mixture.weights: got {type(weights).__name__}, expected a sequence of a number per teacher")
        numbers, got = tuple(map(real, weights)), f"Mixture.weights: got {shown(self.weights)}"
        if len(numbers) != len(self.teachers):
            raise ValueError(f"{got}, expected one for each of the {len(self.teachers)} teachers")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{got}, expected finite numbers")
        if self.kind == "arithmetic" and min(numbers) <= 0:
            raise ValueError(
                f"{got}, expected numbers above 0: with a negative weight a mean of probabilities may be negative; "
                "kind='geometric' takes either sign; leave a teacher of weight 0 out"
            )
        if self.kind == "arithmetic" and abs(sum(numbers) - 1) > SUM:
            raise ValueError(f"{got} of sum {sum(numbers):g}, expected the sum 1: probabilities must sum to 1")
        object.__setattr__(self, "weights", numbers)


def Extrapolated(lam: float, teacher: Tensor | LinearHead, reference: Tensor | LinearHead) -> Mixture:
    """The teacher pushed away from a reference model: logits lam u + (1 - lam) r (G-OPD, which takes lam = 1.25).

    lam above 1: extrapolated; below 1: nearer to the reference.
    """
    number = real(lam)
    if not math.isfinite(number):
        raise ValueError(f"Extrapolated.lam: got {shown(lam)}, expected a finite number; 1.25 is the paper's")
    return Mixture((teacher, reference), (number, 1 - number))


@dataclass(frozen=True, eq=False)
class Routed:
    """A teacher for each position: all positions share one budget, and each is scored and trained on with its own teacher.

    Args:
        teachers: Logits (..., V), `LinearHead`s or `Mixture`s, each of all positions; only the rows that the index gives to a
            teacher are read, so that other rows may hold anything.
        index: int64 or int32, which teacher, 0 ... len(teachers) - 1: of the positions' shape, or of their first dimensions, as
            (B,) for a teacher per sequence. At positions that are not valid any number, unless the selector scores
            whole responses (`Released`).

    `metrics` has, for teacher i, n_valid_teacher_i, n_selected_teacher_i, loss_teacher_i (the mean over its selected positions)
    and loss_teacher_i_sum. Log-probabilities that several servers sent need no `Routed`: they are rows of one `TopKLogprobs`.
    """

    teachers: Sequence[Tensor | LinearHead | Mixture]
    index: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", _sequence("Routed", self.teachers))
        for i, teacher in enumerate(self.teachers):
            if not isinstance(teacher, Mixture):
                _check_member(
                    f"Routed.teachers[{i}]", teacher, "lists of several teachers are one list: put their rows into one"
                )
        if not isinstance(self.index, Tensor) or self.index.dtype not in (torch.int32, torch.int64):
            kind = f"dtype {self.index.dtype}" if isinstance(self.index, Tensor) else type(self.index).__name__
            raise TypeError(f"Routed.index: got {kind}, expected an int32 or int64 tensor")
        check_layout("Routed.index", self.index)


AnyTeacher = Tensor | LinearHead | SparseTeacher | Mixture | Routed


def _sequence(name: str, teachers: object) -> tuple[object, ...]:
    if not isinstance(teachers, Sequence) or len(teachers) < 2:
        got = len(teachers) if isinstance(teachers, Sequence) else type(teachers).__name__
        raise (ValueError if isinstance(teachers, Sequence) else TypeError)(
            f"{name}.teachers: got {got}, expected a sequence of two teachers or more"
        )
    return tuple(teachers)


def _check_member(name: str, teacher: object, reason: str) -> None:
    if isinstance(teacher, (TopKLogprobs, SampledLogprobs)):
        raise ValueError(
            f"{name}: got {type(teacher).__name__}, which knows a part of each row; {reason}. Pass logits or a LinearHead"
        )
    if not isinstance(teacher, (Tensor, LinearHead)):
        raise TypeError(f"{name}: got {type(teacher).__name__}, expected a logits tensor (..., V) or a LinearHead")


def named_models(teacher: object, name: str = "teacher") -> list[tuple[str, object]]:
    """The name and the logits or head of each model, in order."""
    if not isinstance(teacher, (Mixture, Routed)):
        return [(name, teacher)]
    prefix = type(teacher).__name__ if name == "teacher" else name
    return [model for i, member in enumerate(teacher.teachers) for model in named_models(member, f"{prefix}.teachers[{i}]")]
