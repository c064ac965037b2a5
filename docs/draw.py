"""The pictures that the documentation draws for itself, as SVG in light and dark colours: images/NAME-light.svg, -dark.svg.

  pipeline       one step of selective on-policy distillation
  five-tokens    the worked example of concepts/teachability.md, from the numbers that the page's own code computes
  architecture   the rooms of the package, and the way of one call through them
  memory         peak memory against the number of positions, from benchmarks/results/scaling.json
  overlap        how far the selectors agree on one batch of SmolLM2, from benchmarks/results/overlap.json

Run: .venv/bin/python -m docs.draw (from the repository's root, after `make docs`)
Not here: the charts of benchmarks (benchmarks/), pictures of pages that a run writes (photograph.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from benchmarks.cpu.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = Path(__file__).parent
STYLE = {
    "svg.hashsalt": "opd_ops",
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "savefig.transparent": True,
}


class Colours(NamedTuple):
    """The colours of one scheme; the background is the page's."""

    ink: str
    quiet: str
    student: str
    teacher: str
    selected: str
    box: str


SCHEMES = {
    "light": Colours("#1c1c1c", "#7a7a7a", "#1f77b4", "#d9730d", "#0f8a5f", "#eef3f2"),
    "dark": Colours("#ececec", "#a0a0a0", "#6db3f2", "#f2a65a", "#4fd1a5", "#263238"),
}


def page_names(page: str) -> dict[str, object]:
    """The variables after running the code blocks of a page."""
    names: dict[str, object] = {}
    for code in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(code, names)
    return names


