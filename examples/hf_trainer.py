"""Hugging Face's Trainer, on-policy: SmolLM2-135M teaches a copy of itself that lost every third layer, on what the copy
writes.

  loss = 1/|M| sum_{t in M} KL(student || teacher) on the student's own answers; M: the best-scored fifth of their tokens
  (arXiv 2605.26844, eqs. 6, 12, 13)

A `Trainer` reads a fixed data set. On-policy training makes its data during training. So here the data are prompts, and the
  student answers them when the Trainer collects the batches of an optimizer step. A data set or a collator that samples would
  be off-policy by a step, since the loader reads a batch ahead.
You will see: a line of the Trainer's log every 4 steps; opd/kl_all is the KL over all sampled tokens, 3.8 nats in the first 4
  steps; with 16 steps, 2.6 in the last 4. On 2 CPU cores, 8 steps take 80 seconds.
Run: python -m examples.hf_trainer [STEPS]; needs pip install '.[hf]'

Not here: the loss inside the Trainer (opd_ops/integrations/hf.py), the same in a plain loop (plain_loop.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from examples import smollm2
from examples.plain_loop import without_every_third_layer
from examples.prompts import TRAINING
from opd_ops import Settings
from opd_ops.integrations.hf import SelectiveDistillationTrainer
from opd_ops.trainer.rollouts import model_inputs, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opd_ops.trainer.prompts import Prompt


class OnPolicyTrainer(SelectiveDistillationTrainer):
    """Its batches are prompts until a step begins, and then what the student has answered."""

    n_tokens = 32

    def get_batch_samples(
        self, epoch_iterator: Iterator[Sequence[Prompt]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """Called once an optimizer step, so all its micro-batches come from the same weights; the labels are counted here."""
        return super().get_batch_samples(map(self.answer, epoch_iterator), num_batches, device)

    def answer(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Prompts and sampled answers; labels are -100 on the prompts and after the end."""
        rollouts = sample(self.model, self.processing_class, prompts, max_new_tokens=self.n_tokens)
        inputs, width = model_inputs(self.processing_class, rollouts)
        labels = inputs["input_ids"].clone()
        labels[:, :width] = -100
        labels[:, width:][~rollouts.mask] = -100
        return inputs | {"labels": labels}


def train(
    student: nn.Module,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    steps: int,
    n_questions: int = 6,
    n_tokens: int = 32,
) -> OnPolicyTrainer:
    """The trainer after some steps; its state.log_history has what was logged."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=n_questions,
        learning_rate=1e-4,
        logging_steps=min(steps, 4),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # prompts are no columns,
        dataloader_pin_memory=False,  # and hold no tensors
    )
    trainer = OnPolicyTrainer(
        student,
        arguments,
        train_dataset=TRAINING,
        data_collator=list,
        processing_class=tokenizer,
        teacher=teacher,
        settings=Settings(fraction=0.2),
    )
    trainer.n_tokens = n_tokens
    trainer.train()
    return trainer


if __name__ == "__main__":
    model, tokenizer = smollm2.load_model()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    trainer = train(without_every_third_layer(model), model, tokenizer, Path("out/hf"), steps)
    kls = [row["opd/kl_all"] for row in trainer.state.log_history if "opd/kl_all" in row]
    print(f"KL {kls[0]:.2f} -> {kls[-1]:.2f} nats a token, means over the first and the last 4 of {steps} steps")
