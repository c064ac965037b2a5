"""Tests, one file per subject; run from the repository's root: `make test`.

  support/cases.py inputs; support/tolerances.py bounds; support/meters.py counted cost; support/interpreter.py and
  support/kernel_oracle.py for the kernels; support/ the recorder of calls, and the figures of the source's structure

Not here: anything timed (benchmarks/).
"""
