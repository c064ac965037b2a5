"""Parity with verl 0.9.1: its forward KL on a teacher's top K, and its k1, k2, k3 estimators on the sampled token.

  Compared: verl and this library, each with the fp64 formula (formulas.py): values, and gradients by logits and by heads.
  verl's side runs its own code: compute_forward_kl_topk on nested tensors, then distillation_loss, which aligns, clamps,
  masks and aggregates ("token-mean" is the sum over valid tokens / batch_num_tokens, our num_items_in_batch).
  With no clamp, forward_kl_topk is TopKForwardKL. What the estimators train on, in expectation over the student's own tokens:
    k1, policy gradient   gradient of KL(student || teacher)     SampledToken's, token by token
    k2, backpropagated    gradient of KL(student || teacher)     SampledToken's, token by token; its value is another number
    k3, backpropagated    gradient of KL(teacher || student)     ForwardKL's in expectation only, and biased by its clamps
    k1, backpropagated    zero (verl refuses it)
  Where verl differs: tests named test_verl_differs_*, each with its measured error.
  Run: make test ARGS=tests/parity/test_verl.py

Not here: its Megatron path, which needs megatron-core (the same formula on a shard of the vocabulary, and its clamps);
ray, whose workers call these functions; PPO's ratio, which is 1 where the student has not moved since the rollout.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.trainer.distillation.losses import distillation_loss
from verl.trainer.ppo.core_algos import kl_penalty
from verl.workers.config import DistillationLossConfig

from opd_ops import SampledLogprobs, SampledToken, TopKForwardKL, TopKLogprobs, selective_opd_loss
from tests.parity.formulas import jsd, kl, logits_of, top_k_forward
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import assert_gradient, relative_error

pytestmark = pytest.mark.full  # importing the peer takes seconds in each process

BACKENDS = ["torch", "eager"]
PEER = 1e-5  # verl's fp32 gradients: 4e-7 measured on these inputs
K = 16


def batch(vocab=131, seed=0, **options):
    student, teacher = (x.view(4, 12, vocab) for x in logit_pair(48, vocab, seed=seed, **{"noise": 2.0, **options}))
    return student, teacher, torch.rand(4, 12, generator=generator(seed)) > 0.25


def ours(student, teacher, mask, divergence, **options):
    return selective_opd_loss(student, teacher, mask=mask, selector="all", fraction=1.0, divergence=divergence, **options)


def top_k_of(teacher, k=K):
    """What a server answers: the ids and the log-probabilities of its K best, rounded to fp32."""
    values, ids = teacher.double().log_softmax(-1).topk(k)
    return ids, values.float()


def settings(mode="forward_kl_topk", **options):
    """verl's configuration with nothing clamped; its defaults are -10 for log-probabilities and 10 for losses."""
    options = {"log_prob_min_clamp": None, "loss_max_clamp": None, "use_policy_gradient": False, "topk": K, **options}
    return SimpleNamespace(distillation_loss=DistillationLossConfig(loss_mode=mode, **options))


