"""From models to statistics: the student writes answers, which are then frozen; two models are compared on their tokens.

  frozen = sample_answers(student, prompts, ...)
  before = compare(student, teacher, frozen, ...);  after = compare(trained, teacher, frozen, ...).forward_kl

The models read the answers in batches. No logits are stored, and only two models are needed at a time.
Not here: the diagnostics (study.py), flags (cli.py), sampling and alignment (opd_ops/trainer/rollouts.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from opd_ops.inputs.chunks import chunks
from opd_ops.scoring import score_positions
from opd_ops.selection.selectors import everything
from opd_ops.selection.stats import TokenStats
from opd_ops.settings import DEFAULTS
from opd_ops.trainer.order import seed_of
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, head_over, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reader(NamedTuple):
    """A model, and the tokenizer that writes its prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class ColumnRequest:
    """A selector that ranks nothing; `needs` makes `score_positions` compute these optional columns of the statistics."""

    needs: frozenset[str]

    def __call__(self, stats: TokenStats) -> Tensor:
        return everything(stats)


def sample_answers(
    student: Reader, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int, seed: int
) -> Iterable[Rollouts]:
    """Batches of answers, drawn at temperature 1 from the whole distribution, as in on-policy training."""
    for batch in chunks(len(prompts), batch_size):
        batch_seed = seed_of(seed, "answers", batch.start)
        yield sample(student.model, student.tokenizer, prompts[batch], max_new_tokens=max_new_tokens, seed=batch_seed)


@torch.no_grad()
def compare(
    student: Reader,
    teacher: Reader,
    frozen: Iterable[Rollouts],
    *,
    top_k: int = DEFAULTS.top_k,
    teacher_system: str | None = None,
    columns: frozenset[str] = frozenset(),
) -> TokenStats:
    """The statistics of both models at every token of the answers, (B, L) on the CPU.

    Args:
        teacher_system: The teacher's system message for prompts that have no `teacher_system` of their own.
        columns: Names of optional columns of `TokenStats` to compute.
    """
    context, batches = PrivilegedContext(teacher_system), []
    for rollouts in frozen:
        told = rollouts._replace(prompts=context.prompts(rollouts.prompts))
        _, stats = score_positions(
            head_over(student.model, student.tokenizer, rollouts),
            head_over(teacher.model, teacher.tokenizer, told),
            mask=rollouts.mask,
            top_k=top_k,
            selector=ColumnRequest(columns),
        )
        batches.append(stats)
    length = max(stats.valid.shape[1] for stats in batches)
    names = [name for name, column in batches[0]._asdict().items() if column is not None]
    return TokenStats(**{name: torch.cat([_padded(getattr(stats, name), length) for stats in batches]) for name in names})


def _padded(column: Tensor, length: int) -> Tensor:
    padded: Tensor = nn.functional.pad(column.cpu(), (0, length - column.shape[1]))
    return padded
