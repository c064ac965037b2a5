"""Examples, one per file, run from the repository's root: `python -m examples.prompt_distillation`.

Not here: the library (opd_ops/), measurements (benchmarks/).
"""
