"""TRL: the selective loss inside `DistillationTrainer`, by one line or by a subclass, and in the shape of GKD's and GOLD's
loss.

  TRL:   sum over valid tokens of JSD_beta / num_items
  here:  sum over selected ones / (num_items n_selected / n_valid), so that selecting does not shrink the step

`DistillationTrainer` hands hidden states and heads of both models to one module-level function; it is private, so its
parameters are compared before it is replaced. TRL rolls out once per optimizer step and cuts that into micro-batches: with
scope "batch" the budget is one per micro-batch.
Not here: the settings (opd_ops/settings.py), the loss itself (opd_ops/loss.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

try:
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer import distillation_trainer
except ImportError as error:
    raise ImportError(f"trl: {error}; opd_ops.integrations.trl fits trl 1.16, install 'trl==1.16.*'") from error

from opd_ops.call.metrics import as_floats
from opd_ops.divergences import JSD, Divergence, resolve_divergence
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.unshard import is_dtensor, unshard
from opd_ops.loss import SelectiveOPDLoss
from opd_ops.settings import DEFAULTS, HELP, LossOptions, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

FITS = "1.16"
HOOK = "_chunked_divergence_loss"
PARAMETERS = (
    "student_hidden_states",
    "teacher_hidden_states",
    "student_lm_head_weight",
    "teacher_lm_head_weight",
    "completion_mask",
    "beta",
    "num_items_in_batch",
    "student_lm_head_bias",
    "teacher_lm_head_bias",
    "student_logit_scale",
    "teacher_logit_scale",
    "student_final_logit_softcapping",
    "teacher_final_logit_softcapping",
    "temperature",
)
GIVEN = ("mask", "num_items_in_batch", "temperature")  # by the trainer
LOGGED = ("kl_selected", "kl_all", "entropy_selected", "support_mass", "n_valid", "n_selected", "n_infinite", "score_threshold")
Metrics = dict[str, Tensor]


class _Swap(AbstractContextManager["_Swap"]):
    """The hook replaced, until `undo()` or the block's end."""

    def __init__(self, settings: Settings, divergence: Divergence | None, on_metrics: Callable[[Metrics], None] | None) -> None:
        self._replaced, self._is_undone = getattr(distillation_trainer, HOOK, None), False
        _check_hook(self._replaced)
        signature = inspect.signature(self._replaced)  # type: ignore[arg-type]
        self._own = partial(_Hook(settings, divergence, on_metrics, signature))
        self._own.__signature__ = signature  # type: ignore[attr-defined]
        self._own.swap = self  # type: ignore[attr-defined]
        setattr(distillation_trainer, HOOK, self._own)

    def undo(self) -> None:
        """Put back what was there before, once the later patches on top are undone too; nothing where that has happened.

        Raises: RuntimeError: something else has replaced the hook since; undo that first.
        """
        if self._is_undone:
            return
        found = getattr(distillation_trainer, HOOK)
        above = found
        while above is not self._own:
            swap = getattr(above, "swap", None)
            if swap is None:
                raise RuntimeError(
                    f"trl: trl.trainer.distillation_trainer.{HOOK} is {above!r}, which was put there after this patch, "
                    "expected this patch's own; put back what that replaced first, then undo this"
                )
            above = swap._replaced
        self._is_undone = True
        while (swap := getattr(found, "swap", None)) is not None and swap._is_undone:
            found = swap._replaced
        setattr(distillation_trainer, HOOK, found)

    def __exit__(self, *_: object) -> None:
        self.undo()


class patch_trl(_Swap):
    """Swap the loss inside TRL's `DistillationTrainer` for `selective_opd_loss`, at once, until `undo()` or the block's end.

    Evaluation, which runs without grad mode, takes all valid tokens.

    Args:
        on_metrics: Called with the loss's `metrics` (0-dim tensors) after each micro-batch.
        options: `Settings` by name: fraction (1.0 is TRL's loss), selector, scope, top_k, ...; `divergence` replaces the JSD
            that the trainer's `beta` stands for. The temperature is the trainer's.
    Raises: RuntimeError: a TRL whose hook is another one; says which versions fit. As `Settings`.
    Example:
        >>> with patch_trl(fraction=0.1, selector="teachability"):
        ...     DistillationTrainer(student, teacher, args=config, train_dataset=prompts).train()
    """

    def __init__(self, *, on_metrics: Callable[[Metrics], None] | None = None, **options: Unpack[LossOptions]) -> None:
        settings = Settings.of(options, given=GIVEN).for_host(passes_tokens=False)
        super().__init__(settings, _named_divergence(options), on_metrics)


