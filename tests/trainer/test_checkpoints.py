"""Checkpoints whose files are damaged, one kind of file after the other: the run continues from the newest intact one and is
the undamaged run bit for bit; what a run without `resume` leaves alone; prompts that were edited.

Command: make test ARGS=tests/trainer/test_checkpoints.py
Not here: which checkpoints are good after a blow-up (test_blow_up.py), sharded ones (test_processes.py).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from opd_ops.trainer.checkpoints import SETTINGS, TEACHER, Checkpoints, check_resume, complete, damage
from opd_ops.trainer.config import OPDConfig
from opd_ops.trainer.files import write_whole
from tests.integrations.models import tokenizer
from tests.trainer import runs
from tests.trainer.runs import prompts, trainer

OPTIONS = {"save_every": 1, "keep_checkpoints": 3, "eval_every": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished")
    trainer(folder, steps=3, **OPTIONS).train()
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _cut(path):
    size = path.stat().st_size
    os.truncate(path, size // 2)
    return f"{path.name} has {size // 2} bytes of {size}"


def _empty(path):
    os.truncate(path, 0)
    return f"{path.name} does not list the files"


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return f"{path.name} is not what was written"


def _remove(path):
    path.unlink()
    return f"{path.name} is missing"


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", _cut),
        ("optimizer.bin", _cut),
        ("held_out.safetensors", _cut),
        ("run.json", _empty),
        ("run.json", lambda path: _cut(path).partition(" ")[0] + " does not list the files"),
        ("model.safetensors", _flip),
        ("custom_checkpoint_0.pkl", _remove),
    ],
)
def test_resume_takes_the_newest_intact_checkpoint_and_says_so(name, harm, finished, folder, capsys):
    newest, older = folder / "checkpoints" / "step-000003", folder / "checkpoints" / "step-000002"
    defect = harm(newest / name)
    run = trainer(folder, steps=3, resume=True, **OPTIONS | {"keep_checkpoints": 2})
    run.train()
    assert f"{newest}: {defect}; it is now damaged-step-000003, and the run continues from {older}" in capsys.readouterr().out
    assert (folder / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()
    weights = [load_file(x / "checkpoints" / "step-000003" / "model.safetensors") for x in (finished, folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(x, weights[1][key]) for key, x in weights[0].items())
    assert sorted(path.name for path in newest.parent.iterdir()) == ["damaged-step-000003", "step-000002", "step-000003"]


def test_a_checkpoint_lists_all_its_files(finished):
    for path in complete(finished / "checkpoints"):
        listed = json.loads((path / SETTINGS).read_text())["files"]
        assert {*listed, SETTINGS} == {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert {"model.safetensors", "optimizer.bin", "held_out.safetensors"} <= listed.keys()
        assert damage(path) is None


def test_a_digest_needs_nothing_of_python_3_11(finished, monkeypatch):
    path = complete(finished / "checkpoints")[-1] / "model.safetensors"
    saved = json.loads((path.parent / SETTINGS).read_text())["files"][path.name]["sha256"]
    monkeypatch.delattr(hashlib, "file_digest")
    assert damage(path.parent) is None
    assert saved == hashlib.sha256(path.read_bytes()).hexdigest()


def test_resume_refuses_when_no_checkpoint_is_intact_and_begins_anew_without_them(finished, folder):
    for path in complete(folder / "checkpoints"):
        _cut(path / "optimizer.bin")
    message = (
        r"resume: no checkpoint in .* is intact \(step-000003: optimizer.bin has .* step-000001: .*or remove .*: resume then"
    )
    with pytest.raises(ValueError, match=message):
        trainer(folder, steps=3, resume=True, **OPTIONS)
    shutil.rmtree(folder / "checkpoints")
    trainer(folder, steps=3, resume=True, **OPTIONS).train()
    assert (folder / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


@pytest.mark.parametrize("left", ["checkpoints", "model"])
def test_a_run_without_resume_leaves_the_checkpoints_and_the_model_of_another_alone(left, folder):
    """Also where its log is gone."""
    for path in folder.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"output_dir: .* holds a run; pass resume to continue it, or another folder"):
        trainer(folder, steps=1, **OPTIONS)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_does_without_the_log(folder):
    (folder / "log.jsonl").unlink()
    trainer(folder, steps=4, resume=True, **OPTIONS).train()
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [4, 4]


@pytest.mark.parametrize(("edited", "name"), [(0, "prompts"), (11, "held-out prompts")])
def test_resume_refuses_prompts_that_were_edited(edited, name, folder):
    asked = prompts()
    asked[edited] = dataclasses.replace(asked[edited], answer="w10")
    with pytest.raises(ValueError, match=f"resume: the {name} are not those that .*step-000003 was trained with; put their"):
        trainer(folder, steps=4, resume=True, asked=asked, **OPTIONS)


MESSAGES = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.mark.parametrize("changed", ["w9 " + MESSAGES, "{% if messages[0]['role'] == 'system' %}w9 {% endif %}" + MESSAGES])
def test_resume_refuses_another_chat_template(changed, tmp_path, monkeypatch):
    """One of student and teacher, and one of the teacher alone; a template that prints the date is another one each day."""

    def run(template):
        words = tokenizer()
        words.chat_template = template
        monkeypatch.setattr(runs, "tokenizer", lambda: words)
        return trainer(tmp_path, steps=1, resume=True, eval_size=0, taught_by=None, teacher_system="w5")

    run(MESSAGES).train()
    run(MESSAGES)
    with pytest.raises(
        ValueError, match=r"resume: the prompts' token ids are not those that .*step-000001 .*; put the tokenizer"
    ):
        run(changed)


def test_a_step_keeps_its_number_of_micro_batches_on_other_processes(finished):
    path = complete(finished / "checkpoints")[-1]
    assert json.loads((path / SETTINGS).read_text())["num_processes"] == 1

    def resumed(accumulated, ranks, **options):
        record = json.loads((path / SETTINGS).read_text())["config"]  # two micro-batches on one process
        config = OPDConfig(**record | {"gradient_accumulation_steps": accumulated} | options)
        return check_resume(path, config, {}, ranks)

    assert resumed(2, 1) == resumed(1, 2) == {}
    message = "resume: .* is of another run: gradient_accumulation_steps was 2 on 1 processes and is {} on {}; keep the same"
    for accumulated, ranks in ((2, 2), (1, 1), (4, 1)):
        with pytest.raises(ValueError, match=message.format(accumulated, ranks)):
            resumed(accumulated, ranks)


def test_a_budget_over_the_processes_keeps_their_number(tmp_path):
    two, one = (OPDConfig(scope="global", gradient_accumulation_steps=n) for n in (2, 1))
    _record(tmp_path, two, num_processes=1)
    assert check_resume(tmp_path, two, {}, 1) == {}
    with pytest.raises(ValueError, match="gradient_accumulation_steps was 2 on 1 processes and is 1 on 2; keep both"):
        check_resume(tmp_path, one, {}, 2)


def _record(folder, config, **more):
    (folder / SETTINGS).write_text(json.dumps({"step": 2, "config": dataclasses.asdict(config), "prompts": {}} | more))


SERVED = OPDConfig(teacher_url="http://a", rollout_url="http://b", prompts="p")


@pytest.mark.parametrize(
    "moved",
    [
        {"teacher_url": "http://c"},
        {"teacher_url": None, "teacher_store": "answers"},
        {"rollout_url": "http://c"},
        {"prompts": "./p"},
        {"eval_prompts": "q", "eval_prompts_split": "test"},
    ],
)
def test_servers_and_prompts_may_move(moved, tmp_path):
    """The prompts' digests stay."""
    _record(tmp_path, SERVED)
    assert check_resume(tmp_path, dataclasses.replace(SERVED, **moved), {"prompts": "1"}, 1) == {}


