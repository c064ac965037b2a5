"""`Workspace`: the scratch memory of a call, and its division. No other code divides bytes.

Not here: the sizes of tiles and blocks (backends/shared/grids.py), the default (opd_ops/arguments.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workspace:
    """A limit in bytes, beyond inputs, outputs and gradients."""

    nbytes: int

    def share(self, numerator: int, denominator: int) -> Workspace:
        """The part numerator / denominator of the workspace."""
        return Workspace(numerator * (self.nbytes // denominator))

    def less(self, nbytes: int) -> Workspace:
        """The workspace that is left after `nbytes` are used."""
        return Workspace(self.nbytes - nbytes)

    def count(self, bytes_each: int, *, least: int = 1) -> int:
        """The number of rows, columns or numbers of `bytes_each` that fit; at least `least`."""
        return max(least, self.nbytes // bytes_each)
