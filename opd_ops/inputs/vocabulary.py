"""Vocabulary-parallel inputs: the ids that each rank holds, determined once per call, before any work.

  process_group=       logits (..., V_r), or heads with weight (V_r, D) and bias (V_r,), of this rank's ids. Hidden states,
                       masks and all other inputs are the same on every rank. Parts are in rank order, of any width.
  DTensors             logits Shard(-1), weight and bias Shard(0): their mesh dimension is the group. Hidden states are
                       replicated.
  A teacher may have its whole vocabulary on every rank: as a replicated DTensor, or as a plain tensor about as wide as all
  parts of the student together. Each rank then reads its ids of it.

One all-gather of two integers per side tells every rank the positions and widths of all ranks. So a mismatch raises on all
ranks, and no rank waits.
Not here: parts joined (backends/shared/joined.py), heads that FSDP2 shards, which are gathered (unshard.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import is_traced
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.sources import Shard, Source
from opd_ops.inputs.unshard import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PADDING = 8  # two whole vocabularies differ by at most 1 / PADDING of one, by padding


class Local(NamedTuple):
    """A side with this rank's tensors."""

    name: str
    source: Source
    group: (
        dist.ProcessGroup | None
    )  # the group over which DTensors share out the vocabulary; None: not shared out, or no DTensors
    is_dtensor: bool


class Widths(NamedTuple):
    """The number of ids of one side that each rank holds."""

    per_rank: tuple[int, ...] | None  # None: each rank holds all ids
    total: int


def to_local(name: str, source: Source) -> Local:
    """The side with this rank's tensors.

    Raises: ValueError: placements that are no shares of the vocabulary.
    """
    if source.weight is None:
        leading, group = _local(name, source.leading, source.leading.dim() - 1)
        return Local(name, source._replace(leading=leading), group, is_dtensor(source.leading))
    weight, group = _local(f"{name}.weight", source.weight, 0)
    bias, bias_group = (None, group) if source.bias is None else _local(f"{name}.bias", source.bias, 0)
    hidden, hidden_group = _local(f"{name}.hidden", source.leading, None)
    if bias_group is not group:
        raise ValueError(f"{name}.bias: is not placed like the weight, expected Shard(0) on the same mesh dimension for both")
    if source.float8 is not None and (weight is not source.weight):
        raise ValueError(f"{name}.float8: got 8-bit rows beside a DTensor weight; pass float8=None")
    assert hidden_group is None
    if weight is source.weight and hidden is source.leading and bias is source.bias:
        return Local(name, source, None, False)
    if is_dtensor(source.weight) and not is_dtensor(source.leading):
        _check_one_dimension(name, source.weight)
    local = source._replace(leading=hidden, weight=weight, bias=bias)
    return Local(name, local, group, is_dtensor(source.weight))


def _check_one_dimension(name: str, weight: DTensor) -> None:
    """Refuse a weight on more than one mesh dimension with plain hidden states. Ranks along the other dimensions may have other
    hidden states, and so other gradients of the replicated weight."""
    if sum(size > 1 for size in weight.device_mesh.shape) > 1:
        raise ValueError(
            f"{name}.weight: got a DTensor on a mesh of shape {tuple(weight.device_mesh.shape)} beside hidden states that are "
            "none; pass its part, weight.to_local(), with process_group= the group of the sharded dimension, or hidden states "
            "as a DTensor"
        )


def _local(name: str, tensor: Tensor, shared: int | None) -> tuple[Tensor, dist.ProcessGroup | None]:
    """This rank's part of a tensor, and the group that shares out its dimension `shared`; None: no dimension may be shared."""
    if not is_dtensor(tensor):
        return tensor, None
    dtensor, group = tensor, None
    for dimension, placement in enumerate(dtensor.placements):
        if placement.is_replicate():
            continue
        expected = "Replicate()" if shared is None else f"Shard({shared}) or Replicate()"
        if shared is None or group is not None or not any(placement.is_shard(dim) for dim in (shared, shared - tensor.dim())):
            raise ValueError(
                f"{name}: got a DTensor placed {tuple(dtensor.placements)}, expected {expected} on each mesh dimension, one "
                "Shard at most; redistribute it, or pass local tensors and process_group="
            )
        group = dtensor.device_mesh.get_group(dimension)
        mesh_index: list[int | slice] = list(dtensor.device_mesh.get_coordinate() or ())
        mesh_index[dimension] = slice(None)
        mesh_ranks = dtensor.device_mesh.mesh[tuple(mesh_index)].tolist()
        if mesh_ranks != dist.get_process_group_ranks(group):  # parts are in mesh order, gathered tensors in group order
            raise ValueError(
                f"{name}: got a DTensor on a mesh of ranks {mesh_ranks}, expected ascending ones along the dimension that "
                "shares it out"
            )
    local: Tensor = dtensor.to_local()
    return local, group


