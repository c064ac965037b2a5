"""The selective loss inside Hugging Face's `Trainer`, in real runs of tiny models: as a mixin and as a compute_loss_func.

  Compared: loss and gradient norm with the same put together by hand from the models' logits; micro-batches with whole ones;
  batches without labels with the same rows and labels on what is no padding.
  Run: make test ARGS=tests/integrations/test_hf.py

Not here: TRL (test_trl.py).
"""

import os
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Trainer,
    TrainingArguments,
)

from opd_ops import LinearHead, SampledToken, Settings, selective_opd_loss
from opd_ops.backends import eager
from opd_ops.inputs.sources import Source
from opd_ops.integrations import hf, trl
from opd_ops.integrations.heads import head_of, last_hidden, logit_scale
from opd_ops.integrations.hf import SelectiveComputeLoss, SelectiveDistillationTrainer
from tests.integrations.models import VOCAB, language_model
from tests.support.cases import generator

LENGTH, PROMPT = 12, 4


def rollouts(n=8):
    """Sequences with their prompts ignored, of unequal length (padded by ignored labels)."""
    ids = torch.randint(3, VOCAB, (n, LENGTH), generator=generator(0))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    for i in range(n):
        labels[i, LENGTH - i % 4 :] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def padded(side, n=8):
    """Sequences without labels, half of each of them padding on one side."""
    ids = torch.randint(3, VOCAB, (n, LENGTH), generator=generator(0))
    mask = torch.zeros(n, LENGTH, dtype=torch.long)
    mask[:, slice(LENGTH // 2, None) if side == "left" else slice(LENGTH // 2)] = 1
    return Dataset.from_dict({"input_ids": ids.masked_fill(mask == 0, 0).tolist(), "attention_mask": mask.tolist()})


def stacked(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def run(folder, *, batch=8, accumulation=1, steps=1, trainer=SelectiveDistillationTrainer, student=None, data=None, **options):
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=steps,
        learning_rate=0.0, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        train_sampling_strategy="sequential", per_device_eval_batch_size=8, remove_unused_columns=False,
    )  # fmt: skip
    made = trainer(
        language_model(1) if student is None else student,
        arguments,
        train_dataset=rollouts() if data is None else data,
        eval_dataset=rollouts() if data is None else data,
        data_collator=stacked,
        **options,
    )
    made.train()
    return made


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def by_hand(fraction, **options):
    """Loss and gradient norm from both models' logits."""
    student, teacher = language_model(1), language_model(2, width=48)
    batch = stacked(list(rollouts()))
    with torch.no_grad():
        u = teacher(batch["input_ids"]).logits
    out = selective_opd_loss(student(batch["input_ids"]).logits, u, labels=batch["labels"], fraction=fraction, **options)
    out.loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    return out, norm.item()


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_the_mixin_trains_on_hidden_states_as_on_logits(tmp_path, fraction):
    made = run(tmp_path, teacher=language_model(2, width=48), settings=Settings(fraction=fraction))
    want, norm = by_hand(fraction)
    assert logged(made, "loss")[0] == pytest.approx(want.loss.item(), rel=1e-4)
    assert logged(made, "grad_norm")[0] == pytest.approx(norm, rel=1e-4)
    for name in hf.LOGGED:
        assert logged(made, f"opd/{name}")[0] == pytest.approx(want.metrics[name].item(), rel=1e-4)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_micro_batches_take_the_step_of_the_whole_batch(tmp_path, fraction):
    options = {"teacher": language_model(2, width=48)}
    options["settings"] = Settings(fraction=fraction, selector="entropy", scope="sequence", denominator="valid")
    whole, parts = run(tmp_path, **options), run(tmp_path, batch=2, accumulation=4, **options)
    for name in ("loss", "grad_norm"):
        assert logged(parts, name)[0] == pytest.approx(logged(whole, name)[0], rel=1e-4)
    assert logged(whole, "grad_norm")[0] > 0


def test_evaluation_takes_every_token(tmp_path):
    made = run(tmp_path, teacher=language_model(2, width=48), settings=Settings(fraction=0.1))
    want, _ = by_hand(1.0, selector="all")
    assert made.evaluate()["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-4)
    assert logged(made, "eval_opd/n_selected")[0] == want.metrics["n_valid"]


@pytest.mark.parametrize("selection", [{"threshold": 1e9}, {"threshold": 0.5, "fraction": 0.1, "selector": "tip"}])
def test_evaluation_depends_on_no_option_of_the_selection(tmp_path, selection):
    made = run(tmp_path, teacher=language_model(2, width=48), settings=Settings(**selection))
    want, _ = by_hand(1.0, selector="all")
    assert made.evaluate()["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-4)
    assert logged(made, "eval_opd/n_selected")[0] == want.metrics["n_valid"]


def padded_result(data, side):
    """What a padded batch without labels gives by hand: the loss over its rows that predict a token of the text."""
    batch = stacked(list(data))
    real = slice(LENGTH // 2, LENGTH - 1) if side == "left" else slice(LENGTH // 2 - 1)
    mask = torch.zeros_like(batch["attention_mask"])
    mask[:, real] = 1
    student, teacher = language_model(1), language_model(2, width=48)
    with torch.no_grad():
        u = teacher(**batch).logits
    out = selective_opd_loss(student(**batch).logits, u, mask=mask, selector="entropy", fraction=0.5)
    out.loss.backward()
    return out, torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm().item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_without_labels_trains_on_no_padding(tmp_path, side):
    data = padded(side)
    made = run(tmp_path, data=data, teacher=language_model(2, width=48), settings=Settings(selector="entropy", fraction=0.5))
    want, norm = padded_result(data, side)
    assert logged(made, "opd/n_valid")[0] == 8 * (LENGTH // 2 - 1)
    assert logged(made, "loss")[0] == pytest.approx(want.loss.item(), rel=1e-4)
    assert logged(made, "grad_norm")[0] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "labels: got none, and no attention_mask, which would say what is padding; .*labels, -100 on what is not trained"),
        (
            {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)},
            r"attention_mask: got shape \(2, 1, 12, 12\), expected \(B, T\)",
        ),
    ],
)
def test_a_batch_that_does_not_say_what_is_padding_is_refused(tmp_path, inputs, message):
    made = run(tmp_path, teacher=language_model(2, width=48))
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator(0))
    with pytest.raises(ValueError, match=message):
        made.compute_loss(made.model, {"input_ids": ids, **inputs})


def test_compute_loss_func_refuses_a_batch_without_labels(tmp_path):
    student = language_model(1)
    function = SelectiveComputeLoss(student, language_model(2, width=48))
    with pytest.raises(ValueError, match=r"labels: got none, expected labels in the batch.*SelectiveDistillationMixin"):
        run(tmp_path, data=padded("left"), trainer=Trainer, student=student, compute_loss_func=function)


def flattened(n):
    """The rows of `rollouts(n)` in one row, without padding, with their boundaries; and the same rows by themselves."""
    rows = [
        {"input_ids": row["input_ids"][: LENGTH - i % 4], "labels": row["labels"][: LENGTH - i % 4]}
        for i, row in enumerate(rollouts(n))
    ]
    return dict(DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)), stacked(list(rollouts(n)))


