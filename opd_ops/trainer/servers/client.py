"""Requests to an OpenAI-compatible server: JSON over HTTP, several at once, again after failures that pass.

  A failure passes if the server was out of reach or too slow, or answered 429 or 5xx: the next try follows after 0.5 s, then
  after twice the wait before. What else it refuses is the request's own fault, and is raised at once.

The standard library alone, so that a teacher's client needs nothing to be installed; HTTP(S)_PROXY and NO_PROXY count.
Not here: what is asked, and how the answer is read (teacher.py, rollouts.py).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

FIRST_WAIT = 0.5  # seconds
SHOWN = 300  # characters of an answer that was not understood

# Of every request: a server fills what is left out from the model's generation_config.json, which often cuts the distribution.
WHOLE_DISTRIBUTION = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class ServerError(RuntimeError):
    """A server that cannot be reached, refuses, or answers something else than was asked; the message names its address."""


class _PassingError(ServerError):
    """Worth another try."""


class ServerClient:
    """An OpenAI-compatible server, at an address with or without its `/v1`.

    Args:
        url: As "http://teacher:8000".
        timeout: Seconds that the server may be silent, > 0.
        retries: Further tries after a failure that passes, >= 0.
        concurrency: Requests under way at once, >= 1; the server batches them.
        api_key: Sent as a bearer token, where the server wants one (`vllm serve --api-key`).
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
        """Names that the server answers to, adapters included."""
        answer = self._parsed("/v1/models", self._send("/v1/models", None, self.retries))
        try:
            return [str(entry["id"]) for entry in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.url}/v1/models: answered {_shown(answer)}, expected a list of models") from error

    def choose(self, model: str | None) -> str:
        """`model` if it is served, and without one the only one that is."""
        found = self.models()
        if model is None and len(found) == 1:
            return found[0]
        if model in found:
            return str(model)
        raise ServerError(
            f"{self.url}: serves {', '.join(map(repr, found))}, asked for {model!r}; pass model= as one of these "
            "(opd-train: teacher_model, rollout_model)"
        )

    def complete(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The only choice of each completion, in the order of the requests; the first error ends them all."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._complete, bodies))

    def command(self, path: str, body: dict[str, Any]) -> None:
        """Sent once: a command that was carried out before its answer got lost would be refused the second time."""
        self._send(path, body, 0)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        path = "/v1/completions"
        answer = self._parsed(path, self._send(path, body, self.retries))
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerError(f"{self.url}{path}: answered {_shown(answer)}, expected one choice")
        return choices[0]

    def _send(self, path: str, body: dict[str, Any] | None, retries: int, wait: float = FIRST_WAIT) -> bytes:
        try:
            return self._once(path, body)
        except _PassingError:
            if not retries:
                raise
        time.sleep(wait)
        return self._send(path, body, retries - 1, 2 * wait)

    def _once(self, path: str, body: dict[str, Any] | None) -> bytes:
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
            kind = _PassingError if error.code >= 500 or error.code == 429 else ServerError
            raise kind(f"{self.url}{path}: answered {error.code}: {_reason(error)}") from error
        except (OSError, http.client.HTTPException) as error:
            # urllib wraps what happens before the request is sent; what comes later arrives as it is.
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                said = (
                    f"no answer within {self.timeout:g} s ({reason}); is the server up, and the address right? A long batch "
                    "needs a longer timeout or fewer requests at once (concurrency)"
                )
            elif isinstance(error, urllib.error.URLError):
                said = f"cannot be reached ({reason}); is the server up, and the address right?"
            else:
                said = (
                    f"the connection broke before the answer was whole ({type(error).__name__}: {error}); see the server's log"
                )
            raise _PassingError(f"{self.url}{path}: {said}") from error

    def _parsed(self, path: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise ServerError(
                f"{self.url}{path}: answered {_shown(content)}, expected JSON; is this the API's address?"
            ) from error


def _reason(error: urllib.error.HTTPError) -> str:
    """OpenAI's error message, or what came instead."""
    content = error.read()
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.reason} {_shown(content)}"


def _shown(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
