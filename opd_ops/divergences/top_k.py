"""The family of losses on a list A of top-K ids: a direction, a support that says which ids form A, and a tail.

  direction   reverse KL(a || b), a from p, b from q;  forward KL(b || a);  jsd beta KL(b || m) + (1 - beta) KL(a || m),
              m = beta b + (1 - beta) a
  support     teacher, student: A is this model's top-K;  union, intersection: of both models' top-K
  tail        drop      a = p / p_A, b = q / q_A on A: both renormalised
              bucket    a = p, b = q on A and one more outcome, all other ids together
              mass      a = p, b = q on A, not renormalised: sum_A a log(a/b) + b - a
              sampled   mass + 1[y not in A] (p_y / sg p_y) sg(log p_y - log q_y), y the sampled token, sg: a constant
  p_A, q_A: the models' mass on A;  s: student logits

  d loss / d s_v, reverse   drop      p^_v (log p^_v / q^_v - loss) on A, else 0
                            bucket    p_v (r_v - loss), r = log p/q on A, log p_t/q_t off A (t: all other ids)
                            mass      p_v (r_v 1[v in A] - sum_A p r);  sampled adds 1[y not in A] r_y (1[v = y] - p_v)
                  forward   drop      p^_v - q^_v on A;  bucket p_v - q_v on A, p_v (1 - q_t/p_t) off A
                            mass      (p_v - q_v) 1[v in A] + p_v (q_A - p_A)
  Over tokens y drawn from p the mean gradient of tail "sampled" is that of reverse KL, whatever A is.

  local_support = TopK("reverse", "teacher", "drop", 32)                                         arXiv 2603.25562 eqs. 6-8
  tail_aware    = TopK("reverse", "teacher", "bucket", 16)                                             arXiv 2608.14728

The student's tail of "bucket" is a sum over the ids off the list. The teacher's may be 1 - q_A, where that has the digits.
Not here: which ids a list has (backends/shared/list_ids.py), a cut forward KL (support.py), the sampled token alone
(sampled.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.arguments import check_integer, real, shown, take_plain
from opd_ops.divergences.base import SUPPORTS, OnSupport, Support
from opd_ops.divergences.equations import kl, mass_kl
from opd_ops.divergences.whole import JSD

DIRECTIONS = ("reverse", "forward", "jsd")
TAILS = ("drop", "bucket", "mass", "sampled")
NAMES = {("reverse", "teacher", "drop"): "local_support", ("reverse", "teacher", "bucket"): "tail_aware"}

# What is not offered, and why.
NO_TAIL = {
    ("reverse", "cut"): "leaves out q_A - p_A: it may be negative, and its gradient drives the student's mass off the list; "
    "'mass' adds that term",
    ("forward", "cut"): "is TopKForwardKL(top_k=...), on the teacher's list",
    ("forward", "sampled"): "would weight a token drawn from p by q/p, which has no bound",
    ("jsd", "mass"): "no source defines",
    ("jsd", "sampled"): "no source defines",
    ("jsd", "cut"): "no source defines",
}


@dataclass(frozen=True)
class TopK(OnSupport):
    """A divergence on a list of top-K ids; the module's docstring has the equations.

    A position with an empty list, like an empty intersection, is neither trained on nor counted. With tail "sampled" it is:
    the sampled token alone gives its loss.

    Args:
        direction: "reverse": KL(p || q); "forward": KL(q || p); "jsd": their generalised Jensen-Shannon divergence.
        support: The ids: the top-K of the "teacher" or the "student", their "union" or "intersection".
        tail: The ids off the list: "drop", "bucket", "mass", and with direction "reverse" also "sampled", which needs
            `tokens`. With "jsd" only "drop" and "bucket".
        top_k: K, the length of each model's list.
        beta: With "jsd", the teacher's share of m, as in `JSD`: 0 means "forward", 1 "reverse". None: 0.5.
    """

    direction: str = "reverse"
    support: str = "teacher"
    tail: str = "bucket"
    top_k: int = 16
    beta: float | None = None

    def __post_init__(self) -> None:
        take_plain(self, "top_k", "beta")
        supports = tuple(name for name, models in SUPPORTS.items() if models)
        for name, known in (("direction", DIRECTIONS), ("support", supports), ("tail", (*TAILS, "cut"))):
            value = getattr(self, name)
            if value not in known:
                names = ", ".join(x for x in known if x != "cut")
                raise ValueError(f"TopK.{name}: got {value!r}, expected one of: {names}")
        check_integer("TopK.top_k", self.top_k, least=1)
        if (self.direction, self.tail) in NO_TAIL:
            fits = ", ".join(tail for tail in TAILS if (self.direction, tail) not in NO_TAIL)
            reason = NO_TAIL[self.direction, self.tail]
            raise ValueError(
                f"TopK.tail: got {self.tail!r} with direction {self.direction!r}, which {reason}; expected one of: {fits}"
            )
        if self.beta is not None and (self.direction != "jsd" or not 0 <= real(self.beta) <= 1):
            expected = "a number in [0, 1]" if self.direction == "jsd" else f"None with direction {self.direction!r}"
            raise ValueError(f"TopK.beta: got {shown(self.beta)}, expected {expected}")

    @property
    def name(self) -> str:  # type: ignore[override]
        ids = self.direction, self.support, self.tail
        return NAMES.get(ids, "topk_" + "_".join(ids))

    @property
    def with_token(self) -> bool:  # type: ignore[override]
        return self.tail == "sampled"

    @property
    def reads_off_list(self) -> bool:  # type: ignore[override]
        return self.tail != "drop"

    @property
    def reads_teacher_off_list(self) -> bool:  # type: ignore[override]
        return self.tail == "bucket"

    def loss(self, at: Support) -> Tensor:
        if self.tail == "sampled":
            log_p, log_q = at.log_p, at.teacher
            return self._between(mass_kl, log_p[:, :-1], log_q[:, :-1]) + _sampled(log_p[:, -1], log_q[:, -1])
        no_student, no_teacher = ((x == -math.inf).all(1) for x in (at.student, at.teacher))
        without_loss, divergence = no_student & no_teacher, kl
        if self.tail == "mass":
            log_p, log_q, divergence = at.log_p, at.teacher, mass_kl
        elif self.tail == "bucket":
            log_p = torch.log_softmax(torch.cat((at.student, at.student_off_list.unsqueeze(1)), 1), 1)
            log_q = torch.cat((at.teacher, at.teacher_off_list.unsqueeze(1)), 1)
        else:
            without_loss = no_student | no_teacher  # one model can write no id of the list
            log_p, log_q = (torch.log_softmax(x.masked_fill(without_loss.unsqueeze(1), 0), 1) for x in (at.student, at.teacher))
        return torch.where(without_loss, math.inf, self._between(divergence, log_p, log_q))

    def _between(self, divergence: Callable[[Tensor, Tensor], Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
        beta = {"reverse": 1.0, "forward": 0.0, "jsd": 0.5 if self.beta is None else self.beta}[self.direction]
        if 0 < beta < 1:
            return JSD(beta).loss(log_p, log_q)
        return divergence(log_p, log_q) if beta == 1 else divergence(log_q, log_p)


def _sampled(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(p / sg p) sg(log p - log q) of a token off the list; 0 where it is missing."""
    missing = (log_p == -math.inf) & (log_q == -math.inf)
    log_ratio = (log_p - log_q).detach()
    is_finite = ~(missing | log_ratio.isinf())
    log_p = torch.where(is_finite, log_p, 0)
    weight = torch.exp(log_p - log_p.detach())  # 1, with the gradient of log p
    return torch.where(is_finite, weight * torch.where(is_finite, log_ratio, 0), torch.where(missing, 0, math.inf))


def LocalSupport(top_k: int = 32) -> TopK:
    """Reverse KL on the teacher's top-K, both models renormalised on it. Reads no other logit of the student."""
    return TopK("reverse", "teacher", "drop", top_k)


def TailAware(top_k: int = 16) -> TopK:
    """Reverse KL on the teacher's top-K and one more outcome, the tail: all other entries together."""
    return TopK("reverse", "teacher", "bucket", top_k)
