"""A divergence by kernels on two tables of stored logits: the losses of some rows, and the gradient of these losses.

  first     score.py's columns; sums.py's; both models on the list and off it (support.py, off_list.py)
  gradient  gradient.py with the functions of the divergence; then off_list.py adds the gradient of the part on a list
  (divergences/ defines the losses; shared/list_losses.py differentiates a part on a list)

`first` returns the losses and `KernelConstants`: all numbers of a whole row that the gradient reads. So the gradient may be
computed block by block of the vocabulary.
Not here: which rows, tiles and memory (dense_loss.py, heads_loss.py), divergences without a kernel (streamed/loss.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.device import transform
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.jsd import jsd_fwd, jsd_grad
from opd_kernels.off_list import off_list_fwd, off_list_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import Score, score_fwd
from opd_kernels.skew_kl import forward_skew_fwd, forward_skew_grad, reverse_skew_fwd, reverse_skew_grad
from opd_kernels.support import support_fwd
from torch import Tensor

from opd_ops.backends.shared.list_ids import best_of_sent, list_ids, sent_logprobs, without_masked
from opd_ops.backends.shared.list_losses import evaluate
from opd_ops.backends.triton.launches import launch_options
from opd_ops.divergences import JSD, SUPPORTS, Divergence, ForwardKL, OnSupport, ReverseKL, SkewKL, Support, WholeRow
from opd_ops.inputs.sources import Transform, finish_logits
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists, tail

GRADIENTS: dict[type, Callable[..., None]] = {ReverseKL: reverse_kl_grad, ForwardKL: forward_kl_grad}
MAX_LIST = 128
LIST_BYTES = 320  # per row and id: ids, both models' logits in fp64, their gradients and autograd's temporaries


def refusal(divergence: Divergence) -> str | None:
    """Why no kernel computes it, or None."""
    whole = divergence.whole
    if whole is not None and type(whole) not in GRADIENTS and _summed(whole) is None:
        clipped = " with entry_clip" if isinstance(whole, JSD) else ""
        return f"{type(whole).__name__}{clipped} has no kernel"
    if divergence.on_support is not None and divergence.on_support.length > MAX_LIST:
        return f"its list has {divergence.on_support.length} ids, kernels take at most {MAX_LIST}"
    return None


def _summed(whole: WholeRow) -> tuple[Callable[..., Tensor], Callable[..., None], float] | None:
    """The kernel of a divergence's sums, that of its gradient, and the teacher's share of its mixture; None: it has none."""
    if type(whole) is JSD and whole.entry_clip is None:
        return jsd_fwd, jsd_grad, float(whole.beta)
    if type(whole) is not SkewKL:
        return None
    if whole.direction == "reverse":
        return reverse_skew_fwd, reverse_skew_grad, 1 - float(whole.alpha)
    return forward_skew_fwd, forward_skew_grad, float(whole.alpha)


# Fields of `KernelConstants` whose first dimension is the row; in the others the row is the last dimension.
BY_ROW = frozenset({"top", "elsewhere", "at_top", "ids", "dx", "d_off_list"})


def logsumexp(model: Transform, ref: Tensor, log2z: Tensor) -> Tensor:
    """(M,) fp64 log-sum-exp from a kernel's two normalisers, with the digits that one fp32 number would lose."""
    return ref.double().mul_(multiplier(model)).add_(log2z.double()).mul_(math.log(2))


def multiplier(model: Transform) -> float:
    """k: kernels multiply stored logits by it, after a soft-cap, and so have logits in bits."""
    k: float = transform(model.scale, model.softcap, model.temperature).k
    return k


class KernelConstants(NamedTuple):
    """The numbers of each row that the gradient reads; None: the divergence has no such part."""

    columns: Tensor | None  # (12, M) of score.py
    sums: Tensor | None  # (2, M) of sums.py
    top: Tensor | None  # (M,) int32, the student's most likely id; -1: in another rank's part of the vocabulary
    elsewhere: Tensor | None  # (M,) sum of d loss / d logit over the other ranks' ids; None: there are none
    at_top: Tensor | None  # (M, 1) the gradient at `top`, known once whole rows of it were computed
    ids: Tensor | None  # (M, K) int32, ascending
    dx: Tensor | None  # (M, K) d loss / d logit at the ids
    off_list: Tensor | None  # (2, M) of off_list.py: the student's log-sum-exp off the ids
    d_off_list: Tensor | None  # (M,) d loss / d that log-sum-exp

    @staticmethod
    def from_columns(
        columns: Tensor | None, top: Tensor | None, *, sums: Tensor | None = None, elsewhere: Tensor | None = None
    ) -> KernelConstants:
        """The constants of a divergence over the whole row."""
        return KernelConstants(columns, sums, top, elsewhere, None, None, None, None, None)

    def rows(self, group: slice) -> KernelConstants:
        """The constants of some of the rows."""
        taken = {
            name: None if x is None else x[group] if name in BY_ROW else x[:, group].contiguous() for name, x in self.named()
        }
        return KernelConstants(**taken)

    def named(self) -> list[tuple[str, Tensor | None]]:
        return list(zip(self._fields, self, strict=True))

    @staticmethod
    def joined(parts: list[KernelConstants]) -> KernelConstants:
        """The constants of all rows, from the constants of consecutive groups of rows."""
        columns = zip(KernelConstants._fields, zip(*parts, strict=True), strict=True)
        return KernelConstants(*(None if x[0] is None else torch.cat(x, 0 if name in BY_ROW else 1) for name, x in columns))


