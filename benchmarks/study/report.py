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
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.study import figures, plan
from benchmarks.study.arms import Comparison, Row, Runs, rows_of
from benchmarks.study.gains import FRACTIONS, RANKED, Gains, gains_of
from benchmarks.study.plan import ARMS, SEEDS, SIZES, Arm, jobs
from benchmarks.study.records import MEASURES, RUNS, Frozen, Run, frozen_name, read, spent_hours
from benchmarks.study.statistics import visible_difference
from opd_ops.diagnostics.intervals import Interval

COMPARED = {
    "all": "− all, equal steps",
    "all_at_equal_units": "− all, equal units",
    "all_at_equal_seconds": "− all, equal CPU seconds",
    "random": "− random",
    "teachability": "− teachability",
}
SAMPLED_ARMS = [arm.name for arm in ARMS if arm.divergence == "sampled"]


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
        f"**{done.n_runs} of {done.n_planned} runs**, {done.cpu_hours:.1f} CPU hours; the pilot and healing the student of "
        f"*shallow* come on top (benchmarks/LOG.md). {_summary(done.missing)}",
        "",
        "KL is the reverse KL(student ‖ teacher) at held-out tokens, nats, which the losses reduce. A difference below 0 means",
        "that the arm's KL is lower. Brackets: 95 % intervals over seeds and prompts together. A star: the p-value is below",
        "0.05, corrected by Holm's rule among all comparisons of the column and pair. A unit is one head's matmul over the",
        "answers; `random` and `prefix` pay 2 units of scoring too, since the library scores in any case. Equations:",
        "benchmarks/study/statistics.py and arms.py.",
        "",
        "After the last step, with the difference from random tokens of the same fraction and loss:",
        "",
        *short_table(rows),
        "",
        "![Difference of every arm from all tokens and from random tokens, with intervals](arms.png)",
        "![Held-out KL against the cost so far, by selector and fraction](cost.png)",
    ]
    if gains:
        lines += ["![Mean gain of each tenth of the tokens by three scores, for both pairs](fixed_contexts.png)"]
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
            *_arms_table(pair_rows),
            "",
            "Compared, after the last step:",
            "",
            *_compared_table([row for row in pair_rows if row.arm not in ("all", *SAMPLED_ARMS)]),
            "",
            "The same with the sampled token's loss. Its arms are compared among themselves, `all-sampled` with `all`:",
            "",
            *_compared_table([row for row in pair_rows if row.arm in SAMPLED_ARMS]),
            "",
            " ".join(_visible(pair_rows, kind) for kind in ("all", "random")),
        ]
        if pair in gains:
            lines += [
                "",
                "Fixed contexts: the gain of training on all tokens, at the tokens that a score ranks highest before training.",
                "Relative: the mean of each token's gain divided by its KL before, ratios cut at their 1 % and 99 % quantiles.",
                "Intervals of gains are percentiles, which are somewhat narrower; nothing is corrected.",
            ]
            for measure in MEASURES:
                lines += _gains_tables([at for at in gains[pair] if at.measure == measure])
        else:
            lines += ["", "No diagnostic on fixed contexts: it needs the arm `all` of two seeds."]
    if done.missing:
        lines += ["", "## Missing runs", "", *_missing(done.missing)]
    return "\n".join(lines) + "\n"


