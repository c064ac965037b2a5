"""The files of the study: one small JSON file a run, and one for the frozen answers of a pair and seed.

  Run      sums of KL over the held-out tokens of each prompt at each evaluation, counts, CPU seconds of each part
  Frozen   what is known of each held-out token before training; KLs and entropies as integers of 1e-4 nats

A file is below 20 KB and is complete or absent: it is written under another name first.
Not here: how the numbers come about (train.py), what they say (report.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.study.plan import Sizes
from opd_ops import TokenStats

RUNS = Path(__file__).parents[1] / "results" / "study" / "runs"
UNIT = 1e-4  # of the integers in `Frozen` and `Run.after`, nats or shares
MEASURES = ("forward_kl", "reverse_kl")  # KL(q || p) and KL(p || q)
COLUMNS = ("student_entropy", "reverse_kl", "forward_kl", "union_kl", "support_mass")
Record = TypeVar("Record", "Run", "Frozen")


@dataclass(frozen=True)
class Run:
    """One finished run."""

    pair: str
    arm: str
    seed: int
    sizes: dict[str, object]
    steps: list[int]  # of the evaluations, 0 first
    forward_kl: list[list[float]]  # [evaluation][prompt]: sum of KL(q || p) over the prompt's held-out tokens, nats
    reverse_kl: list[list[float]]  # the same of KL(p || q)
    n_valid: int  # tokens that the student wrote in training
    n_trained: int  # tokens that were selected
    losses: list[float]  # of each step
    multiply_adds: dict[str, int]  # of the models' own passes, and of one head over all positions
    cpu_seconds: dict[str, float]  # of each part of the run
    wall_seconds: float
    peak_gib: float
    after: dict[str, dict[str, list[int]]] | None  # measure -> step -> KL of every held-out token; of the arm "all" alone
    environment: dict[str, object]


@dataclass(frozen=True)
class Frozen:
    """The held-out tokens of a pair and seed before training, prompt after prompt."""

    pair: str
    seed: int
    n_tokens: list[int]  # of each prompt
    columns: dict[str, list[int]]  # by name, one integer a token
    cpu_seconds: float


def to_integers(column: Tensor, valid: Tensor) -> list[int]:
    """The valid entries of (B, L) in units."""
    integers: list[int] = (column[valid].double() / UNIT).round().long().tolist()
    return integers


def stats_of(frozen: Frozen) -> TokenStats:
    """The statistics (B, L), padded on the right; columns that are not kept are NaN."""
    valid = torch.arange(max(frozen.n_tokens)) < torch.tensor(frozen.n_tokens).unsqueeze(1)
    absent = torch.full(valid.shape, torch.nan, dtype=torch.float64)
    columns = {name: absent for name in TokenStats._fields if name not in TokenStats._field_defaults}
    columns |= {name: from_integers(integers, valid) for name, integers in frozen.columns.items()}
    return TokenStats(**{**columns, "valid": valid})


def from_integers(integers: list[int], valid: Tensor) -> Tensor:
    """(B, L) numbers, 0 where not valid."""
    column = torch.zeros(valid.shape, dtype=torch.float64)
    column[valid] = torch.tensor(integers, dtype=torch.float64) * UNIT
    return column


def frozen_name(pair: str, seed: int) -> str:
    return f"{pair}-answers-seed{seed}.json"


def sizes_of(run: Run) -> Sizes:
    """The sizes of the plan that the run was made with."""
    return Sizes(**{name: tuple(value) if isinstance(value, list) else value for name, value in run.sizes.items()})


def spent_hours(folder: Path) -> float:
    """CPU hours of all files in the folder."""
    seconds = 0.0
    for path in folder.glob("*.json"):
        cpu_seconds = json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"]
        seconds += sum(cpu_seconds.values()) if isinstance(cpu_seconds, dict) else cpu_seconds
    return seconds / 3600


def write(record: Run | Frozen, path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")  # a killed study's last child may still write
    part.write_text(json.dumps(asdict(record), separators=(",", ":")) + "\n", encoding="utf-8")
    part.rename(path)


def read(kind: type[Record], path: Path) -> Record:
    return kind(**json.loads(path.read_text(encoding="utf-8")))
