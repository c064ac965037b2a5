"""Host time of the calls of calls.py, one thread, by pytest-benchmark; what each costs besides time is its `extra_info`.

  operators   of torch, forward and backward; views and allocations are not counted
  launches    of Triton kernels, where ours runs on backend "triton"
  peak_bytes  most bytes of tensors that the call made and that were alive at once

On a machine without a GPU the kernels of "triton" run from their PTX, by tests/support/ptx: operators and launches are those of
a GPU, the time is not, so one round is run. TRL's and Liger's functions that run here are plain PyTorch.
Run: make bench-host; compare: make bench-host ARGS="--benchmark-compare=FILE", FILE an earlier --benchmark-json
Not here: the calls (calls.py), times of real sizes, interleaved (benchmarks/cpu/compare.py).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.support import kernels

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    kernels.use()

from triton.runtime.jit import JITFunction  # noqa: E402 the kernels' driver must be chosen first

from benchmarks.host.calls import Call, calls, inputs  # noqa: E402
from benchmarks.static.operators import Operators  # noqa: E402
from tests.support.meters import LiveBytes  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
ROUNDS, WARM_UP = 30, 5
CALLS = calls()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CALLS)
def test_host_time(name: str, benchmark, monkeypatch):
    call = CALLS[name]
    for module in call.modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    is_emulated = call.backend == "triton" and not HAS_GPU
    benchmark.group = f"{call.inputs}, {call.selector if call.modules == () else 'peers'}"
    benchmark.extra_info |= _costs(call, monkeypatch) | {"is_emulated": is_emulated, "device": DEVICE}

    def setup():
        sides = inputs(call.inputs, DEVICE)
        if HAS_GPU:
            torch.cuda.synchronize()
        return (sides,), {}

    benchmark.pedantic(call.run, setup=setup, rounds=1 if is_emulated else ROUNDS, warmup_rounds=0 if is_emulated else WARM_UP)


def _costs(call: Call, monkeypatch) -> dict[str, int]:
    call.run(inputs(call.inputs, DEVICE))  # what is made once
    launches: list[object] = []
    first, second = (inputs(call.inputs, DEVICE) for _ in range(2))
    with monkeypatch.context() as patched, Operators() as counter:
        if call.backend == "triton":
            patched.setattr(JITFunction, "run", lambda fn, *a, f=JITFunction.run, **k: launches.append(fn) or f(fn, *a, **k))
        call.run(first)
    with LiveBytes() as meter:
        call.run(second)
    costs = {"operators": sum(counter.names.values()), "peak_bytes": meter.peak}
    return costs | ({"launches": len(launches)} if call.backend == "triton" else {})
