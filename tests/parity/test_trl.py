"""Parity with TRL 1.16: its fused divergence on heads, the generalised JSD of its trainers on logits, its top-K and sampled
losses.

  Compared: TRL and this library, each with the fp64 formula (formulas.py): values, and gradients by hidden, weight, bias,
  logits.
  Conventions: beta 0 is KL(teacher || student), 1 is KL(student || teacher); sum over valid tokens / their number, or
  / num_items_in_batch; temperature divides after scale and soft-cap; the loss is not scaled back by its square. Ours are
  the same.
  Where TRL differs: tests named test_trl_differs_*, each with its measured error.
  Run: make test ARGS=tests/parity/test_trl.py

Not here: trainers, servers and adapters around these functions; TRL's Triton kernels, which need a GPU (the torch code
that it runs elsewhere is what is compared).
"""

import math
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdpo.loss_utils import (
    compute_sampled_token_self_distillation_loss,
    compute_topk_self_distillation_loss,
)
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from opd_ops import (
    JSD,
    ForwardKL,
    LinearHead,
    LocalSupport,
    ReverseKL,
    SampledLogprobs,
    SampledToken,
    TailAware,
    TopK,
    selective_opd_loss,
)
from tests.parity.formulas import entropy, jsd, kl, local_support, logits_of, tail_aware
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import assert_gradient, relative_error, small_kl_bound

pytestmark = pytest.mark.full  # importing the peer takes seconds in each process

BACKENDS = ["torch", "eager"]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
PEER = 1e-5  # TRL's fused gradients: 2e-6 measured on these inputs
TRAINERS = {"gkd": GKDTrainer, "gold": GOLDTrainer, "iw_opd": IWOPDTrainer}


def some_mask(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed)) > 0.25


def ours(student, teacher, mask, divergence, **options):
    return selective_opd_loss(student, teacher, mask=mask, selector="all", fraction=1.0, divergence=divergence, **options)


def fused(student, teacher, mask, beta, **options):
    """TRL's fused divergence: loss, sum of the student's entropies, number of valid tokens."""
    return _chunked_divergence_loss(
        student.hidden,
        teacher.hidden,
        student.weight,
        teacher.weight,
        mask,
        beta,
        student_lm_head_bias=student.bias,
        teacher_lm_head_bias=teacher.bias,
        student_logit_scale=student.scale,
        teacher_logit_scale=teacher.scale,
        student_final_logit_softcapping=student.softcap,
        teacher_final_logit_softcapping=teacher.softcap,
        **options,
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"scale": 0.6}, {"softcap": 8.0}, {"bias": True, "scale": 1.4, "softcap": 6.0}]
)
def test_heads_match_the_fused_divergence(options, temperature, beta):
    student, teacher = head_pair((4, 9), 523, **options)
    mask = some_mask(4, 9)
    want, peer = leaf_head(student, torch.float64), leaf_head(student)
    per_token = jsd(logits_of(want) / temperature, logits_of(to_double(teacher)) / temperature, beta)
    expected = per_token[mask].mean()
    expected.backward()
    loss, entropies, n_valid = fused(peer, teacher, mask, beta, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=PEER)
    for a, b in zip(gradients(peer), gradients(want), strict=True):
        assert_gradient(a, b, PEER)
    for backend in BACKENDS:
        got = leaf_head(student)
        out = ours(got, teacher, mask, JSD(beta), temperature=temperature, backend=backend)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=PEER)
        for a, b in zip(gradients(got), gradients(want), strict=True):
            assert_gradient(a, b, PEER)
        assert out.metrics["n_valid"] == n_valid
        assert out.metrics["entropy"].item() == pytest.approx((entropies / n_valid).item(), rel=PEER)


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, ForwardKL()), (1.0, ReverseKL())])
@pytest.mark.parametrize("num_items", [100, torch.tensor(37)])
@pytest.mark.parametrize("denominator", ["selected", "valid"])
def test_num_items_in_batch_divides_the_same_sum(denominator, num_items, beta, divergence):
    student, teacher = head_pair((4, 9), 131, bias=True)
    mask = some_mask(4, 9, seed=1)
    peer, got = leaf_head(student), leaf_head(student)
    loss = fused(peer, teacher, mask, beta, num_items_in_batch=num_items)[0]
    loss.backward()
    out = ours(got, teacher, mask, divergence, num_items_in_batch=num_items, denominator=denominator)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=PEER)
    for a, b in zip(gradients(got), gradients(peer), strict=True):
        assert_gradient(a, b, PEER)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_larger_vocabulary_of_the_teacher_is_sliced_on_both_sides(beta):
    student, teacher = head_pair((12,), 131, bias=True)
    wide = LinearHead(
        teacher.hidden, torch.cat((teacher.weight, 2 * teacher.weight[:9])), torch.cat((teacher.bias, teacher.bias[:9] + 3))
    )
    peer, got = leaf_head(student), leaf_head(student)
    loss = fused(peer, wide, torch.ones(12), beta)[0]
    loss.backward()
    with pytest.warns(UserWarning, match="vocabularies differ"):
        out = ours(got, wide, torch.ones(12), JSD(beta))
    out.loss.backward()
    assert loss.item() == pytest.approx(
        jsd(logits_of(student).double(), logits_of(teacher).double(), beta).mean().item(), rel=PEER
    )
    assert out.loss.item() == pytest.approx(loss.item(), rel=PEER)
    for a, b in zip(gradients(got), gradients(peer), strict=True):
        assert_gradient(a, b, PEER)