def _named_divergence(options: Mapping[str, Any]) -> Divergence | None:
    return resolve_divergence(options["divergence"]) if "divergence" in options else None


def _check_hook(hook: object) -> None:
    found = tuple(inspect.signature(hook).parameters) if callable(hook) else None
    if found != PARAMETERS:
        came = "has no function of that name" if found is None else f"takes ({', '.join(found)})"
        raise RuntimeError(
            f"trl {version('trl')}: trl.trainer.distillation_trainer.{HOOK} {came}, expected ({', '.join(PARAMETERS)}). "
            f"This adapter fits trl {FITS}: install 'trl=={FITS}.*', or call selective_opd_loss in a subclass's _compute_loss"
        )


@dataclass(frozen=True)
class _Hook:
    """What replaces TRL's function: its arguments by TRL's own names, and its contract."""

    settings: Settings
    divergence: Divergence | None  # None: the JSD of the trainer's beta
    on_metrics: Callable[[Metrics], None] | None
    signature: inspect.Signature

    def __call__(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, sum of the student's entropies in nats, number of valid tokens."""
        bound = self.signature.bind(*arguments, **named)
        bound.apply_defaults()
        given = bound.arguments
        settings = self.settings if torch.is_grad_enabled() else self.settings.every_token
        divergence = JSD(given["beta"]) if self.divergence is None else self.divergence
        loss_fn = SelectiveOPDLoss(replace(settings, divergence=divergence, temperature=given["temperature"]))
        student, teacher = _head(given, "student"), _head(given, "teacher")
        out = loss_fn(student, teacher, mask=given["completion_mask"], num_items_in_batch=given["num_items_in_batch"])
        if self.on_metrics is not None:
            self.on_metrics(out.metrics)
        return out.loss, out.metrics["entropy_sum"], out.metrics["n_valid"]


def _head(given: Mapping[str, Any], model: str) -> LinearHead:
    """A model's head, gathered once where FSDP2 has sharded it, in the dtype of its hidden states then."""
    hidden, weight, bias = (given[f"{model}_{name}"] for name in ("hidden_states", "lm_head_weight", "lm_head_bias"))
    if is_dtensor(weight):
        weight = unshard(weight, hidden.dtype)
        bias = None if bias is None else unshard(bias, hidden.dtype).to(hidden.dtype)
    scale, softcap = given[f"{model}_logit_scale"], given[f"{model}_final_logit_softcapping"]
    return LinearHead(hidden, weight, bias, scale=float(scale), softcap=softcap)


@dataclass
class SelectiveDistillationConfig(DistillationConfig):
    """TRL's `DistillationConfig`, and how tokens are selected.

    Raises: as `Settings`, in its words: `support_top_k` is its top_k, `loss_backend` its backend.
    """

    fraction: float = field(default=DEFAULTS.fraction, metadata={"help": HELP["fraction"]})
    selector: str = field(default=str(DEFAULTS.selector), metadata={"help": HELP["selector"]})
    scope: str = field(default=DEFAULTS.scope, metadata={"help": HELP["scope"]})
    divergence: str | None = field(
        default=None, metadata={"help": "Name of a divergence; None: the JSD of `beta`, which at 1.0 is reverse KL."}
    )
    support_top_k: int = field(default=DEFAULTS.top_k, metadata={"help": HELP["top_k"]})
    denominator: str = field(default=DEFAULTS.denominator, metadata={"help": HELP["denominator"]})
    workspace_bytes: int = field(default=DEFAULTS.workspace_bytes, metadata={"help": HELP["workspace_bytes"]})
    loss_backend: str = field(default=DEFAULTS.backend, metadata={"help": HELP["backend"]})

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.settings  # refused now, and not in the first step

    @property
    def settings(self) -> Settings:
        """Of the loss, whose top_k is `support_top_k`, because TRL's own is the one of sampling."""
        return Settings(
            fraction=self.fraction,
            selector=self.selector,
            scope=self.scope,
            denominator=self.denominator,
            top_k=self.support_top_k,
            workspace_bytes=self.workspace_bytes,
            backend=self.loss_backend,
            divergence=JSD(self.beta) if self.divergence is None else self.divergence,
        ).for_host(passes_tokens=False)


class SelectiveDistillationTrainer(DistillationTrainer):
    """TRL's `DistillationTrainer` that trains on the selected tokens, and logs what was selected under `opd/`.

    Evaluation takes all valid tokens, so that `eval_loss` does not depend on what is selected. Logged values are of this
    process, means over the micro-batches since the last log. Arguments: those of `DistillationTrainer`, with a
    `SelectiveDistillationConfig`.
    """

    def __init__(self, *arguments: Any, args: SelectiveDistillationConfig | None = None, **options: Any) -> None:
        if args is not None and not isinstance(args, SelectiveDistillationConfig):
            raise TypeError(f"args: got {type(args).__name__}, expected a SelectiveDistillationConfig")
        args = SelectiveDistillationConfig("selective-distillation") if args is None else args
        self._settings = args.settings
        self._divergence = None if args.divergence is None else resolve_divergence(args.divergence)
        super().__init__(*arguments, args=args, **options)

    def _compute_loss(self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None) -> Any:
        mode = "train" if self.model.training else "eval"

        def log(metrics: Metrics) -> None:
            for name, value in as_floats({name: metrics[name] for name in LOGGED if name in metrics}).items():
                self._metrics[mode][f"opd/{name}"].append(value)

        with _Swap(self._settings, self._divergence, log):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)


