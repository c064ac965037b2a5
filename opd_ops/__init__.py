# The public names of `opd_ops`, one explicit list: selective on-policy distillation of language models.
#
#   loss = 1/|M| sum_{t in M} KL(student || teacher) over the few positions M worth training on   (loss.py)
#
# Not here: anything else; importing this needs torch alone.
from opd_ops.accounting import Estimate, estimate
from opd_ops.divergences import Divergence, ForwardKL, ReverseKL
from opd_ops.float8 import Float8Rows
from opd_ops.inputs import LinearHead
from opd_ops.loss import SelectiveOPDOutput, selective_opd_loss
from opd_ops.rollout import RolloutRecorder, StudentStats
from opd_ops.scoring import score_positions, select_positions
from opd_ops.selectors import Multinomial, Selector
from opd_ops.stats import TokenStats

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "Estimate",
    "Float8Rows",
    "ForwardKL",
    "LinearHead",
    "Multinomial",
    "ReverseKL",
    "RolloutRecorder",
    "SelectiveOPDOutput",
    "Selector",
    "StudentStats",
    "TokenStats",
    "estimate",
    "score_positions",
    "select_positions",
    "selective_opd_loss",
]
