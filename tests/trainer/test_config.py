"""The options of the reference trainer: a YAML file and flags against the dataclass they describe; what is refused, and when.

Command: make test ARGS=tests/trainer/test_config.py
Not here: what the options do (test_loop.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from opd_ops import JSD
from opd_ops.trainer import cli, models
from opd_ops.trainer.config import OPDConfig, read_config
from opd_ops.trainer.prompts import PromptSource


@pytest.fixture
def needed(tmp_path):
    """Flags without which no run begins."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Why?"}\n')
    return [f"--prompts={path}", "--student=somewhere"]


def test_every_option_has_a_sentence_of_its_own():
    sentences = {x.name: x.metadata["help"] for x in dataclasses.fields(OPDConfig)}
    assert all(len(sentence.split()) > 2 for sentence in sentences.values())
    assert len(set(sentences.values())) == len(sentences)


def test_flags_win_over_the_file(needed, tmp_path):
    path = tmp_path / "run.yaml"
    lines = ["fraction: 0.1", "learning_rate: 2e-5", "teacher_system: '- a pirate'", "gradient_checkpointing: true"]
    path.write_text("\n".join([*lines, "eval_prompts: null"]))
    flags = ["--fraction", "0.2", "--divergence", "jsd", "--divergence-args", "beta=0.3"]
    config = read_config(["--config", str(path), *needed, *flags])
    assert (config.fraction, config.learning_rate, config.teacher_system) == (0.2, 2e-5, "- a pirate")
    assert config.gradient_checkpointing is True
    assert config.eval_prompts is None
    assert config.settings().divergence == JSD(beta=0.3)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("output_dir: 2024_10_01", "2024_10_01"),
        ("run_name: 1.10", "1.10"),
        ("run_name: 0123", "0123"),
        ("run_name: 12:30:45", "12:30:45"),
        ("run_name: 2001-99-99", "2001-99-99"),
        ("run_name: '-1'", "-1"),
        ("prompts_split: on", "on"),
        ("mixed_precision: no", "no"),
        ("teacher_model: ~", None),
        ("resume: yes", True),
        ("gradient_checkpointing: False", False),
        ("max_new_tokens: 1_000", 1000),
        ("seed: 010", 10),
        ("learning_rate: 1e-6", 1e-6),
    ],
)
def test_a_value_of_the_file_is_its_text_as_it_stands(line, expected, needed, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(line)
    config = read_config(["--config", str(path), *needed])
    assert getattr(config, line.partition(":")[0]) == expected


def test_every_option_has_a_help_text_and_a_flag(capsys):
    with pytest.raises(SystemExit):
        read_config(["--help"])
    said = capsys.readouterr().out
    for option in dataclasses.fields(OPDConfig):
        assert f"--{option.name}" in said
        assert len(option.metadata["help"]) > 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student="], "student: got nothing, expected Model to train"),
        (["--prompts=none.jsonl"], "prompts: got 'none.jsonl', expected a file that exists"),
        (["--fraction=1.5"], r"fraction: got 1.5, expected a number in \(0, 1\]"),
        (["--fraction_end=0"], r"fraction_end: got 0.0, expected a number in \(0, 1\]"),
        (["--loss_schedule=cosine"], "loss_schedule: got 'cosine' without fraction_end or weighting_share_end"),
        (["--weighting_share_end=0.5"], "weighting_share_end: got a share of no weighting; pass a weighting"),
        (["--weighting=iw", "--weighting_share_end=2"], r"weighting_share_end: got 2.0, expected a number in \[0, 1\]"),
        (["--count=0"], "count: got 0, expected at least 1"),
        (["--count=3", "--fraction_end=0.5"], "count: got 3 and a fraction_end, each of which decides how many tokens"),
        (["--weighting=best"], "weighting: got 'best', expected None, a callable, or one of"),
        (["--weight_mean=valid"], "weight_mean: got 'valid' without a weighting"),
        (["--selector=best"], "selector: got 'best', expected a callable or one of"),
        (["--divergence=l2"], "divergence: got 'l2', expected one of"),
        (
            ["--divergence=jsd", "--divergence_args=b=0.3"],
            "divergence_args: got 'b=0.3', expected name=number with names of b",
        ),
        (["--divergence_args=beta=0.3"], "divergence_args: got 'beta=0.3', expected nothing: reverse_kl has no parameters"),
        (["--divergence=jsd", "--divergence_args=beta=3"], "beta: got 3"),
        (["--top_k=0"], "top_k: got 0, expected at least 1"),
        (["--steps=0"], "steps: got 0, expected an integer of at least 1"),
        (["--learning_rate=nan"], "learning_rate: got nan, expected a finite number"),
        (["--process_timeout=0"], "process_timeout: got 0.0, expected a finite number of seconds > 0"),
        (["--temperature=0"], "temperature: got 0, expected a number > 0"),
        (["--top_p=0"], r"top_p: got 0.0, expected a number in \(0, 1\]"),
        (["--teacher_url=http://x"], "divergence: got 'reverse_kl', which TopKLogprobs cannot give"),
        (["--teacher_url=http://x", "--teacher=y"], "teacher: got 'y' and a teacher_url, expected one of the two"),
        (["--teacher_store=x", "--teacher=y"], "teacher: got 'y' and a teacher_store, expected one of the two"),
        (["--teacher_store=x"], "teacher_store: got 'x', expected a folder that exists; with teacher_url"),
        (["--teacher_digest=a1"], "teacher_digest: got 'a1' without a teacher_store, whose shards would have it"),
        (["--rollout_url=http://x"], "rollout_url: .* set lora_rank"),
        (["--report_to=tensorboard,paper"], "report_to: got 'paper', expected some of: .*tensorboard"),
        (["--report_to=clearml"], "report_to: got 'clearml', whose package is not installed; pip install it"),
        (["--lora_dropout=1.5"], r"lora_dropout: got 1.5, expected a number in \[0, 1\)"),
        (["--warmup_steps=500"], "warmup_steps: got 500, expected at most steps, 100"),
        (["--teacher_url=teacher:8000", "--divergence=tail_aware"], "teacher_url: got 'teacher:8000', expected an address"),
        (["--rollout_url=http://x:80a0", "--lora_rank=2"], "rollout_url: got 'http://x:80a0', expected an address"),
        (["--answer_pattern=("], "answer_pattern: got '\\(', expected a regular expression"),
        (["--output_dir="], "output_dir: got nothing"),
        (["--lora_rank=4", "--teacher_dtype=bfloat16"], "teacher_dtype: got 'bfloat16', but this teacher is"),
        (["--eval_prompts_split=test"], "eval_prompts_split: got 'test' without eval_prompts; set that too"),
        (["--eval_prompts_name=main"], "eval_prompts_name: got 'main' without eval_prompts; set that too"),
        (["--prompts=gsm8k", "--eval_prompts=gsm8k"], "eval_prompts: got 'gsm8k', the very prompts that are trained on"),
        (
            ["--prompts=gsm8k", "--prompts_name=main", "--eval_prompts=gsm8k", "--eval_prompts_split=train"],
            "eval_prompts: got 'gsm8k', the very prompts",
        ),
        (["--teacher_model=big"], "teacher_model: got one without teacher_url, the server that it is about"),
        (["--rollout_api_key_env=KEY"], "rollout_api_key_env: got one without rollout_url"),
        (["--scope=rows"], "invalid choice: 'rows'"),
        (["--frac=0.1"], r"got '--frac', an unknown option"),
        (["--fractoin", "0.1"], r"error: got '--fractoin', an unknown option; did you mean '--fraction'\?"),
        (["0.1"], "error: got '0.1', expected flags: --name value"),
    ],
)
def test_main_rejects_bad_options_before_loading(flags, message, needed, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as exit_:
        cli.main([*needed, *flags])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("option", ["fraction", "fraction_end", "weighting_share", "weighting_share_end"])
def test_a_scheduled_option_that_is_no_number_is_refused(option, needed):
    given = {"fraction_end": 0.5, "weighting_share_end": 0.5, "weighting": "iw", option: "0.1"}
    config = OPDConfig(prompts=needed[0].removeprefix("--prompts="), student="somewhere", divergence="sampled", **given)
    with pytest.raises(ValueError, match=rf"^{option}: got '0\.1', expected a number"):
        config.check()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dtype", "bf16", "one of: 'auto', 'float32', 'bfloat16'"),
        ("mixed_precision", "fp16", "one of: 'no', 'bf16'"),
        ("lr_scheduler", "polynomial", "one of: 'constant', 'linear', 'cosine'"),
        ("teacher_api", "openai", "one of: 'vllm', 'sglang'"),
        ("loss_schedule", "steps", "one of: 'linear', 'cosine'"),
        ("scope", "rows", "one of: 'batch', 'sequence', 'global'"),
        ("steps", 10.5, "an integer"),
        ("seed", True, "an integer"),
        ("count", 2.0, "an integer"),
        ("resume", "no", "True or False"),
        ("learning_rate", "fast", "a number"),
        ("prompts", Path("a.jsonl"), "text"),
    ],
)
def test_a_value_of_another_kind_from_python_is_refused(name, value, expected, needed):
    options = {"prompts": needed[0].removeprefix("--prompts="), "student": "somewhere"}
    with pytest.raises(ValueError, match=re.escape(f"{name}: got {value!r}, expected {expected}") + "$"):
        OPDConfig(**options | {name: value}).check()
    config = OPDConfig(**options, steps=np.int64(3), learning_rate=np.float32(0.5), resume=np.True_).check()
    assert (config.steps, config.learning_rate, config.resume) == (3, 0.5, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fractoin: 0.1", "run.yaml:1 has fractoin, an unknown option; did you mean 'fraction'?"),
        ("zzzz: 0.1", "has zzzz, an unknown option; opd-train --help lists all"),
        ("- 1\n- 2", "has list, expected lines"),
        ("a: [", "is no YAML"),
    ],
)
def test_read_config_rejects_other_files(text, message, needed, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        read_config(["--config", str(path), *needed])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        read_config(["--config", str(tmp_path / "none.yaml"), *needed])
    assert "expected a YAML file that exists" in capsys.readouterr().err


def test_a_misspelled_name_is_an_error_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"OPDConfig: got 'fractoin', an unknown option; did you mean 'fraction'\?"):
        OPDConfig(fractoin=0.1)


