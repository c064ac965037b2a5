"""Calls that select and sum by kernels against the same calls by torch's operations on the same statistics.

  Compared: selected positions, scores and statistics to the bit; loss, gradient and metrics to 1e-6.
  Run: make test ARGS=tests/backends/triton/test_selection.py
Not here: the kernels (tests/kernels/test_selection.py, test_totals.py), operators and launches (tests/loss/test_cost.py).
"""

import pytest
import torch

from opd_ops import LogRatio, Released, score_positions, selective_opd_loss
from opd_ops.backends.interface import Backend
from opd_ops.backends.triton.backend import Triton
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair
from tests.support.kernel_oracle import same

INF = float("inf")


def hard_logits(shape, vocab):
    """A pair with positions where one model masks ids, that are equal, and that are not finite."""
    student, teacher = logit_pair(shape.numel(), vocab)
    student[3, :5] = -INF  # forward KL is infinite
    teacher[5, :5] = -INF  # reverse KL is infinite
    student[7], teacher[9, 0] = teacher[7], float("nan")
    student[11:17], teacher[11:17] = student[11], teacher[11]
    return student.view(*shape, vocab), teacher.view(*shape, vocab)


def by_both(monkeypatch, call):
    """The results of a call by kernels and by torch; asserts that the first ran the kernels of sums."""
    summed = []
    with monkeypatch.context() as patch:
        patch.setattr(Triton, "totals", lambda _, *a, f=Triton.totals, **k: summed.append(1) or f(*a, **k))
        one = call()
    assert summed
    with monkeypatch.context() as patch:
        patch.setattr(Triton, "placed_stats", Backend.placed_stats)
        patch.setattr(Triton, "choose", Backend.choose)
        return one, call()


def check(one, other):
    (out, grads), (want, want_grads) = one, other
    assert torch.equal(out.selected, want.selected)
    assert same(out.scores, want.scores)
    for name, column in want.stats._asdict().items():
        assert (column is None) == (getattr(out.stats, name) is None)
        assert column is None or same(getattr(out.stats, name), column), name
    assert out.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        assert out.metrics[name].dtype == value.dtype, name
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-6, atol=0, equal_nan=True, msg=name)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=0, equal_nan=True)
    for gradient, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


MASK = torch.rand(3, 8, generator=generator(3)) < 0.7
WEIGHTS = torch.rand(3, 8, generator=generator(4)).mul(3).floor().div(2)
CASES = {
    "plain": {},
    "mask": {"mask": MASK, "selector": "tip"},
    "sequence": {"scope": "sequence", "selector": "teachability+entropy"},
    "packed": {"scope": "sequence", "mask": MASK, "cu_seqlens": torch.tensor([0, 0, 7, 13, 24]), "selector": "overconfident"},
    "weights": {"weights": WEIGHTS, "divergence": "forward_kl", "selector": "divergence"},
    "denominator": {"denominator": "valid", "num_items_in_batch": 77.0, "divergence": "jsd", "selector": "incompatibility"},
    "items": {"num_items_in_batch": torch.tensor(17), "mask": MASK},
    "callable": {"selector": lambda stats: stats.union_kl.mul_(-1), "mask": MASK},
    "prefix": {"selector": "prefix", "scope": "sequence"},
    "variance": {"selector": "ratio-variance", "mask": MASK},
    "dial": {"selector": "dial", "mask": MASK, "tokens": torch.arange(24).view(3, 8)},
    "log-ratio": {"selector": "log-ratio", "tokens": torch.arange(24).view(3, 8), "scope": "sequence"},
    "threshold": {"threshold": 0.3, "mask": MASK},
    "released": {"selector": "teachability-released", "mask": MASK},
    "released, packed": {"selector": "tip-released", "cu_seqlens": torch.tensor([0, 5, 5, 17, 24])},
    "released, by sequence": {"selector": "teachability+entropy-released", "scope": "sequence", "mask": MASK},
    "released, fitted to valid": {"selector": Released("entropy", fit="valid"), "mask": MASK},
    "kept by its scores": {"selector": "ier", "tokens": torch.arange(24).view(3, 8)},
    "nothing": {"mask": torch.zeros(3, 8)},
    "weighting by responses": {"selector": "teachability", "weighting": "teachability-released", "mask": MASK},
}


