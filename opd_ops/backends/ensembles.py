"""Teachers of several models on any backend: each position by its own model (`Routed`), and the normalisers of a mean
(`Mixture` of kind "arithmetic"). inputs/ensembles.py has the equations.

  Routed: the rows of each model are one call of the backend; losses add up, columns return to the rows' order.
  The CPU waits for the device once a model: the number of a model's rows is data.

Not here: mixed logits (shared/tiles.py, shared/logits_at.py, eager.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd_ops.backends.interface import Backend, Choice, Cut, WeightedRows
from opd_ops.divergences import Divergence
from opd_ops.inputs.sources import Source, compute_dtype
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, Scoring, TokenStats


def routed_models(teacher: Source | TeacherLists) -> tuple[Source | TeacherLists, ...]:
    """The models among which `Routed` chooses; another teacher itself."""
    return teacher.others if isinstance(teacher, Source) and teacher.routes is not None else (teacher,)


def with_normalisers(backend: Backend, teacher: Source, rows: Tensor, workspace: Workspace) -> Source:
    """The teacher with the log-sum-exp at the rows of each model in an arithmetic mixture: one more sweep of these models."""
    if teacher.routes is not None:
        parts = zip(teacher.others, (rows[teacher.routes[rows] == i] for i in range(len(teacher.others))), strict=True)
        return teacher._replace(others=tuple(with_normalisers(backend, model, own, workspace) for model, own in parts))
    mixing = teacher.transform.mixing
    if mixing is None or mixing.kind != "arithmetic":
        return teacher
    columns, dtype, alone = [], compute_dtype(teacher), replace(teacher.transform, mixing=None, merged=())
    for model in (teacher._replace(transform=alone, others=()), *teacher.others):
        own = backend.own_stats(model.detach(), rows, Scoring(1, workspace, torch.float32))
        column = torch.zeros(teacher.shape.numel(), dtype=dtype, device=rows.device)
        columns.append(column.index_copy_(0, rows, own.logsumexp.to(dtype)))
    others = zip(teacher.others, columns[1:], strict=True)
    return teacher._replace(logsumexp=columns[0], others=tuple(other._replace(logsumexp=x) for other, x in others))


class RoutedBackend(Backend):
    """Another backend, called with the rows of one model at a time."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name = backend, backend.name  # type: ignore[misc]
        self.drops_weightless_rows = backend.drops_weightless_rows  # type: ignore[misc]

    def scores_selected_rows(self, student: Source, teacher: Source | TeacherLists) -> bool:
        return all(self.backend.scores_selected_rows(student, model) for model in routed_models(teacher))

    def choose(self, scores: Tensor, valid: Tensor, infinite: Tensor, cut: Cut) -> Choice | None:
        return self.backend.choose(scores, valid, infinite, cut)

    def token_stats(self, student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> TokenStats:
        parts = [(x, self.backend.token_stats(student, model, rows[x], scoring)) for model, x in _parts(teacher, rows)]
        names = [name for name, column in parts[0][1]._asdict().items() if column is not None]
        return TokenStats(**{name: _in_order([(x, getattr(stats, name)) for x, stats in parts]) for name in names})

    def own_stats(self, source: Source, rows: Tensor, scoring: Scoring) -> OwnStats:
        if source.routes is None:  # the student
            return self.backend.own_stats(source, rows, scoring)
        parts = [(x, self.backend.own_stats(model, rows[x], scoring)) for model, x in _parts(source, rows)]
        return OwnStats(*(_in_order([(x, stats[i]) for x, stats in parts]) for i in range(len(OwnStats._fields))))

    def selected_loss(
        self,
        student: Source,
        teacher: Source | TeacherLists,
        selected: WeightedRows,
        divergence: Divergence,
        workspace: Workspace,
        *,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(teacher, Source)
        totals, losses = [], []
        for model, x in _parts(teacher, selected.rows):
            total, model_losses = self.backend.selected_loss(
                student, model, selected.take(x), divergence, workspace, inplace=inplace
            )
            totals.append(total)
            losses.append((x, model_losses))
        return torch.stack(totals).sum(), _in_order(losses)


def _parts(teacher: Source, rows: Tensor) -> Iterator[tuple[Source, Tensor]]:
    """Each model of the (n,) rows, and the places among them where it is; without a row the first model."""
    assert teacher.routes is not None
    routes = teacher.routes[rows]
    for i, model in enumerate(teacher.others):
        places = (routes == i).nonzero().squeeze(1)
        if len(places) or (not len(rows) and not i):
            yield model, places


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The columns of n rows, from parts of them: their places, 0 ... n - 1 in all, and their columns."""
    return torch.cat([column for _, column in parts])[torch.cat([places for places, _ in parts]).argsort()]