def test_files_have_no_configurations_and_are_not_evaluated_on_themselves(needed, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    (tmp_path / "folder").mkdir()
    same = tmp_path / "folder" / ".." / "prompts.jsonl"
    for flags, message in (
        (["--prompts_name=main"], f"prompts_name: got 'main', but {path} is here and has no configurations; leave it out"),
        ([f"--eval_prompts={same}", "--eval_prompts_split=test"], f"eval_prompts: got '{same}', the very prompts"),
    ):
        with pytest.raises(SystemExit):
            read_config([*needed, *flags])
        assert message in capsys.readouterr().err


def test_eval_prompts_of_the_same_dataset_are_of_its_configuration(needed):
    flags = ["--student=x", "--prompts=gsm8k", "--prompts_name=main"]
    same = read_config([*flags, "--eval_prompts=gsm8k", "--eval_prompts_split=test"])
    assert same.train_source() == PromptSource("gsm8k", "train", "main")
    assert same.eval_source() == PromptSource("gsm8k", "test", "main")
    assert read_config([*flags, "--eval_prompts=math"]).eval_source() == PromptSource("math", "train", None)
    socratic = read_config([*flags, "--eval_prompts=gsm8k", "--eval_prompts_name=socratic"])
    assert socratic.eval_source() == PromptSource("gsm8k", "train", "socratic")
    assert read_config(flags).eval_source() is None


def test_a_server_s_key_is_read_from_the_environment_and_never_shown(needed, monkeypatch, capsys):
    flags = [*needed, "--teacher_url=http://x", "--divergence=tail_aware", "--teacher_api_key_env=OPD_KEY"]
    monkeypatch.delenv("OPD_KEY", raising=False)
    for given in (flags, [*flags[:-1], "--teacher_api_key_env=sk-secret"]):
        with pytest.raises(SystemExit):
            read_config(given)
        said = capsys.readouterr().err
        assert "teacher_api_key_env: got the name of a variable that is not set, expected one that holds the key" in said
        assert "secret" not in said
    monkeypatch.setenv("OPD_KEY", "sk-secret")
    config = read_config(flags)
    assert config.api_key("teacher") == "sk-secret"
    assert config.api_key("rollout") is None
    assert "secret" not in repr(config)


def test_a_password_in_an_address_is_refused_and_never_shown(needed, capsys):
    for url in ("http://user:secret@x:8000", "http://user:secret@x:80a0"):
        with pytest.raises(SystemExit):
            read_config([*needed, f"--teacher_url={url}", "--divergence=tail_aware"])
        said = capsys.readouterr().err
        assert "teacher_url: got an address with '@', expected one without user and password" in said
        assert "teacher_api_key_env" in said
        assert "secret" not in said


def test_lora_needs_peft_before_anything_loads(needed, monkeypatch, capsys):
    got = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else got(name, *more))
    with pytest.raises(SystemExit):
        read_config([*needed, "--lora_rank=4"])
    assert "lora_rank: got 4, which needs the package peft; pip install 'opd-ops[train]'" in capsys.readouterr().err
    read_config(needed)


def test_a_served_teacher_takes_a_divergence_on_lists(needed):
    config = read_config([*needed, "--teacher_url=http://x", "--divergence=tail_aware", "--teacher_top_k=8"])
    assert config.settings().divergence.name == "tail_aware"
