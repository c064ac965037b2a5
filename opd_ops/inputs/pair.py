"""Both sides of a call, checked against each other and the divergence, as the sources that backends read.

  teacher           divergences                                                           selectors
  logits, head      all                                                                   all
  TopKLogprobs      local_support, tail_aware, forward_kl_topk                            those that need no whole row
  SampledLogprobs   sampled                                                               entropy and the controls

Not here: the checks of other arguments (call/checks.py), which selectors a sparse teacher allows (selection/selectors.py).
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import check_integer, check_layout, check_positive
from opd_ops.divergences import DIVERGENCES, Divergence, Extrapolated
from opd_ops.inputs import vocabulary as sharding
from opd_ops.inputs.linear_head import LinearHead, positions_shape
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import Listed, SampledLogprobs, SparseTeacher, TopKLogprobs
from opd_ops.inputs.vocabulary import Vocabulary

_warned_of: set[tuple[int, int]] = set()  # Python's own memory of warnings is lost whenever somebody catches some


def check_sources(
    student: object,
    teacher: object,
    divergence: Divergence,
    *,
    vocab_size: int | None,
    temperature: float,
    eos_ids: tuple[int, ...],
    process_group: dist.ProcessGroup | None,
    top_k: int,
    workspace_bytes: int,
) -> tuple[Source, Source | Listed]:
    """Both sides over their common vocabulary; one warning if their vocabularies differ and none was named."""
    temperature = check_positive("temperature", temperature)
    named = [("student", student)]
    if not isinstance(teacher, (TopKLogprobs, SampledLogprobs)):
        named.append(("teacher", teacher))
        if isinstance(divergence, Extrapolated):
            named.append(("Extrapolated.reference", divergence.reference))
    found = [sharding.to_local(name, _check_side(name, side)) for name, side in named]
    vocabularies = sharding.share_out(found, sharding.one_group(process_group, found))
    s, *others = found[0].side, *found[1:]
    for other in others:
        _check_beside(other.name, other.side, s)
    if vocabularies.ranks is not None and eos_ids:
        raise ValueError("eos_ids: ids cannot be merged where ranks share out the vocabulary; pass no eos_ids")
    if isinstance(teacher, (TopKLogprobs, SampledLogprobs)):
        return _check_sparse(s, vocabularies, teacher, divergence, vocab_size, temperature, eos_ids, top_k, workspace_bytes)
    totals = [widths.total for widths in (vocabularies.student, *vocabularies.others)]
    vocab = _check_vocabulary(totals[0], totals[1], vocab_size)
    merged = _check_eos_ids(eos_ids, vocab)
    if totals[-1] < vocab:
        raise ValueError(
            f"Extrapolated.reference: has a vocabulary of {totals[-1]}, expected at least the call's, {vocab}; pass "
            f"vocab_size={totals[-1]}"
        )
    shard = vocabularies.shard(vocab)
    if shard is None:
        of_all = [Source.of(local.side, vocab, temperature, merged) for local in found]
    else:
        parts = [s]
        for other, widths in zip(others, vocabularies.others, strict=True):
            parts.append(sharding.part_of(other.name, other.side, widths, shard))
        of_all = [Source.of(side, shard.width, temperature, shard=shard) for side in parts]
    student_source, teacher_source, *reference = of_all
    if isinstance(divergence, Extrapolated):
        unmerged = reference[0]._replace(transform=replace(reference[0].transform, merged=()))
        teacher_source = teacher_source.mixed(divergence.lam, unmerged)
    return student_source, teacher_source


def _check_sparse(
    student: Tensor | LinearHead,
    vocabularies: Vocabulary,
    teacher: SparseTeacher,
    divergence: Divergence,
    vocab_size: int | None,
    temperature: float,
    eos_ids: tuple[int, ...],
    top_k: int,
    workspace_bytes: int,
) -> tuple[Source, Listed]:
    name = type(teacher).__name__
    if isinstance(divergence, Extrapolated):
        raise ValueError(f"divergence: got 'extrapolated', which mixes logits, but the teacher is {name}; pass its logits")
    of_list = divergence.support
    fits = divergence.whole is None and of_list is not None and of_list.of_tokens == isinstance(teacher, SampledLogprobs)
    if not fits or (of_list is not None and of_list.reads_entropy):
        known = [
            d.name
            for d in DIVERGENCES.values()
            if d.whole is None and d.support is not None and d.support.of_tokens == isinstance(teacher, SampledLogprobs)
        ]
        more = ""
        if of_list is not None and of_list.of_tokens:
            more = "; 'sampled' takes SampledLogprobs, logits or a LinearHead"
        elif isinstance(teacher, TopKLogprobs) and divergence.name == "reverse_kl":
            more = "; tail_aware is reverse KL with all that is not listed as one outcome"
        raise ValueError(
            f"divergence: got {divergence.name!r}, which {name} cannot give; expected one of: {', '.join(known)}{more}. "
            "For the others pass the teacher's logits or a LinearHead"
        )
    if teacher.positions != positions_shape(student):
        raise ValueError(
            f"teacher: got positions of shape {tuple(teacher.positions)}, expected those of the student, "
            f"{tuple(positions_shape(student))}"
        )
    if teacher.ids.device != _device(student):
        raise ValueError(f"teacher: is on {teacher.ids.device}, the student is on {_device(student)}; move them to one device")
    if teacher.temperature != temperature:
        raise ValueError(
            f"temperature: got {temperature:g}, but {name} holds log-probabilities at {teacher.temperature:g}; ask the server "
            f"for those at {temperature:g} and pass {name}(..., temperature={temperature:g})"
        )
    if eos_ids and isinstance(teacher, SampledLogprobs):
        raise ValueError("eos_ids: SampledLogprobs knows one of the ids alone, not their sum; pass no eos_ids, or TopKLogprobs")
    total = vocabularies.student.total
    vocab = _check_vocabulary(total, total, vocab_size)
    shard, merged = vocabularies.shard(vocab), _check_eos_ids(eos_ids, vocab)
    source = Source.of(student, vocab if shard is None else shard.width, temperature, merged, shard)
    assert of_list is not None
    read = {"longest": max(top_k, of_list.length), "workspace_bytes": workspace_bytes}
    return source, Listed.of(teacher, vocab, compute_dtype(source), source.transform.merged, **read)


def _check_beside(name: str, side: Tensor | LinearHead, student: Tensor | LinearHead) -> None:
    """The same positions on the same device."""
    if positions_shape(side) != positions_shape(student):
        raise ValueError(
            f"{name}: got positions of shape {tuple(positions_shape(side))}, expected those of the student, "
            f"{tuple(positions_shape(student))}"
        )
    if _device(side) != _device(student):
        raise ValueError(f"{name}: is on {_device(side)}, the student is on {_device(student)}; move them to one device")


def _check_eos_ids(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    if len(set(ids)) != len(ids) or any(x >= vocab_size for x in ids):
        raise ValueError(f"eos_ids: got {list(ids)}, expected different ids below the vocabulary size, {vocab_size}")
    return ids if len(ids) > 1 else ()


def _check_side(name: str, side: object) -> Tensor | LinearHead:
    if isinstance(side, Tensor):
        check_layout(name, side)
        if not side.is_floating_point():
            raise TypeError(f"{name}: got logits of dtype {side.dtype}, expected a floating-point dtype")
        if side.dim() < 1:
            raise ValueError(f"{name}: got logits of shape {tuple(side.shape)}, expected (..., V) with V >= 1")
    elif not isinstance(side, LinearHead):
        more = ", TopKLogprobs or SampledLogprobs" if name == "teacher" else ""
        raise TypeError(f"{name}: got {type(side).__name__}, expected a logits tensor (..., V) or a LinearHead{more}")
    if _device(side).type == "meta":
        raise ValueError(f"{name}: is on the meta device, which holds no numbers; expected a tensor that does")
    return side


def _device(side: Tensor | LinearHead) -> torch.device:
    return side.weight.device if isinstance(side, LinearHead) else side.device


def _check_vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    common = min(student, teacher)
    if common < 1:
        name = "student" if student < 1 else "teacher"
        raise ValueError(f"{name}: got a vocabulary without an entry, expected logits (..., V) with V >= 1")
    if vocab_size is not None:
        vocab_size = check_integer("vocab_size", vocab_size, least=1)
        if vocab_size > common:
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected at most {common} (the student has {student}, the teacher {teacher})"
            )
        return vocab_size
    if student != teacher:
        _warn_once(student, teacher)
    return common


# Once for each graph that is traced: torch.compile takes no warning into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_once(student: int, teacher: int) -> None:
    if (student, teacher) in _warned_of:
        return
    common = min(student, teacher)
    warnings.warn(
        f"vocabularies differ: the student has {student} entries, the teacher {teacher}; both are sliced to the first "
        f"{common} before the softmax. Pass vocab_size={common} to say that this is meant",
        UserWarning,
        stacklevel=6,
    )
    _warned_of.add((student, teacher))  # not if it raised
