"""Estimates of communication: every collective of a call on several ranks and its backward, computed from sizes.

  tp ranks share out the vocabulary (process_group). The ranks that select together (selection_group) are dp cp ranks with
  scope "global", cp ranks with "sequence". N valid rows a rank, M of them trained on, K = top_k, c bytes of the compute
  dtype (4; 8 for fp64). Numbers below are bytes.

  group        purpose                  collective   bytes
  vocabulary   widths of the parts      all-gather   16 a side
               can backend triton run   all-reduce   8
               statistics of N rows     all-gather   N row_bytes(K), in slices of an eighth of the workspace; 8 N more for
                                                     the variance of the log-ratio
               log p(y), log q(y)       all-reduce   c N each, if the selector or the weighting reads it
               a draw                   broadcast    8 a position
               loss of M rows           all-gather   "triton": M row_bytes(1), to read the rows again; "torch": none for the KLs
                                        all-reduce   other divergences: 24 M, summed over the vocabulary, or lists of K ids
               gradient of M rows       all-reduce   c M Ds with a head; in the forward if kernels compute it there
  selection    normalisers, budget      all-reduce   the searches of distributed/order_statistics.py, for any N
               ranks of `ier`           all-gather   8, and 8 a position: `IER` with a base alone
               ties                     all-gather   8 a sequence; with scope "sequence" also 8, the number of sequences
               responses                all-gather   8, and 24 a sequence for their ends, if the selector reads responses
               denominators             all-reduce   16

  On the wire, per rank of p, by rings:   all-reduce 2 (p - 1) / p x,   all-gather (p - 1) x,   broadcast x

Nothing depends on V, except on backend "eager", which gathers logits. Selector and budget run on no position, over ranks that
record each collective instead of sending: so the numbers also hold for a user's own selector. The other collectives are
computed with the size functions of backends/. tests/estimates/test_communication.py counts the collectives of real calls.
Not here: matmuls and memory (compute.py), seconds (docs/scaling.md). Not estimated: sparse teachers, `student_stats`,
`score_dtype`, `threshold`, `check_finite`, frozen hidden states, `selective_opd_token_losses`, other collectives of a trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_ops.arguments import check_choice, check_integer
from opd_ops.backends.shared import joined
from opd_ops.backends.streamed.running import EMPTY_SUMS
from opd_ops.distributed.ranks import Ranks
from opd_ops.divergences import SUPPORTS, Divergence, OnSupport, Summed, is_column, resolve_divergence
from opd_ops.inputs.chunks import chunks
from opd_ops.inputs.positions import Positions
from opd_ops.inputs.sources import Shard
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.budget import Budget, SelectionOptions, select_over_ranks
from opd_ops.selection.normalisers import over_ranks
from opd_ops.selection.sampled import LOGPROBS
from opd_ops.selection.selectors import IER, Selector, bound_selector, is_deterministic, named_selector, selection_options
from opd_ops.selection.stats import OPTIONAL_COLUMNS, SWEPT_COLUMNS, TokenStats
from opd_ops.selection.weighting import named_weighting
from opd_ops.settings import LossOptions, Settings, check_divergence_top_k, check_top_k

if TYPE_CHECKING:
    from typing_extensions import Unpack

SUMS_BYTES = 24  # per row of a divergence summed over the vocabulary: three fp64 numbers (backends/streamed/summed.py)


@dataclass(frozen=True)
class Collective:
    """Equal collectives in a row."""

    phase: str  # "forward", "backward"
    purpose: str  # "widths", "responses", "statistics", "scores", "draw", "budget", "weights", "tokens", "loss",
    # "denominator", or "gradient"
    group: str  # "vocabulary", "selection"
    kind: str  # "all_gather", "all_reduce", "broadcast"
    ranks: int  # of the group
    bytes: int  # that one rank contributes to each; for a broadcast the first rank's
    count: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that one rank sends in all of them, if ranks form a ring."""
        per_byte = {"all_reduce": 2 * (self.ranks - 1) / self.ranks, "all_gather": self.ranks - 1.0, "broadcast": 1.0}
        return self.count * self.bytes * per_byte[self.kind]


