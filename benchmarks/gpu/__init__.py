"""Benchmarks and checks on a GPU: `make gpu`."""
