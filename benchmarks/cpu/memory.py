"""The memory meter: how far a piece of work raised the resident memory of this process, at its peak.

  incremental peak = peak RSS during the work - RSS just before it

Before the work free pages go back to the system (malloc_trim, and ours that wait for a next call), so that the work cannot
hide in what earlier work left; the kernel's own high-water mark is reset (/proc/self/clear_refs, 5) and read after it
(VmHWM): no sampling, no missed spike.
Counted: pages of the process that are resident, tensors or not. Where /proc has no such mark, RSS is sampled every 2 ms
by a thread; `meter` says which it was.
Not here: what is measured (measure.py).
"""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from opd_ops.backends.shared import pages

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MAPPINGS = Path("/proc/self/smaps_rollup")
RESET_PEAK = "5"
SAMPLE_SECONDS = 0.002


def has_high_water_mark() -> bool:
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        _status_bytes("VmHWM")
    except (OSError, KeyError):
        return False
    return True


def _status_bytes(field: str, of: Path = STATUS) -> int:
    lines = dict(line.split(":", 1) for line in of.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def waiting_bytes() -> int | None:
    """Resident memory that the process has handed to the kernel and would use again (MADV_FREE); None: not known here."""
    with suppress(OSError, KeyError):
        return _status_bytes("LazyFree", MAPPINGS)
    return None


def release_free_memory() -> None:
    """Collect garbage and give free pages back: ours, and the allocator's where the C library can."""
    gc.collect()
    pages.release()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """Context manager: `before`, the resident bytes at its start; `increase`, the peak's excess over them.

    Example:
        >>> with PeakMemory() as memory:
        ...     work()
        >>> memory.increase
    """

    def __init__(self, *, sampled: bool | None = None) -> None:
        self._sampled = not has_high_water_mark() if sampled is None else sampled
        self.meter = f"RSS sampled every {SAMPLE_SECONDS * 1e3:g} ms" if self._sampled else "VmHWM, reset before"
        self.before = self.increase = 0

    def __enter__(self) -> PeakMemory:
        release_free_memory()
        if self._sampled:
            self._start_sampling()
        else:
            self.before = _status_bytes("VmRSS")
            CLEAR_REFS.write_text(RESET_PEAK)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._sampled:
            self._done.set()
            self._thread.join()
            peak = self._peak
        else:
            peak = _status_bytes("VmHWM")
        self.increase = max(0, peak - self.before)

    def _start_sampling(self) -> None:
        import psutil

        process = psutil.Process()
        self.before = self._peak = process.memory_info().rss
        self._done = threading.Event()

        def watch() -> None:
            while not self._done.wait(SAMPLE_SECONDS):
                self._peak = max(self._peak, process.memory_info().rss)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
