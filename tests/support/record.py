"""Records what the library computes: a set of calls, and of each number that they return the sha256 of its exact bytes.

  python -m tests.support.record out/before.json              runs the calls (under five minutes on one core) and writes
  python -m tests.support.record out/after.json --only 'ranks/*'           a part of them, by name
  python -m tests.support.record --compare out/before.json out/after.json  how many are equal, and each that is not

For a change that must change nothing: record before it and after it, on one machine, because processors round differently.
With `--tensors out` both times the numbers themselves are kept, and --compare prints how far unequal ones are apart.
A digest holds dtype, shape and bytes; a call that is refused is recorded by its error. Recordings stay out of the repository.
PYTHONPATH=.:kernels is needed where the package is not installed in place.

Not here: the calls (recorded/).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch may do

import torch
from torch import Tensor

from tests.support.recorded.case import REFUSALS


def digest(value: object) -> str:
    """sha256 of dtype, shape and bytes of a tensor, or of the text of anything else."""
    if not isinstance(value, Tensor):
        return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).hexdigest()
    flat = value.detach().cpu().contiguous()
    text = f"{flat.dtype} {tuple(flat.shape)}\n".encode()
    return hashlib.sha256(text + flat.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Tensors and numbers of nested mappings, dataclasses and tuples, by dotted names."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, (list, tuple)):
        value = {str(i): part for i, part in enumerate(value)}
    if not isinstance(value, Mapping):
        return {prefix or "value": value}
    return {
        name: x for key, part in value.items() for name, x in flattened(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def record(cases: Iterable[Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], list[str]]:
    """Digests and tensors by the name of the call; and the names of calls that failed otherwise than by a refusal."""
    recorded: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    failed = []
    for case in cases:
        assert case.name not in recorded, f"two calls are named {case.name}"
        torch.manual_seed(0)
        began = time.monotonic()
        values: dict[str, Any]
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                values = flattened(case.run())
        except Exception as error:
            values = {"error": f"{type(error).__name__}: {error}"}
            if not isinstance(error, REFUSALS):
                failed.append(case.name)
                print(f"{case.name}\n{traceback.format_exc()}", file=sys.stderr)
        recorded[case.name] = {"call": case.words, "digests": {name: digest(x) for name, x in values.items()}}
        recorded[case.name]["seconds"] = round(time.monotonic() - began, 2)
        errors = {x for name, x in values.items() if name.split(".")[-1] == "error"}  # of one process, or of each rank
        if errors:
            recorded[case.name]["error"] = "; ".join(sorted(errors))
        tensors[case.name] = {
            name: x.detach().clone() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
            for name, x in values.items()
            if isinstance(x, (Tensor, bool, int, float))
        }
    return recorded, tensors, failed


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What to print: the number of equal calls, then each that is not equal, with the call in words."""
    patterns = before.get("only", "*"), after.get("only", "*")
    sides = [
        {name: x for name, x in side["calls"].items() if all(fnmatch(name, pattern) for pattern in patterns)}
        for side in (before, after)
    ]
    tensors = [_tensors(side) for side in (before, after)]
    unequal = []
    for name in sorted(sides[0].keys() | sides[1].keys()):
        if name not in sides[0] or name not in sides[1]:
            unequal.append(f"{name}: only in the {'second' if name in sides[1] else 'first'} recording")
            continue
        one, two = (side[name] for side in sides)
        if one["digests"] == two["digests"]:
            continue
        parts = [
            _difference(part, one, two, *(side.get(name, {}) for side in tensors))
            for part in sorted(one["digests"].keys() | two["digests"].keys())
            if one["digests"].get(part) != two["digests"].get(part)
        ]
        unequal.append(f"{name}: {'; '.join(parts)}\n    {one['call']}")
    n = len(sides[0].keys() | sides[1].keys())
    lines = [f"{n - len(unequal)} of {n} calls are equal"]
    if before.get("machine") != after.get("machine"):
        lines.append(f"recorded on different machines or versions: {before.get('machine')} and {after.get('machine')}")
    return lines + unequal


def _difference(part: str, one: Any, two: Any, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> str:
    """How one number of a call differs."""
    if part not in one["digests"] or part not in two["digests"]:
        return f"{part} only in the {'second' if part in two['digests'] else 'first'}"
    if part.split(".")[-1] == "error":
        return f"error {one['error']!r}, then {two['error']!r}"
    if part not in x or part not in y:
        return part
    if (x[part].shape, x[part].dtype) != (y[part].shape, y[part].dtype):
        return f"{part} {x[part].dtype} {tuple(x[part].shape)}, then {y[part].dtype} {tuple(y[part].shape)}"
    return f"{part} differs by {largest_relative_difference(x[part], y[part]):.2g}"


def largest_relative_difference(x: Tensor, y: Tensor) -> float:
    """max |x - y| / max(|x|, |y|) over the entries; infinite where one is not finite and the other another number."""
    x, y = x.double().flatten(), y.double().flatten()
    is_same = (x == y) | (x.isnan() & y.isnan())
    apart = (x - y).abs() / torch.maximum(x.abs(), y.abs())
    apart = torch.where(is_same, 0.0, apart.nan_to_num(nan=math.inf, posinf=math.inf))
    return float(apart.max()) if len(apart) else 0.0


def _tensors(side: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    path = side.get("tensors")
    return torch.load(path, weights_only=True) if path and Path(path).exists() else {}


def machine() -> dict[str, str]:
    """What the bytes may depend on."""
    import triton

    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return versions | {"processor": platform.processor() or platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.record", description="Record calls, or compare recordings.")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of calls, as a shell pattern")
    parser.add_argument("--tensors", type=Path, metavar="DIR", help="keep the numbers themselves there, too")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"))
    given = parser.parse_args(arguments)
    if given.compare:
        lines = compare(*(json.loads(path.read_text()) for path in given.compare))
        print(*lines, sep="\n")
        return int(any("\n" in line or ": only in" in line for line in lines[1:]))
    if given.out is None:
        parser.error("expected OUT.json or --compare A.json B.json")
    return _record_to(given.out, given.only, given.tensors)


def _record_to(out: Path, only: str, folder: Path | None) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    from tests.support import (
        interpreter,  # noqa: F401  (rounds as GPUs do)
        recorded,
    )

    began = time.monotonic()
    try:
        calls, tensors, failed = record(case for case in recorded.cases() if fnmatch(case.name, only))
    finally:
        recorded.ranks.close()
    written = {"machine": machine(), "commit": _commit(), "only": only, "calls": calls}
    out.parent.mkdir(parents=True, exist_ok=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        written["tensors"] = str((folder / f"{out.stem}.pt").absolute())
        torch.save(tensors, written["tensors"])
    out.write_text(json.dumps(written, indent=1))
    refused = sum("error" in call for call in calls.values()) - len(failed)
    print(f"{len(calls)} calls, {refused} of them refused, {len(failed)} failed, in {time.monotonic() - began:.0f} s: {out}")
    return int(bool(failed))


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
