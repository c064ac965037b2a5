"""Self-teachers: what each kind of weights says after updates against a model with those weights, to the bit; the student's
gradient, which a teacher's forward must not touch; a run cut in two against one that was not, bit for bit.

Command: make test ARGS=tests/trainer/test_self_teacher.py
Not here: the teacher's prompt (test_privileged.py), a real model (tests/examples/test_self_teacher.py).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.rollouts import head_over, sample
from opd_ops.trainer.self_teacher import Followed, SelfTeacher, check_sharded, own_weights
from opd_ops.trainer.student import make_trainable
from opd_ops.trainer.teachers import LocalTeacher
from tests.integrations.models import language_model, tokenizer
from tests.support.tolerances import relative_error
from tests.trainer.runs import prompts, trainer

CONTEXT = PrivilegedContext(template="w20 w21 {prompt}")
TINY = {"taught_by": None, "teacher_prompt": CONTEXT.template, "eval_size": 0, "max_new_tokens": 3, "fraction": 1.0}
TINY |= {"gradient_accumulation_steps": 1}
ADAPTERS = {"lora_rank": 4, "lora_dropout": 0.2}


def _student(**options):
    return make_trainable(language_model(0), OPDConfig(student="x", prompts="y", **options)).train()


def _updates(student, optimizer, n):
    """Updates by gradients of a loss of the weights, each followed by a copy of the model."""
    versions = [copy.deepcopy(student)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        versions.append(copy.deepcopy(student))
    return versions


def _taught(weights, n, dtype=torch.float32, **options):
    """A teacher after n updates, the student's versions, and rollouts."""
    student, words = _student(**options).to(dtype), tokenizer()
    rollouts = sample(student, words, prompts(3), max_new_tokens=5, seed=0)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    teacher = SelfTeacher(student, words, CONTEXT, own_weights(weights))
    if isinstance(teacher.weights, Followed):
        teacher.weights.follow(student, optimizer)
    return teacher, _updates(student, optimizer, n), rollouts


def _heads_are_equal(teacher, model, rollouts):
    got, expected = teacher(rollouts), LocalTeacher(model, teacher.tokenizer, CONTEXT)(rollouts)
    return torch.equal(got.hidden, expected.hidden) and torch.equal(got.weight, expected.weight)


@pytest.mark.parametrize(
    ("weights", "n", "version", "options"),
    [
        ("live", 2, 2, {}),
        ("lag=1", 3, 2, {}),
        ("lag=3", 4, 1, {}),
        ("lag=3", 2, 0, {}),
        ("lag=3", 4, 1, ADAPTERS),
        pytest.param("live", 2, 2, ADAPTERS, marks=pytest.mark.full),
    ],
)
def test_live_and_lagged_weights_are_those_of_that_update(weights, n, version, options):
    teacher, versions, rollouts = _taught(weights, n, **options)
    assert _heads_are_equal(teacher, versions[version], rollouts)
    assert not _heads_are_equal(teacher, versions[version - 1], rollouts)
    assert teacher.student.training


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        pytest.param(torch.float32, ADAPTERS, marks=pytest.mark.full),
        pytest.param(torch.bfloat16, ADAPTERS, marks=pytest.mark.full),
    ],
)
def test_an_average_is_the_geometric_sum_of_all_versions(dtype, options):
    """In bf16 too it is summed in fp32 and rounded once."""
    decay, n = 0.75, 4
    teacher, versions, rollouts = _taught(f"ema={decay}", n, dtype, **options)
    expected = copy.deepcopy(versions[-1])
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            each = [dict(version.named_parameters())[name].detach().double() for version in versions]
            shares = [decay**n, *((1 - decay) * decay ** (n - i) for i in range(1, n + 1))]
            parameter.data = sum(share * value for share, value in zip(shares, each, strict=True)).to(dtype)
    head = LocalTeacher(expected, teacher.tokenizer, CONTEXT)(rollouts)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # a mean near the middle of two bf16 numbers may round to either
    assert relative_error(teacher(rollouts).hidden.float(), head.hidden.float()) < tolerance
    assert not _heads_are_equal(teacher, versions[-1], rollouts)


def test_adapters_off_are_a_frozen_copy_to_the_bit():
    teacher, _, rollouts = _taught("frozen", 3, **ADAPTERS)
    assert _heads_are_equal(teacher, language_model(0), rollouts)
    live = head_over(teacher.student.eval(), teacher.tokenizer, rollouts)
    assert relative_error(live.hidden, head_over(language_model(0), teacher.tokenizer, rollouts).hidden) > 0.1


