"""The interface that every backend implements, and which one a call uses.

A backend is a module with the functions of `Backend`; all policy (checks, selection, reduction) is outside it.
Not here: the backends themselves: eager.py (the specification), streamed/backend.py (any device), triton/backend.py (GPUs).
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from opd_ops.backends import eager
from opd_ops.backends.streamed import backend as streamed
from opd_ops.divergences import Divergence, ForwardKL, ReverseKL
from opd_ops.inputs import float8
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import Listed
from opd_ops.selection.stats import OwnStats, TokenStats

_log = logging.getLogger("opd_ops")


class Backend(Protocol):
    """What a backend does with rows (int64 numbers of flattened positions) of two sources."""

    def token_stats(
        self,
        student: Source,
        teacher: Source,
        rows: Tensor,
        *,
        top_k: int,
        columns: frozenset[str],
        workspace_bytes: int,
        score_dtype: torch.dtype | None,
    ) -> TokenStats:
        """(n,) columns for the rows, without a graph; optional columns only if named in `columns`.

        `score_dtype`: of a head's logits, where a backend would otherwise keep them in the head's own 16 bits.
        """

    def own_stats(
        self, source: Source, rows: Tensor, *, top_k: int, workspace_bytes: int, score_dtype: torch.dtype | None
    ) -> OwnStats:
        """One model's statistics at the rows, without a graph."""

    def selected_loss(
        self,
        student: Source,
        teacher: Source | Listed,
        rows: Tensor,
        weights: Tensor,
        stats: TokenStats,
        *,
        divergence: Divergence,
        tokens: Tensor | None,
        workspace_bytes: int,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        """sum weights l over the rows, differentiable in the student's tensors, and l, (M,); `stats` are those rows' own.

        Rows whose loss is infinite are left out of the sum. `tokens`: what the student sampled at the rows, (M,), if the
        divergence is on it.
        `inplace`: the gradient overwrites the student's logits; True reaches only the backends of `INPLACE`.
        """


_BACKENDS = {"torch": streamed, "eager": eager}
INPLACE = ("triton",)
KNOWN = ("auto", "eager", "torch", "triton")
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # of the current device: what triton compiles for, and what has bf16
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def check_backend(name: str) -> None:
    if name not in KNOWN:
        raise ValueError(f"backend: got {name!r}, expected one of: {', '.join(KNOWN)}")


class Needs(NamedTuple):
    """What a call asks of its backend beside its sources."""

    divergence: Divergence
    top_k: int
    inplace: bool = False
    float8: bool = False


def resolve_backend(name: str, student: Source, teacher: Source | Listed, needs: Needs) -> Backend:
    """The backend of that name. One chosen by name that cannot run raises; there is no silent fallback.

    "auto" is "triton" where that can run on a GPU (see triton/backend.py's `refusal`), else "torch".
    """
    check_backend(name)
    device = student.leading.device.type
    chosen, because = name, "chosen by name"
    if name == "triton" or (name == "auto" and device in DEVICES):
        reason = _without_triton(device) or _triton_refusal(student, teacher, needs)
        reason = _of_all_ranks(reason, student)
        if reason and name == "triton":
            raise ValueError(f"backend: got 'triton', but {reason}")
        chosen, because = ("torch", reason) if reason else ("triton", f"the device is {device}")
    elif name == "auto":
        chosen, because = "torch", f"the device is {device}"
    is_shared = student.transform.shard is not None
    if needs.inplace and (
        chosen not in INPLACE or is_shared or is_computed(student, teacher) or not has_kernel(needs.divergence)
    ):
        raise ValueError(
            "inplace_backward: got True, which only backend='triton' has, for dense logits of the whole vocabulary and reverse "
            "or forward KL; "
            f"this call uses {chosen!r} ({because}) and divergence {needs.divergence.name!r}"
        )
    if needs.float8:
        weights = [x.weight for x in (student, teacher) if isinstance(x, Source) and x.weight is not None]
        reason = because if chosen != "triton" else float8.refusal(*weights)
        if reason is not None:
            raise ValueError(f"score_dtype: got 'float8', which needs backend='triton' on Hopper or newer, but {reason}")
    if not torch.compiler.is_compiling():  # a traced call cannot log
        _log.debug("backend %r: using %r (%s)", name, chosen, because)
    if chosen == "triton":
        from opd_ops.backends.triton import backend as triton

        return cast(Backend, triton)
    return cast(Backend, _BACKENDS[chosen])


def has_kernel(divergence: Divergence) -> bool:
    """Whether it is reverse or forward KL, whose value the score pass knows."""
    return divergence.support is None and type(divergence.whole) in (ReverseKL, ForwardKL)


def drops_weightless_rows(backend: Backend) -> bool:
    """Whether a row whose loss gets weight 0 has a gradient of exactly zero whatever it holds, NaN included."""
    return not any(backend is other for other in _BACKENDS.values())  # the triton backend: named without importing it


def scores_selected_rows(backend: Backend, student: Source, teacher: Source | Listed) -> bool:
    """Whether `selected_loss` finds the rows' statistics itself, and needs none that are known of them."""
    is_shared = student.transform.shard is not None
    return drops_weightless_rows(backend) and (is_shared or is_computed(student, teacher))


def is_computed(*sides: Source | Listed) -> bool:
    """Whether some logits are not stored: those of a head, and mixed ones."""
    return any(isinstance(side, Source) and (side.transform.is_head or side.reference is not None) for side in sides)


def _triton_refusal(student: Source, teacher: Source | Listed, needs: Needs) -> str | None:
    from opd_ops.backends.triton import backend as triton  # importing opd_ops needs torch alone

    return triton.refusal(student, teacher, divergence=needs.divergence, top_k=needs.top_k)


def _of_all_ranks(reason: str | None, student: Source) -> str | None:
    """Ranks that share out the vocabulary use one backend: strides may differ with the width of a part."""
    shard = student.transform.shard
    if shard is None:
        return reason
    refused = shard.ranks.sum(torch.tensor([reason is not None], dtype=torch.long, device=student.leading.device))
    return reason or ("another rank of the vocabulary's group cannot run it; its error says why" if bool(refused) else None)


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
    if device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"the GPU has compute capability {found}, expected 8.0 or newer (Ampere); use 'torch' there"
    if device not in DEVICES and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return (
            f"the logits are on {device}, expected one of: {', '.join(DEVICES)}; use 'torch' there "
            "(on a CPU kernels run only interpreted, for tests: TRITON_INTERPRET=1)"
        )
    return None
