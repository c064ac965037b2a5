# The Triton backend, `backend="triton"`: dense logits of both models, statistics and gradients from opd_kernels.
#
#   score + support kernels  -> the columns of TokenStats; both models' logits are read once
#   gradient kernel          -> d loss / d logits on the selected rows, every other row zero
#   (statistics and gradients are those of stats.py and divergences.py)
#
# Nothing of size V is saved. The backward scores the M selected rows again (M / N of the score pass) for the normalisers that
# the gradient needs to more digits than TokenStats keeps; so it depends on nothing but its inputs, and a forward without a
# backward pays nothing for it. The reported loss is the score pass's own column.
# With `inplace` the gradient is written over the student's logits: no second tensor of their size.
# Logits are read where they lie, in any leading layout (table.py). Launches are cut so that scratch fits `workspace_bytes`.
# The optional columns run in torch: released_kl on the kernels' top-K lists (supports.py), jsd on tiles of whole rows
# (running.py), since only a sampling selector asks for it.
#
# Not here: the kernels (opd_kernels), the same launches as operators for torch.compile (triton_ops.py), heads (streamed.py).
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import GROUP, Score, score_fwd
from opd_kernels.support import support_fwd
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_ops.backends.running import row_jsd
from opd_ops.backends.supports import support_columns
from opd_ops.backends.table import Layout
from opd_ops.backends.tiling import PAIR_BYTES, UNION_BYTES
from opd_ops.backends.top_k import TopK
from opd_ops.divergences import Divergence, ForwardKL, ReverseKL
from opd_ops.sources import Source, finish_logits, take_rows
from opd_ops.stats import TokenStats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOP_K = 128
GRADIENTS: dict[str, Callable[..., Tensor]] = {"reverse_kl": reverse_kl_grad, "forward_kl": forward_kl_grad}
JSD_BUFFERS = 10  # fp32 rows of V alive at once in row_jsd
LIST_BYTES = 40  # per row and K: both lists' ids, logits and places
ROW_BYTES = 3072  # per row: columns, and the sums of a row split into 64 parts


def refusal(student: Source, teacher: Source, *, divergence: Divergence, top_k: int) -> str | None:
    """Why this backend cannot run the call and what to do instead, or None."""
    for name, source in (("student", student), ("teacher", teacher)):
        if source.transform.is_head:
            return f"{name} is a LinearHead, which runs on backend='torch'; pass logits, or use that"
        if source.leading.dtype not in DTYPES:
            return f"{name} has dtype {source.leading.dtype}, expected fp32, bf16 or fp16; 'torch' and 'eager' take it"
        if Layout.of(source.leading) is None:
            return (
                f"{name} has strides {source.leading.stride()}, expected stride 1 along the vocabulary and no memory shared "
                "between positions; pass .contiguous() logits, or use 'torch'"
            )
    layouts = [Layout.of(source.leading) for source in (student, teacher)]
    if layouts[0] and layouts[1] and layouts[0].steps != layouts[1].steps:
        return (
            f"student and teacher lay their positions out differently (strides {student.leading.stride()} and "
            f"{teacher.leading.stride()}); pass .contiguous() logits on both sides, or use 'torch'"
        )
    if type(divergence) not in (ReverseKL, ForwardKL):
        return f"divergence is {type(divergence).__name__}, which has no kernel; use 'torch'"
    if top_k > MAX_TOP_K:
        return f"top_k is {top_k}, expected at most {MAX_TOP_K}; use 'torch'"
    return None


