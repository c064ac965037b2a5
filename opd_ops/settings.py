"""`Settings`: the choices of a user for a run, as one frozen object that is checked when it is made.

Only this file has a setting's default, check and sentence; three defaults that inputs share stand in arguments.py. `documented`
puts the sentences into the docstrings of functions that take settings by name; command lines print the same sentences.
A host is a trainer that calls this package: TRL, verl, NeMo-RL, transformers (opd_ops/integrations/).
Not here: tensors of a batch (inputs/batch.py), checks that need the models (call/prepare.py).
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypedDict, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.arguments import (
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_K,
    DEFAULT_WORKSPACE_BYTES,
    check_choice,
    check_flag,
    check_ids,
    check_integer,
    check_layout,
    check_positive,
    did_you_mean,
    may_look,
    plain,
    real,
    refuse_unknown_names,
    shown,
)
from opd_ops.backends.resolve import check_backend
from opd_ops.divergences import DIVERGENCES, Divergence, resolve_divergence
from opd_ops.inputs import float8
from opd_ops.inputs.batch import Batch
from opd_ops.inputs.pair import check_list_divergence
from opd_ops.selection.budget import SHORTLIST, Budget
from opd_ops.selection.selectors import (
    SELECTORS,
    Selector,
    check_known,
    check_needs,
    check_ranks_twice,
    check_whole_sequences,
    named_selector,
    needs_of,
)
from opd_ops.selection.stats import TOKEN_COLUMNS
from opd_ops.selection.weighting import MEANS, WEIGHTINGS, check_weighting_known, named_weighting

SCOPES = ("batch", "sequence", "global")
DENOMINATORS = ("selected", "valid", "sequence")
SCORE_DTYPES = {"float32": torch.float32, "float8": float8.DTYPE}

T = TypeVar("T")


def _setting(default: T, sentence: str) -> T:
    """A field of a dataclass; type checkers see its default."""
    return field(default=default, metadata={"help": sentence})


class ScoringOptions(TypedDict, total=False):
    """Settings by name that scores depend on."""

    selector: str | Selector
    selection_group: dist.ProcessGroup | None
    divergence: str | Divergence
    top_k: int
    temperature: float
    special_ids: Sequence[int]
    eos_ids: Sequence[int]
    vocab_size: int | None
    process_group: dist.ProcessGroup | None
    generator: torch.Generator | None
    backend: str
    workspace_bytes: int
    score_dtype: str | None
    check_finite: bool


class TokenLossOptions(ScoringOptions, total=False):
    """The settings of `ScoringOptions`, and the settings that select positions."""

    fraction: float
    count: int | None
    threshold: Tensor | float | None
    scope: str
    weighting: str | Selector | None
    weight_mean: str | None
    weighting_share: float
    ignore_index: int


class LossOptions(TokenLossOptions, total=False):
    """All settings by name: the type of `**options`."""

    denominator: str
    inplace_backward: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices of a user for a run. `replace(settings, fraction=0.1)` makes a changed copy.

    Args:
        {settings}
    Raises: TypeError: an unknown name, with the nearest known name. ValueError, TypeError: a wrong value, or two values that
        exclude each other.
    """

    selector: str | Selector = _setting(
        "teachability",
        f"The rule that scores positions; the highest are selected. A name: {', '.join(SELECTORS)}; or a callable that takes "
        "`TokenStats` and returns scores, (...).",
    )
    fraction: float = _setting(0.05, "Share of the valid positions to train on, in (0, 1]; 1.0: plain distillation.")
    count: int | None = _setting(
        None, "Instead of a share: train on this many valid positions of each scope, or on all of them where there are fewer."
    )
    threshold: Tensor | float | None = _setting(
        None, "Instead of a share: train on all valid positions that score this or more."
    )
    scope: str = _setting(
        "batch",
        "The positions that share a budget, the number to select: the 'batch', each 'sequence' (a row of the last "
        "dimension, or a span of cu_seqlens), or 'global', all ranks of selection_group.",
    )
    selection_group: dist.ProcessGroup | None = _setting(
        None, "Ranks that select together: under 'global' (None: all), or under 'sequence' if they hold parts of sequences."
    )
    weighting: str | Selector | None = _setting(
        None,
        f"The rule that weights the losses, detached: {', '.join(WEIGHTINGS)}, a selector's name, or a callable that takes "
        "`TokenStats` and returns factors, (...). They multiply the argument `weights`.",
    )
    weight_mean: str | None = _setting(
        None,
        "Divide these weights by their mean over the 'valid' or 'selected' positions, or the valid ones of each 'sequence'.",
    )
    weighting_share: float = _setting(
        1.0, "How much of the weighting acts, 0 to 1: a loss is multiplied by 1 + weighting_share (w - 1), w its weight."
    )
    divergence: str | Divergence = _setting(
        "reverse_kl",
        f"Loss on the selected positions. A name: {', '.join(DIVERGENCES)}; or an instance with parameters: JSD(beta=0.3).",
    )
    denominator: str = _setting(
        "selected",
        "Divide the sum of losses by the number of 'selected' or of all 'valid' positions; 'sequence': the mean over the "
        "selected positions of each response, then over the responses.",
    )
    top_k: int = _setting(
        DEFAULT_TOP_K,
        "K, at most V. A model's support is its K likeliest ids. Teachability compares the models on both supports, and reads "
        "the teacher's probability of the ids in the student's support.",
    )
    temperature: float = _setting(
        DEFAULT_TEMPERATURE, "Divides both models' logits, > 0; the loss is not scaled back by its square."
    )
    ignore_index: int = _setting(-100, "Label of positions that are not valid.")
    special_ids: Sequence[int] = _setting(
        (), "In each sequence, the first valid position of each of these ids is not trained on."
    )
    eos_ids: Sequence[int] = _setting(
        (), "Ids with the same meaning, like two ids that end a turn: their probabilities are added up."
    )
    vocab_size: int | None = _setting(None, "Number of entries that both models are cut to; None: the smaller vocabulary.")
    process_group: dist.ProcessGroup | None = _setting(
        None, "Ranks that each hold a part of the vocabulary; DTensors bring their own."
    )
    generator: torch.Generator | None = _setting(
        None, "Generator of selectors that draw; must be None under activation checkpointing."
    )
    backend: str = _setting("auto", "'triton' (a GPU), 'torch' (any device), 'eager' (the specification); 'auto' chooses.")
    workspace_bytes: int = _setting(
        DEFAULT_WORKSPACE_BYTES, "Most scratch memory of a call, beyond inputs, outputs, gradients and O(N) numbers."
    )
    score_dtype: str | None = _setting(
        None, "Dtype of a head's logits for scores, on 'triton': 'float32', 'float8' (Hopper); None: the head's dtype."
    )
    inplace_backward: bool = _setting(False, "The gradient overwrites the student's logits ('triton', dense logits).")
    check_finite: bool = _setting(False, "Raise if a valid position has no finite softmax.")

    def __post_init__(self) -> None:
        eos_ids = check_ids("eos_ids", self.eos_ids)
        checked: dict[str, object] = {
            "fraction": check_fraction(self.fraction),
            "count": None if self.count is None else check_integer("count", self.count, least=1),
            "threshold": check_threshold(self.threshold),
            "weighting_share": check_share(self.weighting_share),
            "top_k": check_integer("top_k", self.top_k, least=1),
            "temperature": check_positive("temperature", self.temperature),
            "ignore_index": _check_ignore_index(self.ignore_index),
            "special_ids": check_ids("special_ids", self.special_ids),
            "eos_ids": eos_ids,
            "workspace_bytes": check_integer("workspace_bytes", self.workspace_bytes, least=1),
            "inplace_backward": check_flag("inplace_backward", self.inplace_backward),
            "check_finite": check_flag("check_finite", self.check_finite),
        }
        if len(set(eos_ids)) != len(eos_ids):
            raise ValueError(f"eos_ids: got {list(eos_ids)}, expected different ids")
        if self.vocab_size is not None:
            checked["vocab_size"] = check_integer("vocab_size", self.vocab_size, least=1)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check_choice("scope", self.scope, SCOPES)
        check_choice("denominator", self.denominator, DENOMINATORS)
        check_backend(self.backend)
        if self.weight_mean is not None:
            check_choice("weight_mean", self.weight_mean, MEANS)
        if self.score_dtype is not None:
            check_choice("score_dtype", self.score_dtype, tuple(SCORE_DTYPES))
        resolve_divergence(self.divergence)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator: got {self.generator!r}, expected a torch.Generator or None")
        self._check_groups()
        self._check_together(named_selector(self.selector), named_weighting(self.weighting))

    def _check_together(self, selector: Selector, weighting: Selector | None) -> None:
        """Refuse settings that exclude each other, and rules that need what is no column."""
        for rule in filter(None, (selector, weighting)):
            check_needs(rule)
        takes_both_ends = getattr(selector, "both_ends", False)
        if self.weight_mean is not None and weighting is None:
            raise ValueError(f"weight_mean: got {self.weight_mean!r} without a weighting, expected None; pass a weighting too")
        if weighting is None and self.weighting_share != 1:
            raise ValueError(
                f"weighting_share: got {self.weighting_share} without a weighting, expected 1; pass a weighting too"
            )
        if self.score_dtype == "float8":
            check_ranks_twice(selector)
            if self.threshold is not None:
                raise ValueError(
                    "threshold: score_dtype='float8' scores only a shortlist of the budget exactly; pass one of the two"
                )
            if takes_both_ends:
                raise ValueError(
                    "score_dtype: got 'float8', whose shortlist has the highest scores alone, but the selector takes both ends"
                )
        if self.threshold is not None and self.count is not None:
            raise ValueError(
                f"threshold: got {shown(self.threshold)} and count {self.count}, expected one of them; leave one out"
            )
        if self.threshold is not None and takes_both_ends:
            raise ValueError(
                "threshold: the selector takes both ends of its scores by a budget; pass fraction or count instead"
            )
        if self.scope == "sequence" and self.selection_group is not None:
            check_whole_sequences(selector)
            if weighting is not None:
                check_whole_sequences(weighting, "weighting")
            if self.special_ids:
                raise ValueError(
                    "special_ids: got ids, whose first occurrence in a sequence may be on another rank of selection_group; "
                    "take these positions from the mask"
                )

    def _check_groups(self) -> None:
        for name in ("process_group", "selection_group"):
            group = getattr(self, name)
            if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
                raise TypeError(f"{name}: got {type(group).__name__}, expected a ProcessGroup that this process is in, or None")

    @classmethod
    def of(cls, options: Mapping[str, object], *, given: Sequence[str] = (), of: type = LossOptions) -> Settings:
        """Settings from `options`, values by name.

        Args:
            given: Names that the host passes itself: options must not have them.
            of: The TypedDict of the allowed names.
        Raises: TypeError: an unknown name, with the nearest known name, or a `given` name. As `Settings` otherwise.
        """
        names = [name for name in NAMES[of] if name not in given]
        for name in options:
            if name in given:
                raise TypeError(_passed_by_host(name))
            if name not in names:
                raise TypeError(_unknown(name, names))
        return cls(**cast("LossOptions", options))

    @classmethod
    def given_or_named(
        cls, settings: Settings | None, options: Mapping[str, object], *, given: Sequence[str] = (), of: type = LossOptions
    ) -> Settings:
        """`settings`, or settings from `options`; passing both is an error. Other arguments are the same as for `of`.

        Raises: TypeError: also for `settings` with a value, other than the default, that the function does not take.
        """
        if settings is None:
            return cls.of(options, given=given, of=of)
        if not isinstance(settings, Settings):
            raise TypeError(f"settings: got {type(settings).__name__}, expected Settings; pass settings by name otherwise")
        if options:
            raise TypeError(f"settings: got them and {', '.join(options)}; expected replace(settings, ...)")
        not_taken = [x for x in fields(cls) if x.name in given or x.name not in NAMES[of]]
        for name in [x.name for x in not_taken if getattr(settings, x.name) != x.default]:
            if name in given:
                raise TypeError(_passed_by_host(name))
            raise TypeError(f"{name}: got {shown(getattr(settings, name))} in settings, which this function does not read")
        return settings

    def for_host(self, *, passes_tokens: bool, teacher: str | None = None, selects_over_ranks: bool = True) -> Settings:
        """The same settings, checked for a host.

        Args:
            passes_tokens: Whether the host passes tokens or labels.
            teacher: Class name of the sparse teacher that the host passes; None: logits or heads.
            selects_over_ranks: Whether ranks may share a budget: they call equally often, and counts are those of all ranks.
        Raises: ValueError: a setting that needs an input which the host does not pass, or a budget that it cannot serve.
        """
        divergence = resolve_divergence(self.divergence)
        if teacher is not None:
            check_list_divergence(divergence, teacher)
            check_rules_known(named_selector(self.selector), named_weighting(self.weighting), teacher)
        if divergence.importance is not None:
            raise ValueError(
                f"old_logprobs: got None, but divergence {divergence.name!r} has the ratio {divergence.importance.kind!r} to "
                "the probabilities at sampling time, which this host does not pass; use ratio='none', or the divergence alone"
            )
        if divergence.reads_tokens and not passes_tokens and teacher != "SampledLogprobs":
            raise ValueError(
                f"tokens: got None, but divergence {divergence.name!r} reads the sampled token, which this host does not pass"
            )
        if self.needs & TOKEN_COLUMNS and not passes_tokens and teacher != "SampledLogprobs":
            raise ValueError(
                f"tokens: got None, but selector {self.selector!r} or weighting {self.weighting!r} reads the sampled token, "
                "which this host does not pass"
            )
        if self.denominator == "sequence":
            raise ValueError(
                "denominator: got 'sequence', a mean over responses, but this host divides by its count of tokens; use "
                "'selected' or 'valid', or selective_opd_loss in a loop of your own"
            )
        if self.special_ids and not passes_tokens:
            raise ValueError("special_ids: got ids, but this host passes no tokens to look among")
        if not selects_over_ranks and (self.scope == "global" or self.selection_group is not None):
            refused = "scope: got 'global'" if self.scope == "global" else "selection_group: got a group"
            hint = "scope 'batch' or 'sequence' without a group; for one budget use selective_opd_loss in a loop of your own"
            raise ValueError(f"{refused}, but this host cannot share a budget among ranks; expected {hint}")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """The optional columns of statistics that the selector and the weighting read."""
        weighting = named_weighting(self.weighting)
        return needs_of(named_selector(self.selector)) | (frozenset() if weighting is None else needs_of(weighting))

    @property
    def every_token(self) -> Settings:
        """The same settings for an evaluation: every valid position of this process is selected."""
        return replace(
            self,
            fraction=1.0,
            count=None,
            selector="all",
            threshold=None,
            scope="batch",
            selection_group=None,
            weighting=None,
            weight_mean=None,
            weighting_share=1.0,
        )

    @property
    def budget(self) -> Budget:
        """How many positions of a scope are selected."""
        return Budget(self.fraction, self.count, self.threshold)

    @property
    def shortlist_budget(self) -> Budget:
        """How many positions of a scope are scored again after a ranking in 8 bits."""
        return self.budget.times(SHORTLIST)

    @property
    def in_float8(self) -> bool:
        """Whether a first ranking in 8 bits comes before the exact scores."""
        return self.score_dtype == "float8"


