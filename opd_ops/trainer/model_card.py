"""The model card of a trained student: its base model and teacher, every option, and the last held-out numbers.

Not here: where it is written (checkpoints.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from opd_ops import __version__
from opd_ops.trainer.config import PASSED_AS_OBJECT, SAME, OPDConfig
from opd_ops.trainer.models import PACKAGE
from opd_ops.trainer.self_teacher import own_weights


def describe_teacher(config: OPDConfig) -> str:
    """The teacher, in words."""
    is_student = config.teacher == SAME and not config.teacher_sends_lists
    name = own_weights(config.teacher_weights).name if is_student else config.teacher
    name = config.teacher_url or config.teacher_store or name
    return f"{name}, told more in its prompt" if config.teacher_system or config.teacher_prompt or is_student else name


def model_card(config: OPDConfig, teacher: str, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Markdown with the front matter that model hubs read. `before`, `after`: held-out numbers, in nats per token."""
    # A package, a folder or a file has no name on a hub.
    is_on_hub = (
        config.student != PASSED_AS_OBJECT and not config.student.startswith(PACKAGE) and not Path(config.student).exists()
    )
    rows = [
        f"| {name} | {before[name]:.4f} | {after[name]:.4f} |" if name in before else f"| {name} | | {after[name]:.4f} |"
        for name in after
    ]
    settings = [f"{name}: {json.dumps(value)}" for name, value in dataclasses.asdict(config).items() if value not in (None, "")]
    lines = [
        "---",
        *([f"base_model: {json.dumps(config.student)}"] if is_on_hub else []),
        "tags: [on-policy-distillation, opd_ops]",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {config.student}, distilled on-policy",
        "",
        f"Trained by `opd_ops` {__version__} for {config.steps} steps on answers it wrote itself. Teacher: {teacher}.",
        f"{_shares(config)}, chosen by `{config.selector}`, were trained on with `{config.divergence}`"
        f"{f', weighted by `{config.weighting}`' if config.weighting else ''}.",
        "",
        *(["| held out, nats a token | before | after |", "|---|---|---|", *rows, ""] if rows else []),
        "## Settings",
        "",
        "```yaml",
        *settings,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _shares(config: OPDConfig) -> str:
    if config.count is not None:
        return f"Of each {'answer' if config.scope == 'sequence' else 'micro-batch'} at most {config.count} tokens"
    shares = [config.fraction] if config.fraction_end is None else [config.fraction, config.fraction_end]
    return f"Of each micro-batch {' to '.join(f'{100 * share:g} %' for share in shares)} of the tokens"
