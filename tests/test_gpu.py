# The GPU benchmark as far as a CPU shows it: every line runs interpreted, and nothing is written that looks measured.
#
#   Run: make test ARGS=tests/test_gpu.py
#
# Not here: the figures, which need a GPU (`make gpu`).
import json

import pytest
import torch

from benchmarks import gpu, gpu_check, gpu_check_divergences, gpu_check_heads, gpu_methods, gpu_timing
from tests.cases import logit_pair
from tests.tolerances import relative_error


def test_a_dry_run_runs_every_part_and_says_that_it_is_no_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "DRY RUN, NOT A MEASUREMENT" in capsys.readouterr().out
    assert not gpu.RESULTS.exists()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"gpu.json", "gpu.md", "check.csv", "score.csv", "loss.csv", "heads.csv", "sweep.csv", "bandwidth.png"}
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "DRY RUN, NOT A MEASUREMENT" in page
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert not [row for row in found["check"] if row["failure"]]
    assert {row["kernel"] for row in found["check"]} == {"score", "support", "reverse_kl", "forward_kl", "heads", "divergences"}
    assert {row["case"] for row in found["check"] if row.get("note")} == {"CUDA graph"}  # not counted as run
    assert all("median_ms" in row for part in ("score", "loss", "sweep") for row in found[part])
    heads = {row["method"]: row for row in found["heads"]}
    measured = {name for name, row in heads.items() if "median_ms" in row}
    assert {"matmul floor", "ours", "ours, fp32 tiles", "ours, 8 bits", "ours, rollout", "eager"} <= measured
    assert heads["matmul floor"]["to_floor"] == heads["ours, fp32 tiles"]["overlap"] == 1.0
    assert all(row["note"] for name, row in heads.items() if name not in measured)
    assert sum(row["shipped"] for row in found["sweep"]) == 3
    assert found["environment"]["commit"]
    speeds = {row["method"]: row["speed_to_eager"] for row in found["loss"]}
    assert speeds["eager"] == 1.0
    assert set(speeds) == set(gpu_methods.METHODS)


def test_ratios_to_eager_are_its_time_over_theirs_and_their_peak_over_its():
    rows = [
        {"method": "ours", "median_ms": 2.0, "peak_bytes": 5},
        {"method": "eager", "median_ms": 20.0, "peak_bytes": 100},
        {"method": "compiled", "note": "out of memory"},
    ]
    gpu_timing._compare_to_eager(rows)
    assert [row.get("speed_to_eager") for row in rows] == [10.0, 1.0, None]
    assert [row.get("peak_to_eager") for row in rows] == [0.05, 1.0, None]


def test_a_wrong_kernel_stops_the_run_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    def wrong(*_):
        raise AssertionError("values differ")

    monkeypatch.setattr(gpu_check, "check_score", wrong)
    monkeypatch.setattr(gpu_check, "check_support", lambda *_: None)
    monkeypatch.setattr(gpu_check, "GRADIENT_CHECKS", ())
    monkeypatch.setattr(gpu_check_heads, "CHECKS", {})
    monkeypatch.setattr(gpu_check_divergences, "CHECKS", {})
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    assert "score bfloat16: values differ" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ours", "ours, in place", "compiled", "chunked autograd"])
def test_the_methods_compute_the_same_loss_and_gradient_as_eager(method):
    student, teacher = logit_pair(8, 300)
    want, want_gradient = gpu_methods.eager(student, teacher)
    loss, gradient = gpu_methods.METHODS[method](student, teacher)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert relative_error(gradient, want_gradient) < 1e-4


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA or ROCm device found"):
        gpu.main([])
