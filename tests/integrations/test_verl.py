"""verl 0.9.1 with the selective loss inside: its own `distillation_ppo_loss` both ways, on its own types.

  Compared: at fraction 1 verl's own "forward_kl_topk", unpatched: loss, gradient and metrics, with its default clamps and
  without; at a share, `selective_opd_loss` over the response tokens with verl's counts as num_items_in_batch.
  What stands for the engine is the few lines of `step`: packed logits in, jagged columns out, as in FSDPEngineWithLMHead.
  Run: make test ARGS=tests/integrations/test_verl.py

Not here: workers and their rollouts, which need ray and a GPU; verl's formula itself (tests/parity/test_verl.py).
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.trainer.distillation import distillation_ppo_loss
from verl.trainer.distillation import losses as hooks
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig
from verl.workers.utils.padding import left_right_2_no_padding

from opd_ops import JSD, LocalSupport, Settings, TailAware, TopKForwardKL, TopKLogprobs, selective_opd_loss
from opd_ops.integrations.verl import AGGREGATIONS, MODE, patch_verl
from tests.support.cases import leaf, logit_pair
from tests.support.tolerances import assert_gradient

pytestmark = pytest.mark.full  # importing the peer takes seconds in each process

VOCAB, K, PROMPT, RESPONSE = 131, 16, 4, 10
PROMPTS, RESPONSES = [2, 4, 1], [10, 6, 8]  # lengths
N = sum(PROMPTS) + sum(RESPONSES)
NO_CLAMPS = {"log_prob_min_clamp": None, "loss_max_clamp": None}
DEFAULT_CLAMPS = {"log_prob_min_clamp": -10.0, "loss_max_clamp": 10.0}
PEER = 1e-5


def settings(mode=MODE, *, aggregation="token-mean", strategy="fsdp", **options):
    options = {"use_policy_gradient": False, "use_task_rewards": False, "topk": K, **NO_CLAMPS, **options}
    loss = DistillationLossConfig(loss_mode=mode, **options)
    actor = ActorConfig(strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=aggregation)
    return actor, DistillationConfig(distillation_loss=loss)


def jagged(values):
    lengths = torch.tensor([a + b for a, b in zip(PROMPTS, RESPONSES, strict=True)])
    return torch.nested.nested_tensor_from_jagged(values, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))


def micro_batch(teacher, *, is_nested=False, distillation_only=True, num_items=100, dp_size=1, k=K):
    """As verl's worker sees it: padded or jagged responses, jagged tokens and teacher lists; one response token is a tool's."""
    attention, response = torch.zeros(3, PROMPT + RESPONSE, dtype=torch.long), torch.zeros(3, RESPONSE, dtype=torch.long)
    for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        attention[i, PROMPT - p : PROMPT + r] = 1
        response[i, :r] = 1
    response[0, 3] = 0
    zeros = torch.zeros_like(attention)
    data = TensorDict({"attention_mask": attention, "response_mask": response, "input_ids": zeros, "position_ids": zeros}, [3])
    data["prompts"], data["responses"] = zeros[:, :PROMPT], zeros[:, PROMPT:]
    data = left_right_2_no_padding(data)
    if is_nested:
        data = TensorDict({"input_ids": data["input_ids"]}, [3])
        for name, lengths in (("prompts", PROMPTS), ("responses", RESPONSES)):
            data[name] = torch.nested.as_nested_tensor([torch.zeros(n) for n in lengths], layout=torch.jagged)
        rows = [response[i, :n] for i, n in enumerate(RESPONSES)]
        data["response_mask"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    values, ids = teacher.log_softmax(-1).topk(k)
    data["teacher_logprobs"], data["teacher_ids"] = jagged(values), jagged(ids.int())
    counts = {"dp_size": dp_size, "batch_num_tokens": num_items, "global_batch_size": 3}
    tensordict_utils.assign_non_tensor(data, distillation_only=distillation_only, **counts)
    return data


def pair(**options):
    return logit_pair(N, VOCAB, **{"noise": 2.0, **options})


def response_rows():
    """(n,) bool, written out by hand: the row before each response token, but for the tool's."""
    mask, start = torch.zeros(N, dtype=torch.bool), 0
    for p, r in zip(PROMPTS, RESPONSES, strict=True):
        mask[start + p - 1 : start + p + r - 1] = True
        start += p + r
    mask[PROMPTS[0] - 1 + 3] = False
    return mask


