"""The arguments of a call, checked once, as one `Call` that the later stages trust.

  An error names the argument, the value that came, the value that was expected. ValueError for values, TypeError for types.

Not here: settings (opd_ops/settings.py), the two models (inputs/pair.py), masks and labels (inputs/positions.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import active_transforms, is_in_graph, is_traced, may_look, per_position, real, shown
from opd_ops.backends.interface import Backend, Needs
from opd_ops.backends.resolve import ANYWHERE, resolve_backend
from opd_ops.distributed.ranks import Ranks
from opd_ops.divergences import Divergence, ReverseKL, SampledToken, TopK, resolve_divergence
from opd_ops.inputs.batch import Batch
from opd_ops.inputs.ensembles import AnyTeacher
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.pair import check_sources
from opd_ops.inputs.positions import Positions, positions
from opd_ops.inputs.rollout import StudentStats, check_student_stats
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import (
    SampledLogprobs,
    TeacherLists,
    TopKLogprobs,
    check_lists,
    is_missing,
    plus_tokens,
)
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.selectors import Selector, bound_selector, named_selector, needs_of, selector_name
from opd_ops.selection.stats import BACKEND_COLUMNS, TOKEN_COLUMNS, Scoring
from opd_ops.selection.weighting import named_weighting
from opd_ops.settings import SCORE_DTYPES, Settings, check_divergence_top_k, check_rules_known, check_top_k, scalar_of


@dataclass(frozen=True)
class Call:
    """The checked arguments of a call."""

    student: Source
    teacher: Source | TeacherLists
    positions: Positions
    batch: Batch
    settings: Settings
    selector: Selector
    weighting: Selector | None
    divergence: Divergence
    backend: Backend
    scope: str  # as the settings' scope; "batch" instead of "global" if this process selects alone
    ranks: Ranks | None  # the processes that select together; None: this process selects alone
    in_graph: bool  # torch.compile traces the call, or a CUDA graph captures it: values cannot be read

    @property
    def shape(self) -> torch.Size:
        return self.student.shape

    @property
    def unmasked(self) -> Tensor | None:
        """Bool of the positions' shape: positions that the caller left valid; None: all."""
        return self.positions.valid

    @property
    def student_stats(self) -> StudentStats | None:
        """The student's statistics from the rollout; None: the caller passed none."""
        return self.batch.student_stats

    @property
    def reads_whole_rows(self) -> bool:
        """Whether both models' whole rows are scored; else some statistics are NaN."""
        return self.student_stats is None and isinstance(self.teacher, Source)

    @property
    def needs(self) -> frozenset[str]:
        """The optional columns of statistics that the call reads."""
        return self.settings.needs

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.settings.workspace_bytes)

    @property
    def scoring(self) -> Scoring:
        """How a backend computes the statistics that the call reads."""
        return Scoring(self.settings.top_k, self.workspace, self.score_dtype, self.needs & BACKEND_COLUMNS)

    @property
    def score_dtype(self) -> torch.dtype | None:
        return None if self.settings.score_dtype is None else SCORE_DTYPES[self.settings.score_dtype]


