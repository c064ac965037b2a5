"""NeMo-RL's loss contract, against its equations written once more here, on shapes recorded from 0.6.0 at commit 7ea279a.

  Compared: value and gradient in fp64 with its masked mean of KL(p^ || q^) and of sum q^ (log q^ - log p) on the teacher's
  top K; metrics as floats whose sum over micro-batches is a mean over tokens.
  NeMo-RL itself is not needed: stand-ins have the two enumerations that the loss names.
  Run: make test ARGS=tests/integrations/test_nemo_rl.py

Not here: NeMo-RL's own code and workers; the loss itself (tests/divergences/test_divergences.py).
"""

import enum
import importlib
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from opd_ops import Settings
from tests.support.cases import leaf, logit_pair
from tests.support.ranks import SIZE
from tests.support.tolerances import assert_gradient

B, S, VOCAB, K = 3, 9, 131, 16
NAMES = ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss", "nemo_rl.algorithms.loss.interfaces")
ADAPTER = "opd_ops.integrations.nemo_rl"


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"
    DISTILLATION = "distillation"


def stand_in(patch):
    """The loss class, imported beside stand-ins of the modules it names."""
    for name in NAMES:
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[NAMES[-1]].LossType, sys.modules[NAMES[-1]].LossInputType = LossType, LossInputType
    patch.delitem(sys.modules, ADAPTER, raising=False)
    return importlib.import_module(ADAPTER).SelectiveDistillationLossFn


@pytest.fixture(autouse=True)
def make(monkeypatch):
    yield stand_in(monkeypatch)
    sys.modules.pop(ADAPTER, None)


def batch(**options):
    """A micro-batch as NeMo-RL builds it: unshifted [B, S], top-K logits as the teacher's forward gives them, fp32."""
    student, teacher = (x.view(B, S, VOCAB) for x in logit_pair(B * S, VOCAB, **{"noise": 2.0, **options}))
    values, ids = teacher.topk(K)
    token_mask = torch.ones(B, S)
    token_mask[:, :3] = 0  # the prompt
    token_mask[1, 7:] = 0  # padding
    data = {
        "input_ids": torch.zeros(B, S, dtype=torch.long),
        "input_lengths": torch.tensor([S, 7, S]),
        "token_mask": token_mask,
    }
    data |= {"sample_mask": torch.tensor([1.0, 1.0, 0.0]), "teacher_topk_logits": values, "teacher_topk_indices": ids}
    return student, data


def formula(student, data, divergence):
    """[B, S-1] losses of NeMo-RL's equations, and the mask of the tokens that its rows predict."""
    ids, log_q = data["teacher_topk_indices"], data["teacher_topk_logits"].double().log_softmax(-1)
    if divergence == "local_support":
        log_p = student.gather(-1, ids).log_softmax(-1)
        losses = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        log_p = student.log_softmax(-1).gather(-1, ids)
        losses = (log_q.exp() * (log_q - log_p)).sum(-1)
    return losses[:, :-1], data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)


def backward(loss_fn, student, data, n=40.0):
    x = leaf(student)
    loss, metrics = loss_fn(logits=x, data=data, global_valid_seqs=torch.tensor(3.0), global_valid_toks=torch.tensor(n))
    loss.backward()
    return loss.detach(), x.grad, metrics


@pytest.mark.parametrize("sample", [0.0, 0.5])  # a sample's mask is a factor of its loss
@pytest.mark.parametrize("divergence", ["local_support", "forward_kl_topk"])
def test_all_tokens_are_the_masked_mean_of_its_equations(make, divergence, sample):
    student, data = batch()
    data["sample_mask"][2] = sample
    want = leaf(student, torch.float64)
    losses, mask = formula(want, data, divergence)
    expected = (losses * mask).sum() / (40.0 + 1e-8)
    expected.backward()
    loss, gradient, metrics = backward(make(fraction=1.0, divergence=divergence), student, data)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradient(gradient, want.grad, 1e-5)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["num_valid_samples"] == B
    assert all(isinstance(value, (int, float)) for value in metrics.values())


