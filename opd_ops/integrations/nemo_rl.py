"""NeMo-RL: a loss function object for its on-policy distillation, used instead of its `DistillationLossFn`.

  NeMo-RL:  sum over valid tokens of l / global_valid_toks
  here:     sum over selected tokens of l / (global_valid_toks n_selected / n_valid); n_selected, n_valid: counts of this call

NeMo-RL's teacher sends top-K logits without their normaliser: log q + c, with an unknown c in each row. They determine q^: q
renormalised on the list. So two divergences are possible:
  local_support     sum_T p^ (log p^ - log q^)     NeMo-RL's kl_type "reverse", zero_outside_topk false
  forward_kl_topk   sum_T q^ (log q^ - log p)      its kl_type "forward", zero_outside_topk true
Selectors that read the teacher see q^, too: their support mass is q^'s, which is no lower bound on q's.
Contract and shapes were recorded from NeMo-RL 0.6.0 at commit 7ea279a (2026-08-22): loss/interfaces.py, loss/utils.py,
loss/loss_functions.py. Logits arrive as [B, S, V] (input type LOGIT): row t predicts token t + 1. Under tensor parallelism
they are a DTensor, or with Megatron this rank's shard of the vocabulary.
With packed sequences NeMo-RL calls the loss once per sequence, so ranks make different numbers of calls. A budget over ranks
would wait for ever.
Not here: logits that are sharded over the sequence, a budget over ranks (both are errors); the loss (opd_ops/loss.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
from torch import Tensor

from opd_ops.call.metrics import as_floats
from opd_ops.divergences import Divergence, LocalSupport, TopKForwardKL
from opd_ops.inputs.teacher_lists import TopKLogprobs, is_missing
from opd_ops.inputs.unshard import is_dtensor
from opd_ops.loss import SelectiveOPDLoss
from opd_ops.settings import LossOptions, Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

DIVERGENCES: dict[str, Callable[..., Divergence]] = {"local_support": LocalSupport, "forward_kl_topk": TopKForwardKL}
PASSED_BY_HOST = ("weights", "num_items_in_batch", "process_group")  # NeMo-RL decides these
REQUIRED_DATA = ("token_mask", "sample_mask", "teacher_topk_logits", "teacher_topk_indices")


class SelectiveDistillationLossFn:
    """Distillation on the selected tokens: pass it to `distillation_train` instead of the loss that `setup` returns.

    Metrics are sums over the call divided by `global_valid_toks`, so that NeMo-RL's sum over micro-batches is a mean over
    tokens. With packed sequences NeMo-RL calls the loss once per sequence: scope "batch" then gives each sequence a budget of
    its own.

    Args:
        settings, options: A `Settings`, or settings by name: fraction (1.0 is NeMo-RL's loss), selector, scope, top_k, ...
            `divergence`: "local_support" (the default of settings by name) or "forward_kl_topk", on all K entries that the
            teacher sent.
    Raises: as `Settings`. ValueError: another divergence; in training, data or logits of another form.
    Example:
        >>> *policies, loss_fn, logger, checkpointer, state, master_config = setup(config, tokenizer, data, val_data)
        >>> loss_fn = SelectiveDistillationLossFn(fraction=0.1, selector="teachability")
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(self, settings: Settings | None = None, **options: Unpack[LossOptions]) -> None:
        if settings is None:
            options.setdefault("divergence", "local_support")
        settings = Settings.given_or_named(settings, options, given=PASSED_BY_HOST)
        divergence = settings.divergence
        if not isinstance(divergence, str) or divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence: got {divergence!r}, expected one of: {', '.join(DIVERGENCES)}: NeMo-RL's top-K logits come "
                "without their normaliser"
            )
        self.divergence = divergence
        self.settings = settings.for_host(passes_tokens=False, teacher="TopKLogprobs", selects_over_ranks=False)

    def __call__(
        self,
        logits: Tensor,
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """NeMo-RL's contract: the loss of the micro-batch as a scalar, and its metrics as numbers.

        Args:
            logits: [B, S', V] of the student, S' >= S - 1; rows beyond S (alignment of packed sequences) are not read.
            data: `input_ids`, `token_mask` [B, S], `sample_mask` [B], `teacher_topk_logits`, `teacher_topk_indices` [B, S, K].
            global_valid_toks: Number of valid tokens of the whole step; None: of this call.
        """
        student, weights = _aligned(logits, data)
        n, (vocab_size, group) = student.shape[1], _vocabulary(student)
        ids = data["teacher_topk_indices"][:, :n].to(student.device)
        _check_ids(ids, weights, vocab_size)
        divergence = DIVERGENCES[self.divergence](top_k=ids.shape[-1])
        out = SelectiveOPDLoss(replace(self.settings, divergence=divergence, process_group=group))(
            student,
            TopKLogprobs(ids, _renormalised(data["teacher_topk_logits"][:, :n].to(student.device))),
            weights=weights,
            num_items_in_batch=None if global_valid_toks is None else global_valid_toks.reshape(()),
        )
        return out.loss, {**_metrics(out.metrics, global_valid_toks), "num_valid_samples": data["input_ids"].shape[0]}


def _aligned(logits: Tensor, data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """[B, S-1, V] student logits, and their [B, S-1] weights: mask of the predicted token times mask of the sample."""
    missing = [name for name in REQUIRED_DATA if name not in data]
    if missing:
        raise ValueError(f"data: got no {', '.join(missing)}, expected {', '.join(REQUIRED_DATA)}")
    token_mask = data["token_mask"][:, 1:].to(logits.device)
    n = token_mask.shape[1]
    if logits.dim() != 3 or logits.shape[0] != len(token_mask) or logits.shape[1] < n:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, expected ({len(token_mask)}, {n + 1}, V), those of whole sequences; "
            "context parallelism is not supported yet"
        )
    return logits[:, :n], token_mask * data["sample_mask"].to(logits.device).unsqueeze(-1)


def _renormalised(logits: Tensor) -> Tensor:
    """log q^ of the list, fp32; -inf where a logit is missing (-9999): minus the normaliser it would no longer be -9999."""
    missing = is_missing(logits)
    return logits.float().masked_fill(missing, -torch.inf).log_softmax(-1).masked_fill(missing, -torch.inf)


def _vocabulary(logits: Tensor) -> tuple[int, ProcessGroup | None]:
    """Size of the whole vocabulary, and the ranks among which Megatron divides it in equal shards; None: it does not."""
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is None or is_dtensor(logits) or not megatron.model_parallel_is_initialized():
        return logits.shape[-1], None
    ranks = megatron.get_tensor_model_parallel_world_size()
    return logits.shape[-1] * ranks, megatron.get_tensor_model_parallel_group() if ranks > 1 else None


def _check_ids(ids: Tensor, weights: Tensor, vocab_size: int) -> None:
    """Refuse an id beyond the vocabulary: another tokeniser, or the logits are a shard. This is one host synchronisation."""
    largest = int(torch.where((weights != 0).unsqueeze(-1), ids, 0).max()) if ids.numel() else 0
    if largest >= vocab_size:
        raise ValueError(
            f"teacher_topk_indices: got id {largest}, expected ids below {vocab_size}, the student's vocabulary; the models "
            "share no vocabulary, or the logits are a shard of it"
        )


def _metrics(metrics: dict[str, Tensor], global_valid_toks: Tensor | None) -> dict[str, float]:
    """Metrics per token of the step. A mean over the selected tokens counts for all tokens of the call, as in the loss."""
    n_valid, n_selected = metrics["n_valid"], metrics["n_selected"]
    per_token = 1 / (n_valid if global_valid_toks is None else global_valid_toks).double().reshape(()).clamp_min(1)
    per_selected = per_token * n_valid / n_selected.clamp_min(1)
    logged = {
        "loss": metrics["loss"],
        "opd/selected_share": n_selected * per_token,
        "opd/loss_selected": metrics["loss_sum"] * per_selected,
        "opd/entropy": metrics["entropy_sum"] * per_token,
        "opd/entropy_selected": metrics["entropy_selected_sum"] * per_selected,
        "opd/support_mass_of_list": metrics["support_mass_lower_bound_sum"] * per_token,
    }
    return as_floats(logged)
