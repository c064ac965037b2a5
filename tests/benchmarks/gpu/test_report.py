"""The files of a GPU run: what is kept of an earlier one, and what is drawn of a JSON file later.

  Run: make test ARGS=tests/benchmarks/gpu/test_report.py

Not here: the run itself (test_run.py).
"""

import json

import pytest

from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import run as gpu

pytestmark = pytest.mark.full

ABOUT = {
    "commit": "abc",
    "device": "NVIDIA H200",
    "driver": "1",
    "versions": {"torch": "2.11"},
    "dry_run": False,
    "uncommitted_changes": False,
    "date": "2026-01-01",
}
SCORE = {"n": 2048, "vocab": 32000, "median_ms": 0.1, "gb_per_s": 4000.0, "copy_gb_per_s": 4200.0, "share": 0.95}


def test_parts_run_one_by_one_are_in_one_file(tmp_path):
    for part in ("score", "loss"):
        assert gpu.main(["--dry-run", "--parts", part, "--out", str(tmp_path)]) == 0
    got = json.loads((tmp_path / "gpu.json").read_text())
    assert set(got["parts"]) == {"score", "loss"}
    assert got["score"]
    assert got["loss"]
    page = (tmp_path / "gpu.md").read_text()
    assert "## Score pass of few rows" in page
    assert "## Selective loss" in page
    assert "Not compared with float64" in page


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, True),
        ({"date": "2026-01-02"}, True),
        ({"commit": "abd"}, False),
        ({"device": "NVIDIA H100"}, False),
        ({"versions": {"torch": "2.12"}}, False),
        ({"dry_run": True}, False),
    ],
)
def test_results_of_another_commit_or_device_are_not_kept(tmp_path, changed, kept):
    gpu_report.write({"environment": ABOUT, "score": [SCORE]}, tmp_path)
    assert gpu_report.earlier(tmp_path, ABOUT | changed) == ({"score": [SCORE]} if kept else {})


def test_results_of_an_unknown_commit_are_not_kept(tmp_path):
    unknown = ABOUT | {"commit": "unknown"}
    gpu_report.write({"environment": unknown, "score": [SCORE]}, tmp_path)
    assert gpu_report.earlier(tmp_path, unknown) == {}


def test_uncommitted_changes_of_an_earlier_part_are_said_of_the_whole(tmp_path):
    gpu_report.write({"environment": ABOUT | {"uncommitted_changes": True}, "score": [SCORE]}, tmp_path)
    about = dict(ABOUT)
    gpu_report.earlier(tmp_path, about)
    assert about["uncommitted_changes"]


def test_a_file_that_was_cut_off_is_not_read(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text('{"environment": {')
    assert gpu_report.earlier(tmp_path, ABOUT) == {}
    assert "is not read" in capsys.readouterr().out


def test_a_report_is_drawn_later_from_its_json(tmp_path, capsys):
    without_copy = {key: value for key, value in SCORE.items() if key not in ("copy_gb_per_s", "share")}
    rows = [SCORE, without_copy | {"n": 4096}, {"n": 1, "note": "does not fit"}]
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": ABOUT, "score": rows}))
    assert gpu_report.main([str(tmp_path / "gpu.json")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "score.csv", "bandwidth.png"}
    assert "![bandwidth](bandwidth.png)" in (tmp_path / "gpu.md").read_text()
    assert "written to" in capsys.readouterr().out


def test_without_matplotlib_the_page_says_how_to_draw_later(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "plot", lambda *_: False)
    gpu_report.write({"environment": ABOUT, "score": [SCORE]}, tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert "`python -m benchmarks.gpu.report gpu.json`" in page
    assert "bandwidth.png" not in page
