"""`selective_opd_loss`: score every valid position, select the best share, train on those alone.

  L = 1/|M| sum_{t in M} l_t,  M the selected positions, l the divergence       arXiv 2605.26844 eq. 6; 2604.14084 eq. 9

Not here: the two halves (scoring.py), what is selected and its losses (call/choose.py), a loss per position for hosts that
reduce by themselves (token_losses.py), the divergences (divergences/), statistics and gradients (backends/).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opd_ops.call import checks
from opd_ops.call.choose import Chosen
from opd_ops.distributed.ranks import Ranks
from opd_ops.divergences import Divergence
from opd_ops.inputs.linear_head import LinearHead
from opd_ops.inputs.rollout import StudentStats
from opd_ops.inputs.teacher_lists import SparseTeacher
from opd_ops.scoring import DEFAULT_WORKSPACE_BYTES, prepare
from opd_ops.selection.selectors import Selector
from opd_ops.selection.stats import TokenStats


class SelectiveOPDOutput(NamedTuple):
    """What `selective_opd_loss` returns; (...) is the positions' shape."""

    loss: Tensor  # 0-dim, connected to the graph even when nothing is selected
    selected: Tensor  # (...) bool
    scores: Tensor  # (...) -inf where not valid
    stats: TokenStats  # columns (...), 0 where not valid
    metrics: dict[str, Tensor]  # detached 0-dim tensors