def step(logits, data, actor, config):
    """The engine's part: the logits processor, its columns made jagged, the final loss."""
    columns = distillation_ppo_loss(actor, config, data=data, student_logits=logits.unsqueeze(0), data_format="thd")
    output = {}
    for name, column in columns.items():
        assert column.shape == (1, N)
        output[name] = torch.nested.nested_tensor_from_jagged(column.squeeze(0), data["input_ids"].offsets())
    return distillation_ppo_loss(actor, config, model_output=output, data=data)


def run(student, teacher, config, **options):
    x = leaf(student)
    loss, metrics = step(x, micro_batch(teacher, **options), *config)
    loss.backward()
    return loss.detach(), x.grad, metrics


def ours(student, teacher, *, num_items, divergence, **options):
    """The scalar loss over the same rows."""
    x = leaf(student)
    log_q, ids = teacher.log_softmax(-1).topk(K)
    mask, lists = response_rows(), TopKLogprobs(ids, log_q)
    out = selective_opd_loss(x, lists, mask=mask, num_items_in_batch=num_items, divergence=divergence, **options)
    out.loss.backward()
    return out, x.grad


@pytest.mark.parametrize(("clamps", "k"), [(NO_CLAMPS, K), (DEFAULT_CLAMPS, K), (NO_CLAMPS, 1)])
@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_all_tokens_are_verl_s_own_loss_and_gradient(aggregation, is_nested, clamps, k):
    student, teacher = pair() if k == 1 else pair(scale=12.0, noise=14.0)  # sums below zero; both clamps act
    config = {"aggregation": aggregation, **clamps}
    want, gradient, theirs = run(student, teacher, settings("forward_kl_topk", **config), is_nested=is_nested, k=k)
    for distillation_only in (True, False):
        with patch_verl(fraction=1.0):
            options = {"is_nested": is_nested, "distillation_only": distillation_only, "k": k}
            loss, got, metrics = run(student, teacher, settings(**config), **options)
        assert loss.item() == pytest.approx(want.item(), rel=PEER)
        assert_gradient(got, gradient, PEER)
        assert metrics["distillation/selected_share"] == 1
        for name in ("distillation/loss", "distillation/loss_max", "distillation/loss_min"):
            assert metrics[name].aggregate() == pytest.approx(theirs[name].aggregate(), rel=PEER)


@pytest.mark.parametrize("divergence", ["forward_kl_topk", "local_support", "tail_aware"])
def test_an_entry_of_minus_9999_is_missing(divergence):
    student, teacher = pair()
    teacher = teacher.masked_fill(teacher < teacher.topk(K - 4).values[:, -1:], -math.inf)
    got = []
    for absent in (-9999.0, -math.inf):
        data, x = micro_batch(teacher), leaf(student)
        data["teacher_logprobs"] = jagged(data["teacher_logprobs"].values().clamp_min(absent))
        with patch_verl(fraction=1.0, divergence=divergence):
            loss, _ = step(x, data, *settings())
        loss.backward()
        got.append((loss.detach(), x.grad))
    assert all(map(torch.equal, *got))
    assert got[0][1].any()


