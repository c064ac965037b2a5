"""The sdist and the wheel: built from a copy of the source, installed into an empty environment, used from there.

  Compared: the wheel's files with those of opd_ops and opd_kernels; versions with each other. README's first block must run,
  and the commands must answer. The environment has torch and the extras by a path to those that run this test.
Run: make test ARGS=tests/test_packaging.py
Not here: the release itself (.github/workflows/release.yml), what the block computes (loss/).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import opd_ops

ROOT = Path(__file__).parents[1]
CHECK = """
import importlib.metadata, opd_kernels, opd_ops, sys
print(opd_ops.__version__, importlib.metadata.version("opd-ops"), float(out.loss) > 0)
assert all(module.__file__.startswith(sys.prefix) for module in (opd_ops, opd_kernels)), opd_ops.__file__
"""


def run(*command, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules(folder):
    return {path.relative_to(folder.parent).as_posix() for path in folder.rglob("*.py")}


@pytest.mark.full
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    source, dist = tmp_path / "source", tmp_path / "dist"
    for package in ("opd_ops", "kernels"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, folder=tmp_path)
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name == f"opd_ops-{opd_ops.__version__}-py3-none-any.whl"
    assert sdist.name == f"opd_ops-{opd_ops.__version__}.tar.gz"
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == modules(ROOT / "opd_ops") | modules(ROOT / "kernels" / "opd_kernels") | {"opd_ops/py.typed"}

    venv.create(tmp_path / "env")
    bin_ = tmp_path / "env" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", bin_ / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel, folder=tmp_path)
    [site] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib"))  # after the environment's own packages

    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "block.py").write_text(block + CHECK)
    printed = run(bin_ / "python", "block.py", folder=tmp_path).splitlines()[-1]
    assert printed == f"{opd_ops.__version__} {opd_ops.__version__} True"
    assert "--fraction" in run(bin_ / "opd-train", "--help", folder=tmp_path)
    assert "usage: opd-inspect" in run(bin_ / "opd-inspect", "--help", folder=tmp_path)


def test_what_a_repository_s_host_reads_is_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert "version" not in citation  # it is written in one place
    forms = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert len(forms) == 3
    for form in forms:
        assert {"name", "description", "body"} <= set(form)
        assert len({field["id"] for field in form["body"]}) == len(form["body"])
        assert all(field["attributes"]["label"] for field in form["body"])
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["needs"] == ["build", "test"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}  # PyPI's trusted publishing: no secret
    said = next(step["run"] for step in jobs["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", ""))
    for tag, agrees in ((f"v{opd_ops.__version__}", True), ("v0.0.1", False)):
        done = subprocess.run(["bash", "-c", said], cwd=ROOT, env=os.environ | {"GITHUB_REF_NAME": tag}, check=False)
        assert (done.returncode == 0) == agrees