def test_a_folder_takes_the_place_of_a_server_of_any_kind_with_the_same_weights(tmp_path):
    server = dataclasses.replace(SERVED, teacher_model="m", teacher_api="sglang")
    _record(tmp_path, server, prompts={TEACHER: "m"})
    folder = dataclasses.replace(SERVED, teacher_url=None, teacher_store="answers")
    assert check_resume(tmp_path, folder, {TEACHER: "m"}, 1) == {}
    with pytest.raises(ValueError, match=r"the teacher's weights are not those that .* was trained with; let the server serve"):
        check_resume(tmp_path, folder, {TEACHER: "n"}, 1)


@pytest.mark.parametrize("name", ["teacher_url", "rollout_url"])
def test_a_server_is_no_model_of_this_machine(name, tmp_path):
    other = dataclasses.replace(SERVED, **{name: None})
    for old, new in ((SERVED, other), (other, SERVED)):
        _record(tmp_path, old)
        with pytest.raises(
            ValueError, match=f"of another run: {name} was {getattr(old, name)!r} and is {getattr(new, name)!r};"
        ):
            check_resume(tmp_path, new, {}, 1)


def test_an_option_that_the_record_lacks_has_its_default(tmp_path):
    """The record of an earlier version."""
    _record(tmp_path, SERVED)
    record = json.loads((tmp_path / SETTINGS).read_text())
    del record["config"]["top_p"], record["config"]["fraction_end"]
    (tmp_path / SETTINGS).write_text(json.dumps(record))
    assert check_resume(tmp_path, SERVED, {}, 1) == {}
    with pytest.raises(ValueError, match=r"of another run: top_p was 1.0 and is 0.5, fraction_end was None and is 0.01;"):
        check_resume(tmp_path, dataclasses.replace(SERVED, top_p=0.5, fraction_end=0.01), {}, 1)