class Vocabulary(NamedTuple):
    """The widths of both sides on the ranks that share out the vocabulary."""

    ranks: Ranks | None  # None: the vocabulary is not shared out
    student: Widths
    others: tuple[Widths, ...]  # of the teacher and the reference; empty for a sparse teacher

    def shard(self, vocab_size: int) -> Shard | None:
        """The ranks' parts of the first `vocab_size` ids."""
        return None if self.ranks is None or self.student.per_rank is None else _shard(self.ranks, self.student, vocab_size)


def one_group(process_group: dist.ProcessGroup | None, sides: Sequence[Local]) -> dist.ProcessGroup | None:
    """The group that shares out the vocabulary: `process_group`, or the group of the DTensors. sides[0] is the student.

    Raises: ValueError: different groups, or a whole student with a teacher or reference that is shared out.
    """
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
    for name, _, side_group, _ in (side for side in sides if side.group is not None):
        if group is None:
            raise ValueError(
                f"{name}: is shared out over ranks, but the student is not; pass DTensors on both sides, or process_group= and "
                "this rank's part of the student"
            )
        if side_group is not group and dist.get_process_group_ranks(side_group) != dist.get_process_group_ranks(group):
            raise ValueError(
                f"{name}: is shared out over other ranks than the student, or than process_group; expected one group"
            )
    return group


def share_out(sides: Sequence[Local], group: dist.ProcessGroup | None) -> Vocabulary:
    """The widths of all sides on all ranks, by one all-gather. sides[0] is the student.

    Raises: ValueError, on every rank: ranks with different numbers of positions, a width that fits neither a whole nor a part.
    """
    ranks = Ranks(group)
    if group is None or ranks.size == 1:
        student, *others = (Widths(None, side.source.width) for side in sides)
        return Vocabulary(None, student, tuple(others))
    sizes = [(side.source.shape.numel(), side.source.width) for side in sides]
    own_sizes = torch.tensor(sizes, device=sides[0].source.device)
    counts, widths = ([tuple(column) for column in table.T.tolist()] for table in ranks.gather(own_sizes).unbind(2))
    for side, n_positions in zip(sides, counts, strict=True):
        if set(n_positions) != {counts[0][0]}:
            raise ValueError(
                f"{side.name}: got {', '.join(map(str, n_positions))} positions on the ranks of the vocabulary's group, "
                f"expected {counts[0][0]} on each, the same ones; heads that FSDP shards are passed by LinearHead.from_module, "
                "which gathers them"
            )
    student_widths, total = widths[0], sum(widths[0])
    others = []
    for side, side_widths in zip(sides[1:], widths[1:], strict=True):
        is_whole = side.group is None if side.is_dtensor else _looks_whole(side.name, side_widths, total)
        others.append(Widths(None, side_widths[0]) if is_whole else Widths(side_widths, sum(side_widths)))
    return Vocabulary(ranks, Widths(student_widths, total), tuple(others))


def _looks_whole(name: str, widths: tuple[int, ...], total: int) -> bool:
    """Whether plain tensors of these widths are a whole vocabulary on every rank. `total`: entries of the whole student."""
    width = widths[0]
    is_whole = set(widths) == {width} and abs(width - total) < abs(len(widths) * width - total)
    if is_whole and PADDING * abs(width - total) > total:
        raise ValueError(
            f"{name}: got {width} entries on each rank beside a student of {total} in all, expected this rank's part of them, "
            "or a whole vocabulary of the student's size but for padding"
        )
    return is_whole


def _shard(ranks: Ranks, widths: Widths, vocab_size: int) -> Shard:
    assert widths.per_rank is not None
    n_remaining, shares = vocab_size, []
    for width in widths.per_rank:
        shares.append(min(width, n_remaining))
        n_remaining -= shares[-1]
    return Shard(ranks, tuple(shares), widths.total)


def part_of(local: Local, widths: Widths, shard: Shard) -> Source:
    """This rank's part of a side; of a whole vocabulary the entries of the shard.

    Raises: ValueError: the side's parts have other ids than the student's.
    """
    if widths.per_rank is None:
        return _cut(local.source, slice(shard.first, shard.first + shard.width))
    if _shard(shard.ranks, widths, shard.total).widths != shard.widths:
        raise ValueError(
            f"{local.name}: its {widths.total} ids are shared out as {widths.per_rank}, the student's {shard.total} as "
            f"{shard.widths}, expected the same ids on each rank: cut or pad both vocabularies to one size before sharing them "
            "out, or pass the whole one on every rank"
        )
    return local.source


def _cut(source: Source, ids: slice) -> Source:
    """The source with only these entries of the vocabulary."""
    if source.weight is None:
        return source._replace(leading=source.leading[..., ids])
    bias = None if source.bias is None else source.bias[ids]
    return source._replace(weight=source.weight[ids], bias=bias, float8=None)