@pytest.mark.parametrize("divergence", ["local_support", "forward_kl_topk"])
def test_a_share_is_divided_by_its_share_of_the_tokens(make, divergence):
    student, data = batch()
    want = leaf(student, torch.float64)
    losses, mask = formula(want, data, divergence)
    loss, gradient, metrics = backward(make(fraction=0.25, divergence=divergence, selector="entropy"), student, data)
    selected = gradient.any(-1)[:, :-1]
    n_valid, n_selected = int(mask.sum()), int(selected.sum())
    assert n_selected == 3
    assert not (selected & (mask == 0)).any()
    assert not gradient[:, -1].any()
    expected = losses[selected].sum() * n_valid / n_selected / 40
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradient(gradient, want.grad, 1e-5)
    entropy = torch.distributions.Categorical(logits=student.double()).entropy()[:, :-1]
    got = {"selected_share": n_selected / 40, "loss_selected": expected.item(), "entropy": (entropy * mask).sum().item() / 40}
    got["entropy_selected"] = entropy[selected].mean().item() * n_valid / 40
    for name, value in got.items():
        assert metrics[f"opd/{name}"] == pytest.approx(value, rel=1e-4), name


def test_a_share_of_equal_losses_does_not_shrink_the_step(make):
    student, data = batch()
    student = student[:1, :1].expand(B, S, VOCAB).clone()
    for name in ("teacher_topk_logits", "teacher_topk_indices"):
        data[name] = data[name][:1, :1].expand(B, S, K).clone()
    few, every = (backward(make(fraction=x, selector="prefix"), student, data) for x in (0.25, 1.0))
    assert few[0].item() == pytest.approx(every[0].item(), rel=1e-5)
    assert_gradient(few[1].sum((0, 1)), every[1].sum((0, 1)), 1e-5)


def test_settings_may_be_an_object(make):
    student, data = batch()
    options = {"fraction": 0.25, "divergence": "forward_kl_topk", "selector": "entropy"}
    by_name, as_object = (backward(x, student, data) for x in (make(**options), make(Settings(**options))))
    assert as_object[0] == by_name[0]
    assert torch.equal(as_object[1], by_name[1])
    with pytest.raises(ValueError, match="divergence: got 'reverse_kl', expected one of: local_support, forward_kl_topk"):
        make(Settings())


def test_an_unknown_normaliser_of_the_teacher_changes_nothing(make):
    student, data = batch()
    first = backward(make(fraction=0.5), student, data)
    data["teacher_topk_logits"] = data["teacher_topk_logits"] + 7 * torch.randn(B, S, 1)
    again = backward(make(fraction=0.5), student, data)
    assert again[0].item() == pytest.approx(first[0].item(), rel=1e-4)
    assert_gradient(again[1], first[1], 1e-4)


def test_packed_sequences_one_by_one_are_a_budget_for_each(make):
    """SequencePackingLossWrapper: one call a sequence, data cut to its length, logits still padded; losses are added."""
    student, data = batch()
    data["sample_mask"][2] = 1.0
    loss, gradient, metrics = backward(make(fraction=0.5, scope="sequence", selector="entropy"), student, data)
    total, summed, parts = 0.0, {}, []
    for i, length in enumerate(data["input_lengths"].tolist()):
        one = {k: v[i : i + 1] if v.dim() < 2 else v[i : i + 1, :length] for k, v in data.items()}
        value, part, got = backward(make(fraction=0.5, selector="entropy"), student[i : i + 1], one)
        n_valid, n_selected = one["token_mask"].sum(), part.any(-1).sum()
        total, summed = total + value * n_selected / n_valid, {k: summed.get(k, 0) + v for k, v in got.items()}
        parts.append(part * n_selected / n_valid)
    ratio = gradient.any(-1).sum() / data["token_mask"].sum()
    assert (loss * ratio).item() == pytest.approx(total.item(), rel=1e-5)
    assert_gradient(torch.cat(parts), gradient * ratio, 1e-5)
    for name in ("opd/selected_share", "opd/entropy", "opd/support_mass_of_list", "num_valid_samples"):
        assert summed[name] == pytest.approx(metrics[name], rel=1e-5), name


def test_without_a_count_it_is_the_mean_of_the_call(make):
    student, data = batch()
    losses, mask = formula(student.double(), data, "local_support")
    loss, metrics = make(fraction=1.0)(student, data, None, None)
    assert loss.item() == pytest.approx(losses[mask != 0].mean().item(), rel=1e-5)
    assert metrics["opd/selected_share"] == 1


