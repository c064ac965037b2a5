"""The public names of `opd_ops`, one explicit list: selective on-policy distillation of language models.

  loss = 1/|M| sum_{t in M} KL(student || teacher) over the few positions M worth training on   (loss.py)

Not here: the trainer, the diagnostics, the integrations. Importing `opd_ops` needs only torch.
"""

from opd_ops.backends.mapped import mapped_teacher
from opd_ops.call.reduce import SelectiveOPDOutput, TokenLosses
from opd_ops.divergences import (
    JSD,
    Divergence,
    EntropyAware,
    ForwardKL,
    ImportanceWeighted,
    LocalSupport,
    Power,
    ReverseKL,
    SampledToken,
    SkewKL,
    TailAware,
    TopK,
    TopKForwardKL,
    TotalVariation,
)
from opd_ops.estimates.communication import Collective, Communication, estimate_communication
from opd_ops.estimates.compute import Estimate, estimate
from opd_ops.inputs.ensembles import Extrapolated, Mixture, Routed
from opd_ops.inputs.float8 import Float8Rows
from opd_ops.inputs.id_map import IdMap, MappedTeacher
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.rollout import RolloutRecorder, StudentStats
from opd_ops.inputs.teacher_lists import SampledLogprobs, TopKLogprobs
from opd_ops.loss import SelectiveOPDLoss, selective_opd_loss, selective_opd_token_losses
from opd_ops.scoring import score_positions, select_positions
from opd_ops.selection.sampled import Dial, LogRatio
from opd_ops.selection.selectors import IER, Multinomial, Released, Selector
from opd_ops.selection.stats import TokenStats
from opd_ops.selection.weighting import IW, FiRe, Reading
from opd_ops.settings import Settings

__version__ = "0.2.0"

__all__ = [
    "IER",
    "IW",
    "JSD",
    "Collective",
    "Communication",
    "Dial",
    "Divergence",
    "EntropyAware",
    "Estimate",
    "Extrapolated",
    "FiRe",
    "Float8Rows",
    "ForwardKL",
    "IdMap",
    "ImportanceWeighted",
    "LinearHead",
    "LocalSupport",
    "LogRatio",
    "MappedTeacher",
    "Mixture",
    "Multinomial",
    "Power",
    "Reading",
    "Released",
    "ReverseKL",
    "RolloutRecorder",
    "Routed",
    "SampledLogprobs",
    "SampledToken",
    "SelectiveOPDLoss",
    "SelectiveOPDOutput",
    "Selector",
    "Settings",
    "SkewKL",
    "StudentStats",
    "TailAware",
    "TokenLosses",
    "TokenStats",
    "TopK",
    "TopKForwardKL",
    "TopKLogprobs",
    "TotalVariation",
    "estimate",
    "estimate_communication",
    "mapped_teacher",
    "score_positions",
    "select_positions",
    "selective_opd_loss",
    "selective_opd_token_losses",
]