@pytest.mark.parametrize("weighting", [{}, {"weighting": "entropy", "weight_mean": "valid", "weighting_share": 0.75}])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(
    ("name", "instance"),
    [("forward_kl_topk", TopKForwardKL(K)), ("local_support", LocalSupport(K)), ("tail_aware", TailAware(K))],
)
@pytest.mark.parametrize("distillation_only", [True, False])
def test_a_share_is_the_scalar_loss_with_verl_s_counts(distillation_only, name, instance, scope, weighting):
    student, teacher = pair(noise=1.0)
    starts = torch.tensor([0, *torch.tensor(PROMPTS).add(torch.tensor(RESPONSES)).cumsum(0).tolist()])
    options = {"fraction": 0.25, "scope": scope, **weighting}
    out, want = ours(student, teacher, num_items=50.0, divergence=instance, cu_seqlens=starts, **options)
    with patch_verl(divergence=name, **options):
        loss, got, metrics = run(student, teacher, settings(), distillation_only=distillation_only, dp_size=2)
    assert loss.item() == pytest.approx(out.loss.item(), rel=PEER)  # of 100 tokens over 2 ranks
    assert_gradient(got, want, PEER)
    assert torch.equal(got.any(-1), out.selected)
    counts = out.metrics["n_selected"] / out.metrics["n_valid"]
    assert metrics["distillation/selected_share"] == pytest.approx(counts.item())
    for ours_name in ("entropy", "entropy_selected", "support_mass_lower_bound", "support_mass_lower_bound_selected"):
        assert metrics[f"distillation/{ours_name}"] == pytest.approx(out.metrics[ours_name].item(), rel=1e-4)
    mean = out.metrics["loss_sum"] / out.metrics["n_selected"]
    assert metrics["distillation/loss_selected"] == pytest.approx(mean.item(), rel=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_share_does_not_shrink_the_step(aggregation):
    """Equal losses everywhere: whatever is selected, loss and gradient of the sum are those of all tokens."""
    student, teacher = (x[:1].expand(N, VOCAB).clone() for x in pair())
    got = []
    for fraction in (0.25, 1.0):
        with patch_verl(fraction=fraction, selector="prefix"):
            loss, gradient, _ = run(student, teacher, settings(aggregation=aggregation))
        got.append((loss, gradient.sum(0)))
    assert got[0][0].item() == pytest.approx(got[1][0].item(), rel=PEER)
    assert_gradient(got[0][1], got[1][1], PEER)


def test_verl_s_clamp_of_losses_comes_before_the_rescaling():
    student, teacher = pair(noise=6.0)
    out, _ = ours(student, teacher, num_items=100, divergence=TopKForwardKL(K), fraction=0.25)
    with patch_verl(fraction=0.25):
        loss, gradient, metrics = run(student, teacher, settings(loss_max_clamp=5.0))
    log_q, ids = teacher.log_softmax(-1).topk(K)
    losses = (log_q.exp() * (log_q - student.log_softmax(-1).gather(-1, ids))).sum(-1)[out.selected]
    assert 0 < (losses > 5).sum() < len(losses)
    factor = out.metrics["n_valid"] / out.metrics["n_selected"] / 100
    assert loss.item() == pytest.approx((losses.clamp(0, 5).sum() * factor).item(), rel=PEER)
    assert torch.equal(gradient.any(-1).nonzero()[:, 0], out.selected.nonzero()[:, 0][(losses > 0) & (losses < 5)])
    assert metrics["distillation/loss_max"].aggregate() == pytest.approx(losses.max().item(), rel=PEER)


def test_prompt_and_tool_rows_are_never_selected():
    student, teacher = pair()
    mask = response_rows()
    student[~mask] *= 10  # the largest divergences of all
    with patch_verl(fraction=0.5, selector="divergence"):
        _, gradient, _ = run(student, teacher, settings())
    assert gradient[mask].any()
    assert not gradient[~mask].any()


class _Overwriting(torch.autograd.Function):
    """A loss whose backward writes its gradient over the logits, unseen by autograd, as flash-attn's cross entropy does."""

    @staticmethod
    def forward(ctx, logits):
        ctx.logits = logits
        return logits.sum()

    @staticmethod
    def backward(ctx, dsum):
        ctx.logits.data.fill_(1.0)
        return ctx.logits.detach().clone() * dsum


def test_logits_that_the_log_probabilities_backward_overwrites_still_give_the_gradient():
    student, teacher = pair()
    _, want = ours(student, teacher, num_items=100, divergence=TopKForwardKL(K), fraction=0.25)
    x = leaf(student)
    logits = x * 1.0
    data = micro_batch(teacher, distillation_only=False)
    with patch_verl(fraction=0.25):
        loss, _ = step(logits, data, *settings())
        (loss + _Overwriting.apply(logits)).backward()  # made last, so it runs backward first
    assert logits.detach().eq(1).all()
    assert_gradient(x.grad - 1, want, 1e-4)


def test_a_nan_of_the_student_is_never_hidden():
    student, teacher = pair()
    student[response_rows().nonzero()[4], 0] = math.nan
    for distillation_only in (True, False):
        with patch_verl(fraction=0.25):
            loss, gradient, _ = run(student, teacher, settings(), distillation_only=distillation_only)
        assert loss.isnan()
        assert gradient.isnan().any()


def test_other_loss_modes_stay_verl_s():
    student, teacher = pair()
    want = run(student, teacher, settings("forward_kl_topk"))
    with patch_verl(fraction=0.1):
        got = run(student, teacher, settings("forward_kl_topk"))
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])


