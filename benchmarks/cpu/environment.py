"""What a result must carry to be believed later: date, processor, versions, commit.

Not here: the command and the sizes (compare.py).
"""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import opd_ops

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "transformers")


def describe_environment(root: Path) -> dict[str, Any]:
    commit = _git(root, "rev-parse", "HEAD")
    # A result that is being rewritten is no change of what was measured.
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit or "unknown",
        "uncommitted_changes": bool(changed),
        "versions": {"python": platform.python_version(), "opd_ops": opd_ops.__version__, **_versions()},
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def _versions() -> dict[str, str | None]:
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