def prepare(
    student: Tensor | LinearHead,
    teacher: AnyTeacher,
    batch: Batch,
    settings: Settings,
    *,
    selects: bool,
) -> Call:
    """Check all arguments that depend on the tensors, before any work. `selects`: False for a call that only scores."""
    ranks = selecting_ranks(settings, selects=selects)
    divergence = resolve_divergence(settings.divergence)
    reads_tokens = bool(settings.needs & TOKEN_COLUMNS)
    student_source, teacher_source = check_sources(
        student,
        teacher,
        divergence,
        vocab_size=settings.vocab_size,
        temperature=settings.temperature,
        eos_ids=tuple(settings.eos_ids),
        process_group=settings.process_group,
        top_k=settings.top_k,
        workspace=Workspace(settings.workspace_bytes),
        reads_tokens=reads_tokens,
    )
    shard, vocab = student_source.transform.shard, student_source.transform.whole_vocab_size
    if shard is not None:
        _check_other_positions(settings, shard.ranks.group, selects)
    check_top_k(settings.top_k, vocab)
    check_divergence_top_k(divergence, vocab)
    shape, device = student_source.shape, student_source.device
    checked_positions = positions(
        batch._replace(tokens=teacher.ids) if batch.tokens is None and isinstance(teacher, SampledLogprobs) else batch,
        shape,
        device,
        ignore_index=settings.ignore_index,
        special_ids=settings.special_ids,
        vocab_size=vocab if divergence.reads_tokens or reads_tokens else None,
    )
    selector = bound_selector(named_selector(settings.selector), settings.generator, checked_positions.sequences)
    needs = Needs(divergence, settings.top_k, inplace=settings.inplace_backward, float8=settings.in_float8, traced=is_traced())
    if needs.traced:
        _check_traceable(settings, teacher_source)
    if isinstance(teacher_source, Source) and teacher_source.routes is not None:
        reads_responses = "response_place" in settings.needs
        teacher_source = _with_checked_routes(teacher_source, None if reads_responses else checked_positions.valid)
    backend = resolve_backend(settings.backend, student_source, teacher_source, needs)
    weighting = named_weighting(settings.weighting)
    weighting = None if weighting is None else bound_selector(weighting, None, checked_positions.sequences)
    holds_parts = selects and settings.scope == "sequence" and ranks is not None
    if holds_parts and batch.labels is not None and batch.shift_labels is None:
        raise ValueError(
            "labels: got unshifted labels, whose next one may be on another rank of selection_group; pass shift_labels, or "
            "tokens and a mask"
        )
    if batch.student_stats is not None:
        _check_rollout(batch.student_stats, student_source, checked_positions.valid, settings)
        check_rules_known(selector, weighting, "student_stats")
    if isinstance(teacher, (TopKLogprobs, SampledLogprobs)):
        assert isinstance(teacher_source, TeacherLists)
        teacher_source = _with_lists(teacher_source, checked_positions.tokens, divergence, settings)
        check_lists(teacher, teacher_source.logprobs, checked_positions.valid)
        check_rules_known(selector, weighting, type(teacher).__name__)
    scope = settings.scope if selects and not (settings.scope == "global" and ranks is None) else "batch"
    call = Call(
        student=student_source,
        teacher=teacher_source,
        positions=checked_positions,
        batch=batch,
        settings=settings,
        selector=selector,
        weighting=weighting,
        divergence=divergence,
        backend=backend,
        scope=scope,
        ranks=ranks,
        in_graph=is_in_graph(device),
    )
    if reads_tokens:
        is_selector = needs_of(selector) & TOKEN_COLUMNS
        _check_tokens(call, f"the selector {selector_name(selector)!r}" if is_selector else "the weighting")
    if selects:
        _check_loss(call)
    return call


def _check_traceable(settings: Settings, teacher: Source | TeacherLists) -> None:
    """Refuse, in a graph of torch.compile, the work that it cannot trace."""
    if "ier" in settings.needs:
        raise ValueError("selector: got the column 'ier', which torch.compile cannot trace; call the loss outside of the graph")
    if isinstance(teacher, Source) and teacher.transform.mixing is not None:
        raise ValueError("teacher: got Mixture, which torch.compile cannot trace; call the loss outside of the graph")


def _check_rollout(stats: StudentStats, student: Source, valid: Tensor | None, settings: Settings) -> None:
    """Check that the statistics of the rollout are of this call's student."""
    if student.transform.merged:
        raise ValueError("eos_ids: student_stats are of the ids apart; pass no student_stats")
    shard = student.transform.shard
    check_student_stats(
        stats,
        student.shape,
        student.device,
        top_k=settings.top_k,
        vocab_size=student.transform.whole_vocab_size,
        student_vocab_size=student.width if shard is None else shard.uncut,
        valid=valid,
    )


