"""Checkpoints, from which a run continues bit for bit, and the folder of the finished model with its card.

  output_dir/checkpoints/step-000040/  weights (safetensors), optimizer, learning-rate schedule, by accelerate;
                                       held_out.safetensors, the answers that evaluations read;
                                       run.json: step, number of processes, options, digests of the prompts, size and SHA-256
                                       of every other file
  output_dir/model/                    the student by `save_pretrained`, merged or its adapters under LoRA, its tokenizer,
                                       README.md

run.json is written last and in one piece. A checkpoint without it is incomplete: its save was interrupted. A checkpoint is
damaged if a file differs from run.json. The random numbers of a step are a function of the step (order.py), so neither the data
order nor a generator is stored, except accelerate's own. Under LoRA a checkpoint holds only the adapters, unless the model is
sharded.
Not here: when they are written (loop.py), the card's text (model_card.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from torch import Tensor, nn

from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.files import write_whole
from opd_ops.trainer.rollouts import Rollouts

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Options that may change between a run and its continuation without a note in the log: no step depends on them.
FREE = {"steps", "eval_every", "completions", "save_every", "keep_checkpoints", "output_dir", "resume", "report_to", "run_name"}
FREE |= {"teacher_api_key_env", "rollout_api_key_env", "server_retry_seconds", "process_timeout"}
# Places of prompts: digests of the prompts themselves are compared.
FREE |= {"prompts", "prompts_split", "prompts_name", "eval_prompts", "eval_prompts_split", "eval_prompts_name"}
# In each group: if one option was set before, one must be set now, maybe another: a server may have moved, or its answers may
# come from a folder.
PLACES = (("rollout_url",), ("teacher_url", "teacher_store"))
# Options that may change with a note in the log: size of the next updates, and their memory. All other options decide what is
# learned, from which prompts, and the meaning of the logged numbers. These may not change: all lines of a log mean the same.
LOGGED = {"learning_rate", "weight_decay", "max_grad_norm", "gradient_checkpointing", "workspace_bytes"}
FOLDER = "checkpoints"  # in output_dir
TEACHER = "teacher's weights"  # of a teacher that sends lists: the digest is a server's name for its model, or `teacher_digest`
TOKENS = "prompts' token ids"  # of what student and teacher read
ADVICE = {  # what to do about a digest that differs
    TEACHER: "let the server serve the same model under the same name",
    TOKENS: "put the tokenizer and its chat template back as they were; where a template prints the date, write that of the "
    "first run into it",
}
ADAPTERS = "adapters.safetensors"
CONTEXTS = "held_out.safetensors"
SETTINGS = "run.json"
BLOCK_BYTES = 2**20  # of a file, read at once for its digest

_log = logging.getLogger("opd_ops")


class SavedFile(TypedDict):
    """A file of a checkpoint, as it was written."""

    size: int  # bytes
    sha256: str


class RunRecord(TypedDict):
    """The content of run.json."""

    step: int
    num_processes: int  # checkpoints of earlier versions lack it
    config: dict[str, object]  # every option by name
    prompts: Mapping[str, str]  # digests of what is read: of each kind of prompts, TOKENS, and TEACHER
    files: dict[str, SavedFile]  # by path in the checkpoint's folder


def complete(folder: Path) -> list[Path]:
    """The folder's complete checkpoints, which have a run.json, oldest first."""
    return [path for path in _numbered(folder) if (path / SETTINGS).is_file()]


def _numbered(folder: Path) -> list[Path]:
    """The folder's checkpoints, also incomplete ones, oldest first. Renamed ones and copies do not count."""
    paths = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """The number of updates before a checkpoint."""
    return int(path.name.removeprefix("step-"))


