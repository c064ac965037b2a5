"""Selectors: from statistics to one score per position, one short function per paper equation.

  teachability            Norm(D) Norm(C)                      arXiv 2605.26844 (TA) eq. 12
  teachability+entropy    h + a - h a, a = teachability        TA eq. 16, h = Norm(H)
  incompatibility         Norm(D) (1 - Norm(C))                TA eq. 5, the control
  compatibility           Norm(C)                              TA eq. 15
  entropy                 H                                    TA eq. 14, arXiv 2604.14084 (TIP)
  divergence              D                                    TA's divergence baseline
  divergence-reverse-kl   KL(p||q)                             TIP's "div-only"
  tip                     h + d - h d                          TIP eq. 7; h, d clipped min-max of H, min-max of KL(p||q)
  overconfident           KL(q||p) (1 - h)                     TIP section 7.3, Q3
  multinomial             H^alpha JSD^gamma, sampled           TIP table 3
  ...-released            teachability, teachability+entropy, tip and entropy as TA's released code computes them: from the two
                          top-K lists, with its own normaliser, order of ties and added positions
  ier                     signal over noise of the gradient on S ∪ T ∪ {y}: backends/shared/candidates.py has the equation
  dial, log-ratio, ratio-variance   of the sampled token, of the log-ratio: sampled.py has the equations
  random, all, prefix     controls
  Norm(z) = clip((z - Q.05) / (Q.95 - Q.05 + eps), 0, 1), TA eq. 11, over the valid positions of the whole batch.

A selector is any callable TokenStats -> scores, also a user's own. It may have these attributes:
  needs                    names of optional columns; with "response_place" whole responses are scored, masked positions too
  keep_one_per_sequence    True: a sequence without a selected position gets its best position
  keep_scores              TokenStats -> scores that define this best position, instead of the selector's scores
  ties_by_place            True: of equal scores the smaller `response_place` wins, across sequences
  both_ends                True: half of a budget takes the lowest scores
Not here: Norm (normalisers.py), the number of selected positions and ties (budget.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from opd_ops.arguments import check_choice, real, shown, take_plain
from opd_ops.selection.budget import SelectionOptions
from opd_ops.selection.normalisers import minmax_norm, quantile_norm, rank_norm, released_norm
from opd_ops.selection.sampled import Dial, LogRatio, RatioVariance
from opd_ops.selection.stats import WHOLE_ROW_COLUMNS, TokenStats

Selector = Callable[[TokenStats], Tensor]


def _soft_or(a: Tensor, b: Tensor) -> Tensor:
    return a + b - a * b


# --- statistics to scores --------------------------------------------------------------------------------------------


def teachability(stats: TokenStats) -> Tensor:
    """Norm(D) Norm(C): the teacher disagrees, on ids that the student already considers (TA eq. 12)."""
    d, c = quantile_norm(torch.stack((stats.union_kl, stats.support_mass)), stats.valid).unbind()
    return d * c


def teachability_entropy(stats: TokenStats) -> Tensor:
    """Soft-or of Norm(H) and teachability (TA eq. 16)."""
    columns = torch.stack((stats.student_entropy, stats.union_kl, stats.support_mass))
    h, d, c = quantile_norm(columns, stats.valid).unbind()
    return _soft_or(h, d * c)


def incompatibility(stats: TokenStats) -> Tensor:
    """Norm(D) (1 - Norm(C)): disagreement outside the student's support, TA's control (eq. 5)."""
    d, c = quantile_norm(torch.stack((stats.union_kl, stats.support_mass)), stats.valid).unbind()
    return d * (1 - c)


def compatibility(stats: TokenStats) -> Tensor:
    """Norm(C) (TA eq. 15)."""
    return quantile_norm(stats.support_mass, stats.valid)


def entropy(stats: TokenStats) -> Tensor:
    """H of the student (TA eq. 14, TIP)."""
    return stats.student_entropy


def divergence(stats: TokenStats) -> Tensor:
    """D, the union KL: TA's divergence baseline."""
    return stats.union_kl