QUICK = "released, packed", "plain", "mask", "packed", "callable", "items", "dial", "released", "weighting by responses"


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.full) for case in CASES])
def test_a_call_by_kernels_is_the_call_by_torch(case, monkeypatch):
    student, teacher = hard_logits(torch.Size((3, 8)), 130)

    def call():
        logits = leaf(student)
        out = selective_opd_loss(logits, teacher, backend="triton", fraction=0.2, **CASES[case])
        out.loss.backward()
        return out, [logits.grad]

    check(*by_both(monkeypatch, call))


@pytest.mark.parametrize("divergence", ["reverse_kl", pytest.param("tail_aware", marks=pytest.mark.full)])
def test_heads_by_kernels_are_heads_by_torch(divergence, monkeypatch):
    student, teacher = head_pair((20,), 131)

    def call():
        head = leaf_head(student)
        out = selective_opd_loss(head, teacher, backend="triton", fraction=0.2, divergence=divergence)
        out.loss.backward()
        return out, gradients(head)

    check(*by_both(monkeypatch, call))


def test_a_blown_up_student_makes_the_loss_nan(monkeypatch):
    student, teacher = logit_pair(20, 130)
    student[4] = float("nan")

    def call():
        return selective_opd_loss(leaf(student), teacher, backend="triton"), []

    (out, _), (want, _) = by_both(monkeypatch, call)
    assert out.loss.isnan()
    assert want.loss.isnan()


def test_no_items_but_selected_positions_are_refused():
    student, teacher = logit_pair(20, 130)
    with pytest.raises(ValueError, match="got 0, but 2 positions are selected"):
        selective_opd_loss(leaf(student), teacher, backend="triton", fraction=0.1, num_items_in_batch=0.0)


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"selector": LogRatio("both"), "tokens": torch.arange(20)}])
def test_what_kernels_do_not_select_torch_selects(options, monkeypatch):
    """A threshold, and a selector of both ends."""
    monkeypatch.setattr(Triton, "choose", None)
    student, teacher = logit_pair(20, 130)
    out = selective_opd_loss(leaf(student), teacher, backend="triton", **options)
    want = selective_opd_loss(leaf(student), teacher, backend="torch", **options)
    assert torch.equal(out.selected, want.selected)
    assert out.selected.any()


KEEP = torch.stack((torch.randn(40, generator=generator(5)), torch.zeros(40)), 1)


class _Keeping:
    """A user's selector, whose scores of the positions that responses keep have any strides."""

    keep_one_per_sequence = True

    def __init__(self, keep_scores):
        self.own_keep_scores = keep_scores

    def __call__(self, stats):
        return stats.student_entropy

    def keep_scores(self, stats):
        return self.own_keep_scores


@pytest.mark.parametrize("keep_scores", [KEEP[:, 0], KEEP[0, 0].expand(40)], ids=["strided", "expanded"])
def test_keep_scores_may_have_any_strides(keep_scores):
    student, teacher = logit_pair(40, 61)
    options = {"cu_seqlens": torch.arange(0, 41, 5), "selector": _Keeping(keep_scores), "fraction": 0.05}
    out, want = (selective_opd_loss(student, teacher, backend=name, **options) for name in ("triton", "torch"))
    assert torch.equal(out.selected, want.selected)
    assert out.selected.sum() > 2  # beyond the budget, which is 2


def test_metrics_may_be_changed_in_place_before_the_backward():
    student, teacher = logit_pair(12, 61, scale=3.0)
    gradients = []
    for changes in (False, True):
        x = leaf(student)
        out = selective_opd_loss(x, teacher, fraction=0.5, backend="triton")
        if changes:
            for value in out.metrics.values():
                value.mul_(2)
        out.loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("pair", [logit_pair, head_pair])
def test_ier_of_small_tiles_is_that_of_one_tile(pair):
    sizes = {"student_dim": 32, "teacher_dim": 48} if pair is head_pair else {}
    student, teacher = pair((40,) if sizes else 40, 512, **sizes)
    options = {"tokens": torch.arange(40) * 7, "mask": torch.arange(40) % 7 != 0, "selector": "ier", "backend": "triton"}
    one, small = (score_positions(student, teacher, workspace_bytes=x, **options)[1].ier for x in (2**24, 2**15))
    assert one.std() > 0
    torch.testing.assert_close(small, one, rtol=1e-5, atol=1e-9)