@pytest.mark.parametrize("weights", ["live", "lag=1", "ema=0.5"])
def test_a_teachers_forward_leaves_the_students_graph_and_weights_alone(weights):
    teacher, _, rollouts = _taught(weights, 2)
    student = teacher.student.eval()
    gradients = []
    for asks in (False, True):
        student.zero_grad()
        head = head_over(student, teacher.tokenizer, rollouts)
        said = teacher(rollouts) if asks else None
        (head.hidden @ head.weight.T).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
        assert said is None or not (said.hidden.requires_grad or said.weight.requires_grad)
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))
    assert not student.training


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_weights": "frozen"},
        {"teacher_weights": "live"},
        {"teacher_weights": "lag=2"} | ADAPTERS,
        {"teacher_weights": "ema=0.6"},
        pytest.param({"teacher_weights": "live"} | ADAPTERS, marks=pytest.mark.full),
        pytest.param({"teacher_weights": "lag=2"}, marks=pytest.mark.full),
        pytest.param({"teacher_weights": "ema=0.6"} | ADAPTERS, marks=pytest.mark.full),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(options, tmp_path):
    """From a checkpoint that was written in the middle of a step, as a kill later leaves it."""
    options = TINY | options | {"save_every": 2, "steps": 4, "keep_checkpoints": 9}
    whole = trainer(tmp_path / "a", **options)
    whole.train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"step-{step:06}", ignore_errors=True)
    resumed = trainer(tmp_path / "b", resume=True, **options)
    resumed.train()
    assert resumed.done == 4
    for (name, x), (_, y) in zip(whole.unwrapped.named_parameters(), resumed.unwrapped.named_parameters(), strict=True):
        assert torch.equal(x, y), name
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text()


def test_a_run_teaches_by_the_weights_that_the_options_name(tmp_path):
    """All kinds begin as the student, so the first steps are equal; the second ones differ."""
    losses = []
    for weights in ("live", "ema=0.5"):
        folder = tmp_path / weights
        trainer(folder, steps=2, **TINY, teacher_weights=weights).train()
        losses.append([json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
    card = (tmp_path / "ema=0.5" / "model" / "README.md").read_text()
    assert "Teacher: a moving average of the student's own weights with decay 0.5, told more in its prompt." in card


@pytest.mark.parametrize("text", ["warm", "lag", "lag=0", "lag=1.5", "ema", "ema=1", "ema=0", "ema=nan", "live=2", ""])
def test_other_weights_are_refused(text):
    with pytest.raises(ValueError, match=rf"teacher_weights: got '{text}', expected 'frozen', 'live', 'lag=N' .* or 'ema=D'"):
        own_weights(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_weights": "live", "teacher": "other"}, "teacher_weights: got 'live', but the teacher is another than the"),
        ({"teacher_weights": "ema=0.9", "teacher_dtype": "bfloat16"}, "teacher_dtype: got 'bfloat16', but this teacher is the"),
        ({"teacher_prompt": "{answer}"}, r"teacher_prompt: got '\{answer\}', expected a template with \{prompt\}"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OPDConfig(student="x", prompts="y", **options).check()


def test_the_documentations_methods_are_options():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "trainer.md").read_text()
    lines = re.findall(r"^\| .*? \| `(--.*?--fraction 1)` \|$", page, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        options = dict(part.split(" ") for part in line.removeprefix("--").split(" --"))
        config = OPDConfig(student="x", prompts="y", teacher_prompt="{prompt} {answer}")
        kinds = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
        settings = dataclasses.replace(config, **{name: kinds[name](text) for name, text in options.items()}).check().settings()
        assert settings.fraction == 1


def test_a_run_is_refused_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match=r"prompt 1, .*: has no answer, expected one for \{answer\} of teacher_prompt"):
        trainer(tmp_path, steps=1, taught_by=None, teacher_prompt="{prompt} {answer}")
    with pytest.raises(ValueError, match="no teacher_prompt, so that student and teacher are one and there is nothing"):
        trainer(tmp_path, steps=1, taught_by=None, teacher_prompt="{prompt}", teacher_weights="ema=0.9")
    with pytest.raises(ValueError, match="teacher_weights: got 'lag=2' with FSDP, expected 'frozen' or 'live'"):
        check_sharded("lag=2")
    check_sharded("live")
