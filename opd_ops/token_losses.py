"""`selective_opd_token_losses`: the selected positions' losses one by one, connected to the graph, for hosts that reduce by
themselves (verl, PPO-style trainers).

  losses_t = w_t l_t at the selected positions t, 0 elsewhere;  d(sum_t c_t losses_t) = sum_t c_t w_t dl_t   for any c

The forward finds the losses without a graph. The backward, which alone knows c, is that of the weighted sum which every
backend has, with c_t w_t as the weights, on the selected positions; nothing is scored or selected again.
Not here: the mean over the selected positions (loss.py), how they are selected (call/choose.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.backends.shared.first_order import first_order
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.call import checks
from opd_ops.call.choose import Chosen
from opd_ops.divergences import Divergence
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import SparseTeacher
from opd_ops.scoring import DEFAULT_WORKSPACE_BYTES, prepare
from opd_ops.selection.selectors import Selector
from opd_ops.selection.stats import TokenStats


class TokenLosses(NamedTuple):
    """What `selective_opd_token_losses` returns; (...) is the positions' shape."""

    losses: Tensor  # (...) nats, connected to the graph; 0 where not selected
    selected: Tensor  # (...) bool
    scores: Tensor  # (...) -inf where not valid
    stats: TokenStats  # columns (...), 0 where not valid
    metrics: dict[str, Tensor]  # detached 0-dim tensors; "loss" is the mean over the selected positions


class _TokenLosses(torch.autograd.Function):
    """(M,) losses whose gradient is a backend's gradient of their weighted sum, with the weights that the backward brings."""

    @staticmethod
    def forward(ctx: Any, chosen: Chosen, tokens: Tensor | None, losses: Tensor, trained: Tensor, *tensors: Tensor) -> Tensor:
        ctx.chosen, ctx.tokens, ctx.n_student = _with_tensors(chosen, None), tokens, len(chosen.call.student.tensors)
        ctx.save_for_backward(trained, *tensors)
        return torch.where(trained, losses, 0)

    @staticmethod
    @first_order
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        trained, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[4 : 4 + ctx.n_student]
        own = [t.detach().requires_grad_(need) for t, need in zip(tensors[: ctx.n_student], needs, strict=True)]
        chosen = _with_tensors(ctx.chosen, (*own, *tensors[ctx.n_student :]))
        with torch.enable_grad():
            weighted, _ = chosen.loss(torch.where(trained, dlosses, 0), ctx.tokens)
            found = iter(torch.autograd.grad(weighted, [t for t in own if t.requires_grad]))
        gradients: list[Tensor | None] = [next(found) if need else None for need in needs]
        return (None,) * 4 + tuple(gradients) + (None,) * len(tensors[ctx.n_student :])


def _with_tensors(chosen: Chosen, tensors: Sequence[Tensor] | None) -> Chosen:
    """The same with these tensors in both sources; None: emptied. Lists are no inputs of autograd's and stay."""
    student, teacher = chosen.call.sides
    split = len(student.tensors)
    student = student.emptied() if tensors is None else student.with_tensors(tensors[:split])
    if isinstance(teacher, Source):
        teacher = teacher.emptied() if tensors is None else teacher.with_tensors(tensors[split:])
    return replace(chosen, call=replace(chosen.call, student=student, teacher=teacher))


