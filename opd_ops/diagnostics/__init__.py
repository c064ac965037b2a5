"""Diagnostics: the effect of selection on a real student and teacher, as numbers (`study`) and as one page (report.py).

  from opd_ops.diagnostics import Contexts, study

These names need torch alone. Not here: the page, which needs matplotlib (report.py), `opd-inspect` (cli.py).
"""

from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.fixed_context import SelectorGain
from opd_ops.diagnostics.intervals import Interval
from opd_ops.diagnostics.quadrants import Quadrant, Quadrants
from opd_ops.diagnostics.regression import Regression
from opd_ops.diagnostics.study import Study, study

__all__ = ["Contexts", "Interval", "Quadrant", "Quadrants", "Regression", "SelectorGain", "Study", "study"]
