# Settings of every test: one thread, because the tensors are small and threads would only wait for each other, no network,
# and the same hypothesis examples on every machine.
#
# Not here: inputs (cases.py), comparisons (tolerances.py).
import os

import hypothesis
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
