"""A teacher on a vLLM server: log-probabilities of its own top-K tokens, or of given ids.

  own tokens   vLLM's extension of POST /v1/completions: with "prompt_logprobs": K the answer has, for every token of the prompt
               but the first, {token id: {"logprob": log q, ...}}: the K likeliest tokens, and the prompt's own token if it is
               not one of them (vllm/entrypoints/openai/completion/protocol.py). There -9999 means -inf.
  given ids    POST /inference/v1/generate with "prompt_logprob_token_ids" [rows, K] and "prompt_logprob_start", the number of
               the context's tokens - 1: the answer has "prompt_token_id_logprobs", an fp32 matrix as base64 of a .npy file,
               whose row i scores answer token i (vLLM's docs/training/prompt_token_id_logprobs.md, pull request 56984 and
               later, like 0.32.0). Needs --enable-scale-out and the V2 model runner, and that Triton, on CPUs too. Tested
               with recorded answers of this shape; of vLLM itself, with its refusals where these are missing.

Not here: what all servers share (scoring.py), SGLang (sglang.py), a server to try it with (examples/serve_teacher.py).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opd_ops.trainer.servers.client import WHOLE_DISTRIBUTION
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.scoring import Pairs, Question, TeacherServer

SERVE = "serve the teacher with vLLM: vllm serve MODEL --max-logprobs {k}"
SERVE_IDS = (
    "scores of given ids need a vLLM that has prompt_logprob_token_ids with one list a position (like 0.32.0), started with "
    "VLLM_USE_V2_MODEL_RUNNER=1, --enable-scale-out and --max-logprobs {k}"
)


class ServedTeacher(TeacherServer):
    """`ServedTeacher("http://teacher:8000").score(contexts, answers)` is a teacher that `selective_opd_loss` takes.

    vLLM allows a `top_k` of 20 unless it was started with --max-logprobs. Arguments and methods are those of `TeacherServer`.
    """

    not_normalised = "start the server with --logprobs-mode raw_logprobs"

    def _top(self, model: str, questions: Sequence[Question]) -> list[list[Pairs]]:
        body = {"model": model, **WHOLE_DISTRIBUTION, "max_tokens": 1, "prompt_logprobs": self.top_k}
        choices = self.client.complete([{**body, "prompt": question.tokens} for question in questions])
        return [self._rows(choice, question) for choice, question in zip(choices, questions, strict=True)]

    def _rows(self, choice: Mapping[str, object], question: Question) -> list[Pairs]:
        where, entries = f"{self.client.url}/v1/completions", choice.get("prompt_logprobs")
        tokens, n_context = question.tokens, len(question.context)
        if not isinstance(entries, list):
            raise ServerError(f"{where}: answered without prompt_logprobs; {SERVE.format(k=self.top_k)}")
        if len(entries) != len(tokens):
            raise ServerError(f"{where}: answered {len(entries)} prompt_logprobs for {len(tokens)} tokens, expected one each")
        rows = []
        for position in range(n_context, len(tokens)):
            try:
                pairs = [(int(token), float(entry["logprob"])) for token, entry in entries[position].items()]
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ServerError(
                    f"{where}: prompt_logprobs[{position}] is {str(entries[position])[:200]}, expected "
                    '{token id: {"logprob": number}}'
                ) from error
            self._check_pairs(f"{where}: prompt_logprobs[{position}]", pairs, tokens[position])
            rows.append(pairs)
        return rows

    def _given(self, model: str, questions: Sequence[Question]) -> list[Tensor]:
        path, hint = "/inference/v1/generate", SERVE_IDS.format(k=max((len(q.ids[0]) for q in questions), default=1))
        bodies = []
        for question in questions:
            options = {"prompt_logprob_token_ids": question.ids, "prompt_logprob_start": len(question.context) - 1}
            options |= {**WHOLE_DISTRIBUTION, "max_tokens": 1}
            bodies.append({"model": model, "token_ids": question.tokens, "sampling_params": options, "stream": False})
        try:
            answers = self.client.post(path, bodies)
        except ServerError as error:
            if error.code in (400, 403, 404, 405, 422):
                raise ServerError(f"{error}; {hint}", code=error.code) from error
            raise
        return [self._matrix(answer, question, hint) for answer, question in zip(answers, questions, strict=True)]

    def _matrix(self, answer: object, question: Question, hint: str) -> Tensor:
        import numpy as np

        where = f"{self.client.url}/inference/v1/generate"
        encoded = answer.get("prompt_token_id_logprobs") if isinstance(answer, dict) else None
        if not isinstance(encoded, str):
            raise ServerError(
                f"{where}: answered without prompt_token_id_logprobs; {hint}. A server that takes the context from its prefix "
                "cache does not send them either"
            )
        try:
            scores = torch.from_numpy(np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False))
        except (ValueError, EOFError, OSError, TypeError) as error:
            raise ServerError(
                f"{where}: its prompt_token_id_logprobs cannot be read ({error}), expected base64 of a .npy array"
            ) from error
        expected = len(question.answer), len(question.ids[0])
        if tuple(scores.shape) != expected or not scores.is_floating_point():
            raise ServerError(
                f"{where}: its prompt_token_id_logprobs are {tuple(scores.shape)} {scores.dtype}, expected fp32 {expected}"
            )
        scores = scores.float().masked_fill(torch.tensor(question.ids) < 0, -torch.inf)
        if bool(scores.isnan().any()):
            raise ServerError(f"{where}: its prompt_token_id_logprobs have a NaN, expected numbers")
        self._check_logprobs(f"{where}: prompt_token_id_logprobs", scores.flatten().tolist())
        return scores
