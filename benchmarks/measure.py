# One process, one method: `python -m benchmarks.measure JOB`, JOB and the answer (the last line of stdout) in JSON.
#
#   task "check":    the correctness gate and the FLOP count, at small sizes
#   task "measure":  seconds and incremental peak memory of one call, forward and backward of the whole loss
#
# Timed: from both heads to the gradients of the student's hidden states and weight; imports, inputs and the clearing of old
# gradients are not. One call at full size comes first: it compiles, starts threads and makes the matmul library's own
# buffers. Its gradients are dropped and free pages given back; the second call is timed and its memory measured, over the
# RSS just before it. What the first call left resident for good is `retained`, and the first call's own seconds and peak are
# kept too. Gradients are new memory in both calls, as in a training step after `zero_grad(set_to_none=True)`.
# Bytes: `gradient` = 4 Ds (V + N), the two gradients asked for; `above gradients` = peak - gradient.
# Not here: order of the processes and medians (compare.py), the meter (memory.py), the gate (check.py).
from __future__ import annotations

import json
import sys
import time
import traceback
from typing import Any

import torch

from benchmarks.check import count_units, run_gate
from benchmarks.heads import Heads, Sizes, build_heads
from benchmarks.memory import PeakMemory
from benchmarks.methods import METHODS, Method, Outcome, Settings

QUANTILES = (0.05, 0.5, 0.95)
SHOWN_STATS = ("student_entropy", "reverse_kl", "union_kl", "support_mass")


def check(name: str, sizes: Sizes, settings: Settings) -> dict[str, Any]:
    return {"gate": run_gate(name, settings), "units": count_units(name, sizes, settings)}


def measure(name: str, sizes: Sizes, settings: Settings) -> dict[str, Any]:
    method, heads = METHODS[name], build_heads(sizes)
    first_seconds, _, first, _ = _call(method, heads, settings)
    heads.clear_gradients()
    seconds, cpu_seconds, second, outcome = _call(method, heads, settings)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: well below threads x seconds says that something else ran too
        "peak_bytes": second.increase,
        "first_call_seconds": first_seconds,
        "first_call_peak_bytes": first.increase,
        "retained_bytes": second.before - first.before,
        "rss_before_bytes": second.before,
        "meter": second.meter,
        "loss": None if outcome.loss is None else float(outcome.loss),
        "n_selected": None if outcome.selected is None else len(outcome.selected),
        "stats": _quantiles(outcome),
    }


def _call(method: Method, heads: Heads, settings: Settings) -> tuple[float, float, PeakMemory, Outcome]:
    with PeakMemory() as memory:
        start, cpu_start = time.perf_counter(), time.process_time()
        outcome = method.run(heads, settings)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return seconds, cpu_seconds, memory, outcome


def _quantiles(outcome: Outcome) -> dict[str, list[float]]:
    stats = outcome.stats or {}
    levels = torch.tensor(QUANTILES)
    return {name: torch.quantile(stats[name], levels).tolist() for name in SHOWN_STATS if name in stats}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out a job; a peer that is absent and a method that fails are answers too."""
    method = METHODS[job["method"]]
    torch.set_num_threads(job["threads"])
    task = {"check": check, "measure": measure}[job["task"]]
    try:
        return task(job["method"], Sizes(**job["sizes"]), Settings(**job["settings"])) | {"status": "ok"}
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in method.requires:
            return _failure(error)
        return {"status": "not installed", "error": f"{method.distribution} (no module named {error.name!r})"}
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> dict[str, Any]:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return {
        "status": "failed",
        "error": f"{type(error).__name__}: {first_line}".rstrip(": "),
        "traceback": traceback.format_exc(),
    }


if __name__ == "__main__":
    print(json.dumps(run_job(json.loads(sys.argv[1]))))