def divergence_reverse_kl(stats: TokenStats) -> Tensor:
    """KL(p||q): TIP's div-only."""
    return stats.reverse_kl


def tip(stats: TokenStats) -> Tensor:
    """Soft-or of the student's entropy (clipped at its 98th percentile) and KL(p||q), each min-max scaled (TIP eq. 7)."""
    h, d = minmax_norm(torch.stack((stats.student_entropy, stats.reverse_kl)), stats.valid, clip=(0.98, None)).unbind()
    return _soft_or(h, d)


def overconfident(stats: TokenStats) -> Tensor:
    """KL(q||p) (1 - h): low entropy, high disagreement (TIP section 7.3, Q3)."""
    confident = 1 - minmax_norm(stats.student_entropy, stats.valid, clip=0.98)
    # An infinite KL(q||p) ranks first, and inf * 0 would be NaN.
    return stats.forward_kl.double().clamp_max(torch.finfo(torch.float32).max) * confident


def everything(stats: TokenStats) -> Tensor:
    """Equal scores: plain distillation with fraction=1, the earliest positions with a smaller fraction."""
    return torch.zeros_like(stats.student_entropy)


@dataclass(frozen=True)
class Released:
    """What TA's released code selects, from the two top-K lists: docs/reference/selectors.md compares it with the paper.

    With d = Norm(D), c = Norm(C), h = Norm(H), e = Norm(D C), the product before normalising:
        "teachability": d c; "teachability+entropy": h + e - h e; "tip": h + d - h d; "entropy": h
    D is `released_kl`, H `topk_entropy`, C the sum of q over S ∩ T. Norm has no epsilon. Whatever the score, a response without
    a selected position gets its best one by h + e - h e, and of equal scores the smaller place in the response wins, then the
    earlier response.

    Args:
        score: The code's `dlearn_high`, `ca_softor`, `tip` or `entropy`.
        fit: Norm is fitted on "all" positions of the responses, masked ones too, or on the "valid" ones, as in the copy
            of this code that the authors of IER use.
        exact_mass: C is the sum of q over S, the code's `--opd-exact-cmass`. With a teacher that sends only its own list, this
            option changes nothing.
    """

    score: str = "teachability"
    fit: str = "all"
    exact_mass: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"released_kl", "topk_entropy", "response_place"})
    keep_one_per_sequence: ClassVar[bool] = True
    ties_by_place: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("Released.score", self.score, ("teachability", "teachability+entropy", "tip", "entropy"))
        check_choice("Released.fit", self.fit, ("all", "valid"))

    def __call__(self, stats: TokenStats) -> Tensor:
        return self._score(self._norms(stats, *self._names))

    def keep_scores(self, stats: TokenStats) -> Tensor:
        """The scores for the one position that a response without a selected one gets."""
        norms = self._norms(stats, "H", "DC")
        return _released_or(norms["H"], norms["DC"])

    def both_scores(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        """Its scores and `keep_scores`, from one normaliser of all columns."""
        norms = self._norms(stats, *dict.fromkeys((*self._names, "H", "DC")))
        scores = self._score(norms)
        return scores, scores if self.score == "teachability+entropy" else _released_or(norms["H"], norms["DC"])

    @property
    def _names(self) -> tuple[str, ...]:
        names = {"teachability": ("D", "C"), "teachability+entropy": ("H", "DC"), "tip": ("H", "D"), "entropy": ("H",)}
        return names[self.score]

    def _score(self, norms: dict[str, Tensor]) -> Tensor:
        first, *others = (norms[name] for name in self._names)
        if not others:
            return first
        return first * others[0] if self.score == "teachability" else _released_or(first, others[0])

    def _norms(self, stats: TokenStats, *names: str) -> dict[str, Tensor]:
        d, h, c = stats.released_kl, stats.topk_entropy, stats.support_mass if self.exact_mass else stats.overlap_mass
        assert d is not None
        assert h is not None
        among = stats.present if self.fit == "all" else stats.present & stats.valid
        columns = {"D": d, "C": c, "H": h} | ({"DC": d * c} if "DC" in names else {})
        norms = released_norm(torch.stack([columns[name] for name in names]), among)
        return dict(zip(names, norms.unbind(), strict=True))


def _released_or(a: Tensor, b: Tensor) -> Tensor:
    """The soft-or, written so that it is exactly 1 where a or b is: there are ties."""
    return 1 - (1 - a) * (1 - b)


@dataclass(frozen=True)
class IER:
    """The column `ier` alone, or its rank among the valid positions joined to a base score of 0 ... 1 (arXiv 2609.24432).

    A response without a selected position gets its best one.

    Args:
        base: A selector whose scores lie in 0 ... 1, by its name or itself, like "teachability" or Released("tip"); None: none.
        combine: "and": base times rank; "or": base + rank - base times rank.
    """

    base: str | Selector | None = None
    combine: str = "and"
    keep_one_per_sequence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("IER.combine", self.combine, ("and", "or"))
        if self.base is None and self.combine != "and":
            raise ValueError(f"IER.combine: got {self.combine!r} without a base to join; pass a base, or no combine")
        if self.base is not None and isinstance(named_selector(self.base), (Multinomial, Random, Prefix, IER)):
            raise ValueError(
                f"IER.base: got {self.base!r}, expected a selector of statistics alone: not one that draws, counts along "
                "sequences, or is an IER itself"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The column, the sampled token's, and those of the base."""
        base = frozenset() if self.base is None else needs_of(named_selector(self.base))
        return base | {"ier", "student_logprob", "teacher_logprob"}

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.ier is not None
        if self.base is None:
            return stats.ier
        rank, base = rank_norm(stats.ier, stats.valid), named_selector(self.base)(stats).double()
        return base * rank if self.combine == "and" else _soft_or(base, rank)


@dataclass(frozen=True)
class Multinomial:
    """Draws positions without replacement with weight H^alpha JSD^gamma (TIP table 3).

    The scores are log-weights plus Gumbel noise: the positions of the n largest scores are such a draw. The loss is the plain
    mean over the selected positions, without importance weights. Constant factors of the weights (1 / ln V, 1 / ln 2) cancel.
    """

    alpha: float = 1.0
    gamma: float = 1.0
    generator: torch.Generator | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"jsd"})

    def __post_init__(self) -> None:
        take_plain(self, "alpha", "gamma")
        for name in ("alpha", "gamma"):
            if not math.isfinite(real(getattr(self, name))):
                raise ValueError(f"Multinomial.{name}: got {shown(getattr(self, name))}, expected a finite number")

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.jsd is not None
        # With a floor positions of weight 0 come last, not never: the budget is always filled.
        log_h = stats.student_entropy.double().clamp_min(1e-30).log()
        log_j = stats.jsd.double().clamp_min(1e-30).log()
        uniform = _uniform(stats, self.generator)
        return self.alpha * log_h + self.gamma * log_j - (-uniform.clamp(1e-300, 1.0).log()).clamp_min(1e-300).log()


