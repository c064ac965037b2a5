"""The kernel of the column `ier`, interpreted or compiled, against its equation in float64: on the lists that the kernel reads
to 1e-7, the rounding to fp32; from logits to 1e-5.

Run: make test ARGS=tests/kernels/test_candidates.py
Not here: the equation by itself (tests/selection/test_ier.py holds the float64 side to it), the lists (test_support.py).
"""

import pytest
import torch
from opd_kernels.candidates import ier_fwd
from opd_kernels.score import score_fwd
from opd_kernels.support import support_fwd

from opd_ops.backends import eager
from opd_ops.backends.shared.candidates import on_candidates
from tests.support.cases import logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.tolerances import assert_within

INF = float("inf")


def run(s, t, tokens, K):
    """The kernel's column, and the equation's on the same lists, log-sum-exps and logits of the token."""
    common = {**COMMON, "vocab_size": s.shape[1]}
    score = score_fwd(s, t, None, **common)
    lists = support_fwd(s, t, None, score, top_k=K, **common)
    at_tokens = torch.stack([x.gather(1, tokens[:, None])[:, 0].float() for x in (s, t)])
    column = ier_fwd(lists, score, tokens, at_tokens, torch.empty(len(s)))
    lse = torch.stack((score.student_logsumexp, score.teacher_logsumexp))
    at_y = (at_tokens - lse).clamp_max(0).double().unsqueeze(2)
    log_p, log_q = lists.logits[:, 0] - lse[0].double()[:, None], lists.logits[:, 3] - lse[1].double()[:, None]
    return column, on_candidates(lists.s_ids.long(), log_p, lists.t_ids.long(), log_q, tokens[:, None], at_y)


def oracle(s, t, tokens, K):
    log_p, log_q = (x.double().log_softmax(1) for x in (s, t))
    s_ids, t_ids, y = eager.top_k_ids(s, K), eager.top_k_ids(t, K), tokens[:, None]
    at_y = torch.stack((log_p.gather(1, y), log_q.gather(1, y)))
    return on_candidates(s_ids, log_p.gather(1, s_ids), t_ids, log_q.gather(1, t_ids), y, at_y)


def case(dtype=torch.float32):
    """Peaked rows, with a token on both lists, on one of them, on none; ids that a model masks; models that nearly agree."""
    s, t = logit_pair(12, 301, noise=0.5, dtype=dtype)
    order = s.argsort(1, descending=True)
    tokens = torch.stack([order[i, (0, 3, 40, 200)[i % 4]] for i in range(12)])
    tokens[1] = t[1].argmax()
    t[2, s[2].topk(3).indices] = -INF
    s[3, 4:] = -INF  # fewer ids than K, without the token
    s[4], t[5] = s[4, 0], s[5]
    s[6, 7] += 60  # p = 1 on one id
    t[7, tokens[7]], s[8, tokens[8]] = -INF, -INF
    t[9] = -s[9]  # ratios beyond 30
    return s, t, tokens


@pytest.mark.parametrize(("K", "dtype"), [(16, torch.float32), (16, torch.bfloat16), (1, torch.float32), (100, torch.float32)])
def test_ier_matches_its_equation(K, dtype):
    s, t, tokens = case(dtype)
    column, given = run(s, t, tokens, K)
    assert_within(column, given, relative=1e-7, absolute=1e-12, name="on the lists")
    assert_within(column, oracle(s, t, tokens, K), relative=1e-5, absolute=1e-6, name="from logits")
    assert column.std() > 0


def test_ier_of_rows_without_finite_numbers_is_that_of_their_floors():
    s, t, tokens = case()
    s[0], t[1], s[2, 5], t[3] = -INF, -INF, float("nan"), float("nan")
    column, given = run(s, t, tokens, 16)
    assert torch.isfinite(column).all()
    assert_within(column, given, relative=1e-7, absolute=1e-12, name="ier")
