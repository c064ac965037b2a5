"""Selectors: statistics to one score per position, one short function per paper equation.

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
  teachability-released   TA's released code: the same on the two top-K lists, with a normaliser, ties and keep-one of its own
  random, all, prefix     controls
  Norm(z) = clip((z - Q.05) / (Q.95 - Q.05 + eps), 0, 1), TA eq. 11, over the valid positions of the whole batch.

A selector is a callable TokenStats -> scores, so a user's own is on the same footing. Attributes say what else it wants:
  needs                    names of optional columns; "response_place" has whole responses scored, masked positions too
  keep_one_per_sequence    True: the best position of a sequence that the budget left empty is added
  keep_scores              TokenStats -> scores: what is best there, instead of the selector's own scores
  ties_by_place            True: equal scores go to the smaller place in its response (the column), across sequences
Over ranks (`over_ranks`) normalisers look at the valid positions of all of them: equal to one process that holds these all.
Everything is computed in fp64 and without looking at a value on the host. Infinite statistics (student or teacher logits
of -inf) stay out of the fit of a normaliser and count as its largest value.
Not here: how many positions are kept and which win a tie (budget.py), quantiles over ranks (distributed/order_statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from opd_ops.arguments import is_traced, real, shown, take_plain
from opd_ops.distributed.order_statistics import order_statistics
from opd_ops.distributed.ranks import Ranks
from opd_ops.selection.budget import SelectionOptions
from opd_ops.selection.stats import TokenStats

Selector = Callable[[TokenStats], Tensor]
EPSILON = 1e-8
ROUNDING_ULPS = 8
RELEASED_RANGE = 1e-12  # TA's released normaliser has no epsilon: a range below this gives 0


# --- normalisers -----------------------------------------------------------------------------------------------------

_ranks: ContextVar[Ranks | None] = ContextVar("ranks", default=None)  # a selector's signature has no room for them


@contextmanager
def over_ranks(ranks: Ranks) -> Iterator[None]:
    """Normalisers called in it look at the positions of all ranks, which must all call them, in one order.

    Each makes one search with two targets a quantile (distributed/order_statistics.py); quantile_norm and released_norm take
    two quantiles, minmax_norm two, or three with `clip`.
    """
    token = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


def _quantiles(z: Tensor, among: Tensor, levels: tuple[float, ...], dtype: torch.dtype) -> list[Tensor]:
    """Linearly interpolated quantiles of z[among], each 0-dim; +inf when nothing is among. `dtype`: what z is made of."""
    ranks = None if is_traced() else _ranks.get()  # which dynamo cannot trace
    if ranks is None:
        return [_quantile(z, among, level) for level in levels]

    def ends(n: Tensor) -> Tensor:  # (1,) -> (1, 2 a level): between which each quantile lies
        return torch.stack([x for level in levels for x in _ends(level, n)], -1)

    exact = torch.float32 if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float64  # short keys, if so
    found = order_statistics(z.flatten().to(exact), among.flatten(), ends, 2 * len(levels), ranks)
    bounds = found.values.double().view(-1, 2, 1)
    return [_between(low, high, level, found.total) for (low, high), level in zip(bounds, levels, strict=True)]


def _ends(level: float, n: Tensor) -> tuple[Tensor, Tensor]:
    """The places in the ascending order of n values that the quantile lies between."""
    place = level * (n - 1).clamp_min(0).double()
    return place.floor().long(), place.ceil().long()


def _between(low: Tensor, high: Tensor, level: float, n: Tensor) -> Tensor:
    """The quantile, 0-dim, from the (1,) values at these places."""
    place = level * (n - 1).clamp_min(0).double()
    return torch.where(low == high, low, torch.lerp(low, high, place - place.floor())).squeeze(0)


def _quantile(z: Tensor, among: Tensor, level: float) -> Tensor:
    """The linearly interpolated quantile of z[among], 0-dim; +inf when nothing is among."""
    ordered = torch.where(among, z, math.inf).flatten().sort().values
    if not len(ordered):
        return z.new_full((), math.inf)
    n = among.sum().view(1)
    low, high = (ordered.gather(0, place) for place in _ends(level, n))
    return _between(low, high, level, n)


def _fit(z: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    z = z.double()
    return z, valid & torch.isfinite(z)


def _rounding(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """The range that a constant in `dtype` may show; a normaliser would blow it up into a ranking."""
    return ROUNDING_ULPS * torch.finfo(dtype).eps * torch.maximum(low.abs(), high.abs())


def quantile_norm(z: Tensor, valid: Tensor, *, epsilon: float = EPSILON) -> Tensor:
    """TA eq. 11: clip((z - Q.05) / (Q.95 - Q.05 + epsilon), 0, 1); a constant z gives 0."""
    dtype = z.dtype
    z, fitted = _fit(z, valid)
    low, high = _quantiles(z, fitted, (0.05, 0.95), dtype)
    rounding = _rounding(low, high, dtype)
    constant = (high - low <= rounding) & ((z - low).abs() <= rounding)
    return _infinite_is_one(z, torch.where(constant, 0.0, (z - low) / (high - low + epsilon)))


def released_norm(z: Tensor, among: Tensor) -> Tensor:
    """The normaliser of TA's released code: no epsilon, 0 where the range is below 1e-12; what is not finite counts as 0."""
    dtype = z.dtype
    z = torch.where(torch.isfinite(z), z, 0).double()
    low, high = _quantiles(z, among, (0.05, 0.95), dtype)
    flat = ~(high - low >= RELEASED_RANGE)  # also where nothing is among: the difference is NaN
    return torch.where(flat, 0.0, (z - low) / torch.where(flat, 1.0, high - low)).clamp(0, 1)


