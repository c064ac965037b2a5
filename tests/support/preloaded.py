"""All that a process of ranks.py needs, imported once by the server that forks these processes.

Not here: the processes (ranks.py).
"""

import atexit
import gc

from tests.support import kernels

kernels.use()
import torch._dynamo  # noqa: E402  which a counter of FLOP imports
import torch.distributed.tensor  # noqa: E402, F401

import opd_ops.loss  # noqa: E402, F401

gc.freeze()  # for the processes, which then copy fewer pages of memory, too
atexit.register(gc.unfreeze)