@pytest.mark.parametrize("divergence", ["local_support", "forward_kl_topk"])
def test_a_logit_of_minus_9999_or_less_is_a_missing_entry(make, divergence):
    student, data = batch()
    least = data["teacher_topk_logits"][..., -4:]
    least.copy_(torch.tensor([-9999.0, -12345.0, torch.finfo(torch.float32).min, -torch.inf]))
    data["teacher_topk_logits"] -= 40.0  # their normaliser is below 0
    data["teacher_topk_logits"].clamp_min_(torch.finfo(torch.float32).min)
    data["teacher_topk_logits"][0, 5] = -9999.0  # nothing is listed there
    loss, gradient, _ = backward(make(fraction=1.0, divergence=divergence), student, data)
    want = leaf(student, torch.float64)
    few = data | {name: data[name][..., :-4] for name in ("teacher_topk_logits", "teacher_topk_indices")}
    losses, mask = formula(want, few, divergence)
    mask[0, 5] = 0
    expected = (losses * mask).sum() / 40.0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    assert_gradient(gradient, want.grad, 1e-5)


def test_no_valid_token_is_a_connected_zero(make):
    student, data = batch()
    data["sample_mask"].zero_()
    loss, gradient, _ = backward(make(), student, data)
    assert loss == 0
    assert not gradient.any()


def test_what_nemo_rl_asks_of_a_loss(make):
    loss_fn = make(fraction=0.1, selector="teachability")
    assert loss_fn.loss_type is LossType.TOKEN_LEVEL
    assert loss_fn.input_type is LossInputType.LOGIT
    assert pickle.loads(pickle.dumps(loss_fn)).settings == loss_fn.settings  # it travels to the workers


def test_it_rejects_what_it_cannot_do(make):
    student, data = batch()
    with pytest.raises(ValueError, match="divergence: got 'tail_aware', expected one of: local_support, forward_kl_topk"):
        make(divergence="tail_aware")
    for options, error, message in (
        ({"fractoin": 0.1}, TypeError, "settings: got 'fractoin', an unknown name; did you mean 'fraction'?"),
        ({"fraction": 1.5}, ValueError, "fraction: got 1.5, expected"),
        ({"selector": "tip"}, ValueError, "selector: got 'tip', which needs the teacher's whole row"),
        ({"weights": None}, TypeError, "weights: got it among the settings of the loss"),
        ({"scope": "global"}, ValueError, "scope: got 'global', but this host cannot share a budget among ranks; expected"),
        ({"scope": "sequence", "selection_group": dist.ProcessGroup(0, 2)}, ValueError, "selection_group: got a group, but"),
    ):
        with pytest.raises(error, match=message):
            make(**options)
    with pytest.raises(ValueError, match="data: got no sample_mask, expected token_mask"):
        backward(make(), student, {k: v for k, v in data.items() if k != "sample_mask"})
    with pytest.raises(ValueError, match=r"logits: got shape \(3, 4, 131\), expected \(3, 9, V\)"):
        backward(make(), student[:, :4], data)
    shard = student[..., : int(data["teacher_topk_indices"][0].max())]
    with pytest.raises(ValueError, match=f"teacher_topk_indices: got id .*, expected ids below {shard.shape[-1]}"):
        backward(make(), shard, data)


def assert_loss_on_parts(kind, divergence):
    """On every rank: logits of which it has a part, as Megatron and as DTensors share them out, against whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with pytest.MonkeyPatch.context() as patch:
        loss_class = stand_in(patch)
        torch.manual_seed(0)
        student, data = batch()
        student, rank = torch.nn.functional.pad(student, (0, 1), value=-9.0), dist.get_rank()  # padded: equal parts
        loss_fn = loss_class(fraction=0.25, divergence=divergence)
        want, gradient, metrics = backward(loss_fn, student, data)
        if kind == "DTensor":
            mine = distribute_tensor(student, init_device_mesh("cpu", (SIZE,)), [Shard(2)])
            loss, part_gradient, got = backward(loss_fn, mine, data)
            part_gradient = part_gradient.full_tensor()
        else:
            state = SimpleNamespace(model_parallel_is_initialized=lambda: True)
            state.get_tensor_model_parallel_world_size = lambda: SIZE
            state.get_tensor_model_parallel_group = lambda: dist.group.WORLD
            patch.setitem(sys.modules, "megatron.core.parallel_state", state)
            loss, part_gradient, got = backward(loss_fn, student.chunk(SIZE, 2)[rank].clone(), data)
            gradient = gradient.chunk(SIZE, 2)[rank]
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        assert_gradient(part_gradient, gradient, 1e-5)
        assert got == pytest.approx(metrics, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("divergence", ["local_support", "forward_kl_topk"])
@pytest.mark.parametrize("kind", ["DTensor", "Megatron"])
def test_ranks_may_share_out_the_vocabulary(ranks, kind, divergence):
    ranks.run(assert_loss_on_parts, kind, divergence)
