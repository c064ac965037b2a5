"""The options of a run: a dataclass, read from a YAML file and flags, checked before any model loads.

  opd-train --config FILE.yaml --fraction 0.05:  a line `name: value` of the file is the flag `--name value`; flags win

Not here: what the options do (loop.py and the files that it imports), the settings of the loss (opd_ops/settings.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from opd_ops.arguments import did_you_mean, refuse_unknown_names, shown, take_plain
from opd_ops.divergences import Divergence, resolve_divergence
from opd_ops.settings import DEFAULTS, HELP, Settings, check_fraction, check_share
from opd_ops.trainer.files import check_path, check_text, read_text
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.prompts import PromptSource
from opd_ops.trainer.self_teacher import FROZEN, own_weights
from opd_ops.trainer.servers.client import check_address

if TYPE_CHECKING:
    import yaml

SAME = "same"
PASSED_AS_OBJECT = "passed as an object"
PATHS = ("student", "teacher", "teacher_store", "prompts", "eval_prompts", "output_dir")  # options that may be paths
Scope = Literal["batch", "sequence", "global"]
Value = TypeVar("Value")


def _option(default: Value, text: str) -> Value:
    return field(default=default, metadata={"help": text})


@dataclass
class OPDConfig:
    """Every option of the reference trainer, with its default; `opd-train --help` prints the same.

    Raises (from `check`): ValueError: an invalid option; the message has its name, its value and the expected values.
    """

    # models
    student: str = _option(
        "", "Model to train: a folder, a name on the hub, a .gguf file, or package:NAME for one in a package."
    )
    teacher: str = _option(SAME, "Model that teaches, given in the same ways as `student`; 'same': the student's own.")
    teacher_weights: str = _option(
        FROZEN,
        "Weights of the teacher 'same'. 'frozen': the student's initial weights; 'live': its present weights; 'lag=N': its "
        "weights N updates ago; 'ema=D': their moving average with decay D.",
    )
    teacher_system: str | None = _option(
        None, "System message that only the teacher reads; a prompt's own teacher_system wins."
    )
    teacher_prompt: str | None = _option(
        None,
        "Template of the last message that only the teacher reads, with {prompt}, {answer} and {demonstration} of the row; "
        "a prompt's own teacher_prompt wins.",
    )
    teacher_url: str | None = _option(
        None, "Server that answers log-probabilities of the prompt's tokens: the teacher instead of a model."
    )
    teacher_api: Literal["vllm", "sglang"] = _option("vllm", "The kind of that server; its requests differ.")
    teacher_model: str | None = _option(None, "Name that server has for the teacher; none: the only model it serves.")
    teacher_api_key_env: str | None = _option(
        None, "Environment variable that holds the key of the server of `teacher_url`, if any."
    )
    teacher_top_k: int = _option(16, "Log-probabilities that are asked of that server for each token.")
    teacher_store: str | None = _option(
        None, "Folder that keeps that server's log-probabilities, so that it is asked once; without teacher_url: the teacher."
    )
    teacher_digest: str | None = _option(
        None, "Digest of the teacher's weights, kept in teacher_store and compared; none: the server's name for its model."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _option(
        "float32", "Dtype of the student's weights; 'auto': as stored. In 16 bits most small updates round to no change."
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Dtype of the teacher's weights; 'auto': as stored."
    )
    mixed_precision: Literal["no", "bf16"] = _option("no", "bf16: the student's body computes in 16 bits, its weights stay.")
    gradient_checkpointing: bool = _option(False, "Compute activations again in the backward instead of keeping them.")
    lora_rank: int = _option(0, "Rank of LoRA adapters on every linear layer but the head; 0: train all weights.")
    lora_alpha: int = _option(32, "Scale of the adapters, times 1/rank.")
    lora_dropout: float = _option(0.0, "Dropout of the adapters' inputs.")
    # data
    prompts: str = _option("", "Prompts: a JSONL file, a folder saved by `datasets`, or a dataset's name.")
    prompts_split: str = _option("train", "Split of a dataset.")
    prompts_name: str | None = _option(None, "Configuration of a dataset that has several, like 'main' of gsm8k.")
    eval_prompts: str | None = _option(
        None, "Held-out prompts, given in the same ways as `prompts`; none: the last eval_size of the prompts."
    )
    eval_prompts_split: str | None = _option(None, "Split of eval_prompts; none: prompts_split.")
    eval_prompts_name: str | None = _option(None, "Configuration of eval_prompts; none: prompts_name, of the same dataset.")
    eval_size: int = _option(16, "Held-out prompts; 0: no evaluation.")
    # rollouts
    max_new_tokens: int = _option(256, "Longest answer, in tokens.")
    temperature: float = _option(1.0, "Temperature of sampling; the loss is at temperature 1.")
    top_p: float = _option(1.0, "Nucleus of sampling; below 1 the answers are no longer drawn from the whole distribution.")
    rollout_url: str | None = _option(None, "vLLM server that samples the answers instead of `generate`; needs LoRA.")
    rollout_model: str | None = _option(None, "Name that server has for the student's base; none: the only model it serves.")
    rollout_api_key_env: str | None = _option(
        None, "Environment variable that holds the key of the server of `rollout_url`, if any."
    )
    server_retry_seconds: float = _option(
        120.0,
        "How long a server's failed requests are sent again before a checkpoint is saved and the run ends.",
    )
    process_timeout: float | None = _option(
        None, "How long a process waits for the others, in seconds; none: as torch does, 1800, with NCCL 600."
    )
    # loss
    selector: str = _option(str(DEFAULTS.selector), HELP["selector"])
    fraction: float = _option(DEFAULTS.fraction, HELP["fraction"])
    fraction_end: float | None = _option(None, "`fraction` in the last step; none: the same in every step.")
    count: int | None = _option(DEFAULTS.count, HELP["count"])
    scope: Scope = _option(  # noqa: RUF009  # `_option` is a dataclass field
        cast("Scope", DEFAULTS.scope),
        HELP["scope"],
    )
    weighting: str | None = _option(cast("str | None", DEFAULTS.weighting), HELP["weighting"])
    weight_mean: str | None = _option(DEFAULTS.weight_mean, HELP["weight_mean"])
    weighting_share: float = _option(DEFAULTS.weighting_share, HELP["weighting_share"])
    weighting_share_end: float | None = _option(None, "`weighting_share` in the last step; none: the same in every step.")
    loss_schedule: Literal["linear", "cosine"] = _option(
        "linear", "How `fraction` and `weighting_share` go from their values in the first step to the `_end` in the last."
    )
    divergence: str = _option(str(DEFAULTS.divergence), HELP["divergence"])
    divergence_args: str = _option("", "Parameters of the divergence, like beta=0.3 or top_k=8,alpha=0.5.")
    top_k: int = _option(DEFAULTS.top_k, HELP["top_k"])
    workspace_bytes: int = _option(DEFAULTS.workspace_bytes, HELP["workspace_bytes"])
    # optimisation
    steps: int = _option(100, "Updates of the student.")
    batch_size: int = _option(8, "Prompts in a micro-batch of one process.")
    gradient_accumulation_steps: int = _option(1, "Micro-batches of one process in a step.")
    learning_rate: float = _option(1e-6, "Learning rate of AdamW.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = _option(
        "constant", "How the learning rate changes after the warm-up."
    )
    warmup_steps: int = _option(0, "Steps in which the learning rate rises from 0.")
    weight_decay: float = _option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = _option(1.0, "Larger gradients are scaled down to this norm; 0: never.")
    seed: int = _option(0, "Seed of the prompts' order, of sampling, of dropout and of selectors that draw.")
    # evaluation, logs, checkpoints
    eval_every: int = _option(20, "Steps between evaluations; one before the first and after the last step too.")
    answer_pattern: str = _option(
        "", "Regular expression whose last match (its group, if it has one) is an answer; '': all of it."
    )
    completions: int = _option(4, "Held-out answers in the table of completions.")
    save_every: int = _option(
        0, "Steps between checkpoints, each written once the next gradient is finite; 0: only at the end and on SIGTERM."
    )
    keep_checkpoints: int = _option(2, "Number of latest checkpoints to keep.")
    output_dir: str = _option("out/run", "Folder of log, checkpoints and the trained model.")
    resume: bool = _option(False, "Continue from the newest intact checkpoint in output_dir, if there is one.")
    report_to: str = _option("", "Trackers, like tensorboard,wandb.")
    run_name: str = _option("opd", "The run's folder in TensorBoard, its project in Weights & Biases.")

    @property
    def teacher_sends_lists(self) -> bool:
        """Whether the teacher is a server or a folder, and so no model on this machine."""
        return self.teacher_url is not None or self.teacher_store is not None

    def scheduled(self, step: int) -> dict[str, float]:
        """The options with an `_end`, in a step, 0 ... steps - 1: by options and step alone, so that a resumed run has them."""
        done = step / max(1, self.steps - 1)
        done = done if self.loss_schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
        ends = {"fraction": self.fraction_end, "weighting_share": self.weighting_share_end}
        return {name: (1 - done) * getattr(self, name) + done * end for name, end in ends.items() if end is not None}

    def settings(self, step: int = 0) -> Settings:
        """Settings of the loss in a step."""
        now = self.scheduled(step)
        return Settings(
            selector=self.selector,
            fraction=now.get("fraction", self.fraction),
            count=self.count,
            scope=self.scope,
            weighting=self.weighting,
            weight_mean=self.weight_mean,
            weighting_share=now.get("weighting_share", self.weighting_share),
            divergence=self.resolved_divergence(),
            top_k=self.top_k,
            workspace_bytes=self.workspace_bytes,
        )

    def resolved_divergence(self) -> Divergence:
        """`divergence` with the parameters of `divergence_args`."""
        divergence = resolve_divergence(self.divergence)
        if not self.divergence_args:
            return divergence
        pairs = [part.partition("=") for part in self.divergence_args.split(",")]
        names: list[str] = [f.name for f in dataclasses.fields(divergence)] if dataclasses.is_dataclass(divergence) else []
        try:
            values = {name.strip(): _number(text) for name, _, text in pairs}
            if not set(values) <= set(names):
                raise ValueError
        except ValueError:
            what = f"name=number with names of {', '.join(names)}" if names else f"nothing: {self.divergence} has no parameters"
            raise ValueError(f"divergence_args: got {self.divergence_args!r}, expected {what}") from None
        return dataclasses.replace(divergence, **values)  # type: ignore[type-var]

    def privileged_context(self) -> PrivilegedContext:
        """What the teacher alone reads."""
        return PrivilegedContext(self.teacher_system, self.teacher_prompt)

    def train_source(self) -> PromptSource:
        return PromptSource(self.prompts, self.prompts_split, self.prompts_name)

    def eval_source(self) -> PromptSource | None:
        if self.eval_prompts is None:
            return None
        name = self.prompts_name if self.eval_prompts == self.prompts else None
        split = self.eval_prompts_split or self.prompts_split
        return PromptSource(self.eval_prompts, split, self.eval_prompts_name or name)

    def api_key(self, role: Literal["teacher", "rollout"]) -> str | None:
        """The server's key, from the environment: a key in an option would be written into cards, logs and checkpoints."""
        variable = getattr(self, f"{role}_api_key_env")
        return None if variable is None else os.environ[variable]

    def trackers(self) -> list[str]:
        return [name.strip() for name in self.report_to.split(",") if name.strip()]

    def check(self) -> OPDConfig:
        """Check all options and return `self`. Files must exist; no model is loaded."""
        self._check_kinds()
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, str):
                check_text(value, name)
                if name in PATHS:
                    check_path(value, name)
        for name in ("student", "prompts"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got nothing, expected {OPDConfig.__dataclass_fields__[name].metadata['help']}")
        least = {"steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "max_new_tokens": 1, "workspace_bytes": 1}
        least |= {"eval_every": 1, "keep_checkpoints": 1, "teacher_top_k": 1, "lora_alpha": 1}
        for name in ("eval_size", "warmup_steps", "completions", "save_every", "lora_rank", "seed"):
            least[name] = 0
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected an integer of at least {low}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "temperature", "lora_dropout", "server_retry_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a finite number of at least 0")
        if self.process_timeout is not None and not 0 < self.process_timeout < math.inf:
            raise ValueError(f"process_timeout: got {self.process_timeout}, expected a finite number of seconds > 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected a number in (0, 1]")
        if self.temperature == 0:
            raise ValueError("temperature: got 0, expected a number > 0: on-policy training needs sampled answers")
        for name in ("teacher_url", "teacher_store"):
            if getattr(self, name) is not None and self.teacher != SAME:
                raise ValueError(f"teacher: got {self.teacher!r} and a {name}, expected one of the two")
        self._check_own_weights()
        if not self.output_dir:
            raise ValueError("output_dir: got nothing, expected a folder")
        if not self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected a number in [0, 1)")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: got {self.warmup_steps}, expected at most steps, {self.steps}")
        for name in ("teacher_url", "rollout_url"):
            url = getattr(self, name)
            if url is not None:
                check_address(url, name)
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise ValueError(f"answer_pattern: got {self.answer_pattern!r}, expected a regular expression ({error})") from None
        if self.rollout_url is not None and self.lora_rank == 0:
            raise ValueError("rollout_url: a server learns the student's new weights as LoRA adapters; set lora_rank")
        for name in ("prompts", "eval_prompts"):
            path = getattr(self, name)
            if path is not None and path.endswith((".jsonl", ".json")) and not Path(path).is_file():
                raise ValueError(f"{name}: got {path!r}, expected a file that exists")
        if self.lora_rank > 0 and importlib.util.find_spec("peft") is None:
            raise ValueError(
                f"lora_rank: got {self.lora_rank}, which needs the package peft; pip install 'opd-ops[train]', or set it to 0"
            )
        self._check_sources()
        self._check_servers()
        self._check_trackers()
        self._check_loss()
        return self

    def _check_kinds(self) -> None:
        """The parser of the command line refuses such values itself; from Python any may come."""
        named = {bool: "True or False", int: "an integer", float: "a number", str: "text"}
        for name, hint in get_type_hints(OPDConfig).items():
            take_plain(self, name)
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if get_origin(hint) is Literal:
                if value not in kinds:
                    raise ValueError(f"{name}: got {value!r}, expected one of: {', '.join(map(repr, kinds))}")
            elif type(value) not in kinds and not (type(value) is int and float in kinds):
                raise ValueError(f"{name}: got {value!r}, expected {named[kinds[0]]}")

    def _check_own_weights(self) -> None:
        self.privileged_context()
        own_weights(self.teacher_weights)
        if self.teacher_weights != FROZEN and (self.teacher != SAME or self.teacher_sends_lists):
            raise ValueError(
                f"teacher_weights: got {self.teacher_weights!r}, but the teacher is another than the student; leave it out, or "
                "set teacher to 'same' without a server"
            )
        if self.teacher == SAME and self.teacher_dtype != "auto" and (self.lora_rank > 0 or self.teacher_weights != FROZEN):
            raise ValueError(
                f"teacher_dtype: got {self.teacher_dtype!r}, but this teacher is the student's own model (under LoRA its base)"
            )

    def _check_sources(self) -> None:
        for name in ("split", "name"):
            value = getattr(self, f"eval_prompts_{name}")
            if self.eval_prompts is None and value is not None:
                raise ValueError(
                    f"eval_prompts_{name}: got {value!r} without eval_prompts; set that too, to {self.prompts!r} "
                    "for the same dataset"
                )
        train, held_out = self.train_source(), self.eval_source()
        for option, source in (("prompts_name", train), ("eval_prompts_name", held_out)):
            if source is not None and source.name is not None and Path(source.source).exists():
                raise ValueError(
                    f"{option}: got {source.name!r}, but {source.source} is here and has no configurations; leave it out"
                )
        if held_out is not None and held_out.what() == train.what():
            raise ValueError(
                f"eval_prompts: got {held_out.source!r}, the very prompts that are trained on, expected others; name another "
                "eval_prompts_split, or leave eval_prompts out and the last eval_size prompts are held out"
            )

    def _check_servers(self) -> None:
        if self.teacher_store is not None and self.teacher_url is None and not Path(self.teacher_store).is_dir():
            raise ValueError(
                f"teacher_store: got {self.teacher_store!r}, expected a folder that exists; with teacher_url a run makes and "
                "fills it"
            )
        if self.teacher_digest is not None and self.teacher_store is None:
            raise ValueError(f"teacher_digest: got {self.teacher_digest!r} without a teacher_store, whose shards would have it")
        for role in ("teacher", "rollout"):
            for name in (f"{role}_model", f"{role}_api_key_env", *(["teacher_api"] if role == "teacher" else [])):
                is_set = getattr(self, name) != OPDConfig.__dataclass_fields__[name].default
                if is_set and getattr(self, f"{role}_url") is None:
                    raise ValueError(f"{name}: got one without {role}_url, the server that it is about; set both or none")
            variable = getattr(self, f"{role}_api_key_env")
            if variable is not None and not os.environ.get(variable):
                raise ValueError(
                    f"{role}_api_key_env: got the name of a variable that is not set, expected one that holds the key: export "
                    "NAME=… and pass NAME. What came is not shown, in case it was the key itself"
                )

    def _check_trackers(self) -> None:
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import LoggerType

        trackers = [tracker.value for tracker in LoggerType if tracker.value != "all"]
        unknown = [name for name in self.trackers() if name not in trackers]
        if unknown:
            raise ValueError(f"report_to: got {unknown[0]!r}, expected some of: {', '.join(trackers)}")
        installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
        missing = [name for name in self.trackers() if name not in installed]  # accelerate would ignore them without a warning
        if missing:
            raise ValueError(f"report_to: got {missing[0]!r}, whose package is not installed; pip install it, or leave it out")

    def _check_loss(self) -> None:
        for name, check in (("fraction", check_fraction), ("weighting_share", check_share)):
            if getattr(self, f"{name}_end") is not None:
                for option in (name, f"{name}_end"):
                    check(getattr(self, option), option)
        if self.fraction_end is not None and self.count is not None:
            raise ValueError(
                f"count: got {self.count} and a fraction_end, each of which decides how many tokens; pass one of them"
            )
        if self.weighting_share_end is not None and self.weighting is None:
            raise ValueError("weighting_share_end: got a share of no weighting; pass a weighting")
        if not self.scheduled(0) and self.loss_schedule != OPDConfig.__dataclass_fields__["loss_schedule"].default:
            raise ValueError(
                f"loss_schedule: got {self.loss_schedule!r} without fraction_end or weighting_share_end; set one of them too"
            )
        self.settings().for_host(passes_tokens=True, teacher="TopKLogprobs" if self.teacher_sends_lists else None)


