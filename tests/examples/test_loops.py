"""The examples that train a smaller student through a server, TRL or Hugging Face's Trainer: their loops, on tiny models.

  Compared: the weights that answer with those of the step; what was trained on with a fifth of the tokens; the student with
  itself before.
Command: make test ARGS=tests/examples/test_loops.py

Not here: the demonstration and the plain loop (test_demo.py), the client of the server (tests/trainer/servers/).
"""

from itertools import pairwise

import pytest
import torch
from trl.trainer import distillation_trainer

from examples import hf_trainer, served_teacher, trl_one_line
from examples.plain_loop import without_every_third_layer
from examples.serve_teacher import Served, running
from opd_ops.trainer.servers.teacher import ServedTeacher
from tests.integrations.models import language_model
from tests.integrations.models import tokenizer as tiny_tokenizer

pytestmark = pytest.mark.full  # importing the peer takes seconds in each process
HOOK = distillation_trainer._chunked_divergence_loss


@pytest.fixture(scope="module")
def tokenizer():
    """Every word of a question is unknown to it; the number of words is what is left."""
    got = tiny_tokenizer()
    got.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return got


@pytest.fixture
def models():
    """(student, teacher): a teacher of two layers, and its copy without the second."""
    teacher = language_model(1).eval()
    student = without_every_third_layer(teacher)
    assert len(student.model.layers) == 1
    return student, teacher


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_served_teacher_s_loop_trains_on_what_the_server_sends(models, tokenizer, capsys):
    student, teacher = models
    before = weights(student), weights(teacher)
    with running(Served(teacher, tokenizer, "tiny")) as url:
        kls = served_teacher.train(student, tokenizer, ServedTeacher(url, top_k=8), steps=2, n_questions=2, n_tokens=5)
    assert len(kls) == 2
    assert all(kl > 0 for kl in kls)
    assert "step   1: KL" in capsys.readouterr().out
    assert not torch.equal(weights(student), before[0])
    assert torch.equal(weights(teacher), before[1])


def test_the_served_teacher_s_loop_takes_answers_that_end_early(models, tokenizer, monkeypatch):
    student, teacher = models

    def short(model, *arguments, **options):
        got = sample(model, *arguments, **options)
        ended = got.mask.clone()
        ended[0, 1:], ended[1, 3:] = False, False
        return got._replace(mask=ended)

    sample = served_teacher.sample
    monkeypatch.setattr(served_teacher, "sample", short)
    with running(Served(teacher, tokenizer, "tiny")) as url:
        kls = served_teacher.train(student, tokenizer, ServedTeacher(url, top_k=8), steps=1, n_questions=2, n_tokens=5)
    assert 0 < kls[0] < 100


def test_the_trainer_s_answers_come_from_the_weights_of_the_step(models, tokenizer, monkeypatch, tmp_path):
    student, teacher = models
    answered_by, trained_at, sample = [], [], hf_trainer.sample

    def watched(model, *arguments, **options):
        answered_by.append(weights(model))
        return sample(model, *arguments, **options)

    monkeypatch.setattr(hf_trainer, "sample", watched)
    forward = student.model.forward
    monkeypatch.setattr(
        student.model,
        "forward",
        lambda *arguments, **inputs: (
            (trained_at.append(weights(student)) if student.training else None) or forward(*arguments, **inputs)
        ),
    )
    trainer = hf_trainer.train(student, teacher, tokenizer, tmp_path, steps=3, n_questions=2, n_tokens=5)
    assert len(answered_by) == len(trained_at) == 3  # none is sampled ahead of its step
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(answered_by, trained_at, strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in pairwise(answered_by))
    logged = next(row for row in trainer.state.log_history if "opd/kl_all" in row)
    assert 5 < logged["opd/n_valid"] <= 10
    assert logged["opd/n_selected"] == 2
    assert logged["opd/kl_all"] > 0


def test_the_line_trains_trl_on_a_fifth(models, tokenizer, monkeypatch, tmp_path):
    student, teacher = models
    before, got, patch = weights(student), [], trl_one_line.patch_trl
    monkeypatch.setattr(trl_one_line, "patch_trl", lambda **options: patch(on_metrics=got.append, **options))
    _, losses = trl_one_line.train(student, teacher, tokenizer, tmp_path, steps=2, n_questions=2, n_tokens=5)
    assert len(got) == 2  # the steps; the evaluations are TRL's own
    assert all(m["n_selected"] == 2 and 5 < m["n_valid"] <= 10 for m in got)
    assert distillation_trainer._chunked_divergence_loss is HOOK
    assert all(0 < loss < 100 for loss in losses)
    assert not torch.equal(weights(student), before)
