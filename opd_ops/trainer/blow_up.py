"""Blow-ups: a loss, a gradient or weights that are not finite end the run, and nothing of them is saved.

  The weights after n updates are good if the loss and the gradient of step n + 1, which are made with them, are finite.

So a checkpoint is written one step late, when that is known (loop.py); only those of a SIGTERM and of the end cannot wait.
All processes decide alike, since every number that is looked at is a sum over them.
Not here: the files (checkpoints.py).
"""

from __future__ import annotations

from typing import Any

import torch

from opd_ops.trainer.checkpoints import Checkpoints, complete, step_of


def are_finite(model: Any, accelerator: Any) -> bool:
    """Whether the trained weights are, in every process."""
    bad = torch.zeros((), device=accelerator.device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = getattr(parameter, "_local_tensor", parameter)  # this process's shard of a sharded one
            bad += (~local.isfinite()).any()
    return bool(accelerator.reduce(bad, reduction="sum").item() == 0)


def blow_up(checkpoints: Checkpoints, done: int, what: str) -> FloatingPointError:
    """The error about the weights after `done` updates: `what` was seen, and what to do, which `check_resume` lets pass.

    A checkpoint of those weights would give the same again, so it is set aside.
    """
    paths = complete(checkpoints.folder)
    older, same = ([path for path in paths if (step_of(path) < done) is is_older] for is_older in (True, False))
    said = [what, *(f"{path} holds these weights and is now {checkpoints.set_aside(path, 'not-finite').name}" for path in same)]
    if done == 0:
        advice = "No update was made yet: change student, teacher or dtype, and pass resume to begin anew"
    else:
        good = f"{older[-1]} is good" if older else "There is no good checkpoint"
        goes_on = "continue from it" if older else "begin anew"
        advice = f"{good}: lower learning_rate, or set a smaller max_grad_norm, and pass resume to {goes_on}"
    return FloatingPointError(". ".join([*said, advice]))
