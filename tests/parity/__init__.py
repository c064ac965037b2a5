"""Parity: this library against loss code that nobody here wrote, one file a peer; `formulas.py` judges both in fp64.

A peer that is missing is an error, not a skip: the suites need the dependency group `parity`.
"""
