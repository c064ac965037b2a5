"""The reference trainer: its step against the gradient written out; a run that was cut in two against one that was not, bit for
bit; what it writes.

Command: make test ARGS=tests/trainer/test_loop.py
Not here: several processes (test_processes.py), the command line (test_cli.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType
from transformers import AutoModelForCausalLM

from opd_ops import LinearHead, SampledToken, Settings, TopKLogprobs
from opd_ops.trainer import loop
from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.evaluation import accuracy, completions_of, held_out_metrics, is_exact_match
from opd_ops.trainer.loop import OPDTrainer
from opd_ops.trainer.models import load_model
from opd_ops.trainer.rollouts import Rollouts, head_over
from opd_ops.trainer.teachers import LocalTeacher
from tests.integrations.models import language_model, tokenizer
from tests.support.tolerances import assert_gradient, relative_error
from tests.trainer.runs import SMALL, prompts, trainer

NUMBERS = {"loss", "kl", "kl_selected", "entropy", "teacher_entropy", "support_mass", "grad_norm", "learning_rate", "n_valid"}


def _log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4, "lora_dropout": 0.2, "taught_by": None, "teacher_system": "w5 w6"}])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(options, tmp_path):
    options |= {"selector": "random", "lr_scheduler": "constant", "warmup_steps": 2}
    whole = trainer(tmp_path / "a", steps=4, **options)
    last = whole.train()
    trainer(tmp_path / "b", steps=2, **options).train()
    resumed = trainer(tmp_path / "b", steps=4, resume=True, **options)
    assert resumed.train() == last
    for (name, x), (_, y) in zip(whole.unwrapped.named_parameters(), resumed.unwrapped.named_parameters(), strict=True):
        assert torch.equal(x, y), name
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text()
    assert (tmp_path / "a" / "model" / "README.md").read_text().replace("/a", "/b") == (
        tmp_path / "b" / "model" / "README.md"
    ).read_text().replace("resume: true", "resume: false")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_fraction_and_weights_go_from_one_value_to_another_and_are_resumed_exactly(schedule, tmp_path):
    options = {"steps": 5, "save_every": 2, "keep_checkpoints": 9, "fraction": 0.9, "fraction_end": 0.1, "selector": "entropy"}
    options |= {"weighting": "entropy", "weight_mean": "selected", "weighting_share": 0.0, "weighting_share_end": 1.0}
    whole = trainer(tmp_path / "a", loss_schedule=schedule, **options)
    last = whole.train()
    want = [0.9, 0.7, 0.5, 0.3, 0.1]
    if schedule == "cosine":
        want = [0.5 + 0.4 * math.cos(math.pi * i / 4) for i in range(5)]
    rows = [row for row in _log(tmp_path / "a") if "loss" in row]
    assert [row["fraction"] for row in rows] == pytest.approx(want)
    shares = pytest.approx([(0.9 - x) / 0.8 for x in want])
    assert [row["weighting_share"] for row in rows] == shares
    assert [whole.config.settings(step).weighting_share for step in range(5)] == shares
    # Each micro-batch rounds up.
    assert all(-1e-6 < row["n_selected"] - x * row["n_valid"] < 5 for x, row in zip(want, rows, strict=True))
    assert "90 % to 10 % of the tokens" in (tmp_path / "a" / "model" / "README.md").read_text()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000005")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000004")
    resumed = trainer(tmp_path / "b", loss_schedule=schedule, resume=True, **options)
    assert resumed.train() == last
    for (name, x), (_, y) in zip(whole.unwrapped.named_parameters(), resumed.unwrapped.named_parameters(), strict=True):
        assert torch.equal(x, y), name
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"resume: .* is of another run: steps was 5 and is 6"):
        trainer(tmp_path / "b", loss_schedule=schedule, resume=True, **(options | {"steps": 6}))


def test_the_scheduled_share_of_a_weighting_reaches_the_loss(tmp_path):
    options = {"count": 1, "scope": "sequence", "selector": "prefix", "weighting": "iw", "divergence": "sampled"}
    trainer(tmp_path, steps=3, eval_size=0, weighting_share=0.2, weighting_share_end=1.0, **options).train()
    # The first token of an answer alone is trained on: IW gives it the weight 1.5.
    assert [row["weight"] for row in _log(tmp_path)] == pytest.approx([1 + 0.5 * share for share in (0.2, 0.6, 1.0)])


def test_a_count_and_a_weighting_are_those_of_the_loss(tmp_path):
    options = {"count": 2, "scope": "sequence", "weighting": "iw", "weight_mean": "selected"}
    run = trainer(tmp_path, steps=1, eval_size=0, divergence="sampled", **options)
    assert run.config.settings() == Settings(fraction=0.25, divergence=SampledToken(), **options)
    run.train()
    (row,) = _log(tmp_path)
    assert row["n_selected"] <= 2 * 4
    assert row["weight"] == pytest.approx(1)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Of each answer at most 2 tokens, chosen by `teachability`, were trained on with `sampled`, weighted by `iw`" in card


def test_resume_without_a_checkpoint_begins_anew_and_of_a_finished_run_changes_nothing(tmp_path):
    last = trainer(tmp_path, steps=1).train()
    log, card = (tmp_path / "log.jsonl").read_text(), (tmp_path / "model" / "README.md").read_text()
    assert trainer(tmp_path, steps=1, resume=True).train() == last
    assert (tmp_path / "log.jsonl").read_text() == log
    assert (tmp_path / "model" / "README.md").read_text() == card.replace("resume: false", "resume: true")
    shutil.rmtree(tmp_path / "checkpoints")
    assert trainer(tmp_path, steps=1, resume=True).train() == last
    assert (tmp_path / "log.jsonl").read_text() == log


@pytest.mark.parametrize(("phase", "step", "is_evaluated"), [("_step", 2, False), ("_step", 3, False), ("_evaluate", 2, True)])
def test_sigterm_saves_at_once_and_an_evaluation_waits_for_the_continuation(phase, step, is_evaluated, tmp_path):
    options = {"steps": 3, "eval_every": 1}
    trainer(tmp_path / "whole", **options).train()
    run = trainer(tmp_path / "cut", **options)
    act = getattr(run, phase)

    def interrupted(number, *arguments, **more):
        if number == step - (phase == "_step"):  # a step is counted by the updates before it
            os.kill(os.getpid(), signal.SIGTERM)
        return act(number, *arguments, **more)

    setattr(run, phase, interrupted)
    with pytest.raises(SystemExit, match="143"):
        run.train()
    last = _log(tmp_path / "cut")[-1]
    assert (last["step"], "eval_loss" in last) == (step, is_evaluated)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == [f"step-{step:06}"]
    assert not (tmp_path / "cut" / "model").exists()
    trainer(tmp_path / "cut", resume=True, **options).train()
    assert _log(tmp_path / "cut") == _log(tmp_path / "whole")
    assert (tmp_path / "cut" / "model").exists()


def test_what_a_run_writes(tmp_path):
    run = trainer(tmp_path, steps=4, save_every=1, keep_checkpoints=2)
    before = [parameter.clone() for parameter in run.unwrapped.parameters()]
    last = run.train()
    rows = _log(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    assert all(row.keys() >= NUMBERS for row in rows if "loss" in row)
    steps = [row for row in rows if "loss" in row]
    # Two micro-batches a step, each with its own budget, which is rounded up.
    assert all(0.25 * row["n_valid"] <= row["n_selected"] < 0.25 * row["n_valid"] + 2 for row in steps)
    assert rows[-1]["eval_forward_kl"] == last["forward_kl"] < rows[0]["eval_forward_kl"]
    assert rows[0]["eval_accuracy"] in (0, 0.5, 1)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000003", "step-000004"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    after = list(run.unwrapped.parameters())
    assert all(torch.equal(x, y) for x, y in zip(saved.parameters(), after, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert list((tmp_path / "model").glob("*.safetensors"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "for 4 steps" in card
    assert f"| forward_kl | {rows[0]['eval_forward_kl']:.4f} | {last['forward_kl']:.4f} |" in card
    assert "fraction: 0.25" in card
    table = (tmp_path / "completions-4.md").read_text()
    assert table.count("\n") == 2 + 2  # of the held-out prompts, those that have an answer
    with pytest.raises(ValueError, match=r"output_dir: .* holds a run; pass resume to continue it, or another folder"):
        trainer(tmp_path, steps=4)
    with pytest.raises(ValueError, match=r"resume: .* is of another run: fraction was 0.25 and is 0.5"):
        trainer(tmp_path, steps=6, resume=True, fraction=0.5)


def test_a_step_is_the_gradient_of_all_its_tokens(tmp_path):
    """Two unequal micro-batches and fraction 1: sum over all tokens of the reverse KL, divided by their number."""
    run = trainer(tmp_path, steps=1, fraction=1.0, learning_rate=0.0, max_grad_norm=0.0)
    cut = [5, 2]  # valid tokens that are left of each row of a micro-batch
    sampler = run.sampler

    def uneven(step, number):
        batch = sampler(step, number)
        return batch._replace(mask=batch.mask & (torch.arange(batch.mask.shape[1]) < cut[number]))

    run.sampler = uneven
    got = {}

    def keep(optimizer, *_):
        got.update({name: p.grad.clone() for name, p in run.unwrapped.named_parameters()})

    run.optimizer.optimizer.register_step_pre_hook(keep)
    run.train()
    model, teacher, words = language_model(0).double(), language_model(1).double(), tokenizer()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number in (0, 1):
        batch = uneven(0, number)
        heads = [head_over(m, words, batch) for m in (model, teacher)]
        log_p, log_q = (torch.log_softmax(head.hidden @ head.weight.T, -1)[batch.mask] for head in heads)
        total = total + (log_p.exp() * (log_p - log_q.detach())).sum()
        count += int(batch.mask.sum())
    assert count < 2 * 2 * 5
    (total / count).backward()
    for name, parameter in model.named_parameters():
        assert_gradient(got[name], parameter.grad)
    (row,) = [row for row in _log(tmp_path) if "loss" in row]
    assert row["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert row["n_valid"] == row["n_selected"] == count


@pytest.mark.parametrize(("shape", "after"), [("constant", 1.0), ("linear", 0.5)])
def test_the_learning_rate_warms_up_under_every_schedule(shape, after, tmp_path):
    trainer(tmp_path, steps=4, warmup_steps=2, lr_scheduler=shape, eval_size=0).train()
    rates = [row["learning_rate"] for row in _log(tmp_path)]
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, after * 1e-3])


def test_a_share_of_the_tokens_does_not_shrink_the_step(tmp_path):
    norms = {}
    for fraction in (1.0, 0.25):
        run = trainer(tmp_path / str(fraction), steps=1, fraction=fraction, selector="random", max_grad_norm=0.0, batch_size=4)
        run.train()
        norms[fraction] = next(row["grad_norm"] for row in _log(tmp_path / str(fraction)) if "loss" in row)
    # Divided by all tokens, it would be 0.18 of it here.
    assert norms[0.25] > 0.5 * norms[1.0]


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(tmp_path):
    run = trainer(tmp_path, steps=2, taught_by=0)
    run.train()
    for row in _log(tmp_path):
        assert abs(row.get("loss", row.get("eval_loss"))) < 1e-6
        assert abs(row.get("kl", row.get("eval_forward_kl"))) < 1e-6


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"scope": "sequence"}, {"scope": "global"}]
)
def test_options_of_memory_and_precision_train_alike(options, tmp_path):
    plain = trainer(tmp_path / "plain", steps=2, eval_every=1).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    other = trainer(tmp_path / "other", steps=2, eval_every=1, **options).train()
    exact = "gradient_checkpointing" in options or options.get("scope") == "global"  # of one process
    assert other["forward_kl"] == pytest.approx(plain["forward_kl"], rel=1e-6 if exact else 0.05)
    assert other["forward_kl"] < _log(tmp_path / "other")[0]["eval_forward_kl"]


def test_a_launcher_s_precision_and_accumulation_do_not_act(tmp_path, monkeypatch):
    trainer(tmp_path / "plain", steps=1, eval_size=0).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    trainer(tmp_path / "launched", steps=1, eval_size=0).train()
    assert _log(tmp_path / "launched") == _log(tmp_path / "plain")


def test_a_teacher_that_sends_lists(tmp_path):
    """Log-probabilities of the teacher's best eight, as a server sends them."""
    local = LocalTeacher(language_model(1), tokenizer())

    def teacher(rollouts):
        head = local(rollouts)
        best = torch.log_softmax(head.hidden @ head.weight.T, -1).topk(8)
        return TopKLogprobs(best.indices, best.values)

    run = trainer(tmp_path, steps=3, divergence="tail_aware", divergence_args="top_k=8")
    run.teacher = teacher
    last = run.train()
    rows = _log(tmp_path)
    assert last["loss"] < rows[0]["eval_loss"]
    assert "forward_kl" not in last  # nobody can know it
    assert rows[1].keys() >= {"support_mass_lower_bound", "entropy"}


