"""What a comparison leaves behind: compare.json (everything), compare.md (tables), compare.png (time and memory).

  to floor = median seconds / the floor's;   to eager = median seconds / eager's;   above gradients = median peak - gradients
  Targets (heads in, fp32, 5 % selected): ours <= 1.35 floors, <= 0.7 eagers, <= 160 MiB above the gradients at 64 MiB, and
  that in the first call of a process too, whose peak has the matmul library's buffers in it.
  cores = processor seconds / seconds: well below the threads where something else ran, and then ratios mean little.

Not here: how anything was measured (measure.py), the order of the processes (compare.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MIB = 2**20
MOST_FLOORS, MOST_EAGERS, MOST_MIB_ABOVE_GRADIENTS, TARGET_WORKSPACE_MIB = 1.35, 0.7, 160, 64
UNDISTURBED = 0.85  # of the threads' time; methods of one process on a quiet machine have 0.92 or more
OURS_COLOUR, PEER_COLOUR, GRADIENT_COLOUR = "#c2410c", "#64748b", "#cbd5e1"


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """Add medians, spread and ratios to every method that was measured, and the targets."""
    methods, gradients = result["methods"], result["sizes"]["gradient_bytes"]
    for name, entry in methods.items():
        if entry["status"] == "ok":
            entry["summary"] = _summary(entry["rounds"], 0 if name == "floor" else gradients)
    for entry in methods.values():
        for other in ("floor", "eager"):
            base = methods.get(other, {}).get("summary")
            if base and "summary" in entry:
                entry["summary"][f"to_{other}"] = entry["summary"]["seconds"] / base["seconds"]
    return result | {"targets": _targets(result)}


def _summary(rounds: list[dict[str, Any]], gradient_bytes: int) -> dict[str, float]:
    seconds = [r["seconds"] for r in rounds]
    peaks = [r["peak_bytes"] / MIB for r in rounds]
    return {
        "seconds": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_mib": median(peaks),
        "peak_mib_max": max(peaks),
        "gradient_mib": gradient_bytes / MIB,
        "above_gradients_mib": median(peaks) - gradient_bytes / MIB,
        "above_gradients_mib_worst": max(map(_largest_peak, rounds)) / MIB - gradient_bytes / MIB,
        "retained_mib": median(r["retained_bytes"] / MIB for r in rounds),
        "waiting_mib": median((r["waiting_bytes"] or 0) / MIB for r in rounds),
        "cores": median(r["cpu_seconds"] / r["seconds"] for r in rounds),
    }


def _largest_peak(run: dict[str, Any]) -> float:
    """Of both calls of a process, in bytes."""
    return max(run["peak_bytes"], run["first_call_peak_bytes"])


def _targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with what was measured; memory only with the workspace that it was set for."""
    summary = result["methods"].get("ours", {}).get("summary", {})
    targets = [
        ("time / two score matmuls", summary.get("to_floor"), MOST_FLOORS),
        ("time / eager", summary.get("to_eager"), MOST_EAGERS),
    ]
    if result["settings"]["workspace_mib"] == TARGET_WORKSPACE_MIB:
        n = result["sizes"]["n"]
        above = summary.get("above_gradients_mib_worst")
        targets.append((f"MiB above gradients, either call, N = {n}", above, MOST_MIB_ABOVE_GRADIENTS))
        for at in result["against_n"]:
            above = (_largest_peak(at) - at["gradient_bytes"]) / MIB if at["status"] == "ok" else None
            targets.append((f"MiB above gradients, either call, N = {at['n']}", above, MOST_MIB_ABOVE_GRADIENTS))
    return [
        {"what": what, "measured": measured, "most": most, "met": measured is not None and measured <= most}
        for what, measured, most in targets
    ]


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"compare.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    paths[1].write_text(markdown(result))
    picture(result, paths[2])
    return paths


# --- Markdown --------------------------------------------------------------------------------------------------------

HEADINGS = (
    "method",
    "seconds, median [min–max]",
    "to floor",
    "to eager",
    "peak MiB over inputs",
    "above gradients",
    "matmul units",
    "what it trains on",
)


def markdown(result: dict[str, Any]) -> str:
    sizes, settings = result["sizes"], result["settings"]
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in result["versions"].items())
    changed = " with uncommitted changes" if result["uncommitted_changes"] else ""
    lines = [
        f"`{result['command']}`",
        "",
        f"N = {sizes['n']:,}, V = {sizes['vocab']:,}, hidden sizes {sizes['student_dim']} (student) and "
        f"{sizes['teacher_dim']} (teacher), fp32, {settings['fraction']:.3g} of the positions, "
        f"{settings['rounds']} interleaved rounds, workspace {settings['workspace_mib']} MiB. {result['cpu']}, "
        f"{result['threads']} threads. {result['date']}, "
        f"commit {result['commit'][:12]}{changed}. {versions}.",
        "",
        *_table(HEADINGS, [_row(entry) for entry in result["methods"].values()]),
        "",
        f"One unit is one matmul of 2·N·V·{sizes['student_dim']} FLOP; both heads once are {sizes['score_units']:.2f}. The "
        f"gradients that the caller asks for take {sizes['gradient_bytes'] / MIB:.0f} MiB. Memory is resident memory above the "
        "process with its inputs, in a second call that finds no free memory of the first's; times are of a third.",
        *_remarks(result),
        "",
        *_table(("target for ours", "at most", "measured", ""), [_target_row(target) for target in result["targets"]]),
    ]
    if result["against_n"]:
        rows = [_against_n_row(at) for at in result["against_n"]]
        lines += ["", *_table(("ours at N", "seconds", "peak MiB over inputs", "above gradients"), rows)]
    return "\n".join(lines) + "\n"