@pytest.mark.parametrize("adapter", ["mixin", "function"])
def test_boundaries_separate_the_sequences_of_a_batch_without_padding(tmp_path, adapter):
    """One budget a sequence: half of its tokens, whatever the batch looks like."""
    settings = Settings(scope="sequence", fraction=0.5, selector="prefix")
    student, teacher = language_model(1), language_model(2, width=48)
    losses = []
    for batch in flattened(4):
        if adapter == "mixin":
            made = SelectiveDistillationTrainer(
                student, TrainingArguments(str(tmp_path), use_cpu=True), teacher=teacher, settings=settings
            )
            losses.append(made.compute_loss(student, batch).item())
        else:
            function = SelectiveComputeLoss(student, teacher, settings)
            labels = batch.pop("labels")
            losses.append(function(student(**batch, use_cache=False), labels).item())
            function.remove()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] > 0


def test_compute_loss_func_takes_shifted_labels_which_the_trainer_counts():
    student, batch = language_model(1), stacked(list(rollouts()))
    function = SelectiveComputeLoss(student, language_model(2, width=48), fraction=1.0)
    shifted = torch.full_like(batch["labels"], -100)
    shifted[:, 5:7] = 1
    function(student(input_ids=batch["input_ids"], shift_labels=shifted), batch["labels"])
    assert function.metrics["n_valid"] == 16


