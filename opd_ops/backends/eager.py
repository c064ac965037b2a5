"""The specification: every statistic and every loss in the shortest correct torch, over full (n, V) tensors.

  H(p) = -sum p log p;  KL(p||q) = sum p (log p - log q);  C = sum_{S} q;  D = KL(q|U || p|U)
  Sources: arXiv 2605.26844 eqs. 6, 9, 10, 17; arXiv 2604.14084 eq. 3. selection/stats.py defines every column.

A divergence's own `loss` is its equation (divergences/); here autograd alone differentiates it. So the tests compare the closed
forms of the other backends with an independent gradient. This backend runs in any dtype, fp64 included.
Where ranks share out the vocabulary, every rank gathers the whole logits and computes the same.
Not here: memory or speed (streamed/backend.py), selection (selection/selectors.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_ops.backends.interface import Backend, WeightedRows
from opd_ops.backends.shared.list_ids import best_of_sent, list_ids, sent_logprobs, without_masked
from opd_ops.backends.shared.matmul import without_autocast
from opd_ops.backends.shared.overwritten import unchanged
from opd_ops.divergences import JSD, Divergence, OnSupport, Support, equations, weighted_sum, without_infinite
from opd_ops.inputs.sources import Mixing, Shard, Source, compute_dtype, mask_limit, take_rows
from opd_ops.inputs.teacher_lists import TeacherLists, tail
from opd_ops.inputs.workspace import Workspace
from opd_ops.selection.stats import OwnStats, Scoring, TokenStats


def logits(source: Source, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, V) logits of the given positions, after scale, soft-cap and temperature; differentiable."""
    transform = source.transform
    x = take_rows(source.leading, rows).to(dtype)
    if source.weight is not None:
        if transform.shard is not None:
            x = _SharedHidden.apply(x, transform.shard)
        with without_autocast(rows.device):  # autocast would multiply in 16 bits
            # Rows beyond the common vocabulary may hold NaN, and a gradient of 0 times NaN is NaN: cut them first.
            x = x @ source.weight[: transform.vocab_size].to(dtype).T
    x = x[:, : transform.vocab_size]
    if source.bias is not None:
        x = x + source.bias[: transform.vocab_size].to(dtype)
    if source.stored_dtype is not None:
        x = torch.where(x <= mask_limit(source.stored_dtype), -math.inf, x)
    x = transform.scale * x
    if transform.softcap is not None:
        x = transform.softcap * torch.tanh(x / transform.softcap)
    x = x / transform.temperature
    if transform.mixing is not None:  # within this rank's part: the other models hold the same part
        others = [x._replace(transform=replace(x.transform, shard=None)) for x in source.others]
        models = torch.stack([x, *(logits(other, rows, dtype) for other in others)])
        x = mixture(models, [model.logsumexp for model in (source, *others)], rows, transform.mixing)
    if transform.merged:
        ids = torch.tensor(transform.merged, device=x.device)
        merged = equations.logsumexp(x[:, ids])
        x = x.index_fill(1, ids, -math.inf).index_copy(1, ids[:1], merged)
    return x if transform.shard is None else _Unsharded.apply(x, transform.shard)


def mixture(models: Tensor, logsumexps: list[Tensor | None], rows: Tensor, mixing: Mixing) -> Tensor:
    """(n, V) logits of the mixture of (models, n, V) logits (inputs/ensembles.py)."""
    weights = models.new_tensor(mixing.weights).view(-1, 1, 1)
    if mixing.kind == "arithmetic":
        log_z = torch.stack([x[rows] for x in logsumexps if x is not None]).unsqueeze(2)
        return torch.logsumexp(weights.log() + models - log_z, 0)
    masked = (models == -math.inf) & (weights > 0)
    masked[0] = models[0] == -math.inf
    return torch.where(masked.any(0), -math.inf, (weights * models).sum(0))


