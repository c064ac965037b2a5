"""Runs of the reference trainer small enough for a test: two layers, 64 words, a second or two.

Not here: what is compared (test_loop.py, test_processes.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.loop import OPDTrainer
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.teachers import LocalTeacher
from tests.integrations.models import language_model, tokenizer

SMALL: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_new_tokens": 6,
    "eval_size": 4,
    "eval_every": 2,
    "learning_rate": 1e-3,
    "fraction": 0.25,
}


def prompts(n: int = 12) -> list[Prompt]:
    """Every other one has an answer, so that both kinds are evaluated."""
    return [Prompt.of(" ".join(f"w{3 + (7 * i + j) % 50}" for j in range(4)), answer="w9" if i % 2 else None) for i in range(n)]


def trainer(
    folder: Path, *, steps: int, taught_by: int | None = 1, asked: list[Prompt] | None = None, **options: Any
) -> OPDTrainer:
    """`taught_by`: the seed of the teacher's weights (the student's is 0); None: the one that the options name."""
    words = tokenizer()
    config = OPDConfig(output_dir=str(folder), steps=steps, **SMALL | options)
    teacher = None if taught_by is None else LocalTeacher(language_model(taught_by), words)
    return OPDTrainer(config, student=language_model(0), tokenizer=words, teacher=teacher, prompts=asked or prompts())
