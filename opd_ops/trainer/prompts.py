"""Prompts: read from JSONL or a `datasets` dataset, and turned into conversations for the student and the teacher.

  a row:  {"prompt": "text"} or {"messages": [{"role": ..., "content": ...}, ...]}, and optionally
          "answer": the expected answer;  "demonstration": an answer that shows how, for a template to quote
          "teacher_system", "teacher_prompt": a system message, a template of the last message, that only the teacher reads

Not here: tokens (rollouts.py), the prompts of a step (order.py), what templates are filled with (privileged.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from opd_ops.trainer.files import check_text, read_text

Conversation = list[dict[str, str]]  # [{"role": ..., "content": ...}, ...]
TOLD = ("teacher_system", "demonstration", "teacher_prompt")  # texts that only the teacher reads


@dataclass(frozen=True)
class Prompt:
    """A conversation that the student continues."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    answer: str | None = None  # the expected answer
    teacher_system: str | None = None  # a system message that only the teacher reads
    demonstration: str | None = None  # text that a template of the teacher may quote
    teacher_prompt: str | None = None  # a template of the last message that only the teacher reads

    @classmethod
    def of(cls, text: str, **options: str | None) -> Prompt:
        """A prompt of one user message."""
        return cls((("user", text),), **options)

    @property
    def text(self) -> str:
        """The last message, used as a title."""
        return self.messages[-1][1]

    def conversation(self, system: str | None = None) -> Conversation:
        """The messages; with `system`, that system message replaces their own."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        if system is None:
            return messages
        return [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]


@dataclass(frozen=True)
class PromptSource:
    """The place of prompts: the arguments of `load_prompts`."""

    source: str
    split: str = "train"
    name: str | None = None

    def what(self) -> tuple[str | None, ...]:
        """A key, equal for sources that hold the same prompts. A file, and a folder without splits, has only one part."""
        path = Path(self.source)
        if not path.exists():
            return self.source, self.name, self.split
        return str(path.resolve()), None, self.split if (path / "dataset_dict.json").is_file() else None


def load_prompts(source: str | Path, split: str = "train", name: str | None = None) -> list[Prompt]:
    """The prompts of a JSONL file, a folder that `datasets` saved, or a dataset it can load by its name.

    Args:
        split: The split of a dataset.
        name: The configuration of a dataset that is loaded by its name and has several.

    Raises: ValueError: an invalid row, with its place and the expected form; no row at all; a file that is not UTF-8.
    """
    path = Path(source)
    if path.is_file():
        lines = read_text(path).split("\n")  # `splitlines` would also split at Unicode's other line separators
        places = [(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
        prompts = [parse_prompt(_json(line, place), f"{place}: row {i}") for i, (place, line) in enumerate(places, start=1)]
    else:
        rows = _dataset(str(source), split, name)
        prompts = [parse_prompt(row, f"{source}: row {i}") for i, row in enumerate(rows, start=1)]
    if not prompts:
        raise ValueError(f"prompts: got no row in {source}, expected at least one")
    return prompts


def digest_of(prompts: Sequence[Prompt]) -> str:
    """A digest of all fields of the prompts, the same on every machine."""
    return hashlib.sha256(json.dumps([astuple(prompt) for prompt in prompts]).encode()).hexdigest()


def held_out(prompts: list[Prompt], size: int) -> tuple[list[Prompt], list[Prompt]]:
    """All prompts but the last `size` for training, and the last `size` for evaluation.

    Raises: ValueError: no prompt would be left for training.
    """
    if size >= len(prompts):
        raise ValueError(f"eval_size: got {size} of {len(prompts)} prompts, expected fewer, so that some are left to train on")
    return prompts[: len(prompts) - size], prompts[len(prompts) - size :]


def parse_prompt(row: object, where: str) -> Prompt:
    """The prompt of one row; an error begins with `where`."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: got {type(row).__name__}, expected an object with 'prompt' or 'messages'")
    content = row.get("messages") or row.get("prompt")
    messages = [{"role": "user", "content": content}] if isinstance(content, str) and content else content
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise ValueError(
            f"{where}: got {sorted(row)}, expected 'prompt' (text) or 'messages' (objects with 'role' and 'content')"
        )
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: ends with an answer of the assistant, expected a prompt; leave the answer out")
    answer, told = row.get("answer"), {name: row.get(name) for name in TOLD}
    for name, value in told.items():
        if not isinstance(value, (str, type(None))):
            raise ValueError(f"{where}: got {name} {value!r}, expected text")
    prompt = Prompt(tuple((m["role"], m["content"]) for m in messages), None if answer is None else str(answer), **told)
    for text in (*(part for message in prompt.messages for part in message), prompt.answer, *told.values()):
        if text is not None:
            check_text(text, where)
    return prompt


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _json(line: str, where: str) -> object:
    try:
        row: object = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: got {line[:40]!r}, expected a line of JSON ({error})") from None
    return row


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:  # json would use the last one without a warning
            raise ValueError(f"the name {name!r} stands twice")
    return dict(pairs)


def _dataset(source: str, split: str, name: str | None) -> Iterable[object]:
    import datasets  # takes seconds to import, and belongs to an extra

    rows: Iterable[object]
    if not Path(source).is_dir():
        rows = datasets.load_dataset(source, name=name, split=split)
        return rows
    saved = datasets.load_from_disk(source)
    if isinstance(saved, datasets.DatasetDict) and split not in saved:
        raise ValueError(f"prompts: {source} has no split {split!r}, expected one of: {', '.join(map(str, saved))}")
    rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    return rows
