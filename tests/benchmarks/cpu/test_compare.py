"""The comparison end to end at tiny sizes, through its real processes; the memory meter against allocations of known size.

  Compared: the three files with what must be in them; a method that is absent, wrong or failing with its row;
  200 MiB of fresh pages with what the meter says of them. No time is asserted.
  Run: make test ARGS=tests/benchmarks/cpu/test_compare.py

Not here: the loss itself (loss/test_loss.py and others); the peers, which the test environment does not install.
"""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.cpu import check, compare, measure, methods, report
from benchmarks.cpu.heads import Sizes, build_heads
from benchmarks.cpu.memory import PeakMemory, has_high_water_mark
from opd_ops import LinearHead, score_positions

pytestmark = pytest.mark.full

TINY = ["--n", "40", "--vocab", "1009", "--student-dim", "32", "--teacher-dim", "48", "--threads", "1"]
MIB = 2**20


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = ["--rounds", "1", "--methods", "floor,eager,ours", "--n-list", "24", "--out", str(folder)]
    run_process = compare.run_process

    def run(task, name, sizes, settings, threads):  # measuring ours alone has its processes: each imports for seconds
        if (task, name) == ("measure", "ours"):
            return run_process(task, name, sizes, settings, threads)
        return measure.run_job(job(task, name) | {"sizes": asdict(sizes), "settings": asdict(settings), "threads": threads})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_process", run)
        compare.main([*TINY, *options])
    return folder, json.loads((folder / "compare.json").read_text())


def test_compare_writes_three_files(compared):
    folder, result = compared
    assert sorted(path.name for path in folder.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "compare.md").read_text()
    assert all(f"| {methods.METHODS[name].title} |" in table for name in result["methods"])
    assert result["command"] in table


def test_compare_records_gate_rounds_and_units(compared):
    result = compared[1]
    assert {name: entry["status"] for name, entry in result["methods"].items()} == dict.fromkeys(
        ("floor", "eager", "ours"), "ok"
    )
    assert all(len(entry["rounds"]) == 1 for entry in result["methods"].values())
    assert result["methods"]["floor"]["gate"] is None
    assert result["methods"]["eager"]["gate"]["passed"]
    assert result["methods"]["ours"]["gate"]["passed"]
    score = 1 + 48 / 32
    assert result["methods"]["floor"]["units"] == pytest.approx(score, rel=1e-12)
    assert result["methods"]["ours"]["units"] == pytest.approx(1.05 * score + 2 * 0.05, rel=1e-12)
    assert {"cpu", "commit", "versions", "date", "threads", "sizes", "settings", "targets"} <= set(result)
    assert [at["status"] for at in result["against_n"]] == ["ok"]


def test_compare_measures_the_same_loss_in_every_method(compared):
    entries = compared[1]["methods"]
    losses = [run["loss"] for name in ("eager", "ours") for run in entries[name]["rounds"]]
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_compare_keeps_a_row_for_a_peer_that_is_not_installed(tmp_path, monkeypatch):
    # A module in the way of the peer, so that this holds where the peer is installed as well.
    (tmp_path / "trl.py").write_text("raise ModuleNotFoundError(\"No module named 'trl'\", name='trl')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    compare.main([*TINY, "--rounds", "1", "--methods", "trl-twice", "--out", str(tmp_path / "out")])
    entry = json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]["trl-twice"]
    assert entry["status"] == "not installed"
    assert entry["rounds"] == []
    assert "not installed: trl==1.16.0" in (tmp_path / "out" / "compare.md").read_text()


def job(task, name):
    sizes = {"n": 40, "vocab": 1009, "student_dim": 32, "teacher_dim": 48}
    return {"task": task, "method": name, "sizes": sizes, "settings": {}, "threads": torch.get_num_threads()}


def test_run_job_reports_a_failure_by_its_first_line(monkeypatch):
    def fail(heads, settings):
        raise RuntimeError("no room\nand a long story")

    monkeypatch.setitem(methods.METHODS, "bad", methods.Method("bad", "", fail, None))
    answer = measure.run_job(job("measure", "bad"))
    assert (answer["status"], answer["error"]) == ("failed", "RuntimeError: no room")


def test_run_process_reports_a_process_without_an_answer(monkeypatch):
    monkeypatch.setattr(compare.sys, "executable", "false")
    answer = compare.run_process("check", "floor", Sizes(8, 64, 8, 8), methods.Settings(), 1)
    assert (answer["status"], answer["error"]) == ("failed", "exit status 1")


