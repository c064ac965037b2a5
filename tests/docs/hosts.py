"""What the documentation's host examples take as given: tiny models, a TRL trainer, arguments and rollouts for a Trainer.

Not here: the models (tests/integrations/models.py), the pages (docs/, README.md).
"""

import torch
from transformers import TrainingArguments

from tests.integrations.models import VOCAB, language_model, prompts, tokenizer

SHORT = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}


def models():
    """A student and a teacher."""
    return language_model(1), language_model(2)


def trl_config():
    from trl import DistillationConfig

    return DistillationConfig("out", per_device_train_batch_size=2, max_completion_length=8, bf16=False, **SHORT)


def trl_trainer(student, teacher):
    from trl import DistillationTrainer

    return DistillationTrainer(student, teacher, args=trl_config(), train_dataset=prompts(4), processing_class=tokenizer())


def hf_arguments():
    return TrainingArguments("out", per_device_train_batch_size=4, **SHORT)


def rollouts():
    """Four answers of the student, with labels -100 on the prompt."""
    ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": torch.where(torch.arange(12) < 4, -100, row)} for row in ids]