def minmax_norm(z: Tensor, valid: Tensor, *, clip: float | None = None) -> Tensor:
    """TIP section 6: (z - min) / (max - min) after z <- min(z, its `clip` quantile); a constant z gives 0."""
    dtype = z.dtype
    z, fitted = _fit(z, valid)
    low, high, *most = _quantiles(z, fitted, (0.0, 1.0) if clip is None else (0.0, 1.0, clip), dtype)
    if most:
        z, low, high = (torch.minimum(x, most[0]) for x in (z, low, high))
    flat = (high <= low) | (high - low <= _rounding(low, high, dtype))
    return _infinite_is_one(z, torch.where(flat, 0.0, (z - low) / torch.where(flat, 1.0, high - low)))


def _infinite_is_one(z: Tensor, scaled: Tensor) -> Tensor:
    return torch.where(z.isnan(), z, torch.where(z == math.inf, 1.0, scaled.clamp(0, 1)))


def _soft_or(a: Tensor, b: Tensor) -> Tensor:
    return a + b - a * b


# --- statistics to scores --------------------------------------------------------------------------------------------


def teachability(stats: TokenStats) -> Tensor:
    """Norm(D) Norm(C): the teacher disagrees, within what the student already considers (TA eq. 12)."""
    return quantile_norm(stats.union_kl, stats.valid) * quantile_norm(stats.support_mass, stats.valid)


def teachability_entropy(stats: TokenStats) -> Tensor:
    """Soft-or of Norm(H) and teachability (TA eq. 16)."""
    return _soft_or(quantile_norm(stats.student_entropy, stats.valid), teachability(stats))


def incompatibility(stats: TokenStats) -> Tensor:
    """Norm(D) (1 - Norm(C)): disagreement outside the student's support, TA's control (eq. 5)."""
    return quantile_norm(stats.union_kl, stats.valid) * (1 - quantile_norm(stats.support_mass, stats.valid))


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
    h = minmax_norm(stats.student_entropy, stats.valid, clip=0.98)
    return _soft_or(h, minmax_norm(stats.reverse_kl, stats.valid))


def overconfident(stats: TokenStats) -> Tensor:
    """KL(q||p) (1 - h): low entropy, high disagreement (TIP section 7.3, Q3)."""
    confident = 1 - minmax_norm(stats.student_entropy, stats.valid, clip=0.98)
    # An infinite KL(q||p) ranks first, and inf * 0 would be NaN.
    return stats.forward_kl.double().clamp_max(torch.finfo(torch.float32).max) * confident


def everything(stats: TokenStats) -> Tensor:
    """Equal scores: with fraction=1, plain distillation; below, the earliest positions."""
    return torch.zeros_like(stats.student_entropy)


