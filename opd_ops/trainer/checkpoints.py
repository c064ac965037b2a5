"""Checkpoints: everything a run continues from bit for bit, and the folder of the finished model with its card.

  output_dir/checkpoints/step-000040/  weights (safetensors), optimizer, learning-rate schedule, by accelerate;
                                       held_out.safetensors, the answers that evaluations read;
                                       run.json: step, options, digests of the prompts, size and SHA-256 of every other file
  output_dir/model/                    the student by `save_pretrained`, its tokenizer, README.md

run.json is written last and whole, so a checkpoint that has none was cut off, and one whose files differ from it is damaged.
What a step draws is a function of the step (order.py), so no data order and no generator is stored beyond accelerate's own.
Under LoRA a checkpoint holds the adapters alone, except where the model is sharded.
Not here: when they are written (loop.py), the card's text (model_card.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.files import write_whole
from opd_ops.trainer.rollouts import Rollouts

# What may change between a run and its continuation without a word, since no step depends on it.
FREE = {"steps", "eval_every", "completions", "save_every", "keep_checkpoints", "output_dir", "resume", "report_to", "run_name"}
FREE |= {"teacher_api_key_env", "rollout_api_key_env"}
# What may change if the log says so: how far the next updates go, and the memory that they take. All other options say what is
# learned, from which prompts, and what the numbers in the log mean; lines of two meanings would stand in one log.
LOGGED = {"learning_rate", "weight_decay", "max_grad_norm", "gradient_checkpointing", "workspace_mib"}
FOLDER = "checkpoints"  # in output_dir
ADAPTERS = "adapters.safetensors"
CONTEXTS = "held_out.safetensors"
SETTINGS = "run.json"


def complete(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first, less any that was cut off: the settings are written last. No copies of them."""
    own = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted((path for path in own if (path / SETTINGS).is_file()), key=step_of)


def step_of(path: Path) -> int:
    """The updates after which a checkpoint was saved."""
    return int(path.name.removeprefix("step-"))


def choose(folder: Path, accelerator: Any) -> tuple[Path | None, dict[Path, str]]:
    """`newest_intact`, which the first process finds out for all.

    Raises: ValueError: there are checkpoints, and none is intact.
    """
    from accelerate.utils import broadcast_object_list

    chosen: list[Any] = [newest_intact(folder) if accelerator.is_main_process else None]
    broadcast_object_list(chosen)
    path, damaged = chosen[0]
    if path is None and damaged:
        defects = "; ".join(f"{where.name}: {defect}" for where, defect in damaged.items())
        raise ValueError(
            f"resume: no checkpoint in {folder} is intact ({defects}); put the files back, or remove {folder}: resume then "
            "begins anew"
        )
    return path, damaged


def newest_intact(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint with all its files as they were written, if there is one, and what is wrong with each newer one."""
    damaged: dict[Path, str] = {}
    for path in reversed(complete(folder)):
        defect = damage(path)
        if defect is None:
            return path, damaged
        damaged[path] = defect
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None: they are what was written."""
    try:
        files = _settings(path)["files"]
        for name, written in files.items():
            size = (path / name).stat().st_size
            if size != written["size"]:
                return f"{name} has {size} bytes of {written['size']}"
        for name, written in files.items():
            if _sha256(path / name) != written["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read, {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{SETTINGS} does not list the files"
    return None


def check_resume(path: Path, config: OPDConfig, digests: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Whether an intact checkpoint is of this run; the options that differ and may, as they were and are. Needs no model.

    Raises: ValueError: it is of a run with other options or prompts, which are named, or beyond the steps asked for.
    """
    settings, now = _settings(path), dataclasses.asdict(config)
    # A schedule that ends with the run depends on its length.
    free = FREE - ({"steps"} if config.lr_scheduler != "constant" else set())
    different = {
        name: (was, now.get(name)) for name, was in settings["config"].items() if name not in free and now.get(name) != was
    }
    fixed = [f"{name} was {was!r} and is {is_!r}" for name, (was, is_) in different.items() if name not in LOGGED]
    if fixed:
        raise ValueError(
            f"resume: {path} is of another run: {', '.join(fixed)}; pass the same options, or another output_dir "
            f"(what may change: {', '.join(sorted(LOGGED))})"
        )
    for name, digest in digests.items():
        if settings["prompts"].get(name) != digest:
            raise ValueError(
                f"resume: the {name} are not those that {path} was trained with; put their file back as it was, or pass "
                "another output_dir"
            )
    if settings["step"] > config.steps:
        raise ValueError(f"steps: got {config.steps}, expected at least {settings['step']}, as {path} has done")
    return different


class Checkpoints:
    """The checkpoints of one run; every process calls each method."""

    def __init__(
        self,
        folder: Path,
        config: OPDConfig,
        accelerator: Any,
        model: Any,
        digests: Mapping[str, str],
        *,
        adapters_alone: bool,
    ) -> None:
        self.folder, self.config, self.accelerator, self.digests = folder, config, accelerator, digests
        if adapters_alone:
            accelerator.register_save_state_pre_hook(self._save_adapters)
            accelerator.register_load_state_pre_hook(self._load_adapters)
        self.model = model

    def save(self, step: int, contexts: Rollouts | None, *, prunes: bool = True) -> None:
        """After `step` updates. With `prunes` only the latest `keep_checkpoints` are kept."""
        path = self.folder / f"step-{step:06}"
        if self.accelerator.is_main_process:
            shutil.rmtree(path, ignore_errors=True)  # of a save that was cut off: none that is complete is written again
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(path))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._settle(path, step, contexts)
            for old in complete(self.folder)[: -self.config.keep_checkpoints] if prunes else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> tuple[int, dict[str, Any]]:
        """The number of updates done, and the held-out answers, if there are any."""
        from safetensors.torch import load_file

        self.accelerator.load_state(str(path))
        contexts = load_file(path / CONTEXTS) if (path / CONTEXTS).is_file() else {}
        return _settings(path)["step"], contexts

    def set_aside(self, path: Path, why: str) -> Path:
        """Rename a checkpoint, so that no run continues from it; its new name."""
        aside = path.with_name(f"{why}-{path.name}")
        self.accelerator.wait_for_everyone()  # so that all have seen it under the old one
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        self.accelerator.wait_for_everyone()
        return aside

    def _settle(self, path: Path, step: int, contexts: Rollouts | None) -> None:
        """What is not accelerate's, and last the list of all files."""
        from safetensors.torch import save_file

        if contexts is not None:
            save_file({"tokens": contexts.tokens.cpu(), "mask": contexts.mask.cpu()}, path / CONTEXTS)
        files = {
            file.relative_to(path).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        config = dataclasses.asdict(self.config)
        settings = {"step": step, "config": config, "prompts": self.digests, "files": files}
        write_whole(path / SETTINGS, json.dumps(settings, indent=1))

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


def _settings(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    return settings


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(folder: Path, accelerator: Any, model: Any, tokenizer: Any, card: str) -> None:
    """The student as `from_pretrained` reads it (under LoRA its adapters), its tokenizer and its card."""
    state = accelerator.get_state_dict(model)  # gathered, where it is sharded
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    accelerator.wait_for_everyone()
