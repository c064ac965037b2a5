"""One run of the study: a student trained on what an arm selects, and its KL to the teacher on frozen answers.

  step      the student answers prompts; loss of the arm on its selected tokens; AdamW on all weights
  measured  KL(q || p) and KL(p || q) at the tokens of fixed held-out answers, which the untrained student wrote with the run's
            seed. Arms of one pair and seed share these answers, the order of prompts and the seeds of sampling.

The cost of a run is counted in multiply-adds: weights of a model's layers times the columns that it reads, attention apart.
Not here: the arms (plan.py), the models (pairs.py), processes (run.py).
"""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.cpu.environment import describe_environment
from benchmarks.study.pairs import Pair
from benchmarks.study.plan import Arm, Sizes
from benchmarks.study.records import COLUMNS, MEASURES, Frozen, Run, to_integers
from opd_ops import LinearHead, TokenStats, score_positions, selective_opd_loss
from opd_ops.trainer.order import prompt_indices, seed_of
from opd_ops.trainer.rollouts import Rollouts, head_over, model_inputs, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parents[2]


class HeldOut(NamedTuple):
    """Frozen answers, the teacher over them, and their statistics before training."""

    answers: Rollouts
    teacher_head: LinearHead
    before: TokenStats
    cpu_seconds: float

    def record(self, pair: Pair, seed: int) -> Frozen:
        valid = self.before.valid
        columns = {name: to_integers(getattr(self.before, name), valid) for name in COLUMNS}
        return Frozen(pair.name, seed, valid.sum(1).tolist(), columns, round(self.cpu_seconds, 2))


class Clock:
    """CPU seconds by the name of the part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began


@torch.no_grad()
def hold_out(pair: Pair, sizes: Sizes, seed: int) -> HeldOut:
    """The frozen answers of a pair and seed, the same for all arms."""
    began = time.process_time()
    answers = sample(
        pair.student,
        pair.tokenizer,
        pair.held_out,
        max_new_tokens=sizes.held_out_tokens,
        seed=seed_of(seed, "held out"),
    )
    teacher_head = head_over(pair.teacher, pair.tokenizer, answers, system=pair.instruction)
    before = measure(pair, pair.student, answers, teacher_head)
    return HeldOut(answers, teacher_head, before, time.process_time() - began)


@torch.no_grad()
def measure(pair: Pair, student: PreTrainedModel, answers: Rollouts, teacher_head: LinearHead) -> TokenStats:
    """The statistics of the frozen tokens."""
    head = head_over(student, pair.tokenizer, answers)
    return score_positions(head, teacher_head, mask=answers.mask, selector="all")[1]


def run_arm(pair: Pair, sizes: Sizes, arm: Arm, seed: int, held_out: HeldOut) -> Run:
    """Train one student and measure it."""
    began, clock = time.perf_counter(), Clock()
    with clock.part("copy"):
        student = copy.deepcopy(pair.student).requires_grad_(True)
        optimizer = torch.optim.AdamW(student.parameters(), lr=sizes.learning_rate, weight_decay=0.0, fused=True)
    evaluations = {0: held_out.before}
    counts = {"n_valid": 0, "n_trained": 0}
    work = dict.fromkeys(("sampling", "teacher", "student", "head"), 0)
    losses = []
    for step in range(sizes.steps):
        indices = prompt_indices(
            step, 0, n_micro_batches=1, batch_size=sizes.batch_size, n_prompts=len(pair.training), seed=seed
        )
        prompts = [pair.training[i] for i in indices]
        with clock.part("sampling"):
            drawn = seed_of(seed, "sample", step)
            rollouts = sample(student, pair.tokenizer, prompts, max_new_tokens=sizes.max_new_tokens, seed=drawn)
        with clock.part("teacher"), torch.no_grad():
            teacher_head = head_over(pair.teacher, pair.tokenizer, rollouts, system=pair.instruction)
        with clock.part("student"):
            student_head = head_over(student, pair.tokenizer, rollouts)
        with clock.part("loss"):
            out = selective_opd_loss(
                student_head,
                teacher_head,
                mask=rollouts.mask,
                tokens=rollouts.tokens,
                selector=arm.selector,
                fraction=arm.fraction,
                divergence=arm.divergence,
                weighting=arm.weighting,
                weight_mean=None if arm.weighting is None else "valid",
                generator=torch.Generator().manual_seed(seed_of(seed, "select", step)),
            )
        with clock.part("backward"):
            out.loss.backward()
        with clock.part("update"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(round(out.loss.item(), 5))
        counts["n_valid"] += int(rollouts.mask.sum())
        counts["n_trained"] += int(out.selected.sum())
        for part, multiply_adds in step_work(pair, rollouts).items():
            work[part] += multiply_adds
        if step + 1 in sizes.evaluated:
            with clock.part("evaluation"):
                evaluations[step + 1] = measure(pair, student, held_out.answers, held_out.teacher_head)
    valid = held_out.before.valid
    after = {
        name: {str(step): to_integers(getattr(stats, name), valid) for step, stats in evaluations.items() if step}
        for name in MEASURES
    }
    return Run(
        pair=pair.name,
        arm=arm.name,
        seed=seed,
        sizes=asdict(sizes),
        steps=list(evaluations),
        forward_kl=[_prompt_sums(stats.forward_kl, valid) for stats in evaluations.values()],
        reverse_kl=[_prompt_sums(stats.reverse_kl, valid) for stats in evaluations.values()],
        **counts,
        losses=losses,
        multiply_adds=work,
        cpu_seconds={name: round(seconds, 2) for name, seconds in clock.seconds.items()},
        wall_seconds=round(time.perf_counter() - began, 1),
        peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        after=after if arm == Arm() else None,
        environment=environment(),
    )


@cache
def environment() -> dict[str, object]:
    """Of the process that loaded this code: its children inherit the answer, whatever is committed meanwhile."""
    return describe_environment(ROOT)


def step_work(pair: Pair, rollouts: Rollouts) -> dict[str, int]:
    """Multiply-adds of a step's own passes; "head": of one head over all answer positions, the unit of a loss's cost."""
    n_answers, length = rollouts.tokens.shape
    _, prompt = model_inputs(pair.tokenizer, rollouts)
    _, teacher_prompt = model_inputs(pair.tokenizer, rollouts, pair.instruction)
    head = pair.student.get_output_embeddings().weight.numel()
    student, teacher = n_layer_weights(pair.student), n_layer_weights(pair.teacher)
    columns = n_answers * (prompt + length)
    return {
        "sampling": columns * student + n_answers * length * head,
        "teacher": n_answers * (teacher_prompt + length) * teacher,
        "student": 3 * columns * student,  # the backward takes two products for each of the forward
        "head": n_answers * length * head,
    }


def n_layer_weights(model: PreTrainedModel) -> int:
    """The weights of a model's layers, without embeddings and head."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def _prompt_sums(column: torch.Tensor, valid: torch.Tensor) -> list[float]:
    sums = torch.where(valid, column.double(), 0).sum(1)
    return [round(x, 4) for x in sums.tolist()]
