"""Both sides of a call, student and teacher: checked against each other and the divergence, as sources for the backends.

  teacher           divergences                                                           selectors
  logits, head      all                                                                   all
  TopKLogprobs      forward_kl_topk, TopK on the teacher's list or the intersection       all that need no whole row
  ... of="student"  TopK on the student's list                                            the same
  SampledLogprobs   sampled                                                               entropy, dial, log-ratio, controls
  Mixture, Routed   as their members: logits and heads

Not here: the checks of other arguments (call/prepare.py) and of selectors (selection/selectors.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import check_layout, traced_as_constant, warn_user
from opd_ops.divergences import DIVERGENCES, Divergence
from opd_ops.inputs.ensembles import Mixture, Routed, named_models
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.sources import Mixing, Source
from opd_ops.inputs.teacher_lists import SampledLogprobs, SparseTeacher, TeacherLists, TopKLogprobs
from opd_ops.inputs.vocabulary import one_group, part_of, share_out, to_local
from opd_ops.inputs.workspace import Workspace

_warned_of: set[tuple[int, int]] = set()  # Python forgets which warnings it has shown when code catches warnings


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
    workspace: Workspace,
    reads_tokens: bool,
) -> tuple[Source, Source | TeacherLists]:
    """Both sides over their common vocabulary; one warning if vocabularies differ and `vocab_size` is None.

    `reads_tokens`: whether the statistics hold the teacher's log-probability of the sampled token.
    """
    sides = [to_local("student", _source_of("student", student))]
    if not isinstance(teacher, (TopKLogprobs, SampledLogprobs)):
        sides += [to_local(name, _source_of(name, model)) for name, model in named_models(teacher)]
    vocabularies = share_out(sides, one_group(process_group, sides))
    student_source, *others = (side.source for side in sides)
    for side in sides[1:]:
        _check_same_positions(side.name, side.source, student_source)
    if vocabularies.ranks is not None and eos_ids:
        raise ValueError("eos_ids: ids cannot be merged where ranks share out the vocabulary; pass no eos_ids")
    totals = [widths.total for widths in (vocabularies.student, *vocabularies.others)]
    if isinstance(teacher, (TopKLogprobs, SampledLogprobs)):
        _check_sparse(teacher, student_source, divergence, temperature, eos_ids)
        totals.append(totals[0])
    vocab = _check_vocabulary(totals[0], totals[1], vocab_size)
    if any(eos_id >= vocab for eos_id in eos_ids):
        raise ValueError(f"eos_ids: got {list(eos_ids)}, expected ids below the vocabulary size, {vocab}")
    for side, total in zip(sides, totals, strict=False):
        if total < vocab:
            raise ValueError(
                f"{side.name}: has a vocabulary of {total}, expected at least the call's, {vocab}; pass vocab_size={total}"
            )
    shard, merged = vocabularies.shard(vocab), eos_ids if len(eos_ids) > 1 else ()
    if shard is not None:
        others = [part_of(side, widths, shard) for side, widths in zip(sides[1:], vocabularies.others, strict=True)]
    width = vocab if shard is None else shard.width
    student_source, *others = (
        source._replace(
            transform=replace(source.transform, vocab_size=width, temperature=temperature, merged=merged, shard=shard)
        )
        for source in (student_source, *others)
    )
    if isinstance(teacher, (TopKLogprobs, SampledLogprobs)):
        assert divergence.on_support is not None
        dtype, support = student_source.compute_dtype, divergence.on_support
        is_cut = not (support.with_token or reads_tokens) and getattr(teacher, "of", "teacher") == "teacher"
        longest = max(top_k, support.top_k) if is_cut else None
        return student_source, TeacherLists.of(teacher, vocab, dtype, merged, longest=longest, workspace=workspace)
    return student_source, _combined(teacher, others)


def _combined(teacher: object, models: Sequence[Source]) -> Source:
    """The source of a teacher whose models, in the order of `named_models`, are `models`."""
    if isinstance(teacher, Mixture):
        return _mixed(teacher, models)
    if not isinstance(teacher, Routed):
        return models[0]
    remaining, sources, index, positions = iter(models), [], teacher.index, models[0].shape
    for routed in teacher.teachers:
        own = [next(remaining) for _ in named_models(routed)]
        sources.append(_mixed(routed, own) if isinstance(routed, Mixture) else own[0])
    if index.shape != positions[: index.dim()]:
        raise ValueError(
            f"Routed.index: got shape {tuple(index.shape)}, expected the positions' shape {tuple(positions)}, or its first "
            "dimensions"
        )
    if index.device != models[0].device:
        raise ValueError(f"Routed.index: is on {index.device}, the teachers are on {models[0].device}; move them to one device")
    routes = index.long().reshape((*index.shape, *(1,) * (len(positions) - index.dim()))).expand(positions).flatten()
    transform = replace(sources[0].transform, mixing=None)
    return sources[0]._replace(transform=transform, others=tuple(sources), routes=routes, logsumexp=None)


def _mixed(mixture: Mixture, models: Sequence[Source]) -> Source:
    kept = [(x, weight) for x, weight in zip(models[1:], mixture.weights[1:], strict=True) if weight]
    if not kept and mixture.weights[0] == 1:
        return models[0]
    mixing = Mixing((mixture.weights[0], *(weight for _, weight in kept)), mixture.kind)
    others = tuple(x._replace(transform=replace(x.transform, merged=())) for x, _ in kept)  # ids are merged after mixing
    return models[0]._replace(transform=replace(models[0].transform, mixing=mixing), others=others)


def _check_sparse(
    teacher: SparseTeacher, student: Source, divergence: Divergence, temperature: float, eos_ids: tuple[int, ...]
) -> None:
    name = type(teacher).__name__
    check_list_divergence(divergence, name, getattr(teacher, "of", "teacher"))
    if teacher.positions != student.shape:
        raise ValueError(
            f"teacher: got positions of shape {tuple(teacher.positions)}, expected those of the student, {tuple(student.shape)}"
        )
    if teacher.ids.device != student.device:
        raise ValueError(f"teacher: is on {teacher.ids.device}, the student is on {student.device}; move them to one device")
    if teacher.temperature != temperature:
        raise ValueError(
            f"temperature: got {temperature:g}, but {name} holds log-probabilities at {teacher.temperature:g}; ask the server "
            f"for those at {temperature:g} and pass {name}(..., temperature={temperature:g})"
        )
    if eos_ids and isinstance(teacher, SampledLogprobs):
        raise ValueError("eos_ids: SampledLogprobs knows one of the ids alone, not their sum; pass no eos_ids, or TopKLogprobs")


def check_list_divergence(divergence: Divergence, teacher: str, of: str = "teacher") -> None:
    """Refuse a divergence that a sparse teacher does not allow; `teacher` is the name of its class, `of` whose ids it sends."""
    is_sampled = teacher == SampledLogprobs.__name__
    reader = divergence.on_support
    if reader is not None and reader.reads_reverse_kl:
        raise ValueError(
            f"divergence: got {divergence.name!r} with baseline 'kl', a KL of whole rows, which {teacher} cannot give; pass "
            "baseline='none', or the teacher's logits or a LinearHead"
        )
    allowed = ("token",) if is_sampled else ("student",) if of == "student" else ("teacher", "intersection")

    def fits(candidate: Divergence) -> bool:
        support = candidate.on_support
        return candidate.whole is None and support is not None and support.support in allowed and not support.reads_entropy

    if fits(divergence):
        return
    support = divergence.on_support.support if divergence.whole is None and divergence.on_support is not None else None
    names = [d.name for d in DIVERGENCES.values() if fits(d)]
    if not is_sampled:
        names.append(f"TopK(support={' or '.join(map(repr, allowed))})")
    more = ""
    if support == "token":
        more = "; 'sampled' takes SampledLogprobs, logits or a LinearHead"
    elif support in ("student", "union") and not is_sampled:
        more = "; the teacher's own list leaves out ids of the student's"
        if support == "student":
            more += ": ask the server for those ids and pass TopKLogprobs(..., of='student')"
    elif not is_sampled and divergence.name == "reverse_kl":
        more = "; tail_aware is reverse KL with all that is not listed as one outcome"
    raise ValueError(
        f"divergence: got {divergence.name!r}, which {teacher} cannot give; expected one of: {', '.join(names)}{more}. "
        "For the others pass the teacher's logits or a LinearHead"
    )


def _check_same_positions(name: str, side: Source, student: Source) -> None:
    """Refuse other positions than the student's, or another device."""
    if side.shape != student.shape:
        raise ValueError(
            f"{name}: got positions of shape {tuple(side.shape)}, expected those of the student, {tuple(student.shape)}"
        )
    if side.device != student.device:
        raise ValueError(f"{name}: is on {side.device}, the student is on {student.device}; move them to one device")


