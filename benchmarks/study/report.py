"""The study's tables and plots from its runs: held-out KL by arm and step, differences between arms, gains on fixed contexts.

  KL of an arm = mean over the held-out tokens of all seeds of KL(teacher || student), nats; intervals: 95 %, bootstrap over
  prompts (the same prompt is one cluster in all seeds), 1,000 resamples; differences are between arms at the same tokens
  gain G = KL before - KL after training on all tokens, mean over what each selector ranks highest before
  (arXiv 2605.26844, section 3 and appendix C; opd_ops/diagnostics/)

Writes study.json, study.md, kl.png, gains.png.
Not here: the runs (run.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cpu.environment import describe_environment
from opd_ops import TokenStats
from opd_ops.diagnostics import Contexts, Study, study
from opd_ops.diagnostics.intervals import Interval, draw_weights, mean_intervals

ROOT = Path(__file__).parents[2]
RESAMPLES = 1000
FRACTIONS = (0.03, 0.05, 0.2)
RANKED = ("teachability", "divergence", "divergence-reverse-kl", "tip", "entropy", "incompatibility", "random")


class Arms(NamedTuple):
    """All runs, aligned: N held-out tokens over all seeds."""

    names: list[str]  # A arms, "all" first
    steps: list[int]  # E evaluations
    kl: Tensor  # (A, E, N) forward KL, nats
    seeds: Tensor  # (N,) number of the run's seed
    clusters: Tensor  # (N,) number of the prompt
    n_trained: dict[str, int]  # tokens trained on, mean over seeds
    cpu_hours: float  # of all runs
    peak_gib: float  # of one process
    plan: dict[str, Any]
    environment: dict[str, Any] | None  # of the runs; None: not kept
    contexts: Contexts  # of the arm "all"


def load(folder: Path) -> Arms:
    """Raises: ValueError: some runs are missing, which are named."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.pt")):
        run = torch.load(path)
        runs.setdefault(run["arm"], {})[run["seed"]] = run
    seeds = sorted({seed for arm_runs in runs.values() for seed in arm_runs})
    missing = [f"{arm} seed {seed}" for arm in runs for seed in seeds if seed not in runs[arm]]
    if missing or "all" not in runs:
        raise ValueError(
            f"{folder}: without {', '.join(missing) or 'the arm all'}; python -m benchmarks.study.run runs what is missing"
        )
    names = ["all", *(name for name in sorted(runs, key=_order) if name != "all")]
    steps = sorted(runs["all"][seeds[0]]["forward_kl"])
    valid = {seed: runs["all"][seed]["before"]["valid"] for seed in seeds}
    arm_runs = [
        torch.stack([torch.cat([runs[name][seed]["forward_kl"][step][valid[seed]] for seed in seeds]) for step in steps])
        for name in names
    ]
    clusters = torch.cat([torch.arange(len(v)).unsqueeze(1).expand(v.shape)[v] for v in valid.values()])
    every = [run for seed_runs in runs.values() for run in seed_runs.values()]
    return Arms(
        names,
        steps,
        torch.stack(arm_runs).double(),
        torch.cat([torch.full((int(v.sum()),), i) for i, v in enumerate(valid.values())]),
        clusters,
        {name: sum(run["n_trained"] for run in runs[name].values()) // len(seeds) for name in names},
        sum(run["cpu_seconds"] for run in every) / 3600,
        max(run["peak_gib"] for run in every),
        every[0]["plan"] | {"seeds": len(seeds)},
        every[0].get("environment"),
        _contexts([runs["all"][seed] for seed in seeds]),
    )


def _order(name: str) -> tuple[float, str]:
    selector, _, fraction = name.partition(" ")
    return (float(fraction.rstrip("%") or 100), selector)


def _contexts(runs: Sequence[dict[str, Any]]) -> Contexts:
    """What the diagnostics read, of the runs that trained on all tokens, one seed after the other."""
    length = max(run["before"]["valid"].shape[1] for run in runs)

    def joined(columns: Sequence[Tensor]) -> Tensor:
        return torch.cat([nn.functional.pad(column, (0, length - column.shape[1])) for column in columns])

    names = [name for name, column in runs[0]["before"].items() if column is not None]
    before = TokenStats(**{name: joined([run["before"][name] for run in runs]) for name in names})
    after = joined([run["forward_kl"][max(run["forward_kl"])] for run in runs])
    texts = [row for run in runs for row in run["tokens"]]
    return Contexts(before, after, texts, [prompt for run in runs for prompt in run["prompts"]])


COLORS = {"all": "#000000", "random": "#888888", "entropy": "#1f77b4", "divergence": "#d97706"}
COLORS |= {"tip": "#7c3aed", "teachability": "#15803d"}


class Row(NamedTuple):
    """One arm at every evaluation, and after the last step."""

    arm: str
    n_trained: int
    kl: list[float]  # at each evaluation
    last: Interval
    by_seed: list[float]  # the last, of each seed
    against_all: list[Interval]  # at each evaluation
    against_random: Interval | None  # of the same fraction
    against_random_first: Interval | None  # the same after the first steps


def rows_of(arms: Arms) -> list[Row]:
    weights = draw_weights(int(arms.clusters.max()) + 1, RESAMPLES, 0)
    everyone = torch.ones(len(arms.clusters), 1, dtype=torch.bool)

    def mean(values: Tensor) -> Interval:
        return mean_intervals(values, everyone, arms.clusters, weights)[0]

    got = []
    for name, kl in zip(arms.names, arms.kl, strict=True):
        selector, _, fraction = name.partition(" ")
        random = f"random {fraction}"
        by_random = selector not in ("all", "random") and random in arms.names
        got.append(
            Row(
                name,
                arms.n_trained[name],
                kl.mean(1).tolist(),
                mean(kl[-1]),
                [kl[-1][arms.seeds == seed].mean().item() for seed in arms.seeds.unique()],
                [mean(kl[i] - arms.kl[0, i]) for i in range(len(arms.steps))],
                *(mean(kl[i] - arms.kl[arms.names.index(random), i]) if by_random else None for i in (-1, 1)),
            )
        )
    return got


def write(runs: Path, out: Path) -> None:
    arms = load(runs)
    rows, gains = rows_of(arms), study(arms.contexts, RANKED, FRACTIONS, RESAMPLES)
    out.mkdir(parents=True, exist_ok=True)
    about = {"report": describe_environment(ROOT), "runs": arms.environment, "plan": arms.plan}
    about |= {"cpu_hours": arms.cpu_hours, "peak_gib": arms.peak_gib}
    numbers = about | {"steps": arms.steps, "arms": [_plain(row) for row in rows], "fixed_context": gains.to_json()}
    (out / "study.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    (out / "study.md").write_text(markdown(arms, rows, gains), encoding="utf-8")
    plot_kl(arms, rows, out / "kl.png")
    plot_gains(gains, out / "gains.png")
    print(f"wrote {out}/study.json, study.md, kl.png, gains.png")


def _plain(row: Row) -> dict[str, Any]:
    got = row._asdict() | {"against_all": [asdict(d) for d in row.against_all]}
    return {name: asdict(value) if isinstance(value, Interval) else value for name, value in got.items()}


def _text(got: Interval | None, digits: int = 3) -> str:
    return "" if got is None else f"{got.value:+.{digits}f} [{got.low:+.{digits}f}, {got.high:+.{digits}f}]"


def markdown(arms: Arms, rows: Sequence[Row], got: Study) -> str:
    plan = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in arms.plan.items())
    lines = [
        "Held-out forward KL(teacher ‖ student) in nats per token, SmolLM2-135M-Instruct, prompt distillation.",
        f"{plan}; {arms.kl.shape[2]:,} held-out tokens; {arms.cpu_hours:.1f} hours of CPU on all cores together, "
        f"{arms.peak_gib:.1f} GiB a process.",
        "Brackets: 95 % intervals by bootstrap over prompts, which say nothing of the spread over seeds. Differences are at",
        "the same tokens; below 0: better.",
        "",
        f"| arm | trained on | {' | '.join(f'step {step}' for step in arms.steps)} | last | by seed | − all | − random "
        f"| − random, step {arms.steps[1]} |",
        "|---" * (len(arms.steps) + 7) + "|",
    ]
    for row in rows:
        cells = [row.arm, f"{row.n_trained:,}", *(f"{kl:.3f}" for kl in row.kl)]
        cells += [f"[{row.last.low:.3f}, {row.last.high:.3f}]", " / ".join(f"{kl:.3f}" for kl in row.by_seed)]
        cells += ["" if row.arm == "all" else _text(row.against_all[-1])]
        cells += [_text(row.against_random), _text(row.against_random_first)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Gains on fixed contexts: KL before − KL after training on all tokens, mean over what each selector ranks highest",
        "before training.",
        "",
        "| selector | " + " | ".join(f"best {fraction:.0%}" for fraction in FRACTIONS) + " |",
        "|---" * (len(FRACTIONS) + 1) + "|",
    ]
    assert got.gains is not None
    lines.append(f"| all tokens | {' | '.join([_text(got.gains[0].gain)] * len(FRACTIONS))} |")
    for name in RANKED:
        cells = [_text(g.gain) for fraction in FRACTIONS for g in got.gains if (g.selector, g.fraction) == (name, fraction)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if got.regression is not None:
        r = got.regression
        lines += [
            "",
            f"Standardised regression of the gain, {r.n_positions:,} tokens: teachability {_text(r.teachability)}, "
            f"incompatibility {_text(r.incompatibility)}, R² {r.r_squared.value:.3f}.",
        ]
    quadrants = "; ".join(
        f"{q.name} ({q.meaning}) {q.share_of_tokens:.0%} of tokens, {q.share_of_kl:.0%} of the KL, gain {_text(q.gain)}"
        for q in got.quadrants.quadrants
    )
    return "\n".join([*lines, "", f"Quadrants: {quadrants}."]) + "\n"


def plot_kl(arms: Arms, rows: Sequence[Row], path: Path) -> None:
    """A column per fraction: held-out KL against steps, and below it the difference from all tokens with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fractions = sorted({name.partition(" ")[2] for name in arms.names if " " in name}, key=lambda text: float(text.rstrip("%")))
    size = {"figsize": (11, 7.5), "layout": "constrained", "height_ratios": (1, 1.3)}
    figure, axes = plt.subplots(2, len(fractions), sharex=True, sharey="row", squeeze=False, **size)
    for column, fraction in enumerate(fractions):
        shown = [row for row in rows if row.arm == "all" or row.arm.endswith(f" {fraction}")]
        for i, row in enumerate(shown):
            selector = row.arm.partition(" ")[0]
            style = {"color": COLORS.get(selector), "ls": "--" if selector in ("all", "random") else "-"}
            axes[0][column].plot(arms.steps, row.kl, marker=".", label=f"{selector} ({row.kl[-1]:.3f})", **style)
            # A little apart, so that the intervals of a step can be told from one another.
            places = [step + 0.14 * (i - len(shown) / 2) for step in arms.steps]
            axes[1][column].plot(places, [d.value for d in row.against_all], marker=".", **style)
            for place, d in zip(places, row.against_all, strict=True):
                axes[1][column].plot([place, place], [d.low, d.high], color=style["color"], lw=1.5, alpha=0.6)
        axes[0][column].set(title=f"trained on {fraction} of the tokens", ylim=(0, None))
        axes[0][column].legend(frameon=False, fontsize=9, title="selector (last)")
        axes[1][column].set(xlabel="steps")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("held-out forward KL, nats per token")
    axes[1][0].set_ylabel("its difference from training on all tokens, nats")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_gains(got: Study, path: Path) -> None:
    """Mean gain of each selector's best tokens, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    assert got.gains is not None
    figure, axes = plt.subplots(1, len(FRACTIONS), sharex=True, sharey=True, figsize=(11, 3.4), layout="constrained")
    for panel, fraction in zip(axes, FRACTIONS, strict=True):
        for i, name in enumerate(RANKED):
            (g,) = [row.gain for row in got.gains if (row.selector, row.fraction) == (name, fraction)]
            panel.plot([g.low, g.high], [i, i], color="#15803d", lw=2, alpha=0.6)
            panel.plot([g.value], [i], "o", color="#15803d")
        panel.axvline(got.gains[0].gain.value, color="black", ls="--", lw=1)
        panel.set(title=f"best {fraction:.0%} of the tokens", yticks=range(len(RANKED)), yticklabels=RANKED)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.supxlabel("mean gain, nats per token (dashed: all tokens)", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
