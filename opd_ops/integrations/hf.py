"""Hugging Face's `Trainer`: distillation on selected tokens as a mixin over hidden states, or as a `compute_loss_func`.

  `num_items_in_batch` is the count of labels over the accumulated micro-batches (and ranks); the sum over the selected tokens
  is divided by num_items n_selected / n_valid, so that neither accumulation nor selecting changes the size of a step.

On-policy data come from the caller: batches hold what the student wrote, with labels -100 on the prompt. Without labels all
that the attention mask says is no padding is trained on.
Not here: the heads (heads.py), the settings (opd_ops/settings.py), TRL's trainers, which also roll out (trl.py), the loss
(opd_ops/loss.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from opd_ops.call.metrics import as_floats
from opd_ops.integrations.heads import frozen_head, head_of, last_hidden
from opd_ops.loss import SelectiveOPDLoss
from opd_ops.settings import LossOptions, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOGGED = ("kl_selected", "kl_all", "entropy_selected", "entropy", "support_mass", "n_valid", "n_selected", "n_infinite")
LABELS = ("labels", "shift_labels")


class SelectiveDistillationMixin:
    """Distil inside `Trainer`: `class MyTrainer(SelectiveDistillationMixin, Trainer)`.

    Both models run without their logits; the loss reads hidden states and heads. What was selected is logged under `opd/`:
    of this process, means over the micro-batches since the last log. Evaluation takes all tokens. A batch without labels trains
    on every token but padding, which the inputs' `attention_mask` tells.

    Args (by name, beside those of `Trainer`):
        teacher: A causal language model over the same tokens, or a callable `inputs -> LinearHead or logits`. Never trained.
        settings: `Settings` of the loss: Settings(fraction=0.1, selector="tip"); None: its defaults.
    Raises: TypeError: no teacher, or something else than `Settings`. ValueError: a batch with neither labels nor an
        attention mask.
    """

    def __init__(
        self,
        *arguments: Any,
        teacher: nn.Module | Callable[[dict[str, Any]], Any],
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        if not callable(teacher):
            raise TypeError(f"teacher: got {type(teacher).__name__}, expected a model, or a callable of the inputs")
        settings = Settings.given_or_named(settings, {})
        self._losses = _of_training_and_evaluation(settings)
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts labels, and leaves the accumulation to the loss
        self._teacher = teacher.to(self.args.device).eval() if isinstance(teacher, nn.Module) else teacher  # type: ignore[attr-defined]
        self._opd: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        trainer: Any = self
        labels: dict[str, Any] = {name: inputs.get(name) for name in LABELS}
        inputs = {name: value for name, value in inputs.items() if name not in LABELS}
        mask = None if any(value is not None for value in labels.values()) else _without_padding(inputs)
        unwrapped = trainer.accelerator.unwrap_model(model)
        hidden, outputs = last_hidden(model, unwrapped, inputs)
        teacher = frozen_head(self._teacher, inputs) if isinstance(self._teacher, nn.Module) else self._teacher(inputs)
        loss_fn = self._losses[model.training]
        out = loss_fn(head_of(unwrapped, hidden), teacher, mask=mask, num_items_in_batch=num_items_in_batch, **labels)
        for name, value in as_floats({name: out.metrics[name] for name in LOGGED if name in out.metrics}).items():
            self._opd[f"{'' if model.training else 'eval_'}opd/{name}"].append(value)
        loss = out.loss
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * trainer.accelerator.num_processes  # undoes the averaging of gradients over ranks
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """The loss alone: there are no logits to return."""
        trainer: Any = self
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = self.compute_loss(model, trainer._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        means = {name: sum(values) / len(values) for name, values in self._opd.items()}
        self._opd.clear()
        super().log({**logs, **means}, *arguments, **options)  # type: ignore[misc]


class SelectiveDistillationTrainer(SelectiveDistillationMixin, Trainer):
    """`Trainer` with the mixin: `SelectiveDistillationTrainer(student, args, train_dataset=..., teacher=teacher)`."""


class SelectiveComputeLoss:
    """A `compute_loss_func` for any `Trainer`: `Trainer(..., compute_loss_func=SelectiveComputeLoss(student, teacher))`.

    The Trainer hands over the student's outputs, but not the inputs that the teacher needs: they are kept from the student's
    forward by a hook. Logits of both models exist whole here; the mixin spares them. Evaluation, which runs without grad mode,
    takes all tokens. A batch without labels trains on every token but padding, as with the mixin.

    Args:
        student: The model that the Trainer trains.
        teacher: A causal language model over the same tokens.
        settings: `Settings` of the loss, or `options`, settings by name.
    Raises: as `Settings`. ValueError: a batch with neither labels nor an attention mask.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, settings: Settings | None = None, **options: Unpack[LossOptions]
    ) -> None:
        self.teacher, self._losses = teacher.eval(), _of_training_and_evaluation(Settings.given_or_named(settings, options))
        self.metrics: dict[str, Tensor] = {}  # of the last call
        self._inputs: dict[str, Any] = {}
        self._hook = student.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self._inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "position_ids")}

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Loss from the student's `outputs`, with `labels` unshifted, as the Trainer calls it."""
        with torch.no_grad():
            teacher = self.teacher(**self._inputs, use_cache=False).logits
        mask = _without_padding(self._inputs) if labels is None else None
        loss_fn = self._losses[torch.is_grad_enabled()]
        out = loss_fn(outputs["logits"], teacher, mask=mask, labels=labels, num_items_in_batch=num_items_in_batch)
        self.metrics = out.metrics
        return out.loss

    def remove(self) -> None:
        """Take the hook off the student."""
        self._hook.remove()


def _of_training_and_evaluation(settings: Settings) -> dict[bool, SelectiveOPDLoss]:
    """By whether the student trains; evaluation takes every token."""
    return {True: SelectiveOPDLoss(settings), False: SelectiveOPDLoss(settings.every_token)}


def _without_padding(inputs: dict[str, Any]) -> Tensor:
    """(B, T) bool: rows of the text whose next token is of the text, too. Row i predicts token i + 1, as shifted labels say."""
    attended = inputs.get("attention_mask")
    if attended is None:
        raise ValueError(
            "labels: got none, and no attention_mask, which would say what is padding; expected one of them in the batch: pass "
            "labels, -100 on what is not trained on"
        )
    if attended.dim() != 2:
        raise ValueError(
            f"attention_mask: got shape {tuple(attended.shape)}, expected (B, T), non-zero on the text, in a batch without "
            "labels; pass labels, -100 on what is not trained on"
        )
    text = attended != 0
    return nn.functional.pad(text[:, :-1] & text[:, 1:], (0, 1))
