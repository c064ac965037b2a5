"""The prompts of a step, and the seeds of its random numbers: functions of the step alone, so there is no state to save.

  micro-batch g of a step, g = 0 ... G - 1 over all processes: prompts [(step G + g) B, (step G + g + 1) B) of an endless
  sequence of shuffled passes; seed = hash of (run's seed, purpose, step, g)

So a resumed run draws the same as an uninterrupted one, and two processes draw the same as one process with twice the
micro-batches. Not here: the text of prompts (prompts.py), sampling (rollouts.py).
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """A seed below 2**63 for these parts, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def prompt_indices(
    step: int, micro_batch: int, *, n_micro_batches: int, batch_size: int, n_prompts: int, seed: int
) -> list[int]:
    """The prompts of one micro-batch, as indices below `n_prompts`. Each pass over all prompts has its own shuffle."""
    first = (step * n_micro_batches + micro_batch) * batch_size
    passes: dict[int, list[int]] = {}
    indices = []
    for place in range(first, first + batch_size):
        number, within = divmod(place, n_prompts)
        if number not in passes:
            generator = torch.Generator().manual_seed(seed_of(seed, "order", number))
            passes[number] = torch.randperm(n_prompts, generator=generator).tolist()
        indices.append(passes[number][within])
    return indices
