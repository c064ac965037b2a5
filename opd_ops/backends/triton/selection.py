"""Selection and totals by kernels: converts the tensors of a call for the kernels, and the kernels' outputs back.

  statistics -> scores (place.py) -> selected positions and their list (choose.py) -> sums and counts (totals.py)
  Scores and selected positions equal those of opd_ops/selection to the bit.

Not here: calls that torch.compile traces (traced.py), kernels (opd_kernels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opd_kernels.choose import choose_fwd
from opd_kernels.place import FITS, STATS, place_fwd
from opd_kernels.totals import COUNTS, NUMBERS, totals_fwd
from torch import Tensor

from opd_ops.backends.interface import Choice, Placed
from opd_ops.backends.triton.launches import on_device, parse_columns
from opd_ops.selection.stats import TokenStats

SELECTORS = frozenset(FITS)


def launch_scores(
    table: Tensor, rows: Tensor | None, n: int, unmasked: Tensor | None, selector: str, loss: str | None, optional: str
) -> tuple[Tensor, ...]:
    """(11 + E, n) statistics, (2, n) flags (valid, infinite) and (1, n) scores of n positions; (2, n) with keep_scores.

    `table`: (16 + E, rows) statistics, E optional ones: `optional`, "a,b". `unmasked`: (n,) uint8, or None.
    """
    names = sorted(parse_columns(optional))
    with on_device(table.device):
        return tuple(place_fwd(table, rows, n, unmasked, selector=selector, loss=loss, optional=names))


def placed(outputs: tuple[Tensor, ...], shape: torch.Size, optional: Sequence[str]) -> Placed:
    """The outputs of `launch_scores`, of the positions' shape. `optional`: the names of the optional statistics."""
    columns, flags, scores = outputs
    valid, infinite = (flag.view(shape).view(torch.bool) for flag in flags.unbind(0))
    named = dict(zip((*STATS, *optional), (column.view(shape) for column in columns.unbind(0)), strict=True))
    own_scores, *keep_scores = (column.view(shape) for column in scores.unbind(0))
    return Placed(own_scores, TokenStats(valid=valid, **named), infinite, columns, *keep_scores)


def launch_choice(
    scores: Tensor,
    valid: Tensor,
    infinite: Tensor,
    numerator: int,
    denominator: int,
    n_rows: int,
    length: int,
    bounds: Tensor | None,
    places: Tensor | None,
    keep_scores: Tensor | None,
) -> tuple[Tensor, ...]:
    """(N,) uint8 selected positions, (n_rows,) rows and (3,) counts, of flat fp32 scores, uint8 flags and int64 places.

    `length`: 0: one budget for all, if there are no `bounds`.
    """
    with on_device(scores.device):
        return tuple(
            choose_fwd(
                scores,
                valid,
                infinite,
                numerator=numerator,
                denominator=denominator,
                n_rows=n_rows,
                length=length or None,
                bounds=None if bounds is None else bounds.contiguous(),
                places=places,
                keep_scores=keep_scores,
            )
        )


def bytes_of(flags: Tensor) -> Tensor:
    """Bools as kernels take them, flat."""
    return flags.reshape(-1).view(torch.uint8)


def choice(outputs: tuple[Tensor, ...]) -> Choice:
    selected, rows, counts = outputs
    return Choice(selected.view(torch.bool), rows, counts)


def totals(
    placed: Placed,
    selected: Tensor,
    rows: Tensor,
    losses: Tensor,
    row_weights: Tensor | None,
    unmasked: Tensor | None,
    *,
    loss: str | None,
    by_selected: bool,
) -> dict[str, Tensor]:
    """0-dim sums and counts, by name; see `Backend.totals`."""
    with on_device(rows.device):
        numbers, counts = totals_fwd(
            rows,
            losses.float().contiguous(),
            row_weights,
            placed.scores.reshape(-1),
            bytes_of(placed.stats.valid),
            None if unmasked is None else bytes_of(unmasked),
            placed.columns,
            bytes_of(selected),
            bytes_of(placed.infinite),
            loss=loss,
            by_selected=by_selected,
        )
    named = zip((*NUMBERS, *COUNTS), (*numbers.unbind(0), *counts.unbind(0)), strict=True)
    return dict(named)
