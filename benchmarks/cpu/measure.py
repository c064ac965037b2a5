"""One process, one method: `python -m benchmarks.cpu.measure JOB`, JOB and the answer (the last line of stdout) in JSON.

  task "check":    the correctness gate and the FLOP count, at small sizes
  task "memory":   incremental peak memory of one call, forward and backward of the whole loss
  task "measure":  that, and the seconds of one more

Three calls at full size, whose gradients are dropped between them, as in training steps with `zero_grad(set_to_none=True)`.
The first compiles, starts threads and makes the matmul library's own buffers; its peak is kept too. Then all free pages go
back to the system, and the second's peak is measured over the RSS just before it: what the first left resident for good is
`retained`. The third is timed, with no meter and with whatever the second left: from both heads to the gradients of the
student's hidden states and weight, without imports, inputs and the clearing of old gradients. `waiting`: memory it leaves
to the kernel until a next call.
Bytes: `gradient` = 4 Ds (V + N), the two gradients asked for; `above gradients` = peak - gradient.
Not here: order of the processes and medians (compare.py), the meter (memory.py), the gate (check.py).
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from typing import Any

import torch

from benchmarks.cpu.check import count_units, run_gate
from benchmarks.cpu.heads import Heads, Sizes, build_heads
from benchmarks.cpu.memory import PeakMemory, waiting_bytes
from benchmarks.cpu.methods import METHODS, Method, Outcome, Settings

QUANTILES = (0.05, 0.5, 0.95)
SHOWN_STATS = ("student_entropy", "reverse_kl", "union_kl", "support_mass")


def check(name: str, sizes: Sizes, settings: Settings) -> dict[str, Any]:
    return {"gate": run_gate(name, settings), "units": count_units(name, sizes, settings)}


def memory(name: str, sizes: Sizes, settings: Settings) -> dict[str, Any]:
    return _metered(METHODS[name], build_heads(sizes), settings)


def measure(name: str, sizes: Sizes, settings: Settings) -> dict[str, Any]:
    method, heads = METHODS[name], build_heads(sizes)
    measured = _metered(method, heads, settings)
    start, cpu_start = time.perf_counter(), time.process_time()
    outcome = method.run(heads, settings)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    heads.clear_gradients()
    return measured | {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: well below threads x seconds says that something else ran too
        "waiting_bytes": waiting_bytes(),
        "loss": None if outcome.loss is None else float(outcome.loss),
        "n_selected": None if outcome.selected is None else len(outcome.selected),
        "stats": _quantiles(outcome),
    }


def _metered(method: Method, heads: Heads, settings: Settings) -> dict[str, Any]:
    meters = []
    for _ in range(2):
        with PeakMemory() as meter:
            method.run(heads, settings)
        heads.clear_gradients()
        meters.append(meter)
    first, second = meters
    return {
        "peak_bytes": second.increase,
        "first_call_peak_bytes": first.increase,
        "retained_bytes": second.before - first.before,
        "rss_before_bytes": second.before,
        "meter": second.meter,
    }


def _quantiles(outcome: Outcome) -> dict[str, list[float]]:
    stats = outcome.stats or {}
    levels = torch.tensor(QUANTILES)
    return {name: torch.quantile(stats[name], levels).tolist() for name in SHOWN_STATS if name in stats}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out a job; a peer that is absent and a method that fails are answers too."""
    method = METHODS[job["method"]]
    torch.set_num_threads(job["threads"])
    task = {"check": check, "memory": memory, "measure": measure}[job["task"]]
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
