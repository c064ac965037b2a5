"""The files of a GPU run: everything as JSON, a CSV per table, one page of Markdown, bandwidth against V and N as PNG, and one
archive of them all, to bring back.

  Every file names device, driver, versions, commit and clocks; a dry run says that it is no measurement.
  A run of some parts keeps the others that gpu.json has of the same commit, device and versions; of an unknown commit none.
  `python -m benchmarks.gpu.report FILE` makes CSV, page and picture again beside FILE, a gpu.json: for a machine with
  matplotlib, where the one with the GPU has none.

Not here: what is measured (check.py, logits.py, heads.py, sweep.py), versions and commit (cpu/environment.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cpu.environment import describe_environment

if TYPE_CHECKING:  # it needs triton, which a picture does not
    from benchmarks.gpu.timing import Bench

TABLES = ("warm", "check", "score", "few_rows", "loss", "heads", "sweep", "sanitize")
ARCHIVE = "gpu.tar.gz"
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
SAME = ("commit", "device", "driver", "versions", "dry_run")  # what results in one file share


def environment(bench: Bench, commit: str | None) -> dict[str, Any]:
    name = device_name(bench.dry)
    about = describe_environment(Path(__file__).parents[2])
    about["versions"]["cuda"] = torch.version.cuda or torch.version.hip
    return about | {
        "dry_run": bench.dry,
        "device": name,
        "slug": slug(name),
        "driver": _nvidia("driver_version"),
        "commit": commit or about["commit"],
    }


def device_name(dry: bool) -> str:
    if dry or not torch.cuda.is_available():  # without one the run ends with its own message
        return "dry run" if dry else "no device"
    return torch.cuda.get_device_name()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def earlier(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What the folder has of the same commit, device and versions."""
    path = folder / "gpu.json"
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text())
        before = kept["environment"]
    except (ValueError, KeyError, TypeError):  # of another program, or cut off
        print(f"{path} is not read: no results of this program", flush=True)
        return {}
    other = [name for name in SAME if before.get(name) != about[name]]
    if other or about["commit"] == "unknown":
        print(f"{path} is replaced: of another {other[0] if other else 'commit, perhaps'}", flush=True)
        return {}
    about["uncommitted_changes"] = about["uncommitted_changes"] or before.get("uncommitted_changes", False)
    return {name: kept[name] for name in (*TABLES, "parts") if name in kept}


def clocks() -> dict[str, str]:
    return {name: _nvidia(name) for name in CLOCKS}


