"""Teachers on disk: what a folder answers against what the server answered, and folders that are damaged, foreign or not whole.

  Compared: lists, loss and gradient from the folder with those from the server, and runs with the folder alone with runs with
  the server, all to the bit; the requests that a server still receives.
  Run: make test ARGS=tests/trainer/test_stored.py

Not here: the servers' protocols (servers/), options that do not fit each other (test_config.py).
"""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opd_ops import TailAware, selective_opd_loss
from opd_ops.trainer import loop
from opd_ops.trainer import stored_teacher as stored
from opd_ops.trainer.servers.retries import ServerError
from opd_ops.trainer.servers.teacher import ServedTeacher
from opd_ops.trainer.stored_shard import Origin, Shard, StoredAnswer, write_shard
from opd_ops.trainer.stored_teacher import StoredTeacher, StoreError, StoringTeacher, vocabulary_digest
from tests.integrations.models import VOCAB, tokenizer
from tests.support.cases import generator, leaf
from tests.support.servers import Clock, StandIn, prompt_logprobs, scripted
from tests.trainer.runs import trainer

CONTEXTS, ANSWERS = [[5, 6, 7], [9], [4, 8], [5, 6]], [[10, 11], [12, 13, 14, 15, 12], [], [7, 10, 11]]
K = 4
LISTS = {"taught_by": None, "divergence": "tail_aware", "teacher_top_k": K, "lora_rank": 2}
LISTS |= {"gradient_accumulation_steps": 1, "max_new_tokens": 4, "eval_size": 2}


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Clock(monkeypatch)


@pytest.fixture
def server():
    """The address, and the requests."""
    with scripted(StandIn(prompt_logprobs)) as (url, asked):
        yield url, asked


def keeping(url, folder, **options):
    return StoringTeacher(ServedTeacher(url, top_k=K), folder, **{"tokenizer": "t"} | options)


def scored(asked):
    """The tokens of the requests, sorted: they come at the same time."""
    return sorted(body["prompt"] for path, body, _ in asked if path == "/v1/completions")


def filled(folder, url):
    """A folder with one shard, its path, and what the server said."""
    lists = keeping(url, folder).score(CONTEXTS, ANSWERS)
    (path,) = folder.glob("*.safetensors")
    return path, lists


def same(lists, others):
    assert torch.equal(lists.ids, others.ids)
    assert torch.equal(lists.logprobs, others.logprobs)


# --- what it answers -------------------------------------------------------------------------------------------------


def test_lists_loss_and_gradient_from_the_folder_are_the_server_s_to_the_bit(tmp_path, server):
    url, _ = server
    expected = ServedTeacher(url, top_k=K).score(CONTEXTS, ANSWERS)
    assert (expected.ids[0, 0] == -1).any()  # K and K + 1 entries, and missing ones
    same(filled(tmp_path, url)[1], expected)
    lists = StoredTeacher(tmp_path).score(CONTEXTS, ANSWERS)
    same(lists, expected)
    mask = torch.tensor([[i < len(answer) for i in range(5)] for answer in ANSWERS])
    outs = []
    for teacher in (lists, expected):
        student = leaf(3 * torch.randn(4, 5, VOCAB, generator=generator(1)))
        out = selective_opd_loss(student, teacher, mask=mask, divergence=TailAware(K), fraction=0.5)
        outs.append((out.loss, *torch.autograd.grad(out.loss, student)))
    assert outs[0][0] > 0
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


def test_answers_are_reached_by_number_and_by_their_tokens(tmp_path, server):
    lists = filled(tmp_path, server[0])[1]
    teacher = StoredTeacher(tmp_path, teacher="tiny", tokenizer="t", top_k=K)
    assert [(x.context, x.answer) for x in teacher] == [(CONTEXTS[b], ANSWERS[b]) for b in (0, 1, 3)]
    assert len(teacher) == 3
    assert torch.equal(teacher[1].ids, lists.ids[1])
    assert torch.equal(teacher.find([5, 6], [7, 10, 11]).logprobs, lists.logprobs[3, :3])
    assert teacher.find([5, 6, 7, 10], [11]) is None  # the same tokens, divided elsewhere
    assert teacher.score([[3]], [[]]).ids.shape == (1, 0, K + 1)
    same(
        teacher.score([[5, 6], [9]], [[7, 10, 11], ANSWERS[1]]),
        StoredTeacher(tmp_path).score([[5, 6], [9]], [[7, 10, 11], ANSWERS[1]]),
    )
    with pytest.raises(ValueError, match="contexts: number 0 is empty"):
        teacher.score([[]], [[1]])


