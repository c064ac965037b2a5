"""The arms of a pair, compared: held-out KL after the last step, with intervals over seeds and prompts.

  before                   minus the untrained student: what the arm learned; forward_before: the same of forward KL
  all                      minus all tokens by the same loss, after as many steps; the sampled token's loss on all tokens is
                           compared with the exact loss
  all_at_equal_units       minus the same, stopped once it had cost as much in units
  all_at_equal_seconds     the same by measured CPU seconds, the seconds of two arms divided seed by seed
  random, teachability     minus random tokens, minus the best tokens by teachability; same fraction, same loss. The weighting
                           is compared with the larger fraction
  cost of a step, in units of one head's matmul over the answers: 2 + 4 rho for a loss on a share rho of the tokens, 6 for a
  dense one, and the models' own passes: sampling, the teacher's, three times the student's (train.py counts them). The
  sampled token's loss is counted as the exact one.

Between two evaluations log KL is taken as linear in the steps: KL falls along a convex curve.
p-values are corrected by Holm's rule among all comparisons of a pair with the same kind.
Not here: reading files (report.py), the equations of the intervals (statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.study.plan import ARMS, FRACTIONS, Arm
from benchmarks.study.records import Run
from benchmarks.study.statistics import Estimate, estimate, holm

MEASURE = "reverse_kl"  # KL(p || q), which all the losses reduce
KINDS = ("before", "all", "all_at_equal_units", "all_at_equal_seconds", "random", "teachability", "forward_before")
PASSES = ("sampling", "teacher", "student")
PARTS_OF_A_STEP = ("sampling", "teacher", "student", "loss", "backward", "update")


@dataclass(frozen=True)
class Comparison:
    """An arm minus its base: below 0 the arm's KL is lower."""

    base: str
    difference: Estimate
    adjusted_p: float = 1.0


@dataclass
class Row:
    """One arm. A comparison is missing where its base has no run."""

    arm: str
    seeds: list[int]
    share: float  # of the tokens, trained on
    units: float  # of a step, all passes
    loss_units: float  # of a step's loss
    seconds: float  # of a step, CPU
    relative_seconds: float  # of a step, divided by those of all tokens with the same seed and loss; 1 without a base
    steps: list[int]
    kl: list[Estimate]  # reverse KL after each of the steps
    forward_kl: list[Estimate]
    compared: dict[str, Comparison]  # by kind


class Runs:
    """The finished runs of one pair, and the number of held-out tokens of each seed and prompt."""

    def __init__(self, runs: Sequence[Run], n_tokens: Mapping[int, Sequence[int]]) -> None:
        self.by_arm: dict[str, dict[int, Run]] = {}
        for run in runs:
            self.by_arm.setdefault(run.arm, {})[run.seed] = run
        self.n_tokens = n_tokens

    def seeds(self, *arms: str) -> list[int]:
        """The seeds that all these arms have."""
        shared = set.intersection(*(set(self.by_arm.get(arm, {})) for arm in arms))
        return sorted(shared)

    def counts(self, seeds: Sequence[int]) -> Tensor:
        return torch.tensor([self.n_tokens[seed] for seed in seeds], dtype=torch.float64)

    def sums(self, arm: str, seeds: Sequence[int], measure: str = MEASURE) -> Tensor:
        """(S, E, P): KL of the tokens of each prompt at each evaluation."""
        kls = [getattr(self.by_arm[arm][seed], measure) for seed in seeds]
        return torch.tensor(kls, dtype=torch.float64)

    def mean(self, arm: str, quantity: Callable[[Run], float]) -> float:
        """The mean over the arm's seeds."""
        runs = self.by_arm[arm].values()
        return sum(quantity(run) for run in runs) / len(runs)

    def mean_ratio(self, arm: str, base: str, quantity: Callable[[Run], float]) -> float:
        """The mean over the shared seeds of the arm's quantity divided by the base's."""
        seeds = self.seeds(arm, base)
        ratios = [quantity(self.by_arm[arm][seed]) / quantity(self.by_arm[base][seed]) for seed in seeds]
        return sum(ratios) / len(ratios)


def share_of(run: Run) -> float:
    return run.n_trained / run.n_valid


def loss_units_of(run: Run) -> float:
    return 2 + 4 * share_of(run)


