# The interface that every backend implements, and which one a call uses.
#
# A backend is a module with the two functions of `Backend`; all policy (checks, selection, reduction) is outside it.
# Not here: the backends themselves: eager.py (the specification), streamed.py (any device), triton.py (dense logits on GPUs).
from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Protocol, cast

import torch
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
        inplace: bool,
    ) -> Tensor:
        """(M,) divergence at the rows, differentiable in the student's tensors; `stats` are those rows' own.

        `inplace`: the gradient overwrites the student's logits; True reaches only the backends of `INPLACE`.
        """


_BACKENDS = {"torch": streamed, "eager": eager}
INPLACE = ("triton",)
KNOWN = ("auto", "eager", "torch", "triton")
OLDEST_TRITON = (3, 6)
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def check_backend(name: str) -> None:
    if name not in KNOWN:
        raise ValueError(f"backend: got {name!r}, expected one of: {', '.join(KNOWN)}")


def resolve_backend(
    name: str, student: Source, teacher: Source, *, divergence: Divergence, top_k: int, inplace: bool = False
) -> Backend:
    """The backend of that name. One chosen by name that cannot run raises; there is no silent fallback.

    "auto" is "triton" where that can run on a GPU (dense logits on both sides, see triton.py's `refusal`), else "torch".
    """
    check_backend(name)
    device = student.leading.device.type
    chosen, because = name, "chosen by name"
    if name == "triton" or (name == "auto" and device in DEVICES):
        reason = _without_triton(device) or _triton_refusal(student, teacher, divergence, top_k)
        if reason and name == "triton":
            raise ValueError(f"backend: got 'triton', but {reason}")
        chosen, because = ("torch", reason) if reason else ("triton", f"dense logits on {device}")
    elif name == "auto":
        chosen, because = "torch", f"the device is {device}"
    if inplace and chosen not in INPLACE:
        raise ValueError(f"inplace_backward: got True, which only backend='triton' has; this call uses {chosen!r} ({because})")
    if not torch.compiler.is_compiling():  # a traced call cannot log
        _log.debug("backend %r: using %r (%s)", name, chosen, because)
    if chosen == "triton":
        from opd_ops.backends import triton

        return cast(Backend, triton)
    return cast(Backend, _BACKENDS[chosen])


def drops_weightless_rows(backend: Backend) -> bool:
    """Whether a row whose loss gets weight 0 has a gradient of exactly zero whatever it holds, NaN included."""
    return not any(backend is other for other in _BACKENDS.values())


def _triton_refusal(student: Source, teacher: Source, divergence: Divergence, top_k: int) -> str | None:
    from opd_ops.backends import triton  # importing opd_ops needs torch alone

    return triton.refusal(student, teacher, divergence=divergence, top_k=top_k)


# A property of the machine: looked up while tracing.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _without_triton(device: str) -> str | None:
    """Why no Triton kernel can run on the device, or None."""
    try:
        found = str(import_module("triton").__version__)  # its distribution has another name on ROCm and XPU
    except ImportError:
        return "triton is not installed; pip install 'opd-ops[triton]', or use 'torch'"
    if tuple(int(x) for x in found.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {found} is installed, expected {'.'.join(map(str, OLDEST_TRITON))} or newer; upgrade it, or use 'torch'"
    if device not in DEVICES and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return (
            f"the logits are on {device}, expected one of: {', '.join(DEVICES)}; use 'torch' there "
            "(on a CPU kernels run only interpreted, for tests: TRITON_INTERPRET=1)"
        )
    return None
