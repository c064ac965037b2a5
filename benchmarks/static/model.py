"""The loops of the compiled kernels judged without a GPU: operations by pipe, and the share of a copy's speed to expect.

  share of a pipe    cycles that a quarter's pipe is busy for 32 pairs / cycles in which a copy moves as many bytes
  predicted share    bytes a second in the replay / bytes a second of a copy, at POINTS: clock and latency of memory
  programs           resident on a multiprocessor (SM): as many as registers and shared memory allow
  loads              where they stand in the loop and how far away their first use is, in percent of the loop
Below: what other projects measured of their kernels on an H100, beside what the model predicts (published.py).

Command: python -m benchmarks.static.model [--targets sm_80 sm_90 sm_100] [--configs bf16 "bf16 rows"] [--gated] [--no-peers]
[--json FILE]; `make model` installs the peers first

Not here: instructions, registers and spills of every configuration (roofline.py), anything timed on a GPU (benchmarks/gpu).
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from opd_kernels import launch_table

from benchmarks.static import gates, path, pipes, published, replay, roofline, sass
from benchmarks.static.pipes import Device

# Of the device's clock, and nanoseconds: the clock of an H200 at work, slower memory, a clock lowered by power.
POINTS = ((1.0, 800.0), (1.0, 1000.0), (0.81, 800.0))
COUNTED = ("issue", "alu", "fma", "mufu", "lsu")
TARGETS = tuple(pipes.DEVICES)


class Kernel:
    """A compiled kernel and its path over a row."""

    def __init__(
        self, launch, target: str, device: Device, row_bytes: float | None = None, pair_bytes: int | None = None
    ) -> None:
        compiled, read = roofline.compile_launch(launch, roofline.TARGETS[target])
        named = dict(zip(launch[0].arg_names, launch[1], strict=False)) | launch[2]
        self.device = device
        self.pair_bytes = pair_bytes or read
        self.row_bytes = row_bytes or self.pair_bytes * named["V"] / named.get("parts", 1)
        self.registers = roofline.nvidia_counts(compiled, streams=False)[0]["registers"]
        self.warps = compiled.metadata.num_warps
        self.programs = pipes.programs(self.registers, self.warps, compiled.metadata.shared, device)
        self.code = sass.disassemble(compiled.asm["cubin"])
        cached = path.cached_share(self.row_bytes, self.programs * device.multiprocessors, device.cache)
        self.path = path.walk(self.code, self.row_bytes, self.warps * pipes.LANES_A_WARP, cached)

    def bytes(self) -> float:
        """That a program moves, read and written."""
        counts = Counter(self.path.steps)
        return self.warps * sum(moved * counts[i] for i, moved in self.path.moved.items())

    def cycles(self, ghz: float, latency_ns: float, most: int | None = None) -> float:
        """Of a multiprocessor, a program; `most`: how many programs it has at a time, if fewer than fit."""
        steps = [
            replay.make_step(x, self.path.moved.get(i, 0.0), self.device, ghz) for i, x in enumerate(self.code.instructions)
        ]
        a_quarter = max(1, self.warps // pipes.QUARTERS)
        resident = min(self.programs, most or self.programs)
        programs = max(1, resident * self.warps // (pipes.QUARTERS * a_quarter))
        cycles = replay.replay(steps, self.path.steps, programs=programs, warps=a_quarter, latency=latency_ns * ghz)
        return cycles * self.warps / (pipes.QUARTERS * a_quarter)

    def seconds(self, rows: int, ghz: float, latency_ns: float) -> float:
        return rows * self.cycles(ghz, latency_ns) / (self.device.multiprocessors * ghz * 1e9)

    def share_of_copy(self, ghz: float, latency_ns: float) -> float:
        return self.bytes() / self.device.copy / self.seconds(1, ghz, latency_ns)

    def operations(self) -> dict[str, float]:
        """Of the loops, a pair."""
        totals: Counter[str] = Counter()
        for loop in self.path.loops:
            pairs = loop.loaded / self.pair_bytes
            for x in self.code.instructions[loop.first : loop.last + 1]:
                totals["issue"] += 1 / pairs
                totals[pipes.pipe(x).lower().replace("ifma", "fma")] += 1 / pairs
        return {name: totals[name] for name in COUNTED}

    def shares(self) -> dict[str, float]:
        """Cycles a pipe is busy, over those of a copy of as many bytes."""
        busy: Counter[str] = Counter()
        for loop in self.path.loops:
            pairs = loop.loaded / self.pair_bytes
            for x in self.code.instructions[loop.first : loop.last + 1]:
                name = pipes.pipe(x).lower().replace("ifma", "fma")
                halves = self.device.fma_halves if name == "fma" else 1
                busy["issue"] += 1 / pairs
                busy[name] += pipes.busy(x) / halves / pairs
        copied = self.device.copy / (self.device.multiprocessors * pipes.QUARTERS * self.device.ghz * 1e9)  # bytes a cycle
        memory = pipes.LANES_A_WARP * self.bytes() / (self.row_bytes / self.pair_bytes) / copied
        return {name: busy[name] / memory for name in COUNTED}

    def loads(self) -> str:
        """Like "8 at 1-3 %, first use after 5 %"."""
        loop = max(self.path.loops, key=lambda x: x.loaded)
        body = self.code.instructions[loop.first : loop.last + 1]
        at = [i for i, x in enumerate(body) if path.is_load(x)]
        boards = {body[i].control.write for i in at}
        # around the loop's end, for loads whose values the next iteration takes
        ahead = [
            next((d for d in range(1, len(body) + 1) if boards & set(body[(i + d) % len(body)].control.wait)), len(body))
            for i in at
        ]
        first, last = (round(100 * i / len(body)) for i in (at[0], at[-1]))
        return f"{len(at)} at {first}-{last} %, first use after {round(100 * min(ahead) / len(body))} %"


def row(kernel: Kernel, name: str, target: str, config: str) -> dict[str, Any]:
    device = kernel.device
    return {
        "kernel": name,
        "target": target,
        "config": config,
        "device": device.name,
        "registers": kernel.registers,
        "programs": kernel.programs,
        "operations": {key: round(x, 2) for key, x in kernel.operations().items()},
        "shares": {key: round(x, 3) for key, x in kernel.shares().items()},
        "predicted": [round(kernel.share_of_copy(clock * device.ghz, ns), 3) for clock, ns in POINTS],
        "loads": kernel.loads(),
    }


def measure(targets, configs=None, *, gated: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each of our kernels that has a loop over the vocabulary; `gated`: only for those in gates.py."""
    named = {(gate.target, gate.kernel, gate.config) for gate in gates.GATES}
    for target in targets:
        launch_table.set_target(32, roofline.TARGETS[target].arch // 10)
        for config, launches in roofline.configurations():
            if configs is not None and config not in configs:
                continue
            for launch in launches:
                name = roofline.kernel_name(launch)
                if name.startswith(roofline.STREAMING) and (not gated or (target, name, config) in named):
                    yield row(Kernel(launch, target, pipes.DEVICES[target]), name, target, config)


def peers() -> Iterator[dict[str, Any]]:
    """A row for each published time: `predicted_ms` beside `reported_ms`."""
    for figure, launch in published.launches():
        kernel = Kernel(launch, figure.target, figure.device, figure.row_bytes, figure.streams * figure.dtype.itemsize)
        predicted = 1e3 * kernel.seconds(figure.rows, figure.device.ghz, published.LATENCY_NS)
        yield row(kernel, figure.kernel, figure.target, f"{figure.rows} x {figure.vocab}") | {
            "predicted_ms": round(predicted, 3),
            "reported_ms": figure.reported_ms,
            "error": round(predicted / figure.reported_ms - 1, 3),
            "source": figure.source,
        }


def shown(row: dict[str, Any]) -> str:
    counts = "  ".join(f"{key} {row['operations'][key]:.1f} ({row['shares'][key]:.0%})" for key in COUNTED)
    predicted = " ".join(f"{x:.0%}" for x in row["predicted"])
    lines = [
        f"{row['kernel']} {row['target']} {row['config']}: {counts}",
        f"    predicted {predicted} of a copy ({row['device']}); {row['programs']} programs, {row['registers']} registers",
        f"    loads {row['loads']}",
    ]
    if "error" in row:
        both = f"{row['predicted_ms']:.2f} ms, reported {row['reported_ms']:.2f} ({row['error']:+.0%})"
        lines.append(f"    predicted {both}: {row['source']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Judge the kernels' loops without a GPU.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["sm_90"])
    parser.add_argument("--configs", nargs="+", help="only these configurations, like bf16 'bf16 rows'; default: all")
    parser.add_argument("--gated", action="store_true", help="only kernels that have a gate")
    parser.add_argument("--no-peers", action="store_true", help="without the published times; they need trl and liger_kernel")
    options = parser.parse_args(argv)
    clocks = ", ".join(f"{clock:.0%} of the clock and {ns:.0f} ns" for clock, ns in POINTS)
    print(f"Operations a pair (and share of a copy's time); predictions at {clocks}")
    rows, bad = [], []
    for r in measure(options.targets, options.configs, gated=options.gated):
        rows.append(r)
        print(shown(r), flush=True)
        bad += [f"{r['kernel']} {r['target']} {r['config']}: {x}" for x in gates.failures(r)]
    others = [] if options.no_peers else list(peers())
    for r in others:
        print(shown(r), flush=True)
    if others:
        bad += [f"{r['kernel']} {r['config']}: error {r['error']:+.0%}" for r in others if abs(r["error"]) > gates.MODEL_ERROR]
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows, "peers": others}, indent=1) + "\n")
    print("\n".join(bad) or f"{len(rows)} kernels within their gates")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
