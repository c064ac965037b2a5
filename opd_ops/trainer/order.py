"""Which prompts a step takes, and the seeds of what it draws: functions of the step alone, so that there is no state to save.

  micro-batch g of a step, g = 0 ... G - 1 over all processes: prompts [(step G + g) B, (step G + g + 1) B) of an endless
  sequence of shuffled passes; seed = hash of (run's seed, step, g, what for)

So a resumed run draws what the first one would have, and two processes draw what one with twice the micro-batches does.
Not here: the prompts (prompts.py), the drawing (rollouts.py).
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
    """The prompts of one micro-batch, as indices below `n_prompts`; each pass over them is shuffled anew."""
    first = (step * n_micro_batches + micro_batch) * batch_size
    passes: dict[int, list[int]] = {}
    found = []
    for place in range(first, first + batch_size):
        number, within = divmod(place, n_prompts)
        if number not in passes:
            generator = torch.Generator().manual_seed(seed_of(seed, "order", number))
            passes[number] = torch.randperm(n_prompts, generator=generator).tolist()
        found.append(passes[number][within])
    return found