def _passed_by_host(name: str) -> str:
    return f"{name}: got it among the settings of the loss, but the host passes its own; leave it out"


def _unknown(name: str, names: Sequence[str]) -> str:
    if name in HELP:
        return f"{name}: got a setting that this function does not read; leave it out"
    if name in Batch._fields:
        return f"{name}: got an argument of a batch, which is not taken here; pass it to selective_opd_loss"
    instead = did_you_mean(name, [*names, *Batch._fields]) or f"; expected one of: {', '.join(sorted(names))}"
    return f"settings: got {name!r}, an unknown name{instead}"


refuse_unknown_names(Settings, lambda name: _unknown(name, list(HELP)))


def check_fraction(fraction: object, name: str = "fraction") -> float:
    number = real(fraction)
    if not 0 < number <= 1:
        raise ValueError(f"{name}: got {shown(fraction)}, expected a number in (0, 1]")
    return number


def check_share(share: object, name: str = "weighting_share") -> float:
    number = real(share)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: got {shown(share)}, expected a number in [0, 1]")
    return number


def check_threshold(value: object) -> Tensor | float | None:
    if value is None:
        return None
    number = scalar_of("threshold", value) if isinstance(value, Tensor) else real(value)
    if number is not None and math.isnan(number):
        raise ValueError(f"threshold: got {shown(value)}, expected a number or a 0-dim tensor of one")
    return value if isinstance(value, Tensor) else number


