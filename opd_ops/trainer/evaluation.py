"""Held-out evaluation: divergences on contexts that never change, and fresh greedy answers.

  The contexts are answers to the held-out prompts that the untrained student sampled once. Between two evaluations, and between
  two runs with the same seed, only the model changes (the fixed-context diagnostic of arXiv 2605.26844, section 3).
  forward_kl = mean over the contexts' tokens of KL(teacher || student), nats; entropies likewise
  accuracy = share of exact greedy completions, among the prompts that have an expected answer

Every process evaluates all prompts: no process waits for another, and all gather a sharded model at the same time.
Not here: when (loop.py), where the numbers go (runlog.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.loss import SelectiveOPDLoss
from opd_ops.settings import Settings
from opd_ops.trainer.order import seed_of
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, head_over, sample
from opd_ops.trainer.teachers import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from opd_ops.trainer.rollouts import GenerationOptions

COLUMNS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")


class Completion(NamedTuple):
    """A held-out prompt and the greedy answer to it."""

    prompt: str
    text: str
    answer: str | None  # the expected answer
    is_exact: bool | None  # None: the prompt has no expected answer


def sample_contexts(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    seed: int,
    **options: Unpack[GenerationOptions],
) -> Rollouts:
    """The contexts; `options` are those of `sample`."""
    parts = [
        sample(student, tokenizer, prompts[batch], seed=seed_of(seed, "held out", batch.start), **options)
        for batch in chunks(len(prompts), batch_size)
    ]
    length = max(part.tokens.shape[1] for part in parts)
    padded = [(part, (0, length - part.tokens.shape[1])) for part in parts]
    tokens = torch.cat([nn.functional.pad(part.tokens, by, value=tokenizer.pad_token_id) for part, by in padded])
    mask = torch.cat([nn.functional.pad(part.mask, by, value=False) for part, by in padded])
    return Rollouts(prompts, tokens, mask)


def greedy_completions(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    pattern: str,
    **options: Unpack[GenerationOptions],
) -> list[Completion]:
    """Sample greedy answers, and compare each with the expected answer."""
    options["temperature"] = 0.0
    completions = []
    for batch in chunks(len(prompts), batch_size):
        rollouts = sample(student, tokenizer, prompts[batch], **options)
        completions += completions_of(rollouts, tokenizer, pattern)
    return completions


@torch.no_grad()
def held_out_metrics(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher,
    contexts: Rollouts,
    *,
    batch_size: int,
    unwrapped: nn.Module,
    settings: Settings,
) -> dict[str, float]:
    """Means over the valid tokens of the contexts, in nats: the loss of every token, and COLUMNS that this teacher determines.

    A teacher that sends lists determines only the student's entropy.
    """
    was_training = model.training
    model.eval()
    totals, n_valid = dict.fromkeys(("loss", *COLUMNS), 0.0), 0.0
    names: Sequence[str] = ()
    loss_fn = SelectiveOPDLoss(settings.every_token)
    for rows in chunks(len(contexts.tokens), batch_size):
        part = Rollouts(contexts.prompts[rows], contexts.tokens[rows], contexts.mask[rows])
        head = head_over(model, tokenizer, part, unwrapped=unwrapped)
        source = teacher(part)
        names = ("loss", *COLUMNS) if isinstance(source, LinearHead) else ("loss", "student_entropy")
        out = loss_fn(head, source, mask=part.mask, tokens=part.tokens)
        totals["loss"] += out.metrics["loss_sum"].item()
        for name in COLUMNS:
            totals[name] += getattr(out.stats, name).sum().item()
        n_valid += out.metrics["n_valid"].item()
    model.train(was_training)
    return {name: totals[name] / n_valid for name in names if n_valid}


def completions_of(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase, pattern: str) -> list[Completion]:
    """The greedy answers, each compared with the expected answer."""
    completions = []
    for prompt, text in zip(rollouts.prompts, rollouts.answers(tokenizer), strict=True):
        is_exact = None if prompt.answer is None else is_exact_match(text, prompt.answer, pattern)
        completions.append(Completion(prompt.text, text, prompt.answer, is_exact))
    return completions


def accuracy(completions: Sequence[Completion]) -> float | None:
    """Share of exact completions among the prompts that have an expected answer; None: no prompt has one."""
    judged = [completion.is_exact for completion in completions if completion.is_exact is not None]
    return sum(judged) / len(judged) if judged else None


def is_exact_match(text: str, answer: str, pattern: str = "") -> bool:
    """Whether `text`, or the last match of `pattern` in it, equals `answer`. Case and white space do not count."""
    if pattern:
        matches = list(re.finditer(pattern, text))
        if not matches:
            return False
        text = matches[-1].group(1 if matches[-1].re.groups else 0) or ""
    return " ".join(text.casefold().split()) == " ".join(answer.casefold().split())
