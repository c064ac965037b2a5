"""The launches of one call, on any machine: matmuls with their shapes, kernels, and all other operators that reach the device.

  score   both heads of all N positions, in tiles: logits, statistics, top-K
  loss    both heads of the selected positions, in groups: logits, losses, gradients; and the backward's scaling

The backend's own functions run on tensors without storage, as they would on CUDA, with the kernels' launches recorded. Views
and allocations are not counted. The selectors' scores, the selection and the metrics are not part of it:
they read a few numbers a position.

Command: python -m benchmarks.static.launches --json FILE [--n 1024 4096 16384 65536]

Not here: instructions of a kernel (roofline.py), FLOP and bytes of a call (opd_ops/estimates/compute.py), what
they take (call_time.py).
"""

import argparse
import json
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from opd_kernels import gradient, launch_table, score
from opd_kernels.device import row_step

from benchmarks.static.operators import FREE, Operators
from benchmarks.static.roofline import STREAMING, Recorder, kernel_name
from opd_ops.backends.triton import heads, heads_loss
from opd_ops.divergences import ReverseKL
from opd_ops.inputs.sources import Source, Transform
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.budget import Budget
from opd_ops.selection.stats import Scoring

V, STUDENT_DIM, TEACHER_DIM, TOP_K, MULTIPROCESSORS = 151_936, 2048, 4096, 16, 132
FRACTION = 0.05
MATMULS = {"mm", "addmm", "bmm", "_scaled_mm"}


class Matmul(NamedTuple):
    rows: int
    inner: int
    columns: int
    nbytes: int  # of both operands and the result, which is also read where it is added to

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns


