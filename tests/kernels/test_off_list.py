"""The kernels of a row's log-sum-exp off a list of ids, interpreted or compiled, against float64
(support/kernel_oracle.py): its equation, and autograd of it through scale and soft-cap.

  Bounds: lse 2e-6, of any size, 2e-5 under a soft-cap; ||g - g64|| / ||g64|| <= 1e-4, of all of the row and of what is
  off the list alone, or the rounding of the stored type.

Run: make test ARGS=tests/kernels/test_off_list.py
Not here: which ids (test_support.py).
"""

import math

import pytest
import torch
from opd_kernels import launch_table
from opd_kernels.device import transform
from opd_kernels.off_list import off_list_fwd, off_list_grad

from tests.support import kernel_oracle as oracle
from tests.support.cases import generator, logit_pair
from tests.support.kernel_oracle import ONE
from tests.support.tolerances import assert_within

INF, NO_ID = float("inf"), 2**31 - 1
FWD_BLOCK, GRAD_BLOCK = 4096, 2048


def lists(n, V, K, seed=0, filler=0):
    """(n, K) ids, sorted, the last `filler` of them filler, and (n, K) values."""
    g = generator(seed)
    ids = torch.stack([torch.randperm(V, generator=g)[: K - filler].sort().values for _ in range(n)])
    ids = torch.cat((ids, torch.full((n, filler), NO_ID)), 1).to(torch.int32)
    return ids, torch.randn(n, K, generator=g)


def exact_off_list(columns, **changed):
    common = {**ONE, **changed}
    k = transform(common["scale"], common["softcap"], common["temperature"]).k
    return math.log(2) * (k * columns[0].double() + columns[1].double())


def run(x, ids, values, coef, rows=None, V=None, out=None, add=False, **changed):
    common = {**ONE, **changed, "vocab_size": V or x.shape[1]}
    columns = off_list_fwd(x, rows, ids, **common)
    out = torch.full(x.shape, float("nan"), dtype=x.dtype) if out is None else out
    off_list_grad(x, rows, ids, values, coef, columns, out=out, add=add, first_id=0, **common)
    return out, columns


def assert_off_list(out, columns, x, ids, values, coef, tolerance=1e-4, **changed):
    common = {**ONE, **changed}
    want = oracle.off_list_gradient(x, ids, values, coef, **changed)
    lse = oracle.off_list(oracle.logit(x, common["scale"], common["softcap"], common["temperature"]), ids)
    absolute = 2e-6 if common["softcap"] is None else 2e-5  # tanh is good to 2^-22 of the cap
    assert_within(exact_off_list(columns, **changed), lse, absolute=absolute, relative=0, name="lse")
    error = (out.double() - want).norm(dim=1)
    assert (error <= tolerance * want.norm(dim=1)).all(), error / want.norm(dim=1)
    is_listed = oracle.listed(ids, x.shape[1])
    off = want.masked_fill(is_listed, 0.0)
    error = (out.double().masked_fill(is_listed, 0.0) - off).norm(dim=1)
    assert (error <= tolerance * off.norm(dim=1)).all(), error / off.norm(dim=1)


def test_the_tests_know_the_blocks():
    tile = launch_table.off_list(torch.float32).constants
    assert tile["LANES"] * tile["R"] * tile["VEC"] == FWD_BLOCK
    assert launch_table.off_list_grad().constants["BLOCK_V"] == GRAD_BLOCK


@pytest.mark.parametrize(("V", "K"), [(9003, 32), (9003, 1), (9003, 128), (4096, 32), (2048, 7), (131, 100), (5, 3)])
def test_off_list_matches_oracle_fp64(V, K):
    x, _ = logit_pair(2, V, seed=V)
    ids, values = lists(2, V, K)
    coef = torch.tensor([0.5, -2.0])
    assert_off_list(*run(x, ids, values, coef), x, ids, values, coef)


@pytest.mark.parametrize("scale", [0.1, 4, 60])
def test_off_list_of_a_row_whose_mass_is_listed(scale):
    x, _ = logit_pair(2, 5003, scale=scale, seed=1)
    x += 240  # k ref + log2z, rounded, would lose its last five digits
    ids = x.topk(32).indices.sort().values.to(torch.int32)
    values, coef = torch.zeros(2, 32), torch.ones(2)
    assert_off_list(*run(x, ids, values, coef), x, ids, values, coef)