def test_compute_loss_func_gives_the_teacher_every_input_of_the_student():
    student, seen = language_model(1), []
    teacher = language_model(2, width=48)
    teacher.register_forward_pre_hook(lambda _, __, inputs: seen.append(set(inputs)), with_kwargs=True)
    function = SelectiveComputeLoss(student, teacher)
    batch, _ = flattened(2)
    labels = batch.pop("labels")
    function(student(**batch, num_items_in_batch=4), labels)
    assert seen == [{*batch, "use_cache"}]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"compute_metrics": lambda _: {}}, {}, "compute_metrics: got a function, expected None"),
        ({"preprocess_logits_for_metrics": lambda x, _: x}, {}, "preprocess_logits_for_metrics: got a function"),
        ({}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, expected 0"),
    ],
)
def test_the_mixin_refuses_what_needs_logits(tmp_path, options, arguments, message):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **arguments)
    with pytest.raises(ValueError, match=message):
        SelectiveDistillationTrainer(language_model(1), arguments, teacher=language_model(2), **options)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_loss_is_scaled_by_the_ranks_that_have_batches_of_their_own(tmp_path, monkeypatch, tensor_parallel):
    made = run(tmp_path, teacher=language_model(2, width=48))
    batch = stacked(list(rollouts()))
    alone = made.compute_loss(made.model, batch, num_items_in_batch=60).item()
    assert alone > 0
    monkeypatch.setattr(type(made.accelerator), "num_processes", property(lambda _: 4))
    monkeypatch.setattr(made, "get_tp_size", lambda: tensor_parallel)
    assert made.compute_loss(made.model, batch, num_items_in_batch=60).item() == pytest.approx(4 // tensor_parallel * alone)


def test_the_teacher_may_be_a_callable_and_the_student_lora(tmp_path):
    teacher = language_model(2, width=48)
    student = get_peft_model(language_model(1), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    seen = []

    def same_inputs(inputs):
        seen.append(set(inputs))
        with torch.no_grad():
            return teacher(inputs["input_ids"]).logits

    made = run(tmp_path, student=student, teacher=same_inputs, settings=Settings(fraction=0.5))
    assert seen == [{"input_ids"}]
    assert logged(made, "grad_norm")[0] > 0


def test_without_a_teacher_it_says_so(tmp_path):
    with pytest.raises(TypeError, match="teacher: got str, expected a model, or a callable of the inputs"):
        run(tmp_path, teacher="Qwen")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractoin": 0.1}, TypeError, "settings: got 'fractoin', an unknown name; did you mean 'fraction'?"),
        ({"fraction": 0}, ValueError, "fraction: got 0, expected"),
        ({"labels": None}, TypeError, "labels: got an argument of a batch, which is not taken here"),
        (
            {"divergence": SampledToken(ratio="is")},
            ValueError,
            "old_logprobs: got None, but divergence 'sampled' has",
        ),
    ],
)
def test_bad_options_are_refused_before_any_training(options, error, message):
    with pytest.raises(TypeError, match="settings: got dict, expected Settings"):
        SelectiveDistillationTrainer(None, teacher=lambda inputs: None, settings=options)
    student = language_model(1)
    with pytest.raises(error, match=message):
        SelectiveComputeLoss(student, language_model(2), **options)
    assert not student._forward_pre_hooks


@pytest.mark.parametrize("accumulation", [1, 4])
def test_compute_loss_func_in_a_plain_trainer(tmp_path, accumulation):
    student = language_model(1)
    options = {"selector": "entropy", "scope": "sequence", "denominator": "valid", "fraction": 0.25}
    function = SelectiveComputeLoss(student, language_model(2, width=48), **options)
    made = run(
        tmp_path,
        batch=8 // accumulation,
        accumulation=accumulation,
        trainer=Trainer,
        student=student,
        compute_loss_func=function,
    )
    want, norm = by_hand(**options)
    assert logged(made, "loss")[0] == pytest.approx(want.loss.item(), rel=1e-4)
    assert logged(made, "grad_norm")[0] == pytest.approx(norm, rel=1e-4)
    assert function.metrics["n_selected"] > 0
    function.remove()
    assert not student._forward_pre_hooks