@dataclass(frozen=True)
class TeachabilityReleased:
    """TA's released code (its `dlearn_high`): Norm(D) Norm(C), from the two top-K lists alone.

    D is of the lists, each renormalised; C is the sum of q over S ∩ T. Norm has no epsilon, and is fitted on all positions of
    the responses, masked ones too. After the budget a response that kept none gets its best by soft-or(Norm(H), Norm(D C)), H
    the entropy of the student's renormalised list over the logarithm of its length, D C the product before normalising. Ties
    go to the smaller place in the response, across responses, then to the earlier response.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"released_kl", "topk_entropy", "response_place"})
    keep_one_per_sequence: ClassVar[bool] = True
    ties_by_place: ClassVar[bool] = True

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.released_kl is not None
        assert stats.response_place is not None
        among = stats.response_place > 0
        return released_norm(stats.released_kl, among) * released_norm(stats.overlap_mass, among)

    def keep_scores(self, stats: TokenStats) -> Tensor:
        """The released code's `ca_softor`, by which it keeps one position of every response whatever ranks the others."""
        assert stats.released_kl is not None
        assert stats.topk_entropy is not None
        assert stats.response_place is not None
        among = stats.response_place > 0
        h = released_norm(stats.topk_entropy, among)
        return 1 - (1 - h) * (1 - released_norm(stats.released_kl * stats.overlap_mass, among))  # ties at exactly 1


@dataclass(frozen=True)
class Multinomial:
    """Draws positions without replacement with weight H^alpha JSD^gamma (TIP table 3).

    The scores are log-weights plus Gumbel noise, whose n largest are such a draw; the plain mean over the kept positions,
    without importance weights, is the loss. Constant factors of the weights (1 / ln V, 1 / ln 2) cancel.
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
        # A floor, so that positions of weight 0 come last instead of never: the budget is always met.
        log_h = stats.student_entropy.double().clamp_min(1e-30).log()
        log_j = stats.jsd.double().clamp_min(1e-30).log()
        uniform = _uniform(stats, self.generator)
        return self.alpha * log_h + self.gamma * log_j - (-uniform.clamp(1e-300, 1.0).log()).clamp_min(1e-300).log()


@dataclass(frozen=True)
class Random:
    """Uniform scores, from `generator` or torch's own."""

    generator: torch.Generator | None = None

    def __call__(self, stats: TokenStats) -> Tensor:
        return _uniform(stats, self.generator)


@dataclass(frozen=True)
class Prefix:
    """1 - position / length: the earliest valid positions of every sequence; position counts valid ones only."""

    sequence_ids: Tensor | None = None  # of the mask's shape, not decreasing; None: those of the call, or one sequence in all

    def __call__(self, stats: TokenStats) -> Tensor:
        valid = stats.valid.flatten()
        ids = torch.zeros_like(valid, dtype=torch.long) if self.sequence_ids is None else self.sequence_ids.flatten()
        length = torch.zeros(valid.numel() + 1, dtype=torch.long, device=valid.device).index_add(0, ids, valid.long())
        before = length.cumsum(0) - length  # valid positions of earlier sequences: ids do not decrease
        position = valid.cumsum(0) - 1 - before[ids]
        return (1 - position.double() / length[ids].clamp_min(1)).view(stats.valid.shape)


def _uniform(stats: TokenStats, generator: torch.Generator | None) -> Tensor:
    """U(0, 1) per position, masked ones included, so that a draw does not depend on the mask."""
    device = stats.valid.device if generator is None else generator.device
    return torch.rand(stats.valid.shape, dtype=torch.float64, device=device, generator=generator).to(stats.valid.device)


SELECTORS: dict[str, Selector] = {
    "teachability": teachability,
    "teachability+entropy": teachability_entropy,
    "teachability-released": TeachabilityReleased(),
    "incompatibility": incompatibility,
    "compatibility": compatibility,
    "entropy": entropy,
    "divergence": divergence,
    "divergence-reverse-kl": divergence_reverse_kl,
    "tip": tip,
    "overconfident": overconfident,
    "multinomial": Multinomial(),
    "random": Random(),
    "all": everything,
    "prefix": Prefix(),
}


