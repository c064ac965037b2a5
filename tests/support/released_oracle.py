"""The released code of arXiv 2605.26844 once more, in NumPy and plain Python over lists: scores and which positions it selects.

  D = sum_{S u T} max(q^, 1e-12) (log max(q^, 1e-12) - log max(p^, 1e-12)),  p^, q^: each list over its own mass
  C = sum_{S n T} q;  H = -sum_S p^ log p^ / ln K
  Norm(z) = clip((z - Q.05) / (Q.95 - Q.05), 0, 1) over all rows of the responses, masked or not; 0 if the range is < 1e-12
  scores: "teachability" Norm(D) Norm(C), "teachability+entropy" h + a - h a, "tip" h + d - h d, "entropy" h, with h = Norm(H),
  d = Norm(D), a = Norm(D C); the max(1, ceil(rho N)) best; then for a response with none h + a - h a
  `exact_mass`: C = sum_S q
  equal scores: the smaller place in the response, across responses; then the earlier response

`case(seed)` draws what it is compared on: responses of unequal length with masked positions inside, repeated rows for ties.
Not here: the library (selection/test_selectors.py, selection/test_budget.py, loss/test_loss_over_ranks.py compare it).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.support.cases import generator, logit_pair


class Released(NamedTuple):
    scores: np.ndarray  # (B, L), 0 outside the responses
    keep_scores: np.ndarray
    selected: np.ndarray  # (B, L) bool


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def statistics(s: np.ndarray, u: np.ndarray, k: int, exact_mass: bool = False) -> tuple[float, float, float]:
    """D, C and H of one row of logits; nothing of a row that is no numbers."""
    if np.isnan(s).any() or np.isnan(u).any():
        return 0.0, 0.0, 0.0
    top_s, top_t = (sorted(range(len(x)), key=lambda v: (-x[v], v))[:k] for x in (s, u))
    p, q = (dict(zip(top, softmax(x[top]), strict=True)) for x, top in ((s, top_s), (u, top_t)))
    pairs = [(max(q.get(v, 0.0), 1e-12), max(p.get(v, 0.0), 1e-12)) for v in {*top_s, *top_t}]
    d = math.fsum(a * (math.log(a) - math.log(b)) for a, b in pairs)
    c = math.fsum(softmax(u)[v] for v in ({*top_s} if exact_mass else {*top_s} & {*top_t}))
    h = -math.fsum(x * math.log(x) for x in p.values() if x > 0)
    return d, c, h / math.log(max(k, 2))


def norm(z: np.ndarray) -> np.ndarray:
    z = np.where(np.isfinite(z), z, 0.0)
    low, high = np.quantile(z, 0.05), np.quantile(z, 0.95)
    return np.zeros_like(z) if high - low < 1e-12 else np.clip((z - low) / (high - low), 0, 1)


def released(
    student: Tensor,
    teacher: Tensor,
    responses: Tensor,
    mask: Tensor,
    *,
    fraction: float,
    top_k: int,
    threshold: float | None = None,
    kind: str = "teachability",
    exact_mass: bool = False,
) -> Released:
    """Of (B, L, V) logits; `responses` (B, L) bool, one run a row; `mask` (B, L) bool, within them."""
    rows = [(b, i) for b, i in responses.nonzero().tolist()]
    s, u = student.double().numpy(), teacher.double().numpy()
    d, c, h = np.array([statistics(s[row], u[row], top_k, exact_mass) for row in rows]).T if rows else np.zeros((3, 0))
    if not rows:
        none = np.zeros(responses.shape)
        return Released(none, none, none.astype(bool))
    a, d_norm, h_norm = norm(d * c), norm(d), norm(h)
    keep = h_norm + a - h_norm * a
    score = {
        "teachability": d_norm * norm(c),
        "teachability+entropy": keep,
        "tip": h_norm + d_norm - h_norm * d_norm,
        "entropy": h_norm,
    }[kind]
    first = {b: min(i for r, i in rows if r == b) for b, _ in rows}
    valid = [j for j, row in enumerate(rows) if mask[row]]

    def best(of: np.ndarray, among: list[int], n: int) -> list[int]:  # 1 + a - a is 1 but for its rounding
        return sorted(among, key=lambda j: (-round(of[j], 12), rows[j][1] - first[rows[j][0]], rows[j][0]))[:n]

    budget = max(1, math.ceil(Fraction(str(fraction)) * len(valid)))
    chosen = set(best(score, valid, budget)) if threshold is None else {j for j in valid if score[j] >= threshold}
    for b in first:
        own = [j for j in valid if rows[j][0] == b]
        if not chosen & set(own):
            chosen |= set(best(keep, own, 1))
    got = Released(np.zeros(responses.shape), np.zeros(responses.shape), np.zeros(responses.shape, bool))
    for j, row in enumerate(rows):
        got.scores[row], got.keep_scores[row], got.selected[row] = score[j], keep[j], j in chosen
    return got


def case(
    seed: int, *, size: tuple[int, int] = (5, 12), vocab: int = 37, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Student, teacher (B, L, V), responses and mask (B, L): prompts before, padding after, holes inside."""
    g, (n, length) = generator(seed), size
    total = n * length
    repeated = torch.randint(0, total, (total // 2,), generator=g)
    rows = torch.arange(total).index_put((repeated,), repeated[torch.arange(total // 2) % 6])  # exact ties, wherever they rank
    student, teacher = (
        x[rows].view(n, length, vocab) for x in logit_pair(total, vocab, scale=2.5, noise=1.5, seed=seed, dtype=dtype)
    )
    first = torch.randint(0, length // 2, (n, 1), generator=g)
    last = torch.randint(length // 2, length, (n, 1), generator=g)
    place = torch.arange(length)
    responses = (place >= first) & (place <= last)
    holes = torch.rand(n, length, generator=g) < (0.5 if seed % 2 else 0.2)
    mask = responses & (~holes | (place == first) | (place == last))
    if seed % 4 == 3:
        responses[seed % n] = mask[seed % n] = False  # a prompt without an answer
    return student, teacher, responses, mask