def read_config(arguments: Sequence[str] | None = None) -> OPDConfig:
    """The configuration from the flags and the YAML file that they name. An error ends the program with its message."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        OPDConfig, prog="opd-train", description="On-policy distillation on the tokens that are worth it.", allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, help="YAML file of options; flags win over it.")
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    parsed, flags = config_parser.parse_known_args(arguments)
    try:
        from_file = [] if parsed.config is None else read_yaml(parsed.config)
        config, _, unread = parser.parse_args_into_dataclasses(
            [*from_file, *flags], return_remaining_strings=True, look_for_args_file=False
        )
        if unread:
            raise ValueError(_unread(unread[0]))
        config.check()
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    checked: OPDConfig = config
    return checked


def _unread(word: str) -> str:
    """The error about a word of the command line that is no flag of an option and no flag's value."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"got {shown(word)}, expected flags: --name value"
    return f"got {shown(name)}, {_unknown(name.lstrip('-').replace('-', '_'), '--')}"


def _unknown(name: str, prefix: str = "") -> str:
    nearest = did_you_mean(name, [x.name for x in dataclasses.fields(OPDConfig)], prefix)
    return f"an unknown option{nearest or '; opd-train --help lists all'}"


refuse_unknown_names(OPDConfig, lambda name: f"OPDConfig: got {name!r}, {_unknown(name)}")


