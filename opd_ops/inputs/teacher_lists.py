"""Sparse teachers: they send log-probabilities instead of logits, of their own top-K T or of the sampled tokens.

  TopKLogprobs(ids, logprobs)      from vLLM (`prompt_logprobs`), SGLang (`input_top_logprobs`) and verl's teacher
  SampledLogprobs(ids, logprobs)   from slime, SkyRL, prime-rl and tinker: log q(y) of the rollout tokens y

  TopKLogprobs(..., of="student")  of ids that the student chose, its top-K S: vLLM's `prompt_logprob_token_ids`

  A log-probability of -9999 or less means a missing entry: vLLM's servers write it for -inf, which JSON does not have.
  Such lists give a lower bound on C, the sum of q over S ∩ T (arXiv 2605.26844 eq. 17), and D with q = 0 off T. The student's
  ids give C itself.

Not here: statistics from lists (backends/shared/two_lists.py), losses on lists (divergences/).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import check_layout, check_positive, may_look, take_plain
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import take_rows
from opd_ops.inputs.workspace import Workspace

LAST_ID = 2**31 - 1  # the id of a missing entry: beyond every vocabulary, it sorts after every id of equal logit

MISSING_LOGPROB = -9999.0  # this or less is a missing entry

# Least log of the mass off a list: fp32 log-probabilities have no more digits, and their sum may exceed 1.
LEAST_TAIL = math.log(torch.finfo(torch.float32).eps)

SORTED_BYTES = 64  # scratch per sorted entry: ids and log-probabilities, their sorted copies, and the orders


def _check(name: str, ids: object, logprobs: object, temperature: object) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}.ids: got {_kind(ids)}, expected an int32 or int64 tensor")
    if not isinstance(logprobs, Tensor) or not logprobs.is_floating_point():
        raise TypeError(f"{name}.logprobs: got {_kind(logprobs)}, expected a floating-point tensor")
    for field, tensor in (("ids", ids), ("logprobs", logprobs)):
        check_layout(f"{name}.{field}", tensor)
    if ids.shape != logprobs.shape:
        raise ValueError(f"{name}.logprobs: got shape {tuple(logprobs.shape)}, expected that of the ids, {tuple(ids.shape)}")
    if ids.device != logprobs.device:
        raise ValueError(f"{name}.logprobs: is on {logprobs.device}, the ids are on {ids.device}; move them to one device")
    check_positive(f"{name}.temperature", temperature)
    if logprobs.device.type == "cpu" and logprobs.numel() and bool((logprobs > 1e-3).any()):  # on a device the CPU would wait
        raise ValueError(f"{name}.logprobs: got {float(logprobs.max()):.4g}, expected log-probabilities, at most 0; not logits")


@dataclass(frozen=True, eq=False)
class TopKLogprobs:
    """The teacher's log-probabilities of its most likely ids, or of ids that the student chose, at the student's positions.

    Entries need no order. An entry is missing if its id is negative or beyond the vocabulary, or its log-probability is -9999
    or less. An id that comes twice counts once, with the larger log-probability: K + 1 columns, the sampled token and the top
    K, may be passed unchanged. `eos_ids` merges only ids that are on the list.

    On a CPU a NaN at a valid position is an error. On a device the check would make the CPU wait: there the position is not
    valid and is counted in `metrics["n_teacher_nonfinite"]`; with `check_finite=True` it is an error.
    Two more gaps are treated like NaN: with `of="student"` a missing entry, and with a loss on the sampled token a token that
    is not listed.

    Args:
        ids: (..., K) int64 or int32.
        logprobs: (..., K) log q, q over the whole vocabulary; at most 0.
        temperature: The server's temperature; must be the call's.
        of: "teacher": the teacher's own top-K. "student": ids that the student chose. A loss on the student's list uses the
            `top_k` ids of these that the student finds most likely. So the sampled token may be sent as one more id.
    Raises:
        ValueError: shapes or devices that do not fit each other, or numbers that are no log-probabilities (checked on a CPU).
        TypeError: ids that are not integers, log-probabilities that are not floating point.
    """

    ids: Tensor
    logprobs: Tensor
    temperature: float = 1.0
    of: str = "teacher"

    def __post_init__(self) -> None:
        take_plain(self, "temperature")
        _check("TopKLogprobs", self.ids, self.logprobs, self.temperature)
        if self.of not in ("teacher", "student"):
            raise ValueError(f"TopKLogprobs.of: got {self.of!r}, expected 'teacher' or 'student'")
        if self.ids.dim() < 1 or self.ids.shape[-1] < 1:
            raise ValueError(f"TopKLogprobs.ids: got shape {tuple(self.ids.shape)}, expected (..., K) with K >= 1")

    @property
    def positions(self) -> torch.Size:
        return self.ids.shape[:-1]


@dataclass(frozen=True, eq=False)
class SampledLogprobs:
    """The teacher's log-probability of the token that the student sampled, at the positions of the student.

    Missing entries and NaN are as in `TopKLogprobs`; a position with a missing token is not valid.

    Args:
        ids: (...) the token that each position predicts.
        logprobs: (...) log q of this token, q over the whole vocabulary; at most 0.
        temperature: The server's temperature; must be the call's.
    Raises: as `TopKLogprobs`.
    """

    ids: Tensor
    logprobs: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        take_plain(self, "temperature")
        _check("SampledLogprobs", self.ids, self.logprobs, self.temperature)

    @property
    def positions(self) -> torch.Size:
        return self.ids.shape


SparseTeacher = TopKLogprobs | SampledLogprobs


class TeacherLists(NamedTuple):
    """A sparse teacher as backends read it: a list per flattened position, in the order (log q descending, id ascending).

    With `with_token` the sampled token is one more, last column; a teacher of sampled tokens has this column alone.
    """

    ids: Tensor  # (N, K) int64, LAST_ID where missing
    logprobs: Tensor  # (N, K), -inf where missing; NaN at a position that is not valid
    with_token: bool = False
    chosen_by_student: bool = False  # whether the student chose the ids

    @staticmethod
    def of(
        teacher: SparseTeacher,
        vocab_size: int,
        dtype: torch.dtype,
        merged: tuple[int, ...] = (),
        *,
        longest: int | None = None,
        workspace: Workspace | None = None,
    ) -> TeacherLists:
        """The teacher's lists in order, each id once, `merged` ids as the first of them.

        Args:
            longest: Keep only this many first entries of a list; None: all.
            workspace: Scratch memory: lists are sorted in groups that fit; None: all at once.
        """
        n, is_sampled = teacher.positions.numel(), isinstance(teacher, SampledLogprobs)
        chosen_by_student = isinstance(teacher, TopKLogprobs) and teacher.of == "student"
        columns = [x.detach().unsqueeze(-1) if is_sampled else x.detach() for x in (teacher.ids, teacher.logprobs)]
        width, device = columns[0].shape[-1], teacher.ids.device
        length = width if longest is None else min(longest, width)
        size = max(1, n) if workspace is None else workspace.count(SORTED_BYTES * width)
        ids = torch.empty((n, length), dtype=torch.long, device=device)
        logprobs = torch.empty((n, length), dtype=dtype, device=device)
        for group in chunks(n, size):
            rows = torch.arange(group.start, group.stop, device=device)
            group_ids, group_logprobs = (take_rows(x, rows) for x in columns)
            ordered = TeacherLists._in_order(group_ids, group_logprobs, vocab_size, dtype, merged)
            ids[group], logprobs[group] = (x[:, :length] for x in ordered)
            if chosen_by_student:
                missing = _is_missing(group_ids, group_logprobs, vocab_size).any(1, keepdim=True)
                logprobs[group] = logprobs[group].masked_fill_(missing, torch.nan)
        return TeacherLists(ids, logprobs, is_sampled, chosen_by_student)

    @staticmethod
    def _in_order(
        ids: Tensor, logprobs: Tensor, vocab_size: int, dtype: torch.dtype, merged: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """The ids and log-probabilities of n whole lists, both (n, K), in order."""
        missing = _is_missing(ids, logprobs, vocab_size)
        ids, logprobs = ids.long(), logprobs.to(dtype)
        ids, logprobs = _by_id(ids.masked_fill(missing, LAST_ID), logprobs.masked_fill(missing, -torch.inf))
        repeated = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
        ids, logprobs = ids.masked_fill(repeated, LAST_ID), logprobs.masked_fill(repeated, -torch.inf)
        if merged:
            is_merged = torch.stack([ids == merged_id for merged_id in merged]).any(0)  # no tensor of ids: it would be copied
            total = torch.logsumexp(logprobs.masked_fill(~is_merged, -torch.inf), 1, keepdim=True)
            first = is_merged & (is_merged.cumsum(1) == 1)
            logprobs = torch.where(first, total, logprobs.masked_fill(is_merged, -torch.inf))
            ids = torch.where(first, merged[0], ids.masked_fill(is_merged, LAST_ID))
            ids, logprobs = _by_id(ids, logprobs)
        order = torch.sort(logprobs, dim=1, descending=True, stable=True).indices
        return ids.gather(1, order), logprobs.gather(1, order)

    def take(self, rows: Tensor | slice) -> TeacherLists:
        return self._replace(ids=self.ids[rows], logprobs=self.logprobs[rows])

    def top(self, k: int) -> TeacherLists:
        """The first k entries of the lists without the token's column; the token alone where there is no list."""
        if self.is_sampled:
            return self
        k = min(k, self.listed_ids.shape[1])
        return self._replace(ids=self.ids[:, :k], logprobs=self.logprobs[:, :k], with_token=False)

    @property
    def listed_ids(self) -> Tensor:
        """(N, K) ids without the token's column."""
        return self.ids[:, :-1] if self.with_token else self.ids

    @property
    def is_sampled(self) -> bool:
        """Whether the teacher sent the sampled tokens' log-probabilities alone."""
        return self.with_token and self.ids.shape[1] == 1

    @property
    def tokens(self) -> Tensor | None:
        """(N,) the sampled tokens; None: not known."""
        return self.ids[:, -1] if self.with_token else None

    @property
    def valid(self) -> Tensor:
        """(n,) bool: an entry is listed, and no entry is NaN."""
        return torch.isfinite(self.logprobs).any(1) & ~self.logprobs.isnan().any(1)


