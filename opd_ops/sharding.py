# Vocabulary-parallel inputs: which ranks hold which ids, found out once a call, before any work.
#
#   process_group=       logits (..., V_r), or heads with weight (V_r, D) and bias (V_r,), of this rank's ids; hidden states,
#                        masks and all else the same on every rank. Parts follow each other in rank order, of any width.
#   DTensors             logits Shard(-1), weight and bias Shard(0): their mesh dimension is the group. Hidden states are
#                        replicated.
#   A teacher whose vocabulary is not shared out is read at this rank's ids.
#
# One all-gather of three integers tells every rank all widths, so that what does not fit raises on all of them instead of
# leaving some waiting.
# Not here: parts joined (backends/shards.py), heads that FSDP2 shards, which are gathered (gathered.py).
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.gathered import is_dtensor
from opd_ops.inputs import LinearHead, positions_shape, vocabulary
from opd_ops.ranks import Ranks
from opd_ops.sources import Shard

Side = Tensor | LinearHead


class Widths(NamedTuple):
    """How many ids each rank holds of one side; None: each rank holds all `total`."""

    of_ranks: tuple[int, ...] | None
    total: int


def to_local(name: str, side: Side) -> tuple[Side, Any]:
    """The side with this rank's tensors, and the process group that its DTensors share the vocabulary out over, or None.

    Raises: ValueError: placements that are no shares of the vocabulary.
    """
    if isinstance(side, Tensor):
        return _local(name, side, side.dim() - 1)
    weight, group = _local(f"{name}.weight", side.weight, 0)
    bias, of_bias = (None, group) if side.bias is None else _local(f"{name}.bias", side.bias, 0)
    hidden, of_hidden = _local(f"{name}.hidden", side.hidden, None)
    if of_bias is not group:
        raise ValueError(f"{name}.bias: is not placed like the weight, expected Shard(0) on the same mesh dimension for both")
    if side.float8 is not None and (weight is not side.weight):
        raise ValueError(f"{name}.float8: got 8-bit rows beside a DTensor weight; pass float8=None")
    assert of_hidden is None
    if weight is side.weight and hidden is side.hidden and bias is side.bias:
        return side, None
    return replace(side, hidden=hidden, weight=weight, bias=bias), group


def _local(name: str, tensor: Tensor, shared: int | None) -> tuple[Tensor, Any]:
    """This rank's part of a tensor and the group that shares out its dimension `shared`."""
    if not is_dtensor(tensor):
        return tensor, None
    found: Any = tensor
    group = None
    for dimension, placement in enumerate(found.placements):
        if placement.is_replicate():
            continue
        wanted = "Replicate()" if shared is None else f"Shard({shared}) or Replicate()"
        if shared is None or not placement.is_shard() or placement.dim % tensor.dim() != shared or group is not None:
            raise ValueError(
                f"{name}: got a DTensor placed {tuple(found.placements)}, expected {wanted} on each mesh dimension, one "
                "Shard at most; redistribute it, or pass local tensors and process_group="
            )
        group = found.device_mesh.get_group(dimension)
    local: Tensor = found.to_local()
    return local, group


class Vocabulary(NamedTuple):
    """Both sides of a call with this rank's tensors, and how the ranks share out the ids."""

    ranks: Ranks | None  # None: not at all
    student: Widths
    others: tuple[Widths, ...]  # of the teacher and a reference, where they are not sparse

    def shard(self, vocab_size: int) -> Shard | None:
        """The ranks' parts of the first `vocab_size` ids."""
        return None if self.ranks is None or self.student.of_ranks is None else _cut(self.ranks, self.student, vocab_size)


