"""The loss against its peers on a CPU in fp32: `python -m benchmarks.cpu.compare`, or `make bench ARGS="--rounds 5"`.

  time ratio = median seconds / median seconds of the two score matmuls;   peak = incremental peak RSS over the inputs

First every method passes the correctness gate (check.py). Then each method runs in its own process, one after the other
and round by round (A B C A B C ...), so that a slow minute of the machine meets all of them; medians over the rounds.
Timed: forward and backward of the whole loss, heads in, gradients of hidden states and weight out (measure.py says how).
Bytes: resident memory of the process above its inputs; FLOPs: matmuls, in head-matmul units.
A method that is not installed, wrong or failing stays in the tables and says so.
Hardware: any; defaults need about 8 GiB of memory and half an hour on 2 cores.
Not here: the methods (methods.py), one measurement (measure.py), the files that are written (report.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.cpu import report
from benchmarks.cpu.environment import describe_environment
from benchmarks.cpu.heads import SEED, Sizes
from benchmarks.cpu.methods import METHODS, Settings

ROOT = Path(__file__).resolve().parents[2]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.compare", description="Time and memory of the loss and its peers."
    )
    parser.add_argument("--n", type=positive, default=1024, help="positions (default %(default)s)")
    parser.add_argument("--vocab", type=positive, default=151936, help="vocabulary entries (default %(default)s)")
    parser.add_argument("--student-dim", type=positive, default=896, help="the student's hidden size (default %(default)s)")
    parser.add_argument("--teacher-dim", type=positive, default=1536, help="the teacher's hidden size (default %(default)s)")
    parser.add_argument("--fraction", type=float, default=0.05, help="share of the positions to train on (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="processes per method (default %(default)s)")
    parser.add_argument("--workspace-mib", type=positive, default=64, help="our workspace_bytes (default %(default)s)")
    parser.add_argument("--methods", type=_methods, default=list(METHODS), help=f"some of {','.join(METHODS)} (default all)")
    parser.add_argument("--threads", type=positive, default=2, help="threads of each process (default %(default)s)")
    parser.add_argument("--n-list", type=numbers, default=[], help="further numbers of positions, measured for ours alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of compare.{json,md,png}")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return number


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",") if part]


def _methods(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names out of: {', '.join(METHODS)}")
    return names


def run_process(task: str, name: str, sizes: Sizes, settings: Settings, threads: int) -> dict[str, Any]:
    """One method in a process of its own; whatever becomes of it is an answer with a `status`."""
    job = {"task": task, "method": name, "sizes": asdict(sizes), "settings": asdict(settings), "threads": threads}
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu.measure", json.dumps(job)],
        cwd=ROOT,
        env=os.environ | pinned,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    why = f"exit status {done.returncode}"
    if done.returncode < 0:
        why = f"killed by {signal.Signals(-done.returncode).name}" + (", out of memory?" if done.returncode == -9 else "")
    return {"status": "failed", "error": why, "traceback": done.stderr[-4000:]}


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Gate, rounds and the further numbers of positions: everything that the report needs."""
    sizes = Sizes(options.n, options.vocab, options.student_dim, options.teacher_dim)
    settings = Settings(options.fraction, options.workspace_mib)
    methods: dict[str, dict[str, Any]] = {}
    for name in options.methods:
        answer = run_process("check", name, sizes, settings, options.threads)
        gate = answer.get("gate")
        if gate is not None and not gate["passed"]:
            answer |= {"status": "wrong", "error": "; ".join(gate["reasons"])}
        methods[name] = answer | {"title": METHODS[name].title, "computes": METHODS[name].computes, "rounds": []}
        _say(f"check    {name:<18}{_outcome(answer)}")
    for number in range(1, options.rounds + 1):
        for name, entry in methods.items():
            if entry["status"] != "ok":
                continue
            answer = run_process("measure", name, sizes, settings, options.threads)
            if answer["status"] == "ok":
                entry["rounds"].append(answer)
            else:
                entry |= answer
            _say(f"round {number:<3}{name:<18}{_outcome(answer)}")
    return {
        "command": shlex.join(["python", "-m", "benchmarks.cpu.compare", *options.command]),
        **describe_environment(ROOT),
        "threads": options.threads,
        "sizes": asdict(sizes) | {"score_units": sizes.score_units, "gradient_bytes": sizes.gradient_bytes},
        "settings": asdict(settings) | {"dtype": "float32", "seed": SEED, "rounds": options.rounds},
        "methods": methods,
        "against_n": [_at(n, sizes, settings, options.threads) for n in options.n_list],
    }


def _at(n: int, sizes: Sizes, settings: Settings, threads: int) -> dict[str, Any]:
    """Ours at another number of positions, once."""
    sizes = replace(sizes, n=n)
    answer = run_process("measure", "ours", sizes, settings, threads)
    _say(f"N {n:<7}{'ours':<18}{_outcome(answer)}")
    return {"n": n, "gradient_bytes": sizes.gradient_bytes} | answer


def _outcome(answer: dict[str, Any]) -> str:
    if answer["status"] != "ok":
        return f"{answer['status']}: {answer['error']}"
    if "seconds" in answer:
        return f"{answer['seconds']:8.2f} s {answer['peak_bytes'] / 2**20:8.0f} MiB over inputs"
    return f"{answer['units']:.2f} units" + ("" if answer["gate"] is None else ", agrees with the oracle")


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse_arguments(arguments)
    options.command = arguments
    result = report.summarise(run_all(options))
    for path in report.write(result, options.out):
        _say(f"wrote {path}")


if __name__ == "__main__":
    main()
