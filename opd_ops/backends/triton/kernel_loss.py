"""A divergence by kernels: losses of some rows of two tables, what their gradient needs of each row, and the gradient itself.

  first     score.py's columns; jsd.py's sums; the list, both models on it and off it (support.py, rest.py)
  gradient  reverse_kl.py, forward_kl.py or jsd.py, then rest.py on top, for what a list adds
  (losses and gradients are those of divergences/; those on a list are differentiated on (M, K) tensors, shared/list_losses.py)

The rows may be cut into blocks of the vocabulary in the gradient: all that it needs of the whole row is in `Found`.
Not here: which rows, tiles and memory (backend.py, heads_loss.py), divergences without a kernel (streamed/loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.device import transform
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.jsd import jsd_fwd, jsd_grad
from opd_kernels.rest import rest_fwd, rest_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import Score, score_fwd
from opd_kernels.support import support_fwd
from torch import Tensor

from opd_ops.backends.shared.list_losses import evaluate
from opd_ops.backends.triton.launches import launch_options
from opd_ops.divergences import JSD, Divergence, ForwardKL, OnSupport, ReverseKL, Support
from opd_ops.inputs.sources import Transform, finish_logits
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists, tail

GRADIENTS: dict[type, Callable[..., None]] = {ReverseKL: reverse_kl_grad, ForwardKL: forward_kl_grad}
MAX_LIST = 128
LIST_BYTES = 320  # per row and id: ids, both models' logits in fp64, their gradients and autograd's temporaries


def refusal(divergence: Divergence) -> str | None:
    """Why no kernel computes it, or None."""
    if divergence.whole is not None and type(divergence.whole) not in (*GRADIENTS, JSD):
        return f"{type(divergence.whole).__name__} has no kernel"
    if divergence.support is not None and divergence.support.length > MAX_LIST:
        return f"its list has {divergence.support.length} ids, kernels take at most {MAX_LIST}"
    return None


BY_ROW = frozenset(
    {"top", "at_top", "ids", "values", "coef"}
)  # of `Found`: the others are columns, one entry a row along the last dimension


def logsumexp(model: Transform, ref: Tensor, log2z: Tensor) -> Tensor:
    """fp64, of a kernel's normalisers, with the digits that one fp32 number would lose."""
    return ref.double().mul_(multiplier(model)).add_(log2z.double()).mul_(math.log(2))


def multiplier(model: Transform) -> float:
    """What kernels multiply stored logits by, after a soft-cap, to have them in bits."""
    found: float = transform(model.scale, model.softcap, model.temperature).k
    return found


class Found(NamedTuple):
    """What the gradient needs of each row; None: of a part that the divergence does not have."""

    columns: Tensor | None  # (12, M) of score.py
    sums: Tensor | None  # (2, M) of jsd.py
    top: Tensor | None  # (M,) int32, the student's most likely id; None: the rows are a part of a shared vocabulary
    at_top: Tensor | None  # (M, 1) the gradient there, once whole rows of it were made
    ids: Tensor | None  # (M, K) int32, ascending
    values: Tensor | None  # (M, K) d loss / d logit at the ids
    rest: Tensor | None  # (2, M) of rest.py
    coef: Tensor | None  # (M,) d loss / d rest

    def rows(self, part: slice) -> Found:
        """Those of some of the rows."""
        cut = {name: None if x is None else x[part] if name in BY_ROW else x[:, part].contiguous() for name, x in self.named()}
        return Found(**cut)

    def named(self) -> list[tuple[str, Tensor | None]]:
        return list(zip(self._fields, self, strict=True))

    @staticmethod
    def joined(parts: list[Found]) -> Found:
        """Those of all rows, from those of consecutive ones."""
        columns = zip(Found._fields, zip(*parts, strict=True), strict=True)
        return Found(*(None if x[0] is None else torch.cat(x, 0 if name in BY_ROW else 1) for name, x in columns))


