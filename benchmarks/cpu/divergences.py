"""What each divergence costs beside reverse KL: time as a ratio, matmul units and scratch memory counted. Heads in, on a CPU.

  units    FLOP of matmuls / (2 N V Ds), forward and backward, counted by torch
  scratch  peak of live bytes over the inputs, less the gradients asked for, 4 Ds (V + N); counted by tests/support/meters.py
  time     forward and backward over those of reverse KL, interleaved in one process, medians of the rounds' ratios

Run: python -m benchmarks.cpu.divergences [--n 512 --rounds 5]: divergences.{json,md} under benchmarks/results; some 5 minutes
on 2 cores.
Not here: reverse KL against its peers (compare.py), the same counts as tests (tests/loss/test_cost_divergences.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cpu.compare import ROOT, numbers, positive
from benchmarks.cpu.environment import describe_environment
from benchmarks.cpu.heads import SEED, Heads, Sizes, build_heads
from opd_ops import Extrapolated, LinearHead, Mixture, TailAware, TopK, TopKLogprobs, selective_opd_loss
from opd_ops.backends.shared import pages
from opd_ops.divergences import DIVERGENCES
from tests.support.meters import LiveBytes

FRACTION, WORKSPACE_BYTES = 0.05, 64 * 2**20
MIB = 2**20
Step = Callable[[], None]


def steps(heads: Heads) -> dict[str, Step]:
    """One forward and backward per divergence, reverse KL first, and per teacher that is none of two heads."""
    student = LinearHead(heads.student_hidden, heads.student_weight)
    teacher = LinearHead(heads.teacher_hidden, heads.teacher_weight)
    n, vocab = len(heads.student_hidden), len(heads.student_weight)
    tokens = torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(SEED))
    ids = torch.stack([torch.randperm(vocab, generator=torch.Generator().manual_seed(i))[:16] for i in range(n)])
    listed = TopKLogprobs(ids, -3.0 - torch.arange(16.0).expand(n, -1))  # what is listed does not change the cost
    reference = LinearHead(heads.teacher_hidden + 0.1, heads.teacher_weight)

    def step(other: Any, divergence: Any) -> Step:
        options = {"fraction": FRACTION, "workspace_bytes": WORKSPACE_BYTES, "backend": "torch", "tokens": tokens}

        def run() -> None:
            heads.clear_gradients()
            selective_opd_loss(student, other, divergence=divergence, **options).loss.backward()

        return run

    first = ["reverse_kl", *sorted(set(DIVERGENCES) - {"reverse_kl"})]
    steps = {f"`{name}`": step(teacher, name) for name in first}
    mixed = Extrapolated(1.25, teacher, reference)
    steps["`reverse_kl` to `Extrapolated(1.25, teacher, reference)`, a third head"] = step(mixed, "reverse_kl")
    means = Mixture((teacher, reference), (0.5, 0.5), "arithmetic")
    steps['`reverse_kl` to `Mixture(teachers, (0.5, 0.5), "arithmetic")`, a third head'] = step(means, "reverse_kl")
    steps["`tail_aware` from `TopKLogprobs`, one head"] = step(listed, TailAware())
    for words in (("reverse", "student", "drop"), ("reverse", "student", "mass"), ("reverse", "student", "sampled")):
        steps[f"`TopK{words}`".replace("'", '"')] = step(teacher, TopK(*words))
    steps['`TopK("jsd", "union", "bucket")`'] = step(teacher, TopK("jsd", "union", "bucket"))
    student_lists = TopKLogprobs(ids, listed.logprobs, of="student")
    steps['`TopK("reverse", "student", "mass")` from `TopKLogprobs(..., of="student")`, one head'] = step(
        student_lists, TopK("reverse", "student", "mass")
    )
    return steps


def counted(run: Step, sizes: Sizes) -> dict[str, float]:
    run()  # what torch keeps for good is no scratch

    def plain(size: Sequence[int], dtype: torch.dtype, device: torch.device, keep: bool = False) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    # The meter does not see memory that is mapped for large pages.
    with mock.patch.object(pages, "empty", plain), FlopCounterMode(display=False) as counter, LiveBytes() as meter:
        run()
    scratch = (meter.peak - sizes.gradient_bytes) / MIB
    return {"units": counter.get_total_flops() / sizes.unit_flops, "scratch_mib": scratch}


def timed(runs: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def page(results: dict[str, Any]) -> str:
    about, sizes = results["environment"], results["sizes"]
    lines = [
        f"`{results['command']}` on {about['cpu']}, {results['threads']} threads, "
        f"commit {about['commit'][:12]}, {about['date']}.",
        "",
        f"N = {sizes['n']:,}, V = {sizes['vocab']:,}, hidden sizes {sizes['student_dim']} and {sizes['teacher_dim']}, fp32, "
        f"{FRACTION:.0%} selected, workspace {WORKSPACE_BYTES // MIB} MiB, medians of {results['rounds']} rounds.",
        "",
        "| divergence | × the time of reverse KL (range) | matmul units | scratch, MiB |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        low, high = min(row["ratios"]), max(row["ratios"])
        lines.append(
            f"| {row['name']} | {statistics.median(row['ratios']):.2f} ({low:.2f} to {high:.2f}) | {row['units']:.2f} | "
            f"{row['scratch_mib']:.0f} |"
        )
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.divergences", description="What each divergence costs.")
    parser.add_argument("--n", type=positive, default=512, help="positions (default %(default)s)")
    parser.add_argument("--vocab", type=positive, default=151936, help="vocabulary (default %(default)s)")
    parser.add_argument("--dims", type=numbers, default=[896, 1536], help="hidden sizes of student and teacher")
    parser.add_argument("--rounds", type=positive, default=5, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sizes = Sizes(options.n, options.vocab, *options.dims)
    runs = steps(build_heads(sizes))
    counts = {name: counted(run, sizes) for name, run in runs.items()}
    seconds = timed(runs, options.rounds)
    base = next(iter(seconds.values()))
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.cpu.divergences", *arguments]),
        "environment": describe_environment(ROOT),
        "threads": options.threads,
        "rounds": options.rounds,
        "sizes": vars(sizes),
        "rows": [
            {"name": name, **counts[name], "seconds": own, "ratios": [x / y for x, y in zip(own, base, strict=True)]}
            for name, own in seconds.items()
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "divergences.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "divergences.md").write_text(page(results))
    print(page(results))
    return results


if __name__ == "__main__":
    main()