def test_nothing_valid_is_zero_on_both_sides():
    student, teacher = head_pair((12,), 131)
    peer, got = leaf_head(student), leaf_head(student)
    loss = fused(peer, teacher, torch.zeros(12), 0.5)[0]
    out = ours(got, teacher, torch.zeros(12), JSD(0.5))
    for head, value in ((peer, loss), (got, out.loss)):
        value.backward()
        assert value.item() == 0
        assert not any(g.any() for g in gradients(head))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_items", [None, 100])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_logits_match_the_generalised_jsd_of_the_trainers(trainer, num_items, beta):
    student, teacher = (x.view(4, 10, 131) for x in logit_pair(40, 131))
    mask = some_mask(4, 10)
    peer, want = leaf(student), leaf(student, torch.float64)
    expected = jsd(want / 1.3, teacher.double() / 1.3, beta)[mask].sum() / (num_items or mask.sum())
    expected.backward()
    loss = TRAINERS[trainer].generalized_jsd_loss(
        peer, teacher, torch.where(mask, 1, -100), beta=beta, temperature=1.3, num_items_in_batch=num_items
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=PEER)
    assert_gradient(peer.grad, want.grad, PEER)
    for backend in BACKENDS:
        got = leaf(student)
        out = ours(got, teacher, mask, JSD(beta), temperature=1.3, num_items_in_batch=num_items, backend=backend)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=PEER)
        assert_gradient(got.grad, want.grad, PEER)


def sdpo_top_k(student, teacher, k, *, forward, tail):
    """TRL's top-K loss takes its first argument's K best: given the teacher there, it is a loss on the teacher's list."""
    return compute_topk_self_distillation_loss(
        teacher, student, distillation_topk=k, distillation_alpha=1.0 if forward else 0.0, distillation_add_tail=tail
    )


@pytest.mark.parametrize("k", [1, 16, 64])
@pytest.mark.parametrize(
    ("divergence", "formula", "tail"),
    [(LocalSupport, local_support, False), (TailAware, tail_aware, True)],
    ids=["local", "tail"],
)
def test_divergences_on_the_teacher_s_top_k_match_sdpo_s(divergence, formula, tail, k):
    student, teacher = logit_pair(40, 1031)
    mask = some_mask(40)
    peer, want = leaf(student), leaf(student, torch.float64)
    expected = formula(want, teacher.double(), k)[mask].mean()
    expected.backward()
    loss = sdpo_top_k(peer, teacher, k, forward=False, tail=tail)[mask].mean()
    loss.backward()
    if k == 1 and not tail:  # one renormalised entry is certain on both sides
        assert expected == loss == 0
    else:
        assert loss.item() == pytest.approx(expected.item(), rel=PEER)
        assert_gradient(peer.grad, want.grad, PEER)
    for backend in BACKENDS:
        got = leaf(student)
        out = ours(got, teacher, mask, divergence(top_k=k), backend=backend)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=PEER, abs=1e-7)
        if expected:
            assert_gradient(got.grad, want.grad, PEER)


