"""The support kernels, interpreted or compiled, against the float64 specification (support/kernel_oracle.py): ids exactly,
masses
and union KL to 1e-5 (absolute 1e-6); the columns of list_columns.py to 1e-6.

Run: make test ARGS=tests/kernels/test_support.py
Not here: the group maxima themselves (test_score.py).
"""

import pytest
import torch
from opd_kernels.list_columns import LIST_COLUMNS
from opd_kernels.score import score_fwd
from opd_kernels.support import SUPPORT_COLUMNS, support_fwd

from opd_ops.backends import eager
from opd_ops.divergences.equations import topk_entropy
from tests.support import kernel_oracle as oracle
from tests.support.cases import generator, logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.tolerances import assert_within

INF = float("inf")


def run(s, t, K, rows=None, V=None, **changed):
    common = {**COMMON, **changed, "vocab_size": V or s.shape[1]}
    score = score_fwd(s, t, rows, **common)
    return support_fwd(s, t, rows, score, top_k=K, **common)


def check(s, t, K, rows=None, V=None, **changed):
    """Ids, logits and columns against the oracle; returns the support."""
    V = V or s.shape[1]
    support = run(s, t, K, rows, V, **changed)
    common = {**COMMON, **changed}
    pick = slice(None) if rows is None else rows.long()
    s, t = s[pick, :V], t[pick, :V]
    s64 = oracle.logit(s, common["s_scale"], common["s_softcap"], common["temperature"])
    t64 = oracle.logit(t, common["t_scale"], common["t_softcap"], common["temperature"])
    s_ids, t_ids = eager.top_k_ids(s, K), eager.top_k_ids(t, K)
    assert torch.equal(support.s_ids.long(), s_ids)
    assert torch.equal(support.t_ids.long(), t_ids)
    for i, (x, ids) in enumerate(((s64, s_ids), (t64, s_ids), (s64, t_ids), (t64, t_ids))):
        assert_within(support.logits[:, i], x.gather(1, ids), relative=1e-6, absolute=1e-5, name=f"logits {i}")
    want = oracle.support(s64, t64, s_ids, t_ids)
    for name in SUPPORT_COLUMNS:
        assert_within(getattr(support, name), want[name], relative=1e-5, absolute=1e-6, name=name)
    return support


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_support_fwd_matches_oracle_fp64(dtype):
    check(*logit_pair(2, 5001, scale=4, noise=1.0, dtype=dtype), 16)


# K of one, not a power of two, the largest; fewer groups than K; V just above K, and equal to it
@pytest.mark.parametrize(("V", "K"), [(5000, 1), (4200, 5), (16500, 128), (777, 100), (129, 128), (17, 17), (1, 1)])
def test_support_fwd_takes_every_k(V, K):
    check(*logit_pair(1, V, scale=4, noise=1.0, seed=V + K), K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "K"), [(20_000, 16), (20_000, 128), (300, 9)])
def test_support_fwd_tells_keys_far_and_close_apart(dtype, V, K):
    # All magnitudes of both signs, and next to the largest a crowd of neighbours: the bisection's longest ways.
    s = torch.randn(2, V, generator=generator(V)).sign() * 10 ** (76 * torch.rand(2, V, generator=generator(K)) - 38)
    s[:, 5::7] = 3.0e38 * (1 - 2.0**-7 * torch.rand(2, len(range(5, V, 7)), generator=generator(1)))
    s[1, ::2] = -INF
    s = s.to(dtype)
    support = run(s, s.flip(1), K)
    assert torch.equal(support.s_ids.long(), eager.top_k_ids(s, K))
    assert torch.equal(support.t_ids.long(), eager.top_k_ids(s.flip(1), K))


def test_support_fwd_reads_no_maximum_beyond_the_groups():
    s, t = logit_pair(2, 3000)
    score = score_fwd(s, t, None, vocab_size=3000, **COMMON)
    score.group_max[:, :, 24:] = INF  # which the score kernel leaves unwritten
    support = support_fwd(s, t, None, score, top_k=16, vocab_size=3000, **COMMON)
    assert torch.equal(support.s_ids.long(), eager.top_k_ids(s, 16))
    assert torch.equal(support.t_ids.long(), eager.top_k_ids(t, 16))


@pytest.mark.parametrize(("scale", "noise"), [(3, 1e-3), (60, 1e-3), (60, 5), (0.1, 0.1)])
def test_support_fwd_union_kl_does_not_cancel(scale, noise):
    check(*logit_pair(1, 4000, scale=scale, noise=noise), 16)


@pytest.mark.parametrize("K", [1, 100])
def test_support_fwd_ties_go_to_the_lower_id(K):
    g = torch.Generator().manual_seed(1)
    s = torch.randint(0, 3, (1, 4000), generator=g).to(torch.bfloat16)
    t = torch.randint(-1, 2, (1, 4000), generator=g).to(torch.bfloat16)  # -0 and 0 are equal
    s[:, 2000:] = torch.where(s[:, 2000:] == 0, -0.0, s[:, 2000:])
    check(s, t, K)


