"""The selector "ier" against its equation over dictionaries of candidates, and joined to another selector.

  IER, arXiv 2609.24432: signal over noise of the gradient on S ∪ T ∪ {y}. Run: make test ARGS=tests/selection/test_ier.py

Not here: the other selectors (test_selectors.py), the kernel of the column (tests/kernels/test_candidates.py).
"""

import math

import numpy as np
import pytest
import torch

from opd_ops import IER, IW, TopKLogprobs, score_positions, selective_opd_loss
from tests.support.cases import generator, logit_pair


@pytest.fixture(scope="module")
def case():
    student, teacher = logit_pair(60, 211, scale=2.5, seed=7)
    return student.view(4, 15, 211), teacher.view(4, 15, 211), torch.rand(4, 15, generator=generator(8)) > 0.3


def ier(s, u, y, k):
    """The equation of one position, over a dictionary of candidates."""
    log_p, log_q = s - np.logaddexp.reduce(s), u - np.logaddexp.reduce(u)
    lists = [{v: x[v] for v in np.argsort(-x, kind="stable")[:k] if x[v] > -math.inf} for x in (log_p, log_q)]
    ids = sorted({*lists[0], *lists[1], y})
    known = [own | ({y: x[y]} if x[y] > -math.inf else {}) for own, x in zip(lists, (log_p, log_q), strict=True)]
    log_p, log_q = (np.array([own.get(v, -12.0) for v in ids]) for own in known)
    log_p, log_q = log_p - np.logaddexp.reduce(log_p), log_q - np.logaddexp.reduce(log_q)
    p, c = np.exp(log_p), np.clip(log_p - log_q, -30, 30)
    variance = (p * (c - (p * c).sum()) ** 2).sum()
    b = ((1 - p) * c).sum() / max(len(ids) - 1, 1)
    return variance / max(((1 - p) * (c - b) ** 2).sum() - variance, 1e-8)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_ier_is_its_equation_on_every_backend_and_from_lists(backend):
    """Tokens on both lists, on one of them and on none; ids that a model masks."""
    student, teacher = logit_pair(16, 131, scale=2.5, seed=5)
    teacher[3, student[3].topk(3).indices] = -math.inf
    student[4, 8:] = -math.inf
    student[5], teacher[5] = 0.0, 0.0
    student[6, 7] += 60
    k = 5
    order = student.argsort(1, descending=True)
    y = torch.stack([order[i, (0, 3, 9, 60)[i % 4]] for i in range(16)])
    y[1], y[2], y[4] = teacher[1].argmax(), order[2, 1], 100
    want = [ier(s, u, int(v), k) for s, u, v in zip(student.double().numpy(), teacher.double().numpy(), y, strict=True)]
    log_q = teacher.double().log_softmax(-1)
    best = torch.sort(log_q, dim=1, descending=True, stable=True).indices[:, :k]
    ids = torch.cat((best, y.unsqueeze(1)), 1)
    for source in (teacher, TopKLogprobs(ids, log_q.float().gather(-1, ids))):
        _, stats = score_positions(student, source, tokens=y, selector="ier", top_k=k, backend=backend)
        np.testing.assert_allclose(stats.ier.numpy(), want, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("combine", ["and", "or"])
def test_ier_joins_its_rank_to_a_base(combine, case):
    student, teacher, mask = case
    y = torch.randint(0, 211, mask.shape, generator=generator(6))
    got, stats = score_positions(student, teacher, mask=mask, tokens=y, selector=IER("teachability", combine))
    base, _ = score_positions(student, teacher, mask=mask, selector="teachability")
    rank = np.argsort(np.argsort(stats.ier[mask].numpy(), kind="stable"), kind="stable") / (mask.sum().item() - 1)
    want = base[mask].numpy() * rank if combine == "and" else base[mask].numpy() + rank - base[mask].numpy() * rank
    np.testing.assert_allclose(got[mask].numpy(), want, rtol=1e-6, atol=1e-7)
    out = selective_opd_loss(student, teacher, mask=mask, tokens=y, selector=IER("entropy-released", combine), fraction=0.02)
    assert bool(out.selected.any(1).all())  # each response has its best position


def test_a_base_of_ier_that_counts_along_responses_has_those_of_the_call(case):
    student, teacher, mask = case
    given = {"mask": mask, "tokens": torch.randint(0, 211, mask.shape, generator=generator(6))}
    rows = torch.arange(len(mask)).unsqueeze(1).expand(mask.shape)
    got, expected, one = (
        score_positions(student, teacher, selector=IER(base), **given)[0]
        for base in (IW(), IW(sequence_ids=rows), IW().__call__)
    )
    assert torch.equal(got, expected)
    assert not torch.equal(got, one)  # as if all responses were one


@pytest.mark.parametrize("base", ["random", "prefix", IER()])
def test_ier_refuses_a_base_that_is_none_of_statistics(base):
    with pytest.raises(ValueError, match=r"IER.base: got .*, expected a selector of statistics alone"):
        IER(base)


def test_ier_refuses_a_base_that_lists_do_not_determine():
    lists = TopKLogprobs(torch.zeros(2, 1).long(), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="selector: got 'tip', which needs the teacher's whole row, but TopKLogprobs"):
        score_positions(torch.zeros(2, 9), lists, tokens=torch.zeros(2).long(), selector=IER("tip"), top_k=1)
