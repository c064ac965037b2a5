"""Errors of servers, and retries: a request is sent again after a temporary failure, for a window of time.

  waits of 0.5, 1, 2, 4, 8, 10, 10, ... seconds; the last try comes when `seconds` have passed since the first failure.
  An error is temporary if the server cannot be reached, is too slow, or answers 429 or 5xx (client.py).

A restarted vLLM server loads its model for half a minute or more: the window must be longer. Each wait logs one
warning (logger "opd_ops") for all requests that fail in it. The last error also has the first failure: a server that was killed
cannot be reached afterwards, and only its first answer has the reason.
Not here: HTTP (client.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

FIRST_WAIT, LONGEST_WAIT = 0.5, 10.0  # seconds
RETRY_SECONDS = 120.0

_log = logging.getLogger("opd_ops")


class ServerError(RuntimeError):
    """A server that cannot be reached, refuses a request, or sends an invalid answer; the message has its address.

    Attributes:
        code: The HTTP status; None: there was no answer.
        is_temporary: Whether the same request may succeed later.
        resume_when: When a run that ended with it may continue, in words.
    """

    resume_when = "when the server is back"

    def __init__(self, message: str, *, code: int | None = None, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.code, self.is_temporary = code, is_temporary


class Retries:
    """The retries of one client, whose requests may run in several threads."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock, self._quiet_until = threading.Lock(), -1.0

    def call(self, send: Callable[[], bytes], stop: threading.Event) -> bytes:
        """The answer of `send`, which is called again after a temporary `ServerError`; when `stop` is set, not again.

        Raises: ServerError: the last error, with the first failure if it differs.
        """
        first: ServerError | None = None
        n_tries, began, wait = 0, 0.0, FIRST_WAIT
        while True:
            n_tries += 1
            try:
                return send()
            except ServerError as error:
                now = time.monotonic()
                if first is None:
                    first, began = error, now
                left = began + self.seconds - now
                if error.is_temporary and left > 0 and not stop.is_set():
                    self._warn(error, min(wait, left), left, now)
                    pause(min(wait, left), stop)
                    wait = min(2 * wait, LONGEST_WAIT)
                    if not stop.is_set():
                        continue
                if n_tries == 1:
                    raise
                raise _last(error, first, n_tries, now - began) from error.__cause__

    def _warn(self, error: ServerError, wait: float, left: float, now: float) -> None:
        """Log the failure, unless another request has logged one and still waits."""
        with self._lock:
            if now < self._quiet_until:
                return
            self._quiet_until = now + wait
        _log.warning("%s. Trying again for %.0f s", error, left)


def pause(seconds: float, stop: threading.Event) -> None:
    """Wait, but not longer than until `stop` is set."""
    stop.wait(seconds)


def _last(error: ServerError, first: ServerError, n_tries: int, seconds: float) -> ServerError:
    """`error` with the number of tries, and with the first failure if it has another message."""
    tried = f"tried {n_tries} times in {seconds:.0f} s"
    also = "" if str(first) == str(error) else f"; the first failure: {first}"
    return ServerError(f"{error} ({tried}{also})", code=error.code, is_temporary=error.is_temporary)