@pytest.mark.parametrize(
    "ids",
    [
        [0], [9002], [0, 1, 2, 9002], [2047, 2048], [4095, 4096, 4097], [8191, 8192], [6143, 6144, 8190, 8191, 8192, 8193],
        list(range(2040, 2168)), list(range(4090, 4100)), list(range(7, 9003, 71)), [NO_ID, NO_ID], [5, NO_ID, NO_ID],
        [8192, NO_ID],
    ],
    ids=str,
)  # fmt: skip
def test_off_list_ids_at_borders(ids):
    x, _ = logit_pair(2, 9003, seed=3)
    ids = torch.tensor([ids] * 2, dtype=torch.int32)
    x[oracle.listed(ids, 9003)] += 15  # one that is missed shows in the log-sum-exp
    values = torch.randn(ids.shape, generator=generator(4))
    coef = torch.tensor([1.0, 2.0])
    out, columns = run(x, ids, values, coef)
    assert_off_list(out, columns, x, ids, values, coef)
    for i, v in zip(*torch.nonzero(ids != NO_ID, as_tuple=True), strict=True):
        torch.testing.assert_close(out[i, ids[i, v]], values[i, v], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 0.7, "scale": 0.5}, {"temperature": 2.0}, {"softcap": 30.0, "scale": 0.5, "temperature": 1.3}],
)
def test_off_list_follows_the_transform(changed):
    x, _ = logit_pair(2, 5001, scale=8, seed=5)
    ids, values = lists(2, 5001, 32, filler=3)
    coef = torch.tensor([1.0, 3.0])
    assert_off_list(*run(x, ids, values, coef, **changed), x, ids, values, coef, **changed)