@dataclass(frozen=True)
class KernelLoss:
    """A divergence between two models whose stored logits have these transforms; no teacher: it sends lists."""

    divergence: Divergence
    student: Transform
    teacher: Transform | None

    @property
    def list_bytes(self) -> int:
        """Scratch per row for the list."""
        return 0 if self.divergence.support is None else LIST_BYTES * self.divergence.support.length

    @property
    def _options(self) -> dict[str, Any]:
        return launch_options(self.student, self.teacher or self.student)

    def _of_one(self, model: Transform, **changed: int) -> dict[str, Any]:
        found = {
            "vocab_size": model.vocab_size,
            "temperature": model.temperature,
            "scale": model.scale,
            "softcap": model.softcap,
        }
        return {**found, **changed}

    def first(
        self, s: Tensor, t: Tensor | None, rows: Tensor | None, *, tokens: Tensor | None, listed: TeacherLists | None
    ) -> tuple[Tensor, Found]:
        """(M,) losses and what their gradient needs, of tables of stored logits.

        Args:
            s, t: (N, V) of student and teacher; t None for a teacher that sends lists.
            rows: (M,) rows of the tables; None: all.
            tokens, listed: what the student sampled at the rows, and the teacher's lists of them, if the divergence asks.
        """
        score, columns, sums, top = None, None, None, None
        losses = torch.zeros(len(s) if rows is None else len(rows), dtype=torch.float32, device=s.device)
        if t is not None:
            score = score_fwd(s, t, rows, **self._options)
            columns = score.columns
        whole = self.divergence.whole
        if whole is not None:
            assert score is not None
            top = argmax_fwd(s, rows, score, vocab_size=self.student.vocab_size)
        if isinstance(whole, JSD):
            assert t is not None
            sums = jsd_fwd(s, t, rows, columns, beta=float(whole.beta), **self._options)
            losses = losses + sums[0]
        elif whole is not None:
            assert whole.column is not None
            losses = losses + getattr(score, whole.column)
        found = Found(columns, sums, top, None, None, None, None, None)
        if self.divergence.support is not None:
            of_list, found = self._listed(self.divergence.support, s, t, rows, score, tokens, listed, found)
            losses = losses + of_list.float()
        return losses, found

    def _listed(
        self,
        part: OnSupport,
        s: Tensor,
        t: Tensor | None,
        rows: Tensor | None,
        score: Score | None,
        tokens: Tensor | None,
        listed: TeacherLists | None,
        found: Found,
    ) -> tuple[Tensor, Found]:
        log_tail = entropy = losses = torch.zeros(len(s) if rows is None else len(rows), dtype=torch.float64, device=s.device)
        if listed is not None:
            ids, log_q = listed.top(part.length).ids, listed.top(part.length).logprobs.double()
            x, log_tail = self._at(self.student, s, rows, ids), tail(log_q)
        else:
            assert t is not None
            assert score is not None
            assert self.teacher is not None
            lse = logsumexp(self.teacher, score.t_ref, score.t_log2z)
            if part.of_tokens:
                assert tokens is not None
                ids = tokens.unsqueeze(1)
                x, u = self._at(self.student, s, rows, ids), self._at(self.teacher, t, rows, ids)
            else:
                lists = support_fwd(s, t, rows, score, top_k=part.length, **self._options)
                ids, (x, u) = lists.t_ids.long(), lists.logits[:, 2:].unbind(1)
                absent = u == -math.inf  # an entry that the teacher masks is not on its list
                ids, x = ids.masked_fill(absent, LAST_ID), x.masked_fill(absent, -math.inf)
            log_q, entropy = u.double() - lse.unsqueeze(1), score.teacher_entropy.double()
        ascending, order = torch.sort(ids, dim=1)
        # A missing entry of a list that kernels read is past every vocabulary.
        inside = ascending.masked_fill((ascending < 0) | (ascending >= self.student.vocab_size), LAST_ID).sort(1).values.int()
        if part.reads_teacher_rest and t is not None and self.teacher is not None:
            of_teacher = rest_fwd(t, rows, inside, **self._of_one(self.teacher))
            log_tail = logsumexp(self.teacher, *of_teacher) - lse
        if part.reads_rest:
            rest = rest_fwd(s, rows, inside, **self._of_one(self.student))
            beside = logsumexp(self.student, *rest)
        else:
            rest, beside = torch.zeros((2, len(ids)), dtype=torch.float32, device=s.device), losses
        terms = evaluate(part, Support(x.double(), beside, log_q, log_tail, entropy), ids, torch.float32)
        coef = torch.zeros(len(ids), dtype=torch.float32, device=s.device) if terms.drest is None else terms.drest
        return terms.losses, found._replace(ids=inside, values=terms.dx.gather(1, order), rest=rest, coef=coef)

    def _at(self, model: Transform, table: Tensor, rows: Tensor | None, ids: Tensor) -> Tensor:
        """(M, K) finished logits at the ids, -inf where missing."""
        missing = (ids < 0) | (ids >= model.vocab_size)
        inside = ids.masked_fill(missing, 0)
        x = table.gather(1, inside) if rows is None else table[rows.unsqueeze(1), inside]
        return finish_logits(x.to(torch.float32, copy=True), model, table.dtype).masked_fill(missing, -math.inf)

    @property
    def overwrites_student(self) -> bool:
        """Whether the gradient may be written over the student's logits: with two parts the second still reads them."""
        return self.divergence.whole is None or self.divergence.support is None

    def gradient(
        self,
        s: Tensor,
        t: Tensor | None,
        rows: Tensor | None,
        weights: Tensor,
        found: Found,
        *,
        out: Tensor,
        first_id: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """Write the gradient of the losses weighted into `out` at the rows.

        `first_id`, `vocab_size`: of a block of the vocabulary, if the tables are one.
        """
        whole, width = self.divergence.whole, vocab_size or self.student.vocab_size
        if whole is not None:
            assert t is not None
            top = found.top if width == self.student.vocab_size else None
            options = {**self._options, "vocab_size": width, "top": top, "out": out}
            if isinstance(whole, JSD):
                jsd_grad(s, t, rows, weights, found.columns, found.sums, beta=float(whole.beta), **options)
            else:
                GRADIENTS[type(whole)](s, t, rows, weights, found.columns, **options)
        if found.ids is not None:
            assert found.values is not None
            assert found.coef is not None
            rest_grad(
                s,
                rows,
                found.ids,
                (found.values * weights.unsqueeze(1)).masked_fill_((weights == 0).unsqueeze(1), 0),
                (found.coef * weights).masked_fill_(weights == 0, 0),
                found.rest,
                out=out,
                add=whole is not None,
                first_id=first_id,
                **self._of_one(self.student, vocab_size=width),
            )
        if found.top is not None and found.at_top is not None:  # a block cannot sum the others
            place = found.top.long().unsqueeze(1) - first_id
            inside = (place >= 0) & (place < width)
            place = place.clamp(0, width - 1)
            out.scatter_(1, place, torch.where(inside, found.at_top, out.gather(1, place)))