def test_the_patch_is_undone():
    before = hooks.compute_topk_loss, hooks.distillation_loss, dict(hooks.DISTILLATION_LOSS_REGISTRY)
    with pytest.raises(ValueError, match=r"^inside$"), patch_verl():
        raise ValueError("inside")
    patch = patch_verl()
    assert MODE in hooks.DISTILLATION_LOSS_REGISTRY
    with pytest.raises(RuntimeError, match="is registered already; undo"):
        patch_verl()
    patch.undo()
    patch.undo()
    assert (hooks.compute_topk_loss, hooks.distillation_loss, dict(hooks.DISTILLATION_LOSS_REGISTRY)) == before
    with pytest.raises(ValueError, match="selective_opd"):
        settings()


@pytest.mark.parametrize("name", ["compute_topk_loss", "distillation_loss"])
def test_undo_refuses_below_somebody_else_s_replacement(name, monkeypatch):
    before = getattr(hooks, name)
    patch = patch_verl()
    monkeypatch.setattr(hooks, name, lambda *_: None)
    with pytest.raises(RuntimeError, match=rf"{name} is .*put there after this patch.*, then undo this"):
        patch.undo()
    assert MODE in hooks.DISTILLATION_LOSS_REGISTRY
    monkeypatch.undo()
    patch.undo()
    assert getattr(hooks, name) is before
    assert MODE not in hooks.DISTILLATION_LOSS_REGISTRY


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractoin": 0.1}, TypeError, "settings: got 'fractoin', an unknown name; did you mean 'fraction'?"),
        ({"fraction": 1.5}, ValueError, "fraction: got 1.5, expected"),
        ({"denominator": "valid"}, TypeError, "denominator: got a setting that this function does not read"),  # verl reduces
        ({"selector": "tip"}, ValueError, "selector: got 'tip', which needs the teacher's whole row"),
        ({"divergence": JSD()}, ValueError, "divergence: got 'jsd', which TopKLogprobs cannot give"),
        ({"mask": None}, TypeError, "mask: got it among the settings of the loss"),
        ({"scope": "global"}, ValueError, "scope: got 'global', but this host cannot share a budget among ranks; expected"),
        ({"scope": "sequence", "selection_group": dist.ProcessGroup(0, 2)}, ValueError, "selection_group: got a group, but"),
    ],
)
def test_bad_options_are_refused_before_anything_is_patched(options, error, message):
    with pytest.raises(error, match=message):
        patch_verl(**options)
    assert MODE not in hooks.DISTILLATION_LOSS_REGISTRY


