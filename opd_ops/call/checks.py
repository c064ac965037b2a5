"""The public door: every argument is checked, and named in the error, before any work is done.

  An error says which argument, what came, what was expected. ValueError for values, TypeError for types.

Not here: numbers, ids and tensors of every call (arguments.py), the checks of both sides together (inputs/pair.py), of a
LinearHead or a sparse teacher alone (inputs/linear_head.py, inputs/teacher_lists.py).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import check_integer, check_layout, real, shown
from opd_ops.distributed.ranks import Ranks
from opd_ops.divergences import Divergence
from opd_ops.inputs.positions import of_positions
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import Listed, SparseTeacher

SCOPES = ("batch", "sequence", "global")
DENOMINATORS = ("selected", "valid")


def check_transforms(backend: object, *, has_vmap: bool, has_gradient: bool) -> None:
    """Refuse torch.func's transforms (grad, vmap, jvp, ...), but those that the oracle's plain torch allows.

    `has_vmap`, `has_gradient`: whether "eager" has a rule for vmap, and for the others.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    active = [interpreter.key().name.lower() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    refused = [name for name in active if backend != "eager" or not (has_vmap if name == "vmap" else has_gradient)]
    if refused:
        instead = "loss.backward() or torch.autograd.grad"
        if backend != "eager" and has_gradient:
            instead += ", or backend='eager'" + ("" if has_vmap else " (not under vmap)")
        raise ValueError(
            f"backend: got {backend!r} under a transform of torch.func ({', '.join(refused)}), for which it has no rule; use "
            f"{instead}"
        )


def check_top_k(top_k: object, vocab_size: int) -> int:
    found = check_integer("top_k", top_k, least=1)
    if found > vocab_size:
        raise ValueError(f"top_k: got {found}, expected at most the vocabulary size, {vocab_size}")
    return found


def check_fraction(fraction: object) -> float:
    found = real(fraction)
    if not 0 < found <= 1:
        raise ValueError(f"fraction: got {shown(fraction)}, expected a number in (0, 1]")
    return found


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of: {', '.join(known)}")


def check_selection_group(scope: str | None, group: object) -> Ranks | None:
    """The processes that select together; None: this one alone. `scope`: None where positions are only scored."""
    if scope is not None:
        check_choice("scope", scope, SCOPES)
    if group is None:
        if scope != "global":
            return None
        ranks = Ranks.world()
    else:
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(f"selection_group: got {type(group).__name__}, expected a ProcessGroup that this process is in")
        if scope == "batch":
            raise ValueError(
                "selection_group: got a group, but scope 'batch' is one budget for each process; expected scope 'global', or "
                "'sequence' if the ranks hold parts of the same sequences"
            )
        ranks = Ranks(group)
    return ranks if ranks.size > 1 else None


def check_other_positions(scope: str | None, group: dist.ProcessGroup | None, vocabulary: dist.ProcessGroup | None) -> None:
    """Where ranks share out the vocabulary they hold the same positions: those that select together must be others."""
    if group is not None and vocabulary is not None:
        shared = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(vocabulary))
        if len(shared) > 1:
            raise ValueError(
                f"selection_group: has ranks {sorted(shared)} in common with the group that shares out the vocabulary, which "
                "hold the same positions; expected ranks that hold others, across that group"
            )
    if scope == "global" and group is None:
        raise ValueError(
            "selection_group: got None where ranks share out the vocabulary, which hold the same positions; expected the group "
            "of the ranks that hold others"
        )


def check_parts_of_sequences(special_ids: tuple[int, ...], labels: Tensor | None) -> None:
    """Refuse what looks at whole sequences where a rank holds parts of them."""
    if special_ids:
        raise ValueError(
            "special_ids: got ids, whose first occurrence in a sequence may be on another rank of selection_group; take these "
            "positions from the mask"
        )
    if labels is not None:
        raise ValueError(
            "labels: got unshifted labels, whose next one may be on another rank of selection_group; pass shift_labels, or "
            "tokens and a mask"
        )


def check_divergence_top_k(divergence: Divergence, vocab_size: int) -> None:
    support = divergence.support
    if support is not None and support.length > vocab_size:
        raise ValueError(
            f"divergence: {divergence.name!r} has top_k {support.length}, expected at most the vocabulary size, {vocab_size}"
        )


def check_threshold(value: object, score_dtype: str | None = None) -> Tensor | float | None:
    if value is None:
        return None
    if score_dtype == "float8":
        raise ValueError("threshold: score_dtype='float8' scores only a shortlist of the budget exactly; pass one of the two")
    found = _of_scalar_tensor("threshold", value) if isinstance(value, Tensor) else real(value)
    if found is not None and math.isnan(found):
        raise ValueError(f"threshold: got {shown(value)}, expected a number or a 0-dim tensor of one")
    return value if isinstance(value, Tensor) else found


def check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {generator!r}, expected a torch.Generator or None")


def check_student_stats(stats: object, student: Source, top_k: int, valid: Tensor | None) -> None:
    """Of the call's positions, with K of at least `top_k`, over the vocabulary that the call compares."""
    if not isinstance(stats, StudentStats):
        raise TypeError(f"student_stats: got {type(stats).__name__}, expected StudentStats")
    shape, device, transform = student.leading.shape[:-1], student.leading.device, student.transform
    vocab = transform.whole_vocab_size
    for name in ("logsumexp", "entropy"):
        of_positions(f"student_stats.{name}", getattr(stats, name), shape, device)
    for name in ("ids", "logprobs"):
        if getattr(stats, name).device != device:
            raise ValueError(f"student_stats.{name}: is on {getattr(stats, name).device}, the student is on {device}")
    if stats.ids.shape[-1] < top_k:
        raise ValueError(f"student_stats: got {stats.ids.shape[-1]} ids a position, expected at least top_k = {top_k}")
    own = student.leading.shape[-1] if student.weight is None else len(student.weight)
    own = own if transform.shard is None else transform.shard.uncut
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


