# What a run writes and shows: log.jsonl, the trackers' numbers, a progress bar, tables of completions.
#
#   log.jsonl: one object a line, {"step": n, ...numbers}, in nats a token unless the name says otherwise. A resumed run drops
#   the lines after its checkpoint, so the file reads as if there had been one run.
#
# Not here: what the numbers are (loop.py, evaluation.py).
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from opd_ops.trainer.evaluation import Completion

FILE = "log.jsonl"


class RunLog:
    """Used as a context manager, which shows the bar; silent on all processes but the first."""

    def __init__(self, folder: Path, accelerator: Any, steps: int) -> None:
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
        """Keep what was logged up to this step; of a run that begins anew, nothing."""
        self.progress.update(self.task, completed=step)
        if self.accelerator.is_main_process and self.path.is_file():
            lines = [] if is_new else self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a killed process may have left half a line
            self.path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))

    def add(self, step: int, numbers: dict[str, float], **of_this_machine: float) -> None:
        """One line, and the trackers; these alone get `of_this_machine`, which no other run repeats."""
        self.accelerator.log(numbers | of_this_machine, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")

    def advance(self, status: str) -> None:
        self.progress.update(self.task, advance=1, status=status)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, step: int, completions: Sequence[Completion]) -> None:
        """The table, in the terminal and as completions-STEP.md."""
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
