# Block sizes and warps other than those of the launch table, timed: what would be faster is printed, never applied.
#
#   score: R * QUAD = GROUP / VEC chunks of a group, per thread and across threads; GROUPS groups a block
#   gradients: BLOCK_V and warps.  Timed: one launch at N = 8192 (gradients: 409 rows), V = 151,936, as gpu_timing.py does.
#
# Not here: the table and its reasons (kernels/opd_kernels/tiles.py).
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from opd_kernels import tiles
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import GROUP, score_fwd
from opd_kernels.tiles import Tile

from benchmarks.gpu_timing import PLAIN, Bench, summary

BETTER = 0.98  # of the table's time: what is worth a line


@contextmanager
def shipped(name: str, tile: Tile) -> Iterator[None]:
    """The launch table with another row."""
    kept = getattr(tiles, name)
    setattr(tiles, name, lambda *_: tile)
    try:
        yield
    finally:
        setattr(tiles, name, kept)


def score_tiles(dtype: torch.dtype) -> Iterator[Tile]:
    vec = 16 // dtype.itemsize
    for quad, groups, lanes_per_thread in product((2, 4, 8), (16, 32, 64), (1, 2)):
        warps = groups * quad // 32 // lanes_per_thread
        if 1 <= warps <= 8:
            yield Tile({"R": GROUP // vec // quad, "GROUPS": groups, "QUAD": quad, "VEC": vec}, num_warps=warps)


def grad_tiles() -> Iterator[Tile]:
    for block, warps in product((1024, 2048, 4096, 8192), (2, 4, 8)):
        yield Tile({"BLOCK_V": block}, num_warps=warps)


def run(bench: Bench) -> list[dict[str, Any]]:
    n, m, V = (1, 1, 160) if bench.dry else (8192, 409, 151_936)
    student, teacher = bench.logits(n, V)
    rows = torch.linspace(0, n - 1, m, device=bench.device).int()
    weights = torch.ones(m, device=bench.device)
    columns = score_fwd(student, teacher, rows, vocab_size=V, **PLAIN).columns
    out = torch.empty_like(student)

    def gradient(kernel: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: kernel(student, teacher, rows, weights, columns, out=out, vocab_size=V, **PLAIN)

    todo: list[tuple[str, str, Tile, list[Tile], Callable[[], Any]]] = [
        (
            "score_fwd",
            "score",
            tiles.score(bench.dtype, bench.dtype),
            list(score_tiles(bench.dtype)),
            lambda: score_fwd(student, teacher, None, vocab_size=V, **PLAIN),
        ),
        ("reverse_kl_grad", "grad", tiles.grad(), list(grad_tiles()), gradient(reverse_kl_grad)),
        ("forward_kl_grad", "grad", tiles.grad(), list(grad_tiles()), gradient(forward_kl_grad)),
    ]
    found = []
    for kernel, name, table, others, launch in todo:
        found += _sweep(bench, kernel, name, table, others[:2] if bench.dry else others, launch)
    return found


def _sweep(
    bench: Bench, kernel: str, name: str, table: Tile, others: list[Tile], launch: Callable[[], Any]
) -> list[dict[str, Any]]:
    def timed(tile: Tile) -> Callable[[int], Any]:
        def run(_: int) -> None:
            with shipped(name, tile):
                launch()

        return run

    rows, variants = [], {}
    for tile in [table, *(other for other in others if other != table)]:
        key = f"{tile.constants} num_warps={tile.num_warps}"
        row = {"kernel": kernel, "tile": key, "shipped": tile is table}
        rows.append(row)
        try:
            timed(tile)(0)
            variants[key] = timed(tile)
        except Exception as error:  # a tile the compiler refuses is a row that says so
            row["note"] = (str(error) or type(error).__name__).splitlines()[0]
    times = {key: summary(values) for key, values in bench.milliseconds(variants).items()}
    for row in rows:
        row |= times.get(row["tile"], {})
    best = rows[0]["median_ms"]
    better = [row for row in rows if row.get("median_ms", best) < BETTER * best]
    print(f"sweep {kernel}: the table's {rows[0]['tile']} takes {best:.3f} ms", flush=True)
    for row in sorted(better, key=lambda row: row["median_ms"]):
        print(f"  faster: {row['tile']} takes {row['median_ms']:.3f} ms ({row['median_ms'] / best:.0%})", flush=True)
    return rows