def test_resume_names_the_line_of_a_log_that_it_cannot_read(folder):
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], "\0\0\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"log.jsonl:2: got .*, expected a line of the log; remove that line"):
        trainer(folder, steps=4, resume=True, **OPTIONS)


def test_a_checkpoint_beyond_six_digits_is_the_newest(tmp_path):
    for step in (999999, 1000000):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / SETTINGS).write_text("{}")
    assert [path.name for path in complete(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_copy_beside_the_checkpoints_is_none_of_them(finished, folder):
    checkpoints = folder / "checkpoints"
    newest = complete(checkpoints)[-1]
    shutil.copytree(newest, checkpoints / f"{newest.name}-copy")
    assert [path.name for path in complete(checkpoints)] == [path.name for path in complete(finished / "checkpoints")]


def test_a_run_json_that_cannot_be_written_makes_no_checkpoint(folder, monkeypatch):
    flush = os.fsync

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("run.json.partial"):
            raise OSError("the disk is full")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        trainer(folder, steps=4, resume=True, **OPTIONS).train()
    assert (folder / "checkpoints" / "step-000004" / "model.safetensors").exists()
    assert [path.name for path in complete(folder / "checkpoints")] == ["step-000001", "step-000002", "step-000003"]


def test_a_checkpoint_that_cannot_be_deleted_is_incomplete_and_tried_again(folder, monkeypatch, caplog):
    checkpoints, delete = folder / "checkpoints", shutil.rmtree
    refused = [checkpoints / "step-000001"]

    def busy(path, **options):
        if path in refused:  # once; a network file system keeps the name of a file that is open
            refused.remove(path)
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    seen = []
    write = Checkpoints._write_record
    monkeypatch.setattr(Checkpoints, "_write_record", lambda self, *x: (seen.append(_names(checkpoints)), write(self, *x)))
    trainer(folder, steps=5, resume=True, **OPTIONS).train()
    assert seen[1] == (["1", "2", "3", "4", "5"], ["2", "3", "4"])
    assert _names(checkpoints) == (["3", "4", "5"], ["3", "4", "5"])
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "opd_ops"]
    assert warning == f"{checkpoints}/step-000001: cannot be deleted (Directory not empty); the next checkpoint tries it again"


def _names(checkpoints):
    """Of all, and of those that are complete."""
    return sorted(path.name[-1] for path in checkpoints.iterdir()), [path.name[-1] for path in complete(checkpoints)]


def test_write_whole_leaves_the_old_text_where_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_whole(path, "old")

    def fail(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
