"""The student: loaded, with LoRA adapters or all weights trainable, with or without gradient checkpointing.

  LoRA: W + (alpha / rank) B A on every linear layer but the head. The head is frozen: the loss computes no gradient for it.

Not here: how models are found (models.py), the optimizer (loop.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.models import load_model
from opd_ops.trainer.order import seed_of
from opd_ops.trainer.rollouts import seeded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_student(config: OPDConfig) -> PreTrainedModel | PeftModel:
    """The model that `config.student` names, made trainable by the options."""
    return make_trainable(load_model(config.student, dtype=config.dtype), config)


def make_trainable(model: PreTrainedModel, config: OPDConfig) -> PreTrainedModel | PeftModel:
    """`model` itself, or a PEFT model around it."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank == 0:
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model  # belongs to an extra; `OPDConfig.check` has checked that it is installed

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
    )
    with seeded(seed_of(config.seed, "lora"), torch.device("cpu")):
        return get_peft_model(model, lora)