def test_settings_may_be_an_object():
    student, teacher = pair()
    options, runs = {"fraction": 0.25, "divergence": "local_support", "selector": "entropy"}, []
    for patch in (lambda: patch_verl(**options), lambda: patch_verl(Settings(**options))):
        with patch():
            runs.append(run(student, teacher, settings())[:2])
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    with pytest.raises(TypeError, match="denominator: got 'valid' in settings, which this function does not read"):
        patch_verl(Settings(divergence="local_support", denominator="valid"))
    assert MODE not in hooks.DISTILLATION_LOSS_REGISTRY


@pytest.mark.parametrize("name", ["compute_topk_loss", "distillation_loss"])
def test_it_rejects_another_hook(name, monkeypatch):
    monkeypatch.setattr(hooks, name, lambda config, student_logits: None)
    with pytest.raises(RuntimeError, match=rf"{name} takes \(config, student_logits\), expected .* fits verl 0\.9\.1"):
        patch_verl()
    monkeypatch.delattr(hooks, name)
    with pytest.raises(RuntimeError, match="has no function of that name"):
        patch_verl()
    assert MODE not in hooks.DISTILLATION_LOSS_REGISTRY


REFUSED = [
    ({}, {"strategy": "megatron"}, "strategy: got 'megatron', expected one of: fsdp"),
    ({}, {"aggregation": "seq-mean-token-mean"}, "loss_agg_mode: got 'seq-mean-token-mean'"),
    ({}, {"use_policy_gradient": True}, "use_policy_gradient: got True, expected False"),
    ({"divergence": "tail_aware"}, {"log_prob_min_clamp": -10.0}, "log_prob_min_clamp: got -10, expected null"),
    ({"divergence": TailAware(4)}, {"log_prob_min_clamp": -10.0}, "log_prob_min_clamp: got -10, expected null"),
]


@pytest.mark.parametrize(("options", "config", "message"), REFUSED)
def test_it_rejects_settings_that_it_does_not_have(options, config, message):
    with patch_verl(**options), pytest.raises(ValueError, match=message):
        run(*pair(), settings(**config))


def test_it_rejects_sequence_parallelism_other_rows_and_other_engines(monkeypatch):
    student, teacher = pair()
    with pytest.raises(ValueError, match="divergence: got 'reverse_kl', expected one of: forward_kl_topk"):
        patch_verl(divergence="reverse_kl")
    with patch_verl():
        data = micro_batch(teacher)
        with pytest.raises(ValueError, match=r"student_logits: got shape \(1, 30, 131\), expected \(1, 31, V\)"):
            distillation_ppo_loss(*settings(), data=data, student_logits=student[None, 1:])
        with pytest.raises(ValueError, match="did not go through patch_verl"):
            distillation_ppo_loss(*settings(), model_output={"distillation_losses": torch.zeros(N)}, data=data)
        monkeypatch.setattr("opd_ops.integrations.verl.get_ulysses_sequence_parallel_world_size", lambda: 2)
        with pytest.raises(ValueError, match="ulysses_sequence_parallel_size: got 2, expected 1"):
            run(student, teacher, settings())


def test_accumulated_micro_batches_are_one_batch():
    """Whole budgets per sequence: two micro-batches of the same tokens give twice one's gradient at the same count."""
    student, teacher = pair()
    with patch_verl(fraction=0.5, scope="sequence", selector="entropy"):
        once = run(student, teacher, settings(), num_items=23)[1]
        twice = sum(run(student, teacher, settings(), num_items=46)[1] for _ in range(2))
    assert_gradient(twice, once, 1e-6)


@pytest.mark.full
def test_a_module_named_in_the_environment_patches_every_process(tmp_path):
    (tmp_path / "my_opd.py").write_text("from opd_ops.integrations.verl import patch_verl\npatch_verl(fraction=0.1)\n")
    code = "import verl; from verl.workers.config import DistillationLossConfig; "
    code += "print(DistillationLossConfig(loss_mode='selective_opd').loss_mode)"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "my_opd"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == MODE
