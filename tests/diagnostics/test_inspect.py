"""`opd-inspect` on tiny random models: a whole run, its repeatability, and what it refuses before a model loads.

  Compared: the statistics of padded batches with each answer alone; the JSON with `study`; a trained student that is its own
  teacher with the gain that this must have. Run: make test ARGS=tests/diagnostics/test_inspect.py

Not here: the numbers (test_diagnostics.py), the page (test_report.py).
"""

import json
import re
import subprocess
import sys

import pytest
import torch

from opd_ops import score_positions
from opd_ops.diagnostics import cli, measure
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, head_over
from tests.integrations.models import llama_model, tokenizer

TEXTS = ("w3 w4 w5", "w6 w7", "w8 w9 w10 w11 w12", "w13", "w6 w7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models, a tokenizer with each, prompts."""
    root = tmp_path_factory.mktemp("inspect")
    for seed, name in enumerate(("student", "teacher", "trained")):
        llama_model(seed).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    rows = [{"prompt": text} for text in TEXTS]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def flags(folder, *more: str) -> list[str]:
    names = [part for role in ("student", "teacher") for part in (f"--{role}", str(folder / role))]
    return [*names, "--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "7", "--batch-size", "2", *more]


def run(folder, *more: str):
    """The study of a whole run, without the page."""
    return cli.run(*cli.parse(flags(folder, *more)))[1]


def test_inspect_writes_the_page_and_its_numbers(folder, tmp_path, capsys):
    out = tmp_path / "new" / "r.html"
    chosen = ["--selectors", "teachability,multinomial,teachability-released,prefix", "--fractions", "0.3,1"]
    chosen += ["--trained", str(folder / "trained"), "--resamples", "50", "--out", str(out)]
    cli.main(flags(folder, *chosen))
    page, got = out.read_text(encoding="utf-8"), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert "SELECTED by \u2068teachability\u2069, 30 %" in page
    assert str(folder / "trained") in page
    assert got.pop("settings")["student"] == str(folder / "student")
    assert got == json.loads(json.dumps(run(folder, *chosen, "--overwrite").to_json()))  # the seed decides
    assert got != json.loads(json.dumps(run(folder, *chosen, "--overwrite", "--seed", "1").to_json() | {"seed": 0}))
    assert got["n_contexts"] == 5
    assert got["n_prompts"] == 4  # one is asked twice
    labels = [(row["selector"], row["fraction"]) for row in got["gains"]]
    assert labels[0] == ("all", 1.0)
    assert set(labels[1:]) == {(s, f) for s in chosen[1].split(",") for f in (0.3, 1.0)}
    assert got["gains"][2]["gain"]["value"] == pytest.approx(got["gains"][0]["gain"]["value"])  # a share of 1 is all
    said = capsys.readouterr().out
    assert f"{got['n_positions']} tokens of 5 answers: see {out}; numbers in {out.with_suffix('.json')}" in said
    assert re.search(r"teachability +30 % +gain [+-]\d", said)


def test_inspect_of_a_student_trained_into_its_teacher_gains_all_of_the_kl(folder):
    for row in run(folder, "--trained", str(folder / "teacher"), "--resamples", "20", "--fractions", "0.2").gains:
        assert row.gain.value == pytest.approx(row.kl_before, rel=1e-5)
        assert row.relative_gain.value == pytest.approx(1, rel=1e-5)


def test_inspect_without_a_trained_student_and_with_another_system_message(folder):
    """The same weights on both sides: only what the teacher is told differs, so without it every divergence is 0."""
    same = ["--teacher", str(folder / "student"), "--limit", "3", "--dtype", "float32"]
    untold, told = run(folder, *same), run(folder, *same, "--teacher-system", "w20 w21 w22")
    assert untold.gains is None
    assert untold.n_contexts == 3
    assert untold.quadrants.kl_median < 1e-6 < 1e-3 < told.quadrants.kl_median


def test_compare_pads_batches_without_a_trace():
    student, teacher = (measure.Reader(llama_model(seed).eval(), tokenizer()) for seed in (0, 1))
    prompts = [Prompt.of(TEXTS[0]), Prompt.of(TEXTS[3], teacher_system="w30 w31"), Prompt.of(TEXTS[2])]
    sizes = {"max_new_tokens": 6, "seed": 3}
    frozen = list(measure.sample_answers(student, prompts, batch_size=2, **sizes))
    frozen[1] = frozen[1]._replace(tokens=frozen[1].tokens[:, :4], mask=frozen[1].mask[:, :4])
    got = measure.compare(student, teacher, frozen, top_k=4, teacher_system="w40", columns=frozenset({"jsd"}))
    assert got.valid.shape == (3, frozen[0].tokens.shape[1])
    assert not got.valid[2, 4:].any()
    row = 0
    for batch in frozen:
        for prompt, tokens, mask in zip(batch.prompts, batch.tokens, batch.mask, strict=True):
            alone = Rollouts([prompt], tokens[mask].unsqueeze(0), torch.ones(1, int(mask.sum()), dtype=torch.bool))
            with torch.no_grad():
                heads = (
                    head_over(student.model, student.tokenizer, alone),
                    head_over(teacher.model, teacher.tokenizer, alone, system=prompt.teacher_system or "w40"),
                )
            _, expected = score_positions(*heads, top_k=4, selector="multinomial")
            for name in ("forward_kl", "reverse_kl", "union_kl", "support_mass", "student_entropy", "jsd"):
                torch.testing.assert_close(
                    getattr(got, name)[row, got.valid[row]], getattr(expected, name)[0], rtol=1e-4, atol=1e-5
                )
            row += 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--selectors", "tip,best"], "--selectors: got 'best', expected names with commas between, of: teachability"),
        (["--fractions", "0.1,1.5"], r"--fractions: got '0.1,1.5', expected numbers in \(0, 1\] with commas between"),
        (["--fractions", "nan"], "--fractions: got 'nan', expected"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got '0', expected an integer of at least 1"),
        (["--limit", "-3"], "--limit: got '-3', expected"),
        (["--seed", "x"], "--seed: got 'x', expected an integer of at least 0"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--prompts", "/nowhere.jsonl"], "--prompts: got '/nowhere.jsonl', expected a JSONL file"),
        (["--out", "/"], "--out: got '/', expected the name of an HTML file"),
        (["--out", __file__ + "/x.html"], "--out: got .*, expected a file that can be written"),
        (["--out", "numbers.json"], "--out: got 'numbers.json', expected the name of an HTML file"),
        (["--limit", "1", "--trained", "x"], "--prompts: got 1 different prompt, expected at least 2"),
        (["--teach", "x"], "unrecognized arguments|ambiguous option"),
    ],
)
def test_inspect_refuses_bad_flags_before_loading(folder, more, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_tokenizer", lambda name: pytest.fail("a tokenizer was loaded"))
    monkeypatch.setattr(cli, "load_model", lambda name, dtype: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(flags(folder, *more))
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["r.html", "r.json"])
def test_inspect_replaces_a_report_only_when_told(folder, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_tokenizer", lambda name: pytest.fail("a tokenizer was loaded"))
    (tmp_path / name).write_text("before")
    out = ["--out", str(tmp_path / "r.html")]
    with pytest.raises(SystemExit) as exit_:
        cli.main(flags(folder, *out))
    assert exit_.value.code == 2
    said = f"argument --out: {tmp_path / name} exists; name another file, or pass --overwrite to replace it"
    assert said in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "before"
    monkeypatch.undo()
    cli.main(flags(folder, *out, "--overwrite", "--limit", "2"))
    assert (tmp_path / name).read_text() != "before"


@pytest.mark.full
@pytest.mark.parametrize("package", ["rich", "transformers", "matplotlib"])
def test_inspect_names_the_extra_of_a_missing_package(folder, tmp_path, package):
    code = f"import sys; sys.modules[{package!r}] = None; from opd_ops.diagnostics.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *flags(folder, "--out", str(tmp_path / "r.html"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"error: {package} is not installed; pip install 'opd-ops[inspect]'" in done.stderr


def test_answers_of_two_runs_share_no_seed():
    seeds = []

    def sampled(model, tokenizer, batch, *, seed, **_):
        seeds.append(seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "sample", sampled)
        for seed in (0, 1):  # seed + number would give the second run the first one's draws
            list(measure.sample_answers(measure.Reader(None, None), list(range(6)), max_new_tokens=1, batch_size=2, seed=seed))
    assert len(set(seeds)) == 6


def test_inspect_refuses_bad_rows_before_loading(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_tokenizer", lambda name: pytest.fail("a tokenizer was loaded"))
    (tmp_path / "p.jsonl").write_text('{"question": "w3"}', encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(flags(folder, "--prompts", str(tmp_path / "p.jsonl")))
    assert re.search("--prompts: .*row 1: got .*question.*, expected 'prompt'", capsys.readouterr().err)


def test_inspect_refuses_models_that_do_not_fit_before_loading_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda name, dtype: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match="--trained: got '/nowhere/at/all', expected a model that can be loaded"):
        cli.main(flags(folder, "--trained", "/nowhere/at/all"))
    with pytest.raises(SystemExit, match="--top-k: got 65, expected at most the vocabulary, 64"):
        cli.main(flags(folder, "--top-k", "65"))
    other = tokenizer().backend_tokenizer.to_str().replace('"w7":7', '"w7":8').replace('"w8":8,', '"w8":7,')
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(other, encoding="utf-8")
    with pytest.raises(SystemExit, match="--teacher: its tokenizer differs from the student's at 2 of 61 ids: 7 is 'w8', not"):
        cli.main(flags(folder, "--teacher", str(tmp_path)))


def test_inspect_does_not_write_its_numbers_over_the_prompts(folder, tmp_path, capsys):
    data = tmp_path / "data.json"
    data.write_text((folder / "prompts.jsonl").read_text())
    with pytest.raises(SystemExit):
        cli.main(flags(folder, "--prompts", str(data), "--out", str(tmp_path / "data.html")))
    assert "whose numbers would go over the prompts" in capsys.readouterr().err