def check_rules_known(selector: Selector, weighting: Selector | None, known: str) -> None:
    """Refuse a rule that needs more than the input `known` holds: a key of `selectors.PARTLY_KNOWN`."""
    check_known(selector, known)
    if weighting is not None:
        check_weighting_known(weighting, known)


def check_top_k(top_k: int, vocab_size: int) -> None:
    if top_k > vocab_size:
        raise ValueError(f"top_k: got {top_k}, expected at most the vocabulary size, {vocab_size}")


def check_divergence_top_k(divergence: Divergence, vocab_size: int) -> None:
    support = divergence.on_support
    if support is not None and support.top_k > vocab_size:
        raise ValueError(
            f"divergence: {divergence.name!r} has top_k {support.top_k}, expected at most the vocabulary size, {vocab_size}"
        )


def scalar_of(name: str, tensor: Tensor) -> float | None:
    """The number of a 0-dim tensor; None if reading it would make the CPU wait for a device or break a graph."""
    check_layout(name, tensor)
    if tensor.dim():
        raise ValueError(f"{name}: got a tensor of shape {tuple(tensor.shape)}, expected a 0-dim one")
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(f"{name}: got a tensor of dtype {tensor.dtype}, expected one of a real number")
    return float(tensor) if may_look(tensor) else None


