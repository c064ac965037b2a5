"""`Contexts`: what is known of frozen answers, the material of every diagnostic.

  A context is an answer that the student wrote before training, position by position: the statistics of student and teacher
  there, and KL(q || p_after) of a trained student at the same positions (arXiv 2605.26844, section 3 and appendix C).

Not here: how models are run to fill them (cli.py), what is computed from them (study.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_ops.selection.stats import TokenStats


@dataclass(frozen=True, eq=False)
class Contexts:
    """B frozen answers of at most L tokens; everything is kept on the CPU, divergences and entropies in nats.

    A position is measured where it is valid and its KLs, both directions and before and after, are finite: an infinite one
    has no gain, and the loss never selects it. How many are left out is `n_left_out`.

    Args:
        before: columns (B, L), from `score_positions(student, teacher, mask=...)` before training.
        after_forward_kl: (B, L) KL(q || p_after) of the trained student; None: there is none, and so there are no gains.
        tokens: the text of each token, tokens[b][i] that of position (b, i), up to the last valid one at least.
        prompts: the text that each answer answers.
        clusters: (B,) integers; answers with the same number are resampled together. None: those with the same prompt are.
    Raises:
        ValueError: shapes or lengths that do not fit; a NaN at a valid position, which no finite model gives; no measured
            position at all.
    """

    before: TokenStats
    after_forward_kl: Tensor | None
    tokens: Sequence[Sequence[str]]
    prompts: Sequence[str]
    clusters: Tensor | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # frozen: these are the fields' final form
        columns = {name: x.detach().cpu() for name, x in self.before._asdict().items() if x is not None}
        set_(self, "before", TokenStats(**columns))
        if self.after_forward_kl is not None:
            set_(self, "after_forward_kl", self.after_forward_kl.detach().cpu())
        self._check_shapes()
        self._check_finite()
        set_(self, "clusters", self._numbered().unique(return_inverse=True)[1])
        if not bool(self.measured.any()):
            raise ValueError(
                f"Contexts: got {int(self.before.valid.sum())} valid positions, none with finite KLs, expected at least one"
            )

    @property
    def measured(self) -> Tensor:
        """(B, L) bool: valid, and every KL finite."""
        found = self.before.valid & self.before.forward_kl.isfinite() & self.before.reverse_kl.isfinite()
        return found if self.after_forward_kl is None else found & self.after_forward_kl.isfinite()

    @property
    def n_left_out(self) -> int:
        """Valid positions with an infinite KL."""
        return int((self.before.valid & ~self.measured).sum())

    @property
    def n_clusters(self) -> int:
        assert self.clusters is not None
        return int(self.clusters.max()) + 1

    @property
    def stats(self) -> TokenStats:
        """The statistics before, valid where measured: what selectors and normalisers are fitted on."""
        return self.before._replace(valid=self.measured)

    @property
    def measured_clusters(self) -> Tensor:
        """(n_measured,) the cluster of each measured position, numbered from 0."""
        assert self.clusters is not None
        found: Tensor = self.clusters.unsqueeze(1).expand(self.measured.shape)[self.measured]
        return found

    def _numbered(self) -> Tensor:
        if self.clusters is not None:
            return self.clusters.cpu()
        number: dict[str, int] = {}
        return torch.tensor([number.setdefault(prompt, len(number)) for prompt in self.prompts])

    def _check_shapes(self) -> None:
        shape = self.before.valid.shape
        if len(shape) != 2:
            raise ValueError(f"before: got columns of shape {tuple(shape)}, expected (B, L)")
        after, clusters = self.after_forward_kl, self.clusters
        if after is not None and after.shape != shape:
            raise ValueError(f"after_forward_kl: got shape {tuple(after.shape)}, expected that of before, {tuple(shape)}")
        if clusters is not None and (clusters.shape != shape[:1] or clusters.is_floating_point()):
            came = f"{clusters.dtype} of shape {tuple(clusters.shape)}"
            raise ValueError(f"clusters: got {came}, expected one integer per answer, ({shape[0]},)")
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
            bad = 0 if column is None else int((column.isnan() & self.before.valid).sum())
            if bad:
                raise ValueError(
                    f"{name}: got NaN at {bad} valid positions, expected numbers: the student's logits are not finite there, "
                    "or it was scored with student_stats, which do not hold the KLs"
                )
