"""Processes that a run has lost, named: a host that was cut off, a process that was killed.

A collective waits for all processes. If one is lost, the others fail after `process_timeout`, with an error of the backend that
does not say who is missing. So each process raises a number of its own once a second, in the store that the launcher has opened
at MASTER_ADDR. After a failed collective, a number that does not change is that of a lost process.

For backends that raise an error, such as gloo. NCCL's watchdog ends the process itself, and its message has the rank.
Not here: servers that fail (server_faults.py), SIGTERM (stopping.py).
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from types import TracebackType

    from accelerate import Accelerator
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

BEAT, WATCHED, REACHED = 1.0, 5.0, 5.0  # seconds: between two numbers, that numbers are watched for, until the store answers
ENDED = b"ended"
KEY = "opd_ops/alive/{}"


class LostProcessError(RuntimeError):
    """A collective failed because another process does not take part; the message names its rank."""


class LostProcesses(AbstractContextManager["LostProcesses"]):
    """Within this block an error of a collective becomes a `LostProcessError`.

    With one process, or without a launcher that sets MASTER_ADDR, the block does nothing.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._beat, daemon=True)
        self.address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self.is_watching = self.size > 1 and "MASTER_ADDR" in os.environ

    def __enter__(self) -> LostProcesses:
        if self.is_watching:
            self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if not self.is_watching:
            return
        failed = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        what = self._what_is_lost() if failed else ""
        self._stop.set()
        self._thread.join(REACHED)
        if failed:
            reason = str(error).strip().partition("\n")[0]
            raise LostProcessError(
                f"rank {self.rank} of {self.size}: {what} ({reason}). Start all processes again, with resume"
            ) from error

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has gone, which a failed collective will say
            store, n = self._store(), 0
            while True:  # at once: the store may hold the end of a run before this one
                n += 1
                store.set(KEY.format(self.rank), str(n))
                if self._stop.wait(BEAT):
                    break
            store.set(KEY.format(self.rank), ENDED.decode())

    def _store(self) -> TCPStore:
        """A connection of its own: another thread may wait in the process group's."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host, _, port = self.address.rpartition(":")
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=REACHED), wait_for_workers=False)

    def _what_is_lost(self) -> str:
        seen: list[list[bytes]] = []

        def watch() -> None:
            with suppress(RuntimeError):
                store = self._store()
                for wait in (WATCHED, 0):
                    keys = [KEY.format(rank) for rank in range(self.size)]
                    seen.append([store.get(key) if store.check([key]) else b"" for key in keys])
                    self._stop.wait(wait)

        thread = threading.Thread(target=watch, daemon=True)  # a connection that was cut off may block for minutes
        thread.start()
        thread.join(WATCHED + REACHED)
        if len(seen) < 2:
            return (
                f"rank 0 does not answer, nor does the store of its host at {self.address}: one of the two hosts was cut off, "
                "or rank 0 ended"
            )
        ended = [rank for rank, number in enumerate(seen[1]) if number == ENDED]
        lost = [rank for rank in range(self.size) if seen[0][rank] == seen[1][rank] and rank not in (*ended, self.rank)]
        if lost:
            return f"{_ranks(lost)} did not answer for {WATCHED:g} s, so its host was cut off or its process was killed"
        if ended:
            return f"{_ranks(ended)} ended; the output of that process has its error"
        return "all processes answer, but a collective failed; was one slower than process_timeout?"


def _ranks(ranks: list[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
