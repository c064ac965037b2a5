"""Vocabulary-parallel inputs: which ranks hold which ids, found out once a call, before any work.

  process_group=       logits (..., V_r), or heads with weight (V_r, D) and bias (V_r,), of this rank's ids; hidden states,
                       masks and all else the same on every rank. Parts follow each other in rank order, of any width.
  DTensors             logits Shard(-1), weight and bias Shard(0): their mesh dimension is the group. Hidden states are
                       replicated.
  A teacher whose vocabulary is not shared out, a DTensor that every rank has whole or a plain one about as wide as the
  student's parts together, is read at this rank's ids.

One all-gather of two integers a side tells every rank all positions and widths, so that what does not fit raises on all of
them instead of leaving some waiting.
Not here: parts joined (backends/shared/joined.py), heads that FSDP2 shards, which are gathered (unshard.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import is_traced
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.sources import Shard, Source
from opd_ops.inputs.unshard import is_dtensor

PADDING = 8  # whole vocabularies of two models differ by less than this part of one: by padding


class Local(NamedTuple):
    """A side with this rank's tensors."""

    name: str
    source: Source
    group: Any  # that its DTensors share the vocabulary out over; None: they do not, or are none
    is_dtensor: bool


class Widths(NamedTuple):
    """How many ids each rank holds of one side; None: each rank holds all `total`."""

    of_ranks: tuple[int, ...] | None
    total: int


def to_local(name: str, source: Source) -> Local:
    """The side with this rank's tensors.

    Raises: ValueError: placements that are no shares of the vocabulary.
    """
    if source.weight is None:
        leading, group = _local(name, source.leading, source.leading.dim() - 1)
        return Local(name, source._replace(leading=leading), group, is_dtensor(source.leading))
    weight, group = _local(f"{name}.weight", source.weight, 0)
    bias, of_bias = (None, group) if source.bias is None else _local(f"{name}.bias", source.bias, 0)
    hidden, of_hidden = _local(f"{name}.hidden", source.leading, None)
    if of_bias is not group:
        raise ValueError(f"{name}.bias: is not placed like the weight, expected Shard(0) on the same mesh dimension for both")
    if source.float8 is not None and (weight is not source.weight):
        raise ValueError(f"{name}.float8: got 8-bit rows beside a DTensor weight; pass float8=None")
    assert of_hidden is None
    if weight is source.weight and hidden is source.leading and bias is source.bias:
        return Local(name, source, None, False)
    if is_dtensor(source.weight) and not is_dtensor(source.leading):
        _check_one_dimension(name, source.weight)
    local = source._replace(leading=hidden, weight=weight, bias=bias)
    return Local(name, local, group, is_dtensor(source.weight))


def _check_one_dimension(name: str, weight: Any) -> None:
    """Of a plain tensor nothing says that ranks along other mesh dimensions have the same hidden states: their gradients of one
    replicated weight would differ."""
    if sum(size > 1 for size in weight.device_mesh.shape) > 1:
        raise ValueError(
            f"{name}.weight: got a DTensor on a mesh of shape {tuple(weight.device_mesh.shape)} beside hidden states that are "
            "none; pass its part, weight.to_local(), with process_group= the group of the sharded dimension, or hidden states "
            "as a DTensor"
        )


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
        place: list[Any] = list(found.device_mesh.get_coordinate())
        place[dimension] = slice(None)
        along = found.device_mesh.mesh[tuple(place)].tolist()
        if along != dist.get_process_group_ranks(group):  # parts follow the mesh, gathered ones the group
            raise ValueError(
                f"{name}: got a DTensor on a mesh of ranks {along}, expected ascending ones along the dimension that shares "
                "it out"
            )
    local: Tensor = found.to_local()
    return local, group


class Vocabulary(NamedTuple):
    """Both sides of a call with this rank's tensors, and how the ranks share out the ids."""

    ranks: Ranks | None  # None: not at all
    student: Widths
    others: tuple[Widths, ...]  # of the teacher and a reference, where they are not sparse

    def shard(self, vocab_size: int) -> Shard | None:
        """The ranks' parts of the first `vocab_size` ids."""
        return None if self.ranks is None or self.student.of_ranks is None else _shard(self.ranks, self.student, vocab_size)


