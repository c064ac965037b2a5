"""The two pairs of teacher and student, from one file of SmolLM2-135M-Instruct (examples/smollm2.py).

  instruction   the teacher is the student itself, told to answer like a pirate (examples/prompts.py): prompt distillation
  shallow       the teacher is the whole model; the student lacks a third of its layers and was then *healed*: trained on all
                tokens of the teacher's own answers with forward KL, a fixed number of steps
                healing loss = 1/N sum_t KL(q || p), answers drawn from q; AdamW, a linear warm-up and a linear decay

Healing takes a quarter of a CPU hour. Its weights are kept in a cache outside the repository, and made again if missing.
The chat template has no default system message: a prompt is then 16 tokens instead of 37, and a step costs a third less.
Not here: the training of the study (train.py).
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from examples import smollm2
from examples.prompts import HELD_OUT, INSTRUCTION, TRAINING
from opd_ops import selective_opd_loss
from opd_ops.trainer.order import prompt_indices, seed_of
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, end_tokens, head_over, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Healing:
    """How the shallow student is made."""

    first_dropped: int = 12  # of the blocks of ten layers tried, the one whose loss costs least (LOG.md)
    n_dropped: int = 10
    steps: int = 60
    batch_size: int = 16
    max_new_tokens: int = 48
    learning_rate: float = 5e-4
    warm_up: int = 5
    seed: int = 0

    @property
    def file_name(self) -> str:
        layers = f"{self.first_dropped}-{self.first_dropped + self.n_dropped - 1}"
        return (
            f"smollm2-without-{layers}-{self.steps}x{self.batch_size}x{self.max_new_tokens}-{self.learning_rate:g}.safetensors"
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * min((step + 1) / self.warm_up, (self.steps - step) / (self.steps - self.warm_up), 1)


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher, the student that every run begins with, and their prompts. No weight of either is ever changed."""

    name: str
    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    instruction: str | None  # the system message of the teacher alone
    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]


def load_pairs() -> dict[str, Pair]:
    """The pairs by name; they share the teacher's memory. Heals the shallow student if it is not in the cache."""
    teacher, tokenizer = smollm2.load_model()
    teacher.requires_grad_(False)
    tokenizer.chat_template = CHAT_TEMPLATE
    prompts = (tuple(TRAINING), tuple(HELD_OUT))
    student = healed_student(teacher, tokenizer, prompts[0], Healing(), cache_folder())
    pairs = (
        Pair("instruction", teacher, teacher, tokenizer, INSTRUCTION, *prompts),
        Pair("shallow", teacher, student, tokenizer, None, *prompts),
    )
    return {pair.name: pair for pair in pairs}


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opd_ops" / "study"


def is_healed() -> bool:
    """Whether the shallow student's weights are in the cache."""
    return (cache_folder() / Healing().file_name).exists()


def without_layers(model: PreTrainedModel, first: int, n: int) -> PreTrainedModel:
    """A copy without `n` layers from `first` on."""
    shallow = copy.deepcopy(model)
    layers = [layer for i, layer in enumerate(shallow.model.layers) if not first <= i < first + n]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i  # its place in the cache of keys and values
    shallow.model.layers = nn.ModuleList(layers)
    shallow.config.num_hidden_layers = len(layers)
    return shallow


def healed_student(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[Prompt, ...],
    healing: Healing,
    folder: Path,
) -> PreTrainedModel:
    """The shallow student, from the cache or healed now."""
    student = without_layers(teacher, healing.first_dropped, healing.n_dropped)
    path = folder / healing.file_name
    if path.exists():
        load_model(student, path)
    else:
        heal(teacher, student, tokenizer, prompts, healing)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(student, str(path.with_suffix(".part")))
        path.with_suffix(".part").rename(path)
    return student.requires_grad_(False)


def heal(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[Prompt, ...],
    healing: Healing,
) -> None:
    """Train the student in place on all tokens of the teacher's answers. Each pass over the prompts has new answers."""
    began = time.process_time()
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0, fused=True)
    answers: dict[int, Rollouts] = {}  # by the number of the pass
    for step in range(healing.steps):
        number = step * healing.batch_size // len(prompts)
        if number not in answers:
            # In one batch: decoding reads all weights for every token, whatever the number of rows.
            seed = seed_of(healing.seed, "heal", number)
            answers = {number: sample(teacher, tokenizer, prompts, max_new_tokens=healing.max_new_tokens, seed=seed)}
        indices = prompt_indices(
            step, 0, n_micro_batches=1, batch_size=healing.batch_size, n_prompts=len(prompts), seed=healing.seed
        )
        tokens = answers[number].tokens[indices]
        batch = Rollouts.of([prompts[i] for i in indices], tokens, end_tokens(teacher, tokenizer))
        with torch.no_grad():
            taught = head_over(teacher, tokenizer, batch)
        out = selective_opd_loss(
            head_over(student, tokenizer, batch), taught, mask=batch.mask, selector="all", fraction=1.0, divergence="forward_kl"
        )
        out.loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = healing.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(
            f"healing step {step + 1:3} of {healing.steps}: KL {out.loss.item():.3f} nats, "
            f"{time.process_time() - began:.0f} CPU seconds",
            flush=True,
        )