class _SharedHidden(torch.autograd.Function):
    """Hidden states, which every rank has whole; their gradient is the sum over all parts of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.ranks.sum(gradient.clone(memory_format=torch.contiguous_format)), None


class _Unsharded(torch.autograd.Function):
    """(n, V) logits from all ranks' parts. Every rank computes the same loss, so its own part's gradient is complete."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        padded = torch.nn.functional.pad(part, (0, max(shard.widths) - shard.width))
        parts = zip(shard.ranks.gather(padded), shard.widths, strict=True)
        return torch.cat([x[:, :width] for x, width in parts], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[:, ctx.shard.first : ctx.shard.first + ctx.shard.width], None


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p, with 0 log 0 = 0."""
    return equations.entropy(torch.log_softmax(logits, -1))


def kl(a_logits: Tensor, b_logits: Tensor) -> Tensor:
    """KL(softmax(a) || softmax(b))."""
    return equations.kl(torch.log_softmax(a_logits, -1), torch.log_softmax(b_logits, -1))


def reverse_kl(s: Tensor, u: Tensor) -> Tensor:
    """KL(p || q): p the student's softmax, q the teacher's."""
    return kl(s, u)


def forward_kl(s: Tensor, u: Tensor) -> Tensor:
    """KL(q || p)."""
    return kl(u, s)


def jsd(s: Tensor, u: Tensor) -> Tensor:
    """1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2."""
    return JSD(0.5).loss(torch.log_softmax(s, -1), torch.log_softmax(u, -1))


def ratio_variance(s: Tensor, u: Tensor) -> Tensor:
    """Var_p[log p - log q]."""
    return equations.ratio_variance(torch.log_softmax(s, -1), torch.log_softmax(u, -1))


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """(n, k) ids in the order (logit descending, id ascending)."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]


def membership(ids: Tensor, vocab_size: int) -> Tensor:
    """(n, V) bool: whether v is among the row's ids."""
    return torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device).scatter(1, ids, True)


def mass(probabilities: Tensor, members: Tensor) -> Tensor:
    """The probability of a set, not renormalised."""
    return torch.where(members, probabilities, 0).sum(-1)


def kl_on(members: Tensor, a_logits: Tensor, b_logits: Tensor) -> Tensor:
    """KL between two softmaxes renormalised on a set of ids."""
    return kl(a_logits.masked_fill(~members, -math.inf), b_logits.masked_fill(~members, -math.inf))


def released_kl(s: Tensor, u: Tensor, in_s: Tensor, in_t: Tensor) -> Tensor:
    """D from the two top-K lists alone: each renormalised on its own list, a missing id floored."""
    floor = math.log(equations.RELEASED_FLOOR)
    log_p = torch.log_softmax(s.masked_fill(~in_s, -math.inf), -1).clamp_min(floor)
    log_q = torch.log_softmax(u.masked_fill(~in_t, -math.inf), -1).clamp_min(floor)
    return torch.where(in_s | in_t, log_q.exp() * (log_q - log_p), 0).sum(-1)


def teacher_rank(s_ids: Tensor, t_ids: Tensor, u: Tensor) -> Tensor:
    """The place of the student's first id on the teacher's list, whose masked ids do not count; K + 1: not on it."""
    is_first = (s_ids[:, :1] == t_ids) & (u.gather(1, t_ids) > -math.inf)
    return torch.where(is_first.any(1), is_first.long().argmax(1), t_ids.shape[1]) + 1


