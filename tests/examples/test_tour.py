"""The notebook examples/tour.ipynb: it runs from top to bottom, shows what it says, and is kept without outputs.

Run: make test ARGS=tests/examples/test_tour.py
Not here: the functions that it calls (loss/, diagnostics/), the demonstration (test_demo.py).
"""

import os
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "tour.ipynb"


@pytest.mark.full
def test_the_tour_runs_and_its_student_learns(monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the notebook uses no kernel
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]

    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    n_selected, n_valid = map(int, re.search(r"on (\d+) of (\d+) tokens", said).groups())
    assert n_selected == -(-n_valid // 10)
    kls = [float(kl) for kl in re.findall(r"^step \d: KL\(student \|\| teacher\) (\S+) nats", said, re.MULTILINE)]
    assert len(kls) == 5
    assert 0 < kls[-1] < 0.8 * kls[0]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 1
    [page] = [data["text/html"] for data in shown if "text/html" in data]
    assert page.count("SELECTED") == n_selected


def test_the_tour_is_kept_without_outputs():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert TOUR.stat().st_size < 20_000
