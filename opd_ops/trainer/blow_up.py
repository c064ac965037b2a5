"""Blow-ups: a loss, a gradient or weights that are not finite end the run, and such weights are not saved.

  The weights after n updates are good if the loss and the gradient of step n + 1, computed with them, are finite.

So a checkpoint is written one step late, after that check (loop.py). Only the checkpoints of a SIGTERM and of the run's end
cannot wait. All processes decide alike, because every checked number is a sum over the processes.
Not here: the files (checkpoints.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from opd_ops.trainer.checkpoints import Checkpoints, complete, step_of

if TYPE_CHECKING:
    from accelerate import Accelerator


def are_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether all trained weights are finite, in every process."""
    n_bad = torch.zeros((), device=accelerator.device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = getattr(parameter, "_local_tensor", parameter)  # this process's shard, if the parameter is sharded
            n_bad += (~local.isfinite()).any()
    return bool(accelerator.reduce(n_bad, reduction="sum").item() == 0)


def blow_up(checkpoints: Checkpoints, done: int, what: str) -> FloatingPointError:
    """The error about the weights after `done` updates: `what` happened, and advice that `check_resume` allows.

    A checkpoint of these weights would blow up again, so it is renamed and no run continues from it.
    """
    paths = complete(checkpoints.folder)
    older, same = ([path for path in paths if (step_of(path) < done) is is_older] for is_older in (True, False))
    renamed = [f"{path} holds these weights and is now {checkpoints.set_aside(path, 'not-finite').name}" for path in same]
    if done == 0:
        advice = "No update was made yet: change student, teacher or dtype, and pass resume to begin anew"
    else:
        good = f"{older[-1]} is good" if older else "There is no good checkpoint"
        how = "continue from it" if older else "begin anew"
        advice = f"{good}: lower learning_rate, or set a smaller max_grad_norm, and pass resume to {how}"
    return FloatingPointError(". ".join([what, *renamed, advice]))
