"""TRL: the selective loss inside `DistillationTrainer`, by one line or by a subclass; and the loss of GKD.

  TRL:   sum over valid tokens of JSD_beta / num_items
  here:  sum over selected tokens of the divergence / (num_items n_selected / n_valid), so selection does not shrink the step

`DistillationTrainer` passes the hidden states and heads of both models to one module-level function, the hook. The hook is
private in TRL, so its parameters are compared before it is replaced. TRL rolls out once per optimizer step and cuts the rollout
into micro-batches: scope "batch" gives each micro-batch a budget.
Not here: the settings (opd_ops/settings.py), the loss itself (opd_ops/loss.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

try:
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer import distillation_trainer
except ImportError as error:
    raise ImportError(f"trl: {error}; opd_ops.integrations.trl fits trl 1.16, install 'trl==1.16.*'") from error

from opd_ops.call.metrics import as_floats
from opd_ops.divergences import JSD
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.unshard import unshard
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
HEAD = ("hidden_states", "lm_head_weight", "lm_head_bias", "logit_scale", "final_logit_softcapping")  # after student_, teacher_
PASSED_BY_HOST = ("mask", "num_items_in_batch", "temperature")  # the trainer decides these
LOGGED = ("kl_selected", "kl_all", "entropy_selected", "support_mass", "n_valid", "n_selected", "n_infinite", "score_threshold")
Metrics = dict[str, Tensor]


class _Swap(AbstractContextManager["_Swap"]):
    """Replaces TRL's hook at once, until `undo()` or the end of the `with` block."""

    def __init__(self, settings: Settings, takes_beta: bool, on_metrics: Callable[[Metrics], None] | None) -> None:
        self._replaced, self._is_undone = getattr(distillation_trainer, HOOK, None), False
        _check_hook(self._replaced)
        signature = inspect.signature(self._replaced)  # type: ignore[arg-type]
        self._own = partial(_Hook(settings, takes_beta, on_metrics, signature))
        self._own.__signature__ = signature  # type: ignore[attr-defined]
        self._own.swap = self  # type: ignore[attr-defined]
        setattr(distillation_trainer, HOOK, self._own)

    def undo(self) -> None:
        """Restore the previous hook, once all later patches are undone too. A second call does nothing.

        Raises: RuntimeError: other code has replaced the hook after this patch; undo that first.
        """
        if self._is_undone:
            return
        hook = getattr(distillation_trainer, HOOK)
        later = hook
        while later is not self._own:
            swap = getattr(later, "swap", None)
            if swap is None:
                raise RuntimeError(
                    f"trl: trl.trainer.distillation_trainer.{HOOK} is {later!r}, which was put there after this patch, "
                    "expected this patch's own; put back what that replaced first, then undo this"
                )
            later = swap._replaced
        self._is_undone = True
        while (swap := getattr(hook, "swap", None)) is not None and swap._is_undone:
            hook = swap._replaced
        setattr(distillation_trainer, HOOK, hook)

    def __exit__(self, *_: object) -> None:
        self.undo()


class patch_trl(_Swap):
    """Replace the loss of TRL's `DistillationTrainer` by `selective_opd_loss`: at once, until `undo()` or the end of the block.

    Evaluation, which runs without grad mode, takes all valid tokens.

    Args:
        settings, options: A `Settings`, or settings by name: fraction (1.0 is TRL's loss), selector, scope, top_k, ... Settings
            by name without `divergence` take the JSD of the trainer's `beta`. The temperature is the trainer's.
        on_metrics: Called with the loss's `metrics` (0-dim tensors) after each micro-batch.
    Raises: RuntimeError: this TRL has another hook; the message names the versions that fit. As `Settings`.
    Example:
        >>> with patch_trl(fraction=0.1, selector="teachability"):
        ...     DistillationTrainer(student, teacher, args=config, train_dataset=prompts).train()
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        on_metrics: Callable[[Metrics], None] | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        takes_beta = settings is None and "divergence" not in options
        settings = Settings.given_or_named(settings, options, given=PASSED_BY_HOST).for_host(passes_tokens=False)
        super().__init__(settings, takes_beta, on_metrics)


def _check_hook(hook: object) -> None:
    parameters = tuple(inspect.signature(hook).parameters) if callable(hook) else None
    if parameters != PARAMETERS:
        problem = "has no function of that name" if parameters is None else f"takes ({', '.join(parameters)})"
        raise RuntimeError(
            f"trl {version('trl')}: trl.trainer.distillation_trainer.{HOOK} {problem}, expected ({', '.join(PARAMETERS)}). "
            f"This adapter fits trl {FITS}: install 'trl=={FITS}.*', or call selective_opd_loss in a subclass's _compute_loss"
        )


@dataclass(frozen=True)
class _Hook:
    """The function that replaces TRL's hook, with the same parameters and results."""

    settings: Settings
    takes_beta: bool  # the divergence is the JSD of the trainer's beta, not that of the settings
    on_metrics: Callable[[Metrics], None] | None
    signature: inspect.Signature

    def __call__(self, *positional: object, **keywords: object) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, sum of the student's entropies in nats, number of valid tokens."""
        bound = self.signature.bind(*positional, **keywords)
        bound.apply_defaults()
        arguments = bound.arguments
        settings = self.settings if torch.is_grad_enabled() else self.settings.every_token
        divergence = JSD(arguments["beta"]) if self.takes_beta else settings.divergence
        loss_fn = SelectiveOPDLoss(replace(settings, divergence=divergence, temperature=arguments["temperature"]))
        student, teacher = (_head(*(arguments[f"{model}_{name}"] for name in HEAD)) for model in ("student", "teacher"))
        out = loss_fn(student, teacher, mask=arguments["completion_mask"], num_items_in_batch=arguments["num_items_in_batch"])
        if self.on_metrics is not None:
            self.on_metrics(out.metrics)
        return out.loss, out.metrics["entropy_sum"], out.metrics["n_valid"]


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> LinearHead:
    """A model's head. A weight that FSDP2 or ZeRO-3 shards is gathered once."""
    weight, bias = unshard(weight, hidden.dtype), None if bias is None else unshard(bias, hidden.dtype)
    return LinearHead(hidden, weight, bias, scale=float(scale), softcap=softcap)