def _nvidia(query: str) -> str:
    return (_run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or "unknown").splitlines()[0]


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def title(results: dict[str, Any]) -> str:
    about = results["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value)
    warning = "DRY RUN, NOT A MEASUREMENT: interpreted on a CPU at sizes of no meaning. " if about["dry_run"] else ""
    changed = " with uncommitted changes" if about["uncommitted_changes"] else ""
    return f"{warning}{about['device']}, driver {about['driver']}, {versions}, commit {about['commit']}{changed}"


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / "gpu.json.part"  # a run that is ended here leaves the file of before
    half.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(half, folder / "gpu.json")
    draw(results, folder)
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name != ARCHIVE:
                archive.add(path, path.name)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Everything that is made of the JSON."""
    for name in TABLES:
        if results.get(name):
            _csv(folder / f"{name}.csv", results[name])
    plotted = bool(results.get("score")) and plot(results, folder / "bandwidth.png")
    (folder / "gpu.md").write_text(markdown(results, plotted))


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def markdown(results: dict[str, Any], plotted: bool) -> str:
    about = results["environment"]
    lines = [f"# {about['device']}, {about['date']}", "", title(results), ""]
    for name, part in results.get("parts", {}).items():
        lines.append(f"* {name}: {part['rounds']} rounds at most, {part['dtype']}, {part['seconds']} s; {_clocks(part)}")
        if "failure" in part:
            lines.append(f"  **It broke off**: {part['failure']}")
    lines.append("")
    if "check" in results:
        run = [row for row in results["check"] if not row.get("note")]
        failed = [row for row in run if row["failure"]]
        lines += [f"{len(run)} comparisons with float64 on the device, {len(failed)} failed.", ""]
        if failed:
            lines += ["**FAILED: times below of what these use are no results.**", ""]
        told = [row for row in results["check"] if row["failure"] or row.get("note")]
        lines += [f"* {row['kernel']}, {row['case']}: {row['failure'] or row['note']}" for row in told] + [""]
    else:
        lines += ["**Not compared with float64 in this run.**", ""]
    if "score" in results:
        lines += ["## Score pass: both rows read once, as a share of a device copy", ""]
        lines += _table(results["score"], {
            "N": "n", "V": "vocab", "dtype": "dtype", "ms": "median_ms", "min": "min_ms", "max": "max_ms",
            "GB/s": "gb_per_s", "copy GB/s": "copy_gb_per_s", "share": "share", "only reading GB/s": "read_gb_per_s",
            "share of that": "share_of_read", "note": "note",
        })  # fmt: skip
        missing = "No plot: matplotlib was not installed; `python -m benchmarks.gpu.report gpu.json` makes it."
        lines += ["![bandwidth](bandwidth.png)" if plotted else missing, ""]
    if "few_rows" in results:
        lines += ["## Score pass of few rows, split over programs and not", ""]
        lines += _table(results["few_rows"], {
            "N": "n", "V": "vocab", "programs": "programs", "a row": "per_row", "ms": "median_ms", "min": "min_ms",
            "max": "max_ms", "GB/s": "gb_per_s", "note": "note",
        })  # fmt: skip
    if "loss" in results:
        lines += ["## Selective loss, forward and backward to dense logits, 5 % by teachability", ""]
        lines += ["Aim: 8 times eager's speed or more, and a tenth of its peak or less.", ""]
        lines += _table(results["loss"], {
            "method": "method", "N": "n", "V": "vocab", "ms": "median_ms", "min": "min_ms", "max": "max_ms",
            "times eager's speed": "speed_to_eager", "peak bytes over inputs and gradient": "peak_bytes",
            "of eager's peak": "peak_to_eager", "loss": "loss", "note": "note",
        })  # fmt: skip
    if "heads" in results:
        lines += ["## Heads in: hidden states and two weights, forward and backward, 5 % by teachability", ""]
        lines += [
            "Aim for ours: 1.15 floors or less, 0.75 of TRL called twice (8 bits: 0.65, overlap 96 %), 512 MiB of peak.",
            "",
        ]
        lines += _table(results["heads"], {
            "method": "method", "N": "n", "V": "vocab", "D": "dims", "ms": "median_ms", "min": "min_ms", "max": "max_ms",
            "to floor": "to_floor", "to TRL twice": "to_trl_twice", "peak bytes over gradients": "peak_bytes",
            "overlap": "overlap", "note": "note",
        })  # fmt: skip
    if "sweep" in results:
        lines += ["## Launch table against others", ""]
        columns = {"kernel": "kernel", "tile": "tile", "shipped": "shipped", "ms": "median_ms", "min": "min_ms", "note": "note"}
        lines += _table(sorted(results["sweep"], key=lambda r: (r["kernel"], r.get("median_ms", 1e9))), columns)
    if "sanitize" in results:
        lines += ["## Small calls under compute-sanitizer", ""]
        lines += _table(results["sanitize"], {"tool": "tool", "calls": "calls", "failure": "failure", "note": "note"})
    return "\n".join(lines)


def _clocks(part: dict[str, Any]) -> str:
    """Each before and after."""
    before, after = part["clocks_before"], part["clocks_after"]
    return ", ".join(f"{name} {before[name]} to {after[name]}" for name in before)


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(text(row.get(key)) for key in columns.values())} |" for row in rows] + [""]


def plot(results: dict[str, Any], path: Path) -> bool:
    """False if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["score"] if "gb_per_s" in row]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, (along, over) in zip(axes, (("vocab", "n"), ("n", "vocab")), strict=True):
        for value in sorted({row[over] for row in rows}):
            points = sorted((row[along], row["gb_per_s"]) for row in rows if row[over] == value)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{'N' if over == 'n' else 'V'} = {value:,}")
        copies = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
        if copies:
            axis.axhline(median(copies), color="grey", linestyle="--", label="device copy (median)")
        axis.set_xlabel("vocabulary V" if along == "vocab" else "positions N")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if rows:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("GB/s, both rows of logits read once")
    note = "DRY RUN, not a measurement" if results["environment"]["dry_run"] else results["environment"]["device"]
    figure.suptitle(f"Score pass: {note}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def main(arguments: list[str] | None = None) -> int:
    about = "Make the tables and the picture of a gpu.json again, beside it."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=about)
    parser.add_argument("file", type=Path, help="gpu.json of a run")
    path = parser.parse_args(arguments).file
    draw(json.loads(path.read_text()), path.parent)
    print(f"written to {path.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