def check_lists(teacher: SparseTeacher, logprobs: Tensor, valid: Tensor | None) -> None:
    """Refuse NaN at valid positions of a call's (N, K) `logprobs`: sent, or in place of what was not. Checked only on a CPU."""
    if not may_look(logprobs):
        return
    bad = logprobs.isnan().any(1).view(teacher.positions)
    bad = bad if valid is None else bad & valid
    if not bool(bad.any()):
        return
    first, name = tuple(bad.nonzero()[0].tolist()), type(teacher).__name__
    place = f"at position {first} ({int(bad.sum())} such positions)"
    if bool((teacher.logprobs[first].isnan() & (teacher.ids[first] >= 0)).any()):
        raise ValueError(f"{name}.logprobs: got NaN {place}, expected log-probabilities, -inf or id -1 where one is missing")
    id_logprobs = logprobs[:, : teacher.ids.shape[-1]].view(*teacher.positions, -1)[first]
    if getattr(teacher, "of", "teacher") == "student" and bool(id_logprobs.isnan().all()):
        raise ValueError(
            f"{name}: got a missing entry {place}, expected a log-probability of every id, because the student chose the ids "
            "(of='student')"
        )
    raise ValueError(
        f"{name}: got no log-probability of the sampled token {place}, which the divergence, the selector or the weighting "
        "reads; ask the server for it and pass K + 1 columns, the top K and the token"
    )


