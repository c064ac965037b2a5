"""A teacher on disk: a folder of shards with a teacher's log-probabilities of answers, and the teacher that fills it.

  StoredTeacher(folder)            reads; needs no server
  StoringTeacher(server, folder)   asks the server only for answers that the folder lacks, and adds them

Both have `score(contexts, answers)` of a server's client (servers/scoring.py), with the same numbers to the bit: the
server's fp32 numbers are stored. All shards of a folder have one teacher, one tokenizer and one K. Each process writes shards
under names of its own, so several may fill one folder; it sees the shards of others that were there when it opened the folder.
Scores of given ids (`score_ids`) are not stored.
Not here: the file (stored_shard.py), the servers (servers/).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_ops.inputs.teacher_lists import TopKLogprobs
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.scoring import TeacherServer, check_questions
from opd_ops.trainer.stored_shard import SUFFIX, Origin, Shard, StoredAnswer, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_BYTES = 2 << 20  # of ids and log-probabilities; a shard that has more is not added to


class StoreError(ServerError):
    """A folder lacks an answer, or cannot be written. It ends all processes of a run, as a server's error does."""

    resume_when = "once that is mended"


class StoredTeacher:
    """The answers in a folder, by number and by (context, answer). Opening it reads every shard once, to check its SHA-256.

    Args:
        folder: Holds the shards, `*.safetensors`; other files do not count, such as a killed run's `*.partial`.
        teacher: The teacher's name or digest that the shards must have; None: that of the first shard.
        tokenizer: The tokenizer's name or digest; None: likewise.
        top_k: K of the lists; None: likewise.
    Raises: ValueError: no shard (unless all three are given), or one that is truncated, altered or foreign; names it.
    """

    def __init__(
        self, folder: str | Path, *, teacher: str | None = None, tokenizer: str | None = None, top_k: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self._shards: dict[Path, Shard] = {}
        self._places: list[tuple[Path, int]] = []  # of each answer: its shard, and its number there
        self._numbers: dict[bytes, int] = {}
        shards = [Shard(path) for path in sorted(self.folder.glob(f"*{SUFFIX}"))]
        expected = (teacher, tokenizer, top_k)
        if not shards and None in expected:
            raise ValueError(
                f"{self.folder}: has no shard (*{SUFFIX}), expected a folder that a run with teacher_url and teacher_store "
                "has filled"
            )
        given = zip(expected, shards[0].origin if shards else expected, strict=True)
        self.origin = Origin(*(first if value is None else value for value, first in given))  # type: ignore[arg-type]
        for shard in shards:
            self.add(shard)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> StoredAnswer:
        path, row = self._places[number]
        return self._shards[path][row]

    def find(self, context: Sequence[int], answer: Sequence[int]) -> StoredAnswer | None:
        """The stored answer with these tokens, if the folder has it."""
        number = self._numbers.get(_key(context, answer))
        if number is None:
            return None
        stored = self[number]
        if stored.context != list(context) or stored.answer != list(answer):
            raise ValueError(f"{self._places[number][0]}: has other tokens than when it was opened; open the folder again")
        return stored

    def score(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> TopKLogprobs:
        """As `TeacherServer.score`.

        Raises: ValueError: an answer without a context. StoreError: the folder lacks an answer.
        """
        check_questions(contexts, answers)
        shape = len(answers), max(map(len, answers), default=0), self.origin.top_k + 1
        ids, logprobs = torch.full(shape, -1), torch.full(shape, -torch.inf)
        missing = []
        for b, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
            stored = self.find(context, answer) if len(answer) else None
            if stored is not None:
                ids[b, : len(answer)], logprobs[b, : len(answer)] = stored.ids, stored.logprobs
            elif len(answer):
                missing.append(b)
        if missing:
            context, answer = contexts[missing[0]], answers[missing[0]]
            raise StoreError(
                f"{self.folder}: lacks {len(missing)} of {len(answers)} answers, the first has the tokens {list(answer)[:8]} … "
                f"after a context of {len(context)} tokens, {list(context)[:8]} …; a run with the same options and with "
                "teacher_url (in another output_dir) adds them"
            )
        return TopKLogprobs(ids, logprobs)

    def identity(self) -> str:
        """The teacher's name or digest that the shards have."""
        return self.origin.teacher

    def add(self, shard: Shard) -> None:
        """Add a shard, or replace the one of its path, which has the same first answers. An answer that is there already stays.

        Raises: ValueError: it is of another teacher, tokenizer or K.
        """
        for name, value, expected in zip(Origin._fields, shard.origin, self.origin, strict=True):
            if value != expected:
                raise ValueError(
                    f"{shard.path}: has {name} {value!r}, expected {expected!r}; use one folder for each teacher, tokenizer "
                    f"and K{' (opd-train: teacher_top_k)' if name == 'top_k' else ''}"
                )
        first = len(self._shards[shard.path]) if shard.path in self._shards else 0
        self._shards[shard.path] = shard
        for row in range(first, len(shard)):
            if self._numbers.setdefault(_key(*shard.tokens(row)), len(self._places)) == len(self._places):
                self._places.append((shard.path, row))


class StoringTeacher:
    """A server whose log-probabilities are kept: what the folder has is not asked again, also not by the next run.

    Each call of `score` writes its new answers before it returns, into a shard of this object that grows to SHARD_BYTES.

    Args:
        server: Asked for its model's name here.
        folder: Made if there is none.
        tokenizer: A digest of the tokenizer that wrote the contexts, `vocabulary_digest`.
        teacher: A digest of the model; None: the server's name for it.
    Raises: ValueError: as `StoredTeacher`. ServerError: the server does not have the model.
    """

    def __init__(self, server: TeacherServer, folder: str | Path, *, tokenizer: str, teacher: str | None = None) -> None:
        self.server = server
        Path(folder).mkdir(parents=True, exist_ok=True)
        teacher = server.served().name if teacher is None else teacher
        self.stored = StoredTeacher(folder, teacher=teacher, tokenizer=tokenizer, top_k=server.top_k)
        self._name, self._n_full = secrets.token_hex(8), 0
        self._growing: list[StoredAnswer] = []  # the answers of the shard that is not full yet

    def score(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> TopKLogprobs:
        """As `TeacherServer.score`. Raises: StoreError: the folder cannot be written."""
        check_questions(contexts, answers)
        pairs = [(tuple(context), tuple(answer)) for context, answer in zip(contexts, answers, strict=True) if len(answer)]
        lacking = [pair for pair in dict.fromkeys(pairs) if self.stored.find(*pair) is None]  # each once, in their order
        if lacking:
            self._keep(lacking)
        return self.stored.score(contexts, answers)

    def identity(self) -> str:
        """As `StoredTeacher.identity`."""
        return self.stored.identity()

    def _keep(self, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Ask for these answers and write them."""
        contexts, answers = ([list(tokens) for tokens in column] for column in zip(*questions, strict=True))
        lists = self.server.score(contexts, answers)
        for b, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
            self._growing.append(StoredAnswer(context, answer, lists.ids[b, : len(answer)], lists.logprobs[b, : len(answer)]))
        path = self.stored.folder / f"{self._name}-{self._n_full:06}{SUFFIX}"
        try:
            write_shard(path, self.stored.origin, self._growing)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written ({error.strerror}); free some room, or check the folder") from error
        self.stored.add(Shard(path))
        if sum(8 * answer.ids.numel() for answer in self._growing) > SHARD_BYTES:
            self._growing, self._n_full = [], self._n_full + 1


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the ids' tokens, the same on every machine."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _key(context: Sequence[int], answer: Sequence[int]) -> bytes:
    tokens = array("q", [len(context), *context, *answer])
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
