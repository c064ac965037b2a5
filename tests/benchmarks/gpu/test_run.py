"""The GPU benchmark as far as a CPU shows it: every line runs, and nothing is written that looks measured.

  What a failure, a late part and a clock that waits for launches do to a run, with failures and a clock of the test's own.
  Run: make test ARGS=tests/benchmarks/gpu/test_run.py

Not here: the figures, which need a GPU (`make gpu`); files and their merging (test_report.py).
"""

import json
import math
import os
import subprocess
import tarfile
import zipfile

import pytest
import torch
from opd_kernels.score import score_fwd

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import check_divergences as gpu_check_divergences
from benchmarks.gpu import check_heads as gpu_check_heads
from benchmarks.gpu import check_logits as gpu_check_logits
from benchmarks.gpu import heads as gpu_heads
from benchmarks.gpu import logits as gpu_logits
from benchmarks.gpu import methods as gpu_methods
from benchmarks.gpu import read as gpu_read
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import run as gpu
from benchmarks.gpu import sanitize as gpu_sanitize
from benchmarks.gpu import sweep as gpu_sweep
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu import warm as gpu_warm
from benchmarks.static import roofline
from opd_ops.call import prepare
from tests.support import kernels
from tests.support.cases import logit_pair
from tests.support.tolerances import relative_error

pytestmark = pytest.mark.full
CPU = torch.device("cpu")


def dry(**changed):
    return gpu_timing.Bench(**{"device": CPU, "dtype": torch.bfloat16, "rounds": 1, "dry": True} | changed)


def test_a_dry_run_runs_every_part_and_says_that_it_is_no_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "DRY RUN, NOT A MEASUREMENT" in capsys.readouterr().out
    assert not gpu.RESULTS.exists()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {f"{table}.csv" for table in gpu_report.TABLES}
    assert names == {"gpu.json", "gpu.md", "bandwidth.png", "gpu.tar.gz"} | tables
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        assert set(archive.getnames()) == names - {"gpu.tar.gz"}
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "DRY RUN, NOT A MEASUREMENT" in page
    got = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert set(got["parts"]) == set(gpu.PARTS)
    assert not [row for row in got["check"] if row["failure"]]
    kernels = {"score", "support", "reverse_kl", "forward_kl", "logits", "heads", "divergences"}
    assert {row["kernel"] for row in got["check"]} == kernels
    cases = {row["case"] for row in got["check"]}
    assert {"NaN", "K = 128", "bf16 beside fp32", "offsets beyond 2^31", "reverse_kl, in place, bfloat16"} <= cases
    assert {row["case"] for row in got["check"][-5:]} == {"offsets beyond 2^31"}  # whose failure a device may not survive
    assert {row["case"] for row in got["check"] if row.get("note")} == {"CUDA graph"}  # not counted as run
    assert all("median_ms" in row for part in ("score", "few_rows", "loss", "sweep") for row in got[part])
    assert all(row["read_gb_per_s"] > 0 and row["share_of_read"] > 0 for row in got["score"])
    assert got["sanitize"] == [{"tool": "none", "calls": 4, "failure": None}]
    assert max(row["per_row"] for row in got["few_rows"] if row["programs"] == "split") > 1
    assert {row["per_row"] for row in got["few_rows"] if row["programs"] != "split"} == {1}
    heads = {row["method"]: row for row in got["heads"]}
    measured = {name for name, row in heads.items() if "median_ms" in row}
    assert {
        "matmul floor",
        "ours",
        "ours, 640-row tiles",
        "ours, 1,024-row tiles",
        "ours, fp32 tiles",
        "ours, 8 bits",
        "ours, rollout",
        "eager",
    } <= measured
    assert heads["matmul floor"]["to_floor"] == heads["ours, fp32 tiles"]["overlap"] == 1.0
    assert all(row["note"] for name, row in heads.items() if name not in measured)
    swept = {
        "score_fwd",
        "support_fwd",
        "reverse_kl_grad",
        "forward_kl_grad",
        "jsd_fwd",
        "jsd_grad",
        "off_list_fwd",
        "off_list_grad",
    }
    swept |= {"score_fwd, V = 131", "score_fwd, masked tail"}  # rows that start anywhere, and rows that are read twice
    assert {row["kernel"] for row in got["sweep"]} == swept
    assert sum(row["shipped"] for row in got["sweep"]) == len(swept)
    assert got["environment"]["commit"]
    speeds = {row["method"]: row["speed_to_eager"] for row in got["loss"]}
    assert speeds["eager"] == 1.0
    assert set(speeds) == set(gpu_methods.METHODS)


