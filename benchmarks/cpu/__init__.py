"""Benchmarks on a CPU, and those that compare with other libraries."""