def _source_of(name: str, side: object) -> Source:
    """The source of one side, checked by itself."""
    if not isinstance(side, (Tensor, LinearHead)):
        more = ", TopKLogprobs, SampledLogprobs, Mixture or Routed" if name == "teacher" else ""
        raise TypeError(f"{name}: got {type(side).__name__}, expected a logits tensor (..., V) or a LinearHead{more}")
    if isinstance(side, Tensor) and side.dim() < 1:
        raise ValueError(f"{name}: got logits of shape {tuple(side.shape)}, expected (..., V) with V >= 1")
    source = Source.of(side)
    check_layout(name, source.leading)
    if not source.leading.is_floating_point():
        raise TypeError(f"{name}: got logits of dtype {source.leading.dtype}, expected a floating-point dtype")
    if source.device.type == "meta":
        raise ValueError(f"{name}: is on the meta device, which holds no numbers; expected a tensor that does")
    return source


def _check_vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    common = min(student, teacher)
    if common < 1:
        name = "student" if student < 1 else "teacher"
        raise ValueError(f"{name}: got a vocabulary without an entry, expected logits (..., V) with V >= 1")
    if vocab_size is not None:
        if vocab_size > common:
            raise ValueError(
                f"vocab_size: got {vocab_size}, expected at most {common} (the student has {student}, the teacher {teacher})"
            )
        return vocab_size
    if student != teacher:
        _warn_once(student, teacher)
    return common


# torch.compile runs this while it traces, once per graph: a graph cannot warn.
@traced_as_constant
def _warn_once(student: int, teacher: int) -> None:
    if (student, teacher) in _warned_of:
        return
    common = min(student, teacher)
    warn_user(
        f"vocabularies differ: the student has {student} entries, the teacher {teacher}; both are sliced to the first "
        f"{common} before the softmax. Pass vocab_size={common} to say that this is meant"
    )
    _warned_of.add((student, teacher))  # not reached if warn_user raised
