"""`Source`: one model's logits as a backend reads them, whether they are stored (dense) or computed (a head).

  x = dense row, or hidden @ weight[:V].T + bias[:V];  logits = softcap(scale * x) / temperature
  V is the common vocabulary: both models are sliced to it before any softmax, never padded.
  mixed with a reference model:  lam * logits + (1 - lam) * its logits     (arXiv 2602.12125), a teacher's -inf stays -inf
  merged ids e0, e1, ...: logit e0 becomes log sum e^logits of all of them, the others -inf: one action
  masked: a stored logit of -inf, or as low as the library transformers writes for it (`mask_limit`), is -inf: probability 0
  a shard: the source holds the ids first ... first + width - 1 alone, other ranks hold the others; lists of ids are global

Not here: what is computed from the logits (backends/), the checks of both sides (pair.py).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Which part of the common vocabulary each rank holds: consecutive ids, in rank order; a part may be empty."""

    ranks: Ranks
    widths: tuple[int, ...]
    uncut: int  # entries that the student has in all, of which the first are compared

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


@dataclass(frozen=True)
class Transform:
    """How stored numbers become logits: everything of a source but its tensors."""

    is_head: bool
    vocab_size: int  # that this process holds
    temperature: float
    scale: float = 1.0
    softcap: float | None = None
    lam: float = 1.0  # share of these logits, where they are mixed with a reference's
    merged: tuple[int, ...] = ()  # ids that count as one action, the first
    shard: Shard | None = None  # None: this process holds the whole vocabulary

    @property
    def first_id(self) -> int:
        return 0 if self.shard is None else self.shard.first

    @property
    def whole_vocab_size(self) -> int:
        """Over all ranks."""
        return self.vocab_size if self.shard is None else self.shard.total


class Source(NamedTuple):
    """One side of the call: its tensors and their transform."""

    transform: Transform
    leading: Tensor  # dense logits (..., V') or hidden states (..., D): its leading dimensions are the positions
    weight: Tensor | None = None  # (V', D)
    bias: Tensor | None = None  # (V',)
    float8: Float8Rows | None = None  # the weight in 8 bits, read only by a score pass in 8 bits
    reference: Source | None = None  # whose logits are mixed in
    uncounted: tuple[bool, bool, bool] = (False, False, False)  # which of its tensors have no version counter of their own

    @staticmethod
    def of(side: Tensor | LinearHead, vocab_size: int | None = None, temperature: float = 1.0) -> Source:
        """What the caller passed, over the first `vocab_size` entries; None: over all."""
        if isinstance(side, LinearHead):
            width = len(side.weight) if vocab_size is None else vocab_size
            transform = Transform(True, width, temperature, float(side.scale), side.softcap)
            made = Source(transform, side.hidden, side.weight, side.bias, side.float8)
        else:
            width = side.shape[-1] if vocab_size is None else vocab_size
            made = Source(Transform(False, width, temperature), side)
        return made.counted()

    def counted(self) -> Source:
        """The same with tensors that autograd can save, whatever they were made in."""
        found = zip(self.uncounted, (self.leading, self.weight, self.bias), strict=True)
        leading, weight, bias = (known or _is_uncounted(tensor) for known, tensor in found)
        counted = self.with_tensors([_alias(x) if _is_uncounted(x) else x for x in self.tensors])
        return counted._replace(uncounted=(leading, weight, bias))

    @property
    def shape(self) -> torch.Size:
        """Of the positions."""
        return self.leading.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.leading.device

    @property
    def width(self) -> int:
        """Entries that the tensors have, of which the first `vocab_size` are compared."""
        return self.leading.shape[-1] if self.weight is None else len(self.weight)

    def in_float8(self) -> Source:
        """The same with its head's weight in 8 bits, made now unless the caller keeps it; dense logits stay as they are."""
        if self.weight is None or self.float8 is not None:
            return self
        return self._replace(float8=Float8Rows.of(self.weight))

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32, or fp64 if any of its tensors is."""
        return compute_dtype(self)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype in which a masked entry is stored; None: a head without a bias masks none."""
        if not self.transform.is_head:
            return self.leading.dtype
        return None if self.bias is None else torch.float32  # its logits are computed in fp32 or wider

    @property
    def is_plain(self) -> bool:
        """Whether stored numbers and a transform per number are all there is to it."""
        return self.reference is None and not self.transform.merged

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        own = tuple(t for t in (self.leading, self.weight, self.bias) if t is not None)
        return own if self.reference is None else own + self.reference.tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> Source:
        """The same source with `tensors` in the place of its own, in their order."""
        left = iter(tensors)
        made = self._replace(leading=next(left))
        made = made if self.weight is None else made._replace(weight=next(left))
        made = made if self.bias is None else made._replace(bias=next(left))
        return made if self.reference is None else made._replace(reference=self.reference.with_tensors(list(left)))

    def emptied(self) -> Source:
        """Everything but the tensors' contents: what `with_tensors` fills again."""
        return self.with_tensors([t.new_empty(0) for t in self.tensors])

    def detach(self) -> Source:
        """The same logits, cut off from the graph."""
        return self.with_tensors([t.detach() for t in self.tensors])