@dataclass(frozen=True)
class Random:
    """Uniform scores, from `generator` or torch's default generator."""

    generator: torch.Generator | None = None

    def __call__(self, stats: TokenStats) -> Tensor:
        return _uniform(stats, self.generator)


@dataclass(frozen=True)
class Prefix:
    """1 - position / length: the earliest positions of every sequence; only valid positions are counted."""

    sequence_ids: Tensor | None = None  # of the mask's shape, non-decreasing; None: the call's ids, else one sequence

    def __call__(self, stats: TokenStats) -> Tensor:
        valid = stats.valid.flatten()
        ids = torch.zeros_like(valid, dtype=torch.long) if self.sequence_ids is None else self.sequence_ids.flatten()
        length = torch.zeros(valid.numel() + 1, dtype=torch.long, device=valid.device).index_add(0, ids, valid.long())
        n_earlier = length.cumsum(0) - length  # valid positions of earlier sequences: ids do not decrease
        position = valid.cumsum(0) - 1 - n_earlier[ids]
        return (1 - position.double() / length[ids].clamp_min(1)).view(stats.valid.shape)


def _uniform(stats: TokenStats, generator: torch.Generator | None) -> Tensor:
    """U(0, 1) at every position, masked positions too, so that a draw does not depend on the mask."""
    device = stats.valid.device if generator is None else generator.device
    return torch.rand(stats.valid.shape, dtype=torch.float64, device=device, generator=generator).to(stats.valid.device)


