"""The streamed backend, `backend="torch"`: exact statistics and gradients on any device in bounded memory.

  score:    tiles of rows x blocks of the vocabulary, one sweep of both heads          2 head-matmul units
  loss:     the selected rows alone, M = rho N                                         2 rho to 4 rho
  (one unit = 2 N V D FLOP; selection/stats.py and divergences/ define the statistics and losses)

Memory of size V is one block at a time. Where ranks share out the vocabulary, each rank sweeps its part.
Not here: the score pass (score.py), one model alone (one_model.py), the loss (loss.py).
"""

from __future__ import annotations

from opd_ops.backends.interface import Backend
from opd_ops.backends.streamed import loss, one_model, score
from opd_ops.inputs.sources import Source


class Streamed(Backend):
    """Plain torch, block by block of the vocabulary."""

    name = "torch"
    token_stats = staticmethod(score.token_stats)
    own_stats = staticmethod(one_model.own_stats)
    selected_loss = staticmethod(loss.selected_loss)

    def makes_ier(self, student: Source) -> bool:
        return student.transform.shard is None


STREAMED = Streamed()
