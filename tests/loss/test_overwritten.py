"""Tensors of inference mode that are overwritten between the forward and the backward: never a wrong gradient in silence.

  Compared: an error, or the gradient of a call whose tensors nobody touched, bit for bit; live and saved bytes.
  Run: make test ARGS=tests/loss/test_overwritten.py

Not here: teachers of inference mode that stay as they are (test_gradients.py), version counters (autograd's own).
"""

import pytest
import torch

from opd_ops import Extrapolated, LinearHead, selective_opd_loss, selective_opd_token_losses
from opd_ops.backends.shared.overwritten import digests, factor
from opd_ops.inputs.sources import Source
from opd_ops.inputs.workspace import Workspace
from tests.support.cases import head_pair, leaf, leaf_head, logit_pair
from tests.support.meters import LiveBytes, saved_bytes
from tests.support.tolerances import assert_gradient


def in_inference_mode(side):
    with torch.inference_mode():
        if isinstance(side, LinearHead):
            return LinearHead(side.hidden.clone(), side.weight.clone(), side.bias.clone())
        return side.clone()


def overwrite(tensor):
    with torch.inference_mode():  # elsewhere torch refuses to
        tensor.copy_(tensor.flip(0))


NOTICED = r"made in torch\.inference_mode\(\) was overwritten between the forward and the backward"


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
@pytest.mark.parametrize("part", ["logits", "hidden", "weight", "bias"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "entropy_aware", "tail_aware"])
def test_an_overwritten_teacher_of_inference_mode_gives_no_wrong_gradient(backend, part, divergence):
    student, teacher = logit_pair(6, 70) if part == "logits" else head_pair((6,), 70, bias=True)
    read_again = divergence != "tail_aware" and (backend == "torch" or (backend == "triton" and part == "logits"))
    got = []
    for overwritten in (False, True):
        given = in_inference_mode(teacher)
        mine = leaf(student) if part == "logits" else leaf_head(student)
        out = selective_opd_loss(mine, given, fraction=0.5, top_k=8, divergence=divergence, backend=backend)
        if overwritten:
            overwrite(given if part == "logits" else getattr(given, part))
            if read_again:
                with pytest.raises(RuntimeError, match=f"teacher{'' if part == 'logits' else '.' + part}: a tensor {NOTICED}"):
                    out.loss.backward()
                return
        out.loss.backward()
        got.append(mine.grad if part == "logits" else mine.hidden.grad)
    assert got[0].count_nonzero() > 0
    assert torch.equal(*got)


@pytest.mark.parametrize("part", ["logits", "hidden"])
def test_an_overwritten_teacher_of_inference_mode_is_noticed_position_by_position(part):
    student, teacher = logit_pair(6, 70) if part == "logits" else head_pair((6,), 70, bias=True)
    given = in_inference_mode(teacher)
    mine = leaf(student) if part == "logits" else leaf_head(student)
    losses = selective_opd_token_losses(mine, given, fraction=0.5, divergence="tail_aware").losses
    losses.sum().backward(retain_graph=True)
    overwrite(given if part == "logits" else given.hidden)
    with pytest.raises(RuntimeError, match=NOTICED):
        losses.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_backward_notices_an_overwritten_head_of_inference_mode(backend):
    student, teacher = head_pair((6,), 70, bias=True)
    mine, given = leaf_head(student), in_inference_mode(teacher)
    loss = selective_opd_loss(mine, given, fraction=0.5, backend=backend).loss
    loss.backward(retain_graph=True)
    first = mine.hidden.grad.clone()
    loss.backward(retain_graph=True)
    assert_gradient(mine.hidden.grad, 2 * first, 1e-6)
    overwrite(given.weight)
    with pytest.raises(RuntimeError, match=f"teacher.weight: a tensor {NOTICED}"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_an_overwritten_frozen_head_of_inference_mode_is_noticed(backend):
    student, teacher = head_pair((6,), 70, bias=True)
    given = in_inference_mode(student)
    mine = LinearHead(leaf(student.hidden), given.weight, given.bias)
    loss = selective_opd_loss(mine, teacher, fraction=0.5, backend=backend).loss
    overwrite(given.weight)
    with pytest.raises(RuntimeError, match=f"student.weight: a tensor {NOTICED}"):
        loss.backward()


def test_an_overwritten_reference_of_inference_mode_is_noticed():
    student, teacher = logit_pair(6, 70)
    reference = in_inference_mode(teacher + 0.1 * student)
    loss = selective_opd_loss(leaf(student), Extrapolated(1.25, teacher, reference), fraction=0.5).loss
    overwrite(reference)
    with pytest.raises(RuntimeError, match=rf"teachers\[1\]: a tensor {NOTICED}"):
        loss.backward()


def test_a_teacher_of_inference_mode_may_change_where_nothing_is_trained_on():
    student, teacher = logit_pair(6, 70)
    given, mine = in_inference_mode(torch.nn.functional.pad(teacher, (0, 5))), leaf(student)
    out = selective_opd_loss(mine, given, fraction=0.5, vocab_size=70)
    with torch.inference_mode():
        given[~out.selected] = 3.0
        given[:, 70:] = 3.0
    out.loss.backward()
    assert mine.grad.count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [64, 67])
