"""The Triton backend under torch.compile, which cannot trace a launch: the same steps as operators of torch (operators.py).

`call/prepare.py` decides whether a call is traced; resolve.py then takes this backend instead of `TRITON`.
Not here: eager calls (backend.py). They launch kernels directly: an operator costs some 60 microseconds a call.
"""

from __future__ import annotations

from torch import Tensor

from opd_ops.backends.interface import Needs, is_computed
from opd_ops.backends.triton import operators
from opd_ops.backends.triton.backend import Triton
from opd_ops.divergences import is_column
from opd_ops.inputs.sources import Source
from opd_ops.inputs.teacher_lists import TeacherLists
from opd_ops.selection.stats import Scoring


class TracedTriton(Triton):
    """`Triton` by operators: statistics, and the losses that are a column of the statistics."""

    _launch_scores = staticmethod(operators.placed_scores)
    _launch_choice = staticmethod(operators.chosen_positions)
    _head_loss = staticmethod(operators.head_losses)
    _column_loss = staticmethod(operators.column_losses)

    def refusal(self, student: Source, teacher: Source | TeacherLists, needs: Needs) -> str | None:
        if not (is_column(needs.divergence) and needs.divergence.importance is None and isinstance(teacher, Source)):
            name = needs.divergence.name
            return f"divergence is {name!r}, which torch.compile cannot trace here; call it outside of the graph"
        return super().refusal(student, teacher, needs)

    def _columns(self, student: Source, teacher: Source, rows: Tensor, scoring: Scoring) -> Tensor:
        top_k, workspace, score_dtype, columns, _ = scoring
        optional = ",".join(sorted(columns))
        table: Tensor
        if is_computed(student, teacher):
            arguments = operators.head_arguments(student, teacher, workspace, top_k)
            table = operators.head_columns(*arguments, rows, optional, score_dtype)
        else:
            vocab, temperature = student.transform.vocab_size, student.transform.temperature
            logits = student.leading.detach(), teacher.leading.detach()
            table = operators.token_columns(*logits, rows, top_k, optional, workspace.nbytes, vocab, temperature)
        return table


TRACED_TRITON = TracedTriton()