def selective_opd_loss(
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
    num_items_in_batch: Tensor | float | None = None,
    denominator: str = "selected",
    vocab_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    score_dtype: str | None = None,
    student_stats: StudentStats | None = None,
    inplace_backward: bool = False,
    check_finite: bool = False,
) -> SelectiveOPDOutput:
    """Reverse KL from student to teacher, or another divergence, on the best-scored share of the student's tokens.

    With p = softmax(student / temperature), q likewise for the teacher, and M the ceil(fraction * n_valid) valid positions
    with the highest score:
        loss = 1/|M| sum_{t in M} sum_v p[t,v] (log p[t,v] - log q[t,v])          [nats]
    (arXiv 2605.26844, eqs. 6, 12, 13.) Positions outside M receive a gradient of exactly zero, scores carry none, and the
    teacher never receives any. Row i predicts target i: the caller has shifted. Numbers and lists of ids may be NumPy's.

    Args:
        student: (..., V) logits, or a `LinearHead`, whose logits are then never materialised whole.
        teacher: The same for the teacher, with the same leading dimensions; or `TopKLogprobs`, `SampledLogprobs`, what a server
            returns. docs/features.md has the table of what each teacher supports. Tensors made in `torch.inference_mode()` have
            to stay as they are until the backward, which reads them again: a buffer that was filled again is an error on a CPU,
            and makes the gradients NaN elsewhere. A sample of each row is compared, so one changed entry may go unseen.
        mask: (...), any dtype, non-zero on the tokens the student wrote; None: all. Other rows may hold anything.
        weights: (...) factors of each position's loss; None: 1. A weight of 0 takes the position from the mask and from the
            denominator; others change neither selection nor denominator.
        selector: What makes a position worth training on: a name of selection/selectors.py, or a callable `TokenStats ->
        scores`, whose
            `needs` names the optional columns it reads. A NaN among its scores makes the loss NaN.
        fraction: Share of the valid positions to train on, in (0, 1]; 1.0 is plain distillation.
        threshold: Train on every valid position that scores at least this, in the place of the budget: a host that has scored
            all micro-batches of a step can fix one cut for it.
        scope: "batch": one budget; "sequence": one per sequence (last leading dimension, or the spans of `cu_seqlens`);
            "global": one over the ranks of `selection_group`, as one process would select that holds all their positions.
        selection_group: The processes that select together: with scope "global" (None: all there are), or with "sequence" where
            the ranks hold parts of the same sequences, as many on each (context parallelism; None: whole sequences). Selectors
            then normalise over the positions of all ranks. All must make the call, with one set of options, also with no
            position. docs/features.md says what is sent.
        divergence: The loss on the selected positions: "reverse_kl", "forward_kl", "jsd", "total_variation", "local_support",
            "tail_aware", "forward_kl_topk", "sampled", "entropy_aware", or an instance with parameters (divergences/), like
            `JSD(beta=0.3)` or `Extrapolated(1.25, reference)`.
        top_k: K of the supports, 1 <= K <= V.
        temperature: Divides both models' logits; > 0. The loss is not scaled back by its square.
        labels, shift_labels: (...) targets, unshifted as in Hugging Face or already shifted (these win): positions whose
            target is `ignore_index` are not valid. With a mask, both must allow a position.
        tokens: (...) the token that each position predicts, for divergence "sampled" and `special_ids`; None: the labels.
        special_ids: Token ids whose first occurrence in each sequence is not trained on, nor counted (arXiv 2603.25562's code).
        eos_ids: Ids that mean the same, like two ends of a turn: both models' probabilities of them are added up.
        cu_seqlens: (n_sequences + 1,) boundaries of packed sequences in the flattened positions.
        num_items_in_batch: The host trainer's count of valid tokens over all micro-batches (and ranks). 0, a number or a
            tensor, is for a step without a valid token: the loss is 0. Where positions are selected, 0 is an error. On a device
            that the host would wait for, in a graph and over ranks it is none: the loss and its gradient are 0.
        denominator: "selected": mean over M; with `num_items_in_batch` the sum is divided by
            `num_items_in_batch * n_selected / n_valid`. "valid": divided by n_valid, or by `num_items_in_batch`. Both n are
            those of all ranks that select together, so that the ranks' losses add up to the loss of the whole batch. DDP and
            FSDP average gradients: multiply the loss by their number, or pass the host's `num_items_in_batch` per rank.
        vocab_size: Common vocabulary to slice both models to; None: the smaller, with one warning if they differ.
        process_group: The ranks that share out the vocabulary, in the order of its ids, in parts of any width, also 0. The
            sides are then this rank's logits or rows of the heads (or a teacher that is whole). Everything else, hidden states
            too, is the same on all of them, and so is what is returned; gradients are those of the rank's part, and of the
            hidden states whole. DTensors sharded on the vocabulary bring their group. docs/features.md says what is sent.
        generator: For the selectors that draw ("random", "multinomial"). Under activation checkpointing leave it None:
            the recomputation must draw the same, and only torch's own generators are rewound for it.
        backend: "triton" (a GPU), "torch" (streamed, any device), "eager" (the readable oracle, full
            tensors); "auto": "triton" where it can run, else "torch".
        workspace_bytes: The most scratch memory the call may hold beyond inputs, outputs and required gradients, O(N) numbers,
            O(K) more for each position trained on by a divergence on a list of K ids, and, with `score_dtype="float8"`, the
            8-bit copies of heads that do not bring their own. On a Linux CPU the memory of a freed weight gradient waits for
            the next call, the kernel's to take meanwhile (opd_ops/backends/shared/pages.py).
        score_dtype: Precision of a head's logits while they rank positions, on "triton": None: the head's own; "float32";
            "float8" (Hopper or newer): 8 bits rank all positions, and the best 2 n are ranked again by fp32 logits. What is
            trained on comes from fp32 logits with each of them.
        student_stats: `StudentStats` of these positions, from the rollout: scoring then reads the teacher alone. Not for
            selectors that need the student's whole row. Both KLs are then known where trained on alone: elsewhere NaN, as are
            the metrics that need them.
        inplace_backward: Let the gradient overwrite the student's logits (backend "triton"), which spares a tensor of their
            size. Refused for a leaf, a view, logits without a gradient or shared with the teacher; a second backward raises.
        check_finite: Raise where a valid position has no finite softmax, instead of the rules below.
    Returns: `SelectiveOPDOutput`: `loss`, fp32 scalar; `selected`, `scores`, `stats` of the mask's shape; `metrics`, over ranks
        too of this one's positions: sums and counts to add up.
        fp64 inputs on both sides give fp64 results.
    Raises:
        ValueError: shapes, devices or numbers that do not fit ("fraction: got 1.5, expected a number in (0, 1]").
        TypeError: logits that are not floating point, something that is no tensor, or a sparse or nested one.
    A second derivative is an error, and so are torch.func's transforms, but with backend "eager" (there vmap alone is).
    Non-finite logits: -inf is a masked vocabulary entry. Where the divergence is infinite (p > 0, q = 0) the stats say so and
        the position is not selected. A NaN of the student at a valid position makes the loss NaN, also where the teacher's
        logits have one. A NaN of the teacher's logits alone, or nothing in its list, makes a position invalid, counted in
        `metrics["n_teacher_nonfinite"]`; a NaN in its list is an error with its position (on a GPU, where looking would wait,
        with `check_finite` alone).
    torch.compile(fullgraph=True, dynamic=False) and CUDA-graph capture take calls on backend "triton" with reverse or forward
        KL, mask None (and no weights or labels), scope "batch" (so one process), no threshold, no `score_dtype="float8"`: there
        the number of rows to train on is fixed by the shapes. torch.compile takes no `student_stats`.
    Host synchronisations on a GPU: one for the list of valid rows (none without a mask), one for that of selected rows; one
        more for the shortlist of "float8", one where ranks share out vocabulary or sequences, one for `student_stats` on
        "torch", and there one in the backward of "local_support".
    Example: a student equal to its teacher has nothing to learn.
        >>> logits = torch.randn(6, 32)
        >>> selective_opd_loss(logits, logits).loss
        tensor(0.)
    """
    checks.check_transforms(backend, has_vmap=False, has_gradient=True)
    fraction = checks.check_fraction(fraction)
    checks.check_choice("scope", scope, checks.SCOPES)
    checks.check_choice("denominator", denominator, checks.DENOMINATORS)
    num_items_in_batch = checks.check_num_items(num_items_in_batch)
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
        inplace_backward=inplace_backward,
    )
    if inplace_backward:
        checks.check_inplace_backward(call.student.leading, call.teacher)
    checks.check_tokens(call.divergence, call.teacher, call.positions.tokens)
    chosen = Chosen.of(call, fraction=fraction, threshold=threshold, cu_seqlens=cu_seqlens)
    rows, kept, tokens_of = chosen.rows, chosen.kept, chosen.tokens()
    if call.ranks is None:  # over ranks the others would wait for the one that raised
        checks.check_some_items(num_items_in_batch, chosen.selected)
    total = _denominator(chosen.selected, chosen.stats.valid, num_items_in_batch, denominator)
    factors = _ratio(torch.ones_like(total), total).to(chosen.scores.dtype).expand(len(rows))
    factors = factors if kept is None else torch.where(kept, factors, 0)
    of_rows = None if weights is None else weights.detach().flatten()[rows].to(factors.dtype)
    weighted, losses = chosen.loss(factors if of_rows is None else factors * of_rows, tokens_of, inplace=inplace_backward)
    settled = chosen.settled(losses)
    chosen = settled.chosen
    # 1 if no infinite loss was dropped; over ranks their counts are added up here alone, when they are final
    final = _denominator(chosen.selected, chosen.stats.valid, num_items_in_batch, denominator, call.ranks)
    correction = _ratio(total, final)
    loss = weighted * correction.to(weighted.dtype) * chosen.poison(weighted.dtype)
    metrics = settled.metrics(loss, settled.loss_sum(of_rows), tokens_of)
    return SelectiveOPDOutput(loss, chosen.selected, chosen.scores, chosen.stats, metrics)


def _denominator(
    selected: Tensor, valid: Tensor, num_items: Tensor | float | None, kind: str, ranks: Ranks | None = None
) -> Tensor:
    """What the sum over the selected positions is divided by, 0-dim fp64; 1 where nothing is selected."""
    n_selected, n_valid = selected.sum(), valid.sum()
    if ranks is not None:
        n_selected, n_valid = ranks.sum(torch.stack((n_selected, n_valid))).unbind()
    n_selected, n_valid = n_selected.double(), n_valid.double()
    share = n_selected / n_valid.clamp_min(1) if kind == "selected" else torch.ones_like(n_valid)
    total = n_valid
    if isinstance(num_items, Tensor):
        total = num_items.to(device=valid.device, dtype=torch.float64)
    elif num_items is not None:  # filled on the device: a copy from the host would wait for it
        total = torch.full((), num_items, dtype=torch.float64, device=valid.device)
    return torch.where(n_selected > 0, total * share, 1.0)


def _ratio(number: Tensor, total: Tensor) -> Tensor:
    """number / total; 0 for a total of 0, which a host counts in a step without a valid token."""
    return torch.where(total == 0, 0.0, number / total)