SELECTORS: dict[str, Selector] = {
    "teachability": teachability,
    "teachability+entropy": teachability_entropy,
    "teachability-released": Released(),
    "teachability+entropy-released": Released("teachability+entropy"),
    "tip-released": Released("tip"),
    "entropy-released": Released("entropy"),
    "incompatibility": incompatibility,
    "compatibility": compatibility,
    "entropy": entropy,
    "divergence": divergence,
    "divergence-reverse-kl": divergence_reverse_kl,
    "tip": tip,
    "overconfident": overconfident,
    "multinomial": Multinomial(),
    "dial": Dial(),
    "log-ratio": LogRatio(),
    "ratio-variance": RatioVariance(),
    "ier": IER(),
    "random": Random(),
    "all": everything,
    "prefix": Prefix(),
}


def named_selector(selector: str | Selector) -> Selector:
    """The selector with this name; a callable is returned unchanged."""
    if isinstance(selector, str) and selector in SELECTORS:
        return SELECTORS[selector]
    names = ", ".join(SELECTORS)
    if isinstance(selector, type):
        raise TypeError(f"selector: got the class {selector.__name__}, expected an instance of it, or one of: {names}")
    if callable(selector):
        return selector
    if not isinstance(selector, str):
        raise TypeError(f"selector: got {type(selector).__name__}, expected a callable or one of: {names}")
    raise ValueError(f"selector: got {selector!r}, expected a callable or one of: {names}")


def bound_selector(selector: Selector, generator: torch.Generator | None, sequence_ids: Callable[[], Tensor]) -> Selector:
    """The selector, with the call's generator or sequences if it has none."""
    if isinstance(selector, (Multinomial, Random)) and selector.generator is None:
        return replace(selector, generator=generator)
    if isinstance(selector, IER) and callable(selector.base):
        return replace(selector, base=bound_selector(selector.base, generator, sequence_ids))
    if hasattr(selector, "__dataclass_fields__") and getattr(selector, "sequence_ids", sequence_ids) is None:
        return replace(selector, sequence_ids=sequence_ids())  # type: ignore[type-var]
    return selector


def needs_of(selector: Selector) -> frozenset[str]:
    """The optional columns of statistics that the selector reads."""
    return frozenset(getattr(selector, "needs", ()))


def check_needs(rule: Selector) -> None:
    """Refuse a selector or weighting whose `needs` are no columns."""
    checked_needs(getattr(rule, "__name__", type(rule).__name__), getattr(rule, "needs", ()))


def checked_needs(owner: str, needs: object) -> frozenset[str]:
    """The set of the names, if all are columns of `TokenStats`."""
    names = frozenset(needs) if isinstance(needs, Iterable) and not isinstance(needs, str) else None
    if names is None or names - frozenset(TokenStats._fields):
        raise ValueError(f"{owner}.needs: got {shown(needs)}, expected names of columns of TokenStats")
    return names


def is_own(selector: Selector) -> bool:
    """Whether the selector is one of this package."""
    if isinstance(selector, IER) and selector.base is not None:
        return is_own(named_selector(selector.base))
    return isinstance(selector, (Multinomial, Random, Prefix, Released, Dial, LogRatio)) or selector in SELECTORS.values()


def is_deterministic(selector: Selector) -> bool:
    """Whether equal statistics give equal scores. True for this package's that do not draw, False for a user's own."""
    return is_own(selector) and not isinstance(selector, (Multinomial, Random))


def why_no_weights(selector: Selector) -> str | None:
    """Why this selector's scores are no weights of losses; None: they may be, none is negative."""
    reasons = {Multinomial: "are drawn", Random: "are drawn", LogRatio: "may be negative", Prefix: "read no statistic"}
    return "are all 0" if selector is everything else reasons.get(type(selector))


