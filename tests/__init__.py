"""Tests, one file per subject; run from the repository's root: `make test`.

  support/cases.py inputs; support/tolerances.py bounds; support/meters.py counted cost; support/kernels.py how
  kernels run; support/kernel_oracle.py their specification; support/ the recorder of calls, and the figures of the source's
  structure

Not here: anything timed (benchmarks/).
"""