def test_ratios_to_eager_are_its_time_over_theirs_and_their_peak_over_its():
    rows = [
        {"method": "ours", "median_ms": 2.0, "peak_bytes": 5},
        {"method": "eager", "median_ms": 20.0, "peak_bytes": 100},
        {"method": "compiled", "note": "out of memory"},
    ]
    gpu_logits._compare_to_eager(rows)
    assert [row.get("speed_to_eager") for row in rows] == [10.0, 1.0, None]
    assert [row.get("peak_to_eager") for row in rows] == [0.05, 1.0, None]


def test_peaks_of_the_loss_table_are_over_the_gradient_that_all_but_one_method_need(monkeypatch):
    monkeypatch.setattr(gpu_timing.Bench, "peak_bytes", lambda self, run: 10_000)
    gradient = 3 * 160 * 2
    peaks = {row["method"]: row["peak_bytes"] for row in gpu_logits.loss_table(dry())}
    assert peaks.pop("ours, in place") == 10_000
    assert set(peaks.values()) == {10_000 - gradient}


def no_checks_but_of_kernels(monkeypatch):
    for module in (gpu_check_logits, gpu_check_heads, gpu_check_divergences):
        monkeypatch.setattr(module, "CHECKS", {})
    for module, name in ((gpu_check_logits, "last"), (gpu_check, "beyond_2_to_31"), (gpu_check, "nan_rows")):
        monkeypatch.setattr(module, name, lambda bench: iter(()))
    monkeypatch.setattr(gpu_check, "check_support", lambda *_: None)
    monkeypatch.setattr(gpu_check, "GRADIENT_CHECKS", ())


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (AssertionError("values differ\nand more"), "values differ"),
        (RuntimeError("CUDA error: illegal address\n\nand more"), "RuntimeError: CUDA error: illegal address"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_wrong_kernel_fails_the_run_which_keeps_what_it_measured(tmp_path, monkeypatch, capsys, error, failure):
    def wrong(*_):
        raise error

    monkeypatch.setattr(gpu_check, "check_score", wrong)
    no_checks_but_of_kernels(monkeypatch)
    assert gpu.main(["--dry-run", "--parts", "check,score", "--out", str(tmp_path)]) == 1
    assert f"score bfloat16: {failure}" in capsys.readouterr().out
    got = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["failure"] for row in got["check"] if row["kernel"] == "score"} == {failure}
    assert not [row for row in got["check"] if row["kernel"] == "support" and row["failure"]]
    assert all("median_ms" in row for row in got["score"])
    page = (tmp_path / "gpu.md").read_text()
    assert page.index("**FAILED") < page.index("## Score pass")
    assert f"* score, bfloat16: {failure}" in page


def test_a_part_that_breaks_off_keeps_its_rows_and_the_other_parts(tmp_path, monkeypatch):
    def breaks_off(*_):
        yield {"n": 2, "vocab": 160, "note": "does not fit"}
        raise RuntimeError("device lost")

    monkeypatch.setattr(gpu_logits, "score_table", breaks_off)
    assert gpu.main(["--dry-run", "--parts", "score,loss", "--out", str(tmp_path)]) == 1
    got = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["note"] for row in got["score"]] == ["does not fit"]
    assert got["parts"]["score"]["failure"] == "score: RuntimeError: device lost"
    assert all("median_ms" in row for table in ("few_rows", "loss") for row in got[table])
    assert "**It broke off**: score: RuntimeError: device lost" in (tmp_path / "gpu.md").read_text()


