"""The selective loss inside TRL 1.16's `DistillationTrainer`, in real runs: patched, subclassed, with and without LoRA.

  Compared: with TRL's own loss at fraction 1: loss, grad_norm and entropy of every step, at 1 and 2 accumulation steps.
  Run: make test ARGS=tests/integrations/test_trl.py

Not here: TRL's loss function against the equations (tests/parity/test_trl.py).
"""

from dataclasses import fields
from functools import partial

import pytest
import torch
from peft import LoraConfig
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDTrainer
from trl.trainer import distillation_trainer

from opd_ops import JSD, ImportanceWeighted, Settings, selective_opd_loss
from opd_ops.integrations import trl
from opd_ops.integrations.trl import (
    SelectiveDistillationConfig,
    SelectiveDistillationTrainer,
    align_teacher_vocab,
    generalized_jsd_loss,
    patch_trl,
)
from tests.integrations.models import VOCAB, language_model, prompts, tokenizer
from tests.parity.formulas import jsd, logits_of
from tests.support.cases import generator, gradients, head_pair, leaf, leaf_head, logit_pair, to_double
from tests.support.tolerances import assert_gradient, relative_error

pytestmark = pytest.mark.full  # importing the peer takes seconds in each process
LOGGED = ("loss", "grad_norm", "entropy")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
HOOK = distillation_trainer._chunked_divergence_loss


@pytest.fixture(autouse=True)
def _patches_end_with_the_test():
    yield
    assert distillation_trainer._chunked_divergence_loss is HOOK


def train(folder, *, steps=2, accumulation=1, lora=False, trainer=DistillationTrainer, config=DistillationConfig, **options):
    """The trainer after some steps."""
    arguments = config(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        max_completion_length=8,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=3,
        save_strategy="no",
        disable_tqdm=True,
        **{"learning_rate": 1e-2, **options},
    )
    made = trainer(
        language_model(1),
        language_model(2, width=48),
        args=arguments,
        train_dataset=prompts(),
        eval_dataset=prompts(4),
        processing_class=tokenizer(),
        peft_config=LORA if lora else None,
    )
    made.train()
    return made


def logs(trainer, names=LOGGED):
    """(steps, names) of what was logged at each step."""
    rows = [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]
    assert rows
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize("lora", [False, True])
def test_fraction_one_reproduces_trl(tmp_path, accumulation, lora):
    want = logs(train(tmp_path, accumulation=accumulation, lora=lora))
    with patch_trl(fraction=1.0):
        got = logs(train(tmp_path, accumulation=accumulation, lora=lora))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)  # grad_norm 5.2e-7 measured
    assert (want > 0).all()


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.full), 0.5])
def test_the_trainer_s_beta_and_temperature_are_kept(tmp_path, beta):
    options = {"beta": beta, "temperature": 0.8}
    want = logs(train(tmp_path, **options))
    with patch_trl(fraction=1.0):
        got = logs(train(tmp_path, **options))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)  # beta 0: grad_norm 2.3e-6 measured


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_quarter_of_the_tokens_does_not_shrink_the_step(tmp_path, accumulation):
    got = []
    options = {"steps": 4, "accumulation": accumulation, "learning_rate": 0.0}  # the same models and rollouts in every run
    with patch_trl(fraction=0.25, on_metrics=got.append):
        quarter = logs(train(tmp_path, **options))
    with patch_trl(fraction=0.25, denominator="valid"):
        shrunk = logs(train(tmp_path, **options))
    whole = logs(train(tmp_path, **options))
    _, grad_norm, entropy = (quarter / whole).mean(0)
    sums = torch.tensor([[m["n_valid"] * m["kl_selected"], m["n_valid"]] for m in got]).view(4, accumulation, 2).sum(1)
    assert relative_error(quarter[:, 0], sums[:, 0] / sums[:, 1]) < 1e-5  # beta 1: reverse KL, a mean over selected tokens
    assert grad_norm > 0.8
    assert entropy == pytest.approx(1.0, rel=1e-5)  # of all tokens, as TRL logs it
    # What leaving the host's count of all tokens alone would do to the step.
    assert (shrunk / whole).mean(0)[1] < 0.5
    assert len(got) == 4 * accumulation
    assert all(0 < m["n_selected"] <= 0.25 * m["n_valid"] + 1 for m in got)


