"""A teacher on an OpenAI-compatible server: its top-K log-probabilities at every token of the student's answers.

  vLLM's extension of POST /v1/completions: with "prompt_logprobs": K the answer has, for every token of the prompt but the
  first, {token id: {"logprob": log q, ...}}: the K likeliest tokens, and the prompt's own token if it is not one of them
  (vllm/entrypoints/openai/completion/protocol.py). There -9999 means -inf (opd_ops/inputs/teacher_lists.py).

Log-probabilities are at temperature 1, whatever the sampling temperature: the loss refuses others (opd_ops/inputs/pair.py).
SGLang's own format is different, and not supported.
Not here: HTTP (client.py), a server to try it with (examples/serve_teacher.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from opd_ops.arguments import plain
from opd_ops.inputs.teacher_lists import MISSING_LOGPROB, TopKLogprobs
from opd_ops.trainer.servers.client import WHOLE_DISTRIBUTION, ServedModel, ServerClient
from opd_ops.trainer.servers.retries import RETRY_SECONDS, ServerError

SERVE = "serve the teacher with vLLM: vllm serve MODEL --max-logprobs {k}"
NORMALISED = "start the server with --logprobs-mode raw_logprobs"
LARGEST_VOCABULARY = 2**24
MOST_LOGPROB = 1e-3  # 0, and the error of a sum in 16 bits; as TopKLogprobs


class ServedTeacher:
    """`ServedTeacher("http://teacher:8000").score(contexts, answers)` is a teacher that `selective_opd_loss` takes.

    The contexts are the teacher's own: they may have an instruction that the student never sees, or another chat template.

    Args:
        url: The server's address, with or without `/v1`.
        model: The server's name for the teacher; None: its only model that is no adapter.
        top_k: K, >= 1. vLLM allows 20 unless it was started with --max-logprobs.
        timeout, retry_seconds, concurrency, api_key: As in `ServerClient`.
    Raises: ValueError: an argument out of range.
    """

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
        if not least < mass <= 1 + 1e-3:
            raise ServerError(
                f"{self.client.url}: its {self.top_k} log-probabilities of one position hold a mass of {mass:.4g}, expected "
                f"one in (0, 1]; {NORMALISED}"
            )

    def check_length(self, n_context: int, n_answer: int) -> None:
        """Check that the server's model can read so many tokens and, as its API asks, write one.

        Raises: ServerError: it cannot.
        """
        what = f"context ({n_context}) + answer ({n_answer}) + 1"
        self.client.check_length(self._served(), n_context + n_answer + 1, what)

    def _served(self) -> ServedModel:
        if self._chosen is None:
            self._chosen = self.client.choose(self.model)
            self.model = self._chosen.name
        return self._chosen

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
        if len(contexts) != len(answers):
            raise ValueError(f"answers: got {len(answers)}, expected one for each of the {len(contexts)} contexts")
        prompts = [[*map(int, context), *map(int, answer)] for context, answer in zip(contexts, answers, strict=True)]
        empty = [i for i, context in enumerate(contexts) if not len(context)]
        if empty:
            raise ValueError(
                f"contexts: number {empty[0]} is empty, expected a token at least; the first predicts nothing else"
            )
        asked = [i for i, answer in enumerate(answers) if len(answer)]
        served = self._served()
        for i in asked:
            self.check_length(len(contexts[i]), len(answers[i]))
        body = {"model": served.name, **WHOLE_DISTRIBUTION, "max_tokens": 1, "prompt_logprobs": self.top_k}
        choices = self.client.complete([{**body, "prompt": prompts[i]} for i in asked])

        shape = len(answers), max(map(len, answers), default=0), self.top_k + 1
        ids, logprobs = torch.full(shape, -1), torch.full(shape, -torch.inf)
        for i, choice in zip(asked, choices, strict=True):
            rows = self._rows(choice, prompts[i], len(contexts[i]))
            n = len(rows)
            ids[i, :n] = torch.tensor([[token for token, _ in row] for row in rows])
            logprobs[i, :n] = torch.tensor([[logprob for _, logprob in row] for row in rows])
        return TopKLogprobs(ids, logprobs)

    def _rows(self, choice: Mapping[str, object], prompt: list[int], n_context: int) -> list[list[tuple[int, float]]]:
        """K + 1 pairs (id, log-probability) for each token of the answer."""
        where, entries = f"{self.client.url}/v1/completions", choice.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise ServerError(f"{where}: answered without prompt_logprobs; {SERVE.format(k=self.top_k)}")
        if len(entries) != len(prompt):
            raise ServerError(f"{where}: answered {len(entries)} prompt_logprobs for {len(prompt)} tokens, expected one each")
        rows = []
        for position in range(n_context, len(prompt)):
            try:
                pairs = [(int(token), float(entry["logprob"])) for token, entry in entries[position].items()]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ServerError(
                    f"{where}: prompt_logprobs[{position}] is {str(entries[position])[:200]}, expected "
                    '{token id: {"logprob": number}}'
                ) from error
            listed = dict(pairs)
            if len(pairs) > self.top_k + 1 or prompt[position] not in listed or any(map(math.isnan, listed.values())):
                raise ServerError(
                    f"{where}: prompt_logprobs[{position}] lists {len(pairs)} tokens, {sorted(listed)[:8]} …, expected the top "
                    f"{self.top_k} and token {prompt[position]} of the prompt, each with a number"
                )
            largest = max(listed.values())
            if largest > MOST_LOGPROB:
                raise ServerError(
                    f"{where}: prompt_logprobs[{position}] has {largest:.4g}, expected log-probabilities, at most 0, not "
                    f"logits; {NORMALISED}"
                )
            pairs = [(token, logprob) if logprob > MISSING_LOGPROB else (-1, -math.inf) for token, logprob in pairs]
            rows.append(pairs + [(-1, -math.inf)] * (self.top_k + 1 - len(pairs)))
        return rows
