"""Teachers that send log-probabilities instead of logits: their own top-K, or those of the sampled tokens.

  TopKLogprobs(ids, logprobs)      what vLLM (`prompt_logprobs`), SGLang (`input_top_logprobs`) and verl's teacher return
  SampledLogprobs(ids, logprobs)   what slime, SkyRL, prime-rl and tinker return: log q(y) of the rollout tokens y

  An entry of -9999 or less is missing: vLLM's servers write it for -inf, which JSON does not know.
  What they know is a lower bound on C: sum of q over S ∩ T (arXiv 2605.26844 eq. 17), and D with q = 0 off T.

Not here: statistics made of lists (backends/shared/two_lists.py), the losses they allow (divergences/support.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import check_layout, check_positive, may_look, take_plain
from opd_ops.inputs.sources import take_rows
from opd_ops.inputs.workspace import Workspace

LAST_ID = 2**31 - 1  # of a missing entry: beyond every vocabulary, and sorts behind every id of equal logit

MISSING_LOGPROB = -9999.0  # this or less is a missing entry

# What a list may leave out at least: fp32 log-probabilities do not say more, and their sum may exceed 1.
LEAST_TAIL = math.log(torch.finfo(torch.float32).eps)

SORTED_BYTES = 64  # per entry of lists that are put in order: ids and log-probabilities, sorted, and the orders between


def _check(name: str, ids: object, logprobs: object, temperature: object) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}.ids: got {_kind(ids)}, expected an int32 or int64 tensor")
    if not isinstance(logprobs, Tensor) or not logprobs.is_floating_point():
        raise TypeError(f"{name}.logprobs: got {_kind(logprobs)}, expected a floating-point tensor")
    for which, tensor in (("ids", ids), ("logprobs", logprobs)):
        check_layout(f"{name}.{which}", tensor)
    if ids.shape != logprobs.shape:
        raise ValueError(f"{name}.logprobs: got shape {tuple(logprobs.shape)}, expected that of the ids, {tuple(ids.shape)}")
    if ids.device != logprobs.device:
        raise ValueError(f"{name}.logprobs: is on {logprobs.device}, the ids are on {ids.device}; move them to one device")
    check_positive(f"{name}.temperature", temperature)
    if logprobs.device.type == "cpu" and logprobs.numel() and bool((logprobs > 1e-3).any()):  # elsewhere looking would wait
        raise ValueError(f"{name}.logprobs: got {float(logprobs.max()):.4g}, expected log-probabilities, at most 0; not logits")


@dataclass(frozen=True, eq=False)
class TopKLogprobs:
    """The teacher's log-probabilities of its most likely tokens, at the positions of the student.

    Rows need no order. An entry is missing where its id is negative or beyond the vocabulary, or its log-probability -9999 or
    less. An id that comes twice counts once, as the likelier, so that K + 1 columns, the sampled token's and the top K, may be
    passed as they come. Of ids that are merged (`eos_ids`) those that are not listed count among the rest.

    A NaN at a valid position is an error of the call on a CPU. Elsewhere looking would wait for the device: the position is not
    valid then, counted in `metrics["n_teacher_nonfinite"]`, and an error with `check_finite=True`.

    Args:
        ids: (..., K) int64 or int32.
        logprobs: (..., K) log q, q over the whole vocabulary; at most 0.
        temperature: At which the server computed them; must be the call's.
    Raises:
        ValueError: shapes or devices that do not fit each other, or numbers that are no log-probabilities (looked at on a CPU).
        TypeError: ids that are not integers, log-probabilities that are not floating point.
    """

    ids: Tensor
    logprobs: Tensor
    temperature: float = 1.0

    def __post_init__(self) -> None:
        take_plain(self, "temperature")
        _check("TopKLogprobs", self.ids, self.logprobs, self.temperature)
        if self.ids.dim() < 1 or self.ids.shape[-1] < 1:
            raise ValueError(f"TopKLogprobs.ids: got shape {tuple(self.ids.shape)}, expected (..., K) with K >= 1")

    @property
    def positions(self) -> torch.Size:
        return self.ids.shape[:-1]


@dataclass(frozen=True, eq=False)
class SampledLogprobs:
    """The teacher's log-probability of the token that the student sampled, at the positions of the student.

    What is missing and what NaN does is as in `TopKLogprobs`; a position whose token is missing is not valid.

    Args:
        ids: (...) the token that each position predicts.
        logprobs: (...) log q of it, q over the whole vocabulary; at most 0.
        temperature: At which the server computed them; must be the call's.
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
    """A sparse teacher as backends read it: one list per flattened position, (logit descending, id ascending)."""

    ids: Tensor  # (N, K) int64, LAST_ID where missing
    logprobs: Tensor  # (N, K), -inf where missing
    is_sampled: bool

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
        """In order, each id once, `merged` ids as their first.

        Args:
            longest: How many entries of a list the call reads, the first ones; None: all.
            workspace: Scratch of the sort, a group of lists at a time; None: all at once.
        """
        n, is_sampled = teacher.positions.numel(), isinstance(teacher, SampledLogprobs)
        given = [x.detach().unsqueeze(-1) if is_sampled else x.detach() for x in (teacher.ids, teacher.logprobs)]
        width, device = given[0].shape[-1], teacher.ids.device
        kept = width if longest is None else min(longest, width)
        size = max(1, n) if workspace is None else workspace.count(SORTED_BYTES * width)
        ids = torch.empty((n, kept), dtype=torch.long, device=device)
        logprobs = torch.empty((n, kept), dtype=dtype, device=device)
        for start in range(0, n, size):
            group = slice(start, min(start + size, n))
            of_ids, of_logprobs = (take_rows(x, torch.arange(group.start, group.stop, device=device)) for x in given)
            ordered = TeacherLists._in_order(of_ids, of_logprobs, vocab_size, dtype, merged)
            ids[group], logprobs[group] = (x[:, :kept] for x in ordered)
        return TeacherLists(ids, logprobs, is_sampled)

    @staticmethod
    def _in_order(
        ids: Tensor, logprobs: Tensor, vocab_size: int, dtype: torch.dtype, merged: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Some whole lists, (n, K) each."""
        missing = (ids < 0) | (ids >= vocab_size) | is_missing(logprobs)
        ids, logprobs = ids.long(), logprobs.to(dtype)
        ids, logprobs = _by_id(ids.masked_fill(missing, LAST_ID), logprobs.masked_fill(missing, -torch.inf))
        again = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
        ids, logprobs = ids.masked_fill(again, LAST_ID), logprobs.masked_fill(again, -torch.inf)
        if merged:
            inside = torch.stack([ids == x for x in merged]).any(0)  # no tensor of them: a copy from the host
            total = torch.logsumexp(logprobs.masked_fill(~inside, -torch.inf), 1, keepdim=True)
            first = inside & (inside.cumsum(1) == 1)
            logprobs = torch.where(first, total, logprobs.masked_fill(inside, -torch.inf))
            ids = torch.where(first, merged[0], ids.masked_fill(inside, LAST_ID))
            ids, logprobs = _by_id(ids, logprobs)
        order = torch.sort(logprobs, dim=1, descending=True, stable=True).indices
        return ids.gather(1, order), logprobs.gather(1, order)

    def take(self, rows: Tensor | slice) -> TeacherLists:
        return self._replace(ids=self.ids[rows], logprobs=self.logprobs[rows])

    def top(self, k: int) -> TeacherLists:
        return self._replace(ids=self.ids[:, :k], logprobs=self.logprobs[:, :k])

    @property
    def valid(self) -> Tensor:
        """(n,) bool: something is listed, and it is a number."""
        return torch.isfinite(self.logprobs).any(1) & ~self.logprobs.isnan().any(1)


def check_lists(teacher: SparseTeacher, logprobs: Tensor, valid: Tensor | None) -> None:
    """No NaN among the (N, K) log-probabilities at valid positions, where looking costs nothing."""
    if not may_look(logprobs):
        return
    bad = logprobs.isnan().any(1).view(teacher.positions)
    bad = bad if valid is None else bad & valid
    if bool(bad.any()):
        raise ValueError(
            f"{type(teacher).__name__}.logprobs: got NaN at position {tuple(bad.nonzero()[0].tolist())} ({int(bad.sum())} such "
            "positions), expected log-probabilities, -inf or id -1 where one is missing"
        )


def is_missing(logprobs: Tensor) -> Tensor:
    """Bool: -9999 or less, in the tensor's own dtype: torch rounds the number as the server's was (bf16: -9984)."""
    return logprobs <= MISSING_LOGPROB


def tail(log_q: Tensor) -> Tensor:
    """(M,) log(1 - sum q) by log1mexp: of a list that is all there is to know."""
    listed = torch.logsumexp(log_q, 1).clamp_max(0)
    # log(1 - e^a): where e^a is near 1 by expm1, else by log1p (Maechler 2012).
    near = torch.log(-torch.expm1(listed))
    return torch.where(listed > -math.log(2), near, torch.log1p(-listed.exp())).clamp_min(LEAST_TAIL)


def _by_id(ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """In the order (id ascending, log-probability descending)."""
    best = torch.sort(logprobs, dim=1, descending=True, stable=True).indices
    ids, logprobs = ids.gather(1, best), logprobs.gather(1, best)
    order = torch.sort(ids, dim=1, stable=True).indices
    return ids.gather(1, order), logprobs.gather(1, order)


def _kind(value: object) -> str:
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