def plus_tokens(ids: Tensor, logprobs: Tensor, tokens: Tensor, merged: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(N, K + 1) lists with the (N,) sampled tokens as their last column; NaN at positions that do not list the token."""
    tokens = tokens.long().unsqueeze(1)
    for merged_id in merged[1:]:
        tokens = tokens.masked_fill(tokens == merged_id, merged[0])
    listed = ids == tokens
    log_q = logprobs.masked_fill(~listed, -torch.inf).amax(1, keepdim=True)
    logprobs = torch.cat((logprobs, log_q), 1).masked_fill_(~listed.any(1, keepdim=True), torch.nan)
    return torch.cat((ids, tokens), 1), logprobs


def _is_missing(ids: Tensor, logprobs: Tensor, vocab_size: int) -> Tensor:
    return (ids < 0) | (ids >= vocab_size) | is_missing(logprobs)


def is_missing(logprobs: Tensor) -> Tensor:
    """Bool: -9999 or less. torch rounds the limit to the tensor's dtype, as the server's number was rounded (bf16: -9984)."""
    return logprobs <= MISSING_LOGPROB


def tail(log_q: Tensor) -> Tensor:
    """(M,) log(1 - sum q) by log1mexp: the mass off the list of a sparse teacher."""
    listed = torch.logsumexp(log_q, 1).clamp_max(0)
    # log(1 - e^a): where e^a is near 1 by expm1, else by log1p (Maechler 2012).
    near = torch.log(-torch.expm1(listed))
    return torch.where(listed > -math.log(2), near, torch.log1p(-listed.exp())).clamp_min(LEAST_TAIL)


def _by_id(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """The lists in the order (id ascending, log-probability descending)."""
    best = torch.sort(logprobs, dim=1, descending=True, stable=True).indices
    ids, logprobs = ids.gather(1, best), logprobs.gather(1, best)
    order = torch.sort(ids, dim=1, stable=True).indices
    return ids.gather(1, order), logprobs.gather(1, order)


def _kind(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
