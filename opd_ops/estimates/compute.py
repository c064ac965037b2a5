"""The cost of a call: matmul FLOP, bytes through device memory, peak and saved bytes, computed from sizes.

  one unit = 2 N V Ds FLOP;  r = Dt / Ds;  M = max(1, ceil(rho N)) selected rows
  score 1 + r;  selected rows again rho (1 + r);  dH rho;  dW rho (none for a frozen head)
  on "torch" a sum over the vocabulary sweeps the selected rows once more, rho (1 + r); a loss on a list sweeps the teacher,
  rho r, and the student if it reads its mass off the list; the gradient of a list does not read the teacher. Not counted: a
  sweep of rows whose teacher has less than 0.1 % of its mass off the list (backends/streamed/list_losses.py), at most rho r
  a ratio to old probabilities, on "triton": the student's normalisers in fp32, rho; "ppo" those of both models, rho (1 + r)
  a mixture of teachers: r is the sum of theirs; an arithmetic one reads their normalisers first, r more
  student_stats: score r, and K dot products per position and model; backend "torch" scores the selected rows again
  a column of the sampled token: a dot product per position and model; with student_stats one sweep of the student, 1, too;
  "ier": no sweep where the score pass has both lists; with student_stats or float8 one of each model whose list was not sent
  float8: score in 8 bits, and the 2 M best positions again from fp32 logits

Tile sizes come from the backends' own functions, called on tensors without storage. tests/estimates/test_compute.py compares
these numbers with counted FLOP, live and saved bytes. Bytes moved are a model: each use of a tensor moves it once.
Not here: seconds, which follow from a device's rates (benchmarks/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from opd_ops.arguments import check_choice, check_integer
from opd_ops.backends.shared.grids import (
    BlockGrid,
    SelectedGrid,
    gradient_grid,
    padded,
    ranks_in_float8,
    score_grid,
    score_tile,
    tile_dtype,
)
from opd_ops.divergences import SUPPORTS, Divergence, Summed, resolve_divergence
from opd_ops.inputs.sources import Mixing, Source, Transform
from opd_ops.inputs.workspace import Workspace
from opd_ops.settings import SCORE_DTYPES, LossOptions, Settings, check_top_k

if TYPE_CHECKING:
    from typing_extensions import Unpack

POSITION_BYTES = 480  # statistics, masks, sort keys and fp64 temporaries: some 60 numbers per position
ROW_BYTES = ID_BYTES = 8  # saved per selected row: its number, and on "torch" the ids of a divergence on a list
WEIGHT_BYTES = 1  # on "torch": whether the row's weight is 0; on a CPU only where a loss may be infinite
KL_COLUMNS, SUMMED_COLUMNS = 5, 6  # on "torch", for a divergence over whole rows: the mean slope and those of `Reference`
SAVED_SCALAR_BYTES = 64  # saved for the mean: sums and denominators


class Estimate(NamedTuple):
    """The cost of a forward and its backward."""

    matmul_units: float  # all matmuls, in units of 2 N V Ds FLOP
    flops: int  # of matmuls, 8-bit ones included
    float8_flops: int  # of matmuls in 8 bits
    bytes_moved: int  # through device memory
    gradient_bytes: int  # gradients of hidden states and weight
    peak_bytes: int  # at most, without inputs: workspace, gradients, O(N) numbers, heads in 8 bits
    saved_bytes: int  # at most, without inputs: saved by autograd for the backward
    held_bytes: int  # gradients held until the backward, if the forward computes them ("triton")


def estimate(
    N: int,
    V: int,
    Ds: int,
    Dt: int | Sequence[int],
    settings: Settings | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    trainable_head: bool = True,
    student_stats: bool = False,
    mixture: str = "geometric",
    **options: Unpack[LossOptions],
) -> Estimate:
    """The cost of `selective_opd_loss` with a `LinearHead` on both sides, and of its backward.

    Kernels count for every divergence on "triton", also where docs/reference/backends.md names another backend for it. The
    gradient of a list alone ("local_support") counts as if no two rows had an id in common: the most. For a tail
    "bucket" on "torch" the estimate assumes that the teacher has at least 0.1 % of its mass off the list. `Routed` teachers of
    one width cost as one teacher; "ier" sweeps them once more, which is not counted.

    Args:
        N: Valid positions; with "teachability-released" all positions of the responses.
        V: Entries of the common vocabulary.
        Ds: Hidden size of the student.
        Dt: Hidden size of the teacher; of a `Mixture` a sequence, the size of each teacher.
        settings: Settings of the call, or `options`, settings by name. Only these are read: fraction, count, workspace_bytes,
            top_k, score_dtype, divergence, the columns of the sampled token that selector and weighting need, and backend:
            "triton" (also for "auto") or "torch".
        dtype: Dtype of hidden states and weights.
        trainable_head: Whether the student's weight requires a gradient. The hidden states require one.
        student_stats: Whether the student's statistics come from the rollout.
        mixture: The kind of a `Mixture`, "geometric" or "arithmetic".
    Returns: `Estimate`.
    Raises: ValueError, TypeError: an argument that does not fit, by name.
    Example: 16,384 tokens of a vocabulary of 151,936, hidden sizes 2048 and 4096.
        >>> round(estimate(16_384, 151_936, 2048, 4096).matmul_units, 2)
        3.25
    """
    sizes = {"N": N, "V": V, "Ds": Ds}
    N, V, Ds = (check_integer(name, value, least=1) for name, value in sizes.items())
    widths = tuple(check_integer("Dt", value, least=1) for value in (Dt if isinstance(Dt, Sequence) else (Dt,)))
    check_choice("mixture", mixture, ("geometric", "arithmetic"))
    if not widths:
        raise ValueError("Dt: got no size, expected that of each teacher")
    settings = Settings.given_or_named(settings, options)
    backend = "triton" if settings.backend == "auto" else settings.backend
    check_choice("backend", backend, ("triton", "torch"))
    budget, in_float8, workspace_bytes = settings.budget, settings.in_float8, settings.workspace_bytes
    check_top_k(settings.top_k, V)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype")
    if in_float8 and backend != "triton":
        raise ValueError("score_dtype: got 'float8', which needs backend='triton'")
    score_dtype = None if settings.score_dtype is None else SCORE_DTYPES[settings.score_dtype]
    call = _Costs(N, V, Ds, widths, dtype, settings, backend, trainable_head, student_stats)
    M = budget.most(N)

    passes = [call.score(N, score_dtype), call.sampled_token(N)]
    normalisers = _Pass(0, 0)
    if len(widths) > 1 and mixture == "arithmetic":
        normalisers = call.normalisers()
    if in_float8:
        shortlist = settings.shortlist_budget.most(N)
        passes += [call.score(shortlist, torch.float32), call.sampled_token(shortlist)]
    divergence = resolve_divergence(settings.divergence)
    if student_stats and divergence.reads_whole_rows and (backend == "torch" or divergence.whole is None):
        passes.append(call.both_again(M))
    passes += [normalisers, call.before_gradient(M, divergence), call.selected(M, divergence)]
    flops = sum(cost.flops for cost in passes)
    gradients = dtype.itemsize * Ds * (N + (V if trainable_head else 0))
    float8_bytes = V * ((widths[0] if len(widths) == 1 else 0) + (0 if student_stats else Ds)) if in_float8 else 0
    sums = 0 if backend == "triton" or dtype.itemsize >= 4 else 4 * M * Ds  # fp32 sums of the gradient of 16-bit hidden states
    return Estimate(
        matmul_units=flops / (2 * N * V * Ds),
        flops=flops,
        float8_flops=call.float8_flops() if in_float8 else 0,
        bytes_moved=sum(cost.bytes for cost in passes),
        gradient_bytes=gradients,
        peak_bytes=workspace_bytes + gradients + POSITION_BYTES * N + float8_bytes + sums,
        saved_bytes=call.saved_row_bytes * M + SAVED_SCALAR_BYTES,
        held_bytes=gradients if backend == "triton" else 0,
    )


class _Pass(NamedTuple):
    """The cost of one pass over rows."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class _Costs:
    N: int
    V: int
    Ds: int
    widths: tuple[int, ...]  # of the teachers
    dtype: torch.dtype
    settings: Settings
    backend: str
    trainable_head: bool
    student_stats: bool

    @property
    def Dt(self) -> int:
        return sum(self.widths)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.settings.workspace_bytes)

    @property
    def top_k(self) -> int:
        return self.settings.top_k

    @property
    def saved_row_bytes(self) -> int:
        """Bytes that one selected row keeps between forward and backward."""
        if self.backend == "triton":  # gradients are computed in the forward
            return ROW_BYTES
        number, divergence = max(4, self.dtype.itemsize), resolve_divergence(self.settings.divergence)
        whole, support = divergence.whole, divergence.on_support
        saved = ROW_BYTES + WEIGHT_BYTES + number  # the weight
        if whole is not None:
            saved += number * (SUMMED_COLUMNS if isinstance(whole, Summed) else KL_COLUMNS)
        if support is not None:
            saved += support.length * (ID_BYTES + number)
            # The log-sum-exp off the list, fp64, and its derivative.
            saved += ID_BYTES + number if support.reads_off_list else 0
        return saved

    def sources(self, n: int) -> tuple[Source, Source]:
        transform = Transform(True, self.V, 1.0)
        with torch.device("meta"):
            pairs = [
                (torch.empty(n, D, dtype=self.dtype), torch.empty(self.V, D, dtype=self.dtype)) for D in (self.Ds, *self.widths)
            ]
        student, teacher, *others = (Source(transform, *pair) for pair in pairs)
        if others:
            mixing = Mixing((1.0,) * len(self.widths), "geometric")
            teacher = teacher._replace(transform=replace(transform, mixing=mixing), others=tuple(others))
        return student, teacher

    def float8_flops(self) -> int:
        """FLOP of the first ranking in 8 bits; a mixture ranks by its models' own dtypes."""
        swept = [] if self.student_stats else [self.Ds]
        swept += list(self.widths) if len(self.widths) == 1 else []
        return 2 * self.N * padded(self.V) * sum(swept)

    def normalisers(self) -> _Pass:
        """One sweep of each teacher of an arithmetic mixture."""
        return self._swept(self.N, self.widths)

    def sampled_token(self, n: int) -> _Pass:
        """Columns of the sampled token: its logits; the present student's normaliser; for "ier" both lists, if swept."""
        needs = self.settings.needs
        read = [*([self.Ds] if "student_logprob" in needs else []), *(self.widths if "teacher_logprob" in needs else ())]
        swept = [self.Ds] if self.student_stats and "student_logprob" in needs else []
        if "ier" in needs and (self.student_stats or self.settings.in_float8):
            swept += [*([] if self.student_stats else [self.Ds]), *self.widths]
        sweeps = self._swept(n, swept)
        return _Pass(sweeps.flops + 2 * n * sum(read), sweeps.bytes + 2 * self.dtype.itemsize * n * sum(read))

    def _swept(self, n: int, widths: Sequence[int]) -> _Pass:
        """One sweep of each head of these hidden sizes, by fp32 logits."""
        moved = self.dtype.itemsize * sum(widths) * (n + self.V) + 2 * 4 * n * self.V * len(widths)
        return _Pass(2 * n * self.V * sum(widths), moved)

    def dots(self, n: int) -> int:
        """FLOP of each model's logits on the other model's top-K, with `student_stats`."""
        return 2 * n * self.top_k * (self.Ds + self.Dt) if self.student_stats else 0

    def score(self, n: int, score_dtype: torch.dtype | None) -> _Pass:
        """One sweep over the heads, in tiles of rows; with `student_stats` over the teacher's head alone."""
        student, teacher = self.sources(n)
        swept = (teacher,) if self.student_stats else (student, teacher)
        workspace = self.workspace
        if self.backend == "triton":
            tile = score_tile(*swept, n=n, top_k=self.top_k, optional=False, workspace=workspace, score_dtype=score_dtype)
            rows = tile.rows
        else:
            grid = score_grid(swept[0], swept[-1], n, top_k=self.top_k, whole_rows=False, workspace=workspace)
            rows = grid.rows
        flops, moved = self.dots(n), 0
        for source, model in ((x, model) for x in swept for model in (x, *x.others)):
            width, in_float8 = model.leading.shape[-1], ranks_in_float8(source, score_dtype)
            weight_bytes = 1 if in_float8 else self.dtype.itemsize
            logit_bytes = tile_dtype(source, score_dtype).itemsize if self.backend == "triton" else 4
            flops += 2 * n * (padded(self.V) if in_float8 else self.V) * width
            moved += -(-n // rows) * self.V * width * weight_bytes + n * width * self.dtype.itemsize
            moved += 2 * n * self.V * logit_bytes  # written, and read by the statistics
        return _Pass(flops, moved)

    def both_again(self, m: int) -> _Pass:
        """Score the selected rows from both models: the rollout's statistics do not hold their divergence."""
        return replace(self, student_stats=False).score(m, torch.float32)

    def before_gradient(self, m: int, divergence: Divergence) -> _Pass:
        """Sweeps of the selected rows for the loss alone, and logits at a few ids."""
        support, ratio = divergence.on_support, divergence.importance
        swept: list[int] = []  # hidden sizes
        listed = 0  # hidden sizes times ids
        if self.backend == "torch":
            swept += [self.Ds, self.Dt] if isinstance(divergence.whole, Summed) else []
            if support is not None:
                models = SUPPORTS[support.support]
                is_known = not self.student_stats or divergence.reads_whole_rows  # the teacher's normaliser, by the score pass
                swept += [self.Ds] * ("student" in models)  # its list; if no other is read, also the sum off it
                swept += [self.Dt] * ("teacher" in models or not is_known)  # its list and its normaliser
                swept += [self.Ds] * (support.reads_off_list and models != ("student",))
                is_of_teacher = models == ("teacher",) and not support.with_token
                listed += support.length * (self.Ds + (0 if is_of_teacher else self.Dt))
        in_16_bits = ratio is not None and self.backend == "triton"
        if ratio is not None and ratio.kind == "ppo" and in_16_bits:
            swept += [self.Ds, self.Dt]
        elif in_16_bits or (self.student_stats and divergence.reads_tokens):
            swept += [self.Ds]
        if divergence.reads_tokens:
            listed += self.Ds + (self.Dt if support is not None and support.with_token else 0)
        groups = -(-m // gradient_grid(*self.sources(m), m, workspace=self.workspace).rows)
        moved = sum(2 * 4 * m * self.V + groups * self.V * width * self.dtype.itemsize for width in swept)
        return _Pass(2 * m * (self.V * sum(swept) + listed), moved)

    def selected(self, m: int, divergence: Divergence) -> _Pass:
        """Logits of the selected rows, the gradient of these logits, and its matmuls."""
        if self.backend == "torch" and divergence.whole is None:
            return self._selected_of_list(m, divergence)
        both_sizes, itemsize, n_logits = self.Ds + self.Dt, self.dtype.itemsize, m * self.V
        flops = 2 * n_logits * (both_sizes + self.Ds + (self.Ds if self.trainable_head else 0))
        student, teacher = self.sources(m)
        both_heads, student_head = self.V * both_sizes * itemsize, self.V * self.Ds * itemsize
        moved = 2 * 4 * n_logits * 3  # fp32 logits of both models: written, read for normalisers and gradient
        moved += itemsize * n_logits * (3 if self.trainable_head else 2)  # their gradient: written, read for dH and dW
        # Gradients of hidden states and weight: written, and scaled in place.
        moved += 3 * itemsize * self.Ds * (self.N + (self.V if self.trainable_head else 0))
        if self.backend == "torch":
            grid = gradient_grid(student, teacher, m, workspace=self.workspace)
            return _Pass(flops, moved + -(-m // grid.rows) * (both_heads + student_head))
        needs, workspace = (True, self.trainable_head), self.workspace
        selected_grid = SelectedGrid.of(student, teacher, n=m, needs=needs, workspace=workspace)
        rows, kept = selected_grid.rows, selected_grid.kept or selected_grid.rows
        spans, groups = -(-m // kept), m // kept * -(-kept // rows) + -(-(m % kept) // rows)
        moved += groups * both_heads + spans * student_head
        if selected_grid.kept:  # the weight's gradient is read and written again for each further span
            moved += 2 * (spans - 1) * student_head
        if selected_grid.second_look:
            flops += 2 * n_logits * both_sizes
            block_groups = -(-m // BlockGrid.of(student, teacher, n=m, workspace=workspace).rows)
            moved += block_groups * both_heads + 2 * 4 * n_logits * 2 + 2 * itemsize * n_logits
        return _Pass(flops, moved)

    def _selected_of_list(self, m: int, divergence: Divergence) -> _Pass:
        """The same on "torch" for a divergence on a list alone, whose gradient reads the student, or columns of its head."""
        support, products = divergence.on_support, 2 if self.trainable_head else 1
        assert support is not None
        width, reads = (self.V, 1) if support.reads_off_list else (min(self.V, m * support.length), 0)
        flops = 2 * m * width * self.Ds * (products + reads)
        moved = m * width * (2 * 4 * reads + 4 * (1 + products)) + (products + reads) * width * self.Ds * self.dtype.itemsize
        return _Pass(flops, moved + 3 * self.dtype.itemsize * self.Ds * (self.N + (self.V if self.trainable_head else 0)))
