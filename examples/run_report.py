"""What a run keeps and shows besides the page: its numbers, the progress bar, the answers before and after, kl.png.

  Every number is a metric of `selective_opd_loss`, over all processes, or the held-out KL, in nats per token.

Not here: the training loop (prompt_distillation.py), the page with the tokens (opd_ops/diagnostics/token_heatmap.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from examples import processes
from opd_ops.diagnostics.token_heatmap import ShownStep


@dataclass
class Record:
    """The numbers of a run, in the order in which they came."""

    held_out_kl: dict[int, float] = field(default_factory=dict)  # after that many steps
    metrics: list[dict[str, float]] = field(default_factory=list)  # one per step, of all ranks together
    by_rank: list[list[dict[str, float]]] = field(default_factory=list)  # the same of each rank
    answers: dict[str, list[str]] = field(default_factory=dict)  # who: greedy answers to the first held-out questions
    pages: list[ShownStep] = field(default_factory=list)  # the tokens of the first and the last step

    def add(self, by_rank: list[dict[str, float]], seconds: float) -> None:
        self.metrics.append(processes.together(by_rank) | {"seconds": seconds})
        self.by_rank.append(by_rank)

    @property
    def step(self) -> int:
        return len(self.metrics)

    def total(self, name: str) -> int:
        return int(sum(metrics[name] for metrics in self.metrics))

    @property
    def n_ranks(self) -> int:
        return len(self.by_rank[0])

    def shares(self) -> str:
        """What each rank trained on, over all steps."""
        lines = []
        for rank in range(self.n_ranks):
            trained, sampled = (sum(step[rank][name] for step in self.by_rank) for name in ("n_selected", "n_valid"))
            lines.append(f"rank {rank}: {trained:,.0f} of {sampled:,.0f}, {trained / max(1, sampled):.1%}")
        return "; ".join(lines)

    def status(self) -> str:
        """The last step, in one line."""
        m = self.metrics[-1]
        return (
            f"loss {m['loss']:.3f}; KL all {m['kl_all']:.3f}, selected {m['kl_selected']:.3f}; "
            f"{m['n_selected'] / max(1, m['n_valid']):.1%} selected; {m['n_valid'] / m['seconds']:.0f} tokens/s"
        )


class StepProgress(Progress):
    """A bar over the steps; above it, on a line of its own, the task's field `status`: the numbers of the last step."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from (Text(task.fields["status"]) for task in self.tasks)
        yield self.make_tasks_table(self.tasks)


def answers_table(questions: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Table:
    """One row per question and model: who said what."""
    table = Table(Column("question", max_width=18), Column("who", no_wrap=True), "greedy answer")
    for i in range(len(next(iter(answers.values())))):
        for j, (who, texts) in enumerate(answers.items()):
            # Text, because rich would read square brackets in a plain string as its own markup.
            table.add_row(Text("" if j else questions[i]), who, Text(texts[i]), end_section=j == len(answers) - 1)
    return table


def plot(record: Record, path: Path) -> None:
    """Held-out KL above, training loss below, against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    top.plot(list(record.held_out_kl), list(record.held_out_kl.values()), marker="o", color="#1f5fa8")
    for step in (0, record.step):
        kl = record.held_out_kl[step]
        top.annotate(f"{kl:.3f}", (step, kl), textcoords="offset points", xytext=(0, 8), ha="center")
    top.set_title("Held-out forward KL(teacher || student)")
    steps = range(1, record.step + 1)
    bottom.plot(steps, [m["loss"] for m in record.metrics], color="#b35900", marker=".", label="loss: selected tokens")
    bottom.plot(steps, [m["kl_all"] for m in record.metrics], color="#595959", ls="--", label="reverse KL: all sampled tokens")
    bottom.set(xlabel="steps", title="Training, on the student's own answers")
    bottom.legend(frameon=False, ncols=2, loc="upper center")
    for axes, highest in ((top, max(record.held_out_kl.values())), (bottom, max(m["loss"] for m in record.metrics))):
        axes.set(ylabel="nats per token", ylim=(0, 1.25 * highest))  # room for the numbers and the legend
        axes.margins(x=0.04)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
