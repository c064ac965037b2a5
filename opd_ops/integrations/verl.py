"""verl: the selective loss inside its distillation, by one line and `distillation.distillation_loss.loss_mode=selective_opd`.

  verl:  sum over valid tokens of min(l, loss_max_clamp) / batch_num_tokens
  here:  sum over selected tokens of min(l, loss_max_clamp) / (batch_num_tokens n_selected / n_valid)

n_selected and n_valid are counts of this rank's micro-batch. After verl's clamp and aggregation the scalar is multiplied by
n_valid / n_selected, so that selection does not shrink the step.
verl calls `compute_topk_loss` inside its logits processor, on packed rows (1, n, V). Row t predicts token t + 1; prompts are
rows too; logits are already divided by the rollout's temperature; the teacher's lists are at temperature 1. Later verl calls
`distillation_loss`, which cuts out the responses and aggregates. These two functions, the hooks, are replaced. For any other
loss mode they call verl's own.
With task rewards the log-probabilities are computed from the same logits, and flash-attn's cross entropy overwrites the logits
with their gradient before this loss's backward reads them. So the selected rows are copied in that case.
Not here: sequence parallelism, Megatron, fused kernels, the loss as a reward, a budget over ranks (all are errors); the loss
(opd_ops/loss.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from verl.trainer.distillation import losses as hooks
from verl.utils import tensordict_utils
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size
from verl.workers.utils.padding import no_padding_2_padding

from opd_ops.call.choose import choose
from opd_ops.call.metrics import as_floats
from opd_ops.call.prepare import prepare
from opd_ops.call.reduce import TokenLosses, token_losses
from opd_ops.call.score import score
from opd_ops.divergences import Divergence, LocalSupport, TailAware, TopKForwardKL
from opd_ops.divergences.base import Support
from opd_ops.inputs.batch import Batch
from opd_ops.inputs.teacher_lists import TopKLogprobs
from opd_ops.loss import selective_opd_token_losses
from opd_ops.settings import Settings, TokenLossOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack
    from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

FITS = "0.9.1"
MODE = "selective_opd"
PARAMETERS = {
    "compute_topk_loss": ("config", "distillation_config", "data", "student_logits", "data_format"),
    "distillation_loss": ("config", "distillation_config", "model_output", "data"),
}
STRATEGIES = ("fsdp", "fsdp2", "veomni")
# Modes that weigh all tokens of a micro-batch equally, so that one factor, n_valid / n_selected, is right for all of them.
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")
LIST_DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "forward_kl_topk": TopKForwardKL,
    "local_support": LocalSupport,
    "tail_aware": TailAware,
}
PASSED_BY_HOST = ("mask", "cu_seqlens", "temperature")  # verl decides these
COLUMNS = ("selected", "student_entropy", "support_mass")  # of each token, for the metrics
MicroBatch = Mapping[str, Tensor]  # verl's TensorDict


class patch_verl(AbstractContextManager["patch_verl"]):
    """Add the loss mode "selective_opd" to verl: at once, until `undo()` or the end of the block. Other modes do not change.

    Every process needs this call before it reads its configuration: write the call into a module, and name the module in the
    environment variable VERL_USE_EXTERNAL_MODULES. Then set under `distillation.distillation_loss`: `loss_mode=selective_opd`,
    `use_policy_gradient=False`, and `topk`, the length of the teacher's lists. `loss_max_clamp` applies before the rescaling,
    `log_prob_min_clamp` with divergence "forward_kl_topk"; with other divergences it is an error.

    Args:
        settings, options: A `Settings`, or settings by name: fraction (1.0 is verl's loss), selector, scope, top_k, ... The
            temperature is verl's. `scope`: "batch", each micro-batch of a rank, or "sequence". `divergence`: "forward_kl_topk"
            (the default of settings by name), "local_support" or "tail_aware" on the teacher's whole list, or an instance.
    Raises: RuntimeError: this verl has other hooks (the message names the version that fits), or is patched already. As
        `Settings`. ValueError, in training: a setting of verl that this loss does not support; says what to set.
    Example:
        >>> patch_verl(fraction=0.1, selector="teachability")  # in my_opd.py; VERL_USE_EXTERNAL_MODULES=my_opd
    """

    def __init__(self, settings: Settings | None = None, **options: Unpack[TokenLossOptions]) -> None:
        _check_hooks()
        if settings is None:
            options.setdefault("divergence", "forward_kl_topk")
        settings = Settings.given_or_named(settings, options, given=PASSED_BY_HOST, of=TokenLossOptions)
        divergence = settings.divergence
        if isinstance(divergence, str) and divergence not in LIST_DIVERGENCES:
            names = ", ".join(LIST_DIVERGENCES)
            raise ValueError(f"divergence: got {divergence!r}, expected one of: {names}: the teacher sends lists")
        self.settings = settings.for_host(passes_tokens=False, teacher="TopKLogprobs", selects_over_ranks=False)
        self._originals, self._is_undone = {name: getattr(hooks, name) for name in PARAMETERS}, False
        self._replacements = {"compute_topk_loss": self._compute_topk_loss(), "distillation_loss": self._distillation_loss()}
        hooks.register_distillation_loss(hooks.DistillationLossSettings(names=[MODE], use_topk=True))(_response_losses)
        for name, replacement in self._replacements.items():
            setattr(hooks, name, replacement)

    def undo(self) -> None:
        """Restore verl's hooks. A second call does nothing.

        Raises: RuntimeError: other code has replaced a hook after this patch; undo that first.
        """
        if self._is_undone:
            return
        for name, replacement in self._replacements.items():
            hook = getattr(hooks, name)
            if hook is not replacement:
                raise RuntimeError(
                    f"verl: {hooks.__name__}.{name} is {hook!r}, which was put there after this patch, expected this patch's "
                    "own; put back what that replaced first, then undo this"
                )
        self._is_undone = True
        for name, original in self._originals.items():
            setattr(hooks, name, original)
        del hooks.DISTILLATION_LOSS_REGISTRY[MODE], hooks.DISTILLATION_SETTINGS_REGISTRY[MODE]

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _compute_topk_loss(self) -> Callable[..., dict[str, Tensor]]:
        """The function that replaces verl's hook of the same name: losses from the logits."""
        original = self._originals["compute_topk_loss"]

        @wraps(original)
        def compute_topk_loss(
            config: ActorConfig,
            distillation_config: DistillationConfig,
            data: MicroBatch,
            student_logits: Tensor,
            data_format: str,
        ) -> dict[str, Tensor]:
            loss_config = distillation_config.distillation_loss
            if loss_config.loss_mode != MODE:
                columns: dict[str, Tensor] = original(config, distillation_config, data, student_logits, data_format)
                return columns
            _check_config(config, loss_config, data, student_logits)
            return _packed_losses(loss_config, data, student_logits, self.settings)

        return compute_topk_loss

    def _distillation_loss(self) -> Callable[..., tuple[Tensor, dict[str, object]]]:
        """The function that replaces verl's hook of the same name: the aggregated loss, times n_valid / n_selected."""
        original = self._originals["distillation_loss"]

        @wraps(original)
        def distillation_loss(
            config: ActorConfig, distillation_config: DistillationConfig, model_output: dict[str, Tensor], data: MicroBatch
        ) -> tuple[Tensor, dict[str, object]]:
            loss, metrics = original(config, distillation_config, model_output, data)
            if distillation_config.distillation_loss.loss_mode != MODE:
                return loss, metrics
            valid = _response_mask(data)
            selected = no_padding_2_padding(model_output["selected"], data) * valid
            return loss * (valid.sum() / selected.sum().clamp_min(1)), metrics

        return distillation_loss


def _check_hooks() -> None:
    for name, expected in PARAMETERS.items():
        hook = getattr(hooks, name, None)
        parameters = tuple(inspect.signature(hook).parameters) if callable(hook) else None
        if parameters != expected:
            problem = "has no function of that name" if parameters is None else f"takes ({', '.join(parameters)})"
            raise RuntimeError(
                f"verl {version('verl')}: {hooks.__name__}.{name} {problem}, expected ({', '.join(expected)}). "
                f"This adapter fits verl {FITS}: install 'verl=={FITS}', or call selective_opd_token_losses in your own loss"
            )
    if MODE in hooks.DISTILLATION_LOSS_REGISTRY:
        raise RuntimeError(f"verl: the loss mode {MODE!r} is registered already; undo() the earlier patch first")


def _check_config(config: ActorConfig, loss_config: DistillationLossConfig, data: MicroBatch, student_logits: Tensor) -> None:
    if config.strategy not in STRATEGIES:
        raise ValueError(
            f"strategy: got {config.strategy!r}, expected one of: {', '.join(STRATEGIES)}; logits that are sharded over the "
            "vocabulary are not supported yet"
        )
    ranks = get_ulysses_sequence_parallel_world_size()
    if ranks > 1:
        raise ValueError(
            f"ulysses_sequence_parallel_size: got {ranks}, expected 1: a budget over slices of sequences is not supported yet"
        )
    if config.loss_agg_mode not in AGGREGATIONS:
        raise ValueError(
            f"loss_agg_mode: got {config.loss_agg_mode!r}, expected one of: {', '.join(AGGREGATIONS)}; a mean over each "
            "sequence's tokens weighs them by what is not selected"
        )
    if loss_config.use_policy_gradient:
        raise ValueError(
            "use_policy_gradient: got True, expected False: the loss of the selected tokens is backpropagated, not a reward"
        )
    n = data["input_ids"].values().shape[0]
    if student_logits.dim() != 3 or student_logits.shape[:2] != (1, n):
        raise ValueError(
            f"student_logits: got shape {tuple(student_logits.shape)}, expected (1, {n}, V), the micro-batch's packed tokens"
        )


def _packed_losses(
    loss_config: DistillationLossConfig, data: MicroBatch, student_logits: Tensor, settings: Settings
) -> dict[str, Tensor]:
    """verl's contract: columns of shape (1, n); only `distillation_losses` has a gradient to the logits."""
    teacher = TopKLogprobs(data["teacher_ids"].values().unsqueeze(0), data["teacher_logprobs"].values().unsqueeze(0))
    divergence = _divergence(settings.divergence, loss_config.log_prob_min_clamp, teacher.ids.shape[-1])
    settings = replace(settings, divergence=divergence)
    mask, cu_seqlens = _packed_mask(data), data["input_ids"].offsets()  # type: ignore[attr-defined]  # nested
    if tensordict_utils.get_non_tensor_data(data, "distillation_only", False):
        out = selective_opd_token_losses(student_logits, teacher, mask=mask, cu_seqlens=cu_seqlens, settings=settings)
    else:
        out = _losses_of_copied_rows(student_logits, teacher, mask, cu_seqlens, settings)
    columns = {"selected": out.selected, "student_entropy": out.stats.student_entropy, "support_mass": out.stats.support_mass}
    return {"distillation_losses": out.losses, **{name: columns[name].to(out.losses.dtype) for name in COLUMNS}}


def _losses_of_copied_rows(
    student_logits: Tensor, teacher: TopKLogprobs, mask: Tensor, cu_seqlens: Tensor, settings: Settings
) -> TokenLosses:
    """The token losses, from a copy of the selected rows: the backward works after the logits are overwritten.

    The stages of `selective_opd_token_losses` run here one by one, because its result does not hold the weighting's factors. A
    weighting may read all valid positions, so its factors cannot come from the copy.
    """
    batch = Batch(mask=mask, cu_seqlens=cu_seqlens)
    chosen = choose(score(prepare(student_logits.detach(), teacher, batch, settings, selects=True)))
    out = token_losses(chosen)
    rows = out.selected.nonzero(as_tuple=True)
    lists = TopKLogprobs(teacher.ids[rows], teacher.logprobs[rows])
    copied = selective_opd_token_losses(student_logits[rows], lists, settings=replace(settings.every_token, top_k=1)).losses
    if chosen.weights is not None:
        copied = copied * chosen.weights[rows].to(copied.dtype)
    has_nan = out.losses.isnan().any()  # at any valid position, selected or not
    losses = torch.zeros_like(out.losses).index_put(rows, copied) * torch.where(has_nan, torch.nan, 1.0)
    return out._replace(losses=losses)


def _packed_mask(data: MicroBatch) -> Tensor:
    """(1, n) bool: rows that predict a valid response token, found by verl's own function `no_padding_2_padding`."""
    ids = data["input_ids"].values()
    numbers = no_padding_2_padding(torch.arange(1, len(ids) + 1, device=ids.device), data)  # row + 1; 0: padding
    mask = torch.zeros(len(ids) + 1, dtype=torch.bool, device=ids.device)
    return mask.index_fill(0, numbers[_response_mask(data)], True)[1:].unsqueeze(0)


def _response_mask(data: MicroBatch) -> Tensor:
    mask: Tensor = data["response_mask"].bool()
    return mask.to_padded_tensor(False) if mask.is_nested else mask


def _divergence(divergence: str | Divergence, floor: float | None, k: int) -> Divergence:
    if isinstance(divergence, str):
        divergence = LIST_DIVERGENCES[divergence](top_k=k)
    if floor is None:
        return divergence
    if type(divergence) is not TopKForwardKL:
        raise ValueError(
            f"log_prob_min_clamp: got {floor:g}, expected null with divergence {divergence.name!r}; forward_kl_topk has it"
        )
    return ClampedTopKForwardKL(top_k=divergence.top_k, floor=float(floor))


@dataclass(frozen=True)
class ClampedTopKForwardKL(TopKForwardKL):
    """verl's "forward_kl_topk": log-probabilities below `floor` count as `floor`; there the student has no gradient."""

    floor: float = -10.0
    name = "forward_kl_topk"

    def loss(self, at: Support) -> Tensor:
        log_p, log_q = at.log_p.clamp_min(self.floor), at.teacher.clamp_min(self.floor)
        return (log_q.exp() * (log_q - log_p)).sum(1)


def _response_losses(
    config: ActorConfig, distillation_config: DistillationConfig, model_output: dict[str, Tensor], data: MicroBatch
) -> tuple[Tensor, dict[str, float]]:
    """The loss that is registered with verl: (B, response) losses in nats, at least 0 as in verl, and the metrics."""
    if any(name not in model_output for name in COLUMNS):
        raise ValueError(
            f"loss_mode: got {MODE!r}, but the engine's logits did not go through patch_verl's compute_topk_loss; set "
            "use_fused_kernels=False and leave patch_verl in place"
        )
    losses = no_padding_2_padding(model_output["distillation_losses"], data).clamp_min(0.0)
    valid = _response_mask(data)
    selected, entropy, mass = (no_padding_2_padding(model_output[name], data).detach() for name in COLUMNS)
    selected = (selected > 0) & valid
    means = {"selected_share": selected.sum() / valid.sum().clamp_min(1)}
    for name, column, tokens in (
        ("loss_selected", losses.detach(), selected),
        ("entropy", entropy, valid),
        ("entropy_selected", entropy, selected),
        ("support_mass_lower_bound", mass, valid),
        ("support_mass_lower_bound_selected", mass, selected),
    ):
        means[name] = torch.where(tokens, column, 0).sum() / tokens.sum().clamp_min(1)
    return losses, {f"distillation/{name}": value for name, value in as_floats(means).items()}