def selection_options(selector: Selector, stats: TokenStats, keep_scores: Tensor | None = None) -> SelectionOptions:
    """The options of `select_positions` that a selector's attributes set, from the statistics that it ranked.

    `keep_scores`: The selector's, where the caller has them; None: they are computed.
    """
    if keep_scores is None and hasattr(selector, "keep_scores"):
        keep_scores = selector.keep_scores(stats)
    return {
        "keep_one_per_sequence": getattr(selector, "keep_one_per_sequence", False),
        "keep_scores": keep_scores,
        "places": stats.response_place if getattr(selector, "ties_by_place", False) else None,
        "both_ends": getattr(selector, "both_ends", False),
    }


WHOLE_ROW = (divergence_reverse_kl, tip, overconfident)  # need a KL over the vocabulary
STUDENT_ONLY = (entropy, everything)  # need no statistic of the teacher; nor do Random and Prefix

# Inputs that do not hold both models' whole rows, and the reason in the error.
PARTLY_KNOWN = {
    "student_stats": "needs the student's whole row, but with student_stats only its log-sum-exp, entropy and top-K are known",
    "TopKLogprobs": "needs the teacher's whole row, but TopKLogprobs knows its top K alone",
    "SampledLogprobs": "needs the teacher's row, but SampledLogprobs knows one token of it",
}


def check_known(selector: Selector, known: str, argument: str = "selector") -> None:
    """Refuse a selector of this file that needs more than the input `known` holds; `known` is a key of PARTLY_KNOWN."""

    def fits(candidate: Selector) -> bool:
        if known == "SampledLogprobs" and candidate in SELECTORS.values():
            return candidate in STUDENT_ONLY or isinstance(candidate, (Random, Prefix, Dial, LogRatio))
        return candidate not in WHOLE_ROW and not needs_of(candidate) & WHOLE_ROW_COLUMNS

    if isinstance(selector, IER) and selector.base is not None:
        check_known(named_selector(selector.base), known, argument)
    named = SELECTORS.get(selector_name(selector), selector)  # an instance with other parameters has the same needs
    if not fits(named):
        can_serve = {name: x for name, x in SELECTORS.items() if argument == "selector" or why_no_weights(x) is None}
        expected = ", ".join(name for name, x in can_serve.items() if fits(x))
        instead = "pass no student_stats" if known == "student_stats" else "pass the teacher's logits or a LinearHead"
        raise ValueError(
            f"{argument}: got {selector_name(selector)!r}, which {PARTLY_KNOWN[known]}; expected one of: {expected}; "
            f"or {instead}"
        )


def check_ranks_twice(selector: Selector) -> None:
    """Refuse a selector that draws if positions are ranked twice: the second draw would differ."""
    if isinstance(selector, (Multinomial, Random)):
        raise ValueError(
            f"selector: got {selector_name(selector)!r}, which draws at random, but score_dtype='float8' ranks twice; "
            "pass score_dtype=None"
        )


def check_whole_sequences(selector: Selector, argument: str = "selector") -> None:
    """Refuse a selector that counts along whole sequences if this rank holds parts of sequences. `argument`: its name."""
    if hasattr(selector, "sequence_ids"):
        raise ValueError(
            f"{argument}: got {type(selector).__name__.lower()!r}, which counts the positions of whole sequences, but with "
            "scope 'sequence' and a selection_group a rank holds parts of them; pass scores of your own by a callable"
        )


def own_name(selector: Selector) -> str | None:
    """The selector's name in SELECTORS; None for a user's own, and with other parameters than the named one has."""
    return next((name for name, candidate in SELECTORS.items() if candidate is selector), None)


def selector_name(selector: Selector) -> str:
    """The selector's name in SELECTORS, also with other parameters; for a user's own selector its class name."""
    for name, candidate in SELECTORS.items():
        has_parameters = isinstance(candidate, (Multinomial, Random, Released, Dial, LogRatio, IER))
        if candidate is selector or (has_parameters and type(candidate) is type(selector)):
            return name
    return type(selector).__name__
