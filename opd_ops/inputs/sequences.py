"""The sequence of each flattened position. A sequence is a row of the last dimension, or a span of `cu_seqlens`.

Not here: masks and responses (positions.py), budgets (selection/budget.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_ops.arguments import check_layout, may_look
from opd_ops.distributed.ranks import Ranks


def sequence_ids(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(numel,) non-decreasing sequence number of each flattened position.

    A sequence is a row of the last dimension. With `cu_seqlens` it is a span between two neighbouring entries.
    """
    places = torch.arange(shape.numel(), device=device)
    if cu_seqlens is not None:
        spans = _spans(places, cu_seqlens)
        # Empty spans leave no gap in the numbers, so that no number exceeds the count of positions.
        return torch.cat((spans[:1] * 0, (spans[1:] != spans[:-1]).cumsum(0)))
    return places.div(max(1, shape[-1] if len(shape) else 1), rounding_mode="floor")


def numbered_sequences(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """Sequence numbers that also count empty spans, so that they mean the same on every rank; and the number of sequences."""
    n = count_sequences(shape, cu_seqlens)
    if cu_seqlens is None:
        return sequence_ids(shape, None, device), n
    return _spans(torch.arange(shape.numel(), device=device), cu_seqlens).clamp_max(n - 1), n


def count_sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> int:
    return max(1, shape[:-1].numel()) if cu_seqlens is None else len(cu_seqlens) - 1


def check_same_sequences(n: int, ranks: Ranks, device: torch.device) -> None:
    """Raise on every rank if ranks have different numbers of sequences. Gathers an int64, for which the CPU waits."""
    counts = ranks.gather(torch.tensor([n], device=device)).flatten().tolist()
    if len(set(counts)) != 1:
        raise ValueError(
            f"selection_group: its ranks hold parts of {', '.join(map(str, counts))} sequences, expected parts of the same "
            "ones; pass as many rows, or spans of cu_seqlens, on each, empty ones too"
        )


def _spans(places: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.bucketize(places, cu_seqlens[1:].to(device=places.device, dtype=torch.long), right=True)


def check_cu_seqlens(cu_seqlens: Tensor | None, shape: torch.Size) -> None:
    """Check (n_sequences + 1,) integers from 0 to the number of positions; values are checked only on the CPU."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = f"dtype {cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: got {kind}, expected an int32 or int64 tensor")
    check_layout("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (n_sequences + 1,)")
    if may_look(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != shape.numel() or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
            raise ValueError(
                f"cu_seqlens: got {first} ... {last}, expected non-decreasing numbers from 0 to {shape.numel()}, "
                "the number of positions"
            )
