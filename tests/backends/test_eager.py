"""The specification against the equations written once more, in plain Python over lists; and its gradients against theirs.

  Compared: every column of TokenStats on rows small enough to loop over; d loss / d logits with p[(log p - log q) - l] and
  p - q. Run: make test ARGS=tests/backends/test_eager.py

Not here: the fast backend against this one (tests/backends/streamed/test_score.py, tests/loss/test_gradients.py).
"""

import math

import pytest
import torch

from opd_ops import LinearHead, score_positions, selective_opd_loss
from opd_ops.selection.selectors import Multinomial, Released
from opd_ops.selection.stats import BACKEND_COLUMNS, OPTIONAL_COLUMNS
from tests.support.cases import head_pair, leaf, logit_pair, to_double
from tests.support.tolerances import assert_gradient


def softmax(x: list[float]) -> list[float]:
    top = max(x)
    e = [math.exp(v - top) for v in x]
    return [v / math.fsum(e) for v in e]


def kl(a: list[float], b: list[float]) -> float:
    return math.fsum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0)


def by_hand(s: list[float], u: list[float], k: int) -> dict[str, float]:
    p, q = softmax(s), softmax(u)
    top_s = sorted(range(len(s)), key=lambda v: (-s[v], v))[:k]
    top_t = sorted(range(len(u)), key=lambda v: (-u[v], v))[:k]
    union = sorted({*top_s, *top_t})
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    p_list = dict(zip(top_s, softmax([s[v] for v in top_s]), strict=True))
    q_list = dict(zip(top_t, softmax([u[v] for v in top_t]), strict=True))
    ratio = [math.log(a) - math.log(b) for a, b in zip(p, q, strict=True)]
    released = [(max(q_list.get(v, 0), 1e-12), max(p_list.get(v, 0), 1e-12)) for v in union]
    return {
        "student_entropy": -math.fsum(x * math.log(x) for x in p),
        "teacher_entropy": -math.fsum(x * math.log(x) for x in q),
        "reverse_kl": kl(p, q),
        "forward_kl": kl(q, p),
        "student_logsumexp": math.log(math.fsum(math.exp(v) for v in s)),
        "teacher_logsumexp": math.log(math.fsum(math.exp(v) for v in u)),
        "support_mass": math.fsum(q[v] for v in top_s),
        "student_support_mass": math.fsum(p[v] for v in top_s),
        "overlap_mass": math.fsum(q[v] for v in {*top_s} & {*top_t}),
        "union_kl": kl(softmax([u[v] for v in union]), softmax([s[v] for v in union])),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
        "released_kl": math.fsum(a * (math.log(a) - math.log(b)) for a, b in released),
        "topk_entropy": -math.fsum(x * math.log(x) for x in p_list.values()) / math.log(max(k, 2)),
        "ratio_variance": math.fsum(a * (r - kl(p, q)) ** 2 for a, r in zip(p, ratio, strict=True)),
        "top1_agreement": float(top_s[0] == top_t[0]),
        "teacher_rank": top_t.index(top_s[0]) + 1 if top_s[0] in top_t else k + 1,
    }


class _Everything:
    needs = BACKEND_COLUMNS

    def __call__(self, stats):
        return stats.jsd


@pytest.mark.parametrize("top_k", [1, 4, 29])
def test_token_stats_match_the_equations_by_hand(top_k):
    student, teacher = logit_pair(6, 29, scale=2.0, dtype=torch.float64)
    student[0, :8] = student[0, 8]  # ties go to the lower id
    _, stats = score_positions(student, teacher, selector=_Everything(), top_k=top_k, backend="eager")
    for row in range(6):
        for name, want in by_hand(student[row].tolist(), teacher[row].tolist(), top_k).items():
            assert getattr(stats, name)[row].item() == pytest.approx(want, rel=1e-12, abs=1e-13), name


@pytest.mark.parametrize("selector", [Multinomial(), Released()])
def test_optional_columns_are_computed_only_when_asked_for(selector):
    student, teacher = logit_pair(6, 29)
    _, stats = score_positions(student, teacher, backend="eager")
    assert all(getattr(stats, name) is None for name in OPTIONAL_COLUMNS)
    _, stats = score_positions(student, teacher, selector=selector, backend="eager")
    assert {name for name in OPTIONAL_COLUMNS if getattr(stats, name) is not None} == selector.needs


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("masked", [-math.inf, -1e4])
def test_topk_entropy_is_over_the_log_of_how_many_ids_are_listed(masked, backend):
    student, teacher = logit_pair(5, 29, scale=2.0)
    student[:, 3:] = masked
    _, stats = score_positions(student, teacher, selector=_Everything(), top_k=7, backend=backend)
    p = torch.softmax(student[:, :3].double(), -1)
    want = -(p * p.log()).sum(-1) / math.log(3)
    torch.testing.assert_close(stats.topk_entropy.double(), want, rtol=1e-5, atol=1e-6)


def test_head_logits_apply_bias_scale_softcap_and_temperature():
    student, teacher = (to_double(head) for head in head_pair((5,), 31, bias=True, scale=0.7, softcap=9.0))

    def logits(head: LinearHead) -> torch.Tensor:
        return 9.0 * torch.tanh(0.7 * (head.hidden @ head.weight.T + head.bias) / 9.0) / 1.3

    _, got = score_positions(student, teacher, temperature=1.3, backend="eager")
    _, want = score_positions(logits(student), logits(teacher), backend="eager")
    for name in set(got._fields) - {"valid"} - OPTIONAL_COLUMNS:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_gradient_matches_the_closed_form(divergence, temperature):
    student, teacher = logit_pair(7, 53, dtype=torch.float64)
    student = leaf(student)
    out = selective_opd_loss(student, teacher, fraction=0.5, divergence=divergence, temperature=temperature, backend="eager")
    out.loss.backward()
    log_p, log_q = (torch.log_softmax(x.detach() / temperature, -1) for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    reverse = p * ((log_p - log_q) - (p * (log_p - log_q)).sum(-1, keepdim=True))
    want = (reverse if divergence == "reverse_kl" else p - q) / temperature / out.selected.sum()
    assert_gradient(student.grad, want * out.selected.unsqueeze(-1), 1e-12)