def test_compute_loss_func_evaluates_on_every_token(tmp_path):
    student = language_model(1)
    function = SelectiveComputeLoss(student, language_model(2, width=48), fraction=0.1, threshold=1e9)
    made = run(tmp_path, trainer=Trainer, student=student, compute_loss_func=function)
    want, _ = by_hand(1.0, selector="all")
    assert made.evaluate()["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-4)
    assert function.metrics["n_selected"] == want.metrics["n_valid"]


def ranks_result():
    """On each rank: the loss of its own batch, in evaluation, where training has one budget over all ranks."""
    student, rank = language_model(1), torch.distributed.get_rank()
    function = SelectiveComputeLoss(student, language_model(2, width=48), fraction=0.1, scope="global")
    own = {name: column[2 * rank : 2 * rank + 2] for name, column in stacked(list(rollouts())).items()}
    with torch.no_grad():
        outputs = student(input_ids=own["input_ids"])
        loss = function(outputs, own["labels"])
    want = selective_opd_loss(
        outputs.logits, function.teacher(own["input_ids"]).logits, labels=own["labels"], selector="all", fraction=1.0
    )
    assert loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert loss > 0


@pytest.mark.full
def test_evaluation_on_ranks_is_each_rank_s_own(ranks):
    ranks.run(ranks_result)


def training_result(folder, adapter):
    """On each rank: loss and gradient norm that the Trainer logs of a step of four ranks with two rows each."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    launcher = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    options = {"selector": "entropy", "scope": "sequence", "denominator": "valid", "fraction": 0.25}
    student, teacher = language_model(1), language_model(2, width=48)
    with mock.patch.dict(os.environ, {name: str(value) for name, value in launcher.items()}):
        if adapter == "mixin":
            made = run(folder, batch=2, student=student, teacher=teacher, settings=Settings(**options))
        else:
            function = SelectiveComputeLoss(student, teacher, **options)
            made = run(folder, batch=2, trainer=Trainer, student=student, compute_loss_func=function)
    n_ranks = made.args.world_size
    AcceleratorState._reset_state(True)  # the next function of these processes begins without it
    want, norm = by_hand(**options)
    return n_ranks, logged(made, "loss")[0] / want.loss.item(), logged(made, "grad_norm")[0] / norm


@pytest.mark.full
@pytest.mark.parametrize("adapter", ["mixin", "function"])
def test_ranks_take_the_step_of_the_whole_batch(tmp_path, ranks, adapter):
    for n_ranks, loss, norm in ranks.run(training_result, tmp_path, adapter):
        assert n_ranks == 4
        assert loss == pytest.approx(1, rel=1e-4)
        assert norm == pytest.approx(1, rel=1e-4)


def model_of_family(family):
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0)).eval()
    return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0)).eval()


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "granite"])
def test_the_head_gives_the_model_s_own_logits(family):
    model = language_model(3).eval() if family == "qwen2" else model_of_family(family)
    ids = torch.randint(3, VOCAB, (2, 7), generator=generator(1))
    with torch.no_grad():
        want = model(ids).logits
        hidden, outputs = last_hidden(model, model, {"input_ids": ids})
        head = head_of(model, hidden)
        got = eager.logits(Source.of(head, VOCAB, 1.0), torch.arange(14), torch.float32).view(2, 7, -1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert outputs.logits.shape[1] == 1
    assert logit_scale(model.config) == (0.25 if family == "granite" else 1.0)
    assert head.softcap == (3.0 if family == "gemma2" else None)


def test_a_sharded_head_is_gathered_for_both_adapters():
    head = torch.nn.Linear(8, VOCAB)
    hidden = torch.randn(3, 8, generator=generator(0))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = torch.nn.Linear(8, VOCAB)
        for name in ("weight", "bias"):
            tensor = distribute_tensor(getattr(head, name).detach().clone(), mesh, [Shard(0)])
            setattr(sharded, name, torch.nn.Parameter(tensor))
        gathered = LinearHead.from_module(hidden, sharded)
        trl_head = trl._head(hidden, sharded.weight, sharded.bias, 1.0, None)
        for got in (gathered, trl_head):
            assert torch.equal(got.weight, head.weight)
            assert torch.equal(got.bias, head.bias)
        in_bf16 = trl._head(hidden.bfloat16(), sharded.weight, sharded.bias, 1.0, None)
        assert in_bf16.weight.dtype == in_bf16.bias.dtype == torch.bfloat16
        assert torch.equal(in_bf16.bias, head.bias.bfloat16())
        (trl_head.weight.sum() + gathered.weight.sum()).backward()
        assert torch.equal(sharded.weight.grad.full_tensor(), torch.full_like(head.weight, 2.0))
    finally:
        torch.distributed.destroy_process_group()
