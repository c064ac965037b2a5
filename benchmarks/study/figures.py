"""The figures of the study's report, as PNG files.

  arms.png             difference of each arm from all tokens, and from random tokens, after the last step
  cost.png             held-out KL against the cost so far, in units of one head's matmul; the selectors with the exact loss
  fixed_contexts.png   mean gain of each tenth of the tokens by three scores, after two, four and eight steps, in both KLs

Not here: the numbers (arms.py, gains.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.study.arms import Comparison, Row
from benchmarks.study.gains import CURVES, TENTHS, Gains
from benchmarks.study.plan import ARMS, FRACTIONS, SELECTORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHA = 0.05
LOWER, HIGHER, UNSURE = "#15803d", "#c2410c", "#888888"
BASES = {"all": "black", "random": "#888888"}
LINES = [*(f"C{i}" for i in range(10) if i != 7), "#1e1b4b"]  # C7 is the gray of random tokens
LEGEND = "Same fraction, same loss; all-sampled − all. Corrected p below 0.05: green lower KL, orange higher"
HUES = {"forward_kl": "#1f77b4", "reverse_kl": LOWER}
DASHES = ("-", "--", ":")

Sharing = Literal["none", "row"]


def draw_arms(pairs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A row of dots per arm; in colour where the adjusted p-value is below 0.05: green lower KL, orange higher."""
    names = [arm.name for arm in ARMS[1:]]
    with _figure(path, 1, 2 * len(pairs), (5.5 * len(pairs) + 2, 8)) as panels:
        for i, (pair, rows) in enumerate(pairs.items()):
            for panel, kind in zip(panels[2 * i : 2 * i + 2], ("all", "random"), strict=True):
                for row in rows:
                    if kind in row.compared:
                        _dot(panel, names.index(row.arm), row.compared[kind])
                panel.axvline(0, color="black", lw=0.8)
                panel.set(title=f"{pair} − {kind}", yticks=range(len(names)), xlabel="difference in KL, nats")
                panel.set_yticklabels(names if panel is panels[0] else [], fontsize=8)
                panel.set_ylim(len(names) - 0.5, -0.5)
        panels[0].figure.suptitle(LEGEND, fontsize=10)


def _dot(panel: Axes, place: int, comparison: Comparison) -> None:
    interval = comparison.difference.interval
    color = UNSURE if comparison.adjusted_p >= ALPHA else LOWER if interval.value < 0 else HIGHER
    panel.plot([interval.low, interval.high], [place, place], color=color, lw=2, alpha=0.6)
    panel.plot([interval.value], [place], "o", color=color, ms=4)


def draw_cost(pairs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A panel per pair and fraction."""
    others = [selector for selector in SELECTORS if selector not in BASES]
    with _figure(path, len(pairs), len(FRACTIONS), (13, 4.2 * len(pairs))) as panels:
        for i, (pair, rows) in enumerate(pairs.items()):
            for j, fraction in enumerate(FRACTIONS):
                panel = panels[len(FRACTIONS) * i + j]
                shown = {"all": "all", **{f"{selector}-{100 * fraction:g}": selector for selector in SELECTORS}}
                for row in (row for row in rows if row.arm in shown):
                    name = shown[row.arm]
                    color = BASES.get(name) or LINES[others.index(name)]
                    cost = [row.units * step for step in row.steps]
                    kls = [kl.value for kl in row.kl]
                    dash = "--" if name in BASES else ":" if name == "entropy" else "-"  # teachability+entropy covers it at 5 %
                    panel.plot(cost, kls, marker=".", color=color, ls=dash, label=name)
                panel.set(title=f"{pair}, {fraction:.0%} of the tokens", xlabel="cost, units")
                panel.set_ylabel("held-out reverse KL, nats")


def draw_fixed_contexts(pairs: Mapping[str, Sequence[Gains]], path: Path) -> None:
    """A panel per pair and score, a line per measure and number of steps."""
    with _figure(path, len(pairs), len(CURVES), (13, 3.2 * len(pairs)), sharey="row") as panels:
        for i, (pair, gains) in enumerate(pairs.items()):
            for j, score in enumerate(CURVES):
                panel = panels[len(CURVES) * i + j]
                for at in gains:
                    dash = DASHES[sorted({other.step for other in gains}).index(at.step)]
                    label = f"{at.measure.replace('_kl', ' KL')}, {at.step} steps"
                    panel.plot(range(1, TENTHS + 1), at.tenths[score], dash, color=HUES[at.measure], marker=".", label=label)
                panel.axhline(0, color="black", lw=0.6)
                panel.set(title=f"{pair}: {score}", xlabel="tenth of the tokens by the score, highest: 10")
                panel.set_ylabel("mean gain, nats" if j == 0 else "")


@contextmanager
def _figure(path: Path, rows: int, columns: int, size: tuple[float, float], sharey: Sharing = "none") -> Iterator[list[Axes]]:
    """Panels for the caller to fill; the names of their lines, once, stand at the right."""
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=size, layout="constrained")
    panels: list[Axes] = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flatten().tolist()
    yield panels
    lines, names = panels[0].get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, frameon=False, fontsize=9, loc="outside right center")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
