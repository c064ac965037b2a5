# Settings of every test: one thread, because the tensors are small and threads would only wait for each other (two for a test
# that asks for `two_threads`), no network, the same hypothesis examples on every machine, and Triton kernels run by its
# interpreter, on the CPU.
#
# Not here: inputs (cases.py), comparisons (tolerances.py), kernels compiled for a GPU (benchmarks/gpu.py).
import gc
import os

import hypothesis
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before interpreter.py
torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

from opd_ops import sides  # noqa: E402
from tests import interpreter  # noqa: E402


@pytest.fixture
def prompt_launches(monkeypatch):
    """The interpreter leaves a launch's tensors in a reference cycle: for tests that count live bytes, collect it at once."""
    launch = interpreter.interpreter.GridExecutor.__call__

    def launch_and_collect(self, *args, **kwargs):
        gc.disable()  # so that all of the launch is in the youngest generation, which is quick to collect
        launch(self, *args, **kwargs)
        gc.collect(0)
        gc.enable()

    monkeypatch.setattr(interpreter.interpreter.GridExecutor, "__call__", launch_and_collect)


@pytest.fixture(autouse=True)
def _no_vocabulary_was_warned_of():
    sides._warned_of.clear()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks():
    """Four processes over gloo (tests/ranks.py)."""
    from tests.ranks import Processes

    processes = Processes()
    yield processes
    processes.close()