def one_group(process_group: Any, implied: Sequence[tuple[str, Any]]) -> Any:
    """The vocabulary's group: the one that was passed, or that DTensors are shared out over; the student comes first.

    Raises: ValueError: different groups, or a student that is whole beside a side that is shared out.
    """
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(f"process_group: got {type(process_group).__name__}, expected a torch.distributed.ProcessGroup or None")
    of_student = implied[0][1]
    group = of_student if process_group is None else process_group
    if group is not None and torch.compiler.is_compiling():
        raise ValueError(
            "process_group: got a vocabulary that ranks share out, which torch.compile cannot trace; call the loss outside of "
            "the graph"
        )
    for name, found in ((name, found) for name, found in implied if found is not None):
        if group is None:
            raise ValueError(
                f"{name}: is shared out over ranks, but the student is not; pass DTensors on both sides, or process_group= and "
                "this rank's part of the student"
            )
        if found is not group and dist.get_process_group_ranks(found) != dist.get_process_group_ranks(group):
            raise ValueError(
                f"{name}: is shared out over other ranks than the student, or than process_group; expected one group"
            )
    return group


def share_out(student: Side, others: Sequence[tuple[str, Side]], group: Any) -> Vocabulary:
    """Who holds what, told to every rank by one all-gather.

    Raises: ValueError, on every rank: another number of positions on some rank, sides shared out differently.
    """
    ranks = Ranks(group)
    sides = [student, *(side for _, side in others)]
    if group is None or ranks.size == 1:
        return Vocabulary(None, *_whole(sides))
    device = student.hidden.device if isinstance(student, LinearHead) else student.device
    mine = torch.tensor([positions_shape(student).numel(), *(vocabulary(side) for side in sides)], device=device)
    counts, *widths = (tuple(column) for column in ranks.gather(mine).T.tolist())
    if len(set(counts)) != 1:
        raise ValueError(
            f"student: got {', '.join(map(str, counts))} positions on the ranks of the vocabulary's group, expected the same "
            "ones on each; heads that FSDP shards are passed by LinearHead.from_module, which gathers them"
        )
    of_student, total = widths[0], sum(widths[0])
    found = []
    for (name, _), of_side in zip(others, widths[1:], strict=True):
        # Whole vocabularies of two models differ by padding, a whole one and a part of it by a factor of at least two.
        is_whole = abs(max(of_side) - total) < abs(sum(of_side) - total)
        if is_whole and len(set(of_side)) != 1:
            raise ValueError(f"{name}: got whole vocabularies of {of_side} entries on the ranks, expected one and the same")
        found.append(Widths(None, of_side[0]) if is_whole else Widths(of_side, sum(of_side)))
    return Vocabulary(ranks, Widths(of_student, total), tuple(found))


def _whole(sides: Sequence[Side]) -> tuple[Widths, tuple[Widths, ...]]:
    student, *others = (Widths(None, vocabulary(side)) for side in sides)
    return student, tuple(others)


def _cut(ranks: Ranks, widths: Widths, vocab_size: int) -> Shard:
    assert widths.of_ranks is not None
    left, found = vocab_size, []
    for width in widths.of_ranks:
        found.append(min(width, left))
        left -= found[-1]
    return Shard(ranks, tuple(found))


def part_of(name: str, side: Side, widths: Widths, shard: Shard) -> Side:
    """The rank's part of a side: itself, or those rows of a whole vocabulary.

    Raises: ValueError: shared out at other ids than the student's.
    """
    if widths.of_ranks is None:
        first, last = shard.first, shard.first + shard.width
        if isinstance(side, Tensor):
            return side[..., first:last]
        bias = None if side.bias is None else side.bias[first:last]
        return replace(side, weight=side.weight[first:last], bias=bias, float8=None)
    if _cut(shard.ranks, widths, shard.total).widths != shard.widths:
        raise ValueError(
            f"{name}: its {widths.total} ids are shared out as {widths.of_ranks}, the student's {shard.total} as "
            f"{shard.widths}, expected the same ids on each rank: cut or pad both vocabularies to one size before sharing them "
            "out, or pass the whole one on every rank"
        )
    return side
