"""Ten small calls under compute-sanitizer: accesses out of bounds (memcheck), races in shared memory (racecheck).

  Each call runs score, top-K, loss and gradient kernels on a few rows, aligned and not, so that both tools finish in seconds.
  Where the tool is not installed, its row says so. A dry run makes the calls without it.

Command (of `run`): python -m benchmarks.gpu.sanitize, under the tool

Not here: values (check.py).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.timing import LATE, Bench, first_line
from opd_ops import TopKLogprobs, selective_opd_loss
from tests.support.cases import head_pair, leaf, leaf_head, logit_pair

TOOL = "compute-sanitizer"
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
TOOLS = ("memcheck", "racecheck")
WRONG = 99  # exit status of the tool where it reports an error


def _logits(divergence: str, vocab: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Callable[[str], None]:
    def call(device: str) -> None:
        student, teacher = logit_pair(3, vocab, dtype=dtype, device=device)
        selective_opd_loss(
            leaf(student), teacher, divergence=divergence, backend="triton", fraction=0.5, **options
        ).loss.backward()

    return call


def _list(device: str) -> None:
    student, teacher = logit_pair(3, 160, device=device)
    best = teacher.log_softmax(1).topk(8)
    lists = TopKLogprobs(best.indices, best.values)
    options = {"divergence": "tail_aware", "fraction": 1.0, "selector": "all", "tokens": best.indices[:, 0]}
    selective_opd_loss(leaf(student), lists, backend="triton", **options).loss.backward()


def _heads(device: str) -> None:
    student, teacher = head_pair((4,), 160, student_dim=16, teacher_dim=32, dtype=torch.bfloat16, device=device)
    selective_opd_loss(leaf_head(student), teacher, backend="triton", fraction=0.5).loss.backward()


CALLS: dict[str, Callable[[str], None]] = {
    "reverse KL, aligned rows": _logits("reverse_kl", 160),
    "reverse KL, rows that start anywhere": _logits("reverse_kl", 131),
    "reverse KL, several blocks": _logits("reverse_kl", 8320),
    "reverse KL, fp32": _logits("reverse_kl", 160, torch.float32),
    "forward KL": _logits("forward_kl", 160),
    "forward KL, fp16": _logits("forward_kl", 131, torch.float16),
    "JSD": _logits("jsd", 160),
    "total variation": _logits("total_variation", 160),
    "a list": _list,
    "heads": _heads,
}


DRY = 3  # a dry run proves the program: every so many calls


def calls(device: str, step: int = 1) -> list[str]:
    """Makes every `step`-th call; the names of those that raised, with the error's first line."""
    failed = []
    for name, call in list(CALLS.items())[::step]:
        try:
            call(device)
        except Exception as error:  # noqa: PERF203  the other calls are worth making
            failed.append(f"{name}: {first_line(error)}")
    return failed


def find_tool() -> str | None:
    return shutil.which(TOOL) or next((str(x) for x in (Path(place) / TOOL for place in PLACES) if x.exists()), None)


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per tool; `failure` is None or what it reported."""
    if bench.dry:
        yield {"tool": "none", "calls": len(list(CALLS)[::DRY]), "failure": "; ".join(calls("cpu", DRY)) or None}
        return
    tool = find_tool()
    for name in TOOLS:
        row: dict[str, Any] = {"tool": name, "calls": len(CALLS), "failure": None}
        left = min(bench.ends - time.monotonic(), 3600.0)
        if tool is None or left <= 0:
            yield row | {"note": LATE if tool else f"not run: {TOOL} is not installed"}
            continue
        command = [tool, "--tool", name, "--error-exitcode", str(WRONG), sys.executable, "-m", "benchmarks.gpu.sanitize"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            yield row | {"note": LATE}
            continue
        reported = [line for line in done.stdout.splitlines() if line.startswith("=========") and line.strip("= ")]
        if done.returncode:
            row["failure"] = f"status {done.returncode}: " + " ".join(
                (reported or done.stderr.splitlines() or ["no output"])[-3:]
            )
        print(f"{TOOL} {name}: {row['failure'] or 'no error'}", flush=True)
        yield row


if __name__ == "__main__":
    print("\n".join(calls("cuda")) or "all calls were made")
    torch.cuda.synchronize()
