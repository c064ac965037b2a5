"""Divergences built on another divergence l: `entropy_aware` adds a term to l, `importance_weighted` multiplies it by a weight.

  entropy_aware   l + alpha 1[H(q) > tau] sum_T q~ (log q~ - log p), q~ renormalised on the teacher's top-K T    (EOPD,
                  arXiv 2603.07079; the term is added to l, it does not replace l)
  importance_weighted   w l, w a constant made of p(y) / mu(y) (ratio.py; SDPO, arXiv 2601.20802, with tis)

Not here: the other divergences (whole.py, bounded.py, top_k.py, support.py, sampled.py), mixed teachers (inputs/ensembles.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_ops.arguments import check_integer, check_positive, real, shown, take_plain
from opd_ops.divergences.base import Divergence, OnSupport, Support, WholeRow
from opd_ops.divergences.equations import kl
from opd_ops.divergences.ratio import DEFAULT_BOUNDS, Ratio, check_ratio, ratio_of
from opd_ops.divergences.sampled import SampledToken
from opd_ops.divergences.whole import ReverseKL


@dataclass(frozen=True)
class _UncertainTeacher(OnSupport):
    """alpha 1[H(q) > tau] KL(q~ || p) on the teacher's top-K."""

    alpha: float
    tau: float
    top_k: int
    name = "entropy_aware"
    reads_entropy = True

    def loss(self, at: Support) -> Tensor:
        forward_kl_term = self.alpha * kl(torch.log_softmax(at.teacher, 1), at.log_p)
        return torch.where(at.teacher_entropy > self.tau, forward_kl_term, 0)


@dataclass(frozen=True)
class EntropyAware(Divergence):
    """A divergence over the whole vocabulary, plus forward KL on the teacher's top-K where the teacher is uncertain (EOPD).

    Args:
        alpha: Weight of the forward KL, > 0.
        tau: The teacher is uncertain above this entropy, in nats.
        top_k: Length of the teacher's list.
        divergence: The divergence over the whole vocabulary: ReverseKL(), ForwardKL(), JSD(beta), TotalVariation().
    """

    alpha: float = 1.0
    tau: float = 0.8
    top_k: int = 16
    divergence: WholeRow = field(default_factory=ReverseKL)
    name = "entropy_aware"

    def __post_init__(self) -> None:
        take_plain(self, "alpha", "tau", "top_k")
        check_integer("EntropyAware.top_k", self.top_k, least=1)
        check_positive("EntropyAware.alpha", self.alpha)
        if not math.isfinite(real(self.tau)):
            raise ValueError(f"EntropyAware.tau: got {shown(self.tau)}, expected a finite number")
        if not isinstance(self.divergence, WholeRow):
            raise TypeError(
                f"EntropyAware.divergence: got {type(self.divergence).__name__}, expected one over the whole vocabulary, "
                "like ReverseKL()"
            )

    @property
    def whole(self) -> WholeRow:
        return self.divergence.whole

    @property
    def on_support(self) -> OnSupport:
        return _UncertainTeacher(self.alpha, self.tau, self.top_k)


@dataclass(frozen=True)
class ImportanceWeighted(Divergence):
    """A divergence whose loss at each position is weighted by the ratio of p(y) now to p(y) at sampling time.

    For rollouts that an older student wrote, or another engine. The weight is a constant, without a gradient:

        divergence = ImportanceWeighted(JSD(0.5), ratio="tis", bounds=(0, 2))
        selective_opd_loss(student, teacher, tokens=y, old_logprobs=log_mu, divergence=divergence)

    It changes neither the selection nor the denominator. Statistics and infinite losses are those of the divergence itself.

    Args:
        divergence: Any but `SampledToken`, which has a ratio of its own.
        ratio: "is", "tis" or "icepop", the same as for `SampledToken`.
        bounds: (low, high) of the ratio; None: (0, 2).
    """

    divergence: Divergence
    ratio: str = "tis"
    bounds: tuple[float, float] | None = None
    name = "importance_weighted"

    def __post_init__(self) -> None:
        if not isinstance(self.divergence, Divergence) or isinstance(self.divergence, (SampledToken, ImportanceWeighted)):
            more = "; write SampledToken(ratio=...)" if isinstance(self.divergence, SampledToken) else ""
            raise TypeError(
                f"ImportanceWeighted.divergence: got {type(self.divergence).__name__}, expected another divergence, like "
                f"JSD(0.5){more}"
            )
        if self.ratio == "ppo":
            raise ValueError(
                "ImportanceWeighted.ratio: got 'ppo', which clips by the sign of a token's advantage; "
                "SampledToken(ratio='ppo') has one. Expected one of: is, tis, icepop"
            )
        kinds = [kind for kind in DEFAULT_BOUNDS if kind != "ppo"]
        object.__setattr__(self, "bounds", check_ratio("ImportanceWeighted", self.ratio, self.bounds, kinds))

    @property
    def importance(self) -> Ratio | None:
        return ratio_of(self.ratio, self.bounds)

    @property
    def column(self) -> str | None:  # type: ignore[override]
        return self.divergence.column

    @property
    def whole(self) -> WholeRow | None:
        return self.divergence.whole

    @property
    def on_support(self) -> OnSupport | None:
        return self.divergence.on_support