def test_the_hook_divides_by_the_selected_share_of_the_host_s_count():
    """sum over selected tokens of JSD_beta / (num_items n_selected / n_valid), and its gradients."""
    student, teacher = head_pair((3, 10), 131, bias=True, scale=0.6, softcap=8.0)
    mask = torch.rand(3, 10, generator=generator(0)) > 0.3
    selected = selective_opd_loss(student, teacher, mask=mask, fraction=0.25, divergence=JSD(0.3), temperature=0.8).selected
    want, got = leaf_head(student, torch.float64), leaf_head(student)
    per_token = jsd(logits_of(want) / 0.8, logits_of(to_double(teacher)) / 0.8, 0.3)
    expected = per_token[selected].sum() / (50 * selected.sum() / mask.sum())
    expected.backward()
    with patch_trl(fraction=0.25):
        loss, _, n_valid = distillation_trainer._chunked_divergence_loss(
            got.hidden,
            teacher.hidden,
            got.weight,
            teacher.weight,
            mask,
            0.3,
            num_items_in_batch=torch.tensor(50.0),
            student_lm_head_bias=got.bias,
            teacher_lm_head_bias=teacher.bias,
            student_logit_scale=got.scale,
            teacher_logit_scale=teacher.scale,
            student_final_logit_softcapping=got.softcap,
            teacher_final_logit_softcapping=teacher.softcap,
            temperature=0.8,
        )
    loss.backward()
    assert 0 < selected.sum() < n_valid == mask.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients(got), gradients(want), strict=True):
        assert_gradient(a, b)


def test_a_head_that_zero3_partitions_is_gathered(monkeypatch):
    monkeypatch.setattr("opd_ops.inputs.unshard.whole_of_zero3", lambda parameter: parameter.whole)
    head, _ = head_pair((4,), 31, bias=True)
    weight, bias = leaf(torch.empty(0)), leaf(torch.empty(0))
    for parameter, whole in ((weight, head.weight), (bias, head.bias)):
        parameter.ds_id, parameter.ds_status, parameter.whole = 0, None, whole
    gathered = trl._head(head.hidden, weight, bias, 1.0, None)
    assert gathered.weight is head.weight
    assert gathered.bias is head.bias


def test_a_plain_call_stays_until_it_is_undone():
    patched = patch_trl(fraction=0.5)
    assert distillation_trainer._chunked_divergence_loss is not HOOK
    with patch_trl(fraction=0.25) as inner:
        patched.undo()  # another is on top: nothing to do
        assert distillation_trainer._chunked_divergence_loss is inner._own
    patched.undo()
    patched.undo()
    assert distillation_trainer._chunked_divergence_loss is HOOK


def test_patches_undone_out_of_order_leave_nothing_behind():
    first, second = patch_trl(), patch_trl()
    first.undo()
    assert distillation_trainer._chunked_divergence_loss is second._own
    second.undo()
    assert distillation_trainer._chunked_divergence_loss is HOOK


