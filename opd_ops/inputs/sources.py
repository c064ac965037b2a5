"""`Source`: one model's logits as a backend reads them, either stored (dense) or computed from a head.

  x = dense row, or hidden @ weight[:V].T + bias[:V];  logits = softcap(scale * x) / temperature
  V is the common vocabulary: both models are sliced to it before any softmax, never padded.
  mixed with the logits of other models, as inputs/ensembles.py says: `Mixing`
  merged ids e0, e1, ... count as one action: logit e0 becomes log sum e^logits of all merged ids, the others -inf
  masked: a stored logit of at most `mask_limit` has probability 0: -inf, or finfo.min as the library transformers writes it
  a shard: the source holds the ids first ... first + width - 1, other ranks hold the other ids; lists of ids are global

Not here: computations on the logits (backends/), the checks of both sides (pair.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opd_ops.arguments import is_traced
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.float8 import Float8Rows
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.unshard import is_dtensor


@dataclass(frozen=True)
class Shard:
    """The part of the common vocabulary that each rank holds: consecutive ids, in rank order; a part may be empty."""

    ranks: Ranks
    widths: tuple[int, ...]
    uncut: int  # entries of the student's vocabulary over all ranks, before it is cut to the common one

    @property
    def first(self) -> int:
        """The first id of this rank's part."""
        return sum(self.widths[: self.ranks.rank])

    @property
    def width(self) -> int:
        return self.widths[self.ranks.rank]

    @property
    def total(self) -> int:
        return sum(self.widths)


class Mixing(NamedTuple):
    """How the logits of several models become the logits of one teacher: inputs/ensembles.py has the equations."""

    weights: tuple[float, ...]  # of the source itself, then of its `others`
    kind: str  # "geometric" or "arithmetic"


@dataclass(frozen=True)
class Transform:
    """The steps from stored numbers to logits: a source without its tensors."""

    is_head: bool
    vocab_size: int  # entries of the vocabulary on this process
    temperature: float
    scale: float = 1.0
    softcap: float | None = None
    mixing: Mixing | None = None  # with the source's `others`; None: these are the logits of one model
    merged: tuple[int, ...] = ()  # ids that count as one action, with the first id
    shard: Shard | None = None  # None: this process holds the whole vocabulary

    @property
    def first_id(self) -> int:
        return 0 if self.shard is None else self.shard.first

    @property
    def whole_vocab_size(self) -> int:
        """Entries of the common vocabulary over all ranks."""
        return self.vocab_size if self.shard is None else self.shard.total