def short_table(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """KL of every selector after the last step: a line per selector, a column per pair, fraction and loss."""
    settings = [*((fraction, "reverse_kl") for fraction in plan.FRACTIONS), (max(plan.FRACTIONS), "sampled")]
    by_arm = {pair: {row.arm: row for row in pair_rows} for pair, pair_rows in rows.items()}
    lines = _head(["selector", *(f"{pair} {_setting(*setting)}" for pair in rows for setting in settings)])
    for selector in ("all", "weights", *plan.SELECTORS):
        cells = [by_arm[pair].get(_arm_of(selector, *setting)) for pair in rows for setting in settings]
        lines.append(_line([f"`{selector}`", *map(_short_cell, cells)]))
    return lines


def _setting(fraction: float, divergence: str) -> str:
    return f"{fraction:.0%}" + (", sampled" if divergence == "sampled" else "")


def _arm_of(selector: str, fraction: float, divergence: str) -> str:
    """The arm's name. "all" and "weights" have no fraction: their line repeats."""
    if selector == "all":
        return Arm(divergence=divergence).name
    if selector == "weights":
        return Arm(weighting="teachability", divergence=divergence).name
    return Arm(selector, fraction, divergence).name


def _short_cell(row: Row | None) -> str:
    if row is None:
        return ""
    compared = row.compared.get("random")
    difference = "" if compared is None else f" ({compared.difference.value:+.3f}{_star(compared)})"
    return f"{row.kl[-1].value:.3f}{difference}"


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
    heads = ["arm", "seeds", "tokens", "units of the loss", "units a step", "CPU s a step", "÷ all"]
    heads += [f"KL, step {step}" for step in rows[0].steps[1:]]
    heads += ["− before", "forward KL", "− before"]
    lines = _head(heads)
    for row in rows:
        cells = [f"`{row.arm}`", str(len(row.seeds)), f"{row.share:.1%}"]
        cells += [f"{row.loss_units:.2f}", f"{row.units:.1f}", f"{row.seconds:.2f}", f"{row.relative_seconds:.3f}"]
        cells += [f"{kl.value:.3f}" for kl in row.kl[1:]]
        cells += [_difference(row, "before"), f"{row.forward_kl[-1].value:.3f}", _difference(row, "forward_before")]
        lines.append(_line(cells))
    return lines


def _compared_table(rows: Sequence[Row]) -> list[str]:
    lines = _head(["arm", *COMPARED.values()])
    return lines + [_line([f"`{row.arm}`", *(_difference(row, kind) for kind in COMPARED)]) for row in rows]


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _visible(rows: Sequence[Row], kind: str) -> str:
    """What the comparisons of a kind could see, from their standard errors."""
    comparisons = [row.compared[kind] for row in rows if kind in row.compared]
    differences = [comparison.difference for comparison in comparisons if not math.isnan(comparison.difference.error)]
    if not differences:
        return f"One seed does not show what a comparison with {kind} tokens can see."
    seen = [visible_difference(difference.error, difference.n_seeds, len(comparisons)) for difference in differences]
    return (
        f"A comparison with {kind} tokens sees a true difference of {median(seen):.3f} nats with power 0.8 (median; largest "
        f"{max(seen):.3f})."
    )


def _difference(row: Row, kind: str) -> str:
    comparison: Comparison | None = row.compared.get(kind)
    if comparison is None:
        return ""
    return _interval(comparison.difference.interval) + _star(comparison)


def _star(comparison: Comparison) -> str:
    return "*" if comparison.adjusted_p < figures.ALPHA else ""


def _interval(interval: Interval) -> str:
    bounds = "" if math.isnan(interval.low) else f" [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"{interval.value:+.3f}{bounds}"


def _gains_tables(gains: Sequence[Gains]) -> list[str]:
    steps = [at.step for at in gains]
    lines = [
        "",
        f"In {gains[0].measure.replace('_kl', ' KL')}, {gains[0].n_tokens:,} tokens:",
        "",
        *_head(["score", "tokens", "KL before", *(f"gain, step {n}" for n in steps), f"relative, step {steps[-1]}"]),
    ]
    by_score = [{(row.selector, row.fraction): row for row in at.by_selector} for at in gains]
    for fraction, name in [(1.0, "all"), *((fraction, name) for fraction in FRACTIONS for name in RANKED)]:
        rows = [selectors[name, fraction] for selectors in by_score]
        cells = [name, f"highest {fraction:.0%}" if name in RANKED else "all", f"{rows[-1].kl_before:.3f}"]
        lines.append(_line([*cells, *(_interval(row.gain) for row in rows), _interval(rows[-1].relative_gain)]))
    lines += ["", *_head(["steps", "coefficient of teachability", "of incompatibility", "R²", "rank correlations of the gain"])]
    for at in gains:
        fit = at.regression
        correlations = ", ".join(f"{name} {value:+.2f}" for name, value in at.correlations.items())
        lines.append(
            _line([str(at.step), *map(_interval, (fit.teachability, fit.incompatibility, fit.r_squared)), correlations])
        )
    return lines


def _numbers(done: Finished, rows: Mapping[str, Sequence[Row]], gains: Mapping[str, Sequence[Gains]]) -> dict[str, object]:
    """Everything that the page says, and the KLs of every run: [evaluation][prompt], sums over the prompt's tokens."""
    every = [run for runs in done.runs.values() for run in runs]
    environments = Counter(json.dumps(run.environment, sort_keys=True) for run in every)
    return {
        "n_runs": done.n_runs,
        "n_planned": done.n_planned,
        "missing": done.missing,
        "cpu_hours": round(done.cpu_hours, 3),
        "peak_gib": max(run.peak_gib for run in every),
        "sizes": {pair: asdict(sizes) for pair, sizes in SIZES.items()},
        "environments": [{"runs": count, **json.loads(environment)} for environment, count in environments.items()],
        "n_tokens": {pair: {seed: frozen.n_tokens for seed, frozen in seeds.items()} for pair, seeds in done.frozen.items()},
        "arms": _rounded({pair: [_row_numbers(row) for row in pair_rows] for pair, pair_rows in rows.items()}),
        "fixed_contexts": _rounded({pair: [asdict(at) for at in pair_gains] for pair, pair_gains in gains.items()}),
        "sums": {
            measure: {
                pair: {f"{run.arm} seed {run.seed}": [_short(sums) for sums in getattr(run, measure)] for run in runs}
                for pair, runs in done.runs.items()
            }
            for measure in MEASURES
        },
    }


def _row_numbers(row: Row) -> dict[str, object]:
    numbers = asdict(row)
    for kind, comparison in row.compared.items():
        numbers["compared"][kind]["interval"] = asdict(comparison.difference.interval)
        numbers["compared"][kind]["p"] = comparison.difference.p_value
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
