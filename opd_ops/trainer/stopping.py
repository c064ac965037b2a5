"""SIGTERM, as schedulers send it before they take a machine away: a step is finished and saved before the process ends.

Not here: the saving (checkpoints.py).
"""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from typing import Any

import torch


class Stopping(AbstractContextManager["Stopping"]):
    """Inside, SIGTERM is remembered. In a thread, where no handler can be set, it does nothing."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator, self.came = accelerator, False
        self.before: Any = None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def is_asked(self) -> bool:
        """Whether any process got the signal; every process calls this at the same step."""
        came = torch.tensor(float(self.came), device=self.accelerator.device)
        return bool(self.accelerator.reduce(came, reduction="sum").item() > 0)

    def _remember(self, *_: object) -> None:
        self.came = True
