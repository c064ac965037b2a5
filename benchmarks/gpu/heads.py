"""The table of a GPU run with heads in: hidden states and two weights, loss and gradients of the student's head out.

  V = 151,936, D 2048/4096, bf16, rho = 5 %;  peak is over inputs and the gradients that the caller asks for
  floor: the matmuls that no method escapes and nothing else: both score matmuls in tiles, the selected rows' logits in fp32,
         dH and dW.  to TRL twice: TRL's fused divergence on all rows without a graph, then on those of largest reverse KL.
  ours: 16-bit score tiles; "fp32 tiles": score_dtype="float32"; "8 bits": score_dtype="float8", the teacher's head kept in 8
  bits; "rollout": student_stats, made outside the clock; "640-row tiles": in steps of 128; "1,024-row tiles": with 768
  MiB.  overlap: the selected set against that of fp32 tiles.
Wall time as a caller sees it, from an idle GPU; interleaved, medians after one warm-up. TRL and Liger where installed: a
missing one is a row that says so.

Not here: correctness (check_heads.py), dense logits (logits.py), clock and meter (timing.py), files
(report.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu import methods
from benchmarks.cpu.heads import Heads, Sizes, build_heads
from benchmarks.gpu.timing import LATE, Bench, first_line
from opd_ops import Float8Rows, LinearHead, StudentStats, selective_opd_loss
from opd_ops.backends.shared import grids
from opd_ops.backends.shared.matmul import head_product, operand_dtype

FRACTION = 0.05
TILE_ROWS = 768  # of the floor's score matmuls
SETTINGS = methods.Settings(fraction=FRACTION)


@dataclass(frozen=True)
class Case:
    """The heads of one N, and what a caller would keep of them between steps."""

    heads: Heads
    teacher_in_8_bits: Float8Rows | None
    student_stats: StudentStats

    @staticmethod
    @torch.no_grad()
    def of(heads: Heads) -> Case:
        parts = [StudentStats.from_logits(h @ heads.student_weight.T) for h in heads.student_hidden.split(512)]
        columns = zip(*((x.logsumexp, x.entropy, x.ids, x.logprobs) for x in parts), strict=True)
        weight = heads.teacher_weight
        kept = Float8Rows.of(weight) if weight.shape[1] % 16 == 0 else None
        return Case(heads, kept, StudentStats(*(torch.cat(column) for column in columns)))


Run = Callable[[Case], Tensor | None]  # the selected positions, bool; None: trains on all, or on none


def ours(**options: Any) -> Run:
    def run(case: Case) -> Tensor:
        heads = case.heads
        known = {"student_stats": case.student_stats} if options.get("rollout") else {}
        chosen = {name: value for name, value in options.items() if name != "rollout"}
        out = selective_opd_loss(
            LinearHead(heads.student_hidden, heads.student_weight),
            LinearHead(heads.teacher_hidden, heads.teacher_weight, float8=case.teacher_in_8_bits),
            fraction=FRACTION,
            backend="triton",
            **known,
            **chosen,
        )
        out.loss.backward()
        return out.selected

    return run


def in_tiles(run: Run, *steps: int) -> Run:
    """The same with score tiles in multiples of other numbers of rows."""

    def tiled(case: Case) -> Tensor | None:
        kept, grids.TILE_ROWS = grids.TILE_ROWS, steps
        try:
            return run(case)
        finally:
            grids.TILE_ROWS = kept

    return tiled


@torch.no_grad()
def floor(case: Case) -> None:
    heads = case.heads
    sides = (heads.student_hidden, heads.student_weight), (heads.teacher_hidden, heads.teacher_weight)
    n, vocab = len(heads.student_hidden), len(heads.student_weight)
    m = math.ceil(FRACTION * n)
    for hidden, weight in sides:
        tile = hidden.new_empty((min(n, TILE_ROWS), vocab))
        for rows in hidden.split(TILE_ROWS):
            torch.mm(rows, weight.T, out=tile[: len(rows)])
    del tile
    for hidden, weight in sides:
        logits = torch.empty((m, vocab), device=hidden.device)
        operands = hidden[:m].to(operand_dtype(hidden, logits))
        head_product(operands, weight, None, logits, cast_columns=2**12)
    dlogits = logits.to(hidden.dtype)
    heads.student_hidden.grad = torch.zeros_like(heads.student_hidden)
    torch.mm(dlogits, heads.student_weight, out=heads.student_hidden.grad[:m])
    heads.student_weight.grad = torch.mm(dlogits.T, heads.student_hidden[:m])


def _peer(method: Callable[[Heads, methods.Settings], methods.Outcome]) -> Run:
    def run(case: Case) -> None:
        method(case.heads, SETTINGS)

    return run


METHODS: dict[str, Run] = {
    "matmul floor": floor,
    "ours": ours(),
    "ours, 640-row tiles": in_tiles(ours(), 128, 256),  # the second entry is the groups' of selected rows
    "ours, 1,024-row tiles": in_tiles(ours(workspace_bytes=768 * 2**20), 1024, 256, 128),
    "ours, fp32 tiles": ours(score_dtype="float32"),
    "ours, 8 bits": ours(score_dtype="float8"),
    "ours, rollout": ours(rollout=True),
    "TRL, called twice": _peer(methods.trl_twice),
    "TRL, dense": _peer(methods.trl_dense),
    "Liger chunked, compiled": _peer(methods.liger_compiled),
    "eager": _peer(methods.eager),
}

PEERS = ("TRL, called twice", "TRL, dense", "Liger chunked, compiled")


def table(bench: Bench, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """One row per N and method; a method that fails is a row with its error's first line."""
    sizes = Sizes(max(tokens), *((320, 16, 32) if bench.dry else (151_936, 2048, 4096)))
    whole = build_heads(sizes).to(torch.bfloat16)
    weights = [x.detach().to(bench.device) for x in (whole.student_weight, whole.teacher_weight)]
    for n in tokens:
        if bench.late():
            yield {"method": "all", "n": n, "vocab": sizes.vocab, "note": LATE}
            continue
        hidden = [x.detach()[:n].to(bench.device) for x in (whole.student_hidden, whole.teacher_hidden)]
        case = Case.of(Heads(hidden[0].requires_grad_(), weights[0].requires_grad_(), hidden[1], weights[1]))
        for row in _rows(bench, case, n, sizes):
            print(f"heads N={n} {row['method']}: {words(row)}", flush=True)
            yield row


