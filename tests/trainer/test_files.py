"""Files and paths that a user can get wrong, given to `opd-train` and to `opd-inspect`: one line that names the file and the
place, before a model is looked for.

Command: make test ARGS=tests/trainer/test_files.py
Not here: options (test_config.py), rows of prompts (test_prompts.py).
"""

from __future__ import annotations

import sys

import datasets
import pytest

from opd_ops.diagnostics import cli as inspect
from opd_ops.trainer import cli as train
from opd_ops.trainer import config, loop, models
from opd_ops.trainer.prompts import load_prompts

LONG = "x" * 5000
SHORTENED = "x" * 60 + "…'"
TWO = b'{"prompt": "Why?"}\n{"prompt": "How?"}\n'
NUL = r"'a\x00b'"
FILES = {  # what a JSONL file holds: what is said after its name
    b'{"prompt": "a"}\n\n{"prompt": "caf\xe9"}\n': ":3: got byte 0xe9, expected UTF-8; save the file as UTF-8",
    '{"prompt": "a"}\n'.encode("utf-16"): ":1: got byte 0xff, expected UTF-8",
    b'{"prompt": "a"}\r\r{"prompt": "\xed\xa0\x80"}': ":3: got byte 0xed, expected UTF-8",
    b'\xef\xbb\xbf{"prompt": "a"}\n': ":1: begins with a byte order mark, expected UTF-8 without one",
    b'{"prompt": "a"}\n\n{"prompt": "x\\ud800"}\n': ":3: row 2: got the lone surrogate U+D800 as character 2, expected text",
    b'{"prompt": "a", "answer": "\\udc00"}\n': ":1: row 1: got the lone surrogate U+DC00",
    b'{"prompt": "a", "teacher_system": "\\udfff"}\n': ":1: row 1: got the lone surrogate U+DFFF",
    b'{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n': ':2: got \'{"prompt": "a", "prompt": "b"}\', expected a line',
    b"[" * 100_000: ":1: got '[[[[",
    b'{"prompt": "a"}\n{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n": ":2: got '{",
}


@pytest.fixture(autouse=True)
def _no_model_is_looked_for(monkeypatch):
    for module in (models, loop, inspect):
        monkeypatch.setattr(module, "load_tokenizer", lambda *_, **__: pytest.fail("a tokenizer was loaded"))


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_bytes(TWO)
    return path


def _train(tmp_path, prompts, *more):
    known = ["--student=student", "--teacher_system=x", "--eval_size=0", f"--output_dir={tmp_path / 'out'}"]
    return train.main, [*known, f"--prompts={prompts}", *more]


def _inspect(tmp_path, prompts, *more):
    known = ["--student=student", "--teacher=teacher", f"--out={tmp_path / 'new' / 'r.html'}"]
    return inspect.main, [*known, f"--prompts={prompts}", *more]


def _error(main, flags, capsys):
    """What the program says after `error: `, in one line."""
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    said = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err
    said = said[said.index("error: ") :].rstrip("\n")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("program", [_train, _inspect])
@pytest.mark.parametrize(("data", "message"), FILES.items(), ids=range(len(FILES)))
def test_prompts_that_cannot_be_read_are_named_with_their_line(data, message, program, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    assert f"{path}{message}" in _error(*program(tmp_path, path), capsys)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"fraction: 0.1\nteacher_system: caf\xe9\n", ":2: got byte 0xe9, expected UTF-8; save the file as UTF-8"),
        ("steps: 3\n".encode("utf-16"), ":1: got byte 0xff, expected UTF-8"),
        (b"\xef\xbb\xbfsteps: 3\n", ":1: begins with a byte order mark, expected UTF-8 without one"),
        (
            b"fraction: 0.1\nsteps: 3\n# more\nfraction: 0.2\n",
            ":4 has fraction again, which line 1 has already; keep one",
        ),
        (b'steps: 3\nteacher_system: "\\ud800"\n', ":2: teacher_system: got the lone surrogate U+D800 as character 1"),
        (b"steps: 3\nfractoin: 0.1\n", ":2 has fractoin, an unknown option; did you mean 'fraction'?"),
        (b"steps: 3\n? [a]\n: 1\n", ":2 has sequence, an unknown option"),
        (b"steps: 3\nreport_to: [wandb]\n", ":2: report_to: got a sequence, expected one value"),
        (b"steps: 3\na: [\n", ":3 is no YAML: expected the node content, but found '<stream end>'"),
        (b"steps: 3\nrun_name: \0\n", ":2 is no YAML: unacceptable character #x0000"),
        (b"steps: 3\na: " + b"[" * 3000, ":2 is nested too deeply, expected lines `name: value`"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named_with_its_line(data, message, good, tmp_path, capsys, recursion_limit):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    assert f"{path}{message}" in _error(*_train(tmp_path, good, f"--config={path}"), capsys)


@pytest.fixture
def recursion_limit():
    """A new process's: others of this one may have raised it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("program", "flag", "value", "message"),
    [
        (_train, "prompts", LONG, f"prompts: got '{SHORTENED}, expected a path that the system accepts (File name"),
        (_train, "config", LONG, f"config: got '{SHORTENED}, expected a path that the system accepts (File name"),
        (_train, "output_dir", LONG, f"output_dir: got '{SHORTENED}, expected a path that the system accepts (File name"),
        (_train, "student", LONG, f"student: got '{SHORTENED}, expected a path that the system accepts (File name"),
        (
            _train,
            "eval_prompts",
            "a\0b",
            f"eval_prompts: got {NUL}, expected a path that the system accepts (embedded null",
        ),
        (_train, "output_dir", "GOOD", "output_dir: got 'GOOD', expected a folder (File exists)"),
        (_train, "output_dir", "GOOD/x", "output_dir: got 'GOOD/x', expected a folder (Not a directory)"),
        (_train, "prompts", "a\udcff", "prompts: got the lone surrogate U+DCFF as character 2, expected text"),
        (_train, "teacher_system", "\udcff", "teacher_system: got the lone surrogate U+DCFF as character 1, expected text"),
        (
            _inspect,
            "prompts",
            LONG,
            f"--prompts: got '{SHORTENED}, expected a path that the system accepts (File name too long)",
        ),
        (_inspect, "prompts", "a\0b", f"--prompts: got {NUL}, expected a path that the system accepts (embedded null"),
        (
            _inspect,
            "trained",
            LONG,
            f"--trained: got '{SHORTENED}, expected a path that the system accepts (File name too long)",
        ),
        (_inspect, "out", LONG, f"--out: got '{SHORTENED}, expected a path that the system accepts (File name"),
        (_inspect, "out", "x" * 254, "expected a file that can be written (File name too long)"),
        (_inspect, "out", "GOOD/x.html", "--out: got 'GOOD/x.html', expected a file that can be written (File exists)"),
        (_inspect, "out", "a\udcff", "--out: got the lone surrogate U+DCFF as character 2, expected text"),
        (_inspect, "teacher-system", "\udcff", "--teacher-system: got the lone surrogate U+DCFF as character 1, expected text"),
    ],
)
def test_absurd_paths_and_texts_are_named_with_their_option(program, flag, value, message, good, tmp_path, capsys):
    value, message = (text.replace("GOOD", str(good)) for text in (value, message))
    assert message in _error(*program(tmp_path, good, f"--{flag}={value}"), capsys)
    assert good.read_bytes() == TWO


def test_config_text_that_only_python_can_give_is_checked_too(good):
    with pytest.raises(ValueError, match="teacher_system: got the lone surrogate U"):
        config.OPDConfig(student="x", prompts=str(good), teacher_system="a\ud800").check()


def test_models_by_package_take_names_alone(tmp_path):
    for name in ("package:../x", "package:", "package:a b"):
        with pytest.raises(ModuleNotFoundError, match=r"weights: the package .* is not installed"):
            models.location(name)


def test_load_prompts_names_the_splits_of_a_saved_dataset(tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"prompt": "Who?"}])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"prompts: .*splits has no split 'train', expected one of: test"):
        load_prompts(tmp_path / "splits", "train")
