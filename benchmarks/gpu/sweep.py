"""Block sizes and warps other than those of the launch table, timed: what would be faster is printed, never applied.

  score: R * QUAD = GROUP / VEC chunks of a group, per thread and across threads; GROUPS groups a block
  gradients, jsd: BLOCK_V and warps;  off_list: LANES threads of R * VEC logits;  support: warps of its three kernels,
  one changed at a time.
  Timed: one launch, kernel time (timing.py's `queued`), at V = 151,936, of the score also 50,257; score and support
  (K = 16) of 8192 rows, the others of 409 (off_list: lists of 32). The sums that gradients read are made before.
  The score also of rows whose last logits are masked: it sweeps them twice.

Not here: the table and its reasons (kernels/opd_kernels/launch_table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from opd_kernels import launch_table
from opd_kernels.argmax import argmax_fwd
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.jsd import jsd_fwd, jsd_grad
from opd_kernels.launch_table import SupportTile, Tile
from opd_kernels.off_list import off_list_fwd, off_list_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import GROUP, score_fwd
from opd_kernels.support import support_fwd

from benchmarks.gpu.timing import PLAIN, Bench

BETTER = 0.98  # of the table's time: what is worth a line
TOP_K, LISTED, BETA = 16, 32, 0.5
MASKED = 64  # logits at the end of each row
ONE = {"temperature": 1.0, "scale": 1.0, "softcap": None}


class Sweep(NamedTuple):
    kernel: str
    name: str  # of the launch table's function
    shipped: Any  # its row
    others: list[Any]
    launch: Callable[[], Any]


@contextmanager
def shipped(name: str, tile: Tile) -> Iterator[None]:
    """The launch table with another row."""
    kept = getattr(launch_table, name)
    setattr(launch_table, name, lambda *_, **__: tile)
    try:
        yield
    finally:
        setattr(launch_table, name, kept)


def score_tiles(dtype: torch.dtype) -> Iterator[Tile]:
    vec = 16 // dtype.itemsize
    for quad, groups, lanes_per_thread in product((2, 4, 8), (16, 32, 64), (1, 2)):
        warps = groups * quad // 32 // lanes_per_thread
        if 1 <= warps <= 8:
            yield Tile({"R": GROUP // vec // quad, "GROUPS": groups, "QUAD": quad, "VEC": vec}, num_warps=warps)


def odd_score_tiles() -> Iterator[Tile]:
    for quad, threads in product((8, 16, 32), (128, 256)):
        yield Tile({"R": GROUP // quad, "GROUPS": threads // quad, "QUAD": quad, "VEC": 1}, num_warps=threads // 32)


def grad_tiles() -> Iterator[Tile]:
    for block, warps in product((1024, 2048, 4096, 8192), (2, 4, 8)):
        yield Tile({"BLOCK_V": block}, num_warps=warps)


def off_list_tiles(dtype: torch.dtype) -> Iterator[Tile]:
    vec = 16 // dtype.itemsize
    for lanes, per_lane in product((64, 128, 256), (16, 32, 64)):
        yield Tile({"LANES": lanes, "R": per_lane // vec, "VEC": vec}, num_warps=lanes // 32)


def support_tiles(table: SupportTile) -> Iterator[SupportTile]:
    for field, warps in product(SupportTile._fields, (1, 2, 4, 8)):
        yield table._replace(**{field: warps})


def label(tile: Tile | SupportTile) -> str:
    if isinstance(tile, SupportTile):
        return ", ".join(f"{name}={value}" for name, value in tile._asdict().items())
    return f"{tile.constants} num_warps={tile.num_warps}"


def sweeps(bench: Bench) -> Iterator[Sweep]:
    n, m, V = (1, 1, 160) if bench.dry else (8192, 409, 151_936)
    student, teacher = bench.logits(n, V)
    pair, own = {"vocab_size": V, **PLAIN}, {"vocab_size": V, **ONE}
    rows = torch.linspace(0, n - 1, m, device=bench.device).int()
    weights = torch.ones(m, device=bench.device)
    out = torch.empty_like(student)
    table = launch_table.score(bench.dtype, bench.dtype)
    yield Sweep("score_fwd", "score", table, list(score_tiles(bench.dtype)), lambda: score_fwd(student, teacher, None, **pair))
    odd = 131 if bench.dry else 50_257
    narrow, other = bench.logits(n, odd)
    yield Sweep(
        f"score_fwd, V = {odd}", "score", launch_table.score(bench.dtype, bench.dtype, aligned=False), list(odd_score_tiles()),
        lambda: score_fwd(narrow, other, None, vocab_size=odd, **PLAIN),
    )  # fmt: skip
    score = score_fwd(student, teacher, None, **pair)
    warps = launch_table.support(TOP_K, -(-V // GROUP))
    yield Sweep(
        "support_fwd", "support", warps, list(support_tiles(warps)),
        lambda: support_fwd(student, teacher, None, score, top_k=TOP_K, **pair),
    )  # fmt: skip
    chosen = student, teacher, rows
    chosen_score = score_fwd(*chosen, **pair)
    columns, top = chosen_score.columns, argmax_fwd(student, rows, chosen_score, vocab_size=V)
    write = {"top": top, "out": out, **pair}
    sums = jsd_fwd(*chosen, columns, beta=BETA, **pair)
    grad, blocks = launch_table.grad(), list(grad_tiles())
    yield Sweep("reverse_kl_grad", "grad", grad, blocks, lambda: reverse_kl_grad(*chosen, weights, columns, **write))
    yield Sweep("forward_kl_grad", "grad", grad, blocks, lambda: forward_kl_grad(*chosen, weights, columns, **write))
    yield Sweep("jsd_fwd", "grad", grad, blocks, lambda: jsd_fwd(*chosen, columns, beta=BETA, **pair))
    yield Sweep("jsd_grad", "grad", grad, blocks, lambda: jsd_grad(*chosen, weights, columns, sums, beta=BETA, **write))
    ids = student[rows.long()].float().topk(LISTED).indices.sort().values.int()
    values, off_list_columns = torch.zeros_like(ids, dtype=torch.float32), off_list_fwd(student, rows, ids, **own)
    yield Sweep(
        "off_list_fwd", "off_list", launch_table.off_list(bench.dtype), list(off_list_tiles(bench.dtype)),
        lambda: off_list_fwd(student, rows, ids, **own),
    )  # fmt: skip
    listed = student, rows, ids, values, weights, off_list_columns
    yield Sweep(
        "off_list_grad", "off_list_grad", launch_table.off_list_grad(), blocks,
        lambda: off_list_grad(*listed, out=out, add=False, first_id=0, **own),
    )  # fmt: skip
    student[:, -MASKED:] = -torch.inf  # as of padded ids; the last, because all others read these logits too
    yield Sweep("score_fwd, masked tail", "score", table, [], lambda: score_fwd(student, teacher, None, **pair))


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per kernel and tile; one that the compiler refuses is a row that says so."""
    for sweep in sweeps(bench):
        yield from _sweep(bench, sweep)


def _sweep(bench: Bench, sweep: Sweep) -> list[dict[str, Any]]:
    def timed(tile: Any) -> Callable[[int], Any]:
        def launch(_: int) -> None:
            with shipped(sweep.name, tile):
                sweep.launch()

        return launch

    others = sweep.others[:2] if bench.dry else sweep.others
    every = {label(tile): tile for tile in [sweep.shipped, *others]}
    got = bench.measure({key: timed(tile) for key, tile in every.items()}, queued=True)
    rows = [{"kernel": sweep.kernel, "tile": key, "shipped": key == label(sweep.shipped), **row} for key, row in got.items()]
    best = rows[0].get("median_ms")
    if best is None:
        print(f"sweep {sweep.kernel}: the table's {rows[0]['tile']}: {rows[0]['note']}", flush=True)
        return rows
    better = [row for row in rows if row.get("median_ms", best) < BETTER * best]
    print(f"sweep {sweep.kernel}: the table's {rows[0]['tile']} takes {best:.3f} ms", flush=True)
    for row in sorted(better, key=lambda row: row["median_ms"]):
        print(f"  faster: {row['tile']} takes {row['median_ms']:.3f} ms ({row['median_ms'] / best:.0%})", flush=True)
    return rows