def test_results_are_written_after_every_part(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_logits, "loss_table", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--dry-run", "--parts", "score,loss", "--out", str(tmp_path)])
    assert all("median_ms" in row for row in json.loads((tmp_path / "gpu.json").read_text())["score"])


def test_a_variant_that_fails_is_a_row_that_says_so():
    def fails_later(i):
        if i == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def fails(i):
        raise ValueError("refused by the compiler")

    rows = dry(rounds=3).measure({"well": lambda i: None, "at once": fails, "later": fails_later})
    assert rows["well"]["rounds"] == 3
    assert rows["at once"] == {"note": "ValueError: refused by the compiler"}
    assert rows["later"] == {"note": "OutOfMemoryError: CUDA out of memory."}


def test_what_comes_too_late_is_not_run_and_says_so(monkeypatch):
    late = dry(ends=-math.inf)
    assert late.measure({"a": pytest.fail}) == {"a": {"note": gpu_timing.LATE}}
    rows = [*gpu_check.run(late), *gpu_check_logits.run(late), *gpu_check_heads.run(late), *gpu_check_divergences.run(late)]
    rows += [*gpu_logits.score_table(late, [2], [160]), *gpu_logits.loss_table(late), *gpu_heads.table(late, [6])]
    assert {row["note"] for row in rows} == {gpu_timing.LATE}
    ended = dry(rounds=20)

    def end(i):
        if i == 1:
            ended.ends = -math.inf

    assert ended.measure({"a": end})["a"]["rounds"] == gpu_timing.FEWEST_ROUNDS


def test_a_check_that_the_device_has_no_memory_for_is_not_run_and_says_so(monkeypatch):
    monkeypatch.setattr(gpu_timing.Bench, "fits", lambda self, n_bytes: False)
    rows = [*gpu_check.beyond_2_to_31(dry()), *gpu_check_logits.last(dry())]
    assert len(rows) == 5
    assert all(row["note"].startswith("not run: it takes") and row["failure"] is None for row in rows)


def test_a_hidden_nan_fails_its_check(monkeypatch):
    def hides(student, teacher, *arguments, **options):
        return score_fwd(student.nan_to_num(), teacher, *arguments, **options)

    score_fwd = gpu_check.score_fwd
    monkeypatch.setattr(gpu_check, "score_fwd", hides)
    failures = {row["kernel"]: row["failure"] for row in gpu_check.nan_rows(dry())}
    assert "student_logsumexp" in failures["score"]


class Clock:
    """What a GPU does with events, a sleep and launches, which each take the CPU 50 us."""

    def __init__(self, monkeypatch):
        self.calls, self.launched_us, self.slept_us = [], 0, 0
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                clock.calls.append("event")

            def query(self):
                return clock.slept_us < clock.launched_us

            def elapsed_time(self, other):
                return 1.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append("wait"))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)

    def sleep(self, cycles):
        self.calls.append("sleep")
        self.slept_us, self.launched_us = cycles / 2000, 0

    def launch(self, microseconds):
        self.calls.append("launch")
        self.launched_us += microseconds


def test_launches_are_queued_behind_a_sleep_that_outlasts_them(monkeypatch):
    clock, bench = Clock(monkeypatch), dry(dry=False)
    bench._time(lambda: clock.launch(50), queued=True)
    assert clock.calls == ["wait", "sleep", "event", "launch", "event", "wait"]
    assert bench.sleep_cycles == gpu_timing.SLEEP_CYCLES
    clock.calls.clear()
    bench._time(lambda: clock.launch(3000), queued=True)
    assert clock.calls.count("launch") == 3  # 1, 2 and 4 ms of sleep
    assert clock.slept_us > 3000
    with pytest.raises(RuntimeError, match="the launches take longer than the longest sleep"):
        bench._time(lambda: clock.launch(10**6), queued=True)


def test_wall_time_begins_on_an_idle_gpu(monkeypatch):
    clock = Clock(monkeypatch)
    dry(dry=False)._time(lambda: clock.launch(50), queued=False)
    assert clock.calls == ["wait", "event", "launch", "event", "wait"]


def test_kernels_are_timed_with_queued_launches_and_whole_losses_as_a_caller_waits(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_heads, "METHODS", {"matmul floor": gpu_heads.floor})
    monkeypatch.setattr(gpu_timing.Bench, "_time", lambda self, run, queued: seen.append(queued) or 1.0)
    for rows in (gpu_logits.score_table(dry(), [2], [160]), gpu_logits.few_rows(dry()), gpu_sweep.run(dry())):
        list(rows)
    assert set(seen) == {True}
    seen.clear()
    for rows in (gpu_logits.loss_table(dry()), gpu_heads.table(dry(), [6])):
        list(rows)
    assert set(seen) == {False}


def test_a_heads_row_without_a_floor_has_a_dash():
    rows = [{"method": "matmul floor", "note": "out of memory"}, {"method": "ours", "median_ms": 2.0}]
    gpu_heads._compare(rows)
    assert [gpu_heads.words(row) for row in rows] == ["out of memory", "2.00 ms, - of the floor"]


def test_the_warm_up_of_a_graph_takes_the_operations_that_are_captured():
    with gpu_check_heads.as_in_a_graph():
        assert prepare.is_in_graph(CPU)
    assert not prepare.is_in_graph(CPU)


def test_the_parts_share_out_the_time_in_order():
    ends = gpu.ends(list(gpu.PARTS), 8)
    assert list(ends) == list(gpu.PARTS)
    assert list(ends.values()) == sorted(ends.values())
    assert ends["warm"] == gpu.PARTS["warm"]
    assert ends["sanitize"] == 480
    assert gpu.ends(["heads"], 8) == {"heads": 480}


def test_the_kernel_that_only_reads_reads_whole_blocks_of_both_models():
    student, teacher = logit_pair(3, 100)
    want = torch.maximum(student, teacher)[:, :96].amax(1)
    assert torch.equal(gpu_read.read(student, teacher, block=32), want)
    assert gpu_read.read_bytes(student, block=32) == 3 * 96 * 2 * 4


