"""Correctness of every kernel on the device, compiled, against the float64 specification on the same device.

  Cases: stored types, also one a model; row strides that allow 128-bit loads and such that do not, gathered rows, split
  rows, offsets beyond 2^31, transforms, a common vocabulary below the last dimension, -inf in whole leading blocks, ties, K
  to 128, NaN of either model. Rows that are not asked for hold NaN. Bounds: tests/support/tolerances.py.
  Counted: a comparison is a kernel and a case; one that raises has failed and says why, one that the device has no memory
  or the part no time for is not run and says so.

Not here: the same kernels interpreted (tests/kernels), the library from logits (check_logits.py), timing
(timing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from opd_kernels.argmax import argmax_fwd
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.score import score_fwd
from opd_kernels.support import SUPPORT_COLUMNS, support_fwd
from torch import Tensor

from benchmarks.gpu.timing import LATE, Bench, first_line
from opd_ops.backends import eager
from tests.support import kernel_oracle as oracle
from tests.support.cases import logit_pair
from tests.support.tolerances import assert_within, relative_error

# One rounding to the stored type, of a gradient that is otherwise as exact as fp32 allows.
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class CannotRunError(Exception):
    """The device lacks what a check is about: said in its row, which does not count as run."""


def attempt(bench: Bench, kernel: str, case: str, check: Callable[[], None]) -> dict[str, Any]:
    """A check's row; `failure` is None or what was wrong, `note` why it was not run."""
    row: dict[str, Any] = {"kernel": kernel, "case": case, "failure": None}
    if bench.late():
        return row | {"note": LATE}
    try:
        check()
    except CannotRunError as error:
        row["note"] = f"not run: {error}"
    except Exception as error:  # one that fails must not hide the others
        row["failure"] = first_line(error)
        bench.free()
    return row


class Case(NamedTuple):
    name: str
    n: int
    width: int  # of the stored rows
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    t_dtype: torch.dtype | None = None  # None: the student's
    top_k: int = 16
    scale: float = 4.0
    noise: float = 1.0
    rows: tuple[int, ...] | None = None
    change: Callable[[Tensor, Tensor], None] | None = None
    transform: dict[str, Any] = {}  # noqa: RUF012


def _mask(s: Tensor, t: Tensor) -> None:
    half = s.shape[1] // 2
    s[:, :half] = t[:, :half] = -torch.inf


def _ties(s: Tensor, t: Tensor) -> None:
    s.round_()
    t.round_()


