"""A shard of a stored teacher: one safetensors file with answers, and with the teacher's log-probabilities at their tokens.

  context_tokens (sum of lengths)   int32     context_ends (n) int64: context i has the tokens context_ends[i-1] ... [i]
  answer_tokens  (N)                int32     answer_ends  (n) int64: alike
  ids, logprobs  (N, K + 1)         int32, fp32, as `TeacherServer.score` returns them: row j predicts answer_tokens[j]
  header                            format, teacher, tokenizer, top_k, and sha256 of these and of all tensors

A shard is written under another name and renamed, so that a killed run leaves no half shard. It is read memory-mapped.
Not here: which shards a folder has, and which answer is where (stored_teacher.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.trainer.files import write_whole

FORMAT = "opd_ops stored teacher, version 1"
SUFFIX = ".safetensors"
NAMES = ("answer_ends", "answer_tokens", "context_ends", "context_tokens", "ids", "logprobs")
REMEDY = "put the file back as it was, or remove it: a run with teacher_url and teacher_store asks for its answers again"


class Origin(NamedTuple):
    """The teacher, the tokenizer and the K of log-probabilities."""

    teacher: str  # a server's name for its model, or a digest of the weights
    tokenizer: str  # a digest of the vocabulary
    top_k: int


class StoredAnswer(NamedTuple):
    """An answer of L tokens after its context, and the teacher's log-probabilities at each of them."""

    context: list[int]
    answer: list[int]
    ids: Tensor  # (L, K + 1) int64; -1: an empty place
    logprobs: Tensor  # (L, K + 1) fp32; -inf in an empty place


class Shard:
    """An intact shard.

    Raises: ValueError: the file is truncated, altered, or no shard; names the file and what to do.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                header: Mapping[str, str] = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(
                        f"{path}: its header has format {header.get('format')!r}, expected {FORMAT!r}; move the file out of "
                        "the folder of the stored teacher"
                    )
                self._tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in NAMES}
                self.origin = Origin(header["teacher"], header["tokenizer"], _integer(header["top_k"]))
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as a whole shard ({error}), maybe it was truncated; {REMEDY}") from None
        if _sha256(self.origin, self._tensors) != header.get("sha256"):
            raise ValueError(f"{path}: is not what was written, its SHA-256 differs from the one in its header; {REMEDY}")

    def __len__(self) -> int:
        return len(self._tensors["answer_ends"])

    def __getitem__(self, number: int) -> StoredAnswer:
        rows = self._part("answer", number)
        # Copies, because the caller may write.
        return StoredAnswer(*self.tokens(number), self._tensors["ids"][rows].long(), self._tensors["logprobs"][rows].clone())

    def tokens(self, number: int) -> tuple[list[int], list[int]]:
        """The tokens of a context and of its answer."""
        context, answer = (self._tensors[f"{what}_tokens"][self._part(what, number)] for what in ("context", "answer"))
        return context.tolist(), answer.tolist()

    def _part(self, what: str, number: int) -> slice:
        ends = self._tensors[f"{what}_ends"]
        return slice(int(ends[number - 1]) if number else 0, int(ends[number]))


def write_shard(path: Path, origin: Origin, answers: Sequence[StoredAnswer]) -> None:
    """Write a shard of at least one answer, or replace one, whole or not at all. Ids are less than 2^31."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {
        "ids": torch.cat([answer.ids for answer in answers]).int(),
        "logprobs": torch.cat([answer.logprobs for answer in answers]).float(),
    }
    for what, rows in (("context", [x.context for x in answers]), ("answer", [x.answer for x in answers])):
        tensors[f"{what}_tokens"] = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        tensors[f"{what}_ends"] = torch.tensor([len(row) for row in rows]).cumsum(0)
    header = {"format": FORMAT, "teacher": origin.teacher, "tokenizer": origin.tokenizer, "top_k": str(origin.top_k)}
    write_whole(path, save(tensors, header | {"sha256": _sha256(origin, tensors)}))


def _integer(text: str) -> int:
    return int(text) if text.isdecimal() else -1  # no K: the SHA-256 will not agree


def _sha256(origin: Origin, tensors: Mapping[str, Tensor]) -> str:
    layout = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in NAMES]
    digest = hashlib.sha256(json.dumps([FORMAT, origin, layout]).encode())
    for name in NAMES:
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
