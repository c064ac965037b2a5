"""The choice of the backend for a call.

A backend chosen by name that cannot run raises; there is no silent fallback. "auto" is "triton" where it can run on a GPU, else
"torch"; the log says why (logger "opd_ops", level DEBUG).
Not here: what a backend is (interface.py).
"""

from __future__ import annotations

import logging
import os
from importlib import import_module

import torch

from opd_ops.arguments import traced_as_constant
from opd_ops.backends.eager import EAGER
from opd_ops.backends.ensembles import RoutedBackend, routed_models
from opd_ops.backends.interface import Backend, Needs
from opd_ops.backends.streamed.backend import STREAMED
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists

_log = logging.getLogger("opd_ops")
KNOWN = ("auto", "eager", "torch", "triton")
ANYWHERE: dict[str, Backend] = {backend.name: backend for backend in (EAGER, STREAMED)}  # on any device, with torch alone
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # the oldest that triton compiles for and that has bf16
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def check_backend(name: str) -> None:
    if name not in KNOWN:
        raise ValueError(f"backend: got {name!r}, expected one of: {', '.join(KNOWN)}")


def resolve_backend(name: str, student: Source, teacher: Source | TeacherLists, needs: Needs) -> Backend:
    """The backend of that name, or the backend that "auto" chooses.

    Raises: ValueError: that backend cannot run the call; the message says why.
    """
    device, models = student.leading.device, routed_models(teacher)
    backend = ANYWHERE.get(name, STREAMED)
    choice_reason = "chosen by name"
    if name == "triton" or (name == "auto" and device.type in DEVICES):
        reason = _without_triton(device)
        if reason is None:
            triton = _triton(needs.traced)
            reason = next(filter(None, (triton.refusal(student, model, needs) for model in models)), None)
        reason = _any_rank_refuses(reason, student)
        if reason is None:
            backend, choice_reason = triton, choice_reason if name == "triton" else f"the device is {device.type}"
        elif name == "triton":
            raise ValueError(f"backend: got 'triton', but {reason}")
        else:
            choice_reason = reason
    elif name == "auto":
        choice_reason = f"the device is {device.type}"
    if needs.inplace and not all(backend.overwrites_logits(student, model, needs.divergence) for model in models):
        raise ValueError(
            "inplace_backward: got True, which only backend='triton' has, for dense logits of the whole vocabulary and reverse "
            "or forward KL; "
            f"this call uses {backend.name!r} ({choice_reason}) and divergence {needs.divergence.name!r}"
        )
    if needs.float8:
        reason = next(filter(None, (backend.float8_refusal(student, model) for model in models)), None)
        if reason is not None:
            raise ValueError(
                "score_dtype: got 'float8', which needs backend='triton' on Hopper or newer, but this call uses "
                f"{backend.name!r} ({choice_reason}): {reason}"
            )
    if not needs.traced:  # a traced call cannot log
        _log.debug("backend %r: using %r (%s)", name, backend.name, choice_reason)
    return RoutedBackend(backend) if len(models) > 1 else backend


def _triton(is_traced: bool) -> Backend:
    # Here, because importing opd_ops must not need triton.
    from opd_ops.backends.triton.backend import TRITON
    from opd_ops.backends.triton.traced import TRACED_TRITON

    return TRACED_TRITON if is_traced else TRITON


def _any_rank_refuses(reason: str | None, student: Source) -> str | None:
    """`reason`, or another rank's: ranks that share out the vocabulary use one backend, but their strides may differ."""
    shard = student.transform.shard
    if shard is None:
        return reason
    refused = shard.ranks.sum(torch.tensor([reason is not None], dtype=torch.long, device=student.leading.device))
    return reason or ("another rank of the vocabulary's group cannot run it; its error says why" if bool(refused) else None)


# A property of the machine, so torch.compile may evaluate it once, while tracing.
@traced_as_constant
def _without_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on the device; None if one can."""
    try:
        version = str(import_module("triton").__version__)  # not by distribution: that has another name on ROCm and XPU
    except ImportError:
        return "triton is not installed; pip install 'opd-ops[triton]', or use 'torch'"
    if tuple(int(x) for x in version.split(".")[:2]) < OLDEST_TRITON:
        return (
            f"triton {version} is installed, expected {'.'.join(map(str, OLDEST_TRITON))} or newer; upgrade it, or use 'torch'"
        )
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < OLDEST_CAPABILITY:
            return f"{device} has compute capability {major}.{minor}, expected 8.0 or newer (Ampere); use 'torch' there"
    if device.type not in DEVICES and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return (
            f"the logits are on {device.type}, expected one of: {', '.join(DEVICES)}; use 'torch' there "
            "(on a CPU kernels run only interpreted, for tests: TRITON_INTERPRET=1)"
        )
    return None