@pytest.mark.parametrize(("direction", "alpha"), [("forward", 0.0), ("jsd", 0.5), ("reverse", 1.0)])
@pytest.mark.parametrize("tail", ["drop", "bucket"])
def test_divergences_on_the_student_s_top_k_match_sdpo_s(direction, alpha, tail):
    """SDPO's own loss, whose support is the student's top-K; its alpha is our beta."""
    student, teacher = logit_pair(40, 1031)
    mask = some_mask(40)
    peer = leaf(student, torch.float64)
    options = {"distillation_topk": 16, "distillation_alpha": alpha, "distillation_add_tail": tail == "bucket"}
    expected = compute_topk_self_distillation_loss(peer, teacher.double(), **options)[mask].mean()
    expected.backward()
    for backend in BACKENDS:
        got = leaf(student)
        out = ours(got, teacher, mask, TopK(direction, "student", tail, 16), backend=backend)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=PEER, abs=1e-7)
        assert_gradient(got.grad, peer.grad, PEER)


@pytest.mark.parametrize("formula", [local_support, tail_aware])
def test_forward_kl_on_the_teacher_s_top_k_in_two_of_trl_s_trainers(formula):
    """TRL against itself and the formula: the support belongs to the teacher where beta = 0, so both trainers agree."""
    student, teacher = logit_pair(40, 1031)
    tail = formula is tail_aware
    want = leaf(student, torch.float64)
    expected = formula(want, teacher.double(), 16, forward=True).mean()
    expected.backward()

    def iw_opd(logits):
        return IWOPDTrainer.generalized_jsd_loss(
            logits[None], teacher[None], labels=torch.ones(1, 40), beta=0, top_k=16, add_tail=tail
        )

    for function in (iw_opd, lambda x: sdpo_top_k(x, teacher, 16, forward=True, tail=tail).mean()):
        peer = leaf(student)
        loss = function(peer)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=PEER)
        assert_gradient(peer.grad, want.grad, PEER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampled_token_s_gradient_is_sdpo_s_and_iw_opd_s(backend):
    """(log p - log q) held fixed, times the gradient of log p, at the token of the rollout."""
    student, teacher = (x.view(4, 10, 131) for x in logit_pair(40, 131))
    mask, tokens = some_mask(4, 10), torch.randint(0, 131, (4, 10), generator=generator(2))
    log_q = teacher.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    want, sdpo, iw, got = leaf(student, torch.float64), leaf(student), leaf(student), leaf(student)
    log_p = want.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ((log_p - log_q.double()).detach() * log_p)[mask].mean().backward()
    compute_sampled_token_self_distillation_loss(sdpo, teacher, tokens, distillation_alpha=1.0)[mask].mean().backward()
    trainer = SimpleNamespace(  # the attributes that the method reads; gamma = 0: no weights of its own
        temperature=1.0,
        iw_opd_epsilon=1e-8,
        iw_opd_gamma=0.0,
        model=SimpleNamespace(training=False),
        _metrics={"eval": Lists()},
    )
    IWOPDTrainer._compute_iw_opd_loss(trainer, iw, tokens, torch.where(mask, tokens, -100), log_q).backward()
    ours(got, SampledLogprobs(tokens, log_q), mask, SampledToken(), tokens=tokens, backend=backend).loss.backward()
    for x in (sdpo, iw, got):
        assert_gradient(x.grad, want.grad, PEER)


class Lists(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


@pytest.mark.parametrize(("beta", "column"), [(1.0, "reverse_kl"), (0.0, "forward_kl")])
def test_trl_differs_at_small_kl_by_cancellation(beta, column):
    """One pass: KL = sum p (s - t) - log Z_p + log Z_q, three numbers as large as the logits.

    Logits around 40, KL 4e-7: rms error of a token 470 % (reverse) and 490 % (forward), values down to -4e-6, the mean reverse
    KL itself negative (-142 %), the gradient off by 1.5e-3 and 2.5e-3. Ours takes the differences of the logits first: its
    contract is 1e-6 absolute (19 % of such a KL measured) and never negative; gradients off by 7e-6 and 2e-4.
    """
    student, teacher = (x + 40 for x in logit_pair(24, 1031, noise=1e-3, seed=5))
    want, peer, got = leaf(student, torch.float64), leaf(student), leaf(student)
    per_token = jsd(want, teacher.double(), beta)
    per_token.mean().backward()
    assert 1e-7 < per_token.mean() < 1e-6
    eye = torch.eye(1031)
    values = ChunkedDivergenceFunction.apply(peer, eye, None, teacher, eye, None, beta)[0]
    values.mean().backward()
    assert 3 < relative_error(values, per_token) < 10
    assert values.min() < -5e-7
    assert 1e-3 < relative_error(peer.grad, want.grad) < 1e-2
    out = ours(got, teacher, None, JSD(beta), backend="torch")
    out.loss.backward()
    column = getattr(out.stats, column)
    assert (column.double() - per_token).abs().max() < 1e-6
    assert relative_error(column, per_token) < 0.5
    assert column.min() >= 0
    assert_gradient(got.grad, want.grad, 5e-4)


def test_trl_differs_at_small_jsd_by_a_fifth():
    """Two passes, so no such cancellation: 20 % of a JSD of 8e-8. Ours: within its contract of 1e-6, and the gradient."""
    student, teacher = logit_pair(24, 1031, noise=1e-3, seed=3)
    want, got = leaf(student, torch.float64), leaf(student)
    per_token = jsd(want, teacher.double(), 0.5)
    per_token.mean().backward()
    eye = torch.eye(1031)
    values = ChunkedDivergenceFunction.apply(student, eye, None, teacher, eye, None, 0.5)[0]
    assert 0.1 < relative_error(values, per_token) < 0.4
    out = ours(got, teacher, None, JSD(0.5), backend="torch")
    out.loss.backward()
    assert 0 <= out.loss < 1e-6
    assert_gradient(got.grad, want.grad, small_kl_bound(per_token.max().item()))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_differs_at_masked_vocabulary_entries_with_nan(beta):
    """Entries of -inf in both models (a padded or banned token): 0 (-inf + inf) is NaN in TRL's value, at 0 < beta in its
    gradient.
    """
    student, teacher = logit_pair(12, 131)
    student[:, 40:60] = teacher[:, 40:60] = -math.inf
    want = leaf(student, torch.float64)
    expected = jsd(want, teacher.double(), beta).mean()
    expected.backward()
    eye_bias = torch.zeros(131).masked_fill((torch.arange(131) >= 40) & (torch.arange(131) < 60), -math.inf)
    finite = [x.nan_to_num(neginf=0.0) for x in (student, teacher)]
    heads = [LinearHead(leaf(x), torch.eye(131), eye_bias) for x in finite]
    dense = leaf(student)
    for loss, x in (
        (fused(*heads, torch.ones(12), beta)[0], heads[0].hidden),
        (GKDTrainer.generalized_jsd_loss(dense[None], teacher[None], torch.ones(1, 12), beta=beta), dense),
    ):
        loss.backward()
        assert loss.isnan()
        assert bool(x.grad.isnan().any()) == (beta > 0)
    for backend in BACKENDS:
        got = leaf(student)
        out = ours(got, teacher, None, JSD(beta), backend=backend)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=PEER)
        assert_gradient(got.grad, want.grad, PEER)


def test_trl_differs_where_a_row_outside_the_mask_is_nan():
    """Off a GPU TRL projects every row and zeroes the masked values: 0 times NaN, so the weight's gradient is NaN."""
    student, teacher = head_pair((12,), 131)
    mask = torch.ones(12, dtype=torch.bool)
    mask[3] = False
    want = leaf_head(student, torch.float64)
    expected = jsd(logits_of(want), logits_of(to_double(teacher)), 1.0)[mask].mean()
    expected.backward()
    student.hidden[3] = math.nan
    peer, got = leaf_head(student), leaf_head(student)
    loss = fused(peer, teacher, mask, 1.0)[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=PEER)
    assert bool(peer.weight.grad.isnan().all())
    ours(got, teacher, mask, ReverseKL()).loss.backward()
    assert_gradient(got.weight.grad, want.weight.grad, PEER)


def test_trl_differs_where_the_student_s_vocabulary_is_larger():
    """TRL stops with an error of a matmul; ours slices, with a warning, as it does for a larger teacher."""
    student, teacher = head_pair((12,), 140)
    short = LinearHead(teacher.hidden, teacher.weight[:131])
    with pytest.raises(RuntimeError, match="must match"):
        fused(student, short, torch.ones(12), 1.0)
    want, got = leaf_head(student, torch.float64), leaf_head(student)
    expected = jsd(logits_of(want)[:, :131], logits_of(to_double(short)), 1.0).mean()
    expected.backward()
    with pytest.warns(UserWarning, match="vocabularies differ"):
        out = ours(got, short, None, ReverseKL())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected.item(), rel=PEER)
    assert_gradient(got.weight.grad, want.weight.grad, PEER)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trl_differs_without_labels_by_the_length_of_the_sequences(trainer):
    """Its "batchmean" divides by sequences when it is given no labels, by tokens when it is: here 10 times ours."""
    student, teacher = (x.view(4, 10, 131) for x in logit_pair(40, 131))
    expected = jsd(student.double(), teacher.double(), 0.5).mean().item()
    assert TRAINERS[trainer].generalized_jsd_loss(student, teacher, beta=0.5).item() == pytest.approx(10 * expected, rel=PEER)
    assert ours(student, teacher, None, JSD(0.5)).loss.item() == pytest.approx(expected, rel=PEER)


