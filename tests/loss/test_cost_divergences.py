"""What each divergence costs on the streamed backend: matmul units and live bytes, counted, never timed.

  units: 2 N V D FLOP each; over the score pass (2, or 1 where the teacher sends lists), with rho the share trained on:
    reverse_kl, forward_kl   4 rho    both logits in the backward, dH, dW
    jsd, total_variation,    6 rho    and a sweep of both before
      skew_kl, power
    forward_kl_topk          5 rho    the teacher's list, the student off it; the backward does not read the teacher
    sampled                  4 rho    the student off it; the teacher's normaliser is known from the score pass
    tail_aware               5 rho    the same; rows whose teacher has less than 0.1 % off the list take a sweep more
    entropy_aware            6 rho    reverse_kl, the teacher's list, the student off it
    local_support            1 rho    the teacher's list; the rest is at few columns
    TopK, student            4 rho    its list and what is off it by one sweep; drop 1 rho
    TopK, union              6 rho    both lists, the student off them; drop 2 rho
  and K dot products a position, which are K / V of a unit. A mixed teacher counts twice.
  bytes: as in tests/loss/test_cost.py, and O(K) numbers per selected row. Run: make test
  ARGS=tests/loss/test_cost_divergences.py

Not here: reverse KL alone (tests/loss/test_cost.py), the Triton backend (tests/backends/triton/test_heads.py).
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opd_ops import LinearHead, Mixture, SampledLogprobs, TopK, TopKLogprobs, estimate, selective_opd_loss
from opd_ops.divergences import DIVERGENCES, resolve_divergence
from tests.support.cases import generator, head_pair, leaf, leaf_head, logit_pair
from tests.support.meters import LiveBytes, saved_bytes

VOCAB, DIM, N, FRACTION = 6007, 32, 200, 0.05
UNITS = {
    "reverse_kl": 4, "forward_kl": 4, "jsd": 6, "total_variation": 6, "skew_kl": 6, "power": 6, "forward_kl_topk": 5,
    "sampled": 4, "tail_aware": 5, "entropy_aware": 6, "local_support": 1,
}  # fmt: skip


def heads(n=N, **options):
    return head_pair((n,), VOCAB, student_dim=DIM, teacher_dim=DIM, **options)


def tokens(n=N):
    return torch.randint(0, VOCAB, (n,), generator=generator(1))


def listed(n=N, k=16):
    _, teacher = logit_pair(n, VOCAB)
    got = teacher.log_softmax(1).topk(k, dim=1)
    return TopKLogprobs(got.indices, got.values)


def count_units(student, teacher, n=N, **options):
    options = {"workspace_bytes": 2**22, "fraction": FRACTION, "backend": "torch", **options}
    with FlopCounterMode(display=False) as counter:
        selective_opd_loss(student, teacher, **options).loss.backward()
    return counter.get_total_flops() / (2 * n * VOCAB * DIM)


def list_length(divergence):
    support = resolve_divergence(divergence).on_support
    return support.length if support else 0


def dots(divergence, n=N):
    """Upper bound in units of what is computed at the list's ids alone."""
    k = list_length(divergence)
    is_list_alone = k and not resolve_divergence(divergence).on_support.reads_off_list
    used = FRACTION * n * k if is_list_alone else 0  # columns that occur, at most
    return FRACTION * (4 * k + 2 * used) / VOCAB


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_units_of_two_heads(divergence):
    student, teacher = heads()
    units = count_units(leaf_head(student), teacher, divergence=divergence, tokens=tokens())
    least = 2 + UNITS[divergence] * FRACTION
    assert least <= units + 1e-12 <= least + dots(divergence) + 1e-9


