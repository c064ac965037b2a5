"""Triton kernels of opd_ops, and the launchers that allocate outputs and launch them: score.py, support.py, candidates.py,
argmax.py, gradient.py, off_list.py, zero_rows.py, scale.py; of selection quantiles.py, place.py, choose.py, totals.py. What a
divergence brings is in reverse_kl.py, forward_kl.py and jsd.py, parts of the score in words.py, score_sums.py and
score_careful.py, shared helpers in device.py and order.py, block sizes in launch_table.py.

Importing this package does not import triton; importing one of its modules does.

Not here: autograd, defaults, policy, checks of user input (opd_ops).
"""
