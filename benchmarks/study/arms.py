"""The arms of a pair, compared: held-out reverse KL at equal steps and at equal cost, intervals over seeds and prompts.

  equal steps   difference of two arms after the last step, at the same held-out tokens of the seeds that both have
  equal cost    the same against an arm that was stopped once it had cost as much, linear between its evaluations
  cost of a step, in units of one head's matmul over the answers: 2 + 4 rho for a loss on a share rho of the tokens, 6 for a
  dense one, and the models' own passes: sampling, the teacher's, three times the student's (train.py counts them). The
  sampled token's loss is counted as the exact one.

p-values are corrected by Holm's rule among all comparisons of a pair with the same kind of base.
Forward KL is compared at equal steps alone.
Not here: reading files (report.py), the equations of the intervals (statistics.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.study.plan import ARMS, Arm
from benchmarks.study.records import Run
from benchmarks.study.statistics import Estimate, estimate, holm

MEASURE = "reverse_kl"  # KL(p || q), which all the losses reduce
KINDS = ("equal_steps", "equal_cost", "random", "forward")  # of comparisons, each with its own correction
PASSES = ("sampling", "teacher", "student")
PARTS_OF_A_STEP = ("sampling", "teacher", "student", "loss", "backward", "update")


@dataclass(frozen=True)
class Comparison:
    """An arm minus its base: below 0 the arm is better."""

    base: str
    difference: Estimate
    adjusted_p: float = 1.0


@dataclass(frozen=True)
class Row:
    """One arm. Without a run of the base there is no comparison."""

    arm: str
    seeds: list[int]
    share: float  # of the tokens, trained on
    units: float  # of a step, all passes
    loss_units: float  # of a step's loss
    seconds: float  # of a step, CPU
    steps: list[int]
    kl: list[Estimate]  # reverse KL after each of the steps
    forward_kl: list[Estimate]
    by_seed: list[float]  # the last reverse KL
    equal_steps: Comparison | None  # against all tokens, with the same loss
    equal_cost: Comparison | None
    random: Comparison | None  # against random tokens, of the same fraction and loss
    forward: Comparison | None  # as equal_steps, of forward KL


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

    def mean(self, arm: str, value: str) -> float:
        """The mean over the seeds of a function of a run."""
        runs = self.by_arm[arm].values()
        return sum(_PER_STEP[value](run) for run in runs) / len(runs)


def _share(run: Run) -> float:
    return run.n_trained / run.n_valid


def _loss_units(run: Run) -> float:
    return 2 + 4 * _share(run)


def _units(run: Run) -> float:
    return _loss_units(run) + sum(run.multiply_adds[name] for name in PASSES) / run.multiply_adds["head"]


def _seconds(run: Run) -> float:
    return sum(run.cpu_seconds[name] for name in PARTS_OF_A_STEP) / len(run.losses)


_PER_STEP = {"share": _share, "loss_units": _loss_units, "units": _units, "seconds": _seconds}


def rows_of(runs: Runs) -> list[Row]:
    """The rows of the arms that have a run, in the plan's order."""
    rows = [_row(runs, arm) for arm in ARMS if runs.seeds(arm.name)]
    for kind in KINDS:
        compared = [(i, comparison) for i, row in enumerate(rows) if (comparison := getattr(row, kind)) is not None]
        adjusted = holm([comparison.difference.p_value for _, comparison in compared])
        for (i, comparison), p in zip(compared, adjusted, strict=True):
            rows[i] = replace(rows[i], **{kind: replace(comparison, adjusted_p=p)})
    return rows


def spread_over_seeds(rows: Sequence[Row]) -> float:
    """The standard deviation over seeds of an arm's difference from its base, pooled over arms; NaN with one seed."""
    by_arm = {row.arm: dict(zip(row.seeds, row.by_seed, strict=True)) for row in rows}
    squares, degrees = 0.0, 0
    for row in rows:
        if row.equal_steps is None:
            continue
        base = by_arm[row.equal_steps.base]
        differences = torch.tensor([by_arm[row.arm][seed] - base[seed] for seed in row.seeds if seed in base])
        squares += float((differences - differences.mean()).square().sum())
        degrees += len(differences) - 1
    return math.sqrt(squares / degrees) if degrees else math.nan


def base_of(arm: Arm) -> Arm | None:
    """What an arm is compared with: all tokens by the same loss; the sampled token's loss itself with the exact one."""
    if arm == Arm():
        return None
    return Arm(divergence=arm.divergence) if arm.selector != "all" else Arm()


def random_of(arm: Arm) -> Arm | None:
    """Random tokens of the same fraction, by the same loss."""
    return None if arm.selector in ("all", "random") else replace(arm, selector="random")


def _row(runs: Runs, arm: Arm) -> Row:
    seeds = runs.seeds(arm.name)
    counts, sums, forward = runs.counts(seeds), runs.sums(arm.name, seeds), runs.sums(arm.name, seeds, "forward_kl")
    steps = runs.by_arm[arm.name][seeds[0]].steps
    base = base_of(arm)
    return Row(
        arm=arm.name,
        seeds=seeds,
        **{name: runs.mean(arm.name, name) for name in _PER_STEP},
        steps=steps,
        kl=[estimate(sums[:, i], counts) for i in range(len(steps))],
        forward_kl=[estimate(forward[:, i], counts) for i in range(len(steps))],
        by_seed=(sums[:, -1].sum(1) / counts.sum(1)).tolist(),
        equal_steps=_against(runs, arm, base, float(steps[-1])),
        equal_cost=None if base is None else _at_equal_cost(runs, arm, base, steps[-1]),
        random=_against(runs, arm, random_of(arm), float(steps[-1])),
        forward=_against(runs, arm, base, float(steps[-1]), "forward_kl"),
    )


def _at_equal_cost(runs: Runs, arm: Arm, base: Arm, n_steps: int) -> Comparison | None:
    if not runs.seeds(base.name):
        return None
    afforded = n_steps * runs.mean(arm.name, "units") / runs.mean(base.name, "units")
    return _against(runs, arm, base, min(afforded, n_steps))


def _against(runs: Runs, arm: Arm, base: Arm | None, base_steps: float, measure: str = MEASURE) -> Comparison | None:
    """The arm after its last step against the base after `base_steps`, linear between evaluations."""
    seeds = [] if base is None else runs.seeds(arm.name, base.name)
    if base is None or not seeds:
        return None
    steps = runs.by_arm[base.name][seeds[0]].steps
    later = next(i for i, step in enumerate(steps) if step >= base_steps)
    earlier = max(later - 1, 0)
    part = (base_steps - steps[earlier]) / max(steps[later] - steps[earlier], 1)
    base_sums = runs.sums(base.name, seeds, measure)
    reached = torch.lerp(base_sums[:, earlier], base_sums[:, later], part)
    return Comparison(base.name, estimate(runs.sums(arm.name, seeds, measure)[:, -1] - reached, runs.counts(seeds)))
