"""The plots of the report, as SVG inside the page: gains by selector, the regression, the quadrant map, distributions.

  Lines and text have the page's own colour, so that they are readable in a light and in a dark scheme. Marks have medium
  lightness; opacity shows density. Text stays text: it can be selected, and has the reader's own font.

Not here: the numbers (study.py), the words around them (report.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING

from torch import Tensor

from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.intervals import Interval
from opd_ops.diagnostics.quadrants import NAMES, Quadrants
from opd_ops.diagnostics.regression import REGRESSORS
from opd_ops.diagnostics.study import Study
from opd_ops.diagnostics.token_heatmap import SIGNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE = "#3b82c4", "#d97706"
TEXT = "#010203"  # a colour that no other element has; `_inline` replaces it by the page's own
LEAST_SHOWN = 1e-4  # nats: the left end of logarithmic axes; smaller values are drawn there
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opd_ops",
    "text.parse_math": False,  # a selector's name is not a formula
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), TEXT),
    "grid.alpha": 0.15,
}


def gains(study: Study) -> str:
    """One panel per fraction: each selector's mean gain with its interval; the mean over all tokens as a dashed line."""
    assert study.gains is not None
    everything, rows = study.gains[0], study.gains[1:]
    fractions = sorted({row.fraction for row in rows})
    names = list(dict.fromkeys(row.selector for row in rows))
    size = (10, 1.4 + 0.3 * len(names))
    with _figure(1, max(1, len(fractions)), size, shares_axes=True) as (figure, axes, out):
        for panel, fraction in zip(axes, fractions, strict=False):
            intervals = {row.selector: row.gain for row in rows if row.fraction == fraction}
            panel.axvline(everything.gain.value, color=TEXT, ls="--", lw=1)
            panel.axvline(0, color=TEXT, lw=0.6, alpha=0.5)
            _points(panel, [intervals[name] for name in names], BLUE)
            panel.set(title=f"best {100 * fraction:g} % of the tokens")
            panel.grid(axis="x")
        axes[0].set_yticks(range(len(names)), [name.translate(SIGNS) for name in names])
        axes[0].invert_yaxis()
        figure.supxlabel(
            f"mean gain, nats per token  (dashed: all tokens, {everything.gain.value:.3f})", color=TEXT, fontsize=10
        )
    return out[0]


def regression(study: Study) -> str:
    """Both standardised coefficients with their intervals."""
    assert study.regression is not None
    with _figure(1, 1, (7, 1.7)) as (_, (panel,), out):
        panel.axvline(0, color=TEXT, lw=0.6, alpha=0.5)
        _points(panel, [study.regression.teachability, study.regression.incompatibility], BLUE)
        panel.set_yticks((0, 1), REGRESSORS)
        panel.set(ylim=(1.6, -0.6), xlabel="standardised coefficient: standard deviations of gain per standard deviation")
        panel.grid(axis="x")
    return out[0]


def quadrant_map(contexts: Contexts, quadrants: Quadrants) -> str:
    """Tokens by student entropy and reverse KL: opacity shows density, lines show the medians, labels name the quadrants."""
    from matplotlib.colors import LinearSegmentedColormap

    columns = (contexts.before.student_entropy, contexts.before.reverse_kl)
    entropy, kl = (column[contexts.measured].double().clamp_min(LEAST_SHOWN) for column in columns)
    with _figure(1, 1, (7.5, 5)) as (figure, (panel,), out):
        shade = LinearSegmentedColormap.from_list("density", [(0.85, 0.47, 0.02, 0.3), (0.85, 0.47, 0.02, 1.0)])
        hexes = panel.hexbin(
            entropy.numpy(),
            kl.numpy(),
            xscale="log",
            yscale="log",
            gridsize=36,
            mincnt=1,
            bins="log",
            cmap=shade,
            linewidths=0,
        )
        bar = figure.colorbar(hexes, ax=panel, label="tokens", aspect=30)
        bar.outline.set_visible(False)
        panel.axvline(max(quadrants.entropy_median, LEAST_SHOWN), color=TEXT, lw=1, ls="--")
        panel.axhline(max(quadrants.kl_median, LEAST_SHOWN), color=TEXT, lw=1, ls="--")
        corners = ((0.99, 0.99), (0.99, 0.02), (0.01, 0.99), (0.01, 0.02))
        for name, (x, y) in zip(NAMES, corners, strict=True):
            ha, va = "right" if x > 0.5 else "left", "top" if y > 0.5 else "bottom"
            panel.text(x, y, name, transform=panel.transAxes, fontsize=13, fontweight="bold", ha=ha, va=va)
        _plain_ticks(panel.xaxis, panel.yaxis, bar.ax.yaxis)
        panel.set(xlabel="student entropy, nats", ylabel="reverse KL(student‖teacher), nats")
    return out[0]


