"""Hugging Face's `Trainer`: distillation on selected tokens as a mixin over hidden states, or as a `compute_loss_func`.

  loss = sum over the selected tokens / (num_items n_selected / n_valid)
  num_items: `num_items_in_batch`, the Trainer's count of labels over the accumulated micro-batches (and ranks)

So neither accumulation nor selection changes the size of a step.
On-policy data come from the caller: a batch holds the student's own answers, with labels -100 on the prompt. `shift_labels`
replace labels, as in the Trainer's count. `cu_seq_lens_q`, the boundaries of a batch without padding, separates its sequences.
Not here: the heads (heads.py), the settings (opd_ops/settings.py), TRL's trainers, which also roll out (trl.py), the loss
(opd_ops/loss.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from opd_ops.call.metrics import as_floats
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.integrations.heads import frozen_head, head_of, last_hidden
from opd_ops.loss import SelectiveOPDLoss
from opd_ops.settings import LossOptions, Settings

if TYPE_CHECKING:
    from transformers.utils import ModelOutput
    from typing_extensions import Unpack

LOGGED = ("kl_selected", "kl_all", "entropy_selected", "entropy", "support_mass", "n_valid", "n_selected", "n_infinite")
LABELS = ("labels", "shift_labels")
BOUNDARIES = "cu_seq_lens_q"  # (n_sequences + 1,), of transformers' DataCollatorWithFlattening
NEEDS_LOGITS = ("compute_metrics", "preprocess_logits_for_metrics")  # arguments of the Trainer
Inputs = dict[str, Tensor]  # a batch, by the names of the model's arguments


class SelectiveDistillationMixin:
    """Distil inside `Trainer`: `class MyTrainer(SelectiveDistillationMixin, Trainer)`.

    Both models run without computing their logits: the loss reads hidden states and heads. Statistics of the selection are
    logged under `opd/`; they are means over this process's micro-batches since the last log. Evaluation takes all tokens. A
    batch without labels trains on every token that is no padding by the inputs' `attention_mask`.

    Args (by name, in addition to those of `Trainer`):
        teacher: A causal language model over the same tokens, or a callable `inputs -> LinearHead or logits`. Never trained.
        settings: `Settings` of the loss: Settings(fraction=0.1, selector="tip"); None: its defaults.
    Raises: TypeError: `teacher` is no callable, or `settings` is no `Settings`. ValueError: the Trainer has metrics of logits
        or smooths labels; a batch has neither labels nor an attention mask.
    """

    def __init__(
        self,
        *arguments: object,
        teacher: nn.Module | Callable[[Inputs], LinearHead | Tensor],
        settings: Settings | None = None,
        **options: object,
    ) -> None:
        if not callable(teacher):
            raise TypeError(f"teacher: got {type(teacher).__name__}, expected a model, or a callable of the inputs")
        settings = Settings.given_or_named(settings, {})
        self._losses = _losses_by_mode(settings)
        super().__init__(*arguments, **options)
        _check_arguments(cast("Trainer", self))
        self.model_accepts_loss_kwargs = True  # so the Trainer counts labels, and the loss divides by that count
        self._teacher = teacher.to(self.args.device).eval() if isinstance(teacher, nn.Module) else teacher  # type: ignore[attr-defined]
        self._opd: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        trainer = cast("Trainer", self)
        labels, shift_labels = (inputs.get(name) for name in LABELS)
        inputs = {name: value for name, value in inputs.items() if name not in LABELS}
        mask = _without_padding(inputs) if labels is None and shift_labels is None else None
        unwrapped = trainer.accelerator.unwrap_model(model)
        hidden, outputs = last_hidden(model, unwrapped, inputs)
        teacher = frozen_head(self._teacher, inputs) if isinstance(self._teacher, nn.Module) else self._teacher(inputs)
        loss_fn = self._losses[model.training]
        student = head_of(unwrapped, hidden)
        out = loss_fn(
            student,
            teacher,
            mask=mask,
            labels=labels,
            shift_labels=shift_labels,
            cu_seqlens=inputs.get(BOUNDARIES),
            num_items_in_batch=num_items_in_batch,
        )
        for name, value in as_floats({name: out.metrics[name] for name in LOGGED if name in out.metrics}).items():
            self._opd[f"{'' if model.training else 'eval_'}opd/{name}"].append(value)
        loss = out.loss
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Undoes the averaging of gradients over ranks. The ranks of tensor parallelism share a batch.
            loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Inputs, *_: object, **__: object) -> tuple[Tensor, None, None]:
        """The loss only: no logits exist that could be returned."""
        trainer = cast("Trainer", self)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = cast("Tensor", self.compute_loss(model, trainer._prepare_inputs(inputs)))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *arguments: object, **options: object) -> None:
        means = {name: sum(values) / len(values) for name, values in self._opd.items()}
        self._opd.clear()
        super().log({**logs, **means}, *arguments, **options)  # type: ignore[misc]


class SelectiveDistillationTrainer(SelectiveDistillationMixin, Trainer):
    """`Trainer` with the mixin: `SelectiveDistillationTrainer(student, args, train_dataset=..., teacher=teacher)`."""


class SelectiveComputeLoss:
    """A `compute_loss_func` for any `Trainer`: `Trainer(..., compute_loss_func=SelectiveComputeLoss(student, teacher))`.

    The Trainer passes the student's outputs, but not the inputs that the teacher needs: a hook on the student's forward stores
    them. Here the logits of both models exist in full; the mixin avoids that. Evaluation, which runs without grad mode, takes
    all tokens. A batch needs labels: without them the Trainer counts no tokens, and adds up the means of micro-batches.

    Args:
        student: The model that the Trainer trains.
        teacher: A causal language model over the same tokens. It moves to the device of the logits.
        settings: `Settings` of the loss.
        options: The same settings by name, if there are no `settings`.
    Raises: as `Settings`. ValueError: a batch has no labels.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, settings: Settings | None = None, **options: Unpack[LossOptions]
    ) -> None:
        self.teacher, self._losses = teacher.eval(), _losses_by_mode(Settings.given_or_named(settings, options))
        self.metrics: dict[str, Tensor] = {}  # of the last call
        self._inputs: Inputs = {}
        self._hook = student.register_forward_pre_hook(self._store_inputs, with_kwargs=True)

    def _store_inputs(self, _: nn.Module, __: tuple[object, ...], inputs: Inputs) -> None:
        self._inputs = inputs

    def __call__(self, outputs: ModelOutput, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of the student's `outputs`; the Trainer calls this with `labels` that are not shifted."""
        if labels is None:
            raise ValueError(
                "labels: got none, expected labels in the batch, -100 on what is not trained on: without them accumulation "
                "would change the size of a step; or use SelectiveDistillationMixin"
            )
        logits = outputs["logits"]
        inputs = {name: value for name, value in self._inputs.items() if name not in (*LABELS, "num_items_in_batch")}
        with torch.no_grad():
            teacher = self.teacher.to(logits.device)(**{**inputs, "use_cache": False}).logits
        out = self._losses[torch.is_grad_enabled()](
            logits,
            teacher,
            labels=labels,
            shift_labels=self._inputs.get("shift_labels"),
            cu_seqlens=inputs.get(BOUNDARIES),
            num_items_in_batch=num_items_in_batch,
        )
        self.metrics = out.metrics
        return out.loss

    def remove(self) -> None:
        """Remove the hook from the student."""
        self._hook.remove()


def _losses_by_mode(settings: Settings) -> dict[bool, SelectiveOPDLoss]:
    """The loss in training (True) and in evaluation (False), which takes every token."""
    settings = settings.for_host(passes_tokens=True)
    return {True: SelectiveOPDLoss(settings), False: SelectiveOPDLoss(settings.every_token)}


def _check_arguments(trainer: Trainer) -> None:
    """Refuse arguments of the Trainer that the mixin would ignore."""
    for name in NEEDS_LOGITS:
        if getattr(trainer, name) is not None:
            raise ValueError(f"{name}: got a function, expected None: this trainer makes no logits; use SelectiveComputeLoss")
    if trainer.args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor: got {trainer.args.label_smoothing_factor}, expected 0: the loss compares with the "
            "teacher, not with labels"
        )


def _without_padding(inputs: Inputs) -> Tensor:
    """(B, T) bool mask: token i and token i + 1 are both text. Row i predicts token i + 1, as with shifted labels."""
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
