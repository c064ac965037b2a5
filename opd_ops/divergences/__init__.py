"""The losses for the selected positions, by name or as instances with parameters.

Not here: the interface of a divergence (base.py), the divergences (whole.py, bounded.py, top_k.py, support.py, sampled.py,
composite.py).
"""

from __future__ import annotations

from opd_ops.divergences.base import (
    SUPPORTS,
    Divergence,
    OnSupport,
    Summed,
    Support,
    WholeRow,
    weighted_sum,
    without_infinite,
)
from opd_ops.divergences.bounded import Power, SkewKL
from opd_ops.divergences.composite import EntropyAware, ImportanceWeighted
from opd_ops.divergences.sampled import SampledToken
from opd_ops.divergences.support import TopKForwardKL
from opd_ops.divergences.top_k import LocalSupport, TailAware, TopK
from opd_ops.divergences.whole import JSD, ForwardKL, ReverseKL, TotalVariation, is_column

__all__ = [
    "DIVERGENCES",
    "JSD",
    "SUPPORTS",
    "Divergence",
    "EntropyAware",
    "ForwardKL",
    "ImportanceWeighted",
    "LocalSupport",
    "OnSupport",
    "Power",
    "ReverseKL",
    "SampledToken",
    "SkewKL",
    "Summed",
    "Support",
    "TailAware",
    "TopK",
    "TopKForwardKL",
    "TotalVariation",
    "WholeRow",
    "is_column",
    "resolve_divergence",
    "weighted_sum",
    "without_infinite",
]

DIVERGENCES: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        ReverseKL(),
        ForwardKL(),
        JSD(),
        TotalVariation(),
        SkewKL(),
        Power(),
        LocalSupport(),
        TailAware(),
        TopKForwardKL(),
        SampledToken(),
        EntropyAware(),
    )
}


def resolve_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence with this name and default parameters; an instance is returned unchanged. Errors list the names."""
    if isinstance(divergence, Divergence):
        whole = divergence.whole
        if whole is not None and whole.column is None and not isinstance(whole, Summed):
            raise TypeError(f"divergence: got {type(whole).__name__}, which says nowhere what it sums; make it a `Summed`")
        return divergence
    names = ", ".join(sorted(DIVERGENCES))
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence: got {getattr(divergence, '__name__', type(divergence).__name__)}, expected an instance, like "
            f"JSD(beta=0.3), or one of: {names}"
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: got {divergence!r}, expected one of: {names}")
    return DIVERGENCES[divergence]