@pytest.mark.parametrize(
    ("support", "tail", "units"),
    [
        ("student", "mass", 4),
        ("student", "sampled", 4),
        ("student", "bucket", 4),
        pytest.param("student", "drop", 1, marks=pytest.mark.full),
        pytest.param("teacher", "mass", 5, marks=pytest.mark.full),
        pytest.param("union", "mass", 6, marks=pytest.mark.full),
        pytest.param("intersection", "bucket", 6, marks=pytest.mark.full),
    ],
)
def test_units_of_top_k_lists_of_two_heads(support, tail, units):
    student, teacher = heads()
    divergence = TopK("reverse", support, tail, 4)
    got = count_units(leaf_head(student), teacher, divergence=divergence, tokens=tokens())
    least = 2 + units * FRACTION
    assert least <= got + 1e-12 <= least + dots(divergence) + 1e-9
    if support == "student" and tail != "drop":
        for backend in ("torch", "triton"):
            stated = estimate(
                N, VOCAB, DIM, DIM, divergence=divergence, fraction=FRACTION, backend=backend, dtype=torch.float32
            )
            if backend == "torch":
                assert stated.matmul_units == pytest.approx(got, rel=1e-12)
            assert least <= stated.matmul_units + 1e-12 <= least + dots(divergence) + 1e-9


def test_rows_whose_teacher_has_next_to_no_tail_are_swept_once_more():
    student, teacher = heads()
    divergence = TopK("reverse", "student", "bucket", 4)
    sharp = LinearHead(torch.cat((6 * teacher.hidden[:60], teacher.hidden[60:])), teacher.weight)
    log_q = (sharp.hidden.double() @ sharp.weight.double().T).log_softmax(1)
    lists = (student.hidden @ student.weight.T).topk(4, dim=1).indices
    share = (1 - log_q.gather(1, lists).exp().sum(1) < 2**-10).double().mean()
    got = count_units(leaf_head(student), sharp, divergence=divergence, fraction=1.0)
    assert 0.05 < share < 0.3
    assert 6 + share <= got + 1e-12 <= 6 + share + 8 * dots(divergence) / FRACTION


@pytest.mark.parametrize("tail", ["sampled", *(pytest.param(x, marks=pytest.mark.full) for x in ("mass", "bucket", "drop"))])
def test_units_of_a_teacher_that_sends_the_student_s_ids_are_the_student_s_alone(tail):
    student, _ = heads()
    rows = (student.hidden @ student.weight.T).topk(4, dim=1).indices
    ids = torch.cat((rows, tokens().unsqueeze(1)), 1)
    lists, divergence = TopKLogprobs(ids, torch.full(ids.shape, -2.0), of="student"), TopK("reverse", "student", tail, 4)
    got = count_units(leaf_head(student), lists, divergence=divergence, tokens=tokens())
    least = 1 + (0 if tail == "drop" else 4) * FRACTION
    assert least <= got + 1e-12 <= least + dots(divergence) + (16 + FRACTION * 5) / VOCAB + 1e-9


@pytest.mark.parametrize(("divergence", "units"), [("forward_kl_topk", 4), ("tail_aware", 4), ("local_support", 0)])
def test_units_of_a_listed_teacher_are_the_student_s_alone(divergence, units):
    student, _ = heads()
    got = count_units(leaf_head(student), listed(), divergence=divergence)
    least = 1 + units * FRACTION
    assert least <= got + 1e-12 <= least + dots(divergence) + 16 / VOCAB + 1e-9  # and the student on the teacher's lists


def test_units_of_a_sampled_teacher_are_the_student_s_alone():
    student, _ = heads()
    teacher = SampledLogprobs(tokens(), -torch.ones(N))
    got = count_units(leaf_head(student), teacher, divergence="sampled", selector="entropy")
    assert 1 + 4 * FRACTION <= got + 1e-12 <= 1 + 4 * FRACTION + dots("sampled")