class Source(NamedTuple):
    """One side of the call: its tensors and their transform."""

    transform: Transform
    leading: Tensor  # dense logits (..., V') or hidden states (..., D); (...) are the positions
    weight: Tensor | None = None  # (V', D)
    bias: Tensor | None = None  # (V',)
    float8: Float8Rows | None = None  # the weight in 8 bits, only for a score pass in 8 bits
    others: tuple[Source, ...] = ()  # the models whose logits are mixed in, or with `routes` all models
    logsumexp: Tensor | None = None  # (N,) of these logits alone, at the rows that the call reads: in an arithmetic mixture
    routes: Tensor | None = None  # (N,) int64, which of `others` each position has; None: they are mixed in
    uncounted: tuple[bool, bool, bool] = (False, False, False)  # leading, weight, bias: no version counter

    @staticmethod
    def of(side: Tensor | LinearHead, vocab_size: int | None = None, temperature: float = 1.0) -> Source:
        """The source of logits or a head, over the first `vocab_size` entries; None: over all entries."""
        if isinstance(side, LinearHead):
            width = len(side.weight) if vocab_size is None else vocab_size
            transform = Transform(True, width, temperature, float(side.scale), side.softcap)
            source = Source(transform, side.hidden, side.weight, side.bias, side.float8)
        else:
            width = side.shape[-1] if vocab_size is None else vocab_size
            source = Source(Transform(False, width, temperature), side)
        uncounted = _is_uncounted(source.leading), _is_uncounted(source.weight), _is_uncounted(source.bias)
        source = source.with_tensors([_alias(t) if _is_uncounted(t) else t for t in source.tensors])
        return source._replace(uncounted=uncounted)

    @property
    def shape(self) -> torch.Size:
        """The shape of the positions."""
        return self.leading.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.leading.device

    @property
    def width(self) -> int:
        """V': entries of the tensors; only the first `vocab_size` are read."""
        return self.leading.shape[-1] if self.weight is None else len(self.weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32, or fp64 if any of the tensors is fp64."""
        return compute_dtype(self)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype in which masked entries are stored; None: a head without a bias masks no entry."""
        if not self.transform.is_head:
            return self.leading.dtype
        return None if self.bias is None else torch.float32  # its logits are computed in fp32 or wider

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        own = self.leading, self.weight, self.bias, self.logsumexp, self.routes
        tensors = tuple([t for t in own if t is not None])
        return tensors + tuple(t for other in self.others for t in other.tensors) if self.others else tensors

    @property
    def is_uncounted(self) -> bool:
        """Whether some tensor has no version counter."""
        return any(self.uncounted) or any(other.is_uncounted for other in self.others)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Source:
        """The same source with other tensors, in the order of `self.tensors`."""
        remaining = iter(tensors)
        leading = next(remaining)
        weight = None if self.weight is None else next(remaining)
        bias = None if self.bias is None else next(remaining)
        logsumexp = None if self.logsumexp is None else next(remaining)
        routes = None if self.routes is None else next(remaining)
        others = tuple(x.with_tensors([next(remaining) for _ in x.tensors]) for x in self.others) if self.others else ()
        return Source(self.transform, leading, weight, bias, self.float8, others, logsumexp, routes, self.uncounted)

    def emptied(self) -> Source:
        """The same source with empty tensors, for `with_tensors` to fill."""
        return self.with_tensors([t.new_empty(0) for t in self.tensors])

    def detach(self) -> Source:
        """The same logits, cut off from the graph."""
        return self.with_tensors([t.detach() for t in self.tensors])


def _is_uncounted(tensor: Tensor | None) -> bool:
    """Whether it is an inference-mode tensor, like many teachers': autograd cannot save it, nor see that it is overwritten."""
    if tensor is None or is_traced() or torch.is_inference_mode_enabled():
        return False
    return (tensor.to_local() if is_dtensor(tensor) else tensor).is_inference()


def _alias(tensor: Tensor) -> Tensor:
    """A tensor on the same memory that autograd can save. Autograd does not see writes to the original tensor:
    backends/shared/overwritten.py looks for them."""
    if is_dtensor(tensor):
        local, shape, stride = _alias(tensor.to_local()), tensor.shape, tensor.stride()
        return type(tensor).from_local(local, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def compute_dtype(*sources: Source) -> torch.dtype:
    """The dtype of every backend's computation: fp32, or fp64 if any input is fp64."""
    is_double = any(t.dtype == torch.float64 for source in sources for t in source.tensors)
    return torch.float64 if is_double else torch.float32


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """(n, last) copy of the positions `rows` of (..., last), for any strides, without flattening the whole tensor."""
    flat = _flattened(tensor)
    return tensor[coordinates(rows, tensor.shape[:-1])] if flat is None else flat[rows]


SHARED_ROW = 1 << 15  # numbers: from here on torch.index_select shares each single row between all threads


def copy_rows(tensor: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """`take_rows` into `out`, (n, last), which may have another dtype."""
    flat = _flattened(tensor)
    if flat is None or flat.dtype != out.dtype or not out.is_contiguous():
        return out.copy_(take_rows(tensor, rows))
    if out.shape[1] < SHARED_ROW:
        return torch.index_select(flat, 0, rows, out=out)
    copied: Tensor = torch.ops.aten.index.Tensor_out(flat, [rows], out=out)  # it shares the rows between threads
    return copied


def put_rows(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write (n, last) values to the positions `rows` of (..., last), in place, for any strides."""
    flat = _flattened(tensor)
    if flat is None:
        tensor[coordinates(rows, tensor.shape[:-1])] = values.to(tensor.dtype)
    else:
        flat[rows] = values.to(tensor.dtype)


def _flattened(tensor: Tensor) -> Tensor | None:
    """(N, last) view of (..., last); None if its strides allow none."""
    if tensor.dim() == 2:
        return tensor
    shape, stride = tensor.shape[:-1], tensor.stride()
    if all(stride[i] == stride[i + 1] * shape[i + 1] for i in range(len(shape) - 1)):
        return tensor.view(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(shape.numel(), tensor.shape[-1])
    return None


def coordinates(rows: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Indices per dimension of flattened positions. torch.unravel_index would copy the shape to the device and wait."""
    if len(shape) == 1:
        return (rows,)
    indices = []
    for size in reversed(shape):
        indices.append(rows % max(1, size))
        rows = rows.div(max(1, size), rounding_mode="floor")
    return tuple(reversed(indices))


def mask_limit(dtype: torch.dtype) -> float:
    """Stored logits of at most this are masked: -inf, and `finfo.min`, which transformers writes for -inf.

    Other code may add to `finfo.min`, scale it or widen it: the limit of a wide dtype is far above `finfo.min`. fp16 has no
    such room, and its minimum is an ordinary logit in other dtypes.
    """
    return torch.finfo(dtype).min if dtype == torch.float16 else -(2.0**120)


def finish_logits(x: Tensor, transform: Transform, stored: torch.dtype | None) -> Tensor:
    """Apply masks, scale, soft-cap and temperature in place: from head outputs or dense logits to the model's logits.

    `stored`: the dtype in which masked entries are stored; None: no entry is masked.
    """
    if stored is not None:
        torch.threshold_(x, mask_limit(stored), -torch.inf)
    if transform.scale != 1.0:
        x.mul_(transform.scale)
    if transform.softcap is not None:
        x.div_(transform.softcap).tanh_().mul_(transform.softcap)
    if transform.temperature != 1.0:
        x.div_(transform.temperature)
    return x


def mix(x: Tensor, others: Iterable[Tensor], mixing: Mixing) -> Tensor:
    """The mixture of several models' logits (inputs/ensembles.py), in place of the first model's, `x`.

    Args:
        x, others: Logits of the models; in an arithmetic mixture log-probabilities. Each of `others` is read, and may be
            overwritten, before the next one is taken.
    """
    weight, *weights = mixing.weights
    if mixing.kind == "arithmetic":
        x.add_(math.log(weight))
        for other, other_weight in zip(others, weights, strict=True):
            torch.logaddexp(x, other.add_(math.log(other_weight)), out=x)
        return x
    masked = x == -torch.inf
    x.mul_(weight)
    for other, other_weight in zip(others, weights, strict=True):
        if other_weight > 0:  # where another model is -inf too, with a negative weight, the sum is NaN
            masked |= other == -torch.inf
        x.add_(other, alpha=other_weight)
    return x.masked_fill_(masked, -torch.inf)


def logit_slope(logits: Tensor, transform: Transform) -> Tensor | float:
    """d logits / d x of `finish_logits`, from its result: a number, or (n, B) with a soft-cap."""
    slope = transform.scale / transform.temperature
    if transform.softcap is None:
        return slope
    tanh = logits * (transform.temperature / transform.softcap)
    return tanh.square_().neg_().add_(1.0).mul_(slope)