def named_selector(selector: str | Selector) -> Selector:
    """The selector of that name, or a callable as it is."""
    known = ", ".join(SELECTORS)
    if isinstance(selector, type):
        raise TypeError(f"selector: got the class {selector.__name__}, expected an instance of it, or one of: {known}")
    if callable(selector):
        return selector
    if not isinstance(selector, str):
        raise TypeError(f"selector: got {type(selector).__name__}, expected a callable or one of: {known}")
    if selector not in SELECTORS:
        raise ValueError(f"selector: got {selector!r}, expected a callable or one of: {known}")
    return SELECTORS[selector]


def bound_selector(selector: Selector, generator: torch.Generator | None, sequence_ids: Tensor) -> Selector:
    """The selector with the call's generator and sequences where it has none of its own."""
    if isinstance(selector, (Multinomial, Random)) and selector.generator is None:
        return replace(selector, generator=generator)
    if isinstance(selector, Prefix) and selector.sequence_ids is None:
        return replace(selector, sequence_ids=sequence_ids)
    return selector


def is_own(selector: Selector) -> bool:
    """Whether it is of this file."""
    return isinstance(selector, (Multinomial, Random, Prefix)) or selector in SELECTORS.values()


def is_deterministic(selector: Selector) -> bool:
    """Whether equal statistics give equal scores, as far as is known: of this file's selectors that do not draw."""
    return is_own(selector) and not isinstance(selector, (Multinomial, Random))


def selection_options(selector: Selector, stats: TokenStats) -> SelectionOptions:
    """What a selector's attributes ask of `select_positions`, by the statistics that it ranked; the header lists them."""
    keep_scores = getattr(selector, "keep_scores", None)
    return {
        "keep_one_per_sequence": getattr(selector, "keep_one_per_sequence", False),
        "keep_scores": None if keep_scores is None else keep_scores(stats),
        "places": stats.response_place if getattr(selector, "ties_by_place", False) else None,
    }


WHOLE_ROW = (divergence_reverse_kl, tip, overconfident)  # need a KL over the vocabulary, or below, the JSD
OF_STUDENT = (entropy, everything)  # and the controls: all that a teacher of one token leaves

# What is known of a position instead of both rows, and why that is not enough.
PARTLY_KNOWN = {
    "student_stats": "needs the student's whole row, but with student_stats only its log-sum-exp, entropy and top-K are known",
    "TopKLogprobs": "needs the teacher's whole row, but TopKLogprobs knows its top K alone",
    "SampledLogprobs": "needs the teacher's row, but SampledLogprobs knows one token of it",
}


def check_known(selector: Selector, known: str) -> None:
    """Refuse a selector of this file that needs more than what is `known` (a key of PARTLY_KNOWN)."""

    def fits(candidate: Selector) -> bool:
        if known == "SampledLogprobs" and candidate in SELECTORS.values():
            return candidate in OF_STUDENT or isinstance(candidate, (Random, Prefix))
        return candidate not in WHOLE_ROW and "jsd" not in getattr(candidate, "needs", ())

    of_name = SELECTORS.get(_name(selector), selector)  # an instance with other parameters needs what its class does
    if not fits(of_name):
        expected = ", ".join(name for name, x in SELECTORS.items() if fits(x))
        instead = "pass no student_stats" if known == "student_stats" else "pass the teacher's logits or a LinearHead"
        raise ValueError(
            f"selector: got {_name(selector)!r}, which {PARTLY_KNOWN[known]}; expected one of: {expected}; or {instead}"
        )


def check_ranks_twice(selector: Selector) -> None:
    """Refuse a selector that draws where positions are ranked twice: the second draw would be another one."""
    if isinstance(selector, (Multinomial, Random)):
        raise ValueError(
            f"selector: got {_name(selector)!r}, which draws at random, but score_dtype='float8' ranks twice; "
            "pass score_dtype=None"
        )


def check_whole_sequences(selector: Selector) -> None:
    """Refuse a selector that counts along sequences of which this rank holds parts."""
    if isinstance(selector, Prefix):
        raise ValueError(
            "selector: got 'prefix', which counts the positions of whole sequences, but with scope 'sequence' and a "
            "selection_group a rank holds parts of them; pass scores of your own by a callable"
        )


def _name(selector: Selector) -> str:
    """Its name in SELECTORS, where instances with other parameters have their class's; of the user's own, the class."""
    for name, known in SELECTORS.items():
        if known is selector or (isinstance(known, (Multinomial, Random)) and type(known) is type(selector)):
            return name
    return type(selector).__name__