def choose(folder: Path, accelerator: Accelerator) -> tuple[Path | None, dict[Path, str]]:
    """`newest_intact`: the first process computes it and sends it to all.

    Raises: ValueError: there are checkpoints, and none is intact.
    """
    from accelerate.utils import broadcast_object_list

    chosen: list[tuple[Path | None, dict[Path, str]]] = [newest_intact(folder) if accelerator.is_main_process else (None, {})]
    broadcast_object_list(chosen)
    path, damaged = chosen[0]
    if path is None and damaged:
        defects = "; ".join(f"{checkpoint.name}: {defect}" for checkpoint, defect in damaged.items())
        raise ValueError(
            f"resume: no checkpoint in {folder} is intact ({defects}); put the files back, or remove {folder}: resume then "
            "begins anew"
        )
    return path, damaged


def newest_intact(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files are all as written, or None; and the defect of each newer checkpoint."""
    damaged: dict[Path, str] = {}
    for path in reversed(complete(folder)):
        defect = damage(path)
        if defect is None:
            return path, damaged
        damaged[path] = defect
    return None, damaged


def damage(path: Path) -> str | None:
    """The defect of a checkpoint's files, in words; None: all files are as written."""
    try:
        files = _read_record(path)["files"]
        for name, saved in files.items():
            size = (path / name).stat().st_size
            if size != saved["size"]:
                return f"{name} has {size} bytes of {saved['size']}"
        for name, saved in files.items():
            if _sha256(path / name) != saved["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read, {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{SETTINGS} does not list the files"
    return None


def check_resume(
    path: Path, config: OPDConfig, digests: Mapping[str, str], num_processes: int
) -> dict[str, tuple[object, object]]:
    """Check that an intact checkpoint belongs to this run. Returns the changed options: name -> (old, new). Needs no model.

    Raises: ValueError: its run had other options, another digest or another number of micro-batches in a step, which are
        named, or it is beyond the last step.
    """
    record, new = _read_record(path), dataclasses.asdict(config)
    before = dataclasses.asdict(OPDConfig()) | record["config"]  # an earlier version had its options alone
    # The other schedules depend on the number of steps.
    is_scheduled = config.lr_scheduler != "constant" or config.scheduled(0)
    free = FREE - ({"steps"} if is_scheduled else set())
    if "num_processes" in record:
        _check_micro_batches(path, record, config, num_processes)
        free = free | {"gradient_accumulation_steps"}
    if TEACHER in record["prompts"] and TEACHER in digests:
        free = free | {"teacher_model", "teacher_api"}
    for group in PLACES:
        if all(any(options[name] is not None for name in group) for options in (before, new)):
            free = free | set(group)
    different = {name: (old, new.get(name)) for name, old in before.items() if name not in free and new.get(name) != old}
    fixed = [f"{name} was {old!r} and is {now!r}" for name, (old, now) in different.items() if name not in LOGGED]
    if fixed:
        raise ValueError(
            f"resume: {path} is of another run: {', '.join(fixed)}; pass the same options, or another output_dir "
            f"(what may change: {', '.join(sorted(LOGGED))})"
        )
    for name, digest in digests.items():
        if record["prompts"].get(name, digest) != digest:  # an earlier version had fewer digests
            advice = ADVICE.get(name, "put their file back as it was")
            raise ValueError(
                f"resume: the {name} are not those that {path} was trained with; {advice}, or pass another output_dir"
            )
    if record["step"] > config.steps:
        raise ValueError(f"steps: got {config.steps}, expected at least {record['step']}, as {path} has done")
    return different


def _check_micro_batches(path: Path, record: RunRecord, config: OPDConfig, n_processes: int) -> None:
    """Check that a step has as many micro-batches as before. Scope "global" selects over the processes: their number stays."""
    n_before, accumulated = record["num_processes"], cast("int", record["config"]["gradient_accumulation_steps"])
    n_micro_batches = n_processes * config.gradient_accumulation_steps
    is_same = n_before * accumulated == n_micro_batches and (config.scope != "global" or n_before == n_processes)
    if not is_same:
        what = "both" if config.scope == "global" else "the same product of the two"
        raise ValueError(
            f"resume: {path} is of another run: gradient_accumulation_steps was {accumulated} on {n_before} processes and is "
            f"{config.gradient_accumulation_steps} on {n_processes}; keep {what}, or pass another output_dir"
        )


class Checkpoints:
    """The checkpoints of one run. All processes must call each method together."""

    def __init__(
        self,
        folder: Path,
        config: OPDConfig,
        accelerator: Accelerator,
        model: PreTrainedModel,
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
        """Save the state after `step` updates. With `prunes`, delete all but the latest `keep_checkpoints`."""
        path = self.folder / f"step-{step:06}"
        if self.accelerator.is_main_process:
            shutil.rmtree(path, ignore_errors=True)  # left by an interrupted save: a complete checkpoint is never rewritten
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(path))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._write_record(path, step, contexts)
            if prunes:
                self._prune()
        self.accelerator.wait_for_everyone()

    def load(self, path: Path) -> tuple[int, dict[str, Tensor]]:
        """Load the state. Returns the number of updates done, and the tensors of the held-out answers, {} if there are none."""
        from safetensors.torch import load_file

        self.accelerator.load_state(str(path))
        contexts = load_file(path / CONTEXTS) if (path / CONTEXTS).is_file() else {}
        return _read_record(path)["step"], contexts

    def set_aside(self, path: Path, why: str) -> Path:
        """Rename a checkpoint, so that no run continues from it. Returns its new path."""
        aside = path.with_name(f"{why}-{path.name}")
        self.accelerator.wait_for_everyone()  # so that all processes have listed it under its old name
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        self.accelerator.wait_for_everyone()
        return aside

    def _prune(self) -> None:
        """Delete all that is older than the latest `keep_checkpoints`. A file system that refuses does not end the run."""
        oldest_kept = complete(self.folder)[-self.config.keep_checkpoints :][0]
        for path in _numbered(self.folder):
            if step_of(path) >= step_of(oldest_kept):
                return
            try:
                (path / SETTINGS).unlink(missing_ok=True)  # first, so that what is deleted in part is incomplete
                shutil.rmtree(path)
            except OSError as error:
                _log.warning("%s: cannot be deleted (%s); the next checkpoint tries it again", path, error.strerror)

    def _write_record(self, path: Path, step: int, contexts: Rollouts | None) -> None:
        """Write the held-out answers, and last run.json, which lists all files."""
        from safetensors.torch import save_file

        if contexts is not None:
            save_file({"tokens": contexts.tokens.cpu(), "mask": contexts.mask.cpu()}, path / CONTEXTS)
        files: dict[str, SavedFile] = {
            file.relative_to(path).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        config = dataclasses.asdict(self.config)
        record: RunRecord = {
            "step": step,
            "num_processes": self.accelerator.num_processes,
            "config": config,
            "prompts": self.digests,
            "files": files,
        }
        write_whole(path / SETTINGS, json.dumps(record, indent=1))

    def _save_adapters(self, models: list[nn.Module], weights: list[dict[str, Tensor]], path: str) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        if self.accelerator.is_main_process:
            adapters = get_peft_model_state_dict(self.model)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in adapters.items()}, Path(path) / ADAPTERS)
        weights.clear()  # so that accelerate writes no weights itself

    def _load_adapters(self, models: list[nn.Module], path: str) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.model, load_file(Path(path) / ADAPTERS))
        models.clear()  # so that accelerate reads no weights itself


def _read_record(path: Path) -> RunRecord:
    record: RunRecord = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    return record


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def save_model(
    folder: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    *,
    merges: bool,
) -> None:
    """Save the student for `from_pretrained`, its tokenizer and its card. Under LoRA these are the adapters, or with `merges`
    the whole model, which then has no adapters any more; a sharded model cannot be merged.
    """
    student = accelerator.unwrap_model(model)
    if merges:
        model = student = student.merge_and_unload()
    state = accelerator.get_state_dict(model)  # gathered, if the model is sharded
    if accelerator.is_main_process:
        student.save_pretrained(folder, state_dict=state, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    accelerator.wait_for_everyone()
