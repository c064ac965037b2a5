"""Triton kernels of opd_ops, and the launchers that allocate their outputs and launch them: score.py, support.py, argmax.py,
reverse_kl.py, forward_kl.py, jsd.py, rest.py, zero_rows.py, scale.py. Shared helpers are in device.py, parts of the score in
words.py, score_sums.py and score_careful.py, block sizes in launch_table.py.

Importing this package does not import triton; importing one of its modules does.

Not here: autograd, defaults, policy, checks of user input (opd_ops).
"""