def test_digest_sees_one_bit_and_any_two_words_exchanged(dtype, vocab):
    given = logit_pair(5, vocab, dtype=dtype)[0]
    source, rows, budget = Source.of(in_inference_mode(given), vocab, 1.0), torch.tensor([4, 1, 2]), 4 * 3 * vocab
    before = digests((source,), rows, Workspace(budget))
    assert torch.equal(digests((source,), rows, Workspace(2**30)), before)  # in one piece
    words = source.leading.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    for row, column in ((4, 0), (2, vocab - 1), (1, vocab // 2)):
        words[row, column] ^= 1
        assert not torch.equal(digests((source,), rows, Workspace(budget)), before)
        words[row, column] ^= 1
    for place in ((slice(None), [1, 0, *range(2, vocab)]), ([4, 1, 2, 3, 0],)):
        source.leading.copy_(given[place])
        assert not torch.equal(digests((source,), rows, Workspace(budget)), before)
    source.leading.copy_(given)
    source.leading[[0, 3]] = 7.0
    assert torch.equal(digests((source,), rows, Workspace(budget)), before)


@pytest.mark.parametrize("kind", ["logits", "filtered", "weight", "bias"])
def test_digest_of_a_sample_sees_a_buffer_that_is_filled_again(kind):
    if kind in ("logits", "filtered"):
        first, second = logit_pair(40, 20_000, noise=1e-3)
        if kind == "filtered":  # all but the 50 best are masked, as a server's top-k filter does
            first, second = (x.masked_fill(x < x.topk(50).values[:, -1:], -torch.inf) for x in (first, second.flip(1)))
        given = in_inference_mode(first)
        tensor, source = given, Source.of(given, 20_000, 1.0)
    else:
        given = in_inference_mode(head_pair((40,), 3000, teacher_dim=1000, bias=True)[1])
        tensor, source = getattr(given, kind), Source.of(given, 3000, 1.0)
        second = tensor + 1e-3 * tensor.abs()
    rows = torch.arange(0, 40, 2)
    before = digests((source,), rows, Workspace(2**20))
    assert torch.equal(digests((source,), rows, Workspace(2**14)), before)
    with torch.inference_mode():
        tensor.copy_(second)
    assert not torch.equal(digests((source,), rows, Workspace(2**20)), before)


def test_an_overwritten_tensor_makes_gradients_nan_where_looking_would_wait():
    before = torch.tensor([3, 5])
    assert factor(torch.tensor([3, 5]), before).item() == 1
    assert factor(torch.tensor([3, 4]), before).isnan()
    student, teacher = logit_pair(6, 70)
    for backend in ("torch", "triton"):
        mine = leaf(student)
        out = selective_opd_loss(mine, teacher, fraction=0.5, backend=backend)
        out.loss.backward(torch.tensor(torch.nan))
        assert mine.grad[out.selected].isnan().all()


@pytest.mark.parametrize("side", ["logits", "heads"])
def test_a_teacher_of_inference_mode_costs_no_memory(side):
    student, teacher = logit_pair(60, 701) if side == "logits" else head_pair((60,), 701, bias=True)
    got = []
    for given in (teacher, in_inference_mode(teacher)):
        mine = leaf(student) if side == "logits" else leaf_head(student)
        tensors = [x for y in (mine, given) for x in ([y] if side == "logits" else [y.hidden, y.weight, y.bias])]
        with LiveBytes() as meter:
            with saved_bytes(tensors) as saved:
                loss = selective_opd_loss(mine, given, workspace_bytes=2**17, backend="torch").loss
            loss.backward()
        got.append((saved["bytes"], meter.peak))
    # The meter takes the teacher for new when autograd is given it by another name.
    counted = sum(4 * x.numel() for x in ([given] if side == "logits" else [given.hidden, given.weight, given.bias]))
    assert got[0][0] < got[1][0] <= got[0][0] + 8 * 3
    assert got[0][1] <= got[1][1] <= got[0][1] + counted + 100
