"""Adapters to the trainers of other libraries. Each is imported on its own: `import opd_ops` needs torch alone.

Not here: the loss (opd_ops/loss.py).
"""