def test_trl_differs_where_a_tail_is_lighter_than_1e_7():
    """It never lets the rest of a distribution be lighter than 1e-7, which a peaked teacher's is: the reverse KL loses
    p_rest log(1e-7 / q_rest), here 20 % of the loss and 32 % of the gradient.
    """
    teacher, _ = logit_pair(40, 1031, scale=20.0)
    student = teacher / 8
    off_list_mass = 1 - teacher.double().softmax(-1).topk(16).values.sum(-1)
    assert off_list_mass.median() < 1e-8
    want, peer = leaf(student, torch.float64), leaf(student)
    expected = tail_aware(want, teacher.double(), 16).mean()
    expected.backward()
    loss = sdpo_top_k(peer, teacher, 16, forward=False, tail=True).mean()
    loss.backward()
    assert 0.1 < 1 - loss.item() / expected.item() < 0.4
    assert 0.2 < relative_error(peer.grad, want.grad) < 0.5
    for backend in BACKENDS:
        got = leaf(student)
        out = ours(got, teacher, None, TailAware(top_k=16), backend=backend)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert_gradient(got.grad, want.grad)


def test_trl_differs_where_the_divergence_is_infinite():
    """p > 0 where the teacher forbids: TRL's top-K loss turns the infinity into 3.4e38 and trains on it. Ours counts the
    position, leaves it out, and trains on the others.
    """
    student, teacher = logit_pair(12, 131)
    teacher[3, student[3].argmax()] = -math.inf
    peer = IWOPDTrainer.generalized_jsd_loss(
        student[None], teacher[None], torch.ones(1, 12), beta=1, top_k=16, reduction="none"
    )
    assert peer.isfinite().all()
    assert peer.max() > 1e38
    assert kl(student.double().log_softmax(-1), teacher.double().log_softmax(-1))[3] == math.inf
    others = torch.arange(12) != 3
    want, got = leaf(student, torch.float64), leaf(student)
    jsd(want[others], teacher[others].double(), 1.0).mean().backward()
    out = ours(got, teacher, None, ReverseKL())
    out.loss.backward()
    assert out.metrics["n_infinite"] == 1
    assert torch.equal(out.selected, others)
    assert_gradient(got.grad, want.grad, PEER)


def test_entropy_of_the_fused_divergence_is_the_student_s():
    student, teacher = head_pair((4, 9), 523, softcap=8.0)
    mask = some_mask(4, 9)
    _, entropies, _ = fused(student, teacher, mask, 0.5, temperature=0.7)
    want = entropy(logits_of(to_double(student)) / 0.7)[mask].sum()
    stats = ours(student, teacher, mask, ReverseKL(), temperature=0.7).stats
    assert entropies.item() == pytest.approx(want.item(), rel=PEER)
    assert stats.student_entropy[mask].sum().item() == pytest.approx(want.item(), rel=PEER)
