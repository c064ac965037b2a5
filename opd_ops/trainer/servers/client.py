"""Requests to an OpenAI-compatible server: JSON over HTTP, several at once, with retries after temporary failures.

  A failure is temporary if the server cannot be reached, is too slow, or answers 429 or 5xx. The next try comes after 0.5 s,
  and each later wait is twice as long. Any other failure is an error of the request, and is raised at once.

Only the standard library is used, so the client needs no other package. HTTP(S)_PROXY and NO_PROXY have their usual effect.
Not here: the content of requests and answers (teacher.py, rollouts.py).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict, cast

FIRST_WAIT = 0.5  # seconds
SHOWN = 300  # characters of an invalid answer in an error

# Sent in every request: missing fields come from the model's generation_config.json, which often cuts the distribution.
WHOLE_DISTRIBUTION = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class ModelEntry(TypedDict):
    """A model in the answer of /v1/models."""

    id: str


class ModelList(TypedDict):
    """The answer of /v1/models."""

    data: list[ModelEntry]


class ServerError(RuntimeError):
    """A server that cannot be reached, refuses a request, or sends an invalid answer; the message has its address."""


class _TemporaryError(ServerError):
    """An error after which the request is sent again."""


class ServerClient:
    """An OpenAI-compatible server, at an address with or without its `/v1`.

    Args:
        url: As "http://teacher:8000".
        timeout: Longest time without data from the server, in seconds, > 0.
        retries: Number of further tries after a temporary failure, >= 0.
        concurrency: Number of requests at the same time, >= 1; the server batches them.
        api_key: Sent as a bearer token, if the server needs one (`vllm serve --api-key`).
    Raises: ValueError: an argument out of range.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, concurrency: int, api_key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: got {url!r}, expected an address as 'http://teacher:8000'")
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout!r}, expected a number of seconds > 0")
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.concurrency, self.api_key = timeout, retries, concurrency, api_key

    def models(self) -> list[str]:
        """Names of the models that the server has, including adapters."""
        # An answer of another form raises below.
        answer = cast("ModelList", self._parsed("/v1/models", self._send("/v1/models", None, self.retries)))
        try:
            return [str(entry["id"]) for entry in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.url}/v1/models: answered {_shown(answer)}, expected a list of models") from error

    def choose(self, model: str | None) -> str:
        """`model`, if the server has it; for None, the server's only model."""
        models = self.models()
        if model is None and len(models) == 1:
            return models[0]
        if model in models:
            return str(model)
        raise ServerError(
            f"{self.url}: serves {', '.join(map(repr, models))}, asked for {model!r}; pass model= as one of these "
            "(opd-train: teacher_model, rollout_model)"
        )

    def complete(self, bodies: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """The only choice of each completion, in the order of the requests. The first error is raised."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._complete, bodies))

    def command(self, path: str, body: Mapping[str, object]) -> None:
        """Send a command, without retries: if only its answer was lost, the server would refuse the command a second time."""
        self._send(path, body, 0)

    def _complete(self, body: Mapping[str, object]) -> dict[str, object]:
        path = "/v1/completions"
        answer = self._parsed(path, self._send(path, body, self.retries))
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerError(f"{self.url}{path}: answered {_shown(answer)}, expected one choice")
        return choices[0]

    def _send(self, path: str, body: Mapping[str, object] | None, retries: int, wait: float = FIRST_WAIT) -> bytes:
        try:
            return self._send_once(path, body)
        except _TemporaryError:
            if not retries:
                raise
        time.sleep(wait)
        return self._send(path, body, retries - 1, 2 * wait)

    def _send_once(self, path: str, body: Mapping[str, object] | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                content: bytes = reply.read()
                return content
        except urllib.error.HTTPError as error:
            kind = _TemporaryError if error.code >= 500 or error.code == 429 else ServerError
            raise kind(f"{self.url}{path}: answered {error.code}: {_reason(error)}") from error
        except (OSError, http.client.HTTPException) as error:
            # urllib wraps an error before the request is sent in a URLError; later errors are not wrapped.
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                problem = (
                    f"no answer within {self.timeout:g} s ({reason}); is the server up, and the address right? A long batch "
                    "needs a longer timeout or fewer requests at once (concurrency)"
                )
            elif isinstance(error, urllib.error.URLError):
                problem = f"cannot be reached ({reason}); is the server up, and the address right?"
            else:
                problem = (
                    f"the connection broke before the answer was whole ({type(error).__name__}: {error}); see the server's log"
                )
            raise _TemporaryError(f"{self.url}{path}: {problem}") from error

    def _parsed(self, path: str, content: bytes) -> object:
        try:
            answer: object = json.loads(content)
        except ValueError as error:
            raise ServerError(
                f"{self.url}{path}: answered {_shown(content)}, expected JSON; is this the API's address?"
            ) from error
        return answer


def _reason(error: urllib.error.HTTPError) -> str:
    """The message of OpenAI's error format, or the raw content of the answer."""
    content = error.read()
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.reason} {_shown(content)}"


def _shown(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
