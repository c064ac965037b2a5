"""The student: loaded, with LoRA adapters or all weights trainable, with or without gradient checkpointing.

  LoRA: W + (alpha / rank) B A on every linear layer but the head, which stays frozen: the loss then makes no gradient for it.

Not here: how models are found (models.py), the optimizer (loop.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.models import load_model
from opd_ops.trainer.order import seed_of
from opd_ops.trainer.rollouts import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_student(config: OPDConfig) -> PreTrainedModel:
    """The model that `config.student` names, as the options want it trained."""
    return make_trainable(load_model(config.student, dtype=config.dtype), config)


def make_trainable(model: Any, config: OPDConfig) -> Any:
    """`model` itself, or a PEFT model around it."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.lora_rank == 0:
        return model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model  # an extra; `OPDConfig.check` has found it

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
    )
    with seeded(seed_of(config.seed, "lora"), torch.device("cpu")):
        return get_peft_model(model, lora)
