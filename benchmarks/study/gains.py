"""The fixed-context diagnostic: gains of training on all tokens, at frozen answers, against what each score said before.

  G = KL(q || p_before) - KL(q || p_after), p_after after two, four and eight steps        (arXiv 2605.26844 section 3)
  and the same of KL(p || q), which the losses reduce
  mean G of the tokens that a selector ranks highest; the paper's regression of G on teachability and incompatibility;
  mean G of each tenth of the tokens by teachability, divergence and incompatibility; rank correlations of G with them

Intervals are percentiles over resamples of seeds and prompts together (statistics.py). The selection is made once, on the
answers of all seeds. Left out: teachability-released and dial, which need columns that are not kept; teachability+entropy,
which gives the highest score, 1, to the 5 % of highest entropy, all alike; random tokens, whose expected gain is that of all.
Not here: the diagnostics' equations (opd_ops/diagnostics/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.study.records import MEASURES, Frozen, Run, from_integers, stats_of
from benchmarks.study.statistics import draw_resamples
from opd_ops import TokenStats
from opd_ops.diagnostics import Contexts, Regression, SelectorGain
from opd_ops.diagnostics.fixed_context import gain, gains_by_selector, named_selectors
from opd_ops.diagnostics.regression import regress
from opd_ops.selection.selectors import SELECTORS

RANKED = (
    "teachability",
    "incompatibility",
    "divergence",
    "divergence-reverse-kl",
    "tip",
    "entropy",
)
FRACTIONS = (0.03, 0.05, 0.2)  # the first is the paper's
CURVES = ("teachability", "divergence", "incompatibility")
TENTHS = 10


@dataclass(frozen=True)
class Gains:
    """The diagnostic after one number of steps, in one measure."""

    measure: str
    step: int
    n_tokens: int
    by_selector: tuple[SelectorGain, ...]
    regression: Regression
    tenths: dict[str, list[float]]  # score -> mean gain of each tenth of the tokens, lowest score first
    correlations: dict[str, float]  # score -> rank correlation with the gain


def gains_of(frozen: Mapping[int, Frozen], runs: Mapping[int, Run]) -> list[Gains]:
    """The diagnostic at every evaluation of the arm "all"; by seed, at least two of them."""
    seeds = sorted(frozen.keys() & runs.keys())
    pairs = [(frozen[seed], runs[seed]) for seed in seeds]
    return [_gains_at(measure, step, pairs) for measure in MEASURES for step in runs[seeds[0]].steps[1:]]


def _gains_at(measure: str, step: int, pairs: list[tuple[Frozen, Run]]) -> Gains:
    contexts = contexts_at(measure, step, pairs)
    weights = draw_resamples(len(pairs), len(pairs[0][0].n_tokens)).cells
    gains = gain(contexts)
    scores = {name: SELECTORS[name](contexts.stats)[contexts.measured] for name in CURVES}
    return Gains(
        measure,
        step,
        len(gains),
        gains_by_selector(contexts, named_selectors(RANKED), FRACTIONS, weights=weights, seed=0),
        regress(contexts, weights=weights),
        {
            name: [float(part.mean()) for part in gains[column.argsort()].tensor_split(TENTHS)]
            for name, column in scores.items()
        },
        {name: _rank_correlation(column, gains) for name, column in scores.items()},
    )


def contexts_at(measure: str, step: int, pairs: list[tuple[Frozen, Run]]) -> Contexts:
    """The answers of all seeds, one after the other; each answer is a cluster."""
    before = [stats_of(frozen) for frozen, _ in pairs]
    after = []
    for stats, (_, run) in zip(before, pairs, strict=True):
        assert run.after is not None
        after.append(from_integers(run.after[measure][str(step)], stats.valid))
    length = max(stats.valid.shape[1] for stats in before)
    names = [name for name, column in before[0]._asdict().items() if column is not None]
    joined = TokenStats(**{name: _stacked([getattr(stats, name) for stats in before], length) for name in names})
    n_answers = len(joined.valid)
    # The diagnostics read a gain from the columns of forward KL. No score of RANKED does.
    joined = joined._replace(forward_kl=getattr(joined, measure))
    no_texts = [[""] * length] * n_answers  # no diagnostic here shows tokens
    return Contexts(joined, _stacked(after, length), no_texts, [""] * n_answers, torch.arange(n_answers))


def _stacked(columns: list[Tensor], length: int) -> Tensor:
    return torch.cat([nn.functional.pad(column, (0, length - column.shape[1])) for column in columns])


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([column.argsort(stable=True).argsort().double() for column in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
