"""`Batch`: the tensors of one call apart from the two models; (...) is the positions' shape.

Not here: the valid positions that follow from them (positions.py), settings of a run (opd_ops/settings.py).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from opd_ops.inputs.rollout import StudentStats


class Batch(NamedTuple):
    """The tensors as the caller passed them, unchecked."""

    mask: Tensor | None = None  # (...) non-zero: valid
    weights: Tensor | None = None  # (...) factors of the losses
    labels: Tensor | None = None  # (...) unshifted
    shift_labels: Tensor | None = None  # (...) shifted
    tokens: Tensor | None = None  # (...) the token that each position predicts
    cu_seqlens: Tensor | None = None  # (n_sequences + 1,)
    student_stats: StudentStats | None = None
    num_items_in_batch: Tensor | float | None = None
    old_logprobs: Tensor | None = None  # (...) log-probabilities of the tokens when they were sampled