def _remarks(result: dict[str, Any]) -> list[str]:
    """What calls left resident, and which methods did not have the machine to themselves."""
    measured = [entry for entry in result["methods"].values() if "summary" in entry]
    if not measured:
        return []
    kept = ", ".join(f"{entry['title']} {entry['summary']['retained_mib']:.0f}" for entry in measured)
    lines = ["", f"MiB that the first call left resident for good (buffers, imports, compiled code): {kept}."]
    waiting = [
        f"{entry['title']} {entry['summary']['waiting_mib']:.0f}" for entry in measured if entry["summary"]["waiting_mib"] >= 1
    ]
    if waiting:
        lines += ["", f"MiB of freed memory that wait for the next call, and that the kernel may take: {', '.join(waiting)}."]
    short = [entry for entry in measured if entry["summary"]["cores"] < UNDISTURBED * result["threads"]]
    if short:
        cores = ", ".join(f"{entry['title']} {entry['summary']['cores']:.2f}" for entry in short)
        lines += [
            "",
            f"Cores in use were fewer than {result['threads']} threads need; other work ran, or one thread did: {cores}.",
        ]
    return lines


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [_cells(headings), _cells(("---",) * len(headings)), *map(_cells, rows)]


def _cells(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    if "summary" not in entry:
        return entry["title"], f"{entry['status']}: {entry['error']}", *("–",) * 5, entry["computes"]
    summary = entry["summary"]
    return (
        entry["title"],
        f"{summary['seconds']:.2f} [{summary['seconds_min']:.2f}–{summary['seconds_max']:.2f}]",
        _ratio(summary, "to_floor"),
        _ratio(summary, "to_eager"),
        f"{summary['peak_mib']:.0f}",
        f"{summary['above_gradients_mib']:.0f}" if summary["gradient_mib"] else "–",
        f"{entry['units']:.2f}",
        entry["computes"],
    )


def _ratio(summary: dict[str, float], key: str) -> str:
    return f"{summary[key]:.2f}" if key in summary else "–"


def _target_row(target: dict[str, Any]) -> tuple[str, ...]:
    measured = target["measured"]
    if measured is None:
        return target["what"], f"{target['most']}", "–", "not measured"
    return target["what"], f"{target['most']}", f"{measured:.4g}", "met" if target["met"] else "missed"


def _against_n_row(at: dict[str, Any]) -> tuple[str, ...]:
    if at["status"] != "ok":
        return f"{at['n']:,}", f"{at['status']}: {at['error']}", "–", "–"
    peak = at["peak_bytes"] / MIB
    return f"{at['n']:,}", f"{at['seconds']:.2f}", f"{peak:.0f}", f"{peak - at['gradient_bytes'] / MIB:.0f}"


# --- picture ---------------------------------------------------------------------------------------------------------


def picture(result: dict[str, Any], path: Path) -> None:
    """Two panels of horizontal bars, methods in the order of the table from the top; a row without figures says why."""
    names = list(result["methods"])
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, 1.6 + 0.42 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        entry, colour = result["methods"][name], OURS_COLOUR if name == "ours" else PEER_COLOUR
        if "summary" not in entry:
            left.text(0.01, place, f" {entry['status']}", va="center", color=PEER_COLOUR, transform=left.get_yaxis_transform())
            continue
        _time_bar(left, place, entry["summary"], colour)
        _memory_bar(right, place, entry["summary"], colour)
    floor = result["methods"].get("floor", {}).get("summary")
    if floor:
        left.axvline(floor["seconds"], color="black", linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(names)), [result["methods"][name]["title"] for name in names])
    left.invert_yaxis()
    left.set_xlabel("seconds, forward and backward (median; line: min to max)")
    right.set_xlabel("peak MiB over the inputs (pale: the gradients asked for)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
    sizes = result["sizes"]
    figure.suptitle(
        f"N = {sizes['n']:,}, V = {sizes['vocab']:,}, hidden {sizes['student_dim']} and {sizes['teacher_dim']}, fp32, "
        f"{100 * result['settings']['fraction']:.3g} % selected, {result['threads']} CPU threads",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _time_bar(axes: Axes, place: int, summary: dict[str, float], colour: str) -> None:
    spread = [[summary["seconds"] - summary["seconds_min"]], [summary["seconds_max"] - summary["seconds"]]]
    axes.barh(place, summary["seconds"], color=colour, xerr=spread, error_kw={"linewidth": 1})
    axes.annotate(f" {summary['seconds']:.3g}", (summary["seconds_max"], place), va="center", fontsize=9)


def _memory_bar(axes: Axes, place: int, summary: dict[str, float], colour: str) -> None:
    gradients = min(summary["gradient_mib"], summary["peak_mib"])
    axes.barh(place, gradients, color=GRADIENT_COLOUR)
    axes.barh(place, summary["peak_mib"] - gradients, left=gradients, color=colour)
    axes.annotate(f" {summary['peak_mib']:.0f}", (summary["peak_mib"], place), va="center", fontsize=9)