def read_yaml(path: Path) -> list[str]:
    """The file's options as flags, so that one parser reads and checks both.

    Raises: ValueError: no such file, no mapping, an unknown option, or an option twice; names the file and the line.
    """
    import yaml

    check_path(str(path), "config")
    if not path.is_file():
        raise ValueError(f"config: got {str(path)!r}, expected a YAML file that exists")
    text = read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ValueError(f"config: {path}:{_line(error, text)} is no YAML: {_reason(error)}") from None
    except RecursionError:
        raise ValueError(f"config: {path}:{loader.line + 1} is nested too deeply, expected lines `name: value`") from None
    names = [f.name for f in dataclasses.fields(OPDConfig)]
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        kind = type(loader.construct_document(root)).__name__
        raise ValueError(f"config: {path} has {kind}, expected lines `name: value`")
    flags: dict[str, str] = {}
    lines: dict[str, int] = {}
    for key, value in root.value:
        name, line = key.value if isinstance(key, yaml.ScalarNode) else key.id, key.start_mark.line + 1
        where = f"config: {path}:{line}"
        if name not in names:
            key_text = name if name.isidentifier() else repr(name[:40])
            raise ValueError(f"{where} has {key_text}, {_unknown(name)}")
        if name in lines:
            raise ValueError(f"{where} has {name} again, which line {lines[name]} has already; keep one of them")
        lines[name] = line
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{where}: {name}: got a {value.id}, expected one value")
        check_text(value.value, f"{where}: {name}")
        if value.tag != "tag:yaml.org,2002:null":
            # The text as it stands: YAML reads 1.10 as 1.1, 2024_10_01 and 12:30:45 as other numbers, `no` as false. As one
            # word, so that a value that begins with a minus is no flag.
            flags[name] = f"--{name}={value.value}"
    return list(flags.values())


def _line(error: yaml.YAMLError, text: str) -> int:
    """The line of the parser's error, from its mark; an error about a forbidden character has a position instead."""
    mark = getattr(error, "problem_mark", None)
    return 1 + (text.count("\n", 0, getattr(error, "position", 0)) if mark is None else int(mark.line))


def _reason(error: yaml.YAMLError) -> str:
    """The parser's error in one line, without its excerpt of the file."""
    return str(getattr(error, "problem", None) or str(error).partition("\n")[0])


def _number(text: str) -> float | int:
    return int(text) if text.strip().lstrip("-").isdigit() else float(text)
