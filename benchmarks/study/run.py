"""The study on real weights: every run of the plan in a process of its own, one after the other, on one thread.

  python -m benchmarks.study.run                  some 9 CPU hours; continues where it was stopped; progress on stdout
  python -m benchmarks.study.run --seeds 1 3 5    the runs of these seeds; with other seeds a second command may run beside it

The parent loads the models once and forks, so that teacher and first student take memory once. A finished run is one file in
benchmarks/results/study/runs/; a run that was cut short leaves none and is made again. Stop it with SIGTERM to this process,
or SIGSTOP and SIGCONT to its whole process group.
Not here: the plan (plan.py), what a run does (train.py), the page (report.py).
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.study.pairs import Pair, is_healed, load_pairs
from benchmarks.study.plan import CPU_HOURS, SEEDS, SIZES, Job, Sizes, jobs
from benchmarks.study.records import RUNS, Run, frozen_name, read, sizes_of, spent_hours, write
from benchmarks.study.train import HeldOut, environment, hold_out, run_arm


def unfinished(folder: Path, planned: Iterable[Job], sizes: Mapping[str, Sizes]) -> list[Job]:
    """The jobs that are not done. Raises: ValueError: a file in the folder is of another plan."""
    open_jobs = []
    for job in planned:
        path = folder / job.file_name
        if not path.exists():
            open_jobs.append(job)
            continue
        saved = sizes_of(read(Run, path))
        if saved != sizes[job.pair]:
            raise ValueError(f"runs: {path} has {saved}, expected {sizes[job.pair]}; move it, or pass another folder")
    return open_jobs


def in_child(work: Callable[[], object]) -> bool:
    """Do the work in a forked process, and wait for it; whether it succeeded."""
    # A daemon: it ends when this process does.
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join()
    return process.exitcode == 0


def run_job(pair: Pair, sizes: Sizes, job: Job, held_out: HeldOut, path: Path) -> None:
    """One run and its file."""
    run = run_arm(pair, sizes, job.arm, job.seed, held_out)
    write(run, path)
    n_tokens = int(held_out.before.valid.sum())
    first, last = (sum(sums) / n_tokens for sums in (run.reverse_kl[0], run.reverse_kl[-1]))
    print(f"{path.stem:48} KL {first:.4f} -> {last:.4f} nats, {sum(run.cpu_seconds.values()):.0f} CPU seconds", flush=True)


def run_all(folder: Path, pairs: Mapping[str, Pair], sizes: Mapping[str, Sizes], planned: Sequence[Job]) -> list[Job]:
    """Every job that is not done, in the given order, as far as the plan's CPU hours reach; the jobs that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    environment()  # before the first fork
    failed: list[Job] = []
    for (seed, name), group in groupby(unfinished(folder, planned, sizes), key=lambda job: (job.seed, job.pair)):
        pair = pairs[name]
        held_out = hold_out(pair, sizes[name], seed)
        if not (folder / frozen_name(name, seed)).exists():
            write(held_out.record(pair, seed), folder / frozen_name(name, seed))
        for job in group:
            path = folder / job.file_name
            if spent_hours(folder) >= CPU_HOURS:
                print(f"stopped before {path.stem}: the plan's {CPU_HOURS} CPU hours are spent", flush=True)
                return failed
            if not in_child(partial(run_job, pair, sizes[name], job, held_out, path)):
                failed.append(job)
                print(f"{path.stem}: failed", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.run", description="What selecting does, on SmolLM2-135M.")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the folder of the runs' files")
    seeds = range(SEEDS)
    parser.add_argument("--seeds", type=int, nargs="+", choices=seeds, default=seeds, metavar="SEED", help="only these")
    options = parser.parse_args(arguments)
    folder = options.runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    torch.set_num_threads(1)
    planned = [job for job in jobs() if job.seed in options.seeds]
    if not unfinished(folder, planned, SIZES):
        print(f"all {len(planned)} runs are done")
        return
    # In a child: a process that has computed gradients should not fork.
    if not is_healed() and not in_child(load_pairs):
        sys.exit("the shallow student could not be healed")
    if failed := run_all(folder, load_pairs(), SIZES, planned):
        sys.exit(f"{len(failed)} of {len(planned)} runs failed: {', '.join(job.file_name for job in failed)}")


if __name__ == "__main__":
    main()
