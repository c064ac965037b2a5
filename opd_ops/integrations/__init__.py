"""Adapters to trainers, each imported on its own: importing opd_ops needs torch alone, and no trainer.

Not here: the loss (opd_ops/loss.py).
"""
