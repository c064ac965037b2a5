"""How memory grows: every method against the number of positions N, and against the vocabulary V.

  peak = incremental peak RSS over the inputs, the gradients asked for included: 4 Ds (V + N) bytes

Each method and size once, in a process of its own, in a call after a first one (measure.py): peaks repeat to a few MiB.
Times would not, and are not kept.
Run: python -m benchmarks.cpu.scaling [--n-list 256,1024,2048 --vocab-list 32000,128256,256000]: scaling.{json,md} and a
picture under benchmarks/results. On 2 cores some 25 minutes and 12 GiB of memory.
Not here: times, as medians at one size (compare.py), a GPU (`make gpu`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.cpu.compare import ROOT, numbers, positive, run_process
from benchmarks.cpu.environment import describe_environment
from benchmarks.cpu.heads import Sizes
from benchmarks.cpu.methods import METHODS, Settings
from benchmarks.cpu.report import OURS_COLOUR

GIB = 2**30
MARKERS = "osv^D*X"
Points = list[dict[str, Any]]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.scaling", description="Memory against N and against V.")
    parser.add_argument("--n-list", type=numbers, default=[256, 1024, 2048], help="positions, at --vocab")
    parser.add_argument("--vocab", type=positive, default=151936, help="vocabulary of the first series (default %(default)s)")
    parser.add_argument("--vocab-list", type=numbers, default=[32000, 128256, 256000], help="vocabularies, at --n")
    parser.add_argument("--n", type=positive, default=512, help="positions of the second series (default %(default)s)")
    parser.add_argument("--dims", type=numbers, default=[896, 1536], help="hidden sizes of student and teacher")
    parser.add_argument("--threads", type=positive, default=2, help="threads of each process (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    return parser.parse_args(argv)


def series(sizes: Sequence[Sizes], names: Sequence[str], threads: int) -> Points:
    """One entry per size and method; what fails says so."""
    points = []
    for size in sizes:
        for name in names:
            answer = run_process("memory", name, size, Settings(), threads)
            point = {"method": name, "n": size.n, "vocab": size.vocab, "gradient_bytes": size.gradient_bytes}
            point |= {key: answer.get(key) for key in ("status", "error", "peak_bytes")}
            points.append(point)
            shown = f"{point['peak_bytes'] / GIB:.2f} GiB" if point["status"] == "ok" else point["error"]
            print(f"N {size.n:<6} V {size.vocab:<8} {name:<18} {shown}", flush=True)
    return points


def draw(points: Points, path: Path) -> None:
    """Peak memory against the vocabulary, one line a method."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for place, name in enumerate(dict.fromkeys(point["method"] for point in points)):
        line = [(p["vocab"], p["peak_bytes"] / GIB) for p in points if p["method"] == name and p["status"] == "ok"]
        if line:
            style = {"color": OURS_COLOUR, "linewidth": 2.5, "zorder": 3} if name == "ours" else {"linewidth": 1.2}
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(*zip(*line, strict=True), marker=marker, markersize=5, label=METHODS[name].title, **style)
    gradients = sorted({(p["vocab"], p["gradient_bytes"] / GIB) for p in points})
    axes.plot(*zip(*gradients, strict=True), color="black", linestyle=":", linewidth=1, label="the gradients asked for")
    axes.set_xlabel("vocabulary V")
    axes.set_ylabel("peak memory over the inputs, GiB")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"Forward and backward from hidden states, N = {points[0]['n']:,}, fp32, CPU", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def page(results: dict[str, Any]) -> str:
    about = results["environment"]
    lines = [
        f"`{results['command']}` on {about['cpu']}, {results['threads']} threads, "
        f"commit {about['commit'][:12]}, {about['date']}.",
        "",
        "GiB of peak memory over the inputs.",
        "",
    ]
    for title, key, along in (("N", "against_n", "n"), ("V", "against_vocab", "vocab")):
        points = results[key]
        sizes = list(dict.fromkeys(p[along] for p in points))
        lines += ["| method | " + " | ".join(f"{title} = {size:,}" for size in sizes) + " |", "|---|" + "---|" * len(sizes)]
        for name in dict.fromkeys(p["method"] for p in points):
            cells = (_cell(p) for p in points if p["method"] == name)
            lines.append(f"| {METHODS[name].title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(point: dict[str, Any]) -> str:
    return f"{point['peak_bytes'] / GIB:.2f}" if point["status"] == "ok" else f"{point['status']}: {point['error']}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_arguments(arguments)
    base = Sizes(options.n, options.vocab, *options.dims)
    names = [name for name in METHODS if name != "floor"]  # which computes no loss
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.cpu.scaling", *arguments]),
        "environment": describe_environment(ROOT),
        "threads": options.threads,
        "dims": options.dims,
        "settings": asdict(Settings()),
        "against_n": series([replace(base, n=n) for n in options.n_list], names, options.threads),
        "against_vocab": series([replace(base, vocab=vocab) for vocab in options.vocab_list], names, options.threads),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "scaling.md").write_text(page(results))
    draw(results["against_vocab"], options.out / "memory_against_v.png")
    print(page(results))
    return results


if __name__ == "__main__":
    main()
