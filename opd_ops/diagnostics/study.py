"""`study`: every diagnostic of some frozen answers, in one call and as plain numbers.

  gains by selector (fixed_context.py), the regression (regression.py), the quadrants (quadrants.py)
  Source: arXiv 2605.26844 section 3 and appendix C; arXiv 2604.14084 section 3.

Not here: the page that shows them (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from opd_ops.arguments import check_integer
from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.fixed_context import SelectorGain, gains_by_selector, named_selectors, scores_of, selection
from opd_ops.diagnostics.intervals import draw_weights
from opd_ops.diagnostics.quadrants import Quadrants, quadrants
from opd_ops.diagnostics.regression import DegenerateError, Regression, regress
from opd_ops.selection.selectors import Selector
from opd_ops.settings import check_fraction

SELECTED = (
    "teachability",
    "teachability+entropy",
    "divergence",
    "tip",
    "entropy",
    "overconfident",
    "incompatibility",
    "random",
)
FRACTIONS = (0.05, 0.03, 0.2)  # the first is what the heat maps outline


@dataclass(frozen=True, eq=False)
class Chosen:
    """The first selector at the first fraction, position by position: what the heat maps show."""

    selector: str
    fraction: float
    scores: Tensor  # (B, L), -inf where not measured
    selected: Tensor  # (B, L) bool


@dataclass(frozen=True, eq=False)
class Study:
    """What `study` found. Gains are None without a trained student, and then the regression too."""

    n_contexts: int
    n_prompts: int
    n_positions: int
    n_left_out: int  # valid positions with an infinite KL
    resamples: int
    seed: int
    gains: tuple[SelectorGain, ...] | None
    regression: Regression | None
    regression_refused: str | None  # why there is none, where the tokens allow none
    quadrants: Quadrants
    chosen: Chosen

    def to_json(self) -> dict[str, Any]:
        """The numbers as dictionaries and lists for `json.dump`, NaN as None; `chosen` without its tensors."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def study(
    contexts: Contexts,
    selectors: Sequence[str] | Mapping[str, Selector] = SELECTED,
    fractions: Sequence[float] = FRACTIONS,
    resamples: int = 1000,
    seed: int = 0,
) -> Study:
    """Gains by selector, regression and quadrants of frozen answers.

    Args:
        selectors: Names of opd_ops/selection/selectors.py, or a mapping from names to callables `TokenStats -> scores`.
        fractions: Shares of the positions, each in (0, 1].
        resamples: Of the prompts, for 95 % intervals; 500 to 1000 in the paper.
        seed: Of the resampling and of selectors that draw.
    Returns: `Study`.
    Raises:
        ValueError, TypeError: an unknown selector, one whose column `contexts.before` lacks, a fraction out of range; with a
            trained student, fewer than 2 different prompts.
    """
    found = named_selectors(selectors)
    if not len(fractions):
        raise ValueError("fractions: got none, expected at least one")
    fractions = [check_fraction(fraction) for fraction in fractions]
    resamples, seed = check_integer("resamples", resamples, least=1), check_integer("seed", seed, least=0)
    gains, regression, refused, weights = None, None, None, None
    if contexts.after_forward_kl is not None:
        weights = draw_weights(contexts.n_clusters, resamples, seed)
        gains = gains_by_selector(contexts, found, fractions, weights=weights, seed=seed)
        try:
            regression = regress(contexts, weights=weights)
        except DegenerateError as error:  # the gains are worth reading all the same
            refused = str(error)
    name, selector = next(iter(found.items()))
    scores = scores_of(contexts, name, selector, seed)
    return Study(
        n_contexts=len(contexts.prompts),
        n_prompts=contexts.n_clusters,
        n_positions=int(contexts.measured.sum()),
        n_left_out=contexts.n_left_out,
        resamples=resamples,
        seed=seed,
        gains=gains,
        regression=regression,
        regression_refused=refused,
        quadrants=quadrants(contexts, weights=weights),
        chosen=Chosen(name, fractions[0], scores, selection(contexts, scores, selector, fractions[0])),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: _plain(item) for name, item in items if not isinstance(item, Tensor)}
    return value
