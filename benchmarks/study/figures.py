"""The figures of the study's report, as PNG files.

  arms.png             difference of each arm from all tokens, and from random tokens, after the last step
  cost.png             held-out KL against the cost so far, in units of one head's matmul
  fixed_contexts.png   mean gain of each tenth of the tokens by three scores, after two, four and eight steps, in both KLs

Not here: the numbers (arms.py, gains.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.study.arms import Comparison, Row
from benchmarks.study.gains import CURVES, TENTHS, Gains
from benchmarks.study.plan import ARMS, FRACTIONS, SELECTORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHA = 0.05
SURE, UNSURE = "#15803d", "#888888"
HUES = {"forward_kl": "#1f77b4", "reverse_kl": SURE}
DASHES = ("-", "--", ":")


def draw_arms(pairs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A row of dots per arm; green where the adjusted p-value is below 0.05."""
    names = [arm.name for arm in ARMS[1:]]
    places = {name: i for i, name in enumerate(names)}
    with _figure(path, 1, 2 * len(pairs), (5.5 * len(pairs) + 2, 8)) as panels:
        for i, (pair, rows) in enumerate(pairs.items()):
            for panel, kind, title in ((panels[2 * i], "equal_steps", "all"), (panels[2 * i + 1], "random", "random")):
                for row in rows:
                    comparison: Comparison | None = getattr(row, kind)
                    if comparison is not None:
                        _dot(panel, places[row.arm], comparison)
                panel.axvline(0, color="black", lw=0.8)
                panel.set(title=f"{pair}: minus {title} tokens", yticks=range(len(names)), xlabel="nats; below 0: better")
                panel.set_yticklabels(names if i == 0 and kind == "equal_steps" else [], fontsize=8)
                panel.set_ylim(len(names) - 0.5, -0.5)


def _dot(panel: Axes, place: int, comparison: Comparison) -> None:
    interval = comparison.difference.interval
    color = SURE if comparison.adjusted_p < ALPHA else UNSURE
    panel.plot([interval.low, interval.high], [place, place], color=color, lw=2, alpha=0.6)
    panel.plot([interval.value], [place], "o", color=color, ms=4)


def draw_cost(pairs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A panel per pair and fraction."""
    with _figure(path, len(pairs), len(FRACTIONS), (12, 4.5 * len(pairs))) as panels:
        for i, (pair, rows) in enumerate(pairs.items()):
            for j, fraction in enumerate(FRACTIONS):
                panel = panels[len(FRACTIONS) * i + j]
                shown = {"all": "all", **{f"{selector}-{100 * fraction:g}": selector for selector in SELECTORS}}
                for number, row in enumerate(row for row in rows if row.arm in shown):
                    plain = row.arm.partition("-")[0] in ("all", "random")
                    color = "black" if row.arm == "all" else "#888888" if plain else f"C{number % 10}"
                    cost = [row.units * step for step in row.steps]
                    kls = [kl.value for kl in row.kl]
                    panel.plot(cost, kls, marker=".", color=color, ls="--" if plain else "-", label=shown[row.arm])
                panel.set(title=f"{pair}, {fraction:.0%} of the tokens", xlabel="cost, head matmuls over the answers")
                panel.set_ylabel("held-out reverse KL, nats")
                panel.legend(frameon=False, fontsize=7, ncols=2)


def draw_fixed_contexts(pairs: Mapping[str, Sequence[Gains]], path: Path) -> None:
    """A panel per pair and score, a line per measure and number of steps."""
    with _figure(path, len(pairs), len(CURVES), (11, 3.2 * len(pairs))) as panels:
        for i, (pair, gains) in enumerate(pairs.items()):
            for j, score in enumerate(CURVES):
                panel = panels[len(CURVES) * i + j]
                for at in gains:
                    dash = DASHES[sorted({other.step for other in gains}).index(at.step)]
                    label = f"{at.measure.replace('_kl', ' KL')}, {at.step} steps"
                    panel.plot(range(1, TENTHS + 1), at.tenths[score], dash, color=HUES[at.measure], marker=".", label=label)
                panel.axhline(0, color="black", lw=0.6)
                panel.set(title=f"{pair}: {score}", xlabel="tenth of the tokens by the score", ylabel="mean gain, nats")
            panels[len(CURVES) * i].legend(frameon=False, fontsize=7)


@contextmanager
def _figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[list[Axes]]:
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=size, layout="constrained")
    panels: list[Axes] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    yield panels
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
