"""The report of the study, from the runs that are finished: one page, one file of numbers, three figures.

  python -m benchmarks.study.report     writes report.md, report.json, arms.png, cost.png, fixed_contexts.png

It works on a part of the runs and says first how many are missing, and which.
Not here: the runs (run.py), comparisons (arms.py), the diagnostic (gains.py), figures (figures.py); what follows for users
(docs/choose.md).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.study import figures
from benchmarks.study.arms import KINDS, Comparison, Row, Runs, rows_of, spread_over_seeds
from benchmarks.study.gains import FRACTIONS, RANKED, Gains, gains_of
from benchmarks.study.plan import SEEDS, SIZES, Arm, jobs
from benchmarks.study.records import MEASURES, RUNS, Frozen, Run, frozen_name, read, spent_hours
from benchmarks.study.statistics import visible_difference
from opd_ops.diagnostics.intervals import Interval


@dataclass(frozen=True)
class Finished:
    """What is there of the plan."""

    runs: dict[str, list[Run]]  # by pair
    frozen: dict[str, dict[int, Frozen]]  # by pair and seed
    missing: list[str]
    n_planned: int
    cpu_hours: float

    @property
    def n_runs(self) -> int:
        return self.n_planned - len(self.missing)


def finished(folder: Path, n_seeds: int = SEEDS) -> Finished:
    """Raises: ValueError: no run at all."""
    runs: dict[str, list[Run]] = defaultdict(list)
    frozen: dict[str, dict[int, Frozen]] = defaultdict(dict)
    missing, planned = [], list(jobs(n_seeds))
    for job in planned:
        path = folder / job.file_name
        if not path.exists():
            missing.append(path.stem)
            continue
        runs[job.pair].append(read(Run, path))
        frozen[job.pair].setdefault(job.seed, read(Frozen, folder / frozen_name(job.pair, job.seed)))
    if len(missing) == len(planned):
        raise ValueError(f"runs: got none in {folder}; python -m benchmarks.study.run makes them")
    return Finished(dict(runs), dict(frozen), missing, len(planned), spent_hours(folder))


def write(folder: Path, out: Path, n_seeds: int = SEEDS) -> None:
    """The files of the report."""
    done = finished(folder, n_seeds)
    rows = {
        pair: rows_of(Runs(runs, {seed: frozen.n_tokens for seed, frozen in done.frozen[pair].items()}))
        for pair, runs in done.runs.items()
    }
    gains = {}
    for pair, runs in done.runs.items():
        everything = {run.seed: run for run in runs if run.arm == Arm().name}
        if len(everything) > 1:  # one seed allows no interval
            gains[pair] = gains_of(done.frozen[pair], everything)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(_numbers(done, rows, gains), separators=(",", ":")) + "\n", encoding="utf-8")
    (out / "report.md").write_text(page(done, rows, gains), encoding="utf-8")
    figures.draw_arms(rows, out / "arms.png")
    figures.draw_cost(rows, out / "cost.png")
    if gains:
        figures.draw_fixed_contexts(gains, out / "fixed_contexts.png")
    print(f"{done.n_runs} of {done.n_planned} runs: see {out / 'report.md'}")


def page(done: Finished, rows: Mapping[str, Sequence[Row]], gains: Mapping[str, Sequence[Gains]]) -> str:
    """The page, in Markdown."""
    lines = [
        "# What selecting does to SmolLM2-135M: the numbers",
        "",
        f"**{done.n_runs} of {done.n_planned} runs**, {done.cpu_hours:.1f} CPU hours. {_summary(done.missing)}",
        "",
        "KL is the reverse KL(student ‖ teacher) at held-out tokens, nats, which the losses reduce. Below 0: better.",
        "Brackets: 95 % intervals over seeds and prompts together. A star: the p-value, corrected by Holm's rule among all",
        "comparisons of the column, is below 0.05. A unit is one head's matmul over the answers. Equations:",
        "benchmarks/study/statistics.py and arms.py.",
        "",
        "![Difference of every arm from all tokens and from random tokens, with intervals](arms.png)",
        "![Held-out KL against the cost so far, by selector and fraction](cost.png)",
    ]
    for pair, pair_rows in rows.items():
        sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(SIZES[pair]).items())
        start = pair_rows[0]
        n_tokens = sum(sum(frozen.n_tokens) for frozen in done.frozen[pair].values())
        lines += [
            "",
            f"## {pair}",
            "",
            f"{sizes}; {n_tokens:,} held-out tokens; "
            f"before training KL {start.kl[0].value:.3f}, forward KL {start.forward_kl[0].value:.3f}.",
            "",
        ]
        lines += [*_arms_table(pair_rows), "", _what_is_seen(pair_rows)]
        if pair in gains:
            lines += ["", "![Mean gain of each tenth of the tokens by three scores](fixed_contexts.png)"]
            for measure in MEASURES:
                lines += _gains_tables([at for at in gains[pair] if at.measure == measure])
        else:
            lines += ["", "No diagnostic on fixed contexts: it needs the arm `all` of two seeds."]
    if done.missing:
        lines += ["", "## Missing runs", "", *_missing(done.missing)]
    return "\n".join(lines) + "\n"


def _summary(missing: Sequence[str]) -> str:
    return f"{len(missing)} are missing: the last section names them." if missing else "No run of the plan is missing."


def _missing(names: Sequence[str]) -> list[str]:
    """A line per arm with the seeds that it lacks."""
    by_arm: dict[str, list[str]] = defaultdict(list)
    for name in names:
        arm, _, seed = name.rpartition("-seed")
        by_arm[arm].append(seed)
    return [f"* {arm}: seeds {', '.join(seeds)}" for arm, seeds in by_arm.items()]


def _arms_table(rows: Sequence[Row]) -> list[str]:
    heads = ["arm", "seeds", "tokens", "units of the loss", "units a step", "CPU s a step"]
    heads += [f"KL, step {step}" for step in rows[0].steps[1:]]
    heads += ["− all, equal steps", "− all, equal cost", "− random", "forward KL", "forward KL − all"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"`{row.arm}`", str(len(row.seeds)), f"{row.share:.1%}"]
        cells += [f"{row.loss_units:.2f}", f"{row.units:.1f}", f"{row.seconds:.2f}"]
        cells += [f"{kl.value:.3f}" for kl in row.kl[1:]]
        cells += [_difference(comparison) for comparison in (row.equal_steps, row.equal_cost, row.random)]
        cells += [f"{row.forward_kl[-1].value:.3f}", _difference(row.forward)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _what_is_seen(rows: Sequence[Row]) -> str:
    spread = spread_over_seeds(rows)
    n_seeds = max(len(row.seeds) for row in rows)
    if math.isnan(spread):
        return "One seed does not show the spread over seeds."
    n_comparisons = sum(row.equal_steps is not None for row in rows)
    seen = visible_difference(spread, n_seeds, n_comparisons)
    return (
        f"Differences from all tokens spread over seeds by {spread:.4f} nats (pooled). With {n_seeds} seeds and "
        f"{n_comparisons} comparisons a true difference of {seen:.3f} nats is seen with power 0.8, prompts apart."
    )


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    star = "*" if comparison.adjusted_p < figures.ALPHA else ""
    return _interval(comparison.difference.interval) + star


def _interval(interval: Interval) -> str:
    bounds = "" if math.isnan(interval.low) else f" [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"{interval.value:+.3f}{bounds}"


def _gains_tables(gains: Sequence[Gains]) -> list[str]:
    lines = [
        "",
        f"Fixed contexts: gain in {gains[0].measure.replace('_kl', ' KL')} of training on all tokens, "
        f"{gains[0].n_tokens:,} tokens, mean over what a score ranks "
        "highest before training.",
        "",
        "| score | " + " | ".join(f"best {fraction:.0%}, {at.step} steps" for at in gains for fraction in FRACTIONS) + " |",
        "|---" * (1 + len(FRACTIONS) * len(gains)) + "|",
    ]
    for name in ("all", *RANKED):
        cells = []
        for at in gains:
            by_fraction = {gain.fraction: gain.gain for gain in at.by_selector if gain.selector == name}
            cells += [_interval(by_fraction.get(fraction, at.by_selector[0].gain)) for fraction in FRACTIONS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| steps | coefficient of teachability | of incompatibility | R² | rank correlations of the gain |",
        "|---" * 5 + "|",
    ]
    for at in gains:
        fit = at.regression
        correlations = ", ".join(f"{name} {value:+.2f}" for name, value in at.correlations.items())
        cells = [_interval(x) for x in (fit.teachability, fit.incompatibility, fit.r_squared)]
        lines.append(f"| {at.step} | {' | '.join(cells)} | {correlations} |")
    return lines


def _numbers(done: Finished, rows: Mapping[str, Sequence[Row]], gains: Mapping[str, Sequence[Gains]]) -> dict[str, object]:
    """Everything that the page says, and the mean KL of every run and prompt."""
    every = [run for runs in done.runs.values() for run in runs]
    return {
        "n_runs": done.n_runs,
        "n_planned": done.n_planned,
        "missing": done.missing,
        "cpu_hours": round(done.cpu_hours, 3),
        "peak_gib": max(run.peak_gib for run in every),
        "sizes": {pair: asdict(sizes) for pair, sizes in SIZES.items()},
        "environment": every[0].environment,
        "n_tokens": {pair: {seed: frozen.n_tokens for seed, frozen in seeds.items()} for pair, seeds in done.frozen.items()},
        "arms": _rounded({pair: [_row(row) for row in pair_rows] for pair, pair_rows in rows.items()}),
        "fixed_contexts": _rounded({pair: [asdict(at) for at in pair_gains] for pair, pair_gains in gains.items()}),
        "sums_of_reverse_kl": {
            pair: {f"{run.arm} seed {run.seed}": [_short(x) for x in run.reverse_kl[1:]] for run in runs}
            for pair, runs in done.runs.items()
        },
    }


def _row(row: Row) -> dict[str, object]:
    numbers = asdict(row)
    for kind in KINDS:
        comparison: Comparison | None = getattr(row, kind)
        if comparison is not None:
            numbers[kind]["interval"] = asdict(comparison.difference.interval)
            numbers[kind]["p"] = comparison.difference.p_value
    return numbers


def _short(sums: Sequence[float]) -> list[float]:
    return [round(x, 2) for x in sums]


def _rounded(value: object) -> object:
    """The same with five digits; NaN becomes None."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.report", description="The report of the finished runs.")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of the runs' files")
    parser.add_argument("--out", type=Path, default=RUNS.parent, help="where the report goes")
    options = parser.parse_args(arguments)
    write(options.runs, options.out)


if __name__ == "__main__":
    main()
