"""The tables of a GPU run with logits in: the score pass against a device copy, and the whole loss against plain torch.

  score: bytes counted are both rows read once, 2 N V itemsize; the copy reads and writes the same bytes once each, so
         share = (2 N V itemsize / t_score) / (bytes read and written by the copy / t_copy)
         share of read: the same over a kernel that reads as many bytes and keeps only maxima (read.py)
  few rows: the same for N = 1 .. 64, each row split over programs as the launch table has it, and not split
  loss:  forward and backward to the logits, N = 8192, V = 151,936, 5 % by teachability; peak is over the inputs and the
         gradient that the caller asked for, which one method needs no memory for: it writes it over the logits
Score and few rows are kernel time, launches queued ahead; the loss is wall time as a caller sees it, from an idle GPU, with
its launches. Input sets rotate so that L2 does not serve them. A size that does not fit is a row saying so.

Not here: how time and memory are taken (timing.py), methods compared with (methods.py), block sizes (sweep.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opd_kernels import launch_table
from opd_kernels.score import score_fwd
from torch import Tensor

from benchmarks.gpu.methods import IN_PLACE, METHODS
from benchmarks.gpu.read import read, read_bytes
from benchmarks.gpu.timing import LATE, PLAIN, Bench, first_line

ROTATE_BYTES = 512 * 2**20  # input sets until they exceed any L2 by far
Row = dict[str, Any]


def score_table(bench: Bench, tokens: list[int], vocab: list[int]) -> Iterator[Row]:
    block = {"block": 32} if bench.dry else {}
    for V in vocab:
        for n in tokens:
            row: Row = {"n": n, "vocab": V, "dtype": str(bench.dtype)[6:]}
            one = 2 * n * V * bench.dtype.itemsize
            if bench.late() or not bench.fits(1.6 * one):
                yield row | {"note": LATE if bench.late() else "does not fit"}
                continue
            sets = [bench.logits(n, V, seed) for seed in range(min(8, max(1, ROTATE_BYTES // one)) if not bench.dry else 2)]
            target = torch.empty_like(sets[0][0])
            times = bench.measure(
                {
                    "score": lambda i, sets=sets, V=V: score_fwd(*sets[i % len(sets)], None, vocab_size=V, **PLAIN),
                    "copy": lambda i, sets=sets, target=target: target.copy_(sets[i % len(sets)][0]),
                    "read": lambda i, sets=sets: read(*sets[i % len(sets)], **block),
                },
                queued=True,
            )
            row |= {"bytes": one} | times["score"]
            row |= _rates(one, times["score"], 2 * target.nbytes, times["copy"])
            if "median_ms" in times["read"]:
                row["read_gb_per_s"] = read_bytes(sets[0][0], **block) / times["read"]["median_ms"] / 1e6
                if "gb_per_s" in row:
                    row["share_of_read"] = row["gb_per_s"] / row["read_gb_per_s"]
            del sets, target
            print(f"score N={n} V={V}: {_words(row)}", flush=True)
            yield row


def _rates(read: int, score: Row, copied: int, copy: Row) -> Row:
    """Of a score pass and a copy, as far as they ran."""
    out: Row = {}
    if "median_ms" in score:
        out["gb_per_s"] = read / score["median_ms"] / 1e6
    if "median_ms" in copy:
        out["copy_gb_per_s"] = copied / copy["median_ms"] / 1e6
    if len(out) == 2:
        out["share"] = out["gb_per_s"] / out["copy_gb_per_s"]
    return out


def _words(row: Row) -> str:
    if "median_ms" not in row:
        return str(row["note"])
    share = f", {row['share']:.0%} of a copy" if "share" in row else ""
    share += f", {row['share_of_read']:.0%} of reading alone" if "share_of_read" in row else ""
    return f"{row['median_ms']:.4f} ms, {row['gb_per_s']:.0f} GB/s{share}"


@contextmanager
def _parts(limit: int) -> Iterator[None]:
    """At most so many programs a row."""
    kept = launch_table.score_parts
    launch_table.score_parts = lambda *arguments: min(limit, kept(*arguments))
    try:
        yield
    finally:
        launch_table.score_parts = kept


def few_rows(bench: Bench) -> Iterator[Row]:
    """Times of the same rows split over programs and not; every round other rows."""
    V = 8320 if bench.dry else 151_936  # two blocks: the least that is split
    every = 2 if bench.dry else max(64, ROTATE_BYTES // (2 * V * bench.dtype.itemsize))
    student, teacher = bench.logits(every, V)
    for n in (1, 2) if bench.dry else (1, 8, 64):

        def run(i: int, limit: int, n: int = n) -> None:
            part = slice(i % (every // n) * n, i % (every // n) * n + n)
            with _parts(limit):
                score_fwd(student[part], teacher[part], None, vocab_size=V, **PLAIN)

        split = launch_table.score_parts(n, V, launch_table.score(bench.dtype, bench.dtype), bench.device)
        limits = {"split": launch_table.MAX_PARTS, "one program a row": 1}
        times = bench.measure({name: lambda i, x=limit: run(i, x) for name, limit in limits.items()}, queued=True)
        read = 2 * n * V * bench.dtype.itemsize
        for name, limit in limits.items():
            row: Row = {"n": n, "vocab": V, "dtype": str(bench.dtype)[6:], "programs": name, "per_row": min(split, limit)}
            row |= {"bytes": read} | times[name]
            row |= _rates(read, times[name], 0, {})
            print(f"score N={n} V={V}, {name}: {_words(row)}", flush=True)
            yield row


def loss_table(bench: Bench) -> Iterator[Row]:
    """One row per method; a method that fails is a row with its error's first line."""
    n, V = (3, 160) if bench.dry else (8192, 151_936)
    student, teacher = bench.logits(n, V)
    kept = student.clone()  # a method may overwrite the logits

    def restore() -> None:
        student.copy_(kept)

    rows: list[Row] = []
    runs: dict[str, Callable[[int], Any]] = {}
    for name, method in METHODS.items():
        row: Row = {"method": name, "n": n, "vocab": V, "dtype": str(bench.dtype)[6:]}
        rows.append(row)
        if bench.late():
            row["note"] = LATE
            continue
        restore()
        try:
            loss, gradient = method(student, teacher)  # also compiles
            row |= {"loss": loss.item(), "gradient_norm": _norm(gradient)}
            del loss, gradient
            restore()
            peak = bench.peak_bytes(lambda method=method: method(student, teacher))
            row["peak_bytes"] = None if peak is None else peak - needed_bytes(name, student)
            runs[name] = lambda _, method=method: method(student, teacher)
        except Exception as error:
            row["note"] = first_line(error)
            bench.free()
    measured = bench.measure(runs, restore)
    for row in rows:
        row |= measured.get(row["method"], {})
    _compare_to_eager(rows)
    for row in rows:
        shown = f"{row['median_ms']:.2f} ms, peak {row['peak_bytes']}" if "median_ms" in row else row["note"]
        print(f"loss {row['method']}: {shown}", flush=True)
        yield row


def needed_bytes(method: str, student: Tensor) -> int:
    """Of the gradient that the caller asks for: no method is blamed for these."""
    return 0 if method in IN_PLACE else student.nbytes


def _norm(gradient: Tensor) -> float:
    """In fp32, without an fp32 copy of the whole."""
    return sum(float(part.float().square().sum()) for part in gradient.split(512)) ** 0.5


def _compare_to_eager(rows: list[Row]) -> None:
    eager = next(row for row in rows if row["method"] == "eager")
    for row in rows:
        if "median_ms" in row and "median_ms" in eager:
            row["speed_to_eager"] = eager["median_ms"] / row["median_ms"]
        if row.get("peak_bytes") is not None and eager.get("peak_bytes"):
            row["peak_to_eager"] = row["peak_bytes"] / eager["peak_bytes"]
