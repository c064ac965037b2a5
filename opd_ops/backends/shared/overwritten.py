"""A check that tensors of inference mode were not overwritten between the forward and the backward, which reads them again.

  digest = sum_i sum_j (i + 1) (j + 1) bits[i, j]  mod 2^64,   i: rows that are read, j: columns evenly spaced

Autograd knows by a version counter that a saved tensor was overwritten. A tensor of inference mode has no counter: its wrong
gradient would go unseen. So the forward computes a digest of a sample: SAMPLED or more columns of every row of logits or hidden
states, and as many rows and columns of a weight. The digest sees a buffer that is filled again, not one changed entry. A digest
of all numbers would take as long as the loss; a copy would keep M V numbers. A sum of integers is equal on every device, in any
order.
Not here: which tensors are of inference mode (inputs/sources.py), the version counter of all others (autograd).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.sources import Source, take_rows
from opd_ops.inputs.workspace import Workspace

SAMPLED = 256  # columns; of a row of 2^18, 1 sector in 64 is fetched; of a row of up to 511, all columns
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes
DIGEST_BYTES = 32  # per number of the sample: copied, widened to 64 bits and multiplied
NAMES = "student", "teacher"


def unchanged(connected: Tensor, rows: Tensor, *sources: Source, workspace: Workspace) -> Tensor:
    """The same losses. Their backward first compares the sources with their digests of the forward.

    `sources`: (student,) or (student, teacher), whichever the losses' own backward reads again at the rows. Only tensors of
    inference mode are compared. An overwritten tensor raises on a CPU. On other devices it makes every gradient NaN, because
    raising would have to wait for the device.
    """
    is_compared = connected.requires_grad and any(source.is_uncounted for source in sources)
    before = digests(sources, rows, workspace) if is_compared else None
    if before is None:
        return connected
    emptied = tuple(source.emptied() for source in sources)
    tensors = [tensor for source in sources for tensor in source.tensors]
    compared: Tensor = _Unchanged.apply(connected, emptied, workspace, before, rows, *tensors)
    return compared


@torch.no_grad()
def digests(sources: tuple[Source, ...], rows: Tensor, workspace: Workspace) -> Tensor | None:
    """One int64 digest per tensor of inference mode; None if there are none."""
    digest_list = [_digest(tensor, places, workspace) for _, tensor, places in _read(sources, rows)]
    return torch.stack(digest_list) if digest_list else None


@torch.no_grad()
def verified(before: Tensor, sources: tuple[Source, ...], rows: Tensor, workspace: Workspace) -> Tensor:
    """0-dim fp32: 1 if the digests are still the same, else NaN; on a CPU, changed digests raise."""
    now = digests(sources, rows, workspace)
    assert now is not None
    if now.device.type == "cpu" and not torch.equal(now, before):
        overwritten = [
            name for (name, _, _), same in zip(_read(sources, rows), (now == before).tolist(), strict=True) if not same
        ]
        raise RuntimeError(
            f"{overwritten[0]}: a tensor made in torch.inference_mode() was overwritten between the forward and the backward, "
            "which reads it again; expected it unchanged. Run the backward first, pass a copy (.clone()), or compute it under "
            "torch.no_grad() in a tensor of its own"
        )
    return factor(now, before)


def factor(now: Tensor, before: Tensor) -> Tensor:
    """Factor of the gradients, 1 or NaN, without a host synchronisation."""
    return torch.where((now == before).all(), 1.0, torch.nan)


class _Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        connected: Tensor,
        sources: tuple[Source, ...],
        workspace: Workspace,
        before: Tensor,
        rows: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.sources, ctx.workspace = sources, workspace
        ctx.save_for_backward(before, rows, *tensors)
        return connected.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        before, rows, *tensors = ctx.saved_tensors
        sources, remaining = [], tensors
        for source in ctx.sources:
            n = len(source.tensors)
            sources.append(source.with_tensors(remaining[:n]))
            remaining = remaining[n:]
        multiplier = verified(before, tuple(sources), rows, ctx.workspace)
        return gradient * multiplier.to(gradient.dtype), *(None,) * (4 + len(tensors))


def _read(sources: tuple[Source, ...], rows: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Each tensor of inference mode: its name, the part that the backward reads, and the rows of it (None: all)."""
    for name, source in zip(NAMES, sources, strict=False):
        yield from _read_source(name, source, rows)


def _read_source(name: str, source: Source, rows: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    vocab, is_head = source.transform.vocab_size, source.transform.is_head
    tensors = {
        ".hidden" if is_head else "": (source.leading if is_head else source.leading[..., :vocab], rows),
        ".weight": (None if source.weight is None else source.weight[:vocab], None),
        ".bias": (None if source.bias is None else source.bias[:vocab].unsqueeze(0), None),
    }
    for (part, (tensor, places)), uncounted in zip(tensors.items(), source.uncounted, strict=True):
        if uncounted and tensor is not None and source.routes is None:
            yield name + part, tensor, places
    for i, other in enumerate(source.others, 1 if source.routes is None else 0):
        yield from _read_source(f"{name}s[{i}]", other, rows)


def _digest(tensor: Tensor, rows: Tensor | None, workspace: Workspace) -> Tensor:
    """0-dim int64 digest of the rows of (..., width); rows None: of a sample of the rows of (n, width)."""
    block = tensor[..., :: max(1, tensor.shape[-1] // SAMPLED)]
    if rows is None:
        block = block[:: max(1, len(block) // SAMPLED)]
        rows = torch.arange(len(block), device=tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    columns = torch.arange(1, block.shape[-1] + 1, device=tensor.device)
    for part in chunks(len(rows), workspace.count(DIGEST_BYTES * max(1, len(columns)))):
        row_sums = (take_rows(block, rows[part]).view(INTEGERS[tensor.element_size()]) * columns).sum(1)
        total += (row_sums * torch.arange(part.start + 1, part.stop + 1, device=tensor.device)).sum()
    return total
