# `make gpu`: on a machine with a GPU and no network, one command proves the kernels, times them, and keeps what it measured.
#
#   1 correctness against float64 on the device, of every kernel (gpu_check.py), of the path from heads (gpu_check_heads.py)
#     and of every divergence (gpu_check_divergences.py); nothing is timed if one fails
#   2 score pass against a device copy; 3 the whole loss against eager, compiled and chunked torch (gpu_timing.py)
#   4 heads in, against the matmul floor, TRL and Liger where they are installed (gpu_heads.py)
#   5 launch tables that would be faster, printed and never applied (gpu_sweep.py)
#
# Results go to benchmarks/results/<device>/ (gpu_report.py). Commands: `make gpu PYTHON=python3`, or with
# PYTHONPATH=.:kernels python -m benchmarks.gpu [--parts check,score,loss,heads,sweep] [--rounds 20] [--dtype bf16].
# `--dry-run` runs every line of it interpreted, on a CPU, at sizes of no meaning: a test of this program, not a measurement;
# it writes to a temporary folder.
#
# Not here: what needs no GPU: static counts (static_roofline.py), heads on a CPU (compare.py).
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PARTS = ("check", "score", "loss", "heads", "sweep")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Prove and time the kernels on a GPU.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=20, help="runs of each variant, interleaved; medians are reported")
    parser.add_argument("--tokens", default="2048,4096,8192,16384", help="N of the score table")
    parser.add_argument("--vocab", default="32000,128256,151936", help="V of the score table")
    parser.add_argument("--head-tokens", default="4096,8192,16384,32768", help="N of the table with heads in")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<device>")
    parser.add_argument("--commit", default=None, help="recorded where the folder is no git repository")
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
        from tests import interpreter  # noqa: F401  rounds as a GPU does
    from benchmarks import gpu_check, gpu_check_divergences, gpu_check_heads, gpu_heads, gpu_report, gpu_sweep, gpu_timing

    bench = gpu_timing.Bench.of(options)
    found = {"environment": gpu_report.environment(bench, options.commit), "options": {"rounds": options.rounds}}
    print(gpu_report.title(found), flush=True)
    if "check" in options.parts:
        found["check"] = gpu_check.run(bench) + gpu_check_heads.run(bench) + gpu_check_divergences.run(bench)
        failed = [row for row in found["check"] if row["failure"]]
        run = [row for row in found["check"] if not row.get("note")]
        print(f"{len(run)} comparisons with float64, {len(failed)} failed", flush=True)
        for row in found["check"]:
            if row["failure"] or row.get("note"):
                print(f"  {row['kernel']} {row['case']}: {row['failure'] or row['note']}")
        if failed:
            return 1
    if "score" in options.parts:
        found["score"] = gpu_timing.score_table(bench, options.tokens, options.vocab)
    if "loss" in options.parts:
        found["loss"] = gpu_timing.loss_table(bench)
    if "heads" in options.parts:
        found["heads"] = gpu_heads.table(bench, options.head_tokens)
    if "sweep" in options.parts:
        found["sweep"] = gpu_sweep.run(bench)
    found["environment"] |= {"clocks_after": gpu_report.clocks()}
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            gpu_report.write(found, options.out or Path(folder))
        return 0
    gpu_report.write(found, options.out or RESULTS / found["environment"]["slug"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
