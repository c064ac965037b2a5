"""The launches of one call, on any machine: matmuls with their shapes, kernels, and all other operators that reach the device.

  score   both heads of all N positions, in tiles: logits, statistics, top-K
  loss    both heads of the selected positions, in groups: logits, losses, gradients; and the backward's scaling

The backend's own functions run on tensors without storage, as they would on CUDA, with the kernels' launches recorded. Views
and allocations are not counted. The selectors' scores, the selection and the metrics are not part of it:
they read a few numbers a position.

Command: python -m benchmarks.static.launches --json FILE [--n 1024 4096 16384 65536]

Not here: instructions of a kernel (roofline.py), FLOP and bytes of a call (opd_ops/estimates/compute.py), seconds
(benchmarks/gpu).
"""

import argparse
import json
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from opd_kernels import launch_table, score
from opd_kernels.device import row_step

from benchmarks.static.operators import Operators
from benchmarks.static.roofline import Recorder, kernel_name
from opd_ops.backends.shared import matmul
from opd_ops.backends.triton import heads, heads_loss
from opd_ops.divergences import ReverseKL
from opd_ops.inputs.sources import Source, Transform
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.budget import Budget

V, STUDENT_DIM, TEACHER_DIM, TOP_K, MULTIPROCESSORS = 151_936, 2048, 4096, 16, 132
MATMULS = {"mm", "addmm", "bmm", "_scaled_mm"}


class Trace(Operators):
    """Operators that are no matmuls in `names`, and the matmuls' (rows, inner, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] not in MATMULS:
            return super().__torch_dispatch__(func, types, args, kwargs)
        a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
        self.matmuls.append((a.shape[-2], a.shape[-1], b.shape[-1]))
        return func(*args, **(kwargs or {}))


def traced(run) -> dict:
    """What `run` launches."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(score, "rows_are_aligned", lambda *tables: all(row_step(x)[1] > 1 for x in tables)))
        stack.enter_context(patch.object(launch_table, "_multiprocessors", lambda _: MULTIPROCESSORS))
        stack.enter_context(patch.object(matmul, "_returns_fp32", lambda x: x.dtype in (torch.bfloat16, torch.float16)))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))  # does not know "meta"
        for module in (heads, heads_loss):
            stack.enter_context(patch.object(module, "on_device", lambda _: nullcontext()))
        launches = stack.enter_context(Recorder())
        trace = stack.enter_context(Trace())
        run()
    kernels = Counter(kernel_name(launch) for launch in launches)
    return {
        "launches": sum(kernels.values()) + sum(trace.names.values()) + len(trace.matmuls),
        "kernels": dict(kernels),
        "matmuls": trace.matmuls,
        "others": dict(trace.names),
    }


def of_call(n: int, *, fraction: float = 0.05, workspace_bytes: int = 2**29, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Launches of the score pass and of the loss with its backward, for two heads."""
    m = Budget(fraction).most(n)

    def source(dim: int) -> Source:
        hidden, weight = (torch.empty(rows, dim, dtype=dtype, device="meta") for rows in (n, V))
        return Source(Transform(True, V, 1.0), hidden, weight)

    student, teacher = source(STUDENT_DIM), source(TEACHER_DIM)
    rows, selected = (torch.empty(size, dtype=torch.long, device="meta") for size in (n, m))
    weights, dtotal, workspace = torch.empty(m, device="meta"), torch.empty((), device="meta"), Workspace(workspace_bytes)

    def score_pass() -> None:
        heads.launch_columns(student, teacher, rows, TOP_K, frozenset(), workspace, None)

    def loss() -> None:
        needs = [True, True]
        *_, gradients = heads_loss.launch_loss(student, teacher, selected, weights, ReverseKL(), None, workspace, needs)
        factor = heads_loss.scale_back(dtotal, weights, is_fp16=dtype == torch.float16)
        for gradient in gradients:
            if gradient is not None:
                heads_loss.scale(gradient, factor)

    return {"n": n, "selected": m, "score": traced(score_pass), "loss": traced(loss)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count the launches of a call.")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
    options = parser.parse_args(argv)
    rows = [of_call(n) for n in options.n]
    options.json.write_text(json.dumps(rows, indent=1))
    print(f"{'N':>7} {'launches':>9} {'score':>6} {'loss':>5}  rows of a score tile, of a group")
    for row in rows:
        tiles = [matmul[0] for matmul in row["score"]["matmuls"][::2]]
        groups = [matmul[0] for matmul in row["loss"]["matmuls"] if matmul[2] == V][::2]
        counts = row["score"]["launches"], row["loss"]["launches"]
        print(f"{row['n']:>7} {sum(counts):>9} {counts[0]:>6} {counts[1]:>5}  {_runs(tiles)}; {_runs(groups)}")
    return 0


def _runs(sizes: list[int]) -> str:
    return ", ".join(f"{count} x {size}" for size, count in Counter(sizes).items())


if __name__ == "__main__":
    raise SystemExit(main())