@dataclass(frozen=True)
class KernelLoss:
    """A divergence between two models; the transforms turn stored logits into logits. teacher None: the teacher sends lists."""

    divergence: Divergence
    student: Transform
    teacher: Transform | None

    @property
    def list_bytes(self) -> int:
        """Scratch bytes per row for the list."""
        return 0 if self.divergence.on_support is None else LIST_BYTES * self.divergence.on_support.length

    @property
    def _options(self) -> dict[str, float | int | None]:
        return launch_options(self.student, self.teacher or self.student)

    def _model_options(self, model: Transform, **changed: int) -> dict[str, float | int | None]:
        """The keywords that launchers of one model take."""
        options = {
            "vocab_size": model.vocab_size,
            "temperature": model.temperature,
            "scale": model.scale,
            "softcap": model.softcap,
        }
        return {**options, **changed}

    def first(
        self, s: Tensor, t: Tensor | None, rows: Tensor | None, *, tokens: Tensor | None, listed: TeacherLists | None
    ) -> tuple[Tensor, KernelConstants]:
        """(M,) losses and the constants of their gradient, from tables of stored logits.

        Args:
            s, t: (N, V) stored logits of student and teacher; t None: the teacher sends lists.
            rows: (M,) rows of the tables; None: all.
            tokens: (M,) the student's sampled tokens, if the divergence reads them.
            listed: The teacher's lists at the rows, if it sends lists.
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
        summed = None if whole is None else _summed(whole)
        if summed is not None:
            sums = summed[0](s, t, rows, columns, beta=summed[2], **self._options)
            losses = losses + sums[0]
        elif whole is not None:
            assert whole.column is not None
            losses = losses + getattr(score, whole.column)
        constants = KernelConstants.from_columns(columns, top, sums=sums)
        if self.divergence.on_support is not None:
            list_losses, constants = self._listed(self.divergence.on_support, s, t, rows, score, tokens, listed, constants)
            losses = losses + list_losses.float()
        return losses, constants

    def _listed(
        self,
        divergence: OnSupport,
        s: Tensor,
        t: Tensor | None,
        rows: Tensor | None,
        score: Score | None,
        tokens: Tensor | None,
        listed: TeacherLists | None,
        constants: KernelConstants,
    ) -> tuple[Tensor, KernelConstants]:
        """(M,) fp64 losses of the part on a list, and the constants with this part's fields set."""
        log_tail = entropy = losses = torch.zeros(len(s) if rows is None else len(rows), dtype=torch.float64, device=s.device)
        s_ids, t_ids = self._lists(divergence, s, t, rows, score, listed)
        if listed is not None:
            ids = list_ids(divergence, s_ids, listed.top(divergence.top_k).ids, listed.tokens)
            log_q = sent_logprobs(listed, ids).double()
            log_tail = tail(log_q)
        else:
            assert t is not None
            assert score is not None
            assert self.teacher is not None
            ids = list_ids(divergence, s_ids, t_ids, tokens)
            lse = logsumexp(self.teacher, score.t_ref, score.t_log2z)
            # The kernel rounds a logit of 1,000 to fewer digits than a log-probability needs: they are read again.
            log_q, entropy = self._at(self.teacher, t, rows, ids).double() - lse.unsqueeze(1), score.teacher_entropy.double()
        x = self._at(self.student, s, rows, ids)
        ascending, order = torch.sort(ids, dim=1)
        # Kernels read a missing entry as an id past every vocabulary, at the end of the list.
        missing = (ascending < 0) | (ascending >= self.student.vocab_size)
        kernel_ids = ascending.masked_fill(missing, LAST_ID).sort(1).values.int()
        if divergence.reads_teacher_off_list and t is not None and self.teacher is not None:
            teacher_off_list = off_list_fwd(t, rows, kernel_ids, **self._model_options(self.teacher))
            log_tail = logsumexp(self.teacher, *teacher_off_list) - lse
        if divergence.reads_off_list:
            off_list = off_list_fwd(s, rows, kernel_ids, **self._model_options(self.student))
            off_list_lse = logsumexp(self.student, *off_list)
        else:
            off_list, off_list_lse = torch.zeros((2, len(ids)), dtype=torch.float32, device=s.device), losses
        reverse_kl = None if score is None else score.reverse_kl
        support = Support(x.double(), off_list_lse, log_q, log_tail, entropy, reverse_kl)
        terms = evaluate(divergence, support, ids, torch.float32)
        d_off_list = terms.d_off_list
        if d_off_list is None:
            d_off_list = torch.zeros(len(ids), dtype=torch.float32, device=s.device)
        dx = terms.dx.gather(1, order)
        return terms.losses, constants._replace(ids=kernel_ids, dx=dx, off_list=off_list, d_off_list=d_off_list)

    def _lists(
        self,
        divergence: OnSupport,
        s: Tensor,
        t: Tensor | None,
        rows: Tensor | None,
        score: Score | None,
        listed: TeacherLists | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(M, K) ids of the student's list and of the teacher's; None: not read, or sent by the teacher."""
        k, models = divergence.top_k, SUPPORTS[divergence.support]
        if "student" in models and listed is not None and listed.chosen_by_student:
            sent = listed.listed_ids
            return best_of_sent(sent, self._at(self.student, s, rows, sent), k), None
        if not models or (t is None and "student" not in models):
            return None, None
        if t is None or score is None:  # the student is passed twice
            t, score = s, score_fwd(s, s, rows, **self._options)
        lists = support_fwd(s, t, rows, score, top_k=k, **self._options)
        return without_masked(lists.s_ids.long(), lists.logits[:, 0]), without_masked(lists.t_ids.long(), lists.logits[:, 3])

    def _at(self, model: Transform, table: Tensor, rows: Tensor | None, ids: Tensor) -> Tensor:
        """(M, K) finished logits at the ids, -inf where missing."""
        missing = (ids < 0) | (ids >= model.vocab_size)
        inside = ids.masked_fill(missing, 0)
        x = table.gather(1, inside) if rows is None else table[rows.unsqueeze(1), inside]
        return finish_logits(x.to(torch.float32, copy=True), model, table.dtype).masked_fill(missing, -math.inf)

    @property
    def overwrites_student(self) -> bool:
        """Whether the gradient may overwrite the student's logits: of two parts, the second still reads them."""
        return self.divergence.whole is None or self.divergence.on_support is None

    def gradient(
        self,
        s: Tensor,
        t: Tensor | None,
        rows: Tensor | None,
        weights: Tensor,
        constants: KernelConstants,
        *,
        out: Tensor,
        first_id: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """Write the gradient of the weighted losses into `out` at the rows.

        `first_id`, `vocab_size`: first id and width of the block, if the tables are a block of the vocabulary.
        """
        whole, width = self.divergence.whole, vocab_size or self.student.vocab_size
        if whole is not None:
            assert t is not None
            top = constants.top if width == self.student.vocab_size else None
            options = {**self._options, "vocab_size": width, "top": top, "out": out}
            summed = _summed(whole)
            if summed is not None:
                summed[1](s, t, rows, weights, constants.columns, constants.sums, beta=summed[2], **options)
            else:
                GRADIENTS[type(whole)](s, t, rows, weights, constants.columns, elsewhere=constants.elsewhere, **options)
        if constants.ids is not None:
            assert constants.dx is not None
            assert constants.d_off_list is not None
            off_list_grad(
                s,
                rows,
                constants.ids,
                (constants.dx * weights.unsqueeze(1)).masked_fill_((weights == 0).unsqueeze(1), 0),
                (constants.d_off_list * weights).masked_fill_(weights == 0, 0),
                constants.off_list,
                out=out,
                add=whole is not None,
                first_id=first_id,
                **self._model_options(self.student, vocab_size=width),
            )
        if constants.top is not None and constants.at_top is not None:  # in a block, the sum over all other ids is unknown
            place = constants.top.long().unsqueeze(1) - first_id
            inside = (place >= 0) & (place < width)
            place = place.clamp(0, width - 1)
            out.scatter_(1, place, torch.where(inside, constants.at_top, out.gather(1, place)))