def test_a_teacher_that_is_the_student_told_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: got 'same' and no teacher_system, .* nothing to learn"):
        trainer(tmp_path, steps=1, taught_by=None)


def test_a_student_that_is_an_object_needs_its_tokenizer(tmp_path):
    options = {"student": language_model(0), "teacher": LocalTeacher(language_model(1), tokenizer()), "prompts": prompts()}
    with pytest.raises(ValueError, match=r"tokenizer: got none, expected the tokenizer of the student, .* too"):
        OPDTrainer(OPDConfig(output_dir=str(tmp_path)), **options)


def test_a_tokenizer_object_without_padding_pads_with_the_end_token(tmp_path):
    words = tokenizer()
    words.pad_token = None
    teacher = LocalTeacher(language_model(1), words)
    config = OPDConfig(output_dir=str(tmp_path), steps=1, **SMALL)
    OPDTrainer(config, student=language_model(0), tokenizer=words, teacher=teacher, prompts=prompts()).train()
    assert words.pad_token == words.eos_token == "w1"


def test_adapters_of_a_gguf_file_are_saved_merged(tmp_path):
    run = trainer(tmp_path, steps=1, eval_size=0, lora_rank=2, learning_rate=0.1, student="tiny.gguf")
    ids, logits = torch.arange(3, 12)[None], []
    run.optimizer.optimizer.register_step_post_hook(lambda *_: logits.append(run.unwrapped(ids).logits.detach()))
    run.train()
    assert not list((tmp_path / "model").glob("adapter*"))
    saved, untrained = (model(ids).logits.detach() for model in (load_model(tmp_path / "model"), language_model(0)))
    assert relative_error(saved, logits[0]) < 1e-5 < 0.01 < relative_error(saved, untrained)