# --- boxes and arrows ------------------------------------------------------------------------------------------------


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, colours: Colours, edge: str, small: str = "") -> None:
    """A box whose lower left corner is (x, y), with a title and a smaller second text."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=colours.box, edgecolor=edge, linewidth=1.5))
    lines = small.count("\n") + 1 if small else 0
    axes.text(x + w / 2, y + h / 2 + 0.085 * lines, text, ha="center", va="center", color=colours.ink, fontweight="bold")
    if small:
        axes.text(x + w / 2, y + h / 2 - 0.13, small, ha="center", va="center", color=colours.ink, fontsize=8.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, linewidth=1.5, connectionstyle=style)
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def pipeline(colours: Colours) -> Figure:
    figure, axes = canvas(8.0, 3.7)
    box(axes, 0.1, 1.45, 1.5, 0.8, "rollout", colours, colours.student, "the student\nwrites answers")
    box(axes, 2.1, 2.35, 1.6, 0.8, "student", colours, colours.student, "reads its tokens:\nlogits, p")
    box(axes, 2.1, 0.55, 1.6, 0.8, "teacher", colours, colours.teacher, "reads the same\ntokens: q")
    box(axes, 4.2, 1.45, 1.5, 0.8, "score", colours, colours.ink, "every token:\nis it teachable?")
    box(axes, 6.2, 1.45, 1.7, 0.8, "select", colours, colours.selected, "the best 5 %;\nloss on these alone")
    arrow(axes, (1.6, 2.0), (2.1, 2.6), colours.ink)
    arrow(axes, (1.6, 1.7), (2.1, 1.1), colours.ink)
    arrow(axes, (3.7, 2.6), (4.2, 2.0), colours.ink)
    arrow(axes, (3.7, 1.1), (4.2, 1.7), colours.ink)
    arrow(axes, (5.7, 1.85), (6.2, 1.85), colours.ink)
    arrow(axes, (7.05, 2.25), (3.72, 2.95), colours.selected, bend=0.28)
    axes.text(
        5.9, 3.3, "gradient of the selected rows; of all others exactly 0", ha="center", color=colours.selected, fontsize=9
    )
    axes.text(4.0, 0.15, "this library: score, select and the loss; it makes no tensor of tokens × vocabulary", ha="center",
              color=colours.quiet, fontsize=9)  # fmt: skip
    return figure


def five_tokens(colours: Colours) -> Figure:
    names = page_names("concepts/teachability.md")
    written: Sequence[str] = names["written"]  # type: ignore[assignment]
    figure, axes = plt.subplots(3, 5, figsize=(8.0, 5.4), height_ratios=(0.5, 1.5, 1.2))
    figure.subplots_adjust(left=0.09, right=0.99, top=0.94, bottom=0.05, hspace=0.42, wspace=0.75)
    stats, scores, selected = names["stats"], names["scores"], names["selected"]
    disagreement, mass = stats.union_kl.tolist(), stats.support_mass.tolist()  # type: ignore[attr-defined]
    for i, word in enumerate(written):
        says: tuple[Mapping[str, float], Mapping[str, float]] = (names["student_says"][i], names["teacher_says"][i])  # type: ignore[index]
        chosen = bool(selected[i])  # type: ignore[index]
        _token(axes[0, i], word, chosen, colours)
        _probabilities(axes[1, i], says, colours)
        _scores(axes[2, i], (disagreement[i], mass[i], float(scores[i])), max(disagreement), chosen, colours)  # type: ignore[index]
    figure.text(0.09, 0.98, "the student wrote", color=colours.quiet, fontsize=9, va="top")
    figure.text(0.09, 0.775, "probabilities of the likely words:", color=colours.quiet, fontsize=9, va="top")
    figure.text(0.42, 0.775, "student", color=colours.student, fontsize=9, va="top", fontweight="bold")
    figure.text(0.52, 0.775, "teacher", color=colours.teacher, fontsize=9, va="top", fontweight="bold")
    figure.text(0.09, 0.345, "disagreement D, support mass C, and teachability", color=colours.quiet, fontsize=9, va="top")
    return figure


def _token(axes: Axes, word: str, chosen: bool, colours: Colours) -> None:
    axes.axis("off")
    edge = colours.selected if chosen else colours.quiet
    frame = {"boxstyle": "round,pad=0.5", "facecolor": colours.box, "edgecolor": edge, "linewidth": 3 if chosen else 1}
    axes.text(0.4, 0.45, word, ha="center", va="center", color=colours.ink, fontsize=13, bbox=frame, transform=axes.transAxes)
    if chosen:
        axes.text(0.4, -0.32, "selected", ha="center", color=colours.selected, fontsize=9, transform=axes.transAxes)


def _bare(axes: Axes, labels: Sequence[str], colours: Colours) -> None:
    axes.set(yticks=range(len(labels)), yticklabels=labels, xticks=[], xlim=(0, 1))
    axes.tick_params(colors=colours.ink, length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.patch.set_alpha(0)


def _probabilities(axes: Axes, says: tuple[Mapping[str, float], Mapping[str, float]], colours: Colours) -> None:
    """Bars of both models for the words to which one of them gives 4 % or more."""
    words = [word for word in {**says[0], **says[1]} if max(model.get(word, 0) for model in says) >= 0.04]
    for model, colour, shift in zip(says, (colours.student, colours.teacher), (-0.19, 0.19), strict=True):
        values = [model.get(word, 0.0) for word in words]
        axes.barh([k + shift for k in range(len(words))], values, 0.36, color=colour)
    _bare(axes, words, colours)
    axes.set_ylim(3.5, -0.6)


def _scores(axes: Axes, values: tuple[float, float, float], largest: float, chosen: bool, colours: Colours) -> None:
    lengths = (values[0] / largest, values[1], values[2])
    fill = colours.selected if chosen else colours.quiet
    axes.barh(range(3), lengths, 0.6, color=(colours.quiet, colours.quiet, fill))
    for k, (length, value) in enumerate(zip(lengths, values, strict=True)):
        inside = length > 0.7
        axes.text(length - 0.03 if inside else length + 0.03, k, f"{value:.2f}", va="center", ha="right" if inside else "left",
                  fontsize=8, color=colours.box if inside else colours.ink)  # fmt: skip
    _bare(axes, ["D", "C", "score"], colours)


def architecture(colours: Colours) -> Figure:
    figure, axes = canvas(8.0, 4.9)
    box(axes, 0.2, 4.1, 2.3, 0.65, "integrations/", colours, colours.ink, "TRL, HF, verl, NeMo-RL")
    box(axes, 3.0, 4.1, 2.2, 0.65, "loss.py", colours, colours.selected, "selective_opd_loss")
    box(axes, 5.7, 4.1, 2.1, 0.65, "settings.py", colours, colours.ink, "checked once")
    stages = (
        ("prepare", "one Call"),
        ("score", "statistics"),
        ("choose", "budget"),
        ("losses", "per row"),
        ("reduce", "result"),
    )
    for k, (stage, small) in enumerate(stages):
        box(axes, 0.35 + 1.5 * k, 2.75, 1.25, 0.7, stage, colours, colours.selected, small)
        if k:
            arrow(axes, (0.1 + 1.5 * k, 3.1), (0.35 + 1.5 * k, 3.1), colours.selected)
    style = {"fill": False, "linewidth": 1.2, "linestyle": "--", "edgecolor": colours.quiet}
    axes.add_patch(FancyBboxPatch((0.2, 2.6), 7.6, 1.15, boxstyle="round,pad=0,rounding_size=0.08", **style))
    axes.text(7.7, 3.57, "call/", ha="right", color=colours.quiet, fontsize=9)
    arrow(axes, (2.5, 4.42), (3.0, 4.42), colours.ink)
    arrow(axes, (5.2, 4.42), (5.7, 4.42), colours.ink)
    arrow(axes, (3.3, 4.1), (1.4, 3.45), colours.selected)
    for k, (room, small) in enumerate(
        (
            ("inputs/", "heads, lists"),
            ("selection/", "selectors, ties"),
            ("divergences/", "the losses"),
            ("distributed/", "ranks"),
        )
    ):
        box(axes, 0.2 + 1.93 * k, 1.45, 1.8, 0.65, room, colours, colours.ink, small)
    axes.text(0.2, 2.25, "the stages use", color=colours.quiet, fontsize=9)
    for k, (room, small) in enumerate((("eager.py", "specification"), ("streamed/", "any device"), ("triton/", "GPUs"))):
        box(axes, 0.2 + 1.93 * k, 0.3, 1.8, 0.65, room, colours, colours.teacher, small)
    box(axes, 5.99, 0.3, 1.8, 0.65, "opd_kernels", colours, colours.teacher, "device code")
    arrow(axes, (5.86, 0.62), (5.99, 0.62), colours.ink)
    axes.text(0.2, 1.1, "backends/ give statistics (score) and losses with gradients (losses)", color=colours.quiet, fontsize=9)
    return figure


def memory(colours: Colours) -> Figure:
    points = json.loads((DOCS.parent / "benchmarks/results/scaling.json").read_text())["against_n"]
    figure, axes = plt.subplots(figsize=(8.0, 4.2), layout="constrained")
    for place, name in enumerate(dict.fromkeys(point["method"] for point in points)):
        own = [point for point in points if point["method"] == name and point["status"] == "ok"]
        sizes, peaks = [point["n"] for point in own], [point["peak_bytes"] / 2**30 for point in own]
        style = {"color": colours.selected, "linewidth": 3, "zorder": 3} if name == "ours" else {"linewidth": 1.3}
        axes.plot(sizes, peaks, marker="os^Dv<>P"[place], markersize=5, label=METHODS[name].title, **style)
    gradients = sorted({(point["n"], point["gradient_bytes"] / 2**30) for point in points})
    axes.plot(*zip(*gradients, strict=True), color=colours.ink, linestyle=":", label="the gradients asked for")
    axes.set(xlabel="positions N", ylabel="peak memory over the inputs, GiB", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"Forward and backward from hidden states, V = {points[0]['vocab']:,}, fp32, CPU", color=colours.ink)
    axes.grid(alpha=0.25)
    axes.patch.set_alpha(0)
    axes.tick_params(colors=colours.ink)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(colours.ink)
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours.quiet)
    axes.legend(fontsize=9, frameon=False, labelcolor=colours.ink)
    return figure


def overlap(colours: Colours) -> Figure:
    """A matrix for each fraction; its lower half, because it is symmetric. A cell's opacity is the overlap."""
    result = json.loads((DOCS.parent / "benchmarks/results/overlap.json").read_text())
    names = result["selectors"]
    n = len(names) - 1  # rows: all names but the first; columns: all but the last
    figure, panels = plt.subplots(1, 2, figsize=(8.0, 3.9), sharey=True)
    figure.subplots_adjust(left=0.19, right=0.995, top=0.99, bottom=0.29, wspace=0.06)
    for axes, (fraction, matrix) in zip(panels, result["overlaps"].items(), strict=True):
        for row in range(n):
            for column in range(row + 1):
                value = matrix[row + 1][column]
                style = {"facecolor": to_rgba(colours.selected, value), "edgecolor": colours.quiet, "linewidth": 0.4}
                axes.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, **style))
                ink = SCHEMES["light"].ink if value > 0.5 else colours.ink  # a full cell is bright in both schemes
                axes.text(column + 0.5, row + 0.52, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8.5)
        axes.set(xlim=(0, n), ylim=(n, 0), xticks=[k + 0.5 for k in range(n)], yticks=[k + 0.5 for k in range(n)])
        axes.set_xticklabels(names[:-1], rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticklabels(names[1:])
        axes.tick_params(colors=colours.ink, length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        axes.patch.set_alpha(0)
        text = f"{100 * float(fraction):g} % of {result['positions']:,} tokens"
        axes.text(n, 0.5, text, ha="right", va="center", color=colours.ink, fontsize=11, fontweight="bold")
    return figure


PICTURES = {
    "pipeline": pipeline,
    "five-tokens": five_tokens,
    "architecture": architecture,
    "memory": memory,
    "overlap": overlap,
}


def main(folder: Path = DOCS / "images") -> None:
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            for scheme, colours in SCHEMES.items():
                figure = draw(colours)
                figure.savefig(folder / f"{name}-{scheme}.svg", metadata={"Date": None})
                plt.close(figure)


if __name__ == "__main__":
    main()