def align_teacher_vocab(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """Cut the teacher's embeddings and head to the student's vocabulary, in place: TRL refuses models whose sizes differ.

    Checkpoints of one family pad their vocabularies differently (Qwen: 151,936 and 152,064 entries). Slicing both models to the
    smaller before the softmax is what `selective_opd_loss` does anyway.

    Raises: ValueError: the teacher has fewer entries than the student.
    """
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]  # type: ignore[operator]
    if sizes[1] < sizes[0]:
        raise ValueError(
            f"teacher: has {sizes[1]} entries, the student {sizes[0]}: expected at least as many; cut the student with "
            f"student.resize_token_embeddings({sizes[1]})"
        )
    if sizes[1] > sizes[0]:
        teacher.resize_token_embeddings(sizes[0])  # type: ignore[operator]
    return teacher


def generalized_jsd_loss(  # type: ignore[misc]  # the temperature is TRL's, not an option
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The loss of TRL's GKD and GOLD trainers on the selected tokens.

    `GKDTrainer.generalized_jsd_loss = staticmethod(partial(generalized_jsd_loss, fraction=0.1))`. Evaluation, which runs
    without grad mode, takes all valid tokens.

    Args:
        student_logits, teacher_logits: (B, T, V), already shifted.
        labels: (B, T), -100 where a token is not trained on; None: all are.
        beta: 0 is forward KL, 1 reverse KL, between them JSD (divergences/whole.py).
        reduction: "batchmean": a mean over the tokens, or without labels their sum over B; "sum". The mean is that over the
            selected tokens, so that the step does not shrink.
        num_items_in_batch: The host's count of valid tokens; wins over `reduction`.
        options: As in `patch_trl`.
    Raises: ValueError: another reduction.
    """
    if reduction not in ("batchmean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'batchmean' or 'sum'")
    mask = None if labels is None else labels != -100
    divergence = _named_divergence(options) or JSD(beta)
    settings = replace(Settings.of(options, given=GIVEN), divergence=divergence, temperature=temperature)
    loss_fn = SelectiveOPDLoss(settings if torch.is_grad_enabled() else settings.every_token)
    out = loss_fn(student_logits, teacher_logits, mask=mask, num_items_in_batch=num_items_in_batch)
    if num_items_in_batch is not None or (reduction == "batchmean" and labels is not None):
        return out.loss
    n_valid = out.metrics["n_valid"].to(out.loss.dtype)
    return out.loss * (n_valid if reduction == "sum" else n_valid / len(student_logits))