class Trace(Operators):
    """Operators that are no matmuls in `names`, with the bytes they move, and the matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls: list[Matmul] = []
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].rstrip("_")
        if name not in MATMULS:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if name not in FREE:
                self.nbytes[name] += _moved(name, args, out)
            return out
        a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
        out = func(*args, **(kwargs or {}))
        again = name == "addmm" and (kwargs or {}).get("beta", 1) != 0
        self.matmuls.append(
            Matmul(a.shape[-2], a.shape[-1], b.shape[-1], _bytes(a) + _bytes(b) + _bytes(out) * (2 if again else 1))
        )
        return out


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moved(name: str, args: tuple, out: torch.Tensor) -> int:
    """Bytes that an operator reads and writes, each once."""
    if name == "index":  # of the table only the rows that are taken
        return 2 * _bytes(out)
    if name == "index_put":  # values, written to some rows
        return 2 * _bytes(args[2])
    given = [x for x in args if isinstance(x, torch.Tensor)]
    inputs = given[1:] if name == "copy" else [] if name in ("zero", "zeros", "zeros_like", "fill") else given
    return _bytes(out) + sum(map(_bytes, inputs))


class Traced(NamedTuple):
    """What a part of a call launches."""

    kernels: list[tuple]  # (function, arguments, options), as roofline.Recorder has them
    programs: list[int]  # of each kernel's launch
    matmuls: list[Matmul]
    others: dict[str, int]  # how often, by name
    nbytes: dict[str, int]  # that the others move

    @property
    def launches(self) -> int:
        return len(self.kernels) + len(self.matmuls) + sum(self.others.values())

    @property
    def bytes_moved(self) -> int:
        """By matmuls, kernels and other operators; each use of a tensor moves it once.

        Of kernels those over the vocabulary count, with their tables of logits; the others read a few numbers a row, and the
        scaling of gradients by 1 none.
        """
        sweeps = [args for fn, args, options in self.kernels if kernel_name((fn, args, options)).startswith(STREAMING)]
        tables = [_bytes(x) for args in sweeps for x in args if isinstance(x, torch.Tensor) and x.shape[-1] == V]
        return sum(matmul.nbytes for matmul in self.matmuls) + sum(tables) + sum(self.nbytes.values())

    def as_dict(self) -> dict:
        kernels = Counter(map(kernel_name, self.kernels))
        counts = {"launches": self.launches, "bytes_moved": self.bytes_moved}
        return counts | {"kernels": dict(kernels), "matmuls": self.matmuls, "others": self.others}


def _rows_are_aligned(*tables: torch.Tensor) -> bool:
    """Tables without storage begin at 16 bytes."""
    return all(row_step(x)[1] > 1 for x in tables)


def traced(run) -> Traced:
    """What `run` launches."""
    with ExitStack() as stack:
        for module in (score, gradient):
            stack.enter_context(patch.object(module, "rows_are_aligned", _rows_are_aligned))
        stack.enter_context(patch.object(launch_table, "_multiprocessors", lambda _: MULTIPROCESSORS))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: False))  # does not know "meta"
        for module in (heads, heads_loss):
            stack.enter_context(patch.object(module, "on_device", lambda _: nullcontext()))
        recorder = Recorder()
        kernels = stack.enter_context(recorder)
        trace = stack.enter_context(Trace())
        run()
    return Traced(kernels, recorder.programs, trace.matmuls, dict(trace.names), dict(trace.nbytes))


def call_trace(n: int) -> dict:
    """Launches of the score pass and of the loss with its backward, for two heads."""
    score, loss = parts(n)
    return {"n": n, "selected": Budget(FRACTION).most(n), "score": score.as_dict(), "loss": loss.as_dict()}


def parts(n: int, *, workspace_bytes: int = 2**29, dtype: torch.dtype = torch.bfloat16) -> tuple[Traced, Traced]:
    """The score pass of n positions, and the loss with its backward."""
    m = Budget(FRACTION).most(n)

    def source(dim: int) -> Source:
        hidden, weight = (torch.empty(rows, dim, dtype=dtype, device="meta") for rows in (n, V))
        return Source(Transform(True, V, 1.0), hidden, weight)

    student, teacher = source(STUDENT_DIM), source(TEACHER_DIM)
    rows, selected = (torch.empty(size, dtype=torch.long, device="meta") for size in (n, m))
    weights, dtotal, workspace = torch.empty(m, device="meta"), torch.empty((), device="meta"), Workspace(workspace_bytes)

    def score_pass() -> None:
        heads.launch_columns(student, teacher, rows, Scoring(TOP_K, workspace))

    def loss() -> None:
        needs = [True, True]
        *_, gradients = heads_loss.launch_loss(student, teacher, selected, weights, ReverseKL(), None, workspace, needs)
        factor = heads_loss.scale_back(dtotal, weights, is_fp16=dtype == torch.float16)
        for x in gradients:
            if x is not None:
                heads_loss.scale(x, factor)

    return traced(score_pass), traced(loss)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the launches of a call.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
    options = parser.parse_args(argv)
    rows = [call_trace(n) for n in options.n]
    options.json.write_text(json.dumps(rows, indent=1))
    print(f"{'N':>7} {'launches':>9} {'score':>6} {'loss':>5} {'GB':>6}  rows of a score tile, of a group")
    for row in rows:
        tiles = [matmul[0] for matmul in row["score"]["matmuls"][::2]]
        groups = [matmul[0] for matmul in row["loss"]["matmuls"] if matmul[2] == V][::2]
        counts = row["score"]["launches"], row["loss"]["launches"]
        moved = (row["score"]["bytes_moved"] + row["loss"]["bytes_moved"]) / 1e9
        sizes = f"{_runs(tiles)}; {_runs(groups)}"
        print(f"{row['n']:>7} {sum(counts):>9} {counts[0]:>6} {counts[1]:>5} {moved:>6.1f}  {sizes}")
    return 0


def _runs(sizes: list[int]) -> str:
    return ", ".join(f"{count} x {size}" for size, count in Counter(sizes).items())


if __name__ == "__main__":
    raise SystemExit(main())
