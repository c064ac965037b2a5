# The two tables of a GPU run: the score pass against a device copy, and the whole loss against plain torch.
#
#   score: bytes counted are both rows read once, 2 N V itemsize; the copy reads and writes the same bytes once each, so
#          share = (2 N V itemsize / t_score) / (bytes read and written by the copy / t_copy)
#   loss:  forward and backward to the logits, N = 8192, V = 151,936, 5 % by teachability; peak is the most memory allocated
#          during one call, over what was allocated before it; the gradient that the caller asked for is in it, but for the
#          method that writes it over the logits
# Variants are interleaved, medians of `rounds` after one warm-up; input sets rotate so that L2 does not serve them. Logits are
# normal, of scale 4.5 (entropy 1 to 3 nats), the teacher the student plus noise. A size that does not fit is a row saying so.
#
# Not here: methods compared with (gpu_methods.py), block sizes (gpu_sweep.py), files (gpu_report.py).
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from opd_kernels.score import score_fwd
from torch import Tensor

from benchmarks.gpu_methods import METHODS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLAIN = {"temperature": 1.0, "s_scale": 1.0, "t_scale": 1.0, "s_softcap": None, "t_softcap": None}
ROTATE_BYTES = 512 * 2**20  # input sets until they exceed any L2 by far


@dataclass
class Bench:
    """Where and how often things are timed; `dry` is a CPU, interpreted, and means nothing."""

    device: torch.device
    dtype: torch.dtype
    rounds: int
    dry: bool

    @staticmethod
    def of(options: argparse.Namespace) -> Bench:
        if not options.dry_run and not torch.cuda.is_available():
            sys.exit("benchmarks.gpu: no CUDA or ROCm device found; `--dry-run` tests this program without one")
        device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
        return Bench(device, DTYPES[options.dtype], options.rounds, options.dry_run)

    def milliseconds(
        self, variants: dict[str, Callable[[int], Any]], before: Callable[[], Any] = lambda: None
    ) -> dict[str, list[float]]:
        """Each variant's times over the rounds, A B C A B C; a variant gets the round's number. `before` each, untimed."""
        for run in variants.values():
            before()
            run(0)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for i in range(self.rounds):
            for name, run in variants.items():
                before()
                times[name].append(self._time(lambda run=run, i=i: run(i)))
        return times

    def _time(self, run: Callable[[], Any]) -> float:
        if self.dry:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last))

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        if self.dry:
            run()
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
        return self.dry or n_bytes < torch.cuda.mem_get_info()[0]

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
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def score_table(bench: Bench, tokens: list[int], vocab: list[int]) -> list[dict[str, Any]]:
    out = []
    for V in vocab:
        for n in tokens:
            row: dict[str, Any] = {"n": n, "vocab": V, "dtype": str(bench.dtype)[6:]}
            one = 2 * n * V * bench.dtype.itemsize
            if not bench.fits(1.6 * one):
                out.append(row | {"note": "does not fit"})
                continue
            sets = [bench.logits(n, V, seed) for seed in range(min(8, max(1, ROTATE_BYTES // one)) if not bench.dry else 2)]
            target = torch.empty_like(sets[0][0])
            times = bench.milliseconds(
                {
                    "score": lambda i, sets=sets, V=V: score_fwd(*sets[i % len(sets)], None, vocab_size=V, **PLAIN),
                    "copy": lambda i, sets=sets, target=target: target.copy_(sets[i % len(sets)][0]),
                }
            )
            score, copy = summary(times["score"]), summary(times["copy"])
            rate = one / score["median_ms"] / 1e6
            copied = 2 * target.numel() * target.element_size() / copy["median_ms"] / 1e6
            row |= score | {"bytes": one, "gb_per_s": rate, "copy_gb_per_s": copied, "share": rate / copied}
            out.append(row)
            print(f"score N={n} V={V}: {score['median_ms']:.3f} ms, {rate:.0f} GB/s, {rate / copied:.0%} of a copy", flush=True)
            del sets, target
    return out


def loss_table(bench: Bench) -> list[dict[str, Any]]:
    """One row per method; a method that fails is a row with its error's first line."""
    n, V = (3, 160) if bench.dry else (8192, 151_936)
    student, teacher = bench.logits(n, V)
    kept = student.clone()  # a method may overwrite the logits

    def restore() -> None:
        student.copy_(kept)

    out, times = [], {}
    for name, method in METHODS.items():
        row: dict[str, Any] = {"method": name, "n": n, "vocab": V, "dtype": str(bench.dtype)[6:]}
        restore()
        try:
            loss, gradient = method(student, teacher)  # also compiles
            row |= {"loss": loss.item(), "gradient_norm": _norm(gradient)}
            del loss, gradient
            restore()
            row["peak_bytes"] = bench.peak_bytes(lambda method=method: method(student, teacher))
            times[name] = method
        except (RuntimeError, ValueError) as error:
            row["note"] = (str(error) or type(error).__name__).splitlines()[0]
            if not bench.dry:
                torch.cuda.empty_cache()
        out.append(row)
    measured = bench.milliseconds({name: lambda i, m=m: m(student, teacher) for name, m in times.items()}, restore)
    for row in out:
        if row["method"] in measured:
            row |= summary(measured[row["method"]])
    _compare_to_eager(out)
    for row in out:
        print(
            f"loss {row['method']}: " + (row.get("note") or f"{row['median_ms']:.2f} ms, peak {row['peak_bytes']}"), flush=True
        )
    return out


def _norm(gradient: Tensor) -> float:
    """In fp32, without an fp32 copy of the whole."""
    return sum(float(part.float().square().sum()) for part in gradient.split(512)) ** 0.5


def _compare_to_eager(rows: list[dict[str, Any]]) -> None:
    eager = next(row for row in rows if row["method"] == "eager")
    for row in rows:
        if "median_ms" in row and "median_ms" in eager:
            row["speed_to_eager"] = eager["median_ms"] / row["median_ms"]
        if row.get("peak_bytes") is not None and eager.get("peak_bytes"):
            row["peak_to_eager"] = row["peak_bytes"] / eager["peak_bytes"]
