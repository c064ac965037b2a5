"""`make gpu`: on a machine with a GPU and no network, one command proves the kernels, times them, and keeps what it measured.

  warm   compiles the kernels of all parts, on all cores at once (warm.py)
  check  against float64 on the device: every kernel (check.py), the library from logits (check_logits.py) and from
         heads (check_heads.py), every divergence (check_divergences.py)
  score  score pass against a device copy and a kernel that only reads, many rows and few; loss: the whole loss against
         eager, compiled and chunked torch (logits.py)
  heads  against the matmul floor, TRL and Liger where they are installed (heads.py)
  sweep  launch tables that would be faster, printed and never applied (sweep.py)
  sanitize  small calls under compute-sanitizer, where it is installed (sanitize.py)

The parts share out `--minutes`, each until its end, and one that is done early leaves its time to the next: what comes too
late says that it was not run. A failure ends nothing but what failed; the exit code is 1 after any failed comparison, whose
page says so above its tables, and after any part that broke off. Results go to benchmarks/results/<device>/ (report.py)
after every part, and all of them together to gpu.tar.gz: one file to bring back. Other parts of the same commit, device and
versions stay there. `make gpu-wheels`, where there is a network, collects TRL and Liger for the table of heads.

Commands: `make gpu PYTHON=python3`, or with PYTHONPATH=.:kernels python -m benchmarks.gpu.run [--parts warm,check,score,loss,
heads,sweep,sanitize] [--rounds 20] [--dtype bf16] [--minutes 8].
`--dry-run` runs every line of it interpreted, on a CPU, at sizes of no meaning: a test of this program, not a measurement;
it writes to a temporary folder.

Not here: what needs no GPU: static counts (static/roofline.py), heads on a CPU (cpu/compare.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
# Shares of the time: on an H200, about seconds of the default.
PARTS = {"warm": 45, "check": 110, "score": 50, "loss": 60, "heads": 115, "sweep": 60, "sanitize": 40}
Tables = dict[str, Callable[[], Iterable[dict[str, Any]]]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description="Prove and time the kernels on a GPU.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=20, help="runs of each variant, interleaved; medians are reported")
    parser.add_argument("--tokens", default="512,528,640,768,1024,2048,4096,8192,16384", help="N of the score table")
    parser.add_argument("--vocab", default="151936,32000,128256", help="V of the score table; the first ones have the time")
    parser.add_argument("--head-tokens", default="4096,8192,16384,32768", help="N of the table with heads in")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<device>")
    parser.add_argument("--commit", default=None, help="recorded where the folder is no git repository")
    parser.add_argument("--wheels", type=Path, default=None, help="folder of `make gpu-wheels`: the peers to compare with")
    parser.add_argument("--dry-run", action="store_true", help="interpreted on a CPU: not a measurement")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if not set(options.parts) <= set(PARTS):
        parser.error(f"--parts: got {','.join(options.parts)}, expected some of {','.join(PARTS)}")
    for name in ("tokens", "vocab", "head_tokens"):
        setattr(options, name, [int(x) for x in getattr(options, name).split(",")])
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        options.tokens, options.vocab, options.head_tokens, options.rounds = [2], [160, 320], [6], 1
    keep_fp32_exact()  # before torch is imported
    add_wheels(options.wheels)
    if options.dry_run:
        from tests.support import interpreter  # noqa: F401  rounds as a GPU does
    if not options.dry_run:
        from benchmarks.gpu import report as gpu_report

        return measure(options, options.out or RESULTS / gpu_report.slug(gpu_report.device_name(False)))
    with tempfile.TemporaryDirectory() as folder:
        return measure(options, options.out or Path(folder))


def add_wheels(folder: Path | None) -> list[str]:
    """Unpacks the folder's wheels and puts them at the end of the path: what this python has comes first. Their names."""
    wheels = sorted(folder.glob("*.whl")) if folder is not None and folder.is_dir() else []
    for wheel in wheels:
        unpacked = wheel.with_suffix("")
        if not unpacked.exists():
            zipfile.ZipFile(wheel).extractall(unpacked)  # Triton reads its functions' source from files
        sys.path.append(str(unpacked))
    return [wheel.name for wheel in wheels]


def keep_fp32_exact() -> None:
    """No TF32: its products have 10 bits, against which a comparison of fp32 heads with float64 must fail."""
    os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # torch reads it when it is imported
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False


