# Tests, one file per subject; run from the repository's root: `make test`.
#
#   cases.py inputs; tolerances.py bounds; meters.py counted cost; interpreter.py and kernel_oracle.py for the kernels;
#   support/ the recorder of calls, and the figures of the source's structure
#
# Not here: anything timed (benchmarks/).
