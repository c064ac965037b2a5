"""The study's runs on tiny models: what arms of one seed share, the files, the order, continuing, the healed student.

Command: make test ARGS=tests/benchmarks/study/test_run.py
Not here: statistics and page (test_report.py), the diagnostics (tests/diagnostics/), real weights (benchmarks/results/study/).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.study import pairs as study_pairs
from benchmarks.study import run as study
from benchmarks.study.plan import ARMS, FRACTIONS, SELECTORS, SIZES, Arm, Job, Sizes, jobs
from benchmarks.study.records import Frozen, Run, frozen_name, read, stats_of
from benchmarks.study.train import hold_out, run_arm
from opd_ops import score_positions
from opd_ops.trainer.order import prompt_indices
from opd_ops.trainer.rollouts import context_ids, head_over
from tests.integrations.models import language_model, llama_model, tokenizer
from tests.trainer.runs import prompts

TINY = Sizes(learning_rate=2e-3, steps=2, evaluated=(1, 2), batch_size=3, max_new_tokens=5, held_out_tokens=6)
PLANNED = [Job(seed, "tiny", arm) for seed in (0, 1) for arm in (Arm(), Arm("random", 0.2), Arm("dial", 0.2, "sampled"))]


@pytest.fixture(scope="module")
def pair():
    model = language_model(0).requires_grad_(False)
    return study_pairs.Pair("tiny", model, model, tokenizer(), "w5 w6 w7", tuple(prompts(9)), tuple(prompts(12)[9:]))


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "in_child", in_this_process)
        assert study.run_all(folder, {"tiny": pair}, {"tiny": TINY}, PLANNED) == []
    return folder


def in_this_process(work):
    work()
    return True


def test_every_run_is_planned_once_and_seed_after_seed():
    planned = list(jobs(3))
    assert len(ARMS) == 1 + len(SELECTORS) * len(FRACTIONS) + 1 + 4
    assert len({job.file_name for job in planned}) == len(planned) == 3 * len(SIZES) * len(ARMS)
    assert [job.seed for job in planned] == sorted(job.seed for job in planned)


def test_arms_of_a_seed_share_their_tokens_and_their_start(runs):
    by_job = {(job.seed, job.arm.name): read(Run, runs / job.file_name) for job in PLANNED}
    for (seed, _), run in by_job.items():
        assert run.steps == [0, 1, 2]
        assert run.forward_kl[0] == by_job[seed, "all"].forward_kl[0]
        assert run.n_valid > 0
    assert by_job[0, "all"].forward_kl[0] != by_job[1, "all"].forward_kl[0]
    whole, part = by_job[0, "all"], by_job[0, "random-20"]
    assert whole.n_trained == whole.n_valid
    # Rounded up in each of two steps.
    assert 0.2 * part.n_valid <= part.n_trained < 0.2 * part.n_valid + 2
    assert sum(whole.forward_kl[2]) < sum(whole.forward_kl[0])
    assert part.forward_kl[2] != whole.forward_kl[2]


def test_every_arm_of_the_plan_trains_on_its_share(pair):
    sizes = replace(TINY, steps=1, evaluated=(1,))
    held_out = hold_out(pair, sizes, 0)
    runs = {arm: run_arm(pair, sizes, arm, 0, held_out) for arm in ARMS}
    for arm, run in runs.items():
        # "teachability-released" adds a token for every answer without one.
        added = sizes.batch_size if arm.selector == "teachability-released" else 0
        assert arm.fraction * run.n_valid <= run.n_trained <= arm.fraction * run.n_valid + 1 + added, arm.name
        assert run.reverse_kl[1] != run.reverse_kl[0], arm.name
    ends = {arm.name: tuple(run.reverse_kl[1]) for arm, run in runs.items()}
    names = ("all", "all-sampled", "weights-teachability", "random-20", "random-20-sampled", "prefix-20", "entropy-20")
    assert len({ends[name] for name in names}) == len(names)


def test_the_files_hold_the_statistics_of_the_frozen_tokens(pair, runs):
    frozen, run = read(Frozen, runs / frozen_name("tiny", 0)), read(Run, runs / PLANNED[0].file_name)
    held_out = hold_out(pair, TINY, 0)
    head = head_over(pair.student, pair.tokenizer, held_out.answers)
    _, expected = score_positions(head, held_out.teacher_head, mask=held_out.answers.mask)
    stats = stats_of(frozen)
    assert torch.equal(stats.valid, expected.valid)
    for name in ("union_kl", "support_mass", "student_entropy", "forward_kl"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name).double(), rtol=0, atol=6e-5)
    sums = (expected.forward_kl.double() * expected.valid).sum(1)
    torch.testing.assert_close(torch.tensor(run.forward_kl[0]).double(), sums, rtol=0, atol=6e-5)
    for measure, sums in (("forward_kl", run.forward_kl[2]), ("reverse_kl", run.reverse_kl[2])):
        after = run.after[measure]["2"]
        assert 1e-4 * sum(after) == pytest.approx(sum(sums), abs=1e-4 * len(after))
    assert max(path.stat().st_size for path in runs.iterdir()) < 20_000


def test_work_is_counted_by_hand(pair, runs):
    run = read(Run, runs / PLANNED[0].file_name)
    # Queries and output, keys and values of half the heads, biases; the MLP; two norms.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + (32 + 16 + 16) + 3 * 32 * 64 + 2 * 32
    answers = run.multiply_adds["head"] // (64 * 32)  # positions of answers over all steps
    assert 0 < answers <= TINY.steps * TINY.batch_size * TINY.max_new_tokens
    assert run.multiply_adds["student"] == 3 * (run.multiply_adds["sampling"] - run.multiply_adds["head"])
    columns = run.multiply_adds["student"] // (3 * 2 * layer)
    prompt_columns = 0
    for step in range(TINY.steps):
        shuffled = prompt_indices(step, 0, n_micro_batches=1, batch_size=TINY.batch_size, n_prompts=9, seed=0)
        longest = max(len(context_ids(pair.tokenizer, pair.training[i])) for i in shuffled)
        prompt_columns += TINY.batch_size * longest
    assert columns == answers + prompt_columns
    # The teacher's instruction has three words.
    assert run.multiply_adds["teacher"] == 2 * layer * (columns + TINY.steps * TINY.batch_size * 3)


def test_a_study_continues_where_it_was_stopped(pair, runs, monkeypatch):
    made = []
    monkeypatch.setattr(study, "in_child", lambda work: bool(made.append(work.args[2])) or in_this_process(work))
    stopped = PLANNED[4]
    before = read(Run, runs / stopped.file_name)
    (runs / stopped.file_name).unlink()
    assert study.run_all(runs, {"tiny": pair}, {"tiny": TINY}, PLANNED) == []
    assert made == [stopped]
    assert read(Run, runs / stopped.file_name).forward_kl == before.forward_kl


def test_no_run_begins_once_the_hours_are_spent(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "in_child", in_this_process)
    monkeypatch.setattr(study, "CPU_HOURS", 1e-9)
    assert study.run_all(tmp_path, {"tiny": pair}, {"tiny": TINY}, PLANNED) == []
    assert "stopped before tiny-all-seed0: the plan's 1e-09 CPU hours are spent" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [frozen_name("tiny", 0)]


def test_runs_of_another_plan_are_refused(runs):
    with pytest.raises(ValueError, match=r"runs: .*tiny-all-seed0.json has .*steps=2.*, expected .*steps=3.*; move it"):
        study.unfinished(runs, PLANNED, {"tiny": replace(TINY, steps=3)})


def test_a_command_makes_the_runs_of_its_seeds(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(study, "is_healed", lambda: True)
    monkeypatch.setattr(study, "load_pairs", dict)
    monkeypatch.setattr(study, "run_all", lambda folder, pairs, sizes, jobs: planned.extend(jobs))
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)
    study.main(["--runs", str(tmp_path), "--seeds", "3", "1"])
    assert [job.file_name for job in planned] == [job.file_name for job in jobs() if job.seed in (1, 3)]


def test_a_child_tells_whether_it_succeeded(tmp_path):
    assert study.in_child((tmp_path / "made").touch)
    assert (tmp_path / "made").exists()
    assert not study.in_child((tmp_path / "absent").unlink)


def test_a_failed_run_is_named_and_leaves_no_file(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "in_child", lambda work: False)
    assert study.run_all(tmp_path, {"tiny": pair}, {"tiny": TINY}, PLANNED[:1]) == PLANNED[:1]
    assert not (tmp_path / PLANNED[0].file_name).exists()


def test_the_shallow_student_is_healed_once_and_then_read(tmp_path, monkeypatch):
    teacher, words = llama_model(1).requires_grad_(False), tokenizer()
    healing = study_pairs.Healing(
        first_dropped=0, n_dropped=1, steps=12, batch_size=4, max_new_tokens=8, learning_rate=1e-2, warm_up=2
    )
    texts = tuple(prompts(8))
    student = study_pairs.healed_student(teacher, words, texts, healing, tmp_path)
    assert len(student.model.layers) == student.config.num_hidden_layers == 1
    assert not any(weight.requires_grad for weight in student.parameters())
    held_out = hold_out(study_pairs.Pair("tiny", teacher, student, words, None, texts, texts), TINY, 0)
    raw = study_pairs.without_layers(teacher, 0, 1)
    _, unhealed = score_positions(head_over(raw, words, held_out.answers), held_out.teacher_head, mask=held_out.answers.mask)
    assert held_out.before.forward_kl.sum() < 0.7 * unhealed.forward_kl.sum()
    monkeypatch.setattr(study_pairs, "heal", None)  # not called again
    again = study_pairs.healed_student(teacher, words, texts, healing, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