def test_an_answer_that_the_folder_lacks_is_named(tmp_path, server):
    filled(tmp_path, server[0])
    with pytest.raises(StoreError) as error:
        StoredTeacher(tmp_path).score([*CONTEXTS, [1, 2]], [*ANSWERS, [3, 4]])
    assert f"{tmp_path}: lacks 1 of 5 answers, the first has the tokens [3, 4] … after a context of 2 tokens, [1, 2]" in str(
        error.value
    )
    assert "with teacher_url" in str(error.value)


def test_two_answers_of_one_key_are_told_apart_by_their_tokens(tmp_path, server, monkeypatch):
    filled(tmp_path, server[0])
    monkeypatch.setattr(stored, "_key", lambda context, answer: b"one")
    with pytest.raises(ValueError, match="has other tokens than when it was opened"):
        StoredTeacher(tmp_path).score([[1, 2]], [[3]])


# --- filling it ------------------------------------------------------------------------------------------------------


def test_only_what_the_folder_lacks_is_asked(tmp_path, server):
    url, asked = server
    first = keeping(url, tmp_path).score(CONTEXTS[:2], ANSWERS[:2])
    (tmp_path / "left-000000.safetensors.partial").write_bytes(b"half of a shard of a killed run")
    assert scored(asked) == [[5, 6, 7, 10, 11], [9, 12, 13, 14, 15, 12]]
    asked.clear()
    again = keeping(url, tmp_path)
    lists = again.score([*CONTEXTS, [5, 6]], [*ANSWERS, [7, 10, 11]])
    assert scored(asked) == [[5, 6, 7, 10, 11]]  # [5, 6] + [7, 10, 11], once
    assert torch.equal(lists.ids[:2], first.ids)
    asked.clear()
    same(again.score(CONTEXTS, ANSWERS), StoredTeacher(tmp_path).score(CONTEXTS, ANSWERS))
    assert asked == []
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_shard_grows_to_its_size_and_is_whole_after_every_call(tmp_path, server, monkeypatch):
    monkeypatch.setattr(stored, "SHARD_BYTES", 8 * (K + 1) * 7)  # more than 7 tokens fill one
    teacher = keeping(server[0], tmp_path)
    sizes = []
    for i in range(6):
        teacher.score([[20 + i]], [[10, 11, 12]])
        sizes.append(sorted(len(Shard(path)) for path in tmp_path.glob("*.safetensors")))
    assert sizes == [[1], [2], [3], [1, 3], [2, 3], [3, 3]]
    assert [x.context for x in teacher.stored] == [[20 + i] for i in range(6)]
    assert len(StoredTeacher(tmp_path)) == 6


def test_a_server_that_fails_leaves_the_folder_as_it_was(tmp_path, server):
    path, _ = filled(tmp_path, server[0])
    before = path.read_bytes()
    with scripted(StandIn(prompt_logprobs, fails=[400])) as (url, _), pytest.raises(ServerError, match="answered 400"):
        keeping(url, tmp_path).score([[1]], [[2]])
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_a_full_disk_is_an_error_that_ends_all_processes(tmp_path, server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "write_shard", full)
    with pytest.raises(
        StoreError, match=r"-000000\.safetensors: cannot be written \(No space left on device\); free some room"
    ):
        keeping(server[0], tmp_path).score([[1]], [[2]])


def fill(folder, rank):
    """What a process does; no server: its answers are made here."""
    origin = Origin("tiny", "t", 1)
    for i in range(20):
        lists = torch.full((2, 2), 100 * rank + i), torch.full((2, 2), -1.0)
        write_shard(folder / f"{rank}-{i}.safetensors", origin, [StoredAnswer([rank, i], [1, 2], *lists)])
        if i % 5 == 0:
            StoredTeacher(folder)  # no half shard of the other process is seen


def test_two_processes_fill_one_folder(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, rank)) for rank in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    teacher = StoredTeacher(tmp_path)
    assert len(teacher) == 40
    assert teacher.find([2, 7], [1, 2]).ids.tolist() == [[207] * 2] * 2


# --- shards that are refused -----------------------------------------------------------------------------------------


def altered(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # a bit of a tensor
    path.write_bytes(data)


def renamed(path):
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, header | {"teacher": "huge"})


def without_a_number(path):
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, header | {"top_k": "x"})


