# The public door: every argument is checked, and named in the error, before any work is done.
#
#   An error says which argument, what came, what was expected. ValueError for values, TypeError for types.
#
# Not here: the checks of a LinearHead alone (inputs.py).
from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from opd_ops.inputs import LinearHead, positions_shape, vocabulary
from opd_ops.rollout import StudentStats
from opd_ops.sources import Source

SCOPES = ("batch", "sequence")
DENOMINATORS = ("selected", "valid")


def check_sources(
    student: object, teacher: object, vocab_size: int | None, temperature: float, process_group: object
) -> tuple[Source, Source]:
    """Both sides over their common vocabulary; one warning if their vocabularies differ and none was named."""
    s, t = _check_side("student", student), _check_side("teacher", teacher)
    if process_group is not None:
        raise ValueError("process_group: got a group, expected None: vocabulary-parallel inputs are not supported yet")
    if positions_shape(s) != positions_shape(t):
        raise ValueError(
            f"teacher: got positions of shape {tuple(positions_shape(t))}, expected those of the student, "
            f"{tuple(positions_shape(s))}"
        )
    if _device(s) != _device(t):
        raise ValueError(f"teacher: is on {_device(t)}, the student is on {_device(s)}; move them to one device")
    check_number("temperature", temperature, above=0.0)
    vocab = _check_vocabulary(vocabulary(s), vocabulary(t), vocab_size)
    return Source.of(s, vocab, float(temperature)), Source.of(t, vocab, float(temperature))


def _check_side(name: str, side: object) -> Tensor | LinearHead:
    if isinstance(side, LinearHead):
        tensors = [side.hidden, side.weight]
    elif isinstance(side, Tensor):
        if not side.is_floating_point():
            raise TypeError(f"{name}: got logits of dtype {side.dtype}, expected a floating-point dtype")
        if side.dim() < 1 or side.shape[-1] < 1:
            raise ValueError(f"{name}: got logits of shape {tuple(side.shape)}, expected (..., V) with V >= 1")
        tensors = [side]
    else:
        raise TypeError(f"{name}: got {type(side).__name__}, expected a logits tensor (..., V) or a LinearHead")
    if any(hasattr(t, "full_tensor") for t in tensors):  # without importing torch.distributed for it
        raise ValueError(f"{name}: got a DTensor, expected local tensors; gather it first with .full_tensor()")
    return side


def _device(side: Tensor | LinearHead) -> torch.device:
    return side.weight.device if isinstance(side, LinearHead) else side.device


def _check_vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    common = min(student, teacher)
    if vocab_size is not None:
        check_integer("vocab_size", vocab_size, least=1)
        if vocab_size > common:
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected at most {common} (the student has {student}, the teacher {teacher})"
            )
        return vocab_size
    if student != teacher:
        warnings.warn(
            f"vocabularies differ: the student has {student} entries, the teacher {teacher}; both are sliced to the first "
            f"{common} before the softmax. Pass vocab_size={common} to say that this is meant",
            UserWarning,
            stacklevel=5,
        )
    return common


