"""How a GPU run takes time and memory: interleaved rounds between two events, peaks of the allocator, and when to stop.

  queued:   the GPU is first given work that outlasts the launches (a sleep), so that the first event, the kernels and the
            last event lie in its queue when it comes to them: kernel time alone. Without, the launch of 30 to 80 us would
            lie between the events, as long as a kernel itself
  not so:   from an idle GPU to the end of its work: what a caller waits for, launches and allocations among it
  peak:     the most memory allocated during one call, over what was allocated before it
Medians of `rounds` after one warm-up, A B C A B C. A variant that fails, or comes after the time is over, is a row saying so.
Logits are normal, of scale 4.5 (entropy 1 to 3 nats), the teacher the student plus noise.

Not here: what is timed (logits.py, heads.py, sweep.py), files (report.py).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN = {"temperature": 1.0, "s_scale": 1.0, "t_scale": 1.0, "s_softcap": None, "t_softcap": None}
LATE = "not run: the time of this part is over"
FEWEST_ROUNDS = 3  # of a variant, however late
SLEEP_CYCLES, MOST_SLEEP_CYCLES = 2**21, 2**26  # of the SM's clock: 1 and 34 ms at 2 GHz; a launch takes 0.03 to 0.08


@dataclass
class Bench:
    """Where, how often and until when things are timed; `dry` is a CPU, interpreted, and means nothing."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    dry: bool
    ends: float = math.inf  # of time.monotonic(): the part's end, whatever is left of it
    sleep_cycles: int = SLEEP_CYCLES

    @staticmethod
    def of(options: argparse.Namespace) -> Bench:
        if not options.dry_run and not torch.cuda.is_available():
            sys.exit(
                "benchmarks.gpu.run: no CUDA or ROCm device found, and no other is measured (events, memory peaks and "
                "graphs are torch.cuda's; an XPU has none of these); `--dry-run` tests this program without one"
            )
        device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
        return Bench(device, DTYPES[options.dtype], options.rounds, options.dry_run)

    def late(self) -> bool:
        return time.monotonic() > self.ends

    def measure(
        self, variants: dict[str, Callable[[int], Any]], before: Callable[[], Any] = lambda: None, *, queued: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Each variant's `median_ms` and spread, or the `note` why it has none. It is given the round's number.

        Args:
            before: Runs before each, untimed.
            queued: Whether the launches are left out of the time.
        """
        notes: dict[str, str] = {}
        times: dict[str, list[float]] = {}

        def warm_up(name: str) -> None:
            before()
            variants[name](0)  # compiles
            self._wait()  # what failed on the device shows here, with its variant
            times[name] = []

        def time_one(name: str, i: int) -> None:
            before()
            times[name].append(self._time(lambda: variants[name](i), queued))

        for name in variants:
            if self.late():
                notes[name] = LATE
            elif self.dry:  # its one run is enough of an interpreted kernel
                times[name] = []
            elif note := self._try(warm_up, name):
                notes[name] = note
        for i in range(self.rounds):
            if i >= FEWEST_ROUNDS and self.late():
                break
            for name in list(times):
                note = self._try(time_one, name, i)
                if note:
                    notes[name] = note
                    del times[name]
        return {name: summary(times[name]) if name in times else {"note": notes[name]} for name in variants}

    def _try(self, run: Callable[..., None], *arguments: Any) -> str | None:
        """Its error's first line: one that cannot run must not take the others' times away."""
        try:
            run(*arguments)
            return None
        except Exception as error:
            note = first_line(error)
        self.free()  # now that no traceback holds what it had allocated
        return note

    def _time(self, run: Callable[[], Any], queued: bool) -> float:
        if self.dry:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        while True:
            torch.cuda.synchronize()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if queued:
                torch.cuda._sleep(self.sleep_cycles)
            first.record()
            run()
            last.record()
            # If the GPU has passed the first event already, it waited for a launch behind it.
            ahead = not queued or not first.query()
            torch.cuda.synchronize()
            if ahead:
                return float(first.elapsed_time(last))
            if self.sleep_cycles >= MOST_SLEEP_CYCLES:
                raise RuntimeError("the launches take longer than the longest sleep, or wait for the GPU")
            self.sleep_cycles *= 2

    def _wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """What a failed call left cached; after an error that the device does not recover from, nothing."""
        if not self.dry:
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        if self.dry:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated() - before)

    def fits(self, n_bytes: float) -> bool:
        if self.dry:
            return True
        self.free()  # what torch has cached is free for the next
        return bool(n_bytes < torch.cuda.mem_get_info()[0])

    def logits(self, n: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        new = {"generator": generator, "device": self.device}
        student, teacher = (torch.empty((n, vocab), dtype=self.dtype, device=self.device) for _ in range(2))
        for start in range(0, n, 512):  # no fp32 copy of the whole
            part = slice(start, min(start + 512, n))
            s = 4.5 * torch.randn((part.stop - start, vocab), **new)
            student[part], teacher[part] = s, s + 0.5 * torch.randn(s.shape, **new)
        return student, teacher


def summary(times: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "rounds": len(times)}


def first_line(error: BaseException) -> str:
    """`Type: message`, of a failed assertion its message alone; a message may be empty."""
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, AssertionError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