def _with_lists(teacher: TeacherLists, tokens: Tensor | None, divergence: Divergence, settings: Settings) -> TeacherLists:
    """The lists of a sparse teacher, with the sampled tokens appended if their log-probabilities are read."""
    support = divergence.on_support
    reads_log_q = support is not None and support.with_token  # a ratio alone reads the student
    reads_log_q = reads_log_q or "teacher_logprob" in settings.needs
    if not reads_log_q or tokens is None or teacher.with_token:
        return teacher
    ids, logprobs = plus_tokens(teacher.ids, teacher.logprobs, tokens.flatten(), tuple(settings.eos_ids))
    return teacher._replace(ids=ids, logprobs=logprobs, with_token=True)


def _with_checked_routes(teacher: Source, valid: Tensor | None) -> Source:
    """The teacher, checked to have a model for each `valid` position; the CPU waits for the device.

    `valid`: None: for each position, as a selector reads that scores whole responses, masked positions too.
    """
    assert teacher.routes is not None
    if is_in_graph(teacher.device):
        raise ValueError(
            "teacher: got Routed, whose index decides how many rows each teacher has, which no graph of torch.compile or CUDA "
            "holds; call the loss outside of the graph"
        )
    n = len(teacher.others)
    outside = (teacher.routes < 0) | (teacher.routes >= n)
    outside = outside if valid is None else outside & valid.flatten()
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise ValueError(
            f"Routed.index: got {int(teacher.routes[place])} at position {place} of the flattened ones, expected 0 ... {n - 1}"
        )
    return teacher._replace(routes=teacher.routes.clamp(0, n - 1))


def divergence_of(teacher: object) -> Divergence:
    """A divergence that the teacher allows, for a call that only scores."""
    if isinstance(teacher, SampledLogprobs):
        return SampledToken()
    return TopK(support=teacher.of, top_k=1) if isinstance(teacher, TopKLogprobs) else ReverseKL()


def selecting_ranks(settings: Settings, *, selects: bool) -> Ranks | None:
    """The processes that select together; None: this process selects alone."""
    group = settings.selection_group
    if selects and group is not None and settings.scope == "batch":
        raise ValueError(
            "selection_group: got a group, but scope 'batch' is one budget for each process; expected scope 'global', or "
            "'sequence' if the ranks hold parts of the same sequences"
        )
    is_world = group is None and selects and settings.scope == "global"
    ranks = Ranks.world() if is_world else Ranks(group)
    return ranks if ranks.size > 1 else None


def _check_other_positions(settings: Settings, vocabulary: dist.ProcessGroup | None, selects: bool) -> None:
    """Refuse ranks that share out the vocabulary and select together: such ranks hold the same positions."""
    group = settings.selection_group
    if group is not None and vocabulary is not None:
        common = set(dist.get_process_group_ranks(group)) & set(dist.get_process_group_ranks(vocabulary))
        if len(common) > 1:
            raise ValueError(
                f"selection_group: has ranks {sorted(common)} in common with the group that shares out the vocabulary, which "
                "hold the same positions; expected ranks that hold others, across that group"
            )
    if selects and settings.scope == "global" and group is None:
        raise ValueError(
            "selection_group: got None where ranks share out the vocabulary, which hold the same positions; expected the group "
            "of the ranks that hold others"
        )


def _check_loss(call: Call) -> None:
    """The checks of a call that computes a loss."""
    if call.settings.inplace_backward:
        _check_inplace_backward(call.student.leading, call.teacher)
    if call.in_graph and call.settings.denominator == "sequence":
        raise ValueError(
            "denominator: got 'sequence', whose means leave out infinite losses, which only their values tell; a graph of "
            "torch.compile or CUDA reads none: call the loss outside of the graph"
        )
    if call.divergence.reads_tokens:
        _check_tokens(call, f"divergence {call.divergence.name!r}")
    _check_old_logprobs(call)


def _check_tokens(call: Call, reader: str) -> None:
    """What reads the sampled token needs the tokens."""
    tokens, teacher = call.positions.tokens, call.teacher
    if isinstance(teacher, TeacherLists) and teacher.is_sampled:
        if tokens is not None and may_look(tokens):
            differ = (teacher.ids[:, 0] != tokens.flatten()) & teacher.valid
            if call.unmasked is not None:
                differ &= call.unmasked.flatten()
            if bool(differ.any()):
                raise ValueError(
                    f"tokens: differ from the ids of SampledLogprobs at {int(differ.sum())} positions, the first "
                    f"{int(differ.nonzero()[0])} of the flattened ones; row i is of the token that it predicts"
                )
        return
    if tokens is None:
        raise ValueError(f"tokens: got None, but {reader} reads the sampled token; pass tokens=, or shift_labels=")