@dataclass(frozen=True)
class Communication:
    """The collectives of a call, in order, and their totals."""

    N: int
    collectives: tuple[Collective, ...]

    def only(self, **fields: object) -> Communication:
        """The collectives with these field values, like `only(group="selection")`."""
        matching = (c for c in self.collectives if all(getattr(c, name) == value for name, value in fields.items()))
        return Communication(self.N, tuple(matching))

    @property
    def count(self) -> int:
        return sum(collective.count for collective in self.collectives)

    @property
    def bytes(self) -> int:
        """Bytes that one rank contributes."""
        return sum(collective.count * collective.bytes for collective in self.collectives)

    @property
    def wire_bytes(self) -> float:
        """Bytes that one rank sends, by rings."""
        return sum(collective.wire_bytes for collective in self.collectives)

    @property
    def bytes_per_token(self) -> float:
        """`bytes` over the N valid positions of the rank, over 1 if N is 0."""
        return self.bytes / max(1, self.N)

    @property
    def wire_bytes_per_token(self) -> float:
        return self.wire_bytes / max(1, self.N)


def estimate_communication(
    N: int,
    V: int,
    Ds: int | None,
    settings: Settings | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tp: int = 1,
    dp: int = 1,
    cp: int = 1,
    n_sequences: int = 1,
    n_selected: int | None = None,
    n_positions: int | None = None,
    n_teachers: int = 1,
    mixture: str = "geometric",
    **options: Unpack[LossOptions],
) -> Communication:
    """The collectives of one call of `selective_opd_loss` and its backward, as one rank sees them.

    Args:
        N: Valid positions of this rank, and so of all ranks of its `process_group`; with "teachability-released" all positions
            of its responses.
        V: Entries of the whole vocabulary.
        Ds: Hidden size of the student, whose hidden states require a gradient; None: dense logits.
        settings: Settings of the call, or `options`, settings by name. "auto" counts as backend "triton". For "eager" the
            vocabulary's parts count as equally wide.
        dtype: Dtype of logits, or of hidden states and weights, on both sides.
        tp: Number of ranks that share out the vocabulary: `process_group`.
        dp: Number of ranks with different sequences.
        cp: Number of ranks with different parts of the same sequences. `selection_group` has dp cp ranks with scope "global",
            cp with "sequence", none with "batch".
        n_sequences: Sequences with a budget each, with scope "sequence".
        n_selected: Positions that this rank trains on; None: the budget of N, the average over ranks.
        n_positions: All positions of the call, masked positions too: a selector that draws sends a number for each. None: N.
        n_teachers: Number of teachers of a `Mixture`.
        mixture: Its kind, "geometric" or "arithmetic".
    Returns: `Communication`.
    Raises: ValueError, TypeError: an argument that does not fit, by name.
    Example: eight ranks share out the vocabulary. Each sends 440 bytes of statistics per token, and normalisers and gradients
        of a twentieth of the tokens.
        >>> round(estimate_communication(16_384, 151_936, 4096, tp=8).bytes_per_token)
        1264
    """
    sizes = {"V": V, "tp": tp, "dp": dp, "cp": cp, "n_sequences": n_sequences}
    V, tp, dp, cp, n_sequences = (check_integer(name, value, least=1) for name, value in sizes.items())
    N = check_integer("N", N, least=0)
    Ds = None if Ds is None else check_integer("Ds", Ds, least=1)
    n_selected = None if n_selected is None else check_integer("n_selected", n_selected, least=0)
    n_positions = None if n_positions is None else check_integer("n_positions", n_positions, least=0)
    n_teachers = check_integer("n_teachers", n_teachers, least=1)
    check_choice("mixture", mixture, ("geometric", "arithmetic"))
    settings = Settings.given_or_named(settings, options)
    backend, scope = "triton" if settings.backend == "auto" else settings.backend, settings.scope
    divergence = resolve_divergence(settings.divergence)
    check_top_k(settings.top_k, V)
    check_divergence_top_k(divergence, V)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype")
    if dtype == torch.float64 and backend == "triton":
        raise ValueError("dtype: got torch.float64, which backend 'triton' does not take; expected fp32, bf16 or fp16")
    no_position = torch.empty(0, dtype=torch.long)
    call = _Communication(
        N=N,
        Ds=Ds,
        M=settings.budget.most(N) if n_selected is None else n_selected,
        n_positions=N if n_positions is None else n_positions,
        settings=settings,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        n_selecting={"global": dp * cp, "sequence": cp, "batch": 1}[scope],
        n_sequences=n_sequences if scope == "sequence" else None,
        selector=bound_selector(named_selector(settings.selector), torch.Generator(), lambda: no_position),
        divergence=divergence,
        backend=backend,
        n_teachers=n_teachers,
        n_normalisers=n_teachers if n_teachers > 1 and mixture == "arithmetic" else 0,
        shard=Shard(_RecordingRanks(n=tp), (-(-V // tp),) * tp, V),
    )
    return Communication(N, _joined([*call.forward(), *call.backward()]))


@dataclass(frozen=True)
class _RecordingRanks(Ranks):
    """Stand-in for n ranks, seen from the first one: sends nothing and records (kind, bytes) of each collective."""

    n: int = 1
    sent: list[tuple[str, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.n

    @property
    def rank(self) -> int:
        return 0

    def sum(self, x: Tensor) -> Tensor:
        return self._record("all_reduce", x)

    def gather(self, x: Tensor) -> Tensor:
        return self._record("all_gather", x).unsqueeze(0).expand(self.n, *x.shape)

    def first(self, x: Tensor) -> Tensor:
        return self._record("broadcast", x)

    def _record(self, kind: str, x: Tensor) -> Tensor:
        self.sent.append((kind, x.nbytes))
        return x


@dataclass(frozen=True)
class _Communication:
    N: int
    Ds: int | None
    M: int
    n_positions: int
    settings: Settings
    dtype: torch.dtype  # the compute dtype
    n_selecting: int  # number of ranks that select together
    n_sequences: int | None  # shared by these ranks, with a budget each; None: one budget
    selector: Selector
    divergence: Divergence
    backend: str
    n_teachers: int  # models of a mixture
    n_normalisers: int  # of them that are swept for their normalisers first
    shard: Shard

    @property
    def tp(self) -> int:
        return self.shard.ranks.size

    @property
    def needs(self) -> frozenset[str]:
        """The optional columns of statistics that the call reads."""
        return self.settings.needs

    def forward(self) -> Iterator[Collective]:
        """In the order of the stages: call/prepare.py, score.py, choose.py, losses.py, reduce.py."""
        yield from self._vocabulary(
            "widths", "all_gather", 16 * (1 + self.n_teachers)
        )  # inputs/vocabulary.py: each side's positions and ids
        if self.backend == "triton":
            yield from self._vocabulary("widths", "all_reduce", 8)  # whether all ranks can run it
        yield from self._selection("responses", self._responses())
        for _ in range(self.n_normalisers):
            yield from self._statistics("statistics", self.N, 1, models=1)
        optional = len(self.needs & {"ratio_variance"})
        yield from self._statistics(
            "statistics", self.N, self.settings.top_k, kernels=self.backend == "triton", optional=optional
        )
        if self.backend != "eager" and "jsd" in self.needs:
            yield from self._vocabulary("statistics", "all_reduce", SUMS_BYTES * self.N)
        for _ in self.needs & LOGPROBS:
            yield from self._vocabulary("statistics", "all_reduce", self.dtype.itemsize * self.N)
        for _ in range(2 if "ier" in self.needs else 0):
            yield from self._statistics("statistics", self.N, self.settings.top_k, models=1)
        scores, sent = self._scores()
        yield from self._selection("scores", sent)
        if not is_deterministic(self.selector):
            yield from self._vocabulary("draw", "broadcast", scores.dtype.itemsize * self.n_positions)
        options, sent = self._options()
        yield from self._selection("scores", sent)
        yield from self._selection("budget", self._budget(options))
        yield from self._weights()
        if self.divergence.reads_tokens:
            yield from self._tokens()
        yield from self._loss()
        by_response = self.settings.denominator == "sequence"  # twice: before and after infinite losses are known
        n = self.n_sequences if by_response and self.n_sequences is not None else 1
        for _ in range(2 if by_response else 1):
            yield from self._selection("denominator", [("all_reduce", 16 * n)])  # two int64

    def _tokens(self) -> Iterator[Collective]:
        """The models' logits of the sampled tokens, for a ratio and for metrics (call/losses.py)."""
        support, ratio = self.divergence.on_support, self.divergence.importance
        if ratio is not None and self.backend == "triton":  # normalisers in fp32
            models, kernels = (2, True) if ratio.kind == "ppo" else (1, False)
            yield from self._statistics("tokens", self.M, 1, models=models, kernels=kernels)
        for _ in range(2 if support is not None and support.with_token else 1):
            yield from self._vocabulary("tokens", "all_reduce", self.M * self.dtype.itemsize)

    @property
    def _gradient_in_forward(self) -> bool:
        """Whether kernels compute the gradient together with the loss (backends/triton/shards.py)."""
        return self.backend == "triton" and is_column(self.divergence)

    def backward(self) -> Iterator[Collective]:
        if not self._gradient_in_forward:
            yield from self._gradient("backward")

    def _gradient(self, phase: str) -> Iterator[Collective]:
        if self.Ds is not None:
            yield from self._vocabulary("gradient", "all_reduce", self.M * self.Ds * self.dtype.itemsize, phase=phase)

    def _statistics(
        self,
        purpose: str,
        n: int,
        top_k: int,
        *,
        models: int = 2,
        kernels: bool = False,
        dtype: torch.dtype | None = None,
        optional: int = 0,
    ) -> Iterator[Collective]:
        """Statistics of n rows, from both models or one (backends/shared/joined.py).

        `kernels`: whether kernels compute them; `dtype`: None: the compute dtype; `optional`: number of optional columns sent.
        """
        dtype, columns = dtype or self.dtype, len(SWEPT_COLUMNS if kernels else EMPTY_SUMS) + optional if models == 2 else 2
        if self.backend == "eager":  # the logits of all ranks
            for _ in range(models):
                yield from self._vocabulary(purpose, "all_gather", n * self.shard.width * self.dtype.itemsize)
            return
        rows = joined.rows_at_a_time(self.shard, top_k, dtype, Workspace(self.settings.workspace_bytes), columns=columns)
        per_row = joined.row_bytes(top_k, dtype, columns=columns, models=models)
        for part in chunks(n, rows):
            yield from self._vocabulary(purpose, "all_gather", (part.stop - part.start) * per_row)

    def _loss(self) -> Iterator[Collective]:
        """The loss of the selected rows: backends/triton/shards.py for the KLs, else backends/streamed/loss.py."""
        whole, support = self.divergence.whole, self.divergence.on_support
        if self.backend == "eager":
            yield from self._statistics("loss", self.M, 1)
            return
        if self._gradient_in_forward:
            yield from self._statistics("loss", self.M, 1, kernels=True, dtype=torch.float64)
            yield from self._gradient("forward")
        elif self.divergence.reads_whole_rows and self.backend == "triton":  # with more digits than scores in 16 bits have
            yield from self._statistics("loss", self.M, 1)
        if isinstance(whole, Summed):
            yield from self._vocabulary("loss", "all_reduce", SUMS_BYTES * self.M)
        if support is not None:
            yield from self._on_list(support)

    def _on_list(self, support: OnSupport) -> Iterator[Collective]:
        """Lists and the teacher's normaliser, then both models on the list and off it (backends/streamed/list_losses.py)."""
        listed, off_list = self.M * support.length * self.dtype.itemsize, 8 * self.M  # bytes; off the list in fp64
        models = SUPPORTS[support.support]
        if "student" in models:
            yield from self._statistics("loss", self.M, support.top_k, models=1)
        # Scores in 16 bits have no normaliser with enough digits; statistics of whole rows were computed again in more.
        is_rounded = self.backend == "triton" and not self.divergence.reads_whole_rows
        if "teacher" in models or is_rounded:
            yield from self._statistics("loss", self.M, max(1, support.top_k), models=1)
        if models != ("teacher",) or support.with_token:
            yield from self._vocabulary("loss", "all_reduce", listed)
        if support.reads_teacher_off_list:
            yield from self._vocabulary("loss", "all_gather", off_list)
        yield from self._vocabulary("loss", "all_reduce", listed)
        if support.reads_off_list:
            yield from self._vocabulary("loss", "all_gather", off_list)

    def _responses(self) -> list[tuple[str, int]]:
        """Collectives that find the responses of sequences, if ranks hold parts of them."""
        ranks = _RecordingRanks(n=self.n_selecting)
        if self.n_sequences is not None and "response_place" in self.needs:
            no_position = torch.Size((self.n_sequences, 0))
            Positions(None, None, None, None, no_position, torch.device("cpu")).response_places(ranks)
        return ranks.sent

    def _statistics_of_no_position(self) -> TokenStats:
        optional = OPTIONAL_COLUMNS - self.needs
        columns = {name: torch.empty(0, dtype=self.dtype) for name in TokenStats._fields if name not in optional}
        integers = {"response_place": torch.empty(0, dtype=torch.long)} if "response_place" in columns else {}
        return TokenStats(**columns | integers | {"valid": torch.empty(0, dtype=torch.bool)})

    def _scores(self) -> tuple[Tensor, list[tuple[str, int]]]:
        """The selector's scores of no position, for their dtype, and the collectives of its normalisers."""
        ranks = _RecordingRanks(n=self.n_selecting)
        with torch.no_grad(), over_ranks(ranks):
            scores = self.selector(self._statistics_of_no_position())
        if isinstance(self.selector, IER) and self.selector.base is not None:  # its ranks gather the values of all positions
            ranks.sent[1] = ("all_gather", 8 * self.n_positions)
        return scores, ranks.sent

    def _weights(self) -> Iterator[Collective]:
        """The weighting's normalisers, its first rank's weights, and their mean (call/choose.py)."""
        weighting = named_weighting(self.settings.weighting)
        if weighting is None or self.settings.weighting_share == 0:
            return
        ranks = _RecordingRanks(n=self.n_selecting)
        with torch.no_grad(), over_ranks(ranks):
            weights = weighting(self._statistics_of_no_position())
        yield from self._selection("weights", ranks.sent)
        yield from self._vocabulary("weights", "broadcast", weights.dtype.itemsize * self.n_positions)
        kind, n = self.settings.weight_mean, 1 if self.n_sequences is None else self.n_sequences
        if kind == "sequence" and self.n_sequences is not None:
            yield from self._selection("weights", [("all_reduce", 16 * n)])  # two fp64
        elif kind in ("valid", "selected"):
            yield from self._selection("weights", [("all_reduce", 16)])

    def _options(self) -> tuple[SelectionOptions, list[tuple[str, int]]]:
        """The options that the selector sets for the selection, and the collectives of their normalisers."""
        ranks = _RecordingRanks(n=self.n_selecting)
        with torch.no_grad(), over_ranks(ranks):
            options = selection_options(self.selector, self._statistics_of_no_position())
        return options, ranks.sent

    def _budget(self, options: SelectionOptions) -> list[tuple[str, int]]:
        """Collectives that find the n-th best score and count its ties on each rank."""
        ranks, valid = _RecordingRanks(n=self.n_selecting), torch.empty(0, dtype=torch.bool)
        sequences = None if self.n_sequences is None else (valid.long(), self.n_sequences)
        places = options["places"] if sequences is None else None  # as call/choose.py
        scores = torch.empty(0, dtype=self.dtype)
        budget, both_ends = Budget(self.settings.fraction, self.settings.count), options["both_ends"]
        select_over_ranks(scores, valid, budget, ranks, sequences, places=places, both_ends=both_ends)
        return ranks.sent

    def _vocabulary(self, purpose: str, kind: str, n_bytes: int, *, phase: str = "forward") -> Iterator[Collective]:
        if self.tp > 1 and n_bytes:
            yield Collective(phase, purpose, "vocabulary", kind, self.tp, n_bytes, 1)

    def _selection(self, purpose: str, sent: list[tuple[str, int]]) -> Iterator[Collective]:
        if self.n_selecting > 1:
            for kind, n_bytes in sent:
                yield Collective("forward", purpose, "selection", kind, self.n_selecting, n_bytes, 1)


def _joined(collectives: list[Collective]) -> tuple[Collective, ...]:
    """Equal neighbours joined, with their count."""
    counted: list[Collective] = []
    for collective in collectives:
        if counted and replace(counted[-1], count=1) == collective:
            counted[-1] = replace(counted[-1], count=counted[-1].count + 1)
        else:
            counted.append(collective)
    return tuple(counted)