def units_of(run: Run) -> float:
    return loss_units_of(run) + sum(run.multiply_adds[name] for name in PASSES) / run.multiply_adds["head"]


def seconds_of(run: Run) -> float:
    return sum(run.cpu_seconds[name] for name in PARTS_OF_A_STEP) / len(run.losses)


def rows_of(runs: Runs) -> list[Row]:
    """The rows of the arms that have a run, in the plan's order."""
    rows = [_row(runs, arm) for arm in ARMS if runs.seeds(arm.name)]
    for kind in KINDS:
        compared = [row.compared[kind] for row in rows if kind in row.compared]
        adjusted = iter(holm([comparison.difference.p_value for comparison in compared]))
        for row in rows:
            if kind in row.compared:
                row.compared[kind] = replace(row.compared[kind], adjusted_p=next(adjusted))
    return rows


def base_of(arm: Arm) -> Arm | None:
    """All tokens by the same loss; for the sampled token's loss on all tokens, the exact loss on them."""
    if arm == Arm():
        return None
    return Arm(divergence=arm.divergence) if arm.selector != "all" else Arm()


def rival_of(arm: Arm, selector: str) -> Arm | None:
    """The arm with another selector, of the same fraction and loss."""
    if arm.selector in ("all", "random", selector):
        return None
    return replace(arm, selector=selector)


def _row(runs: Runs, arm: Arm) -> Row:
    seeds = runs.seeds(arm.name)
    counts, sums, forward = runs.counts(seeds), runs.sums(arm.name, seeds), runs.sums(arm.name, seeds, "forward_kl")
    steps = runs.by_arm[arm.name][seeds[0]].steps
    base = base_of(arm)
    shares_seeds = base is not None and runs.seeds(arm.name, base.name)
    return Row(
        arm=arm.name,
        seeds=seeds,
        share=runs.mean(arm.name, share_of),
        units=runs.mean(arm.name, units_of),
        loss_units=runs.mean(arm.name, loss_units_of),
        seconds=runs.mean(arm.name, seconds_of),
        relative_seconds=runs.mean_ratio(arm.name, base.name, seconds_of) if base is not None and shares_seeds else 1.0,
        steps=steps,
        kl=[estimate(sums[:, i], counts) for i in range(len(steps))],
        forward_kl=[estimate(forward[:, i], counts) for i in range(len(steps))],
        compared=_comparisons(runs, arm, steps[-1]),
    )


def _comparisons(runs: Runs, arm: Arm, n_steps: int) -> dict[str, Comparison]:
    base = base_of(arm)
    teachable = Arm("teachability", max(FRACTIONS)) if arm.weighting is not None else rival_of(arm, "teachability")
    compared = {
        "before": _against(runs, arm, arm, 0),
        "all": _against(runs, arm, base, n_steps),
        "random": _against(runs, arm, rival_of(arm, "random"), n_steps),
        "teachability": _against(runs, arm, teachable, n_steps),
        "forward_before": _against(runs, arm, arm, 0, "forward_kl"),
    }
    if base is not None and runs.seeds(arm.name, base.name):
        for kind, cost in (("all_at_equal_units", units_of), ("all_at_equal_seconds", seconds_of)):
            afforded = n_steps * min(1.0, runs.mean_ratio(arm.name, base.name, cost))
            compared[kind] = _against(runs, arm, base, afforded)
    return {kind: comparison for kind, comparison in compared.items() if comparison is not None}


def _against(runs: Runs, arm: Arm, base: Arm | None, base_steps: float, measure: str = MEASURE) -> Comparison | None:
    """The arm after its last step against the base after `base_steps`, log-linear between evaluations."""
    seeds = [] if base is None else runs.seeds(arm.name, base.name)
    if base is None or not seeds:
        return None
    steps = runs.by_arm[base.name][seeds[0]].steps
    later = next(i for i, step in enumerate(steps) if step >= base_steps)
    earlier = max(later - 1, 0)
    part = (base_steps - steps[earlier]) / max(steps[later] - steps[earlier], 1)
    base_sums = runs.sums(base.name, seeds, measure)
    reached = torch.lerp(base_sums[:, earlier].log(), base_sums[:, later].log(), part).exp()
    return Comparison(base.name, estimate(runs.sums(arm.name, seeds, measure)[:, -1] - reached, runs.counts(seeds)))
