"""A teacher on an SGLang server: log-probabilities of its own top-K tokens, or of given ids.

  POST /generate with "return_logprob": true and "logprob_start_len": s answers, in "meta_info", one entry for each token from
  position s on, the first of them None (SGLang's docs/basic_usage/sampling_params.md, GenerateReqInput):
      input_token_logprobs       [log q, id, text] of the token itself
      input_top_logprobs         with "top_logprobs_num": K, a list of such triples, of the K likeliest tokens
      input_token_ids_logprobs   with "token_ids_logprob": ids, a list of such triples, of these ids
  There null is read as -inf: JSON has neither that nor NaN. One list of ids serves all positions of a request: a request asks
  for the ids of BLOCK positions together, after a context that the server has in its cache, and each position keeps its own.

Tested with recorded answers of this shape, not with SGLang itself.
Not here: what all servers share (scoring.py), vLLM (teacher.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opd_ops.inputs.chunks import chunks
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.scoring import Pairs, Question, TeacherServer

PATH = "/generate"
BLOCK = 16  # positions of a request for given ids: it answers up to BLOCK^2 K log-probabilities


class SGLangTeacher(TeacherServer):
    """`SGLangTeacher("http://teacher:30000")`: arguments and methods are those of `TeacherServer`."""

    not_normalised = "serve the teacher without options that change its log-probabilities"

    def _top(self, model: str, questions: Sequence[Question]) -> list[list[Pairs]]:
        bodies = [self._body(question, top_logprobs_num=self.top_k) for question in questions]
        answers = self.client.post(PATH, bodies)
        return [self._rows(answer, question) for answer, question in zip(answers, questions, strict=True)]

    def _rows(self, answer: object, question: Question) -> list[Pairs]:
        own, top = self._entries(answer, question, "input_top_logprobs")
        rows = []
        for i, (pair, listed) in enumerate(zip(own, top, strict=True)):
            pairs = list(dict([*listed, pair]).items())  # each id once
            self._check_pairs(f"{self.client.url}{PATH}: input_top_logprobs of answer token {i}", pairs, question.answer[i])
            rows.append(pairs)
        return rows

    def _given(self, model: str, questions: Sequence[Question]) -> list[Tensor]:
        scores = [torch.full((len(question.answer), len(question.ids[0])), -torch.inf) for question in questions]
        places, blocks, bodies = [], [], []
        for rows, question in zip(scores, questions, strict=True):
            for part in chunks(len(question.answer), BLOCK):
                block = Question(question.context + question.answer[: part.start], question.answer[part], question.ids[part])
                union = sorted({token for ids in block.ids for token in ids if token >= 0})
                if union:
                    places.append(rows[part])
                    blocks.append(block)
                    bodies.append(self._body(block, token_ids_logprob=union))
        for place, block, answer in zip(places, blocks, self.client.post(PATH, bodies), strict=True):
            _, listed = self._entries(answer, block, "input_token_ids_logprobs")
            place[:] = torch.tensor([self._chosen_ids(row, ids) for row, ids in zip(listed, block.ids, strict=True)])
        return scores

    def _chosen_ids(self, row: Pairs, ids: Sequence[int]) -> list[float]:
        """The log-probabilities of these ids among those of one position."""
        where, listed = f"{self.client.url}{PATH}: input_token_ids_logprobs", dict(row)
        missing = [token for token in ids if token >= 0 and token not in listed]
        if missing or any(map(math.isnan, listed.values())):
            raise ServerError(
                f"{where} lists {sorted(listed)[:8]} …, expected a number for each id asked for, as for {missing[:1]}"
            )
        self._check_logprobs(where, listed.values())
        return [listed.get(token, -math.inf) for token in ids]

    def _body(self, question: Question, **asked: object) -> dict[str, object]:
        return {
            "input_ids": question.tokens,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": len(question.context) - 1,
            "return_text_in_logprobs": False,
            **asked,
        }

    def _entries(self, answer: object, question: Question, name: str) -> tuple[Pairs, list[Pairs]]:
        """The answer's own tokens, and the list `name` at each of them."""
        where = f"{self.client.url}{PATH}"
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        names, n = ("input_token_logprobs", name), len(question.answer)
        lists = [entries for key in names if isinstance(meta, dict) and isinstance(entries := meta.get(key), list)]
        if [len(entries) for entries in lists] != [n + 1, n + 1]:
            raise ServerError(
                f"{where}: answered lists of {[len(entries) for entries in lists]} entries, expected {n + 1} "
                f"{' and '.join(names)} in meta_info; is this an SGLang server (vLLM: ServedTeacher, teacher_api)?"
            )
        try:
            own = [_pair(entry) for entry in lists[0][1:]]  # the first entry is that of the context's last token
            listed = [[_pair(entry) for entry in entries] for entries in lists[1][1:]]
        except (TypeError, ValueError) as error:
            raise ServerError(f"{where}: {name} has {error}, expected [log-probability, id, text]") from error
        if [token for token, _ in own] != question.answer:
            raise ServerError(
                f"{where}: input_token_logprobs are of the tokens {[token for token, _ in own][:8]} …, expected those of the "
                f"answer, {question.answer[:8]} …"
            )
        return own, listed


def _pair(entry: object) -> tuple[int, float]:
    """(id, log-probability) of a triple [log-probability, id, text]."""
    logprob, token = entry[:2] if isinstance(entry, list) and len(entry) > 1 else (None, None)
    if isinstance(token, bool) or not isinstance(token, int) or not isinstance(logprob, (int, float, type(None))):
        raise TypeError(repr(entry)[:80])
    return token, -math.inf if logprob is None else float(logprob)