def _is_uncounted(tensor: Tensor | None) -> bool:
    """Whether it was made in inference mode, like a teacher's: autograd can then neither save it nor see it overwritten.

    A DTensor's part is asked once it is taken out (vocabulary.py).
    """
    if tensor is None or is_traced() or torch.is_inference_mode_enabled() or is_dtensor(tensor):
        return False
    return tensor.is_inference()


def _alias(tensor: Tensor) -> Tensor:
    """The same memory under a name that autograd can save. What is written to it by its own name is not seen
    (backends/shared/overwritten.py looks)."""
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def compute_dtype(*sources: Source) -> torch.dtype:
    """fp32, or fp64 if any input is fp64: what every backend computes in."""
    is_double = any(t.dtype == torch.float64 for source in sources for t in source.tensors)
    return torch.float64 if is_double else torch.float32


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """(n, last) copy of the given positions of (..., last), for any strides and without flattening the whole."""
    if tensor.dim() == 2:
        return tensor[rows]
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)[rows]
    return tensor[coordinates(rows, tensor.shape[:-1])]


def put_rows(tensor: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write (n, last) values to the given positions of (..., last), in place, for any strides."""
    if tensor.dim() == 1:
        tensor.unsqueeze(0)[rows] = values.to(tensor.dtype)
    else:
        tensor[coordinates(rows, tensor.shape[:-1])] = values.to(tensor.dtype)


def coordinates(rows: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Indices per dimension of flattened positions. torch.unravel_index would copy the shape from the host, and wait."""
    if len(shape) == 1:
        return (rows,)
    found = []
    for size in reversed(shape):
        found.append(rows % max(1, size))
        rows = rows.div(max(1, size), rounding_mode="floor")
    return tuple(reversed(found))


def mask_limit(dtype: torch.dtype) -> float:
    """Stored logits up to this are masked: -inf and `finfo.min`, which transformers writes for it.

    A wide dtype leaves room for what adding to, scaling or widening `finfo.min` makes of it. fp16's own minimum is an ordinary
    logit in any other dtype.
    """
    return torch.finfo(dtype).min if dtype == torch.float16 else -(2.0**120)


def finish_logits(x: Tensor, transform: Transform, stored: torch.dtype | None) -> Tensor:
    """Masks, scale, soft-cap and temperature, in place: raw head outputs or dense logits become the model's logits.

    `stored`: the dtype that masked entries were written in; None: there are none.
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


def mix_logits(x: Tensor, reference: Tensor, lam: float) -> Tensor:
    """lam x + (1 - lam) reference, in place of x; its -inf stay."""
    absent = x == -torch.inf
    return x.mul_(lam).add_(reference, alpha=1 - lam).masked_fill_(absent, -torch.inf)


def logit_slope(logits: Tensor, transform: Transform) -> Tensor | float:
    """d logits / d x of `finish_logits`, given its outcome: a number, or (n, B) where there is a soft-cap."""
    slope = transform.scale / transform.temperature
    if transform.softcap is None:
        return slope
    tanh = logits * (transform.temperature / transform.softcap)
    return tanh.square_().neg_().add_(1.0).mul_(slope)
