"""The valid positions: the mask without ignored labels, weights of 0 and special tokens.

  special tokens: the first occurrence of each of `special_ids` in each sequence is not valid (arXiv 2603.25562's released
  code: student and teacher may tokenise `<think>` or end a turn differently)
  response: all positions of a sequence from its first to its last valid position, masked positions between them too; special
  tokens count as valid here

Everything stays on the device. Row i predicts target i: `tokens` come shifted, `labels` are shifted here.
Not here: budgets (selection/budget.py), merged ids (sources.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import per_position, shown
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.batch import Batch
from opd_ops.inputs.sequences import check_cu_seqlens, check_same_sequences, count_sequences, numbered_sequences, sequence_ids

BEYOND = 2**62  # a place after every position


class Positions(NamedTuple):
    """The valid positions, sequences and tokens of a call, from its masks, labels and tokens."""

    valid: Tensor | None  # bool of the positions' shape; None: all
    tokens: Tensor | None  # the token that each position predicts
    allowed: Tensor | None  # `valid` with the special tokens; None: all
    cu_seqlens: Tensor | None
    shape: torch.Size
    device: torch.device

    @property
    def n_sequences(self) -> int:
        return count_sequences(self.shape, self.cu_seqlens)

    def sequences(self) -> Tensor:
        """The sequence number of each position, computed in each call: few calls need it."""
        return sequence_ids(self.shape, self.cu_seqlens, self.device).view(self.shape)

    def response_places(self, ranks: Ranks | None) -> Tensor:
        """int64 of the positions' shape: 1, 2, ... along each sequence's response; 0 outside of it.

        `ranks`: ranks that hold parts of the same sequences, in rank order; None: no sequence is spread over ranks.
        Collectives: a gather of an int64, for which the CPU waits, and a gather of (3, n_sequences) int64.
        Raises: ValueError, on every rank: ranks with different numbers of sequences.
        """
        if ranks is None and self.cu_seqlens is None and self.shape.numel():
            return self._places_along_rows()
        shape, device = self.shape, self.device
        ids, n = numbered_sequences(shape, self.cu_seqlens, device)
        if ranks is not None:
            check_same_sequences(n, ranks, device)
        allowed = torch.ones_like(ids, dtype=torch.bool) if self.allowed is None else self.allowed.flatten()
        length = torch.zeros(n, dtype=torch.long, device=device).index_add(0, ids, torch.ones_like(ids))
        place = torch.arange(len(ids), device=device) - (length.cumsum(0) - length)[ids]  # in this rank's part
        first = torch.full_like(length, BEYOND).scatter_reduce(0, ids, place.masked_fill(~allowed, BEYOND), "amin")
        last = torch.full_like(length, -1).scatter_reduce(0, ids, place.masked_fill(~allowed, -1), "amax")
        if ranks is not None:
            lengths, firsts, lasts = ranks.gather(torch.stack((length, first, last))).unbind(1)  # (ranks, n)
            n_earlier = lengths.cumsum(0) - lengths
            first = torch.where(lasts < 0, BEYOND, firsts + n_earlier).amin(0)
            last = torch.where(lasts < 0, -1, lasts + n_earlier).amax(0)
            place = place + n_earlier[ranks.rank][ids]
        first_place = first[ids]
        outside = (place < first_place) | (place > last[ids])
        return (place - first_place + 1).masked_fill(outside, 0).view(shape)

    def _places_along_rows(self) -> Tensor:
        """`response_places` of rows of one length."""
        length = self.shape[-1] if len(self.shape) else 1
        place = torch.arange(length, device=self.device)
        rows = place.expand(self.shape.numel() // length, length)
        if self.allowed is None:
            return (rows + 1).view(self.shape)
        masked = self.allowed.reshape(rows.shape).logical_not()
        first = rows.masked_fill(masked, BEYOND).amin(1, keepdim=True)
        last = rows.masked_fill(masked, -1).amax(1, keepdim=True)
        outside = (place < first) | (place > last)
        return (place - first + 1).masked_fill(outside, 0).view(self.shape)


def positions(
    batch: Batch,
    shape: torch.Size,
    device: torch.device,
    *,
    ignore_index: int,
    special_ids: Sequence[int],
    vocab_size: int | None,
) -> Positions:
    """Check each tensor against the positions' shape. `shift_labels` win over `labels`, `tokens` win over both.

    `vocab_size`: positions with a token outside this vocabulary are not valid; None: tokens are not checked.
    """
    mask, weights, labels, shift_labels, tokens, cu_seqlens = batch[:6]
    check_cu_seqlens(cu_seqlens, shape)
    conditions: list[Tensor] = []
    if mask is not None:
        conditions.append(per_position("mask", mask, shape, device) != 0)
    if weights is not None:
        conditions.append(_weights(weights, shape, device) != 0)
    targets = _targets(shape, device, labels, shift_labels, ignore_index, cu_seqlens)
    if targets is not None:
        conditions.append(targets != ignore_index)
    if tokens is not None:
        _check_token_dtype("tokens", per_position("tokens", tokens, shape, device))
    elif targets is not None and vocab_size is not None:
        _check_token_dtype("labels", targets)
    tokens = targets if tokens is None else tokens
    if vocab_size is not None and tokens is not None:  # a position without a token cannot be trained on
        conditions.append(tokens.clamp(0, vocab_size - 1) == tokens)
    valid = reduce(torch.logical_and, conditions) if conditions else None
    allowed = valid
    if len(special_ids):
        if tokens is None:
            raise ValueError("special_ids: got ids, but no tokens to look among; pass tokens=, or labels to the loss")
        valid = _without_first(valid, tokens, special_ids, sequence_ids(shape, cu_seqlens, device))
    return Positions(valid, tokens, allowed, cu_seqlens, shape, device)


def _without_first(valid: Tensor | None, tokens: Tensor, ids: Sequence[int], sequences: Tensor) -> Tensor:
    """The valid positions, without the first valid occurrence of each id in each sequence."""
    remaining = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    n = tokens.numel()
    places = torch.arange(n, device=tokens.device)
    for special_id in dict.fromkeys(ids):
        occurrences = (tokens == special_id) & remaining
        candidate_places = torch.where(occurrences.flatten(), places, n)
        first = torch.full((n + 1,), n, device=tokens.device).scatter_reduce(0, sequences, candidate_places, "amin")
        remaining = remaining & ~(occurrences & (places == first[sequences]).view(tokens.shape))
    return remaining


def _targets(
    shape: torch.Size,
    device: torch.device,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    ignore_index: int,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """The target of each position.

    The last position of a packed sequence has no target: the next label belongs to another sequence.
    """
    if shift_labels is not None:
        return _check_label_dtype(ignore_index, "shift_labels", per_position("shift_labels", shift_labels, shape, device))
    if labels is None:
        return None
    labels = _check_label_dtype(ignore_index, "labels", per_position("labels", labels, shape, device))
    if not labels.dim():
        raise ValueError("labels: got a 0-dim tensor, expected at least one dimension to shift along")
    targets = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    if cu_seqlens is not None:
        packed = sequence_ids(shape, cu_seqlens, device).view(shape)
        targets[..., :-1].masked_fill_(packed[..., 1:] != packed[..., :-1], ignore_index)
    return targets


def _check_label_dtype(ignore_index: int, name: str, labels: Tensor) -> Tensor:
    """The labels, checked that their dtype can hold `ignore_index`: torch would compare a uint8 with 156 instead of -100."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"{name}: got dtype {labels.dtype}, expected token ids as int64; pass {name}.long(), or mask= for a mask of valid "
            "positions"
        )
    bounds = torch.iinfo(labels.dtype)
    if not bounds.min <= ignore_index <= bounds.max:
        raise ValueError(
            f"ignore_index: got {shown(ignore_index)}, which {name} of dtype {labels.dtype} cannot hold; pass them as int64, "
            "or another ignore_index"
        )
    return labels


def _check_token_dtype(name: str, tokens: Tensor) -> None:
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {tokens.dtype}, expected int32 or int64")


def _weights(weights: object, shape: torch.Size, device: torch.device) -> Tensor:
    checked = per_position("weights", weights, shape, device)
    if checked.is_complex() or checked.dtype == torch.bool:
        raise TypeError(f"weights: got dtype {checked.dtype}, expected numbers; a bool mask is `mask`")
    return checked
