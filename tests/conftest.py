"""Settings of every test: one thread, because the tensors are small and threads would only wait for each other (two for a test
that asks for `two_threads`), no network, the same hypothesis examples on every machine, and Triton kernels on the CPU
(support/kernels.py).

Not here: inputs (support/cases.py), comparisons (support/tolerances.py), kernels on a GPU (benchmarks/gpu/run.py).
"""

import atexit
import gc
import os

import hypothesis
import pytest
import torch

from tests.support import kernels

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

kernels.use()
# Liger's kernels of this release take Python numbers where PTX has none: they need the interpreter.
collect_ignore = ["support/ptx"] if kernels.IS_INTERPRETED else ["parity/test_liger.py"]
if "OPD_VLLM" not in os.environ:  # a server in a virtual environment of its own: `make test-vllm`
    collect_ignore.append("vllm")
from opd_ops.call import choose  # noqa: E402
from opd_ops.inputs import pair  # noqa: E402

# Rooms with tests of a minute, for each of two processes.
LONG = ("tests/examples", "tests/trainer"), ("tests/benchmarks",)


@pytest.hookimpl(trylast=True)  # after -m and -k have taken tests away
def pytest_collection_modifyitems(items):
    """Each of two processes gets half of the list and begins with its long rooms: at the end neither waits for the other."""
    first, second = ([item for item in items if item.nodeid.startswith(rooms)] for rooms in LONG)
    short = [item for item in items if not item.nodeid.startswith(sum(LONG, ()))]
    cut = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *short[:cut], *second, *short[cut:]]


def pytest_collection_finish():
    """What is imported by now stays: no later collection of garbage walks through it, which takes half a second."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # compiled modules complain of what is left at the end


@pytest.fixture
def prompt_launches(monkeypatch):
    """The interpreter leaves a launch's tensors in a reference cycle: for tests that count live bytes, collect it at once."""
    if not kernels.IS_INTERPRETED:
        return
    from tests.support import interpreter

    launch = interpreter.interpreter.GridExecutor.__call__

    def launch_and_collect(self, *args, **kwargs):
        gc.disable()  # so that all of the launch is in the youngest generation, which is quick to collect
        launch(self, *args, **kwargs)
        gc.collect(0)
        gc.enable()

    monkeypatch.setattr(interpreter.interpreter.GridExecutor, "__call__", launch_and_collect)


@pytest.fixture(autouse=True)
def _no_vocabulary_was_warned_of():
    pair._warned_of.clear()
    choose._warned_of.clear()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks():
    """Four processes over gloo (tests/support/ranks.py)."""
    from tests.support.ranks import Processes

    processes = Processes()
    yield processes
    processes.close()
