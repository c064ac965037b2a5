"""All that a process of ranks.py needs, imported once by the server that forks these processes.

Not here: the processes (ranks.py).
"""

from tests.support import kernels

kernels.use()
import torch.distributed  # noqa: E402, F401

import opd_ops.loss  # noqa: E402, F401
