"""Every test with accelerate's state as a fresh process has it: precision and processes are settled once a process otherwise.

Not here: how kernels run (support/kernels.py).
"""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