def test_undo_refuses_below_somebody_else_s_replacement(monkeypatch):
    patched = patch_trl()
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", partial(patched._own, temperature=2.0))
    with pytest.raises(RuntimeError, match=r"_chunked_divergence_loss is .*put there after this patch.*, then undo this"):
        patched.undo()
    monkeypatch.undo()
    patched.undo()
    assert distillation_trainer._chunked_divergence_loss is HOOK


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractoin": 0.1}, TypeError, "settings: got 'fractoin', an unknown name; did you mean 'fraction'?"),
        ({"fraction": 1.5}, ValueError, "fraction: got 1.5, expected"),
        ({"temperature": 0.8}, TypeError, "temperature: got it among the settings of the loss, but the host passes its own"),
        ({"divergence": "sampled"}, ValueError, "tokens: got None"),
        ({"divergence": ImportanceWeighted(JSD())}, ValueError, "old_logprobs: got None, but divergence 'importance_weighted'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_patched(options, error, message):
    with pytest.raises(error, match=message):
        patch_trl(**options)
    assert distillation_trainer._chunked_divergence_loss is HOOK


def test_settings_as_an_object_are_refused_alike():
    with pytest.raises(TypeError, match="temperature: got it among the settings of the loss, but the host passes its own"):
        patch_trl(Settings(temperature=0.8))
    with pytest.raises(ValueError, match="tokens: got None"):
        patch_trl(Settings(divergence="sampled"))
    with pytest.raises(TypeError, match="settings: got them and fraction"):
        patch_trl(Settings(), fraction=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "best"}, "selector: got 'best'"),
        ({"divergence": "l2"}, "divergence: got 'l2'"),
        ({"support_top_k": 0}, "top_k: got 0"),
        ({"loss_backend": "cuda"}, "backend: got 'cuda'"),
    ],
)
def test_the_config_refuses_what_the_loss_does(options, message):
    with pytest.raises(ValueError, match=message):
        SelectiveDistillationConfig("nowhere", report_to="none", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("hook", [lambda hidden, weight: None, None])
def test_another_trl_is_refused_with_the_versions_that_fit(monkeypatch, hook):
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", hook)
    message = "has no function of that name" if hook is None else r"takes \(hidden, weight\)"
    with pytest.raises(RuntimeError, match=rf"_chunked_divergence_loss {message}, expected .* This adapter fits trl 1.16"):
        patch_trl()
    monkeypatch.undo()


def test_the_subclass_selects_and_logs_what_it_selected(tmp_path):
    options = {"fraction": 0.25, "selector": "entropy", "divergence": "forward_kl", "scope": "sequence"}
    made = train(tmp_path, trainer=SelectiveDistillationTrainer, config=SelectiveDistillationConfig, accumulation=2, **options)
    names = [f"opd/{name}" for name in trl.LOGGED]
    got = dict(zip(names, logs(made, names)[0].tolist(), strict=True))
    assert 0 < got["opd/n_selected"] < got["opd/n_valid"]
    assert got["opd/entropy_selected"] > 0
    assert got["opd/n_infinite"] == 0
    with patch_trl(**options):
        same = train(tmp_path, accumulation=2)
    assert torch.equal(logs(made), logs(same))


def test_the_subclass_refuses_to_train_inside_a_patch(tmp_path):
    message = r"trl: patch_trl is active around a SelectiveDistillationTrainer.* undo\(\) the patch"
    with patch_trl(fraction=1.0), pytest.raises(RuntimeError, match=message):
        train(tmp_path, trainer=SelectiveDistillationTrainer, config=SelectiveDistillationConfig, steps=1)


def test_the_config_hides_no_option_of_trl():
    ours = set(SelectiveDistillationConfig.__annotations__)
    assert "fraction" in ours
    assert not ours & {option.name for option in fields(DistillationConfig)}
    assert all(option.metadata["help"] for option in fields(SelectiveDistillationConfig) if option.name in ours)


def test_the_subclass_evaluates_on_every_token(tmp_path):
    made = train(tmp_path, trainer=SelectiveDistillationTrainer, config=SelectiveDistillationConfig, steps=1, fraction=0.05)
    assert made.evaluate()["eval_loss"] > 0
    got = made.state.log_history[-1]
    assert got["eval_opd/n_selected"] == got["eval_opd/n_valid"] > 0


def test_the_patch_evaluates_on_every_token(tmp_path):
    want = train(tmp_path, steps=1, learning_rate=0.0).evaluate()["eval_loss"]
    got = []
    with patch_trl(fraction=0.05, threshold=1e9, on_metrics=got.append):
        made = train(tmp_path, steps=1, learning_rate=0.0)
        assert got[-1]["n_selected"] == 0
        loss = made.evaluate()["eval_loss"]
        assert got[-1]["n_selected"] == got[-1]["n_valid"] > 0
    assert loss == pytest.approx(want, rel=1e-4)
    assert loss > 0


def test_the_subclass_rejects_another_config(tmp_path):
    with pytest.raises(TypeError, match="args: got DistillationConfig, expected a SelectiveDistillationConfig"):
        train(tmp_path, trainer=SelectiveDistillationTrainer)


def test_align_teacher_vocab_trains_as_slicing_does(tmp_path):
    student, teacher = language_model(1), language_model(2, vocab=VOCAB + 8)
    head = teacher.get_output_embeddings().weight.detach().clone()
    assert align_teacher_vocab(student, teacher) is teacher
    assert teacher.config.vocab_size == VOCAB
    assert torch.equal(teacher.get_output_embeddings().weight, head[:VOCAB])
    assert align_teacher_vocab(student, teacher) is teacher
    with pytest.raises(ValueError, match=r"teacher: has 64 entries, the student 72: .* student.resize_token_embeddings\(64\)"):
        align_teacher_vocab(language_model(1, vocab=72), teacher)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("has_labels", "options"),
    [(True, {}), (False, {}), (True, {"reduction": "sum"}), (True, {"num_items_in_batch": 50}), (True, {"temperature": 0.7})],
)
def test_generalized_jsd_loss_at_fraction_one_is_gkd_s(beta, has_labels, options):
    s, u = (x.view(3, 10, 97) for x in logit_pair(30, 97, scale=3.0))
    labels = torch.randint(0, 97, (3, 10), generator=generator(0))
    labels[torch.rand(3, 10, generator=generator(1)) < 0.3] = -100
    labels = labels if has_labels else None
    results = []
    for function in (partial(generalized_jsd_loss, fraction=1.0), GKDTrainer.generalized_jsd_loss):
        x = leaf(s)
        loss = function(x, u, labels, beta=beta, **options)
        loss.backward()
        results.append((loss, x.grad))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-5)
    assert_gradient(results[0][1], results[1][1])


