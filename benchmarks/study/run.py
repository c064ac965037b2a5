"""The study on real weights: what selecting does to SmolLM2-135M at an equal number of steps, arm by arm, seed by seed.

  loss = 1/|M| sum_{t in M} KL(student || teacher), M the best-scored 5 % or 20 % of the tokens of a step, or all of them
  (arXiv 2605.26844, eqs. 6, 12, 13; 2604.14084); arms: what scores them. Task: on-policy prompt distillation, the teacher
  is the same model told to answer like a pirate (examples/prompts.py).
  Measured: forward KL(teacher || student) in nats at the tokens of fixed held-out answers, which the untrained student
  sampled with the run's seed; arms of one seed share those answers, the order of questions and the seeds of sampling.

Nothing is timed for comparison; the seconds of CPU of each run are kept, so that a budget can be stated.
Each run is saved as it ends, and what is there is not run again. Run: python -m benchmarks.study.run [--workers 2]; then it
writes results/study/ (report.py). On 2 CPU cores in under an hour.

Not here: tables and plots (report.py), the gains by selector on fixed contexts (opd_ops/diagnostics/).
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cpu.environment import describe_environment
from opd_ops import LinearHead, TokenStats, selective_opd_loss
from opd_ops.trainer.order import prompt_indices, seed_of
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, head_over, sample

ROOT = Path(__file__).parents[2]
SELECTORS = ("random", "entropy", "divergence", "tip", "teachability")
FRACTIONS = (0.05, 0.2)


class Arm(NamedTuple):
    """What is trained on."""

    selector: str
    fraction: float

    @property
    def name(self) -> str:
        return "all" if self.selector == "all" else f"{self.selector} {self.fraction:.0%}"


ARMS = (Arm("all", 1.0), *(Arm(selector, fraction) for fraction in FRACTIONS for selector in SELECTORS))


@dataclass(frozen=True)
class Plan:
    """The size of every run."""

    steps: int = 8
    batch_size: int = 6
    max_new_tokens: int = 32
    learning_rate: float = 2e-5
    eval_every: int = 2
    seeds: int = 3


class Task(NamedTuple):
    """What all runs of one process share."""

    model: Any  # the teacher, and what every student begins as
    tokenizer: Any
    instruction: str
    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]


def pirate_task() -> Task:
    from examples import smollm2
    from examples.prompts import HELD_OUT, INSTRUCTION, TRAINING

    model, tokenizer = smollm2.load_model()
    return Task(model.requires_grad_(False), tokenizer, INSTRUCTION, TRAINING, HELD_OUT)


@torch.no_grad()
def measure(task: Task, student: Any, contexts: Rollouts, teacher_head: LinearHead) -> TokenStats:
    """`TokenStats` of the held-out tokens."""
    head = head_over(student, task.tokenizer, contexts)
    return selective_opd_loss(head, teacher_head, mask=contexts.mask, selector="all", fraction=1.0).stats


@cache
def held_out(task: Task, n_tokens: int, seed: int) -> tuple[Rollouts, LinearHead, TokenStats]:
    """The fixed answers of a seed, the teacher over them, and what is known of them before training; the same for all arms."""
    contexts = sample(task.model, task.tokenizer, task.held_out, max_new_tokens=n_tokens, seed=seed_of(seed, "held out"))
    with torch.no_grad():
        teacher_head = head_over(task.model, task.tokenizer, contexts, system=task.instruction)
    return contexts, teacher_head, measure(task, task.model, contexts, teacher_head)


def run_arm(task: Task, plan: Plan, arm: Arm, seed: int) -> dict[str, Any]:
    """Train one student; the held-out forward KL of every token at every evaluation, and what else a report needs."""
    began, started, student = time.process_time(), time.perf_counter(), copy.deepcopy(task.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    contexts, teacher_head, before = held_out(task, plan.max_new_tokens, seed)
    forward_kl, trained = {0: before.forward_kl}, 0
    for step in range(plan.steps):
        indices = prompt_indices(
            step, 0, n_micro_batches=1, batch_size=plan.batch_size, n_prompts=len(task.training), seed=seed
        )
        prompts = [task.training[i] for i in indices]
        rollouts = sample(
            student, task.tokenizer, prompts, max_new_tokens=plan.max_new_tokens, seed=seed_of(seed, "sample", step)
        )
        with torch.no_grad():
            taught = head_over(task.model, task.tokenizer, rollouts, system=task.instruction)
        out = selective_opd_loss(
            head_over(student, task.tokenizer, rollouts),
            taught,
            mask=rollouts.mask,
            selector=arm.selector,
            fraction=arm.fraction,
            generator=torch.Generator().manual_seed(seed_of(seed, "select", step)),
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained += int(out.metrics["n_selected"])
        if (step + 1) % plan.eval_every == 0 or step + 1 == plan.steps:
            forward_kl[step + 1] = measure(task, student, contexts, teacher_head).forward_kl
    return {
        "arm": arm.name,
        "seed": seed,
        "plan": asdict(plan),
        "forward_kl": forward_kl,
        "before": before._asdict(),
        "tokens": [[task.tokenizer.decode([i]) for i in row.tolist()] for row in contexts.tokens],
        "prompts": [prompt.text for prompt in contexts.prompts],
        "n_trained": trained,
        "cpu_seconds": time.process_time() - began,
        "wall_seconds": time.perf_counter() - started,
        "environment": describe_environment(ROOT),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def path_of(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / f"{arm.name.replace(' ', '-').replace('%', 'percent')}-seed{seed}.pt"


def check_plan(path: Path, plan: Plan) -> None:
    """Raises: ValueError: the saved run is one of another plan."""
    kept = torch.load(path)["plan"]
    asked = {name: value for name, value in asdict(plan).items() if name != "seeds"}
    different = [f"{name} {kept[name]} for {value}" for name, value in asked.items() if kept[name] != value]
    if different:
        raise ValueError(f"runs: {path} has {', '.join(different)}; pass the plan it was made with, or another folder")


_task: Task | None = None


def _work(job: tuple[Path, Plan, Arm, int, int]) -> str:
    """One run in a worker process, which loads the model once."""
    global _task
    folder, plan, arm, seed, threads = job
    torch.set_num_threads(threads)
    _task = pirate_task() if _task is None else _task
    got = run_arm(_task, plan, arm, seed)
    path = path_of(folder, arm, seed)
    torch.save(got, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    last = max(got["forward_kl"])
    valid = got["before"]["valid"]
    kls = [got["forward_kl"][step][valid].mean().item() for step in (0, last)]
    return f"{arm.name:18} seed {seed}: held-out KL {kls[0]:.4f} -> {kls[1]:.4f} nats, {got['cpu_seconds']:.0f} CPU seconds"


def run_all(folder: Path, plan: Plan, arms: Sequence[Arm], *, workers: int) -> None:
    """Every arm with every seed, whole seeds first, in `workers` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (torch.get_num_threads() or 1) // workers)
    pairs = [(arm, seed) for seed in range(plan.seeds) for arm in arms]
    for path in (path_of(folder, *pair) for pair in pairs):
        if path.exists():
            check_plan(path, plan)
    jobs = [(folder, plan, arm, seed, threads) for arm, seed in pairs if not path_of(folder, arm, seed).exists()]
    if not jobs:
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for number, line in enumerate(pool.imap_unordered(_work, jobs), start=1):
            print(f"{number:3} of {len(jobs)}  {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.run", description="What selecting does, on SmolLM2-135M.")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes, which share the cores (default %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "out" / "study", help="where each run is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "study", help="where the report goes")
    options = vars(parser.parse_args(arguments))
    workers, runs, out = (options.pop(name) for name in ("workers", "runs", "out"))
    run_all(runs, Plan(**options), ARMS, workers=workers)
    from benchmarks.study import report as study_report

    study_report.write(runs, out)


if __name__ == "__main__":
    main()