def check_num_items(value: object) -> Tensor | float | None:
    """A number or a 0-dim tensor, by one rule. 0 is what a host counts in a step without a valid token."""
    if value is None:
        return None
    found = _of_scalar_tensor("num_items_in_batch", value) if isinstance(value, Tensor) else real(value)
    if found is not None and not 0 <= found < math.inf:
        raise ValueError(f"num_items_in_batch: got {shown(value)}, expected a finite number > 0")
    return value if isinstance(value, Tensor) else found


def check_some_items(value: Tensor | float | None, selected: Tensor) -> None:
    """Refuse a count of 0 where positions are selected. A device's count is not looked at; the loss is 0 then."""
    if value is None or torch.compiler.is_compiling():
        return
    found = _of_scalar_tensor("num_items_in_batch", value) if isinstance(value, Tensor) else value
    if found == 0 and bool(selected.any()):
        raise ValueError(
            f"num_items_in_batch: got {shown(value)}, expected a finite number > 0: {int(selected.sum())} positions are "
            "selected. Pass the count of valid tokens, or a mask without one"
        )


def _of_scalar_tensor(name: str, tensor: Tensor) -> float | None:
    """Its number; None where looking would wait for a device, or break a graph."""
    check_layout(name, tensor)
    if tensor.dim():
        raise ValueError(f"{name}: got a tensor of shape {tuple(tensor.shape)}, expected a 0-dim one")
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(f"{name}: got a tensor of dtype {tensor.dtype}, expected one of a real number")
    return float(tensor) if tensor.device.type == "cpu" and not torch.compiler.is_compiling() else None


def check_scores(scores: object, shape: torch.Size, device: torch.device) -> None:
    """What a selector returned."""
    expected = f"expected a tensor of scores of shape {tuple(shape)}"
    if not isinstance(scores, Tensor):
        hint = "; it reads a column that is not computed: name it in the selector's `needs`" if scores is None else ""
        raise ValueError(f"selector: returned {type(scores).__name__}, {expected}{hint}")
    if scores.shape != shape:
        raise ValueError(f"selector: returned {tuple(scores.shape)}, {expected}")
    if scores.layout != torch.strided:
        raise ValueError(f"selector: returned a tensor of layout {scores.layout}, {expected}")
    if scores.device != device or scores.is_complex():
        raise ValueError(f"selector: returned {scores.dtype} scores on {scores.device}, expected real ones on {device}")


def check_inplace_backward(student: Tensor, teacher: Source | Listed) -> None:
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
    elif isinstance(teacher, Source) and _memory(student) == _memory(teacher.leading):
        reason = "share their memory with the teacher's"
    if reason is not None:
        raise ValueError(
            f"inplace_backward: got True, but the student's logits {reason}; expected the output of an operation that "
            "nothing else reads; pass False"
        )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def reads_tokens(divergence: Divergence) -> bool:
    """Whether it is on the token that the student sampled."""
    return divergence.support is not None and divergence.support.of_tokens


def check_tokens(divergence: Divergence, teacher: Source | Listed, tokens: Tensor | None) -> None:
    """A divergence on the sampled token needs to know it."""
    if not reads_tokens(divergence):
        return
    if tokens is not None and tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tokens: got labels of dtype {tokens.dtype}, expected int32 or int64")
    if isinstance(teacher, Listed):
        if tokens is not None and tokens.device.type == "cpu":  # elsewhere looking would wait for the device
            differ = (teacher.ids[:, 0] != tokens.flatten()) & teacher.valid
            if bool(differ.any()):
                raise ValueError(
                    f"tokens: differ from the ids of SampledLogprobs at {int(differ.sum())} positions, the first "
                    f"{int(differ.nonzero()[0])} of the flattened ones; row i is of the token that it predicts"
                )
        return
    if tokens is None:
        raise ValueError(
            f"tokens: got None, but divergence {divergence.name!r} is on the sampled token; pass tokens=, or shift_labels="
        )


def check_lists(teacher: SparseTeacher, listed: Listed, valid: Tensor | None) -> None:
    """No NaN among the log-probabilities at valid positions; elsewhere than on a CPU looking would wait for the device."""
    if listed.logprobs.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = listed.logprobs.isnan().any(1).view(teacher.positions)
    bad = bad if valid is None else bad & valid
    if bool(bad.any()):
        raise ValueError(
            f"{type(teacher).__name__}.logprobs: got NaN at position {tuple(bad.nonzero()[0].tolist())} ({int(bad.sum())} such "
            "positions), expected log-probabilities, -inf or id -1 where one is missing"
        )


def check_cu_seqlens(cu_seqlens: Tensor | None, shape: torch.Size) -> None:
    """(n_sequences + 1,) integers from 0 to the number of positions; their order is checked where they are on the CPU."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        came = f"dtype {cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: got {came}, expected an int32 or int64 tensor")
    check_layout("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (n_sequences + 1,)")
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != shape.numel() or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
            raise ValueError(
                f"cu_seqlens: got {first} ... {last}, expected non-decreasing numbers from 0 to {shape.numel()}, "
                "the number of positions"
            )