def test_adapters_of_a_gguf_file_cannot_be_merged_under_fsdp(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"lora_rank: got 2 for the .gguf file of 'tiny.gguf' under FSDP, .* expected 0"):
        trainer(tmp_path, steps=1, lora_rank=2, student="tiny.gguf")


@pytest.mark.parametrize(
    ("dtype", "options", "warns"),
    [
        (torch.bfloat16, {}, True),
        (torch.bfloat16, {"lora_rank": 2}, False),
        (torch.float32, {"mixed_precision": "bf16"}, False),
    ],
)
def test_trained_weights_of_16_bits_are_a_warning(dtype, options, warns, tmp_path, caplog):
    """Adapters of a 16-bit model have 32."""
    config = OPDConfig(output_dir=str(tmp_path), **SMALL | options)
    teacher = LocalTeacher(language_model(1), tokenizer())
    OPDTrainer(config, student=language_model(0).to(dtype), tokenizer=tokenizer(), teacher=teacher, prompts=prompts())
    said = [record.getMessage() for record in caplog.records if record.name == "opd_ops"]
    assert len(said) == warns
    assert all("(dtype float32, or student.float()), and pass mixed_precision bf16" in text for text in said)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(tmp_path):
    run = trainer(tmp_path, steps=2, eval_size=0)
    before = [parameter.detach().clone() for parameter in run.unwrapped.parameters()]
    run.unwrapped.get_output_embeddings().weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is nan, expected a finite number; nothing was"):
        run.train()
    assert all(torch.equal(x, y) for x, y in zip(before, run.unwrapped.parameters(), strict=True))


