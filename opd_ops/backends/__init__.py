# The interface that every backend implements, and which one a call uses.
#
# A backend is a module with the two functions of `Backend`; all policy (checks, selection, reduction) is outside it.
# Not here: the backends themselves: eager.py (the specification), streamed.py (any device).
from __future__ import annotations

import logging
from typing import Protocol, cast

from torch import Tensor

from opd_ops.backends import eager, streamed
from opd_ops.divergences import Divergence
from opd_ops.sources import Source
from opd_ops.stats import TokenStats

_log = logging.getLogger("opd_ops")


class Backend(Protocol):
    """What a backend does with rows (int64 numbers of flattened positions) of two sources."""

    def token_stats(
        self, student: Source, teacher: Source, rows: Tensor, *, top_k: int, columns: frozenset[str], workspace_bytes: int
    ) -> TokenStats:
        """(n,) columns for the rows, without a graph; optional columns only if named in `columns`."""

    def selected_divergence(
        self,
        student: Source,
        teacher: Source,
        rows: Tensor,
        stats: TokenStats,
        *,
        divergence: Divergence,
        workspace_bytes: int,
    ) -> Tensor:
        """(M,) divergence at the rows, differentiable in the student's tensors; `stats` are those rows' own."""


_BACKENDS = {"torch": streamed, "eager": eager}
KNOWN = ("auto", "eager", "torch", "triton")


def resolve_backend(name: str) -> Backend:
    """The backend of that name. One chosen by name that cannot run raises; there is no silent fallback."""
    if name not in KNOWN:
        raise ValueError(f"backend: got {name!r}, expected one of: {', '.join(KNOWN)}")
    if name == "triton":
        raise ValueError("backend: got 'triton', whose kernels are not part of this version; use 'torch' or 'auto'")
    chosen = "torch" if name == "auto" else name
    _log.debug("backend %r: using %r", name, chosen)
    return cast(Backend, _BACKENDS[chosen])