def folder_of_its_name(path):
    path.unlink()
    path.mkdir()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def other_file(path):
    save_file({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "cannot be read as a whole shard .*truncated; put the file back .* teacher_url and teacher_store asks"),
        (lambda path: path.write_bytes(b""), "cannot be read as a whole shard"),
        (altered, "is not what was written, its SHA-256 differs .*; put the file back"),
        (renamed, "is not what was written, its SHA-256 differs"),
        (without_a_number, "is not what was written, its SHA-256 differs"),
        (folder_of_its_name, "cannot be read as a whole shard"),
        (other_file, "its header has format None, expected 'opd_ops stored teacher, version 1'; move the file out"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(damage, message, tmp_path, server):
    path, _ = filled(tmp_path, server[0])
    damage(path)
    for opened in (StoredTeacher, lambda folder: keeping(server[0], folder)):
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            opened(tmp_path)


def test_a_foreign_shard_is_refused_by_name(tmp_path, server):
    path, _ = filled(tmp_path, server[0])
    for expected, message in (
        ({"teacher": "huge"}, "has teacher 'tiny', expected 'huge'; use one folder for each teacher"),
        ({"tokenizer": "u"}, "has tokenizer 't', expected 'u'"),
        ({"top_k": 8}, r"has top_k 4, expected 8; .*teacher_top_k"),
    ):
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            StoredTeacher(tmp_path, **expected)
    with pytest.raises(ValueError, match=f"{path}: has teacher 'tiny', expected 'huge'"):
        keeping(server[0], tmp_path, teacher="huge")
    answer = StoredAnswer([1], [2], torch.tensor([[2, 3]]), torch.tensor([[-1.0, -2.0]]))
    write_shard(tmp_path / "z.safetensors", Origin("tiny", "t", 1), [answer])
    with pytest.raises(ValueError, match=r"z\.safetensors: has top_k 1, expected 4"):
        StoredTeacher(tmp_path)


def test_a_folder_without_a_shard_is_refused(tmp_path):
    (tmp_path / "x.safetensors.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"{tmp_path}: has no shard .* teacher_url and teacher_store"):
        StoredTeacher(tmp_path, top_k=4)


# --- runs ------------------------------------------------------------------------------------------------------------


def outcome(folder):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, (folder / "model" / "adapter_model.safetensors").read_bytes()


def test_a_run_with_the_folder_alone_is_the_run_with_the_server_to_the_bit(tmp_path, server):
    url, asked = server
    folder = str(tmp_path / "answers")
    trainer(tmp_path / "served", steps=2, teacher_url=url, **LISTS).train()
    n_asked = len(scored(asked))
    trainer(tmp_path / "kept", steps=2, teacher_url=url, teacher_store=folder, **LISTS).train()
    assert len(scored(asked)) < 2 * n_asked  # the held-out answers of the second evaluation are kept
    asked.clear()
    trainer(tmp_path / "alone", steps=2, teacher_store=folder, **LISTS).train()
    assert asked == []
    assert outcome(tmp_path / "served") == outcome(tmp_path / "kept") == outcome(tmp_path / "alone")
    assert len(outcome(tmp_path / "alone")[0]) == 4
    assert f"Teacher: {folder}." in (tmp_path / "alone" / "model" / "README.md").read_text()


@pytest.mark.full
def test_a_run_that_lacks_an_answer_saves_and_continues_once_it_is_there(tmp_path, server):
    url, folder = server[0], str(tmp_path / "answers")
    trainer(tmp_path / "short", steps=1, teacher_url=url, teacher_store=folder, **LISTS).train()
    with pytest.raises(ServerError, match=r"lacks 2 of 2 .* Saved after step 1: pass resume to continue once that is mended"):
        trainer(tmp_path / "alone", steps=2, teacher_store=folder, **LISTS).train()
    trainer(tmp_path / "whole", steps=2, teacher_url=url, teacher_store=folder, **LISTS).train()
    trainer(tmp_path / "alone", steps=2, teacher_store=folder, resume=True, **LISTS).train()
    assert outcome(tmp_path / "alone") == outcome(tmp_path / "whole")


def test_a_folder_of_other_weights_of_the_same_name_is_refused(tmp_path, server):
    url, folder = server[0], str(tmp_path / "answers")
    trainer(tmp_path / "old", steps=1, teacher_url=url, teacher_store=folder, teacher_digest="a1", **LISTS).train()
    for options in ({}, {"teacher_url": url}):
        with pytest.raises(ValueError, match=r"safetensors: has teacher 'a1', expected 'b2'; use one folder for each teacher"):
            trainer(tmp_path / "new", steps=1, teacher_store=folder, teacher_digest="b2", **options, **LISTS)


def test_a_damaged_or_foreign_folder_is_refused_before_the_student_loads(tmp_path, server, monkeypatch):
    monkeypatch.setattr(loop, "make_trainable", lambda *_: pytest.fail("the student was prepared"))
    url, folder = server[0], tmp_path / "answers"
    folder.mkdir()
    origin = {"tokenizer": vocabulary_digest(tokenizer())}
    keeping(url, folder, **origin).score(CONTEXTS, ANSWERS)
    for options in ({}, {"teacher_url": url}):
        with pytest.raises(ValueError, match="has top_k 4, expected 16"):
            trainer(tmp_path, steps=1, teacher_store=str(folder), **options, **LISTS | {"teacher_top_k": 16})
    truncated(next(folder.iterdir()))
    with pytest.raises(ValueError, match="cannot be read as a whole shard"):
        trainer(tmp_path, steps=1, teacher_store=str(folder), **LISTS)
