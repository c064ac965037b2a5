"""Checks of one argument: numbers and lists of ids become Python's own, also NumPy's; tensors must be strided.

  An error names the argument, the value that came, the value that was expected. ValueError for values, TypeError for types.

Not here: arguments that depend on others (call/prepare.py, inputs/pair.py).
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import wraps
from typing import TypeVar, cast

import torch
from torch import Tensor

LARGEST_INTEGER = 2**63 - 1  # torch takes no larger one
LARGEST_ID = 2**31 - 2  # torch cuts a larger id to 32 bits when it compares it with 32-bit tokens: 2^40 would be token 0
LONGEST_SHOWN = 60
DEFAULT_WORKSPACE_BYTES = 512 * 2**20  # of the settings, and of a teacher of other ids that is read for a call
DEFAULT_TOP_K = 16  # this and the next: of the settings, and of statistics that a rollout records for a call
DEFAULT_TEMPERATURE = 1.0
Function = TypeVar("Function", bound=Callable[..., object])


def is_traced() -> bool:
    """Whether torch.compile traces the call. Traced code must not read a value, log or warn.

    call/prepare.py asks for the whole call (`Call.in_graph`, `Needs.traced`). Checks before a `Call` exists ask too, and two
    functions that read what torch.compile cannot trace: inference mode (inputs/sources.py), a ContextVar
    (selection/normalisers.py).
    """
    return torch.compiler.is_compiling()


def is_in_graph(device: torch.device) -> bool:
    """Whether torch.compile traces the call or a CUDA graph captures it."""
    return is_traced() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def traced_as_constant(function: Function) -> Function:
    """A decorator: torch.compile calls the function while it traces, and takes the result for a constant.

    The same as torch.compiler.assume_constant_result, which loads torch._dynamo: a second at every import of this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def may_look(tensor: Tensor) -> bool:
    """Whether reading the numbers costs nothing. Otherwise the CPU waits for a device, or torch.compile breaks the graph.

    Under torch.func.vmap a tensor has no numbers of its own.
    """
    return tensor.device.type == "cpu" and not is_traced() and "vmap" not in active_transforms()


def number_in(tensor: Tensor) -> float:
    """The number of a 0-dim tensor that `may_look` allows to read. `float(tensor)` is an operator of torch, with its cost."""
    return cast("float", tensor.tolist())


def active_transforms() -> list[str]:
    """The transforms of torch.func in which this code runs."""
    if not torch._C._are_functorch_transforms_active():
        return []
    return [interpreter.key().name.lower() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]


def warn_user(message: str) -> None:
    """Warn at the line of the user's code that called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("opd_ops", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def plain(value: object) -> object:
    """A NumPy number becomes a Python number, a NumPy array a list; anything else is returned unchanged."""
    if type(value) in (bool, int, float) or isinstance(value, Tensor):
        return value
    tolist = getattr(value, "tolist", None)
    is_numpy = hasattr(value, "dtype") and hasattr(value, "ndim")
    return tolist() if is_numpy and callable(tolist) else value


def take_plain(instance: object, *names: str) -> None:
    """Turn these fields of a frozen dataclass into Python's own numbers."""
    for name in names:
        value = getattr(instance, name)
        if plain(value) is not value:
            object.__setattr__(instance, name, plain(value))


def real(value: object) -> float:
    """A number as a float; NaN if the value is no number or too large for a float."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def shown(value: object) -> str:
    """The value as an error message shows it."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def check_positive(name: str, value: object, more: str = "") -> float:
    number = real(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: got {shown(value)}, expected a finite number > 0{more}")
    return number


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of: {', '.join(choices)}")


def check_flag(name: str, value: object) -> bool:
    """The value, if it is True or False; a text like "no" would count as True."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: got {shown(value)}, expected True or False")
    return flag


def check_integer(name: str, value: object, *, least: int) -> int:
    """The value, if it is an integer in `least` ... LARGEST_INTEGER; `name` is the argument's in the error."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}: got {shown(value)}, expected an integer")
    if number < least:
        raise ValueError(f"{name}: got {shown(number)}, expected at least {least}")
    if number > LARGEST_INTEGER:
        raise ValueError(f"{name}: got {shown(number)}, expected at most {LARGEST_INTEGER}")
    return number


def check_ids(name: str, ids: object) -> tuple[int, ...]:
    """Token ids as a tuple of integers, none negative."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable) or getattr(ids, "ndim", 1) == 0:
        raise TypeError(f"{name}: got {shown(ids)}, expected a sequence of token ids")
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    token_ids = tuple(check_integer(name, token_id, least=0) for token_id in ids)
    for token_id in token_ids:
        if token_id > LARGEST_ID:
            raise ValueError(f"{name}: got {token_id}, expected ids of at most {LARGEST_ID}")
    return token_ids


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The nearest of the names, as the end of an error message; "" where none is near. `prefix`: shown before that name."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else ""


def refuse_unknown_names(cls: type, error: Callable[[str], str]) -> None:
    """Let a dataclass refuse an unknown name with the text `error(name)`, in place of Python's."""
    init, names = cls.__init__, {x.name for x in fields(cls)}  # type: ignore[misc]

    @wraps(init)
    def checked(self: object, *given: object, **options: object) -> None:
        for name in options:
            if name not in names:
                raise TypeError(error(name))
        init(self, *given, **options)

    cls.__init__ = checked  # type: ignore[misc]


def check_layout(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is sparse, nested or in another library's layout."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
        raise TypeError(f"{name}: got {kind}, expected an ordinary one, of layout torch.strided")


def per_position(name: str, tensor: object, shape: torch.Size, device: torch.device) -> Tensor:
    """The tensor, checked to have one entry per position."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor of shape {tuple(shape)}")
    check_layout(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}, one entry per position")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the student is on {device}; move them to one device")
    return tensor
