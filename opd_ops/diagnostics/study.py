"""`study`: every diagnostic of frozen answers, in one call and as plain numbers.

  gains by selector (fixed_context.py), the regression (regression.py), the quadrants (quadrants.py)
  Source: arXiv 2605.26844 section 3 and appendix C; arXiv 2604.14084 section 3.

Not here: the page that shows them (report.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

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
FRACTIONS = (0.05, 0.03, 0.2)  # the heat maps use the first


@dataclass(frozen=True, eq=False)
class ShownSelection:
    """Scores and selection of the first selector at the first fraction, for the heat maps."""

    selector: str
    fraction: float
    scores: Tensor  # (B, L), -inf where not measured
    selected: Tensor  # (B, L) bool


@dataclass(frozen=True, eq=False)
class Study:
    """The results of `study`. Without a trained student, gains and regression are None."""

    n_contexts: int
    n_prompts: int
    n_positions: int
    n_left_out: int  # valid positions with an infinite KL
    resamples: int
    seed: int
    gains: tuple[SelectorGain, ...] | None
    regression: Regression | None
    regression_refused: str | None  # the reason, if these tokens allow no regression
    quadrants: Quadrants
    shown: ShownSelection

    def to_json(self) -> dict[str, object]:
        """The numbers as dictionaries and lists for `json.dump`; NaN becomes None, and tensors of `shown` are left out."""
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
        resamples: Number of resamples of the prompts, for 95 % intervals; 500 to 1000 in the paper.
        seed: For the resampling and for selectors that draw.
    Returns: `Study`.
    Raises:
        ValueError, TypeError: an unknown selector, a selector whose column `contexts.before` does not have, a fraction out of
            range; with a trained student, fewer than 2 different prompts.
    """
    by_name = named_selectors(selectors)
    if not len(fractions):
        raise ValueError("fractions: got none, expected at least one")
    fractions = [check_fraction(fraction) for fraction in fractions]
    resamples, seed = check_integer("resamples", resamples, least=1), check_integer("seed", seed, least=0)
    gains, regression, refused, weights = None, None, None, None
    if contexts.after_forward_kl is not None:
        weights = draw_weights(contexts.n_clusters, resamples, seed)
        gains = gains_by_selector(contexts, by_name, fractions, weights=weights, seed=seed)
        try:
            regression = regress(contexts, weights=weights)
        except DegenerateError as error:  # the gains are still useful
            refused = str(error)
    name, selector = next(iter(by_name.items()))
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
        shown=ShownSelection(name, fractions[0], scores, selection(contexts, scores, selector, fractions[0])),
    )


def _plain(value: object) -> object:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: _plain(item) for name, item in items if not isinstance(item, Tensor)}
    return value
