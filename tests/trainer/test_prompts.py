"""Prompts and the order in which steps take them: rows of a file against the conversations they stand for; micro-batches of any
cut of a step against the same endless sequence.

Command: make test ARGS=tests/trainer/test_prompts.py
Not here: their tokens (test_rollouts.py).
"""

from __future__ import annotations

import json

import datasets
import pytest

from opd_ops.trainer.order import prompt_indices, seed_of
from opd_ops.trainer.prompts import Prompt, PromptSource, held_out, load_prompts

ROWS = [
    {"prompt": "Why?\u2028"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], "answer": 4},
    {"prompt": "How?", "teacher_system": "You know how."},
]


def test_load_prompts_reads_jsonl_and_saved_datasets(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")
    expected = [
        Prompt.of("Why?\u2028"),
        Prompt((("system", "Be brief."), ("user", "2 + 2?")), answer="4"),
        Prompt.of("How?", teacher_system="You know how."),
    ]
    assert load_prompts(file) == expected
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "Why?"}, {"prompt": "How?"}]).save_to_disk(str(folder))
    assert load_prompts(folder) == [Prompt.of("Why?"), Prompt.of("How?")]
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"prompt": "Who?"}])}).save_to_disk(str(tmp_path / "splits"))
    assert load_prompts(tmp_path / "splits", "test") == [Prompt.of("Who?")]


def test_load_prompts_asks_for_the_configuration_and_split_of_a_dataset(monkeypatch):
    asked = []

    def load(path, *, name, split):
        asked.append((path, name, split))
        return [{"prompt": "Why?"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    load_prompts("gsm8k", "test", "main")
    load_prompts("gsm8k")
    assert asked == [("gsm8k", "main", "test"), ("gsm8k", None, "train")]


def test_sources_are_the_same_where_their_prompts_are(tmp_path):
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(str(tmp_path / "whole"))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(str(tmp_path / "splits"))

    def is_split(source):
        return PromptSource(source, "train").what() != PromptSource(source, "test").what()

    assert is_split("gsm8k")
    assert is_split(str(tmp_path / "splits"))
    assert not is_split(str(tmp_path / "whole"))
    assert PromptSource("gsm8k", name="main").what() != PromptSource("gsm8k", name="socratic").what()


def test_conversation_puts_the_system_message_in_the_place_of_the_prompts_own():
    prompt = Prompt((("system", "Be brief."), ("user", "Why?")))
    assert prompt.conversation() == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert prompt.conversation("Be long.") == [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Why?"}]
    assert prompt.text == "Why?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"question": "b"}', r"row 2: got \['question'\], expected 'prompt' \(text\) or 'messages'"),
        ('{"messages": [{"role": "user"}]}', "row 1: .* expected 'prompt'"),
        ('{"prompt": ""}', "row 1: .* expected 'prompt'"),
        ('{"prompt": 5}', "row 1: .* expected 'prompt'"),
        ('{"prompt": "a", "teacher_system": 7}', "row 1: got teacher_system 7, expected text"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "row 1: ends with an answer of the assistant",
        ),
        ("[1]", "row 1: got list, expected an object"),
        ('{"prompt": "a"}\nnot json', "p.jsonl:2: got 'not json', expected a line of JSON"),
        ("\n", "prompts: got no row"),
    ],
)
def test_load_prompts_rejects_other_rows(text, message, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(file)


def test_held_out_takes_the_last_and_leaves_some():
    prompts = [Prompt.of(str(i)) for i in range(5)]
    assert held_out(prompts, 2) == (prompts[:3], prompts[3:])
    assert held_out(prompts, 0) == (prompts, [])
    with pytest.raises(ValueError, match="eval_size: got 5 of 5 prompts, expected fewer"):
        held_out(prompts, 5)


def test_prompt_indices_are_shuffled_passes_however_a_step_is_cut():
    def sequence(n_micro_batches, batch_size, steps, seed=3):
        cut = {"n_micro_batches": n_micro_batches, "batch_size": batch_size, "n_prompts": 7, "seed": seed}
        return [i for step in range(steps) for g in range(n_micro_batches) for i in prompt_indices(step, g, **cut)]

    whole = sequence(1, 12, 7)
    assert whole == sequence(4, 3, 7) == sequence(6, 2, 7)
    passes = [whole[i : i + 7] for i in range(0, 84, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1]
    assert whole != sequence(1, 12, 7, seed=4)


def test_seed_of_is_the_same_everywhere_and_differs_by_every_part():
    assert seed_of(0, "sample", 1, 2) == 1713230567727193427
    assert len({seed_of(*parts) for parts in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"))}) == 5
    assert 0 <= seed_of(0) < 2**63