def _check_ignore_index(value: object) -> int:
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"ignore_index: got {shown(value)}, expected an integer")
    return number


DEFAULTS = Settings()
HELP: dict[str, str] = {x.name: str(x.metadata["help"]) for x in fields(Settings)}
NAMES: dict[type, list[str]] = {  # of each TypedDict, in the order of `Settings`
    options: [name for name in HELP if name in options.__optional_keys__]
    for options in (ScoringOptions, TokenLossOptions, LossOptions)
}
Function = TypeVar("Function", bound=Callable[..., object])


def documented(options: type) -> Callable[[Function], Function]:
    """A decorator: help() shows the settings of a TypedDict by name, with defaults, and their sentences for `{settings}`.

    A function takes these settings as `**options`.
    """
    names = NAMES[options]

    def document(function: Function) -> Function:
        lines = [
            line
            for name in names
            for line in textwrap.wrap(
                f"{name}: {HELP[name]}", 116, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
            )
        ]
        assert function.__doc__ is not None
        function.__doc__ = function.__doc__.replace("        {settings}", "\n".join(lines))
        signature = inspect.signature(function)
        own = [x for x in signature.parameters.values() if x.kind != inspect.Parameter.VAR_KEYWORD]
        named = inspect.signature(Settings).parameters
        if len(own) < len(signature.parameters):
            function.__signature__ = signature.replace(parameters=[*own, *(named[name] for name in names)])  # type: ignore[attr-defined]
        return function

    return document


documented(LossOptions)(Settings)