def distributions(contexts: Contexts) -> str:
    """Histograms over tokens: reverse KL, forward KL before and after, support mass, entropies."""
    measured, before = contexts.measured, contexts.before
    forward = [("before", before.forward_kl[measured])]
    if contexts.after_forward_kl is not None:
        forward.append(("after", contexts.after_forward_kl[measured]))
    entropies = [("student", before.student_entropy[measured]), ("teacher", before.teacher_entropy[measured])]
    with _figure(2, 2, (10, 6)) as (_, axes, out):
        _histogram(axes[0], [("", before.reverse_kl[measured])], "reverse KL(student‖teacher), nats", logarithmic=True)
        _histogram(axes[1], forward, "forward KL(teacher‖student), nats", logarithmic=True)
        mass = [("", before.support_mass[measured])]
        _histogram(axes[2], mass, "support mass C, share of the teacher's belief", logarithmic=False)
        _histogram(axes[3], entropies, "entropy, nats", logarithmic=True)
    return out[0]


def _points(panel: Axes, intervals: Sequence[Interval], color: str) -> None:
    """One row per interval: a dot at the value, and a bar between the bounds if they are known."""
    for row, interval in enumerate(intervals):
        panel.plot([interval.low, interval.high], [row, row], color=color, lw=2, solid_capstyle="round", alpha=0.6)
        panel.plot([interval.value], [row], color=color, marker="o", ms=6, ls="none")


def _histogram(panel: Axes, columns: Sequence[tuple[str, Tensor]], label: str, *, logarithmic: bool) -> None:
    import numpy as np

    values = [
        column.double().clamp_min(LEAST_SHOWN).numpy() if logarithmic else column.double().numpy() for _, column in columns
    ]
    largest = max(1e-3, *(float(x.max()) for x in values)) if logarithmic else 1.0
    edges = np.geomspace(LEAST_SHOWN, largest, 41) if logarithmic else np.linspace(0, 1, 41)
    for (name, _), x, color in zip(columns, values, (ORANGE, BLUE), strict=False):
        counts, _ = np.histogram(x.clip(edges[0], edges[-1]), bins=edges)
        panel.stairs(counts, edges, color=color, alpha=0.3, fill=True)
        panel.stairs(counts, edges, color=color, lw=1.6, label=name or None)
        panel.axvline(float(np.median(x)), color=color, ls="--", lw=1.2)
    if logarithmic:
        panel.set_xscale("log")
        _plain_ticks(panel.xaxis)
    if len(columns) > 1:
        panel.legend(frameon=False, loc="upper left")
    panel.set(xlabel=label, ylabel="tokens")
    panel.grid(axis="y")


def _plain_ticks(*axes: Axis) -> None:
    """Write powers of ten as plain numbers: 0.01."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


@contextmanager
def _figure(
    rows: int, columns: int, size: tuple[float, float], *, shares_axes: bool = False
) -> Iterator[tuple[Figure, list[Axes], list[str]]]:
    """A figure, its axes, and a list that gets the SVG at the end of the block."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure  # pyplot would choose a display for the whole process

        figure, out = Figure(figsize=size, layout="constrained"), list[str]()
        panels = figure.subplots(rows, columns, squeeze=False, sharex=shares_axes, sharey=shares_axes)
        axes: list[Axes] = panels.flatten().tolist()
        yield figure, axes, out
        text = StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        out.append(_inline(text.getvalue()))


def _inline(svg: str) -> str:
    """The SVG as an element of the page: without prologue and namespaces, as wide as the page allows, in the page's colour."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)
    width = re.search(r'<svg[^>]*\swidth="([\d.]+)pt"', body)
    assert width is not None
    body = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', rf'\1 style="max-width:{4 / 3 * float(width[1]):.0f}px"', body, count=1)
    body = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r'\1 role="img"', body, count=1)
    return body.replace(TEXT, "currentColor")
