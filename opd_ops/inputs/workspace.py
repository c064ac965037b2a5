"""`Workspace`: the scratch memory that a call may hold, and how it is divided. Nothing else divides bytes.

Not here: the sizes of tiles and blocks (backends/shared/grids.py), the default (opd_ops/settings.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workspace:
    """Bytes beyond inputs, outputs and gradients."""

    nbytes: int

    def share(self, numerator: int, denominator: int) -> Workspace:
        """A part of it: so many `denominator`-ths."""
        return Workspace(numerator * (self.nbytes // denominator))

    def less(self, nbytes: int) -> Workspace:
        """What is left of it."""
        return Workspace(self.nbytes - nbytes)

    def count(self, bytes_each: int) -> int:
        """How many rows, columns or numbers of that size it holds; at least one."""
        return max(1, self.nbytes // bytes_each)