def cases(small: bool) -> list[Case]:
    vocab, odd, many = (160, 131, 2) if small else (151_936, 50_257, 320)
    cases = [Case(str(dtype)[6:], 8 if not small else 1, vocab, vocab, dtype) for dtype in GRADIENT]
    cases += [
        Case("odd row stride", min(many, 8), odd, odd),
        Case("one program per row", many, vocab, vocab),
        Case("rows gathered", 6, vocab, vocab, rows=(5, 0)),
        Case("vocabulary below the width", 3, vocab + 64, vocab),
        Case("leading half -inf", 2, vocab, vocab, change=_mask),
        Case("ties, K = 100", 2, vocab, vocab, top_k=100, change=_ties),
        Case("K = 1", 2, vocab, vocab, top_k=1),
        Case("K = 128", 2, vocab, vocab, top_k=128),
        Case("bf16 beside fp32", 2, vocab, vocab, t_dtype=torch.float32),
        Case("fp32 beside fp16", 2, vocab, vocab, torch.float32, torch.float16),
        Case("close models", 2, vocab, vocab, torch.float32, noise=1e-3),
        Case("logits of scale 60", 2, vocab, vocab, torch.float32, scale=60.0, noise=0.01),
        Case("temperature and scales", 2, vocab, vocab, transform={"temperature": 0.7, "s_scale": 0.5, "t_scale": 1.5}),
        Case("soft-caps", 2, vocab, vocab, transform={"s_softcap": 30.0, "t_softcap": 50.0}),
    ]
    return cases


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row per kernel and case."""
    for number, case in enumerate(cases(bench.dry)):
        yield from _run(bench, number, case)
    yield from nan_rows(bench)


def beyond_2_to_31(bench: Bench) -> Iterator[dict[str, Any]]:
    """By itself, for the end: an offset that wraps around is an access that a device does not recover from."""
    n, vocab = (6, 160) if bench.dry else (16_384, 151_936)
    yield from _run(bench, 100, Case("offsets beyond 2^31", n, vocab, vocab, rows=(0, n - 1)))


def _run(bench: Bench, number: int, case: Case) -> Iterator[dict[str, Any]]:
    kernels = ("score", check_score), ("support", check_support), *GRADIENT_CHECKS
    sides: list[Tensor] = []

    def inputs() -> None:
        # both models, and the gradient in a tensor of its own and over a copy of the student
        n_bytes = case.n * case.width * (3 * case.dtype.itemsize + (case.t_dtype or case.dtype).itemsize)
        if not bench.fits(1.1 * n_bytes):
            raise CannotRunError(f"it takes {n_bytes / 1e9:.0f} GB of memory")
        sides.extend(_inputs(bench, number, case))

    row = attempt(bench, "inputs", case.name, inputs)
    for kernel, check in kernels:
        if row["failure"] or row.get("note"):
            yield row | {"kernel": kernel}
        else:
            yield attempt(bench, kernel, case.name, lambda check=check: check(case, *sides))


def _inputs(bench: Bench, number: int, case: Case) -> list[Tensor]:
    """Rows that nobody asks for are NaN."""
    drawn = case.n if case.rows is None else len(case.rows)
    pair = logit_pair(drawn, case.width, scale=case.scale, noise=case.noise, seed=number, device=bench.device)
    dtypes = case.dtype, case.t_dtype or case.dtype
    s, t = (x.to(dtype) for x, dtype in zip(pair, dtypes, strict=True))
    if case.change is not None:
        case.change(s, t)
    if case.rows is None:
        return [s, t]
    whole = [torch.full((case.n, case.width), torch.nan, dtype=x.dtype, device=bench.device) for x in (s, t)]
    for out, x in zip(whole, (s, t), strict=True):
        out[list(case.rows)] = x
    return whole


def _launch(case: Case, s: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
    rows = None if case.rows is None else torch.tensor(case.rows, dtype=torch.int32, device=s.device)
    return rows, {**oracle.COMMON, **case.transform, "vocab_size": case.vocab}


def _double(case: Case, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    pick = slice(None) if case.rows is None else list(case.rows)
    _, common = _launch(case, s)
    return (
        oracle.logit(s[pick, : case.vocab], common["s_scale"], common["s_softcap"], common["temperature"]),
        oracle.logit(t[pick, : case.vocab], common["t_scale"], common["t_softcap"], common["temperature"]),
    )


def check_score(case: Case, s: Tensor, t: Tensor) -> None:
    rows, common = _launch(case, s)
    caps = [common[name] for name in ("s_softcap", "t_softcap") if common[name] is not None]
    gap = max(caps, default=0.0) * 2**-22  # a soft-cap's own error (device.py), which both log-sum-exps have
    oracle.assert_statistics(score_fwd(s, t, rows, **common), *_double(case, s, t), gap=gap)


def check_support(case: Case, s: Tensor, t: Tensor) -> None:
    rows, common = _launch(case, s)
    support = support_fwd(s, t, rows, score_fwd(s, t, rows, **common), top_k=case.top_k, **common)
    pick = slice(None) if case.rows is None else list(case.rows)
    ids = [eager.top_k_ids(x[pick, : case.vocab].float(), case.top_k) for x in (s, t)]
    assert torch.equal(support.s_ids.long(), ids[0]), "the student's ids differ"
    assert torch.equal(support.t_ids.long(), ids[1]), "the teacher's ids differ"
    expected = oracle.support(*_double(case, s, t), *ids)
    for name in SUPPORT_COLUMNS:
        assert_within(getattr(support, name), expected[name], absolute=1e-6, relative=1e-5, name=name)


def _check_gradient(kind: str, kernel: Callable[..., None]) -> Callable[[Case, Tensor, Tensor], None]:
    def check(case: Case, s: Tensor, t: Tensor) -> None:
        rows, common = _launch(case, s)
        pick = list(range(case.n)) if case.rows is None else list(case.rows)
        weights = torch.linspace(0.5, 2.0, len(pick), device=s.device)
        score = score_fwd(s, t, rows, **common)
        top, out = argmax_fwd(s, rows, score, vocab_size=case.vocab), torch.full_like(s, torch.nan)
        kernel(s, t, rows, weights, score.columns, top=top, out=out, **common)
        expected, kl = oracle.gradient(kind, s[pick, : case.vocab], t[pick, : case.vocab], weights, **case.transform)
        error = relative_error(out[pick, : case.vocab], expected)
        smallest = max(kl.min().item(), 1e-12)
        bound = max(GRADIENT[case.dtype], 3e-6 / (2 * smallest) ** 0.5 if smallest < 1e-3 else 0.0)
        assert error <= bound, f"relative error of the gradient {error:.2e} > {bound:.2e}"
        assert not out[pick, case.vocab :].any(), "columns beyond the vocabulary are not zero"
        together = s.clone()
        kernel(together, t, rows, weights, score.columns, top=top, out=together, **common)
        assert torch.equal(together[pick], out[pick]), "in place differs from out of place"

    return check


GRADIENT_CHECKS = (
    ("reverse_kl", _check_gradient("reverse_kl", reverse_kl_grad)),
    ("forward_kl", _check_gradient("forward_kl", forward_kl_grad)),
)


def nan_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Row 0 has a NaN of the student, row 1 one of the teacher: neither may hide, or reach row 2."""
    vocab = 160 if bench.dry else 151_936
    case = Case("NaN", 3, vocab, vocab)
    s, t = logit_pair(3, vocab, seed=200, dtype=torch.bfloat16, device=bench.device)
    s[0, vocab - 7] = t[1, 5] = torch.nan
    weights = torch.ones(3, device=bench.device)

    def support() -> None:
        score = score_fwd(s, t, None, vocab_size=vocab, **oracle.COMMON)
        actual = support_fwd(s, t, None, score, top_k=16, vocab_size=vocab, **oracle.COMMON)
        _assert_nan(actual.union_kl, "union_kl")
        inside = (actual.ids >= 0) & (actual.ids < vocab)
        assert bool(inside.all()), "ids of a row with NaN are outside of the vocabulary"

    def gradient(kind: str, kernel: Callable[..., None]) -> None:
        score = score_fwd(s, t, None, vocab_size=vocab, **oracle.COMMON)
        _assert_nan(getattr(score, kind), kind)
        top, out = argmax_fwd(s, None, score, vocab_size=vocab), torch.zeros_like(s)
        kernel(s, t, None, weights, score.columns, top=top, out=out, vocab_size=vocab, **oracle.COMMON)
        assert bool(out[0].isnan().all()), "the student's NaN does not reach its row's gradient"
        expected, _ = oracle.gradient(kind, s[2:], t[2:], weights[2:])
        error = relative_error(out[2:], expected)
        assert error <= GRADIENT[s.dtype], f"relative error of the gradient beside NaN {error:.2e}"

    yield attempt(bench, "score", case.name, lambda: check_score(case, s, t))
    yield attempt(bench, "support", case.name, support)
    for kind, kernel in (("reverse_kl", reverse_kl_grad), ("forward_kl", forward_kl_grad)):
        yield attempt(bench, kind, case.name, lambda kind=kind, kernel=kernel: gradient(kind, kernel))


def _assert_nan(column: Tensor, name: str) -> None:
    assert column.isnan().tolist() == [True, True, False], f"{name}: NaN in rows {column.isnan().tolist()}"