def words(row: dict[str, Any]) -> str:
    """Without a floor's time, nothing is known of its multiples."""
    if "median_ms" not in row:
        return str(row["note"])
    to_floor = f"{row['to_floor']:.3f}" if row.get("to_floor") is not None else "-"
    return f"{row['median_ms']:.2f} ms, {to_floor} of the floor"


def _rows(bench: Bench, case: Case, n: int, sizes: Sizes) -> list[dict[str, Any]]:
    rows, runs, chosen = [], {}, {}
    gradients = case.heads.student_hidden.nbytes + case.heads.student_weight.nbytes
    for name, run in METHODS.items():
        row: dict[str, Any] = {"method": name, "n": n, "vocab": sizes.vocab, "dims": f"{sizes.student_dim}/{sizes.teacher_dim}"}
        rows.append(row)
        if bench.dry and name in PEERS:
            row["note"] = "left out of a dry run, whose times mean nothing"
            continue
        if bench.late() or (name == "eager" and not bench.fits(14.0 * n * sizes.vocab)):
            row["note"] = LATE if bench.late() else "does not fit"
            continue
        try:
            case.heads.clear_gradients()
            chosen[name] = run(case)  # also compiles
            case.heads.clear_gradients()
            peak = bench.peak_bytes(lambda run=run: run(case))
            row["peak_bytes"] = None if peak is None else peak - gradients
            runs[name] = run
        except Exception as error:
            row["note"] = first_line(error)
            bench.free()
    measured = bench.measure({name: lambda _, run=run: run(case) for name, run in runs.items()}, case.heads.clear_gradients)
    exact = chosen.get("ours, fp32 tiles")
    for row in rows:
        name = row["method"]
        row |= measured.get(name, {})
        if "median_ms" not in row:
            continue
        if exact is not None and isinstance(chosen[name], Tensor):
            row["overlap"] = float((chosen[name] & exact).sum() / exact.sum())
    _compare(rows)
    return rows


def _compare(rows: list[dict[str, Any]]) -> None:
    medians = {row["method"]: row["median_ms"] for row in rows if "median_ms" in row}
    for row in rows:
        for name, base in (("to_floor", "matmul floor"), ("to_trl_twice", "TRL, called twice")):
            if "median_ms" in row and base in medians:
                row[name] = row["median_ms"] / medians[base]