def jagged(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def packed(x, fill):
    """Sequences of one prompt token and the response: verl's row i predicts token i + 1, so the last of each is never read."""
    return torch.cat((x, torch.full_like(x[:, :1], fill)), 1)


def verl_top_k(student, ids, log_probs, config):
    """Losses of a (B, T) batch, unreduced, as verl's logit processor computes them."""
    flat = student.reshape(1, -1, student.shape[-1])
    return compute_forward_kl_topk(
        flat, jagged([log_probs.flatten(0, -2)]), jagged([ids.flatten(0, -2)]), config, data_format="thd"
    )


def verl_loss(model_output, mask, config, *, num_items=None, **columns):
    """verl's own alignment, clamps, mask and aggregation. `model_output` holds (B, T) columns of response rows."""
    n, length = mask.shape
    data = TensorDict(
        {
            "prompts": torch.zeros(n, 1, dtype=torch.long),
            "responses": torch.zeros(n, length, dtype=torch.long),
            "attention_mask": torch.ones(n, length + 1, dtype=torch.long),
            "response_mask": mask.long(),
            **columns,
        },
        batch_size=[],
    )
    counts = {"dp_size": 1, "batch_num_tokens": int(mask.sum()) if num_items is None else num_items, "global_batch_size": n}
    for name, count in counts.items():
        data[name] = count
    actor = SimpleNamespace(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    output = {name: packed(x, 0).flatten(0, 1) for name, x in model_output.items()}
    return distillation_loss(actor, config, output, data)[0]


def at_tokens(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("k", [1, 16, 131])
@pytest.mark.parametrize("chunked", [False, True])
def test_logits_match_forward_kl_topk(chunked, k):
    student, teacher, mask = batch()
    ids, log_probs = top_k_of(teacher, k)
    want, peer = leaf(student, torch.float64), leaf(student)
    log_q = log_probs.double()
    per_token = kl(log_q, want.log_softmax(-1).gather(-1, ids))
    expected = per_token[mask].mean()
    expected.backward()
    losses = verl_top_k(peer, ids, log_probs, settings(use_chunked_topk=chunked, chunked_topk_chunk_size=7))
    loss = losses["distillation_losses"].view(4, 12)[mask].mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=PEER)
    assert_gradient(peer.grad, want.grad, PEER)
    for backend in BACKENDS:
        for side in (TopKLogprobs(ids, log_probs), teacher):
            got = leaf(student)
            out = ours(got, side, mask, TopKForwardKL(top_k=k), backend=backend)
            out.loss.backward()
            assert out.loss.item() == pytest.approx(expected.item(), rel=PEER)
            assert_gradient(got.grad, want.grad, PEER)


@pytest.mark.parametrize("num_items", [None, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", [{"bias": True}, {"bias": True, "scale": 1.4, "softcap": 6.0}])
def test_heads_match_verl_s_whole_loss(options, temperature, num_items):
    student, teacher = head_pair((4, 12), 131, **options)
    mask = torch.rand(4, 12, generator=generator(1)) > 0.25
    want, peer = leaf_head(student, torch.float64), leaf_head(student)
    exact = logits_of(to_double(teacher)) / temperature
    per_token = top_k_forward(logits_of(want) / temperature, exact, K)
    assert per_token.min() > 0  # verl clamps negative values: test_verl_differs_where_the_sum_is_negative
    expected = per_token[mask].sum() / (num_items or mask.sum())
    expected.backward()
    outputs = verl_top_k(logits_of(peer) / temperature, *top_k_of(exact), settings())
    loss = verl_loss({name: x.view(4, 12) for name, x in outputs.items()}, mask, settings(), num_items=num_items)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=PEER)
    for a, b in zip(gradients(peer), gradients(want), strict=True):
        assert_gradient(a, b, PEER)
    for backend in BACKENDS:
        got = leaf_head(student)
        divergence = TopKForwardKL(top_k=K)
        out = ours(got, teacher, mask, divergence, temperature=temperature, num_items_in_batch=num_items, backend=backend)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=PEER)
        for a, b in zip(gradients(got), gradients(want), strict=True):
            assert_gradient(a, b, PEER)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["k1", "k2"])
def test_the_sampled_token_s_gradient_is_that_of_k1_as_a_reward_and_of_k2(mode, backend):
    """Both are (log p - log q) held fixed, times the gradient of log p, at the token of the rollout."""
    student, teacher, mask = batch(noise=1.0)
    tokens = torch.randint(0, 131, (4, 12), generator=generator(2))
    log_q = at_tokens(teacher, tokens)
    want, peer, got = leaf(student, torch.float64), leaf(student), leaf(student)
    log_p = at_tokens(want, tokens)
    ((log_p - log_q.double()).detach() * log_p)[mask].sum().div(100).backward()
    log_p = at_tokens(peer, tokens)
    # PPO's dual clip caps a loss of a negative advantage at 3 times it; where the ratio is 1 it never acts.
    config = settings(mode, use_policy_gradient=mode == "k1")
    columns = {"teacher_logprobs": jagged(packed(log_q, 0)[..., None]), "old_log_probs": log_p.detach()}
    verl_loss({"log_probs": log_p}, mask, config, num_items=100, **columns).backward()
    assert_gradient(peer.grad, want.grad, PEER)
    out = ours(
        got, SampledLogprobs(tokens, log_q), mask, SampledToken(), tokens=tokens, num_items_in_batch=100, backend=backend
    )
    out.loss.backward()
    assert_gradient(got.grad, want.grad, PEER)


def expected_gradient(student, losses_of):
    """Exact expectation over the student's own tokens of the gradient of a loss of (log p, log q) at the token: every token of
    the vocabulary, weighted by its probability."""
    x = leaf(student)
    log_p = x.log_softmax(-1)
    (log_p.detach().exp() * losses_of(log_p)).sum(-1).mean().backward()
    return x.grad


@pytest.mark.parametrize("noise", [0.1, 0.3])  # beyond, k3 is clamped: test_verl_differs_in_k3_by_its_clamps
def test_what_the_estimators_train_on_in_expectation(noise):
    student, teacher = logit_pair(20, 31, scale=2.0, noise=noise, dtype=torch.float64)
    log_q = teacher.log_softmax(-1)
    gradients_of = {}
    for beta in (0.0, 1.0):
        x = leaf(student)
        jsd(x, teacher, beta).mean().backward()
        gradients_of[beta] = x.grad
    reward = expected_gradient(student, lambda p: kl_penalty(p, log_q, "k1").detach() * p)
    assert_gradient(reward, gradients_of[1.0], 1e-9)
    assert_gradient(expected_gradient(student, lambda p: kl_penalty(p, log_q, "k2")), gradients_of[1.0], 1e-9)
    assert_gradient(expected_gradient(student, lambda p: kl_penalty(p, log_q, "k3+")), gradients_of[1.0], 1e-9)
    assert_gradient(expected_gradient(student, lambda p: kl_penalty(p, log_q, "k3")), gradients_of[0.0], 1e-9)
    assert expected_gradient(student, lambda p: kl_penalty(p, log_q, "k1")).norm() < 1e-15
    values = {mode: (student.softmax(-1) * kl_penalty(student.log_softmax(-1), log_q, mode)).sum(-1) for mode in ("k1", "k3")}
    for value in values.values():  # both are unbiased for the value of the reverse KL
        torch.testing.assert_close(value, jsd(student, teacher, 1.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampled_token_s_expected_gradient_is_that_of_reverse_kl(backend):
    n, vocab = 5, 31
    student, teacher = logit_pair(n, vocab, scale=2.0)
    want, got = leaf(student, torch.float64), leaf(student)
    jsd(want, teacher.double(), 1.0).mean().backward()
    every = got[:, None].expand(n, vocab, vocab).detach().clone().requires_grad_()  # row (i, v): position i with token v
    tokens = torch.arange(vocab).expand(n, vocab)
    log_q = teacher.log_softmax(-1)
    ours(every, SampledLogprobs(tokens, log_q), None, SampledToken(), tokens=tokens, backend=backend).loss.backward()
    expected = (vocab * every.grad * student.softmax(-1)[..., None]).sum(1)
    assert_gradient(expected, want.grad, PEER)


@pytest.mark.parametrize("k", [16, 64])
def test_verl_differs_by_its_default_clamp_of_log_probabilities(k):
    """log_prob_min_clamp = -10 by default: an entry below e^-10 counts as e^-10, and one of the student's is not trained.
    Two models 1.3 nats apart: 0.6 % and 0.8 % (rms of a token) of the value, 2.4 % and 2.6 % of the gradient, at K = 16 and 64.
    """
    student, teacher, _ = batch(523)
    ids, log_probs = top_k_of(teacher, k)
    want, peer, got = leaf(student, torch.float64), leaf(student), leaf(student)
    per_token = kl(log_probs.double(), want.log_softmax(-1).gather(-1, ids))
    per_token.mean().backward()
    losses = verl_top_k(peer, ids, log_probs, settings(log_prob_min_clamp=DistillationLossConfig().log_prob_min_clamp))
    values = losses["distillation_losses"].view(4, 12)
    values.mean().backward()
    assert 3e-3 < relative_error(values, per_token) < 2e-2
    assert 1e-2 < relative_error(peer.grad, want.grad) < 5e-2
    out = ours(got, TopKLogprobs(ids, log_probs), None, TopKForwardKL(top_k=k))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(per_token.mean().item(), rel=PEER)
    assert_gradient(got.grad, want.grad, PEER)


def test_verl_differs_where_the_sum_is_negative():
    """Over part of the vocabulary the sum can be below zero, where the student has more mass on the list than the teacher: verl
    calls it 0 and does not train there. With K = 1: 6 of 33 positions, and the gradient off by 17 %. Ours keeps the sum.
    """
    student, teacher, mask = batch(523)
    ids, log_probs = top_k_of(teacher, 1)
    want, peer, got = leaf(student, torch.float64), leaf(student), leaf(student)
    per_token = kl(log_probs.double(), want.log_softmax(-1).gather(-1, ids))
    negative = (per_token < 0) & mask
    assert negative.sum() > 2
    per_token[mask].mean().backward()
    outputs = verl_top_k(peer, ids, log_probs, settings(topk=1))
    loss = verl_loss({name: x.view(4, 12) for name, x in outputs.items()}, mask, settings(topk=1))
    loss.backward()
    assert loss.item() == pytest.approx(per_token.clamp_min(0)[mask].mean().item(), rel=PEER)
    assert not peer.grad[negative].any()
    assert 0.05 < relative_error(peer.grad, want.grad) < 0.5
    out = ours(got, TopKLogprobs(ids, log_probs), mask, TopKForwardKL(top_k=1))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(per_token[mask].mean().item(), rel=PEER)
    assert_gradient(got.grad, want.grad, PEER)


def test_verl_differs_by_its_default_clamp_of_losses():
    """loss_max_clamp = 10 by default: the positions furthest from the teacher count as 10 nats and are not trained at all.
    Here 15 of 33: the loss is 5.9 instead of 9.3, the gradient off by 80 %.
    """
    student, teacher, mask = batch(scale=12.0, noise=16.0)
    ids, log_probs = top_k_of(teacher)
    want, peer, got = leaf(student, torch.float64), leaf(student), leaf(student)
    per_token = kl(log_probs.double(), want.log_softmax(-1).gather(-1, ids))
    per_token[mask].mean().backward()
    far = (per_token > 10) & mask
    assert 0 < far.sum() < mask.sum()
    config = settings(loss_max_clamp=DistillationLossConfig().loss_max_clamp)
    outputs = verl_top_k(peer, ids, log_probs, config)
    loss = verl_loss({name: x.view(4, 12) for name, x in outputs.items()}, mask, config)
    loss.backward()
    assert 0.5 < loss.item() / per_token[mask].mean().item() < 0.8
    assert 0.5 < relative_error(peer.grad, want.grad) < 1
    assert not peer.grad[far].any()
    assert bool(want.grad[far].any(-1).all())
    out = ours(got, TopKLogprobs(ids, log_probs), mask, TopKForwardKL(top_k=K))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(per_token[mask].mean().item(), rel=PEER)
    assert_gradient(got.grad, want.grad, PEER)


@pytest.mark.parametrize(("noise", "low", "high"), [(1.0, 0.01, 0.1), (2.0, 0.3, 0.7), (3.0, 0.4, 0.9)])
def test_verl_differs_in_k3_by_its_clamps(noise, low, high):
    """k3 stops at 10, that is where q > 13 p, and with it the gradient: the forward KL's is off by 3 %, 47 % and 66 % for
    models 0.4, 1.5 and 3 nats apart, the value by -0.2, -4.7 and -7.2 %. SampledToken is no estimate of it, so ours is held
    to the reverse KL, whose gradient k2 gives exactly.
    """
    student, teacher = logit_pair(20, 31, scale=2.0, noise=noise, dtype=torch.float64)
    log_q, forward = teacher.log_softmax(-1), leaf(student)
    jsd(forward, teacher, 0.0).mean().backward()
    k3 = expected_gradient(student, lambda p: kl_penalty(p, log_q, "k3"))
    assert low < relative_error(k3, forward.grad) < high
    k2 = expected_gradient(student, lambda p: kl_penalty(p, log_q, "k2"))
    reverse = leaf(student)
    jsd(reverse, teacher, 1.0).mean().backward()
    assert_gradient(k2, reverse.grad, 1e-9)
    every = student[:, None].expand(20, 31, 31).clone().requires_grad_()
    tokens = torch.arange(31).expand(20, 31)
    ours(every, SampledLogprobs(tokens, log_q), None, SampledToken(), tokens=tokens).loss.backward()
    assert_gradient((31 * every.grad * student.softmax(-1)[..., None]).sum(1), reverse.grad, 1e-9)


def test_verl_differs_in_the_value_of_k2():
    """Half a squared log-ratio is no KL: of two models 1.5 nats apart it is 2.1 times the reverse KL in expectation."""
    student, teacher = logit_pair(20, 31, scale=2.0, noise=2.0, dtype=torch.float64)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    value = (log_p.exp() * kl_penalty(log_p, log_q, "k2")).sum(-1).mean() / jsd(student, teacher, 1.0).mean()
    assert 1.8 < value < 2.5


def test_verl_differs_where_a_teacher_s_entry_is_minus_infinity():
    """A list shorter than K, filled up with -inf: 0 (-inf - log p) is NaN without verl's clamp, q = e^-10 with it. Ours
    adds 0.
    """
    student, teacher, _ = batch()
    ids, log_probs = top_k_of(teacher)
    log_probs[0, 0, 5:] = -math.inf
    want, got = leaf(student, torch.float64), leaf(student)
    per_token = kl(log_probs.double(), want.log_softmax(-1).gather(-1, ids))
    per_token.mean().backward()
    assert per_token.isfinite().all()
    losses = verl_top_k(student, ids, log_probs, settings())["distillation_losses"].view(4, 12)
    assert losses[0, 0].isnan()
    assert losses.isnan().sum() == 1
    out = ours(got, TopKLogprobs(ids, log_probs), None, TopKForwardKL(top_k=K))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(per_token.mean().item(), rel=PEER)
    assert_gradient(got.grad, want.grad, PEER)