def selective_opd_token_losses(
    student: Tensor | LinearHead,
    teacher: Tensor | LinearHead | SparseTeacher,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    selector: str | Selector = "teachability",
    fraction: float = 0.05,
    threshold: Tensor | float | None = None,
    scope: str = "batch",
    selection_group: dist.ProcessGroup | None = None,
    divergence: str | Divergence = "reverse_kl",
    top_k: int = 16,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    tokens: Tensor | None = None,
    special_ids: Sequence[int] = (),
    eos_ids: Sequence[int] = (),
    cu_seqlens: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    score_dtype: str | None = None,
    student_stats: StudentStats | None = None,
    check_finite: bool = False,
) -> TokenLosses:
    """The losses of `selective_opd_loss` position by position, for a host that weights and reduces them itself.

    With M the selected positions, l the divergence in nats and w the `weights`:
        losses_t = w_t l_t  for t in M, 0 elsewhere; the gradient of any sum_t c_t losses_t is exact, whatever the sign of c_t
    `selective_opd_loss` is losses.sum() / |M|. A host that divides by a count of all valid positions shrinks the step by
    |M| / n_valid: multiply by n_valid / |M| (`metrics` has both counts).

    Over several processes (`selection_group`) only the selection is theirs together: nothing is divided here.
    Arguments are those of `selective_opd_loss`, less what concerns its denominator, and less `inplace_backward`.
    Returns: `TokenLosses`: `losses` of the mask's shape, fp32 (fp64 if any input is), connected to the student's tensors even
        when nothing is selected; `selected`, `scores`, `stats`, `metrics` as of `selective_opd_loss`.
    Raises: as `selective_opd_loss`. A second derivative is an error, and so are torch.func's transforms.
    Non-finite logits: as there; what makes the loss NaN there makes every loss NaN here, and every gradient.
    Cost in head matmuls, two heads of equal width, a share rho selected: 2 + 4 rho on backend "torch" with reverse or forward
        KL, as `selective_opd_loss`. What that keeps of its forward otherwise is found once more in the backward: 2 + 8 rho with
        "jsd" and "total_variation", and on "triton" 2 + 6 rho with the KLs and "jsd". A frozen student head costs rho less.
    Not for torch.compile(fullgraph=True).
    Example: the mean over the selected positions is the loss.
        >>> student, teacher = torch.randn(2, 6, 32).requires_grad_()
        >>> out = selective_opd_token_losses(student, teacher, fraction=0.5)
        >>> out.losses.sum() / out.selected.sum() == selective_opd_loss(student, teacher, fraction=0.5).loss
        tensor(True)
    """
    checks.check_transforms(backend, has_vmap=False, has_gradient=False)
    fraction = checks.check_fraction(fraction)
    checks.check_choice("scope", scope, checks.SCOPES)
    threshold = checks.check_threshold(threshold, score_dtype)
    call = prepare(
        student,
        teacher,
        mask=mask,
        weights=weights,
        labels=labels,
        shift_labels=shift_labels,
        ignore_index=ignore_index,
        tokens=tokens,
        special_ids=special_ids,
        eos_ids=eos_ids,
        selector=selector,
        scope=scope,
        selection_group=selection_group,
        divergence=divergence,
        top_k=top_k,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
        vocab_size=vocab_size,
        process_group=process_group,
        generator=generator,
        backend=backend,
        workspace_bytes=workspace_bytes,
        score_dtype=score_dtype,
        student_stats=student_stats,
        check_finite=check_finite,
    )
    checks.check_tokens(call.divergence, call.teacher, call.positions.tokens)
    chosen = Chosen.of(call, fraction=fraction, threshold=threshold, cu_seqlens=cu_seqlens)
    rows, sampled = chosen.rows, chosen.tokens()
    with torch.no_grad():
        _, found = chosen.loss(torch.ones_like(chosen.scores.flatten()[rows]), sampled)
        settled = chosen.settled(found)
        chosen = settled.chosen
    teachers = tuple(t.detach() for t in call.teacher.tensors) if isinstance(call.teacher, Source) else ()
    of_rows: Tensor = _TokenLosses.apply(chosen, sampled, found, settled.trained, *call.student.tensors, *teachers)
    read_again = (call.student, call.teacher) if isinstance(call.teacher, Source) else (call.student,)
    of_rows = unchanged(of_rows, rows, *read_again, workspace_bytes=call.workspace_bytes)
    if weights is not None:
        of_rows = of_rows * weights.detach().flatten()[rows].to(of_rows.dtype)
    losses = torch.zeros_like(chosen.scores.flatten(), dtype=of_rows.dtype).index_put((rows,), of_rows).view(call.shape)
    losses = losses * chosen.poison(losses.dtype)
    total = of_rows.detach().sum()
    metrics = settled.metrics(total / settled.trained.sum().clamp_min(1), total, sampled)
    return TokenLosses(losses, chosen.selected, chosen.scores, chosen.stats, metrics)
