"""Fills Triton's cache on the device machine: compiles every shipped kernel and every tile of the sweep, on all cores at once.

  Launchers run on shapes alone (meta tensors) with their launches recorded (static/roofline.py); then each launch compiles and
  runs nothing (`warmup`), under the same key as later. Compiled one after another, they take longer than their part's time.
  Process i of k takes the launches i, i + k, ...; a kernel that is not among them is compiled when it is first launched.

Command (of `run`): python -m benchmarks.gpu.warm I K

Not here: what is compiled for machines without a GPU (static/roofline.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import sweep
from benchmarks.gpu.timing import Bench, first_line
from benchmarks.static import roofline


class Shapes(Bench):
    """A bench whose tensors have no memory."""

    def logits(self, n: int, vocab: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty((n, vocab), dtype=self.dtype, device="meta"), torch.empty(
            (n, vocab), dtype=self.dtype, device="meta"
        )


def launches() -> Iterator[Any]:
    """(function, arguments, options) of what the other parts will launch."""
    for _, recorded in roofline.configurations():
        yield from recorded
    bench = Shapes(torch.device("meta"), torch.bfloat16, rounds=1, dry=False)
    with roofline.Recorder():
        every = list(sweep.sweeps(bench))
    for one in every:
        for tile in one.others:
            with roofline.Recorder() as recorded, sweep.shipped(one.name, tile):
                one.launch()
            yield from recorded


def compile_share(i: int, k: int) -> dict[str, Any]:
    """Compiles the launches i, i + k, ...; one that the compiler refuses is counted."""
    done, refused, start = 0, [], time.monotonic()
    for number, (function, arguments, options) in enumerate(launches()):
        if number % k == i:
            try:
                function.run(*arguments, grid=(1,), warmup=True, **options)
                done += 1
            except Exception as error:  # a tile of the sweep may be too large for the device
                refused.append(f"{function.__name__}: {first_line(error)}")
    return {"process": i, "kernels": done, "refused": "; ".join(refused), "seconds": round(time.monotonic() - start, 1)}


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per process; those that are not done when the part ends are stopped, and the kernels compile later."""
    if bench.dry:
        yield {"process": 0, "note": "interpreted kernels are not compiled"}
        return
    k = os.cpu_count() or 1
    command = [sys.executable, "-m", "benchmarks.gpu.warm"]
    started = [
        subprocess.Popen([*command, str(i), str(k)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for i in range(k)
    ]
    for i, process in enumerate(started):
        try:
            out, _ = process.communicate(timeout=max(0.1, min(bench.ends - time.monotonic(), 3600.0)))
            yield json.loads(out.splitlines()[-1])
        except subprocess.TimeoutExpired:  # noqa: PERF203
            process.kill()
            process.communicate()
            yield {"process": i, "note": "stopped: the time of this part is over"}
        except (IndexError, ValueError):
            yield {"process": i, "note": f"ended with {process.returncode} and without a result"}


if __name__ == "__main__":
    print(json.dumps(compile_share(int(sys.argv[1]), int(sys.argv[2]))))