@pytest.mark.parametrize("K", [1, 77])
def test_support_fwd_is_exact_when_all_group_maxima_are_equal(K):
    s, t = torch.full((1, 6001), 2.0), torch.full((1, 6001), -3.0)
    check(s, t, K)
    s, t = logit_pair(1, 6001)
    s[:, 127::128], t[:, ::128] = 30.0, 30.0
    check(s, t, K)


def test_support_fwd_ranks_inf_last_by_id():
    s, t = logit_pair(2, 5000)
    keep = torch.tensor([4999, 7, 256, 300])
    for x in (s, t):
        masked = torch.full_like(x, -INF)
        masked[:, keep] = x[:, keep]
        x.copy_(masked)
    support = check(s, t, 16)
    assert torch.isfinite(support.columns).all()


def test_support_fwd_one_sided_inf_on_the_union_gives_infinite_kl():
    s, t = logit_pair(1, 3000, noise=0.1)
    s[0, t[0].argmax()] = -INF
    assert check(s, t, 8).union_kl == INF
    s, t = logit_pair(1, 3000, noise=0.1)
    t[0, s[0].argmax()] = -INF  # q = 0 < p: no term of D
    assert torch.isfinite(check(s, t, 8).union_kl)


def test_support_fwd_nan_rows_give_distinct_ids_inside_the_vocabulary():
    s, t = logit_pair(3, 1000)
    s[0], t[0, 5], s[1, 999], t[2] = float("nan"), float("nan"), float("nan"), -INF
    assert run(s, t, 1).union_kl.isnan().all()
    support = run(s, t, 100)
    for ids in (support.s_ids, support.t_ids):
        assert ((ids >= 0) & (ids < 1000)).all()
        assert all(len(set(row.tolist())) == 100 for row in ids)
    assert support.union_kl.isnan().all()


def test_support_fwd_reads_only_the_rows_and_columns_asked_for():
    s, t = logit_pair(5, 3000)
    s[[0, 3]], t[[0, 3]] = float("nan"), float("nan")
    s[:, 2500:], t[:, 2500:] = 99.0, float("nan")
    check(s, t[:, :2999], 16, rows=torch.tensor([4, 1], dtype=torch.int32), V=2500)


def test_support_fwd_takes_mixed_types_and_transforms():
    s, t = logit_pair(2, 3001, scale=8)
    check(s, t.to(torch.bfloat16), 16, s_softcap=30.0, t_scale=0.5, temperature=0.8)


def test_support_fwd_offsets_pass_two_to_the_31(tmp_path):
    s, t = oracle.sparse_pair(tmp_path)
    check(s, t, 16, rows=torch.tensor([69999, 0]))


def list_oracle(s, t, K):
    """The columns of list_columns.py, from (n, V) fp64 logits."""
    s_ids, t_ids = eager.top_k_ids(s, K), eager.top_k_ids(t, K)
    in_s, in_t = (eager.membership(ids, s.shape[1]) for ids in (s_ids, t_ids))
    return {
        "released_kl": eager.released_kl(s, t, in_s, in_t),
        "topk_entropy": topk_entropy(torch.log_softmax(s.gather(1, s_ids), 1)),
        "top1_agreement": (s_ids[:, 0] == t_ids[:, 0]).double(),
        "teacher_rank": eager.teacher_rank(s_ids, t_ids, t).double(),
    }


@pytest.mark.parametrize(("K", "names"), [(16, LIST_COLUMNS), (1, LIST_COLUMNS), (100, LIST_COLUMNS[1:3])])
def test_columns_of_the_lists_match_the_oracle(K, names):
    s, t = logit_pair(9, 900, noise=0.5)
    s[1], t[2] = s[1, 0], s[2]  # equal logits, equal models
    t[3] = s[3] + 1e-3 * (t[3] - s[3])  # models that nearly agree
    s[4, t[4].topk(3).indices] = -INF  # ids of T that the student masks
    s[5, 10:], t[6, s[6].argmax()] = -INF, -INF  # fewer ids than K; the student's first id, masked by the teacher
    s[7] *= 40  # probabilities of 0
    s[8] = -INF
    columns = {name: torch.empty(9) for name in names}
    common = {**COMMON, "vocab_size": 900}
    support_fwd(s, t, None, score_fwd(s, t, None, **common), top_k=K, optional=columns, **common)
    want = list_oracle(s.double(), t.double(), K)
    for name, column in columns.items():
        assert torch.equal(column.isnan(), want[name].isnan()), name
        assert_within(column.nan_to_num(), want[name].nan_to_num(), relative=1e-6, absolute=1e-6, name=name)


def test_support_fwd_rejects_k_above_the_vocabulary():
    s, t = logit_pair(1, 20)
    with pytest.raises(AssertionError, match="top_k"):
        run(s, t, 21)
