"""The public loss: `selective_opd_loss` scores every valid position, selects the best share and trains only on these.

  L = 1/|M| sum_{t in M} l_t,  M the selected positions, l the divergence       arXiv 2605.26844 eq. 6; 2604.14084 eq. 9

Not here: the settings (settings.py), the stages of a call (call/), scoring and selection as functions (scoring.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from opd_ops.call.choose import Chosen, choose, shortlist
from opd_ops.call.prepare import Call, check_num_items, check_transforms, prepare
from opd_ops.call.reduce import SelectiveOPDOutput, TokenLosses, mean_loss, token_losses
from opd_ops.call.score import score, score_again
from opd_ops.inputs.batch import Batch
from opd_ops.inputs.ensembles import AnyTeacher
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.rollout import StudentStats
from opd_ops.settings import LossOptions, Settings, TokenLossOptions, documented

if TYPE_CHECKING:
    from typing_extensions import Unpack


@documented(LossOptions)
def selective_opd_loss(
    student: Tensor | LinearHead,
    teacher: AnyTeacher,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    tokens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    student_stats: StudentStats | None = None,
    num_items_in_batch: Tensor | float | None = None,
    settings: Settings | None = None,
    **options: Unpack[LossOptions],
) -> SelectiveOPDOutput:
    """Reverse KL from student to teacher, or another divergence, on the best-scored share of the student's tokens.

    With p = softmax(student / temperature), q likewise for the teacher, and M the ceil(fraction * n_valid) valid positions of
    highest score (arXiv 2605.26844, eqs. 6, 12, 13):
        loss = 1/|M| sum_{t in M} sum_v p[t,v] (log p[t,v] - log q[t,v])          [nats]
    Gradients of positions outside M are exactly zero. Scores carry no gradient, and the teacher receives none.

    Shapes: (...) is the positions' shape, usually (B, T), N their number, V the vocabulary's size. Position i predicts the next
    token: `mask`, `weights`, `tokens` and `shift_labels` belong to that token. A position is valid unless its mask or weight is
    0, its label is `ignore_index`, or only the teacher's row is not finite.

    Args:
        student: (..., V) logits, or a `LinearHead`, whose logits are never materialised whole.
        teacher: The same; or `TopKLogprobs` or `SampledLogprobs` from a server; or several models, `Mixture` or `Routed`.
        mask: (...) non-zero on the tokens that the student wrote; None: all.
        weights: (...) a factor per position.
        labels: (...) int64 ids, `ignore_index` where not trained on; shifted here.
        shift_labels: (...) the same, shifted already; `labels` are then ignored.
        tokens: (...) the predicted tokens, for selectors and losses of the sampled token; None: from the labels.
        old_logprobs: (...) the tokens' log-probabilities when they were sampled, for a divergence with a ratio.
        cu_seqlens: (n_sequences + 1,) int32 or int64 boundaries of packed sequences.
        student_stats: `StudentStats` from the rollout: scoring then runs only the teacher's head.
        num_items_in_batch: Valid tokens of the whole step, over micro-batches and ranks, in place of this call's count.
        settings: A `Settings`, in place of settings by name.
        {settings}
    Returns: `SelectiveOPDOutput`: `loss`, 0-dim; `selected`, `scores`, `stats` of the mask's shape; `metrics`.
    Raises: ValueError, TypeError: a wrong argument, before any work, with what came and what was expected.
        ValueError: logits that are not finite (`check_finite`), a `num_items_in_batch` of 0, after scoring.
    More: docs/reference/ (selectors, divergences, metrics, errors), docs/numerics.md, docs/guides/.
    Example: equal models have nothing to learn.
        >>> logits = torch.randn(6, 32)
        >>> selective_opd_loss(logits, logits).loss
        tensor(0.)
    """
    batch = Batch(
        mask=mask,
        weights=weights,
        labels=labels,
        shift_labels=shift_labels,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        student_stats=student_stats,
        num_items_in_batch=num_items_in_batch,
        old_logprobs=old_logprobs,
    )
    return _loss(student, teacher, batch, Settings.given_or_named(settings, options))


class SelectiveOPDLoss(nn.Module):
    """`selective_opd_loss` as a module that carries its settings, as `nn.CrossEntropyLoss` does for `F.cross_entropy`.

    Args: a `Settings`, or settings by name, the same as for `Settings`: SelectiveOPDLoss(fraction=0.1, divergence="jsd").
    Raises: as `Settings`, when the module is made.
    """

    def __init__(self, settings: Settings | None = None, **options: Unpack[LossOptions]) -> None:
        super().__init__()
        self.settings = Settings.given_or_named(settings, options)

    __call__: Callable[..., SelectiveOPDOutput]  # nn.Module types it as Any

    def extra_repr(self) -> str:
        return str(self.settings)

    def forward(
        self,
        student: Tensor | LinearHead,
        teacher: AnyTeacher,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        tokens: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        student_stats: StudentStats | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> SelectiveOPDOutput:
        """The loss of one batch; arguments are the same as for `selective_opd_loss`."""
        batch = Batch(
            mask=mask,
            weights=weights,
            labels=labels,
            shift_labels=shift_labels,
            tokens=tokens,
            cu_seqlens=cu_seqlens,
            student_stats=student_stats,
            num_items_in_batch=num_items_in_batch,
            old_logprobs=old_logprobs,
        )
        return _loss(student, teacher, batch, self.settings)


@documented(TokenLossOptions)
def selective_opd_token_losses(
    student: Tensor | LinearHead,
    teacher: AnyTeacher,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    tokens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    student_stats: StudentStats | None = None,
    settings: Settings | None = None,
    **options: Unpack[TokenLossOptions],
) -> TokenLosses:
    """The losses of `selective_opd_loss` per position, for a host trainer that weights and reduces them itself.

    With M the selected positions, l the divergence in nats and w the `weights`:
        losses_t = w_t l_t  for t in M, 0 elsewhere; the gradient of any sum_t c_t losses_t is exact, whatever the sign of c_t
    `selective_opd_loss` is losses.sum() / |M|. A host that divides by a count of all valid positions shrinks the step by
    |M| / n_valid: multiply by n_valid / |M| (`metrics` has both counts). Ranks of a `selection_group` share only the selection:
    nothing is divided here.

    Args: the same as for `selective_opd_loss`, without `denominator` and `inplace_backward`.
    Returns: `TokenLosses`: `losses` of the mask's shape, fp32 (fp64 if any input is), connected to the student's tensors even
        when nothing is selected; `selected`, `scores`, `stats`, `metrics` as `selective_opd_loss` returns them.
    Raises: as `selective_opd_loss`. A second derivative is an error, and so are torch.func's transforms.
    Non-finite logits: if `selective_opd_loss` is NaN, every loss and every gradient is NaN.
    Cost in head matmuls, two heads of equal width, a share rho selected: 2 + 4 rho on backend "torch" with reverse or forward
        KL, as `selective_opd_loss`. In other cases the backward computes parts of the forward again: 2 + 8 rho with other
        divergences over the whole vocabulary, and on "triton" 2 + 6 rho with the KLs and "jsd". With a frozen student head
        rho less.
    torch.compile(fullgraph=True) is not supported.
    Example: the mean over the selected positions is the loss.
        >>> student, teacher = torch.randn(2, 6, 32).requires_grad_()
        >>> out = selective_opd_token_losses(student, teacher, fraction=0.5)
        >>> out.losses.sum() / out.selected.sum() == selective_opd_loss(student, teacher, fraction=0.5).loss
        tensor(True)
    """
    settings = Settings.given_or_named(settings, options, of=TokenLossOptions)
    check_transforms(settings.backend, has_vmap=False, has_gradient=False)
    batch = Batch(
        mask=mask,
        weights=weights,
        labels=labels,
        shift_labels=shift_labels,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        student_stats=student_stats,
        old_logprobs=old_logprobs,
    )
    call = prepare(student, teacher, batch, settings, selects=True)
    return token_losses(_chosen(call))


def _loss(student: Tensor | LinearHead, teacher: AnyTeacher, batch: Batch, settings: Settings) -> SelectiveOPDOutput:
    check_transforms(settings.backend, has_vmap=False, has_gradient=True)
    num_items_in_batch = check_num_items(batch.num_items_in_batch)
    call = prepare(student, teacher, batch, settings, selects=True)
    return mean_loss(_chosen(call), num_items_in_batch)


def _chosen(call: Call) -> Chosen:
    scored = score(call)
    if call.settings.in_float8:
        scored = score_again(scored, shortlist(scored))
    return choose(scored)