@pytest.mark.parametrize(("factor", "reason"), [(0.0, "gradient is off"), (1.001, "gradient is off")])
def test_gate_refuses_wrong_gradients(monkeypatch, factor, reason):
    def scaled(heads, settings):
        outcome = methods.eager(heads, settings)
        heads.student_weight.grad.mul_(factor)
        return outcome

    monkeypatch.setitem(methods.METHODS, "bad", methods.Method("bad", "", scaled, "teachability"))
    gate = check.run_gate("bad", methods.Settings())
    assert not gate["passed"]
    assert any(reason in text for text in gate["reasons"])


def test_gate_refuses_another_selection():
    eager = methods.METHODS["eager"]
    by_entropy = methods.Method(eager.title, eager.computes, eager.run, "entropy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "bad", by_entropy)
        gate = check.run_gate("bad", methods.Settings())
    assert not gate["passed"]
    assert any("selection misses" in reason for reason in gate["reasons"])


@pytest.mark.parametrize("name", ["eager-twice", "chunked-autograd"])
def test_gate_passes_plain_torch_methods(name):
    gate = check.run_gate(name, methods.Settings())
    assert gate["passed"], gate["reasons"]


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_sees_an_allocation(sampled):
    if sampled:
        pytest.importorskip("psutil")
    elif not has_high_water_mark():
        pytest.skip("this system has no high-water mark that can be reset")
    with PeakMemory(sampled=sampled) as memory:
        block = torch.ones(200 * MIB // 4)
        # Long enough for the sampler; freed before the end, as a peak is.
        block.mul_(2.0).add_(1.0)
        del block
    assert memory.increase == pytest.approx(200 * MIB, rel=0.1)


def test_peak_memory_does_not_count_earlier_peaks():
    if not has_high_water_mark():
        pytest.skip("this system has no high-water mark that can be reset")
    del [torch.ones(100 * MIB // 4)][0]
    with PeakMemory() as memory:
        torch.ones(10 * MIB // 4)
    assert memory.increase < 20 * MIB


def test_build_heads_is_peaked_and_correlated():
    heads = build_heads(Sizes(n=200, vocab=20011, student_dim=256, teacher_dim=384))
    pair = LinearHead(heads.student_hidden, heads.student_weight), LinearHead(heads.teacher_hidden, heads.teacher_weight)
    stats = score_positions(*pair)[1]
    assert 0.2 < float(stats.student_entropy.median()) < 3
    assert 0.05 < float(stats.reverse_kl.median()) < 2
    assert float(stats.support_mass.median()) > 0.8


def test_build_heads_is_repeatable():
    sizes = Sizes(n=9, vocab=101, student_dim=8, teacher_dim=6)
    first, second = build_heads(sizes), build_heads(sizes)
    assert torch.equal(first.student_hidden, second.student_hidden)
    assert torch.equal(first.teacher_weight, second.teacher_weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "eager,nothing"], "expected names out of: floor"),
        (["--rounds", "0"], "expected at least 1"),
    ],
)
def test_compare_rejects_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_summarise_says_when_a_target_is_missed():
    def entry(seconds, mib):
        run = {"seconds": seconds, "cpu_seconds": seconds, "peak_bytes": mib * MIB, "retained_bytes": 0, "waiting_bytes": 0}
        run["first_call_peak_bytes"] = run["peak_bytes"]
        return {"status": "ok", "title": "", "computes": "", "units": 2.0, "rounds": [run]}

    result = {
        "methods": {"floor": entry(1.0, 1), "eager": entry(2.0, 900), "ours": entry(1.5, 300)},
        "sizes": {"n": 8, "gradient_bytes": 100 * MIB},
        "settings": {"workspace_mib": 64},
        "against_n": [{"n": 9, "status": "failed", "error": "killed"}],
    }
    targets = report.summarise(result)["targets"]
    assert [(target["measured"], target["met"]) for target in targets] == [
        (1.5, False),
        (0.75, False),
        (200.0, False),
        (None, False),
    ]


def test_a_report_says_what_memory_waits_for_a_next_call():
    summary = {"retained_mib": 1.0, "cores": 2.0}
    methods = {
        "ours": {"title": "ours", "summary": summary | {"waiting_mib": 519.2}},
        "eager": {"title": "eager", "summary": summary | {"waiting_mib": 0.0}},
    }
    lines = report._remarks({"methods": methods, "threads": 2})
    assert lines[-1].endswith("that the kernel may take: ours 519.")