def _check_old_logprobs(call: Call) -> None:
    """A ratio needs the log-probabilities of the tokens when they were sampled; without a ratio nothing would read them."""
    old, rule, name = call.batch.old_logprobs, call.divergence.importance, call.divergence.name
    if rule is None and old is not None:
        raise ValueError(
            f"old_logprobs: got them, but divergence {name!r} has no ratio that reads them; pass SampledToken(ratio='is'), or "
            "ImportanceWeighted(divergence, ratio='tis')"
        )
    if rule is None:
        return
    if old is None:
        raise ValueError(
            f"old_logprobs: got None, but divergence {name!r} has the ratio {rule.kind!r} to the probabilities at sampling "
            "time; pass old_logprobs=, log-probabilities of the tokens"
        )
    per_position("old_logprobs", old, call.shape, call.student.device)
    if not old.is_floating_point():
        raise TypeError(f"old_logprobs: got dtype {old.dtype}, expected a floating-point one")
    if call.student.transform.merged:
        raise ValueError("eos_ids: old_logprobs are of one of the ids alone, not of their sum; pass no eos_ids, or no ratio")
    if may_look(old):
        bad = old.isnan() | is_missing(old) | (old > 1e-3)
        bad = bad if call.unmasked is None else bad & call.unmasked
        if bool(bad.any()):
            place = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"old_logprobs: got {float(old[place]):.4g} at position {place} ({int(bad.sum())} such positions), expected "
                "log-probabilities of sampled tokens, at most 0 and finite"
            )


def _check_inplace_backward(student: Tensor, teacher: Source | TeacherLists) -> None:
    """Refuse to overwrite logits that other code may still read. Without grad mode nothing is overwritten."""
    if not torch.is_grad_enabled():
        return
    reason = None
    if isinstance(teacher, Source) and teacher.routes is not None:
        reason = "get the gradients of several teachers (Routed), one after the other"
    elif is_traced():
        reason = "are traced by torch.compile"
    elif not student.requires_grad:
        reason = "do not require a gradient"
    elif student.is_leaf:
        reason = "are a leaf, whose values belong to the caller"
    elif student._is_view():
        reason = "are a view, whose base others may read"
    elif isinstance(teacher, Source) and _address(student) == _address(teacher.leading):
        reason = "share their memory with the teacher's"
    if reason is not None:
        raise ValueError(
            f"inplace_backward: got True, but the student's logits {reason}; expected the output of an operation that "
            "nothing else reads; pass False"
        )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_num_items(value: object) -> Tensor | float | None:
    """The host's count, a number or a 0-dim tensor. A host counts 0 in a step without a valid token."""
    if value is None:
        return None
    number = scalar_of("num_items_in_batch", value) if isinstance(value, Tensor) else real(value)
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(f"num_items_in_batch: got {shown(value)}, expected a finite number > 0")
    return value if isinstance(value, Tensor) else number


def check_transforms(backend: str, *, has_vmap: bool, has_gradient: bool) -> None:
    """Refuse torch.func's transforms (grad, vmap, jvp, ...), unless the backend is plain torch.

    `has_vmap`, `has_gradient`: whether such a backend has a rule for vmap, and for the other transforms, in this function.
    """
    if is_traced() or not (active := active_transforms()):
        return
    is_plain = backend in ANYWHERE and ANYWHERE[backend].takes_transforms
    refused = [name for name in active if not is_plain or not (has_vmap if name == "vmap" else has_gradient)]
    if refused:
        instead = "loss.backward() or torch.autograd.grad"
        if not is_plain and has_gradient:
            instead += ", or backend='eager'" + ("" if has_vmap else " (not under vmap)")
        raise ValueError(
            f"backend: got {backend!r} under a transform of torch.func ({', '.join(refused)}), for which it has no rule; use "
            f"{instead}"
        )