def test_the_card_says_what_was_done(tmp_path):
    trainer(tmp_path, steps=2, fraction=0.004).train()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "Teacher: passed as an object." in card
    assert "0.4 % of the tokens" in card
    assert "base_model" not in card  # no name that a hub knows
    with pytest.raises(ValueError, match="steps: got 1, expected at least 2"):
        trainer(tmp_path, steps=1, fraction=0.004, resume=True)


def test_report_to_sends_the_numbers_to_the_trackers(tmp_path):
    trainer(tmp_path, steps=2, report_to="tensorboard", run_name="mine").train()
    (events,) = (tmp_path / "mine").glob("events.*")
    written = events.read_bytes()  # tags are stored as they are
    assert all(name.encode() in written for name in ("loss", "kl_selected", "eval_forward_kl", "tokens_per_second"))
    assert "tokens_per_second" not in (tmp_path / "log.jsonl").read_text()  # no two runs repeat it


def test_held_out_metrics_are_means_over_tokens(tmp_path):
    words, model = tokenizer(), language_model(0)
    contexts = Rollouts(prompts(3), torch.randint(3, 60, (3, 5)), torch.arange(5) < torch.tensor([[5], [1], [3]]))
    teacher = LocalTeacher(language_model(1), words)
    options = {"unwrapped": model, "settings": Settings(divergence="forward_kl")}
    got = held_out_metrics(model, words, teacher, contexts, batch_size=2, **options)
    with torch.no_grad():
        heads = [head_over(m.double(), words, contexts) for m in (model, teacher.model)]
    log_p, log_q = (torch.log_softmax(_logits(head), -1)[contexts.mask] for head in heads)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean().item()
    assert got["forward_kl"] == pytest.approx(kl, rel=1e-5)
    assert got["loss"] == pytest.approx(kl, rel=1e-5)
    assert got["student_entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-5)


def _logits(head: LinearHead) -> torch.Tensor:
    return head.hidden @ head.weight.T


@pytest.mark.parametrize(
    ("text", "answer", "pattern", "expected"),
    [
        ("  Paris \n", "paris", "", True),
        ("It is Paris", "Paris", "", False),
        ("1 then #### 42", "42", r"#### (\d+)", True),
        ("#### 42 and #### 43", "42", r"#### (\d+)", False),
        ("no number", "42", r"#### (\d+)", False),
        ("12 or 13", "13", r"\d+", True),
        ("b", "a", r"(a)|b", False),
    ],
)
def test_is_exact_match_reads_the_last_match(text, answer, pattern, expected):
    assert is_exact_match(text, answer, pattern) is expected


def test_accuracy_counts_prompts_with_answers_alone():
    rollouts = Rollouts(prompts(4), torch.tensor([[9, 1], [9, 1], [8, 1], [8, 1]]), torch.ones(4, 2, dtype=torch.bool))
    got = completions_of(rollouts, tokenizer(), "")
    assert [completion.is_exact for completion in got] == [None, True, None, False]
    assert accuracy(got) == 0.5
    assert accuracy(got[:1]) is None
