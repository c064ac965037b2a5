"""`Contexts`: frozen answers with their statistics, the input of every diagnostic.

  A context is an answer that the student wrote before training. Each position has the statistics of student and teacher, and
  KL(q || p_after) of a trained student (arXiv 2605.26844, section 3 and appendix C).

Not here: how models are run to get the statistics (measure.py), the diagnostics (study.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.selection.stats import TokenStats


@dataclass(frozen=True, eq=False)
class Contexts:
    """B frozen answers of at most L tokens. All tensors are kept on the CPU, divergences and entropies in nats.

    A position is measured if it is valid and all its KLs are finite: both directions before training, and the one after. A
    position with an infinite KL has no gain, and the loss never selects it; `n_left_out` is the number of these positions.

    Args:
        before: columns (B, L), from `score_positions(student, teacher, mask=...)` before training.
        after_forward_kl: (B, L) KL(q || p_after) of the trained student; None: no trained student, so no gains.
        tokens: tokens[b][i] is the text of position (b, i); at least up to the last valid position.
        prompts: the text of each answer's prompt.
        clusters: (B,) integers; answers with the same number are resampled together. None: answers with the same prompt are.
    Raises:
        ValueError: shapes or lengths do not fit; a NaN at a valid position, which a finite model does not give; no measured
            position at all.
    """

    before: TokenStats
    after_forward_kl: Tensor | None
    tokens: Sequence[Sequence[str]]
    prompts: Sequence[str]
    clusters: Tensor | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the dataclass is frozen
        columns = {name: x.detach().cpu() for name, x in self.before._asdict().items() if x is not None}
        set_(self, "before", TokenStats(**columns))
        if self.after_forward_kl is not None:
            set_(self, "after_forward_kl", self.after_forward_kl.detach().cpu())
        self._check_shapes()
        self._check_finite()
        set_(self, "clusters", self._cluster_numbers().unique(return_inverse=True)[1])
        if not bool(self.measured.any()):
            raise ValueError(
                f"Contexts: got {int(self.before.valid.sum())} valid positions, none with finite KLs, expected at least one"
            )

    @property
    def measured(self) -> Tensor:
        """(B, L) bool: valid, and every KL finite."""
        measured = self.before.valid & self.before.forward_kl.isfinite() & self.before.reverse_kl.isfinite()
        return measured if self.after_forward_kl is None else measured & self.after_forward_kl.isfinite()

    @property
    def n_left_out(self) -> int:
        """Number of valid positions with an infinite KL."""
        return int((self.before.valid & ~self.measured).sum())

    @property
    def n_clusters(self) -> int:
        assert self.clusters is not None
        return int(self.clusters.max()) + 1

    @property
    def stats(self) -> TokenStats:
        """The statistics before training, with `valid` = measured: selectors and normalisers are fitted on these."""
        return self.before._replace(valid=self.measured)

    @property
    def measured_clusters(self) -> Tensor:
        """(n_measured,) the cluster of each measured position, numbered from 0."""
        assert self.clusters is not None
        clusters: Tensor = self.clusters.unsqueeze(1).expand(self.measured.shape)[self.measured]
        return clusters

    def _cluster_numbers(self) -> Tensor:
        if self.clusters is not None:
            return self.clusters.cpu()
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in self.prompts])

    def _check_shapes(self) -> None:
        shape = self.before.valid.shape
        if len(shape) != 2:
            raise ValueError(f"before: got columns of shape {tuple(shape)}, expected (B, L)")
        after, clusters = self.after_forward_kl, self.clusters
        if after is not None and after.shape != shape:
            raise ValueError(f"after_forward_kl: got shape {tuple(after.shape)}, expected that of before, {tuple(shape)}")
        if clusters is not None and (clusters.shape != shape[:1] or clusters.is_floating_point()):
            form = f"{clusters.dtype} of shape {tuple(clusters.shape)}"
            raise ValueError(f"clusters: got {form}, expected one integer per answer, ({shape[0]},)")
        for name, rows in (("tokens", self.tokens), ("prompts", self.prompts)):
            if len(rows) != shape[0]:
                raise ValueError(f"{name}: got {len(rows)}, expected one per answer, {shape[0]}")
        for row, valid in enumerate(self.before.valid):
            needed = int(valid.nonzero().max()) + 1 if bool(valid.any()) else 0
            if not needed <= len(self.tokens[row]) <= shape[1]:
                raise ValueError(f"tokens[{row}]: got {len(self.tokens[row])} texts, expected {needed} to {shape[1]}")

    def _check_finite(self) -> None:
        columns = {f"before.{name}": getattr(self.before, name) for name in ("student_entropy", "reverse_kl", "forward_kl")}
        columns["after_forward_kl"] = self.after_forward_kl
        for name, column in columns.items():
            n_nan = 0 if column is None else int((column.isnan() & self.before.valid).sum())
            if n_nan:
                raise ValueError(
                    f"{name}: got NaN at {n_nan} valid positions, expected numbers: the student's logits are not finite there, "
                    "or it was scored with student_stats, which do not hold the KLs"
                )
