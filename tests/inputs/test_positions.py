"""Which positions count: weights, special tokens, ids that mean the same.

  Compared: with calls in which the same was done by hand to mask or logits. Run: make test ARGS=tests/inputs/test_positions.py

Not here: masks and labels (tests/loss/test_loss.py), denominators of micro-batches (tests/call/test_denominators.py).
"""

import math

import pytest
import torch

from opd_ops import LinearHead, SampledLogprobs, StudentStats, TopKLogprobs, score_positions, selective_opd_loss
from opd_ops.divergences import DIVERGENCES
from opd_ops.inputs.batch import Batch
from opd_ops.inputs.positions import positions as checked_positions
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair
from tests.support.meters import LiveBytes
from tests.support.tolerances import assert_gradient, assert_stats, assert_within


def positions(batch, shape, device, **options):
    return checked_positions(batch, shape, device, **{"ignore_index": -100, "special_ids": (), "vocab_size": None} | options)


CPU = torch.device("cpu")
EOS = (5, 90, 33)
every_backend = pytest.mark.parametrize("backend", ["torch", "eager"])


def batch(seed=0, vocab=101):
    student, teacher = logit_pair(24, vocab, scale=3.0, seed=seed)
    return student.view(3, 8, vocab), teacher.view(3, 8, vocab), torch.rand(3, 8, generator=generator(seed)) > 0.25


@every_backend
def test_a_weight_of_zero_leaves_mask_and_denominator(backend):
    student, teacher, mask = batch()
    weights = torch.rand(3, 8, generator=generator(1)) * (torch.rand(3, 8, generator=generator(2)) > 0.3)
    x = leaf(student)
    out = selective_opd_loss(x, teacher, mask=mask, weights=weights, fraction=0.4, backend=backend)
    out.loss.backward()
    want = selective_opd_loss(student, teacher, mask=mask & (weights != 0), fraction=0.4, backend=backend)
    assert torch.equal(out.selected, want.selected)
    assert torch.equal(out.scores, want.scores)
    assert out.metrics["n_valid"] == (mask & (weights != 0)).sum()
    total = (weights * want.stats.reverse_kl)[want.selected].sum()
    assert_within(out.loss, total / want.selected.sum(), absolute=1e-6, relative=1e-5, name="loss")
    assert_within(out.metrics["loss_sum"], total, absolute=1e-6, relative=1e-5, name="loss_sum")
    assert not x.grad[weights == 0].any()


@every_backend
def test_weights_are_constants_that_scale_each_position_and_leave_the_denominator(backend):
    student, teacher, mask = batch()
    plain, doubled = leaf(student), leaf(student)
    options = {"mask": mask, "fraction": 0.5, "denominator": "valid", "num_items_in_batch": 11, "backend": backend}
    selective_opd_loss(plain, teacher, **options).loss.backward()
    factors = torch.full((3, 8), 1.0, dtype=torch.float64)
    factors[1] = 2.0
    given = leaf(factors)
    selective_opd_loss(doubled, teacher, weights=given, **options).loss.backward()
    assert_gradient(doubled.grad, plain.grad * factors.unsqueeze(-1).float(), 1e-6)
    assert given.grad is None


def test_weights_reject_other_shapes_and_masks():
    student, teacher, mask = batch()
    with pytest.raises(ValueError, match=r"weights: got shape \(8,\), expected \(3, 8\)"):
        selective_opd_loss(student, teacher, weights=torch.ones(8))
    with pytest.raises(TypeError, match=r"weights: got dtype torch.bool, expected numbers; a bool mask is `mask`"):
        selective_opd_loss(student, teacher, weights=mask)


def test_special_ids_leave_at_their_first_occurrence_in_each_sequence():
    tokens = torch.tensor([[7, 1, 2, 1, 7], [2, 2, 7, 3, 1]])
    got = positions(Batch(tokens=tokens), tokens.shape, CPU, special_ids=(1, 7, 1))  # an id twice counts once
    assert got.valid.tolist() == [[False, False, True, True, True], [True, True, False, True, False]]