def test_warming_up_shares_out_the_launches_of_all_parts(monkeypatch):
    compiled = []

    class Function:
        def __init__(self, name):
            self.__name__ = name

        def run(self, *arguments, grid, warmup, **options):
            assert warmup
            if self.__name__ == "large":
                raise RuntimeError("out of registers")
            compiled.append(self.__name__)

    every = [(Function(name), (1,), {"num_warps": 4}) for name in ("a", "b", "large", "c", "d")]
    monkeypatch.setattr(gpu_warm, "launches", lambda: iter(every))
    shares = [gpu_warm.compile_share(i, 2) for i in range(2)]
    assert compiled == ["a", "d", "b", "c"]
    assert [share["kernels"] for share in shares] == [2, 2]
    assert shares[0]["refused"] == "large: RuntimeError: out of registers"


@pytest.mark.skipif(kernels.IS_INTERPRETED, reason="an interpreted kernel is not compiled")
def test_a_launch_on_shapes_compiles_what_a_launch_on_tensors_takes():
    common = {"vocab_size": 4112, **gpu_timing.PLAIN}  # as no other test has it
    with roofline.Recorder() as recorded:
        shapes = [torch.empty((3, 4112), dtype=torch.bfloat16, device="meta") for _ in range(2)]
        score_fwd(*shapes, None, **common)
    for function, arguments, options in recorded:
        function.run(*arguments, grid=(1,), warmup=True, **options)
    compiled = [len(function.device_caches[0][0]) for function, _, _ in recorded]
    score_fwd(*logit_pair(3, 4112, dtype=torch.bfloat16), None, **common)
    assert [len(function.device_caches[0][0]) for function, _, _ in recorded] == compiled
    assert all(compiled)


def test_warming_up_covers_the_tiles_of_the_sweep_and_every_shipped_kernel():
    names = [function.__name__ for function, _, _ in gpu_warm.launches()]
    assert {"_score_fwd_kernel", "_gradient_kernel", "_zero_rows_kernel"} <= set(names)
    tiles = len(list(gpu_sweep.score_tiles(torch.bfloat16))) + len(list(gpu_sweep.odd_score_tiles()))
    assert names.count("_score_fwd_kernel") > tiles


def test_processes_that_warm_up_end_with_their_part(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    real = subprocess.Popen
    for code, note in (("import time; time.sleep(60)", "stopped: the time of this part is over"), ("1 / 0", "ended with 1")):
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, code=code, **options: real([command[0], "-c", code], **options)
        )
        ends = gpu_timing.time.monotonic() + (0.2 if "sleep" in code else 30)
        (row,) = gpu_warm.run(dry(dry=False, ends=ends))
        assert row["note"].startswith(note)


def test_what_a_sanitizer_reports_fails_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_sanitize, "find_tool", lambda: None)
    late = gpu_timing.time.monotonic() + 60
    assert {row["note"] for row in gpu_sanitize.run(dry(dry=False, ends=late))} == {
        "not run: compute-sanitizer is not installed"
    }
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho '========= Invalid __global__ read of size 16 bytes'\nexit 99\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_sanitize, "find_tool", lambda: str(tool))
    failures = [row["failure"] for row in gpu_sanitize.run(dry(dry=False, ends=late))]
    assert failures == ["status 99: ========= Invalid __global__ read of size 16 bytes"] * 2


def test_wheels_are_unpacked_to_the_end_of_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sys, "path", list(gpu.sys.path))
    with zipfile.ZipFile(tmp_path / "peer-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_a_test/__init__.py", "VALUE = 3\n")
    assert gpu.add_wheels(tmp_path) == ["peer-1-py3-none-any.whl"]
    assert __import__("peer_of_a_test").VALUE == 3
    assert gpu.add_wheels(tmp_path / "missing") == gpu.add_wheels(None) == []


def test_fp32_is_compared_without_tf32(monkeypatch):
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        gpu.keep_fp32_exact()
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" not in os.environ


@pytest.mark.parametrize("method", ["ours", "ours, in place", "compiled", "chunked autograd"])
def test_the_methods_compute_the_same_loss_and_gradient_as_eager(method):
    student, teacher = logit_pair(8, 300)
    want, want_gradient = gpu_methods.eager(student, teacher)
    loss, gradient = gpu_methods.METHODS[method](student, teacher)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert relative_error(gradient, want_gradient) < 1e-4


def test_without_a_gpu_it_says_which_are_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA or ROCm device found, and no other is measured .* an XPU"):
        gpu.main([])