def test_off_list_soft_cap_makes_no_logits_beyond_the_vocabulary():
    x, _ = logit_pair(2, 131)  # a low cap, so that -cap would have a share
    ids, values = lists(2, 131, 5)
    coef = torch.ones(2)
    assert_off_list(*run(x, ids, values, coef, softcap=1.0), x, ids, values, coef, softcap=1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_off_list_grad_rounds_once_to_the_stored_type(dtype, tolerance):
    x, _ = logit_pair(2, 5001, dtype=dtype)
    ids, values = lists(2, 5001, 32)
    coef = torch.ones(2) * 100
    out, columns = run(x, ids, values, coef)
    assert out.dtype == dtype
    assert_off_list(out, columns, x, ids, values, coef, tolerance=tolerance)


def test_assert_off_list_rejects_a_zero_gradient():
    x, _ = logit_pair(1, 300)
    ids, values = lists(1, 300, 5)
    out, columns = run(x, ids, values, torch.ones(1))
    assert_off_list(out, columns, x, ids, values, torch.ones(1))
    for wrong in (torch.zeros_like(x), out.scatter(1, ids.long(), 0.0), torch.zeros_like(x).scatter(1, ids.long(), values)):
        with pytest.raises(AssertionError):
            assert_off_list(wrong, columns, x, ids, values, torch.ones(1))


def test_off_list_of_nothing():
    # K = V, and a row that is -inf off the list
    x, _ = logit_pair(2, 100)
    ids = torch.arange(100, dtype=torch.int32).repeat(2, 1)
    values = torch.randn(2, 100, generator=generator(1))
    out, columns = run(x, ids, values, torch.ones(2))
    assert torch.isfinite(columns[0]).all()
    assert (columns[1] == -INF).all()
    torch.testing.assert_close(out, values, rtol=1e-6, atol=0)
    x, _ = logit_pair(2, 5003)
    ids, values = lists(2, 5003, 32)
    x = torch.full_like(x, -INF).scatter(1, ids.long(), x)
    out, columns = run(x, ids, values, torch.ones(2))
    assert torch.isfinite(columns[0]).all()
    assert (columns[1] == -INF).all()
    torch.testing.assert_close(out, torch.zeros_like(x).scatter(1, ids.long(), values), rtol=1e-6, atol=0)


def test_off_list_ignores_masked_entries():
    x, _ = logit_pair(2, 9003)
    x[0, :4200], x[0, 4444], x[1, 4096:] = -INF, -INF, -INF  # whole blocks
    ids, values = lists(2, 9003, 32)
    ids[0, 0], ids[1, -1] = 3, 9001  # a listed logit of -inf keeps its value
    coef = torch.ones(2)
    out, columns = run(x, ids, values, coef)
    assert torch.isfinite(out).all()
    off = ~oracle.listed(ids, 9003)
    assert (out[(x == -INF) & off] == 0).all()
    torch.testing.assert_close(out.gather(1, ids.long()), values, rtol=1e-6, atol=0)
    want = oracle.off_list_gradient(x, ids, torch.zeros_like(values), coef)
    assert ((torch.where(off, out, 0.0) - want).norm(dim=1) <= 1e-4 * want.norm(dim=1)).all()
    z = oracle.off_list(x.double(), ids)
    assert_within(exact_off_list(columns), z, absolute=2e-6, relative=0, name="lse")


def test_off_list_never_hides_a_nan_off_the_list():
    x, _ = logit_pair(3, 5003)
    ids, values = lists(3, 5003, 32)
    clean = x[1].clone()
    off = next(v for v in range(5003) if v not in ids[0].tolist())
    x[0, off] = float("nan")
    x[1, ids[1, 4]] = float("nan")
    out, columns = run(x, ids, values, torch.ones(3))
    assert columns[1].isnan().tolist() == [True, False, False]
    assert out[0].isnan().sum() == 5003 - 32
    assert torch.isfinite(out[1:]).all()
    same, _ = run(clean[None], ids[1:2], values[1:2], torch.ones(1))
    assert torch.equal(out[1], same[0])


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_off_list_grad_zeros_whatever_the_row_holds(softcap):
    x, _ = logit_pair(4, 2100)
    ids, _ = lists(4, 2100, 8)
    x[0, 7], x[1, 2080], x[2] = float("nan"), -INF, -INF
    x[3, ids[3, 2].item()] = float("nan")
    out, _ = run(x, ids, torch.zeros(4, 8), torch.zeros(4), softcap=softcap)
    assert torch.equal(out, torch.zeros_like(out))


def test_off_list_grad_of_zero_coef_keeps_the_values():
    x, _ = logit_pair(2, 2100)
    ids, values = lists(2, 2100, 8)
    x = x.masked_fill(~oracle.listed(ids, 2100), float("nan"))
    out, _ = run(x, ids, values, torch.zeros(2))
    torch.testing.assert_close(out, torch.zeros_like(x).scatter(1, ids.long(), values), rtol=1e-6, atol=0)


def test_off_list_grad_writes_whole_rows_and_no_others():
    x, _ = logit_pair(5, 5100)
    rows = torch.tensor([3, 1], dtype=torch.int32)
    ids, values = lists(2, 5000, 32)
    coef = torch.tensor([1.0, 2.0])
    out, columns = run(x, ids, values, coef, rows=rows, V=5000)
    assert out[[0, 2, 4]].isnan().all()
    assert (out[[3, 1], 5000:] == 0).all()
    assert_off_list(out[[3, 1], :5000], columns, x[[3, 1], :5000], ids, values, coef)


def test_off_list_grad_in_place_equals_out_of_place():
    x, _ = logit_pair(3, 4300, dtype=torch.bfloat16)
    rows, coef = torch.tensor([2, 0]), torch.tensor([1.0, 2.0])
    ids, values = lists(2, 4300, 32)
    apart, _ = run(x, ids, values, coef, rows=rows, softcap=20.0)
    kept = x.clone()
    together, _ = run(x, ids, values, coef, rows=rows, out=x, softcap=20.0)
    assert together is x
    assert torch.equal(x[[0, 2]], apart[[0, 2]])
    assert torch.equal(x[1], kept[1])


def test_off_list_grad_adds():
    x, before = logit_pair(4, 5100)
    rows, coef = torch.tensor([2, 0]), torch.tensor([1.0, 2.0])
    ids, values = lists(2, 5000, 32)
    alone, _ = run(x, ids, values, coef, rows=rows, V=5000)
    out, _ = run(x, ids, values, coef, rows=rows, V=5000, out=before.clone(), add=True)
    assert torch.equal(out[rows, :5000], before[rows, :5000] + alone[rows, :5000])
    assert torch.equal(out[:, 5000:], before[:, 5000:])
    assert torch.equal(out[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("add", [False, True])
def test_off_list_grad_of_blocks_of_the_vocabulary_equals_that_of_the_whole(add):
    x, before = logit_pair(2, 9003)
    ids, values = lists(2, 9003, 128, filler=5)
    ids[:, 0], ids[:, 1] = 3000, 3001
    ids = ids.sort(1).values
    coef = torch.tensor([1.0, -0.5])
    columns = off_list_fwd(x, None, ids, **ONE, vocab_size=9003)
    whole, parts = before.clone(), before.clone()
    args = ids, values, coef, columns
    off_list_grad(x, None, *args, out=whole, add=add, first_id=0, **ONE, vocab_size=9003)
    for a, b in ((0, 3001), (3001, 3001 + 2048), (5049, 5052), (5052, 9003)):
        off_list_grad(x[:, a:b], None, *args, out=parts[:, a:b], add=add, first_id=a, **ONE, vocab_size=b - a)
    assert torch.equal(whole, parts)


def test_off_list_offsets_pass_two_to_the_31(tmp_path):
    x, _ = oracle.sparse_pair(tmp_path)
    rows, coef = torch.tensor([69999, 0]), torch.ones(2) * 100
    ids, values = lists(2, 300, 8)
    kept = x[rows].clone()
    out, columns = run(x, ids, values, coef, rows=rows, out=x)
    assert_off_list(out[rows], columns, kept, ids, values, coef, tolerance=5e-4)
