"""Triton device code of opd_ops and the launchers that allocate and launch it: score.py, support.py, argmax.py,
reverse_kl.py, forward_kl.py, jsd.py, rest.py; helpers they share in device.py, block sizes in launch_table.py.

Importing this package does not import triton; importing one of its modules does.

Not here: autograd, defaults, policy, checks of user input (opd_ops).
"""