def test_special_ids_look_among_valid_positions_alone():
    tokens = torch.tensor([[7, 1, 7, 1, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])  # a prompt, then a response
    got = positions(Batch(mask, tokens=tokens), tokens.shape, CPU, special_ids=(7, 9))
    assert got.valid.tolist() == [[False, False, False, True, True]]


def test_special_ids_of_packed_sequences():
    tokens = torch.tensor([7, 7, 1, 7, 1, 7])
    got = positions(Batch(tokens=tokens, cu_seqlens=torch.tensor([0, 2, 5, 6])), tokens.shape, CPU, special_ids=[7])
    assert got.valid.tolist() == [False, True, True, False, True, False]


@every_backend
def test_special_ids_are_a_mask(backend):
    student, teacher, mask = batch()
    tokens = torch.randint(0, 4, (3, 8), generator=generator(3))
    result = positions(Batch(mask, tokens=tokens), tokens.shape, CPU, special_ids=(2, 3))
    got = selective_opd_loss(student, teacher, mask=mask, tokens=tokens, special_ids=(2, 3), fraction=0.4, backend=backend)
    want = selective_opd_loss(student, teacher, mask=result.valid, fraction=0.4, backend=backend)
    assert torch.equal(got.loss, want.loss)
    assert got.metrics["n_valid"] < mask.sum()
    scores, _ = score_positions(student, teacher, mask=mask, tokens=tokens, special_ids=(2, 3), backend=backend)
    assert torch.equal(scores, want.scores)


def test_special_ids_reject():
    student, teacher, _ = batch()
    with pytest.raises(ValueError, match="special_ids: got ids, but no tokens to look among; pass tokens="):
        selective_opd_loss(student, teacher, special_ids=(3,))
    with pytest.raises(TypeError, match="special_ids: got '<', expected an integer"):
        selective_opd_loss(student, teacher, special_ids=["<"], tokens=torch.zeros(3, 8, dtype=torch.long))
    with pytest.raises(TypeError, match="special_ids: got 3, expected a sequence of token ids"):
        selective_opd_loss(student, teacher, special_ids=3)
    with pytest.raises(TypeError, match=r"tokens: got dtype torch.float32, expected int32 or int64"):
        selective_opd_loss(student, teacher, tokens=torch.zeros(3, 8))


def merged_by_hand(logits):
    """One column for all of EOS, at the place of the first; the others are gone."""
    total = torch.logsumexp(logits[..., list(EOS)], -1, keepdim=True)
    merged = torch.cat((logits[..., : EOS[0]], total, logits[..., EOS[0] + 1 :]), -1)
    kept = [v for v in range(logits.shape[-1]) if v not in EOS[1:]]
    return merged[..., kept], kept


@pytest.mark.parametrize("backend", ["torch", "eager", "auto"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_eos_ids_count_as_one_action(divergence, backend):
    student, teacher, mask = batch()
    tokens = torch.randint(0, 101, (3, 8), generator=generator(3))
    tokens[0, :3] = torch.tensor(EOS)
    options = {"mask": mask, "divergence": divergence, "backend": backend, "fraction": 0.6}
    got, by_hand = leaf(student), leaf(student)
    out = selective_opd_loss(got, teacher, tokens=tokens, eos_ids=EOS, workspace_bytes=30_000, **options)
    out.loss.backward()
    (s, kept), (u, _) = merged_by_hand(by_hand), merged_by_hand(teacher)
    renumbered = torch.tensor([kept.index(v if v in kept else EOS[0]) for v in tokens.flatten().tolist()]).view(3, 8)
    want = selective_opd_loss(s, u, tokens=renumbered, **options)
    want.loss.backward()
    assert torch.equal(out.selected, want.selected)
    assert_stats(out.stats, want.stats)
    assert_within(out.loss, want.loss, absolute=1e-6, relative=1e-5, name=divergence)
    assert_gradient(got.grad, by_hand.grad)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "local_support", "tail_aware", "sampled", "entropy_aware"])
def test_eos_ids_of_heads_match_eager(divergence):
    student, teacher = head_pair((2, 6), 131, bias=True, softcap=12.0, scale=0.8, seed=3)
    teacher.bias[list(EOS)] += 8.0  # so that the merged action is on every teacher's list
    tokens = torch.randint(0, 131, (2, 6), generator=generator(3))
    tokens[:, 2] = torch.tensor([33, 90])
    results = {}
    for backend in ("torch", "eager"):
        result = leaf_head(student, torch.float64 if backend == "eager" else torch.float32)
        side = LinearHead(teacher.hidden, teacher.weight, teacher.bias, scale=0.8, softcap=12.0)
        out = selective_opd_loss(
            result, side, divergence=divergence, eos_ids=EOS, tokens=tokens, backend=backend, workspace_bytes=20_000,
            selector="all", fraction=1.0, temperature=0.9,
        )  # fmt: skip
        out.loss.backward()
        results[backend] = out.loss, gradients(result)
    assert_within(results["torch"][0], results["eager"][0], absolute=1e-5, relative=1e-4, name=divergence)
    for got, want in zip(results["torch"][1], results["eager"][1], strict=True):
        assert_gradient(got, want)


def test_eos_ids_of_a_listed_teacher():
    student, teacher, mask = batch()
    got = teacher.double().log_softmax(-1).sort(-1, descending=True)
    listed = TopKLogprobs(got.indices[..., :40], got.values[..., :40].float())
    out = selective_opd_loss(student, listed, mask=mask, divergence="forward_kl_topk", eos_ids=EOS, fraction=0.6)
    eager = selective_opd_loss(
        student.double(), listed, mask=mask, divergence="forward_kl_topk", eos_ids=EOS, fraction=0.6, backend="eager"
    )
    assert torch.equal(out.selected, eager.selected)
    assert_within(out.loss, eager.loss, absolute=1e-6, relative=1e-5, name="loss")


def test_one_end_of_turn_has_nothing_to_merge_with():
    student, teacher, _ = batch()
    one, none = (selective_opd_loss(student, teacher, eos_ids=ids, fraction=0.5).loss for ids in ((5,), ()))
    assert torch.equal(one, none)


@pytest.mark.parametrize("divergence", ["reverse_kl", "tail_aware", "local_support"])
def test_eos_ids_keep_to_the_workspace(divergence):
    n, vocab, workspace_bytes = 64, 8192, 2**20
    student, teacher = (leaf(x) for x in logit_pair(n, vocab))
    with LiveBytes() as meter:
        out = selective_opd_loss(
            student, teacher, divergence=divergence, eos_ids=(5, 7000), fraction=1.0, workspace_bytes=workspace_bytes
        )
        out.loss.backward()
    assert meter.peak - 4 * student.numel() <= workspace_bytes + 8 * (60 + 40 * 32) * n


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tail_aware"])
def test_eos_ids_that_are_all_masked_give_finite_gradients(divergence, backend):
    student, teacher, _ = batch()
    for x in (student, teacher):
        x[..., list(EOS)] = -math.inf
    x = leaf(student)
    selective_opd_loss(x, teacher, divergence=divergence, eos_ids=EOS, fraction=1.0, backend=backend).loss.backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_special_ids_are_looked_for_among_the_tokens_of_a_sampled_teacher():
    student, _, mask = batch()
    tokens = torch.randint(0, 4, (3, 8), generator=generator(3))
    teacher = SampledLogprobs(tokens, -torch.ones(3, 8))
    options = {"divergence": "sampled", "selector": "all", "fraction": 1.0, "mask": mask, "special_ids": (2,)}
    got, want = (selective_opd_loss(student, teacher, tokens=given, **options) for given in (None, tokens))
    assert torch.equal(got.loss, want.loss)
    assert got.metrics["n_valid"] < mask.sum()


def test_eos_ids_reject():
    student, teacher, _ = batch()
    for ids in ((5, 5), (5, 101)):
        with pytest.raises(ValueError, match=r"eos_ids: got .*, expected (different ids|ids below the vocabulary size, 101)"):
            selective_opd_loss(student, teacher, eos_ids=ids)
    one = SampledLogprobs(torch.zeros(3, 8, dtype=torch.long), -torch.ones(3, 8))
    with pytest.raises(ValueError, match="eos_ids: SampledLogprobs knows one of the ids alone"):
        selective_opd_loss(student, one, eos_ids=EOS, divergence="sampled", selector="all")
    with pytest.raises(ValueError, match="eos_ids: student_stats are of the ids apart; pass no student_stats"):
        selective_opd_loss(student, teacher, eos_ids=EOS, student_stats=StudentStats.from_logits(student))
    with pytest.raises(ValueError, match=r"backend: got 'triton', but student has merged ids"):
        selective_opd_loss(student, teacher, eos_ids=EOS, backend="triton")


# --- responses -------------------------------------------------------------------------------------------------------


def places_of(shape=(3, 6), **tensors):
    return positions(Batch(**tensors), torch.Size(shape), CPU).response_places(None).tolist()


def test_a_response_is_from_the_first_to_the_last_valid_position_of_its_sequence():
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]])
    want = [[0, 1, 2, 3, 4, 0], [0] * 6, [1, 2, 3, 4, 5, 6]]
    assert places_of(mask=mask) == want
    assert places_of(weights=mask.float()) == want
    assert places_of(shift_labels=torch.where(mask == 0, -100, 3)) == want
    assert places_of(mask=torch.ones(3, 6), weights=mask.float()) == want
    assert places_of() == [[1, 2, 3, 4, 5, 6]] * 3
    packed = {"shape": (18,), "cu_seqlens": torch.tensor([0, 0, 4, 4, 12, 18])}
    assert places_of(mask=mask.flatten(), **packed) == [0, 1, 2, 3, 1, *[0] * 7, 1, 2, 3, 4, 5, 6]
    for shape in ((), (0,), (3, 0)):
        assert positions(Batch(), torch.Size(shape), CPU).response_places(None).shape == shape


def test_special_ids_stay_in_the_response():
    mask, tokens = torch.tensor([[0, 1, 1, 1, 1, 0]] * 3), torch.tensor([[9, 9, 5, 5, 5, 9], [5] * 6, [5, 5, 5, 5, 9, 5]])
    got = positions(Batch(mask, tokens=tokens), torch.Size((3, 6)), CPU, special_ids=[9])
    assert got.valid.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]]
    assert got.response_places(None).tolist() == [[0, 1, 2, 3, 4, 0]] * 3
