"""The commands of benchmarks/static as tests run them: in a process of their own, for what they write.

Not here: what is expected of the rows (test_roofline.py, test_model.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def rows_of(module: str, folder: Path, *arguments: str) -> dict[str, list[dict]]:
    """The JSON of `python -m benchmarks.static.MODULE`; kernels of a process that interprets them cannot be compiled."""
    out = folder / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"benchmarks.static.{module}", *arguments, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text())
