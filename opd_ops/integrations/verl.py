"""verl: the selective loss inside its distillation, by one line and `distillation.distillation_loss.loss_mode=selective_opd`.

  verl:  sum over valid tokens of min(l, loss_max_clamp) / batch_num_tokens
  here:  sum over selected ones / (batch_num_tokens n_selected / n_valid), n of the micro-batch, so that selecting does not
         shrink the step: the aggregated scalar is multiplied by n_valid / n_selected, after verl's own clamp and aggregation

verl calls `compute_topk_loss` inside its logits processor, on packed rows (1, n, V): row t predicts token t + 1, prompts are
rows too, logits come divided by the rollout's temperature, the teacher's lists are at temperature 1. Later it cuts the
responses out of what that returned and aggregates. Both functions are replaced, and do verl's own for any other loss mode.
Where log-probabilities share the logits (task rewards), flash-attn's cross entropy overwrites the logits with their gradient
before the backward comes here: the selected rows are then copied.
Not here: sequence parallelism, Megatron, fused kernels, the loss as a reward (refused with an error); the loss itself
(opd_ops/loss.py).
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from verl.trainer.distillation import losses as hooks
from verl.utils import tensordict_utils
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size
from verl.workers.utils.padding import no_padding_2_padding

from opd_ops.call.metrics import as_floats
from opd_ops.call.reduce import TokenLosses
from opd_ops.divergences import Divergence, LocalSupport, TailAware, TopKForwardKL
from opd_ops.divergences.base import Support
from opd_ops.inputs.teacher_lists import TopKLogprobs
from opd_ops.loss import selective_opd_token_losses
from opd_ops.settings import Settings, TokenLossOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

FITS = "0.9.1"
MODE = "selective_opd"
PARAMETERS = {
    "compute_topk_loss": ("config", "distillation_config", "data", "student_logits", "data_format"),
    "distillation_loss": ("config", "distillation_config", "model_output", "data"),
}
STRATEGIES = ("fsdp", "fsdp2", "veomni")
# Modes in which all tokens of a micro-batch weigh the same, so that one factor undoes the selection's.
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")
OF_LISTS: dict[str, type[TopKForwardKL | LocalSupport | TailAware]] = {
    "forward_kl_topk": TopKForwardKL,
    "local_support": LocalSupport,
    "tail_aware": TailAware,
}
GIVEN = ("mask", "cu_seqlens", "temperature")  # by verl
COLUMNS = ("selected", "student_entropy", "support_mass")  # of each token, for the metrics


class patch_verl(AbstractContextManager["patch_verl"]):
    """Add the loss mode "selective_opd" to verl, at once, until `undo()` or the block's end; other modes stay verl's.

    Every process needs it before its configuration is read: put the call into a module and name that in the environment
    variable VERL_USE_EXTERNAL_MODULES. Then set, under `distillation.distillation_loss`, `loss_mode=selective_opd`,
    `use_policy_gradient=False`, and `topk`, the length of the teacher's lists. `loss_max_clamp` is honoured, before the
    rescaling; `log_prob_min_clamp` with divergence "forward_kl_topk", and refused with the others.

    Args:
        options: `Settings` by name: fraction (1.0 is verl's loss), selector, scope, top_k, ... The temperature is verl's.
            `divergence`: "forward_kl_topk" (the default here), "local_support", "tail_aware" on all that the teacher sent, or
            an instance.
    Raises: RuntimeError: a verl whose hooks are others (says which version fits), or one that is patched already. As
        `Settings`. ValueError: in training a setting of verl's that this loss does not have, with what to set.
    Example:
        >>> patch_verl(fraction=0.1, selector="teachability")  # in my_opd.py; VERL_USE_EXTERNAL_MODULES=my_opd
    """

    def __init__(self, **options: Unpack[TokenLossOptions]) -> None:
        _check_hooks()
        divergence = options.setdefault("divergence", "forward_kl_topk")
        if isinstance(divergence, str) and divergence not in OF_LISTS:
            raise ValueError(f"divergence: got {divergence!r}, expected one of: {', '.join(OF_LISTS)}: the teacher sends lists")
        Settings.of(options, given=GIVEN, of=TokenLossOptions).for_host(passes_tokens=False, teacher="TopKLogprobs")
        self.options = options
        self._replaced, self._is_undone = {name: getattr(hooks, name) for name in PARAMETERS}, False
        self._own = {"compute_topk_loss": self._of_logits(), "distillation_loss": self._of_outputs()}
        hooks.register_distillation_loss(hooks.DistillationLossSettings(names=[MODE], use_topk=True))(_response_losses)
        for name, own in self._own.items():
            setattr(hooks, name, own)

    def undo(self) -> None:
        """Put back what was there before; nothing where that has happened.

        Raises: RuntimeError: something else has replaced a hook since; undo that first.
        """
        if self._is_undone:
            return
        for name, own in self._own.items():
            found = getattr(hooks, name)
            if found is not own:
                raise RuntimeError(
                    f"verl: {hooks.__name__}.{name} is {found!r}, which was put there after this patch, expected this patch's "
                    "own; put back what that replaced first, then undo this"
                )
        self._is_undone = True
        for name, replaced in self._replaced.items():
            setattr(hooks, name, replaced)
        del hooks.DISTILLATION_LOSS_REGISTRY[MODE], hooks.DISTILLATION_SETTINGS_REGISTRY[MODE]

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _of_logits(self) -> Any:
        replaced = self._replaced["compute_topk_loss"]

        @wraps(replaced)
        def compute_topk_loss(
            config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
        ) -> dict[str, Tensor]:
            settings = distillation_config.distillation_loss
            if settings.loss_mode != MODE:
                found: dict[str, Tensor] = replaced(config, distillation_config, data, student_logits, data_format)
                return found
            _check_settings(config, settings, data, student_logits)
            return _packed_losses(settings, data, student_logits, self.options)

        return compute_topk_loss

    def _of_outputs(self) -> Any:
        replaced = self._replaced["distillation_loss"]

        @wraps(replaced)
        def distillation_loss(
            config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
        ) -> tuple[Tensor, dict[str, Any]]:
            loss, metrics = replaced(config, distillation_config, model_output, data)
            if distillation_config.distillation_loss.loss_mode != MODE:
                return loss, metrics
            valid = _response_mask(data)
            selected = no_padding_2_padding(model_output["selected"], data) * valid
            return loss * (valid.sum() / selected.sum().clamp_min(1)), metrics

        return distillation_loss


def _check_hooks() -> None:
    for name, expected in PARAMETERS.items():
        hook = getattr(hooks, name, None)
        found = tuple(inspect.signature(hook).parameters) if callable(hook) else None
        if found != expected:
            came = "has no function of that name" if found is None else f"takes ({', '.join(found)})"
            raise RuntimeError(
                f"verl {version('verl')}: {hooks.__name__}.{name} {came}, expected ({', '.join(expected)}). "
                f"This adapter fits verl {FITS}: install 'verl=={FITS}', or call selective_opd_token_losses in your own loss"
            )
    if MODE in hooks.DISTILLATION_LOSS_REGISTRY:
        raise RuntimeError(f"verl: the loss mode {MODE!r} is registered already; undo() the earlier patch first")


def _check_settings(config: Any, settings: Any, data: Any, student_logits: Tensor) -> None:
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
    if settings.use_policy_gradient:
        raise ValueError(
            "use_policy_gradient: got True, expected False: the loss of the selected tokens is backpropagated, not a reward"
        )
    n = data["input_ids"].values().shape[0]
    if student_logits.dim() != 3 or student_logits.shape[:2] != (1, n):
        raise ValueError(
            f"student_logits: got shape {tuple(student_logits.shape)}, expected (1, {n}, V), the micro-batch's packed tokens"
        )


def _packed_losses(settings: Any, data: Any, student_logits: Tensor, options: TokenLossOptions) -> dict[str, Tensor]:
    """verl's contract: columns of shape (1, n), `distillation_losses` connected to the logits."""
    teacher = TopKLogprobs(*(data[name].values().unsqueeze(0) for name in ("teacher_ids", "teacher_logprobs")))
    divergence = _divergence(options["divergence"], settings.log_prob_min_clamp, teacher.ids.shape[-1])
    options = {**options, "divergence": divergence}
    mask, cu_seqlens = _packed_mask(data), data["input_ids"].offsets()
    if tensordict_utils.get_non_tensor_data(data, "distillation_only", False):
        out = selective_opd_token_losses(student_logits, teacher, mask=mask, cu_seqlens=cu_seqlens, **options)
    else:
        out = _of_a_copy(student_logits, teacher, mask, cu_seqlens, options)
    known = {"selected": out.selected, "student_entropy": out.stats.student_entropy, "support_mass": out.stats.support_mass}
    return {"distillation_losses": out.losses, **{name: known[name].to(out.losses.dtype) for name in COLUMNS}}


def _of_a_copy(
    student_logits: Tensor, teacher: TopKLogprobs, mask: Tensor, cu_seqlens: Tensor, options: TokenLossOptions
) -> TokenLosses:
    """The same from a copy of the selected rows, which the backward may read after the logits were overwritten."""
    out = selective_opd_token_losses(student_logits.detach(), teacher, mask=mask, cu_seqlens=cu_seqlens, **options)
    at = out.selected.nonzero(as_tuple=True)
    everywhere: TokenLossOptions = {"selector": "all", "fraction": 1.0, "top_k": 1, "divergence": options["divergence"]}
    known = Settings.of(options, of=TokenLossOptions)
    everywhere |= {"backend": known.backend, "workspace_bytes": known.workspace_bytes, "vocab_size": known.vocab_size}
    lists = TopKLogprobs(teacher.ids[at], teacher.logprobs[at])
    own = selective_opd_token_losses(student_logits[at], lists, **everywhere)
    blown_up = out.losses.isnan().any()  # at any valid position
    losses = torch.zeros_like(out.losses).index_put(at, own.losses) * torch.where(blown_up, torch.nan, 1.0)
    return out._replace(losses=losses)


def _packed_mask(data: Any) -> Tensor:
    """(1, n) bool: rows that predict a response token which counts. verl's own function says where those are."""
    ids = data["input_ids"].values()
    numbers = no_padding_2_padding(torch.arange(1, len(ids) + 1, device=ids.device), data)  # 0 where there is no token
    mask = torch.zeros(len(ids) + 1, dtype=torch.bool, device=ids.device)
    return mask.index_fill(0, numbers[_response_mask(data)], True)[1:].unsqueeze(0)


def _response_mask(data: Any) -> Tensor:
    mask: Tensor = data["response_mask"].bool()
    return mask.to_padded_tensor(False) if mask.is_nested else mask


def _divergence(divergence: str | Divergence, floor: float | None, k: int) -> Divergence:
    if isinstance(divergence, str):
        divergence = OF_LISTS[divergence](top_k=k)
    if floor is None:
        return divergence
    if type(divergence) is not TopKForwardKL:
        raise ValueError(
            f"log_prob_min_clamp: got {floor:g}, expected null with divergence {divergence.name!r}; forward_kl_topk has it"
        )
    return ClampedTopKForwardKL(top_k=divergence.top_k, floor=float(floor))


@dataclass(frozen=True)
class ClampedTopKForwardKL(TopKForwardKL):
    """verl's "forward_kl_topk": log-probabilities below `floor` count as that, and the student's there are not trained."""

    floor: float = -10.0
    name = "forward_kl_topk"

    def loss(self, at: Support) -> Tensor:
        log_p, log_q = at.log_p.clamp_min(self.floor), at.teacher.clamp_min(self.floor)
        return (log_q.exp() * (log_q - log_p)).sum(1)


def _response_losses(
    config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The registered loss: (B, response) losses in nats, negative ones as 0 as in verl, and metrics of the micro-batch."""
    if any(name not in model_output for name in COLUMNS):
        raise ValueError(
            f"loss_mode: got {MODE!r}, but the engine's logits did not go through patch_verl's compute_topk_loss; set "
            "use_fused_kernels=False and leave patch_verl in place"
        )
    losses = no_padding_2_padding(model_output["distillation_losses"], data).clamp_min(0.0)
    valid = _response_mask(data)
    selected, entropy, mass = (no_padding_2_padding(model_output[name], data).detach() for name in COLUMNS)
    selected = (selected > 0) & valid
    found = {"selected_share": selected.sum() / valid.sum().clamp_min(1)}
    for name, column, among in (
        ("loss_selected", losses.detach(), selected),
        ("entropy", entropy, valid),
        ("entropy_selected", entropy, selected),
        ("support_mass_lower_bound", mass, valid),
        ("support_mass_lower_bound_selected", mass, selected),
    ):
        found[name] = torch.where(among, column, 0).sum() / among.sum().clamp_min(1)
    return losses, {f"distillation/{name}": value for name, value in as_floats(found).items()}