def check_number(name: str, value: object, *, above: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= above:
        raise ValueError(f"{name}: got {value!r}, expected a finite number > {above:g}")


def check_integer(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def check_top_k(top_k: int, vocab_size: int) -> None:
    check_integer("top_k", top_k, least=1)
    if top_k > vocab_size:
        raise ValueError(f"top_k: got {top_k}, expected at most the vocabulary size, {vocab_size}")


def check_fraction(fraction: object) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f"fraction: got {fraction!r}, expected a number in (0, 1]")


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of: {', '.join(known)}")


def check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {generator!r}, expected a torch.Generator or None")


def check_student_stats(stats: object, student: Source, top_k: int, valid: Tensor | None) -> None:
    """Of the call's positions, with K of at least `top_k`, over the vocabulary that the call compares."""
    if not isinstance(stats, StudentStats):
        raise TypeError(f"student_stats: got {type(stats).__name__}, expected StudentStats")
    shape, device, vocab = student.leading.shape[:-1], student.leading.device, student.transform.vocab_size
    for name in ("logsumexp", "entropy"):
        _positions(f"student_stats.{name}", getattr(stats, name), shape, device)
    for name in ("ids", "logprobs"):
        if getattr(stats, name).device != device:
            raise ValueError(f"student_stats.{name}: is on {getattr(stats, name).device}, the student is on {device}")
    if stats.ids.shape[-1] < top_k:
        raise ValueError(f"student_stats: got {stats.ids.shape[-1]} ids a position, expected at least top_k = {top_k}")
    own = student.leading.shape[-1] if student.weight is None else len(student.weight)
    if own != vocab:
        raise ValueError(
            f"student_stats: are over the student's own vocabulary of {own}, but the call compares the first {vocab} entries; "
            "pass no student_stats"
        )
    if device.type == "cpu":  # elsewhere looking would wait for the device
        ids = stats.ids if valid is None else stats.ids[valid]
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
            raise ValueError(
                f"student_stats.ids: got {int(ids.min())} ... {int(ids.max())} at valid positions, expected 0 ... {vocab - 1}"
            )


def check_num_items(value: Tensor | float | int | None) -> None:
    if value is None or (isinstance(value, Tensor) and value.dim() == 0):
        return  # a tensor's value stays on its device
    if isinstance(value, Tensor):
        raise ValueError(f"num_items_in_batch: got a tensor of shape {tuple(value.shape)}, expected a 0-dim one")
    check_number("num_items_in_batch", value, above=0.0)


def check_inplace_backward(student: Tensor, teacher: Tensor) -> None:
    """Refuse to overwrite logits that somebody may still need; without grad mode there is nothing to overwrite."""
    if not torch.is_grad_enabled():
        return
    reason = None
    if torch.compiler.is_compiling():
        reason = "are traced by torch.compile"
    elif not student.requires_grad:
        reason = "do not require a gradient"
    elif student.is_leaf:
        reason = "are a leaf, whose values belong to the caller"
    elif student._is_view():
        reason = "are a view, whose base others may read"
    elif student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        reason = "share their memory with the teacher's"
    if reason is not None:
        raise ValueError(
            f"inplace_backward: got True, but the student's logits {reason}; expected the output of an operation that "
            "nothing else reads; pass False"
        )


def valid_positions(
    shape: torch.Size,
    device: torch.device,
    mask: Tensor | None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    sequence_ids: Tensor | None = None,
) -> Tensor | None:
    """Bool of `shape`, or None for all: the mask's non-zeros, less what the labels ignore.

    Row i predicts target i, so `labels` (unshifted, as in Hugging Face) are shifted here; `shift_labels` win. With the
    `sequence_ids` of packed rows, the last row of each has no target: the next label is another sequence's.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {ignore_index!r}, expected an integer")
    valid = None if mask is None else _positions("mask", mask, shape, device) != 0
    targets = None
    if shift_labels is not None:
        targets = _positions("shift_labels", shift_labels, shape, device)
    elif labels is not None:
        labels = _positions("labels", labels, shape, device)
        if not labels.dim():
            raise ValueError("labels: got a 0-dim tensor, expected at least one dimension to shift along")
        targets = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        if sequence_ids is not None:
            ends = sequence_ids[..., 1:] != sequence_ids[..., :-1]
            targets[..., :-1].masked_fill_(ends, ignore_index)
    if targets is None:
        return valid
    kept = targets != ignore_index
    return kept if valid is None else valid & kept


def _positions(name: str, tensor: object, shape: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor of shape {tuple(shape)}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)}, one entry per position")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the student is on {device}; move them to one device")
    return tensor


def check_cu_seqlens(cu_seqlens: Tensor | None, shape: torch.Size) -> None:
    """(n_sequences + 1,) integers from 0 to the number of positions; their order is checked where they are on the CPU."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        came = f"dtype {cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: got {came}, expected an int32 or int64 tensor")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (n_sequences + 1,)")
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != shape.numel() or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
            raise ValueError(
                f"cu_seqlens: got {first} ... {last}, expected non-decreasing numbers from 0 to {shape.numel()}, "
                "the number of positions"
            )