def parts_of(bench: Any, options: argparse.Namespace) -> dict[str, Tables]:
    """The tables of each part, as functions that make their rows one by one."""
    from benchmarks.gpu import check as gpu_check
    from benchmarks.gpu import check_divergences as gpu_check_divergences
    from benchmarks.gpu import check_heads as gpu_check_heads
    from benchmarks.gpu import check_logits as gpu_check_logits
    from benchmarks.gpu import heads as gpu_heads
    from benchmarks.gpu import logits as gpu_logits
    from benchmarks.gpu import sanitize as gpu_sanitize
    from benchmarks.gpu import sweep as gpu_sweep
    from benchmarks.gpu import warm as gpu_warm

    modules = (gpu_check, gpu_check_logits, gpu_check_heads, gpu_check_divergences)
    last = (gpu_check_logits.last, gpu_check.beyond_2_to_31)
    return {
        "warm": {"warm": lambda: gpu_warm.run(bench)},
        "check": {"check": lambda: chain.from_iterable(run(bench) for run in (*(x.run for x in modules), *last))},
        "score": {
            "score": lambda: gpu_logits.score_table(bench, options.tokens, options.vocab),
            "few_rows": lambda: gpu_logits.few_rows(bench),
        },
        "loss": {"loss": lambda: gpu_logits.loss_table(bench)},
        "heads": {"heads": lambda: gpu_heads.table(bench, options.head_tokens)},
        "sweep": {"sweep": lambda: gpu_sweep.run(bench)},
        "sanitize": {"sanitize": lambda: gpu_sanitize.run(bench)},
    }


def measure(options: argparse.Namespace, folder: Path) -> int:
    """Every part that was asked for, written after each; 0 if nothing failed."""
    from benchmarks.gpu import report as gpu_report
    from benchmarks.gpu import timing as gpu_timing

    bench = gpu_timing.Bench.of(options)
    about = gpu_report.environment(bench, options.commit)
    results = gpu_report.earlier(folder, about) | {"environment": about}
    print(gpu_report.title(results), flush=True)
    start, bad, parts = time.monotonic(), False, parts_of(bench, options)
    for name, end in ends(options.parts, options.minutes).items():
        if not options.dry_run:  # nothing is timed there, and no processor too slow
            bench.ends = start + end
        bad |= not run_part(bench, results, name, parts[name], options)
        gpu_report.write(results, folder)
    if not options.dry_run:
        print(f"written to {folder}")
    return int(bad)


def ends(parts: list[str], minutes: float) -> dict[str, float]:
    """When each of the parts is to end, in seconds from the start of the first, in the order they run."""
    chosen = [name for name in PARTS if name in parts]
    spent = accumulate(PARTS[name] for name in chosen)
    total = sum(PARTS[name] for name in chosen)
    return {name: 60 * minutes * until / total for name, until in zip(chosen, spent, strict=True)}


def run_part(bench: Any, results: dict[str, Any], name: str, tables: Tables, options: argparse.Namespace) -> bool:
    """Fills `results` with the part's tables and how they were made; False if anything failed."""
    from benchmarks.gpu import report as gpu_report
    from benchmarks.gpu.timing import first_line

    about = {"rounds": options.rounds, "dtype": options.dtype, "clocks_before": gpu_report.clocks()}
    start = time.monotonic()
    for table, rows in tables.items():
        results[table] = []
        try:
            for row in rows():
                results[table].append(row)
        except Exception as error:  # the rows before it, and the other parts, are worth keeping
            about["failure"] = f"{table}: {first_line(error)}"
            print(f"{name} broke off: {about['failure']}", flush=True)
            bench.free()
    about |= {"seconds": round(time.monotonic() - start, 1), "clocks_after": gpu_report.clocks()}
    results.setdefault("parts", {})[name] = about
    failed = [row for row in results[name] if row.get("failure")]
    if name == "check":
        run = [row for row in results["check"] if not row.get("note")]
        print(f"{len(run)} comparisons with float64, {len(failed)} failed", flush=True)
        for row in results["check"]:
            if row["failure"] or row.get("note"):
                print(f"  {row['kernel']} {row['case']}: {row['failure'] or row['note']}", flush=True)
    return not failed and "failure" not in about


if __name__ == "__main__":
    sys.exit(main())
