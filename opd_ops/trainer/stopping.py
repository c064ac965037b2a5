"""SIGTERM, which schedulers send before they take a machine away: the run finishes and saves its step before it ends.

An evaluation that is due waits for the continuation: schedulers and launchers kill a process that takes too long.
Not here: the saving (checkpoints.py).
"""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from accelerate import Accelerator


class Stopping(AbstractContextManager["Stopping"]):
    """Within this block a SIGTERM is remembered. In a thread, where no handler can be set, the block does nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self._was_signalled = accelerator, False
        self._previous_handler: Callable[[int, FrameType | None], object] | int | None = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def is_asked(self) -> bool:
        """Whether any process got the signal. All processes must call this at the same step."""
        was_signalled = torch.tensor(float(self._was_signalled), device=self.accelerator.device)
        return bool(self.accelerator.reduce(was_signalled, reduction="sum").item() > 0)

    def _remember(self, *_: object) -> None:
        self._was_signalled = True