def one_group(process_group: Any, sides: Sequence[Local]) -> Any:
    """The vocabulary's group: the one that was passed, or that DTensors are shared out over; the student comes first.

    Raises: ValueError: different groups, or a student that is whole beside a side that is shared out.
    """
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(f"process_group: got {type(process_group).__name__}, expected a torch.distributed.ProcessGroup or None")
    if process_group is not None and sides[0].is_dtensor and sides[0].group is None:
        raise ValueError(
            "process_group: got a group beside a student DTensor that every rank has whole; shard it on the vocabulary, or "
            "pass no group"
        )
    group = sides[0].group if process_group is None else process_group
    if group is not None and is_traced():
        raise ValueError(
            "process_group: got a vocabulary that ranks share out, which torch.compile cannot trace; call the loss outside of "
            "the graph"
        )
    for name, _, found, _ in (side for side in sides if side.group is not None):
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


def share_out(sides: Sequence[Local], group: Any) -> Vocabulary:
    """Who holds what, told to every rank by one all-gather; the student comes first.

    Raises: ValueError, on every rank: another number of positions on some rank, sides shared out differently.
    """
    ranks = Ranks(group)
    if group is None or ranks.size == 1:
        student, *others = (Widths(None, local.source.width) for local in sides)
        return Vocabulary(None, student, tuple(others))
    sizes = [(local.source.shape.numel(), local.source.width) for local in sides]
    mine = torch.tensor(sizes, device=sides[0].source.device)
    counts, widths = ([tuple(column) for column in of.T.tolist()] for of in ranks.gather(mine).unbind(2))
    for found, of_ranks in zip(sides, counts, strict=True):
        if set(of_ranks) != {counts[0][0]}:
            raise ValueError(
                f"{found.name}: got {', '.join(map(str, of_ranks))} positions on the ranks of the vocabulary's group, expected "
                f"{counts[0][0]} on each, the same ones; heads that FSDP shards are passed by LinearHead.from_module, which "
                "gathers them"
            )
    of_student, total = widths[0], sum(widths[0])
    others = []
    for found, of_side in zip(sides[1:], widths[1:], strict=True):
        is_whole = found.group is None if found.is_dtensor else _looks_whole(found.name, of_side, total)
        others.append(Widths(None, of_side[0]) if is_whole else Widths(of_side, sum(of_side)))
    return Vocabulary(ranks, Widths(of_student, total), tuple(others))


def _looks_whole(name: str, of_ranks: tuple[int, ...], total: int) -> bool:
    """Whether plain tensors of these widths are one vocabulary on every rank, beside a student of `total` entries."""
    width = of_ranks[0]
    is_whole = set(of_ranks) == {width} and abs(width - total) < abs(len(of_ranks) * width - total)
    if is_whole and PADDING * abs(width - total) > total:
        raise ValueError(
            f"{name}: got {width} entries on each rank beside a student of {total} in all, expected this rank's part of them, "
            "or a whole vocabulary of the student's size but for padding"
        )
    return is_whole


def _shard(ranks: Ranks, widths: Widths, vocab_size: int) -> Shard:
    assert widths.of_ranks is not None
    left, found = vocab_size, []
    for width in widths.of_ranks:
        found.append(min(width, left))
        left -= found[-1]
    return Shard(ranks, tuple(found), widths.total)


def part_of(local: Local, widths: Widths, shard: Shard) -> Source:
    """The rank's part of a side: itself, or those entries of a whole vocabulary.

    Raises: ValueError: shared out at other ids than the student's.
    """
    if widths.of_ranks is None:
        return _cut(local.source, slice(shard.first, shard.first + shard.width))
    if _shard(shard.ranks, widths, shard.total).widths != shard.widths:
        raise ValueError(
            f"{local.name}: its {widths.total} ids are shared out as {widths.of_ranks}, the student's {shard.total} as "
            f"{shard.widths}, expected the same ids on each rank: cut or pad both vocabularies to one size before sharing them "
            "out, or pass the whole one on every rank"
        )
    return local.source


def _cut(source: Source, ids: slice) -> Source:
    """These entries of the vocabulary alone."""
    if source.weight is None:
        return source._replace(leading=source.leading[..., ids])
    bias = None if source.bias is None else source.bias[ids]
    return source._replace(weight=source.weight[ids], bias=bias, float8=None)