def _launcher_options(vocab_size: int, temperature: float) -> dict[str, Any]:
    plain = {"s_scale": 1.0, "t_scale": 1.0, "s_softcap": None, "t_softcap": None}  # scale and soft-cap belong to heads
    return {"vocab_size": vocab_size, "temperature": temperature, **plain}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the current device, which need not be that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _parts(n: int, bytes_per_row: int, workspace_bytes: int) -> Iterator[slice]:
    size = max(1, workspace_bytes // bytes_per_row)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _score_bytes(vocab_size: int, top_k: int = 0) -> int:
    """Scratch per row of a score launch: group maxima of both models in fp32 at most, lists, columns."""
    return -(-vocab_size // int(GROUP)) * 8 + LIST_BYTES * top_k + ROW_BYTES


def token_stats(
    student: Source, teacher: Source, rows: Tensor, *, top_k: int, columns: frozenset[str], workspace_bytes: int
) -> TokenStats:
    """All statistics of the given positions, (n,) each."""
    released = "released_kl" in columns
    launch = launch_columns
    if torch.compiler.is_compiling():
        from opd_ops.backends.triton_ops import token_columns as launch
    with torch.no_grad():  # no decorator: torch.compile cannot trace a decorated function of a module it is handed
        table = launch(
            student.leading.detach(),
            teacher.leading.detach(),
            rows,
            top_k,
            released,
            workspace_bytes,
            student.transform.vocab_size,
            student.transform.temperature,
        )
        out = dict(zip(column_names(released), table.unbind(0), strict=True))
        if "jsd" in columns:
            out["jsd"] = _jsd(student, teacher, rows, workspace_bytes)
        return TokenStats(valid=torch.isfinite(out["teacher_logsumexp"]), **out)


_SUPPORT_COLUMNS = ("support_mass", "student_support_mass", "overlap_mass", "union_kl")
_SCORE_COLUMNS = (
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "student_logsumexp",
    "teacher_logsumexp",
    "logsumexp_gap",
)


def column_names(released: bool) -> tuple[str, ...]:
    return (*_SCORE_COLUMNS, *_SUPPORT_COLUMNS, *(("released_kl",) if released else ()))


def launch_columns(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    top_k: int,
    released: bool,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
) -> Tensor:
    """(columns, n) statistics of the given positions, in the order of `column_names`."""
    layout, tables = _tables(student, teacher)
    places, options = layout.rows(rows), _launcher_options(vocab_size, temperature)
    names = column_names(released)
    out = torch.empty((len(names), len(rows)), device=rows.device)
    with _on(rows.device):
        for part in _parts(len(rows), _score_bytes(vocab_size, top_k), workspace_bytes):
            score = score_fwd(*tables, places[part], **options)
            lists = support_fwd(*tables, places[part], score, top_k=top_k, **options)
            for i, name in enumerate(names):
                if name == "released_kl":
                    out[i, part] = _released_kl(lists, score, workspace_bytes)
                else:
                    out[i, part] = getattr(score if name in _SCORE_COLUMNS else lists, name)
    return out


def _tables(student: Tensor, teacher: Tensor) -> tuple[Layout, tuple[Tensor, Tensor]]:
    layout, other = Layout.of(student), Layout.of(teacher)
    assert layout is not None
    assert other is not None
    return layout, (layout.table(student.detach()), other.table(teacher.detach()))


def _released_kl(lists: Any, score: Score, workspace_bytes: int) -> Tensor:
    """From the kernels' lists; pairs of their ids are compared, hence parts."""
    n, _, k = lists.ids.shape
    s_at_s, t_at_s, s_at_t, t_at_t = lists.logits.unbind(1)
    found = TopK(lists.s_ids, s_at_s, t_at_s), TopK(lists.t_ids, t_at_t, s_at_t)
    lse = score.student_logsumexp.double(), score.teacher_logsumexp.double()
    out = torch.empty(n, device=lists.ids.device)
    for part in _parts(n, UNION_BYTES * k + PAIR_BYTES * k**2, workspace_bytes // 2):
        both = found[0].rows(part), found[1].rows(part)
        out[part] = support_columns(*both, lse[0][part], lse[1][part], frozenset({"released_kl"}))["released_kl"]
    return out


def _jsd(student: Source, teacher: Source, rows: Tensor, workspace_bytes: int) -> Tensor:
    vocab = student.transform.vocab_size
    out = torch.empty(len(rows), device=rows.device)
    for part in _parts(len(rows), JSD_BUFFERS * 4 * vocab, workspace_bytes):
        s, u = (
            finish_logits(take_rows(source.leading[..., :vocab], rows[part]).float(), source.transform)
            for source in (student.detach(), teacher)
        )
        out[part] = row_jsd(s, u).float()
    return out


def launch_gradient(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    weights: Tensor,
    kind: str,
    workspace_bytes: int,
    vocab_size: int,
    temperature: float,
    *,
    inplace: bool = False,
) -> Tensor:
    """The gradient of the losses weighted, of the student's shape: a new tensor, or the student itself."""
    layout, tables = _tables(student, teacher)
    out, gradient = (tables[0], student.detach()) if inplace else layout.zeros(student)
    places, options, weights = layout.rows(rows), _launcher_options(vocab_size, temperature), weights.contiguous()
    with _on(out.device):
        for part in _parts(len(places), _score_bytes(vocab_size), workspace_bytes):
            columns = score_fwd(*tables, places[part], **options).columns
            GRADIENTS[kind](*tables, places[part], weights[part], columns, out=out, **options)
    if inplace:
        selected = torch.zeros(layout.shape.numel(), dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
        # Also tells autograd of the write: whoever else saved these logits for a backward to come gets an error.
        gradient.masked_fill_(~selected.view(layout.shape).unsqueeze(-1), 0.0)
    return gradient


class _SelectedDivergence(torch.autograd.Function):
    """(M,) losses whose gradient with respect to the student's logits is computed in the backward, from the inputs."""

    @staticmethod
    def forward(
        ctx: Any, inplace: bool, options: tuple[Any, ...], rows: Tensor, losses: Tensor, student: Tensor, teacher: Tensor
    ) -> Tensor:
        ctx.inplace, ctx.options, ctx.spent = inplace, options, False
        ctx.save_for_backward(student, teacher, rows)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "inplace_backward: the backward ran a second time, but the first one overwrote the student's logits with "
                "their gradient; pass inplace_backward=False to use retain_graph=True"
            )
        student, teacher, rows = ctx.saved_tensors
        kind, workspace_bytes, vocab_size, temperature = ctx.options
        gradient = launch_gradient(
            student, teacher, rows, dlosses, kind, workspace_bytes, vocab_size, temperature, inplace=ctx.inplace
        )
        ctx.spent = ctx.inplace
        return None, None, None, None, gradient, None


def selected_divergence(
    student: Source,
    teacher: Source,
    rows: Tensor,
    stats: TokenStats,
    *,
    divergence: Divergence,
    workspace_bytes: int,
    inplace: bool,
) -> Tensor:
    """(M,) the divergence at the selected positions, connected to the student's logits.

    `stats` are the selected positions' own, as `token_stats` computed them from the same tensors.
    """
    options = divergence.name, workspace_bytes, student.transform.vocab_size, student.transform.temperature
    logits, losses = (student.leading, teacher.leading.detach()), getattr(stats, divergence.column)
    if torch.compiler.is_compiling():
        from opd_ops.backends.triton_ops import selected_losses

        compiled: Tensor = selected_losses(*logits, rows, losses, *options)
        return compiled
    eager: Tensor = _SelectedDivergence.apply(inplace, options, rows, losses, *logits)
    return eager
