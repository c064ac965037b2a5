# Checkpoints: everything a run continues from bit for bit, and the folder of the finished model with its card.
#
#   output_dir/checkpoints/step-000040/  weights (safetensors), optimizer, learning-rate schedule, by accelerate; run.json
#   output_dir/model/                    the student by `save_pretrained`, its tokenizer, README.md
#
# What a step draws is a function of the step (order.py), so no data order and no generator is stored beyond accelerate's own.
# Under LoRA a checkpoint holds the adapters alone, except where the model is sharded.
# Not here: when they are written (loop.py), the card's text (model_card.py).
from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from opd_ops.trainer.config import OPDConfig

# What may change between a run and its continuation.
FREE = {"steps", "eval_every", "completions", "save_every", "keep_checkpoints", "output_dir", "resume", "report_to", "run_name"}
FREE |= {"teacher_api_key_env", "rollout_api_key_env"}
FOLDER = "checkpoints"  # in output_dir
ADAPTERS = "adapters.safetensors"
SETTINGS = "run.json"


def complete(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first, less any that was cut off: the settings are written last."""
    return sorted(path for path in folder.glob("step-*") if (path / SETTINGS).is_file())


def check_resume(folder: Path, config: OPDConfig) -> None:
    """Whether the latest checkpoint there, if any, is of this run; needs no model.

    Raises: ValueError: it is of a run with other options, which are named, or beyond the steps asked for.
    """
    for path in complete(folder)[-1:]:
        found = json.loads((path / SETTINGS).read_text())
        now = dataclasses.asdict(config)
        # A schedule that ends with the run depends on its length.
        free = FREE - ({"steps"} if config.lr_scheduler != "constant" else set())
        different = [name for name, value in found["config"].items() if name not in free and now.get(name) != value]
        if different:
            pairs = ", ".join(f"{name} was {found['config'][name]!r} and is {now.get(name)!r}" for name in different)
            raise ValueError(f"resume: {path} is of another run: {pairs}; pass the same options, or another output_dir")
        if found["step"] > config.steps:
            raise ValueError(f"steps: got {config.steps}, expected at least {found['step']}, as {path} has done")


class Checkpoints:
    """The checkpoints of one run; every process calls each method."""

    def __init__(self, folder: Path, config: OPDConfig, accelerator: Any, model: Any, *, adapters_alone: bool) -> None:
        self.folder, self.config, self.accelerator = folder, config, accelerator
        if adapters_alone:
            accelerator.register_save_state_pre_hook(self._save_adapters)
            accelerator.register_load_state_pre_hook(self._load_adapters)
        self.model = model

    def all(self) -> list[Path]:
        """Complete ones, oldest first."""
        return complete(self.folder)

    def save(self, step: int) -> Path:
        """After `step` updates."""
        path = self.folder / f"step-{step:06}"
        self.accelerator.save_state(str(path))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            settings = {"step": step, "config": dataclasses.asdict(self.config)}
            (path / SETTINGS).write_text(json.dumps(settings, indent=1))
            for old in self.all()[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return path

    def load(self, path: Path) -> int:
        """The number of updates done."""
        self.accelerator.load_state(str(path))
        step: int = json.loads((path / SETTINGS).read_text())["step"]
        return step

    def _save_adapters(self, models: list[Any], weights: list[Any], path: str) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        if self.accelerator.is_main_process:
            found = get_peft_model_state_dict(self.model)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}, Path(path) / ADAPTERS)
        weights.clear()  # so that accelerate writes none

    def _load_adapters(self, models: list[Any], path: str) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.model, load_file(Path(path) / ADAPTERS))
        models.clear()  # nor reads any


def save_model(folder: Path, accelerator: Any, model: Any, tokenizer: Any, card: str) -> None:
    """The student as `from_pretrained` reads it (under LoRA its adapters), its tokenizer and its card."""
    state = accelerator.get_state_dict(model)  # gathered, where it is sharded
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    accelerator.wait_for_everyone()