@dataclass
class SelectiveDistillationConfig(DistillationConfig):
    """TRL's `DistillationConfig` with the settings of the selection.

    Raises: as `Settings`, with its names: `support_top_k` is its top_k, `loss_backend` its backend.
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
        _ = self.settings  # an invalid setting raises here, not in the first step

    @property
    def settings(self) -> Settings:
        """Settings of the loss. Their top_k is `support_top_k`, because TRL's own `top_k` belongs to sampling."""
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
    """TRL's `DistillationTrainer` that trains on the selected tokens, and logs statistics of the selection under `opd/`.

    Evaluation takes all valid tokens, so that `eval_loss` does not depend on the selection. Logged values are means over this
    process's micro-batches since the last log. Arguments: as `DistillationTrainer`, with a `SelectiveDistillationConfig`.
    Raises: RuntimeError: it trains inside `patch_trl`.
    """

    def __init__(self, *arguments: object, args: SelectiveDistillationConfig | None = None, **options: object) -> None:
        if args is not None and not isinstance(args, SelectiveDistillationConfig):
            raise TypeError(f"args: got {type(args).__name__}, expected a SelectiveDistillationConfig")
        args = SelectiveDistillationConfig("selective-distillation") if args is None else args
        self._settings = args.settings
        self._takes_beta = args.divergence is None
        super().__init__(*arguments, args=args, **options)

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mode = "train" if self.model.training else "eval"
        if hasattr(getattr(distillation_trainer, HOOK, None), "swap"):
            raise RuntimeError(
                "trl: patch_trl is active around a SelectiveDistillationTrainer, whose own settings would replace the patch's; "
                "undo() the patch, or train a DistillationTrainer inside it"
            )

        def log(metrics: Metrics) -> None:
            for name, value in as_floats({name: metrics[name] for name in LOGGED if name in metrics}).items():
                self._metrics[mode][f"opd/{name}"].append(value)

        with _Swap(self._settings, self._takes_beta, log):
            results: tuple[Tensor, Tensor, Tensor] = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
            return results


def align_teacher_vocab(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """Cut the teacher's embeddings and head to the student's vocabulary, in place: TRL refuses models whose sizes differ.

    Checkpoints of one family pad their vocabularies differently (Qwen: 151,936 and 152,064 entries). `selective_opd_loss`
    cuts both models to the smaller vocabulary in any case, before the softmax.

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


def generalized_jsd_loss(  # type: ignore[misc]  # `temperature` is a parameter and a key of LossOptions
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    settings: Settings | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The loss of TRL's `GKDTrainer` on the selected tokens.

    `GKDTrainer.generalized_jsd_loss = staticmethod(partial(generalized_jsd_loss, fraction=0.1))`. Evaluation, which runs
    without grad mode, takes all valid tokens.

    Args:
        student_logits, teacher_logits: (B, T, V), already shifted.
        labels: (B, T), -100 where a token is not trained on; None: all are.
        beta: 0 is forward KL, 1 reverse KL, between them JSD (divergences/whole.py).
        reduction: "batchmean": the mean over tokens, or without labels their sum divided by B; or "sum". The mean is over the
            selected tokens, and the sum is n_valid times that mean, so that selection does not shrink the step.
        num_items_in_batch: The host's count of valid tokens; with it, `reduction` has no effect.
        settings, options: As in `patch_trl`.
    Raises: ValueError: another reduction, or a setting that needs tokens or responses, which GKD does not pass.
    """
    if reduction not in ("batchmean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'batchmean' or 'sum'")
    mask = None if labels is None else labels != -100
    takes_beta = settings is None and "divergence" not in options
    settings = Settings.given_or_named(settings, options, given=PASSED_BY_HOST).for_host(passes_tokens=False)
    settings = replace(settings, divergence=JSD(beta) if takes_beta else settings.divergence, temperature=temperature)
    loss_fn = SelectiveOPDLoss(settings if torch.is_grad_enabled() else settings.every_token)
    out = loss_fn(student_logits, teacher_logits, mask=mask, num_items_in_batch=num_items_in_batch)
    if num_items_in_batch is not None or (reduction == "batchmean" and labels is not None):
        return out.loss
    n_valid = out.metrics["n_valid"].to(out.loss.dtype)
    return out.loss * (n_valid if reduction == "sum" else n_valid / len(student_logits))
