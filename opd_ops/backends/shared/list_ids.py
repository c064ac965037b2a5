"""Which ids form the list of a divergence: made of both models' top-K lists and the sampled token, each id once.

  teacher T;  student S;  union S and then T, width 2 K;  intersection: S, where T has the id;  token: none
  with_token: the sampled token y is the last id, missing where it is on the list anyway

A missing entry is LAST_ID (inputs/teacher_lists.py). An id that a model masks is not on that model's list.
Not here: the models' lists (eager.py, streamed/list_losses.py, triton/kernel_loss.py), the losses (divergences/).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ops.backends.shared.supports import matches
from opd_ops.divergences import OnSupport
from opd_ops.inputs.order import best_places
from opd_ops.inputs.teacher_lists import LAST_ID, TeacherLists


def list_ids(divergence: OnSupport, student: Tensor | None, teacher: Tensor | None, tokens: Tensor | None) -> Tensor:
    """(M, length) ids. `student`, `teacher`: (M, K) ids of each model's list; `tokens`: (M,); None: not read."""
    ids = student if divergence.support == "student" else teacher
    if divergence.support in ("union", "intersection"):
        assert student is not None
        assert teacher is not None
        ids = student.masked_fill(~matches(student, teacher)[0], LAST_ID)
        if divergence.support == "union":
            ids = torch.cat((student, teacher.masked_fill(matches(teacher, student)[0], LAST_ID)), 1)
    if divergence.with_token:
        assert tokens is not None
        token = tokens.long().unsqueeze(1)
        if divergence.support == "token":
            return token
        assert ids is not None
        ids = torch.cat((ids, token.masked_fill((ids == token).any(1, keepdim=True), LAST_ID)), 1)
    assert ids is not None
    return ids


def without_masked(ids: Tensor, logits: Tensor) -> Tensor:
    """A model's list without the ids that it masks."""
    return ids.masked_fill(logits == -torch.inf, LAST_ID)


def best_of_sent(ids: Tensor, logits: Tensor, k: int) -> Tensor:
    """(M, k) the student's list among the (M, K') ids that a server scored for it, from the student's logits there."""
    best = best_places(logits, ids, min(k, ids.shape[1]))
    return without_masked(ids.gather(1, best), logits.gather(1, best))


def sent_logprobs(listed: TeacherLists, ids: Tensor) -> Tensor:
    """(M, K) log q at the ids, from the (M, K') lists that the teacher sent; -inf where missing or not sent."""
    is_sent, place = matches(ids, listed.ids)
    return torch.where(is_sent, listed.logprobs.gather(1, place), -torch.inf)