@pytest.mark.parametrize(("kind", "units"), [("geometric", 3), pytest.param("arithmetic", 5, marks=pytest.mark.full)])
def test_units_of_a_mixed_teacher_count_both_heads(kind, units):
    student, teacher = heads()
    mixed = Mixture((teacher, LinearHead(teacher.hidden + 0.1, teacher.weight)), (0.75, 0.25), kind)
    got = count_units(leaf_head(student), mixed)
    assert got == pytest.approx(units + 5 * FRACTION, rel=1e-12)
    for backend in ("torch", "triton"):
        options = {"fraction": FRACTION, "backend": backend, "dtype": torch.float32, "mixture": kind}
        assert estimate(N, VOCAB, DIM, (DIM, DIM), **options).matmul_units == pytest.approx(got, rel=1e-12)


@pytest.mark.parametrize("workspace_bytes", [pytest.param(2**20, marks=pytest.mark.full), 2**22])
@pytest.mark.parametrize(
    "divergence", [*sorted(DIVERGENCES), TopK("reverse", "student", "sampled"), TopK("jsd", "union")], ids=str
)
def test_head_peak_is_workspace_plus_gradients_plus_order_n(divergence, workspace_bytes):
    n, fraction = 160, 0.3
    student, teacher = heads(n)
    student = leaf_head(student)
    options = {"divergence": divergence, "fraction": fraction, "workspace_bytes": workspace_bytes, "backend": "torch"}
    with LiveBytes() as meter:
        selective_opd_loss(student, teacher, tokens=tokens(n), **options).loss.backward()
    required = 4 * (student.weight.numel() + student.hidden.numel())
    selected = 4 * n * fraction * 3 * DIM
    k = list_length(divergence)
    lists = 8 * 40 * k * n * fraction  # ids, both models' logits in fp64, their gradients and temporaries
    assert meter.peak > required
    assert meter.peak - required <= workspace_bytes + selected + 8 * 60 * n + lists
    assert meter.largest <= max(workspace_bytes // 4, student.weight.numel())


def test_mixed_heads_keep_no_row_of_logits_beyond_the_workspace():
    n_teachers, n, fraction, workspace_bytes = 3, 80, 0.3, 2**20  # a whole tile of logits has 2 MB
    student, teacher = heads(n)
    student = leaf_head(student)
    others = [LinearHead(teacher.hidden + 0.1 * i, teacher.weight) for i in range(1, n_teachers)]
    mixture = Mixture([teacher, *others], (1 / n_teachers,) * n_teachers, "arithmetic")
    with LiveBytes() as meter:
        selective_opd_loss(
            student, mixture, fraction=fraction, workspace_bytes=workspace_bytes, backend="torch"
        ).loss.backward()
    required = 4 * (student.weight.numel() + student.hidden.numel())
    assert meter.peak - required <= workspace_bytes + 4 * n * fraction * 3 * DIM + 8 * 60 * n
    assert meter.largest <= max(workspace_bytes // 4, student.weight.numel())


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_logits_peak_is_workspace_plus_the_gradient(divergence):
    n, fraction, workspace_bytes = 60, 0.3, 2**20
    student, teacher = (leaf(x) for x in logit_pair(n, VOCAB))
    options = {"divergence": divergence, "fraction": fraction, "workspace_bytes": workspace_bytes, "backend": "torch"}
    with LiveBytes() as meter:
        selective_opd_loss(student, teacher, tokens=tokens(n), **options).loss.backward()
    k = list_length(divergence)
    lists = 8 * 40 * k * n * fraction
    assert meter.peak - student.numel() * 4 <= workspace_bytes + 8 * 60 * n + lists


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_saved_for_backward_is_a_few_numbers_per_selected_row(divergence):
    student, teacher = heads(bias=True)
    student = leaf_head(student)
    inputs = [t for head in (student, teacher) for t in (head.hidden, head.weight, head.bias)]
    with saved_bytes(inputs) as saved:
        loss = selective_opd_loss(student, teacher, fraction=FRACTION, divergence=divergence, tokens=tokens()).loss
    k = list_length(divergence)
    assert 0 < saved["bytes"] <= (48 + 16 * k) * FRACTION * N + 64  # ids and gradients of the lists, and what reverse KL saves
    loss.backward()
