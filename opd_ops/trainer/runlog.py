"""What a run writes and shows: log.jsonl, the trackers' numbers, a progress bar, tables of completions.

  log.jsonl: one object a line, {"step": n, ...numbers}, in nats a token unless the name says otherwise. A resumed run drops
  the lines after its checkpoint, so the file reads as if there had been one run; {"step": n, "changed": {option: [was, is]}}
  stands where it was resumed with other options.

Not here: what the numbers are (loop.py, evaluation.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from opd_ops.trainer.evaluation import Completion
from opd_ops.trainer.files import read_text, write_whole

FILE = "log.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The log's rows, less half a line that a killed process may have left at its end.

    Raises: ValueError: a line that is none of the log's, with its number.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            row["step"] += 0
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}:{number}: got {line[:40]!r}, expected a line of the log; remove that line") from None
        rows.append(row)
    return rows


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
            rows = [] if is_new else read_rows(self.path)
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))

    def add(self, step: int, numbers: dict[str, float], **of_this_machine: float) -> None:
        """One line, and the trackers; these alone get `of_this_machine`, which no other run repeats."""
        self.accelerator.log(numbers | of_this_machine, step=step)
        self._append({"step": step, **numbers})

    def change(self, step: int, options: Mapping[str, tuple[Any, Any]]) -> None:
        """From this step on the options are others: a line, in the log and in the terminal."""
        self._append({"step": step, "changed": options})
        self.say(f"from step {step}: " + ", ".join(f"{name} was {was} and is {is_}" for name, (was, is_) in options.items()))

    def advance(self, status: str) -> None:
        self.progress.update(self.task, advance=1, status=status)

    def _append(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

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
