"""Measurements of the library against its peers; `python -m benchmarks.cpu.compare` is the one command.

Not here: the library (opd_ops/), claims of correctness (tests/). What came of each measurement: LOG.md, results/.
"""
