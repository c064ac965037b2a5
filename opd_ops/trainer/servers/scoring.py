"""The client code that all servers of a teacher share: it asks for scores of the teacher's top-K tokens, or of given ids.

  score(contexts, answers)           log q of the teacher's K likeliest tokens and of the answer's own token
  score_ids(contexts, answers, ids)  log q of K given ids a position, like the student's K likeliest tokens

Log-probabilities are at temperature 1, whatever the sampling temperature: the loss refuses others (opd_ops/inputs/pair.py).
Not here: HTTP (client.py), the requests and answers of vLLM (teacher.py) and SGLang (sglang.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import plain
from opd_ops.inputs.teacher_lists import MISSING_LOGPROB, TopKLogprobs
from opd_ops.trainer.servers.client import ServedModel, ServerClient
from opd_ops.trainer.servers.retries import RETRY_SECONDS, ServerError

LARGEST_VOCABULARY = 2**24
MOST_LOGPROB = 1e-3  # 0, and the error of a sum in 16 bits; as TopKLogprobs
MOST_MASS = 1.01  # 1, and the errors of a sum of numbers in 16 bits

Pairs = list[tuple[int, float]]  # (token id, log-probability)


class Question(NamedTuple):
    """An answer after its context, and the given ids at each of its tokens."""

    context: list[int]
    answer: list[int]
    ids: list[list[int]]  # -1: no id; [] if the teacher's own tokens are asked for

    @property
    def tokens(self) -> list[int]:
        return self.context + self.answer


class TeacherServer(ABC):
    """A teacher behind a server, in the terms that all servers share.

    The contexts are the teacher's own: they may have an instruction that the student never sees, or another chat template.

    Args:
        url: The server's address, with or without `/v1`.
        model: The server's name for the teacher; None: its only model that is no adapter.
        top_k: K of `score`, >= 1.
        timeout: Longest time without data from the server, in seconds.
        retry_seconds: How long a failed request is sent again, in seconds; 0: never.
        concurrency: Number of requests at the same time.
        api_key: Sent as a bearer token, if the server needs one.
    Raises: ValueError: an argument out of range.
    """

    not_normalised: str  # what to do about a server that sends other numbers than log-probabilities

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        top_k: int = 16,
        timeout: float = 120.0,
        retry_seconds: float = RETRY_SECONDS,
        concurrency: int = 16,
        api_key: str | None = None,
    ) -> None:
        entries = plain(top_k)
        if isinstance(entries, bool) or not isinstance(entries, int) or entries < 1:
            raise ValueError(f"top_k: got {entries!r}, expected an integer of at least 1")
        self.client = ServerClient(
            url, role="teacher", timeout=timeout, retry_seconds=retry_seconds, concurrency=concurrency, api_key=api_key
        )
        self.model, self.top_k = model, entries
        self._chosen: ServedModel | None = None

    def check(self) -> None:
        """Ask the server for its models and for the log-probabilities of one token, before a run begins.

        Raises: ServerError: the server cannot be reached, does not have the model, or sends no log-probabilities; says what to
            do.
        """
        self._chosen = None
        logprobs = self.score([[0]], [[0]]).logprobs
        mass = logprobs.exp().sum().item()
        # The K likeliest of V tokens have a mass of K / V at least; fewer are listed only if the others have none.
        least = int(logprobs.isfinite().sum()) / LARGEST_VOCABULARY
        if not mass > least:
            raise ServerError(
                f"{self.client.url}: its {self.top_k} log-probabilities of one position hold a mass of {mass:.4g}, expected "
                f"more than {least:.2g}; {self.not_normalised}"
            )

    def check_length(self, n_context: int, n_answer: int) -> None:
        """Check that the server's model can read so many tokens and write one.

        Raises: ServerError: it cannot.
        """
        what = f"context ({n_context}) + answer ({n_answer}) + 1"
        self.client.check_length(self.served(), n_context + n_answer + 1, what)

    def score(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> TopKLogprobs:
        """The teacher's log-probabilities after it has read `contexts[b]` and `answers[b][:i]`.

        Args:
            contexts: B lists of token ids, none of them empty.
            answers: B lists of token ids, of any lengths.
        Returns: (B, L, K + 1) ids and fp32 log-probabilities in nats on the CPU; L: length of the longest answer. Row i
            predicts answer token i, and lists that token too. Empty places have id -1 and log-probability -inf.
        Raises:
            ValueError: an answer without a context.
            ServerError: as `check`, or the server's answer does not fit the request.
        """
        questions = self._questions(contexts, answers, None)
        shape = len(answers), max(map(len, answers), default=0), self.top_k + 1
        ids, logprobs = torch.full(shape, -1), torch.full(shape, -torch.inf)
        for b, rows in zip(questions, self._top(self.served().name, list(questions.values())), strict=True):
            padded = [self._padded(pairs) for pairs in rows]
            ids[b, : len(rows)] = torch.tensor([[token for token, _ in pairs] for pairs in padded])
            logprobs[b, : len(rows)] = torch.tensor([[logprob for _, logprob in pairs] for pairs in padded])
        return TopKLogprobs(ids, logprobs)

    def score_ids(self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], ids: Tensor) -> TopKLogprobs:
        """The teacher's log-probabilities of given ids, for losses on the student's top-K.

        Args:
            contexts: As in `score`.
            answers: As in `score`.
            ids: (B, L, K) integers, L at least the length of the longest answer. Row i has the ids to score in the place of
                answer token i; -1: no id.
        Returns: The ids, -1 after the end of an answer, and (B, L, K) log-probabilities; -inf where the id is -1.
        Raises:
            ValueError, ServerError: as `score`; ServerError: the server cannot score given ids.
        """
        longest = max(map(len, answers), default=0)
        if (
            ids.dim() != 3
            or ids.shape[0] != len(answers)
            or ids.shape[1] < longest
            or ids.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(f"ids: got {tuple(ids.shape)} {ids.dtype}, expected int64 ({len(answers)}, {longest} or more, K)")
        questions = self._questions(contexts, answers, ids)
        lengths = torch.tensor([len(answer) for answer in answers]).unsqueeze(1)
        given = ids.cpu().masked_fill((torch.arange(ids.shape[1]) >= lengths).unsqueeze(2), -1)
        logprobs = torch.full(ids.shape, -torch.inf)
        for b, rows in zip(questions, self._given(self.served().name, list(questions.values())), strict=True):
            logprobs[b, : len(rows)] = rows
        return TopKLogprobs(given, logprobs.masked_fill((given < 0) | (logprobs <= MISSING_LOGPROB), -torch.inf))

    @abstractmethod
    def _top(self, model: str, questions: Sequence[Question]) -> list[list[Pairs]]:
        """For each question, for each token of its answer, at most K + 1 pairs, each id once, the token among them."""

    @abstractmethod
    def _given(self, model: str, questions: Sequence[Question]) -> list[Tensor]:
        """For each question, the (length of the answer, K) log-probabilities of its ids; any number where the id is -1."""

    def served(self) -> ServedModel:
        """The model that is asked. Raises: ServerError: the server does not have it."""
        if self._chosen is None:
            self._chosen = self.client.choose(self.model)
            self.model = self._chosen.name
        return self._chosen

    def identity(self) -> str:
        """The served model's name, which stands for its weights."""
        return self.served().name

    def _questions(
        self, contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], ids: Tensor | None
    ) -> dict[int, Question]:
        """The questions about answers that are not empty, by their rows in the batch."""
        check_questions(contexts, answers)
        questions = {}
        for b, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
            if len(answer):
                self.check_length(len(context), len(answer))
                given = [] if ids is None else ids[b, : len(answer)].tolist()
                questions[b] = Question([int(token) for token in context], [int(token) for token in answer], given)
        return questions

    def _padded(self, pairs: Pairs) -> Pairs:
        """K + 1 pairs; empty places and entries of probability 0 have id -1."""
        listed = [pair if pair[1] > MISSING_LOGPROB else (-1, -math.inf) for pair in pairs]
        return listed + [(-1, -math.inf)] * (self.top_k + 1 - len(listed))

    def _check_pairs(self, where: str, pairs: Pairs, token: int) -> None:
        """Check one position's pairs; an error begins with `where`."""
        listed = dict(pairs)
        is_odd = len(listed) < len(pairs) or any(map(math.isnan, listed.values()))
        is_odd |= not all(0 <= id_ < LARGEST_VOCABULARY for id_ in listed)
        if len(pairs) > self.top_k + 1 or token not in listed or is_odd:
            raise ServerError(
                f"{where} lists {len(pairs)} tokens, {sorted(token for token, _ in pairs)[:8]} …, expected the top "
                f"{self.top_k} and token {token} of the prompt, each once and with a number"
            )
        self._check_logprobs(where, listed.values())
        mass = sum(map(math.exp, listed.values()))
        if mass > MOST_MASS:
            raise ServerError(f"{where} holds a mass of {mass:.4g}, expected at most 1; {self.not_normalised}")

    def _check_logprobs(self, where: str, logprobs: Iterable[float]) -> None:
        largest = max(logprobs, default=0.0)
        if largest > MOST_LOGPROB:
            raise ServerError(
                f"{where} has {largest:.4g}, expected log-probabilities, at most 0, not logits; {self.not_normalised}"
            )


def check_questions(contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
    """Check that each answer has a context, and that no context is empty.

    Raises: ValueError: otherwise.
    """
    if len(contexts) != len(answers):
        raise ValueError(f"answers: got {len(answers)}, expected one for each of the {len(contexts)} contexts")
    empty = [i for i, context in enumerate(contexts) if not len(context)]
    if empty:
        raise ValueError(f"contexts: number {empty[0]} is empty, expected a token at least; the first predicts nothing else")
