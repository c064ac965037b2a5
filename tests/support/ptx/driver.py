"""A driver for Triton whose device runs PTX on the CPU: kernels are compiled as for a GPU, all the way, and take CPU tensors.

  use(target)  Triton launches on it from then on: its specialisation of arguments, compiler and cache are those of any GPU.
  counted()    a context: the list of what its launches executed and moved
  watched()    a context: the list of each launch's kernel and its conflicts (accesses.py); it takes memory and time

Not here: how PTX is run (machine.py).
"""

from __future__ import annotations

import fcntl
import importlib
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import opd_kernels
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.support.ptx.accesses import Accesses
from tests.support.ptx.machine import launch
from tests.support.ptx.memory import Buffers, Traffic
from tests.support.ptx.program import parse

NUMBERS = {"i32": np.int32, "i64": np.int64, "u32": np.uint32, "u64": np.uint64, "fp32": np.float32}
SHARED_LIMIT = 163 * 1024  # the least of the targets
COMPILE = triton.compiler.compile
_counts: list[list[Launched]] = []  # of the contexts that are open
_watches: list[list[tuple[str, dict[str, int]]]] = []


class Launched(NamedTuple):
    kernel: str
    instructions: int  # of PTX, by its warps
    traffic: Traffic


@contextmanager
def counted() -> Iterator[list[Launched]]:
    _counts.append([])
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


@contextmanager
def watched() -> Iterator[list[tuple[str, dict[str, int]]]]:
    _watches.append([])
    try:
        yield _watches[-1]
    finally:
        _watches.pop()


class Launcher:
    """Takes the arguments of a launch as Triton passes them to its own launchers."""

    def __init__(self, source, metadata):
        self.types = list(source.signature.values())
        self.shared_bytes = metadata.shared
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0

    def __call__(self, x, y, z, stream, program, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        assert y == z == 1, "grids of one dimension"
        given = [(kind, value) for kind, value in zip(self.types, arguments, strict=True) if kind != "constexpr"]
        tensors = [value for kind, value in given if kind[0] == "*"]
        numbers = [np.uint64(v.data_ptr()) if kind[0] == "*" else NUMBERS[kind](v) for kind, v in given]
        scratch = [np.uint64(0)] * 2  # of no byte
        traffic = Traffic() if _counts else None
        accesses = Accesses() if _watches else None
        executed = launch(program, x, numbers + scratch, self.shared_bytes, Buffers(tensors, traffic), accesses)
        for count in _counts:
            count.append(Launched(program.name, executed, traffic))
        for watch in _watches:
            watch.append((program.name, accesses.conflicts()))


class Utilities:
    """What the compiler asks of a device."""

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_LIMIT}

    def load_binary(self, name, binary, shared, device):
        return name, parse(Driver.ptx), 0, 0, 1024  # module, function, registers, spills, the most threads

    def unload_module(self, module):
        pass


class Driver(DriverBase):
    launcher_cls = Launcher
    utils = Utilities()
    ptx = ""  # of the kernel that is being loaded

    def __init__(self, capability: int):
        super().__init__()
        self.capability = capability

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("nothing is compiled for the host")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed here")


def _compile_once(source, *args, **kwargs):
    """One process compiles a kernel, the others wait for it in Triton's cache: ranks launch the same kernels at once."""
    folder = Path(knobs.cache.dir) / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / source.hash()).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        return COMPILE(source, *args, **kwargs)


def use(target: str) -> None:
    """Compile for the target, like sm_90, whatever is launched from now on, and run it here. Before any kernel is imported."""

    def loading(module, function, name, files, hash):
        Driver.ptx = Path(files[f"{name}.ptx"]).read_text()

    knobs.runtime.kernel_load_start_hook = loading
    triton.compiler.compile = _compile_once
    triton.runtime.driver.set_active(Driver(int(target.removeprefix("sm_"))))
    for module in pkgutil.iter_modules(opd_kernels.__path__):
        importlib.import_module(f"opd_kernels.{module.name}")
    os.environ["TRITON_INTERPRET"] = "1"  # by which the library takes CPU tensors; the kernels are compiled all the same
