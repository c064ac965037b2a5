"""The output of a run: log.jsonl, the trackers' numbers, a progress bar, tables of completions.

  log.jsonl: one object per line, {"step": n, ...numbers}, in nats per token unless the name says otherwise. A resumed run
  removes the lines after its checkpoint, so the file reads like the log of one run. If it resumes with other options, it adds
  {"step": n, "changed": {option: [old, new]}}.

Not here: what the numbers are (loop.py, evaluation.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from opd_ops.trainer.evaluation import Completion
from opd_ops.trainer.files import read_text, write_whole

if TYPE_CHECKING:
    from accelerate import Accelerator

FILE = "log.jsonl"


class LogRow(TypedDict):
    """A line of the log. Its other entries are numbers by name, or `changed`."""

    step: int


def read_rows(path: Path) -> list[LogRow]:
    """The log's rows, without a partial last line, which a killed process can leave.

    Raises: ValueError: a line that is no row of a log; names its line number.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            row: LogRow = json.loads(line)
            row["step"] += 0
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number}: got {line[:40]!r}, expected a line of the log; remove that line") from None
        rows.append(row)
    return rows


class RunLog:
    """A context manager that shows the progress bar. Only the first process writes and prints."""

    def __init__(self, folder: Path, accelerator: Accelerator, steps: int) -> None:
        self.path, self.accelerator = folder / FILE, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console)
        self.task = self.progress.add_task("", total=steps, status="")

    def __enter__(self) -> RunLog:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin_at(self, step: int, *, is_new: bool) -> None:
        """Keep the rows up to this step; a new run keeps none."""
        self.progress.update(self.task, completed=step)
        if self.accelerator.is_main_process and self.path.is_file():
            rows = [] if is_new else read_rows(self.path)
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))

    def add(self, step: int, numbers: dict[str, float], **timings: float) -> None:
        """Add a row to the log and to the trackers. Only trackers get `timings`, which differ between equal runs."""
        self.accelerator.log(numbers | timings, step=step)
        self._append({"step": step, **numbers})

    def change(self, step: int, options: Mapping[str, tuple[object, object]]) -> None:
        """Note in the log and in the terminal that options are different from this step on: name -> (old, new)."""
        self._append({"step": step, "changed": options})
        self.say(f"from step {step}: " + ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in options.items()))

    def advance(self, status: str) -> None:
        self.progress.update(self.task, advance=1, status=status)

    def _append(self, row: Mapping[str, object]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, step: int, completions: Sequence[Completion]) -> None:
        """Write the table of completions to the terminal and to completions-STEP.md."""
        if not completions or not self.accelerator.is_main_process:
            return
        table = Table(Column("prompt", max_width=30), f"greedy answer after {step} steps", "expected", "exact")
        lines = [f"| prompt | greedy answer after {step} steps | expected | exact |", "|---|---|---|---|"]
        for completion in completions:
            exact = {None: "", True: "yes", False: "no"}[completion.is_exact]
            cells = (completion.prompt, completion.text, completion.answer or "", exact)
            table.add_row(*(Text(cell) for cell in cells))  # rich would read square brackets in a plain string as markup
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |")
        self.console.print(table)
        (self.path.parent / f"completions-{step}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
