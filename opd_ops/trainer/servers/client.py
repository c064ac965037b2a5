"""Requests to an OpenAI-compatible server: JSON over HTTP, several at once, with retries after temporary failures.

  A failure is temporary if the server cannot be reached, is too slow, or answers 429 or 5xx. Any other failure is an error of
  the request, and is raised at once. retries.py has the times of the tries.

Only the standard library is used, so the client needs no other package. HTTP(S)_PROXY and NO_PROXY have their usual effect.
Redirects are errors: urllib would send the key to their target, and make a GET of a POST.
Not here: the content of requests and answers (teacher.py, sglang.py, rollouts.py).
"""

from __future__ import annotations

import http.client
import json
import math
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import Literal, NamedTuple

from opd_ops.trainer.servers.retries import Retries, ServerError

COMPLETIONS = "/v1/completions"
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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is not followed, and so becomes an HTTPError."""

    def redirect_request(self, *_: object) -> None:
        return None


class ServedModel(NamedTuple):
    """A model in the answer of /v1/models. vLLM lists loaded adapters too, each with the name of its base model as `parent`."""

    name: str
    parent: str | None = None
    max_length: int | None = None  # tokens of prompt and answer together; None: the server does not say


class ServerClient:
    """An OpenAI-compatible server, at an address with or without its `/v1`.

    Args:
        url: As "http://teacher:8000".
        role: The server's part in a run; errors name the options of `opd-train` for it.
        timeout: Longest time without data from the server, in seconds, > 0.
        retry_seconds: How long a request is sent again after its first temporary failure, in seconds, >= 0; 0: never.
        concurrency: Number of requests at the same time, >= 1; the server batches them.
        api_key: Sent as a bearer token, if the server needs one (`vllm serve --api-key`).
    Raises: ValueError: an argument out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        role: Literal["teacher", "rollout"],
        timeout: float,
        retry_seconds: float,
        concurrency: int,
        api_key: str | None,
    ) -> None:
        check_address(url, "url")
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout!r}, expected a number of seconds > 0")
        if not 0 <= retry_seconds < math.inf:
            raise ValueError(f"retry_seconds: got {retry_seconds!r}, expected a finite number of seconds >= 0")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency: got {concurrency!r}, expected an integer of at least 1")
        if api_key is not None and not (api_key and all("!" <= character <= "~" for character in api_key)):
            raise ValueError(
                f"api_key: got {len(api_key)} characters, expected visible ASCII alone; a line break is often copied with a "
                f"key (opd-train: {role}_api_key_env)"
            )
        self.url, self.role = url.rstrip("/").removesuffix("/v1"), role
        self.timeout, self.retries, self.concurrency, self.api_key = timeout, Retries(retry_seconds), concurrency, api_key
        self._opener = urllib.request.build_opener(_NoRedirects)

    def models(self) -> list[ServedModel]:
        """The models that the server has, including adapters."""
        answer = self._parsed("/v1/models", self._send("/v1/models", None))
        try:
            return [_model(entry) for entry in answer["data"]]  # type: ignore[index]
        except (AttributeError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url}/v1/models: answered {_shown(answer)}, expected a list of models") from error

    def choose(self, name: str | None) -> ServedModel:
        """The model of that name, if the server has it; for None, the server's only model that is no adapter."""
        models = self.models()
        candidates = [model for model in models if (model.parent is None if name is None else model.name == name)]
        if len(candidates) != 1:
            served = ", ".join(repr(model.name) for model in models if name is not None or model.parent is None)
            raise ServerError(
                f"{self.url}: serves {served or 'no model'}, asked for {name!r}; pass model= as one of these "
                f"(opd-train: {self.role}_model)"
            )
        # Only base models have a length; an adapter has that of its base.
        (chosen,) = candidates
        lengths = [model.max_length for model in models if model.name in (chosen.name, chosen.parent) and model.max_length]
        return chosen._replace(max_length=min(lengths, default=None))

    def check_length(self, model: ServedModel, n_tokens: int, what: str) -> None:
        """Check that `n_tokens` of prompt and answer fit the model, if the server says how many do.

        Raises: ServerError: they do not; the message says that `what` has so many tokens.
        """
        if model.max_length is not None and n_tokens > model.max_length:
            raise ServerError(
                f"{self.url}: {what} = {n_tokens} tokens, expected at most {model.max_length}, the max_model_len of "
                f"{model.name!r}; serve it with a larger --max-model-len, or pass shorter prompts or answers "
                "(opd-train: max_new_tokens)"
            )

    def complete(self, bodies: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """The only choice of each completion, in the order of the requests. Raises: ServerError: as `post`."""
        choices = []
        for answer in self.post(COMPLETIONS, bodies):
            listed = answer.get("choices") if isinstance(answer, dict) else None
            if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
                raise ServerError(f"{self.url}{COMPLETIONS}: answered {_shown(answer)}, expected one choice")
            choices.append(listed[0])
        return choices

    def post(self, path: str, bodies: Sequence[Mapping[str, object]]) -> list[object]:
        """The JSON answers, in the order of the requests.

        Raises: ServerError: the first request that failed for good. The others are not sent, or not sent again, after that.
        """
        stop, failures = threading.Event(), list[ServerError]()

        def answer(body: Mapping[str, object]) -> object:
            if stop.is_set():
                return None
            try:
                return self._parsed(path, self._send(path, body, stop))
            except ServerError as error:
                failures.append(error)  # before the failures of requests that give up because of `stop`
                stop.set()
                raise

        pool = ThreadPoolExecutor(self.concurrency)
        futures = [pool.submit(answer, body) for body in bodies]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when the user interrupts the wait
            stop.set()
            # Requests that are under way may take minutes, and nobody reads their answers. The error comes at once; Python
            # waits for these requests when the process ends.
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    def command(self, path: str, body: Mapping[str, object]) -> None:
        """Send a command. An answer of 500 is not temporary here: vLLM's engine refuses adapters with it."""

        def send() -> bytes:
            try:
                return self._send_once(path, body)
            except ServerError as error:
                error.is_temporary &= error.code != 500
                raise

        self.retries.call(send, threading.Event())

    def _send(self, path: str, body: Mapping[str, object] | None, stop: threading.Event | None = None) -> bytes:
        return self.retries.call(partial(self._send_once, path, body), stop or threading.Event())

    def _send_once(self, path: str, body: Mapping[str, object] | None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                content: bytes = reply.read()
                return content
        except urllib.error.HTTPError as error:
            message = f"{self.url}{path}: answered {error.code}: {_reason(error)}"
            if error.code in (401, 403):
                # vLLM also answers 403 where a flag has not enabled a route.
                refused = "no key was sent" if self.api_key is None else "the key that was sent is not accepted"
                about = refused if error.code == 401 else f"if this is about a key: {refused}"
                message += f"; {about}, pass api_key= (opd-train: {self.role}_api_key_env, the variable that holds the key)"
            elif 300 <= error.code < 400:
                message += (
                    f"; it redirects to {error.headers['Location']!r}, expected an answer: pass the server's own address as "
                    f"url= (opd-train: {self.role}_url)"
                )
            is_temporary = error.code >= 500 or error.code == 429
            raise ServerError(message, code=error.code, is_temporary=is_temporary) from error
        except (OSError, http.client.HTTPException) as error:
            # urllib wraps an error before the request is sent in a URLError; later errors are not wrapped.
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                problem = (
                    f"no answer within {self.timeout:g} s ({reason}); check that the server is up and its address. A long "
                    "batch needs a longer timeout= or fewer requests at once, concurrency= (opd-train: batch_size)"
                )
            elif isinstance(error, urllib.error.URLError):
                problem = f"cannot be reached ({reason}); check that the server is up and its address"
            else:
                problem = (
                    f"the connection broke before the answer was whole ({type(error).__name__}: {error}); see the server's log"
                )
            raise ServerError(f"{self.url}{path}: {problem}", is_temporary=True) from error

    def _parsed(self, path: str, content: bytes) -> object:
        try:
            answer: object = json.loads(content)
        except ValueError as error:
            raise ServerError(
                f"{self.url}{path}: answered {_shown(content)}, expected JSON; is this the API's address?"
            ) from error
        return answer


def check_address(url: str, name: str) -> None:
    """Check a server's address; an error begins with the argument's name.

    Raises: ValueError: not http(s)://HOST or http(s)://HOST:PORT and perhaps a path, or with a user and a password.
    """
    if "@" in url:
        raise ValueError(
            f"{name}: got an address with '@', expected one without user and password, which warnings and files would show; "
            "pass a key as api_key= (opd-train: teacher_api_key_env, rollout_api_key_env)"
        )
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number up to 65535, or a bracket of an IPv6 address is missing
        is_address = False
    if not is_address or not all("!" <= character <= "~" for character in url):
        raise ValueError(f"{name}: got {url!r}, expected an address as 'http://teacher:8000'")


def _model(entry: Mapping[str, object]) -> ServedModel:
    parent, length = entry.get("parent"), entry.get("max_model_len")
    return ServedModel(str(entry["id"]), None if parent is None else str(parent), length if type(length) is int else None)


def _reason(error: urllib.error.HTTPError) -> str:
    """The message of OpenAI's error format, or the raw content of the answer."""
    try:
        content = error.read()
    except (OSError, http.client.HTTPException):  # the connection broke after the status
        return str(error.reason)
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.reason} {_shown(content)}"


def _shown(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