def test_generalized_jsd_loss_evaluates_on_every_token():
    s, u = (x.view(2, 10, 97) for x in logit_pair(20, 97, scale=3.0))
    with torch.no_grad():
        whole, got = (generalized_jsd_loss(s, u, fraction=f, threshold=t) for f, t in ((1.0, None), (0.1, 1e9)))
    assert torch.equal(got, whole)
    assert got > 0


def test_generalized_jsd_loss_of_a_share_does_not_shrink():
    s, u = (x.view(3, 10, 97) for x in logit_pair(30, 97, scale=3.0))
    labels = torch.zeros(3, 10, dtype=torch.long)
    for options in ({}, {"reduction": "sum"}, {"num_items_in_batch": 30}):
        whole, share = (generalized_jsd_loss(s, u, labels, fraction=f, selector="random", **options) for f in (1.0, 0.5))
        assert 0.5 < share / whole < 2
    with pytest.raises(ValueError, match="reduction: got 'mean', expected 'batchmean' or 'sum'"):
        generalized_jsd_loss(s, u, labels, reduction="mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denominator": "sequence"}, "denominator: got 'sequence', a mean over responses, but this host"),
        ({"special_ids": [3]}, "special_ids: got ids, but this host passes no tokens"),
        ({"divergence": "sampled"}, "tokens: got None, but divergence 'sampled' reads the sampled token, which this host"),
    ],
)
def test_generalized_jsd_loss_refuses_what_gkd_does_not_pass(options, message):
    s, u = (x.view(2, 10, 97) for x in logit_pair(20, 97, scale=3.0))
    with pytest.raises(ValueError, match=message):
        generalized_jsd_loss(s, u, torch.zeros(2, 10), num_items_in_batch=20, **options)


def test_settings_as_an_object_bring_their_divergence():
    s, u = (x.view(2, 10, 97) for x in logit_pair(20, 97, scale=3.0))
    named = generalized_jsd_loss(s, u, beta=0.3, fraction=0.25, divergence="reverse_kl")
    assert generalized_jsd_loss(s, u, beta=0.3, settings=Settings(fraction=0.25)) == named
    assert generalized_jsd_loss(s, u, beta=0.3, fraction=0.25) != named


def test_gkd_takes_it_as_its_loss(monkeypatch):
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(partial(generalized_jsd_loss, fraction=0.2)))
    s, u = (x.view(2, 10, 97) for x in logit_pair(20, 97, scale=3.0))
    x = leaf(s)
    GKDTrainer.generalized_jsd_loss(student_logits=x, teacher_logits=u, labels=torch.zeros(2, 10), beta=0.5).backward()
    selected = selective_opd_loss(s, u, fraction=0.2, divergence=JSD(0.5)).selected
    assert selected.sum() == 4
    assert torch.equal(x.grad.norm(dim=-1) > 0, selected)