@torch.no_grad()
def token_stats(student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> TokenStats:
    """All statistics of the given positions, (n,) each, from logits of the compute dtype."""
    top_k, columns = scoring.top_k, scoring.columns
    dtype = compute_dtype(student, teacher)
    s, u = logits(student, rows, dtype), logits(teacher, rows, dtype)
    q = torch.softmax(u, dim=-1)
    s_ids = top_k_ids(s, top_k)
    in_s = membership(s_ids, s.shape[1])
    t_ids = top_k_ids(u, top_k)
    in_t = membership(t_ids, u.shape[1])
    s_lse, t_lse = torch.logsumexp(s, -1), torch.logsumexp(u, -1)
    return TokenStats(
        valid=torch.isfinite(t_lse),
        student_entropy=entropy(s),
        teacher_entropy=entropy(u),
        reverse_kl=reverse_kl(s, u),
        forward_kl=forward_kl(s, u),
        student_logsumexp=s_lse,
        teacher_logsumexp=t_lse,
        logsumexp_gap=s_lse - t_lse,
        support_mass=mass(q, in_s),
        student_support_mass=mass(torch.softmax(s, -1), in_s),
        overlap_mass=mass(q, in_s & in_t),
        union_kl=kl_on(in_s | in_t, u, s),
        jsd=jsd(s, u) if "jsd" in columns else None,
        released_kl=released_kl(s, u, in_s, in_t) if "released_kl" in columns else None,
        topk_entropy=equations.topk_entropy(torch.log_softmax(s.gather(1, s_ids), -1)) if "topk_entropy" in columns else None,
        ratio_variance=ratio_variance(s, u) if "ratio_variance" in columns else None,
        top1_agreement=(s_ids[:, 0] == t_ids[:, 0]).to(dtype) if "top1_agreement" in columns else None,
        teacher_rank=teacher_rank(s_ids, t_ids, u).to(dtype) if "teacher_rank" in columns else None,
    )


@torch.no_grad()
def own_stats(source: Source, rows: Tensor, scoring: Scoring) -> OwnStats:
    """One model's statistics at the rows, from its logits alone."""
    x = logits(source, rows, compute_dtype(source))
    ids = top_k_ids(x, scoring.top_k)
    return OwnStats(torch.logsumexp(x, -1), entropy(x), ids, x.gather(1, ids))


def selected_loss(
    student: Source,
    teacher: Source | TeacherLists,
    selected: WeightedRows,
    divergence: Divergence,
    workspace: Workspace,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses over the positions, connected to the student by autograd itself, and the (M,) losses."""
    assert not inplace
    rows = selected.rows
    dtype = compute_dtype(student, *([teacher] if isinstance(teacher, Source) else []))
    s = equations.relative_to_top(logits(student, rows, dtype))
    u = logits(teacher.detach(), rows, dtype) if isinstance(teacher, Source) else None
    losses = torch.zeros(len(rows), dtype=dtype, device=rows.device)
    if divergence.whole is not None:
        assert u is not None
        losses = losses + divergence.whole.loss(torch.log_softmax(s, -1), torch.log_softmax(u, -1))
    if divergence.on_support is not None:
        listed = None if isinstance(teacher, Source) else teacher.take(rows)
        losses = losses + divergence.on_support.loss(support(divergence.on_support, s, u, listed, selected.tokens))
    losses = unchanged(losses, rows, student, workspace=workspace)  # autograd saved the student, not the teacher
    return weighted_sum(losses, without_infinite(losses, selected.weights)), losses.detach()


def support(divergence: OnSupport, s: Tensor, u: Tensor | None, listed: TeacherLists | None, tokens: Tensor | None) -> Support:
    """Both models on the divergence's list and off it, from the teacher's (n, V) logits or from the lists that it sent."""
    k, x = divergence.top_k, s.detach()
    if listed is not None:
        s_ids = best_of_sent(listed.listed_ids, _at(x, listed.listed_ids), k) if listed.chosen_by_student else _list(x, k)
        ids = list_ids(divergence, s_ids, listed.top(k).ids, listed.tokens)
        log_q = sent_logprobs(listed, ids)
        log_tail, entropy_q = tail(log_q.double()).to(s.dtype), torch.full_like(log_q[:, 0], math.nan)
    else:
        assert u is not None
        all_log_q = torch.log_softmax(u, -1)
        ids = list_ids(divergence, _list(x, k), _list(u, k), tokens)
        log_q, log_tail, entropy_q = _at(all_log_q, ids), _off(all_log_q, ids), equations.entropy(all_log_q)
    reverse = reverse_kl(s, u).detach() if divergence.reads_reverse_kl and u is not None else None
    return Support(_at(s, ids), _off(s, ids), log_q, log_tail, entropy_q, reverse)


def _list(x: Tensor, k: int) -> Tensor:
    """(n, k) ids of the model's list."""
    ids = top_k_ids(x, k)
    return without_masked(ids, x.gather(1, ids))


def _at(x: Tensor, ids: Tensor) -> Tensor:
    """(n, K) entries of (n, V) at the ids; -inf for a missing id."""
    missing = (ids < 0) | (ids >= x.shape[1])
    return x.gather(1, ids.masked_fill(missing, 0)).masked_fill(missing, -math.inf)


def _off(x: Tensor, ids: Tensor) -> Tensor:
    """(n,) log-sum-exp of (n, V) over all columns but the ids."""
    listed = torch.zeros(len(x), x.shape[1] + 1, dtype=torch.bool, device=x.device)
    listed = listed.scatter(1, ids.masked_fill((ids < 0) | (ids > x.shape[1]), x.shape[1]), True)[:, :-1]
    return equations.logsumexp(x.masked_fill(listed, -math.inf)).squeeze(1)


class Eager(Backend):
    """Full (n, V) tensors, and autograd."""

    name = "eager"
    takes_transforms = True
    token_stats = staticmethod(token_stats)
    own_stats = staticmethod(own_stats)
    selected_loss = staticmethod(selected_loss)


EAGER = Eager()
