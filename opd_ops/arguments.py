"""One argument alone: numbers and lists of ids as users write them, NumPy's too, as Python's own; tensors that hold every
entry.

  An error says which argument, what came, what was expected. ValueError for values, TypeError for types.

Not here: arguments that depend on others (call/prepare.py, inputs/pair.py).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

LARGEST_INTEGER = 2**63 - 1  # what torch takes
LARGEST_ID = 2**31 - 2  # beyond it torch compares 32-bit tokens with what is left of the number: 2^40 would be token 0
LONGEST_SHOWN = 60


def is_traced() -> bool:
    """Whether torch.compile is tracing the call: then nothing may look at a value, log or warn."""
    return torch.compiler.is_compiling()


def may_look(tensor: Tensor) -> bool:
    """Whether the host can read the numbers at no price: a device would have it wait, torch.compile would break the graph."""
    return tensor.device.type == "cpu" and not is_traced()


def warn_user(message: str) -> None:
    """A warning that points at the line outside of this package from which the call came."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("opd_ops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def plain(value: Any) -> Any:
    """A NumPy number, or array of one without a dimension, as Python's; anything else as it is."""
    if type(value) in (bool, int, float) or isinstance(value, Tensor):
        return value
    is_numpy = hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if is_numpy else value


def take_plain(instance: object, *names: str) -> None:
    """These fields of a frozen dataclass become Python's own numbers."""
    for name in names:
        value = getattr(instance, name)
        if plain(value) is not value:
            object.__setattr__(instance, name, plain(value))


def real(value: object) -> float:
    """A number as a float; NaN where it is none, or beyond what a float holds."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def shown(value: object) -> str:
    """The value as an error names it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def check_positive(name: str, value: object, more: str = "") -> float:
    found = real(value)
    if not 0 < found < math.inf:
        raise ValueError(f"{name}: got {shown(value)}, expected a finite number > 0{more}")
    return found


def check_integer(name: str, value: object, *, least: int) -> int:
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{name}: got {shown(value)}, expected an integer")
    if found < least:
        raise ValueError(f"{name}: got {shown(found)}, expected at least {least}")
    if found > LARGEST_INTEGER:
        raise ValueError(f"{name}: got {shown(found)}, expected at most {LARGEST_INTEGER}")
    return found


def check_ids(name: str, ids: object) -> tuple[int, ...]:
    """Token ids as a tuple of integers, none negative."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0:
        raise TypeError(f"{name}: got {shown(ids)}, expected a sequence of token ids")
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    found = tuple(check_integer(name, x, least=0) for x in ids)
    for x in found:
        if x > LARGEST_ID:
            raise ValueError(f"{name}: got {x}, expected ids of at most {LARGEST_ID}")
    return found


def check_layout(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is sparse, nested or in another library's layout."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
        raise TypeError(f"{name}: got {kind}, expected an ordinary one, of layout torch.strided")


def per_position(name: str, tensor: object, shape: torch.Size, device: torch.device) -> Tensor:
    """The tensor, if it has one entry per position."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor of shape {tuple(shape)}")
    check_layout(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}, one entry per position")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the student is on {device}; move them to one device")
    return tensor
