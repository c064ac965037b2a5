"""NeMo-RL: a loss function object for its on-policy distillation, in the place of its `DistillationLossFn`.

  NeMo-RL:  sum over valid tokens of l / global_valid_toks
  here:     sum over selected ones / (global_valid_toks n_selected / n_valid), n of the call

NeMo-RL's teacher sends top-K logits without their normaliser: log q + c, c unknown in each row. What they do determine is q
renormalised on the list, q^; so the divergences are the two that need no more:
  local_support     sum_T p^ (log p^ - log q^)     NeMo-RL's kl_type "reverse", zero_outside_topk false
  forward_kl_topk   sum_T q^ (log q^ - log p)      its kl_type "forward", zero_outside_topk true
Selectors that read the teacher see q^, too: the support mass is that of q^, no lower bound on q's.
Contract and shapes were recorded from NeMo-RL 0.6.0 at commit 7ea279a (2026-08-22): loss/interfaces.py, loss/utils.py,
loss/loss_functions.py. Logits arrive as [B, S, V] (input type LOGIT): row t predicts token t + 1. Under tensor parallelism
they are a DTensor, or with Megatron this rank's part of the vocabulary.
Not here: logits that are sharded over the sequence (refused with an error), the loss (opd_ops/loss.py).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
from torch import Tensor

from opd_ops.call.metrics import as_floats
from opd_ops.divergences import LocalSupport, TopKForwardKL
from opd_ops.inputs.teacher_lists import TopKLogprobs, is_missing
from opd_ops.inputs.unshard import is_dtensor
from opd_ops.loss import SelectiveOPDLoss
from opd_ops.settings import LossOptions, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

DIVERGENCES: dict[str, type[LocalSupport | TopKForwardKL]] = {"local_support": LocalSupport, "forward_kl_topk": TopKForwardKL}
GIVEN = ("weights", "num_items_in_batch", "process_group")  # by NeMo-RL
NEEDED = ("token_mask", "sample_mask", "teacher_topk_logits", "teacher_topk_indices")


class SelectiveDistillationLossFn:
    """Distillation on the selected tokens: pass it to `distillation_train` instead of the loss that `setup` returns.

    Metrics are sums over the call divided by `global_valid_toks`, so that NeMo-RL's sum over micro-batches is a mean over
    tokens. Where sequences are packed NeMo-RL calls the loss for one sequence at a time: a budget of scope "batch" is then one
    per sequence.

    Args:
        options: `Settings` by name: fraction (1.0 is NeMo-RL's loss), selector, scope, top_k, ... `divergence`: "local_support"
            (the default here) or "forward_kl_topk", on all K entries that the teacher sent.
    Raises: as `Settings`. ValueError: another divergence; in training, data or logits that do not fit.
    Example:
        >>> *policies, loss_fn, logger, checkpointer, state, master_config = setup(config, tokenizer, data, val_data)
        >>> loss_fn = SelectiveDistillationLossFn(fraction=0.1, selector="teachability")
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(self, **options: Unpack[LossOptions]) -> None:
        divergence = options.setdefault("divergence", "local_support")
        if not isinstance(divergence, str) or divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence: got {divergence!r}, expected one of: {', '.join(DIVERGENCES)}: NeMo-RL's top-K logits come "
                "without their normaliser"
            )
        self.divergence = divergence
        self.settings = Settings.of(options, given=GIVEN).for_host(passes_tokens=False, teacher="TopKLogprobs")

    def __call__(
        self,
        logits: Tensor,
        data: Any,
        global_valid_seqs: Tensor | None,
        global_valid_toks: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """NeMo-RL's contract: a scalar of the micro-batch, and its metrics as floats.

        Args:
            logits: [B, S', V] of the student, S' >= S - 1; what is beyond S (alignment of packed sequences) is not read.
            data: `input_ids`, `token_mask` [B, S], `sample_mask` [B], `teacher_topk_logits`, `teacher_topk_indices` [B, S, K].
            global_valid_toks: Valid tokens of the whole step, or None: those of this call.
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


def _aligned(logits: Tensor, data: Any) -> tuple[Tensor, Tensor]:
    """[B, S-1, V] student logits, and of each the mask of the token that it predicts, times the sample's."""
    missing = [name for name in NEEDED if name not in data]
    if missing:
        raise ValueError(f"data: got no {', '.join(missing)}, expected {', '.join(NEEDED)}")
    token_mask = data["token_mask"][:, 1:].to(logits.device)
    n = token_mask.shape[1]
    if logits.dim() != 3 or logits.shape[0] != len(token_mask) or logits.shape[1] < n:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, expected ({len(token_mask)}, {n + 1}, V), those of whole sequences; "
            "context parallelism is not supported yet"
        )
    return logits[:, :n], token_mask * data["sample_mask"].to(logits.device).unsqueeze(-1)


def _renormalised(logits: Tensor) -> Tensor:
    """log q^ of the list, fp32, -inf where a logit is masked: less their normaliser, -9999 may become a larger number."""
    missing = is_missing(logits)
    return logits.float().masked_fill(missing, -torch.inf).log_softmax(-1).masked_fill(missing, -torch.inf)


def _vocabulary(logits: Tensor) -> tuple[int, Any]:
    """How many ids there are, and the group of ranks that Megatron has share them out, in equal parts; None: no such group."""
    megatron: Any = sys.modules.get("megatron.core.parallel_state")
    if megatron is None or is_dtensor(logits) or not megatron.model_parallel_is_initialized():
        return logits.shape[-1], None
    ranks = megatron.get_tensor_model_parallel_world_size()
    return logits.shape[-1] * ranks, megatron.get_tensor_model_parallel_group() if ranks > 1 else None


def _check_ids(ids: Tensor, weights: Tensor, vocab_size: int) -> None:
    """An id that the student lacks is another tokeniser's, or its logits are a shard; looking is one host synchronisation."""
    largest = int(torch.where((weights != 0).unsqueeze(-1), ids, 0).max()) if ids.numel() else 0
    if largest >= vocab_size:
        raise ValueError(
            f"teacher_topk_indices: got id {largest}, expected ids below {vocab_size}, the student's vocabulary; the models "
            "share no vocabulary, or the logits are a shard of it"
        )


def _metrics(found: dict[str, Tensor], global_valid_toks: Tensor | None) -> dict[str, float]:
    """Per token of the step. What is known of the selected tokens stands for all tokens of the call, as in the loss."""
    n_valid, n_selected = found["n_valid"], found["n_selected"]
    per_token = 1 / (n_valid if global_valid_toks is None else global_valid_toks).double().reshape(()).clamp_min(1)
    per_selected = per_token * n_valid / n_selected.clamp_min(1)
    of_step = {
        "loss": found["loss"],
        "opd/selected_share": n_selected * per_token,
        "opd/loss_selected": found["loss_sum"] * per_selected,
        "opd/entropy": found["entropy_sum"] * per_token,
        "opd/entropy_selected": found["entropy_selected_sum"] * per_selected,
        "opd/support_mass_of_list": found["support_mass_lower_bound_sum"] * per_token,
    }
    return as_floats(of_step)
