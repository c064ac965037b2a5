"""A server that fails during a run: all processes stop at the same place, and unsaved updates are saved before the run ends.

No gradient has shown yet whether the last weights are good (blow_up.py does that a step later), so older checkpoints are kept.
Not here: how long a request is sent again before that (servers/retries.py), the files (checkpoints.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.teacher_lists import TopKLogprobs
from opd_ops.trainer.checkpoints import Checkpoints, complete, step_of
from opd_ops.trainer.rollouts import Rollouts
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.teachers import Teacher

if TYPE_CHECKING:
    from accelerate import Accelerator


class JointTeacher:
    """A teacher that fails in every process if it fails in one. Otherwise the other processes would wait for that one forever.

    All processes must call it equally often.
    """

    def __init__(self, teacher: Teacher, accelerator: Accelerator) -> None:
        self.teacher, self.accelerator = teacher, accelerator

    def __call__(self, rollouts: Rollouts) -> LinearHead | TopKLogprobs:
        failure: ServerError | None = None
        try:
            lists = self.teacher(rollouts)
        except ServerError as error:
            failure = error
        n_failures = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if self.accelerator.reduce(n_failures, reduction="sum").item():
            raise failure or ServerError("the teacher's server failed in another process, whose output has its error")
        return lists


def save_after_failure(checkpoints: Checkpoints, done: int, contexts: Rollouts | None, failure: ServerError) -> ServerError:
    """Save the weights after `done` updates, unless a checkpoint has them. Returns the error that ends the run."""
    if done == 0:
        return ServerError(f"{failure}. No update was made yet: pass resume to begin anew {failure.resume_when}")
    if not any(step_of(path) == done for path in complete(checkpoints.folder)):
        checkpoints.save(done, contexts, prunes=False)
    return ServerError(f"{failure}. Saved after step {done}: pass resume to continue {failure.resume_when}")
