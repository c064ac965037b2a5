"""A grid of programs executed from their PTX, all threads in step, on numpy arrays with one element a thread.

  Threads that branch apart go on by themselves, those at the earliest block first, until they meet again. A barrier that
  only a part of a program's threads reaches is an error, and so is a shuffle of a part of a warp.
  Programs run in batches: none may wait for another. Since threads run in step, a missing barrier changes no number: only
  noted accesses show it (accesses.py).
  An instruction becomes a function of the threads when its block is first reached (steps.py). A register keeps the type it
  was written in until it is read as another of the same width, so that most reads cost no view.

Not here: text (program.py), what instructions do (steps.py, operations.py), where numbers are kept (memory.py).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.support.ptx.accesses import Accesses
from tests.support.ptx.memory import LOCAL, Buffers, Scratch
from tests.support.ptx.program import Address, Program, Vector
from tests.support.ptx.steps import DTYPES, WARP, constant, step_of

BATCH = 8192  # threads that run together
REGISTERS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # by bits


def launch(
    program: Program,
    grid: int,
    arguments: list[np.generic],
    shared_bytes: int,
    buffers: Buffers,
    accesses: Accesses | None = None,
) -> int:
    """Run the programs 0 .. grid - 1; returns how many instructions their warps executed. `accesses`: notes theirs."""
    parameters = dict(zip(program.parameters, arguments, strict=True))
    executed, step = 0, max(1, BATCH // program.threads)
    for first in range(0, grid, step):
        ids = np.arange(first, min(first + step, grid), dtype=np.uint32)
        threads = Threads(program, ids, parameters, shared_bytes, buffers)
        if accesses is not None:
            accesses.watch(threads, ids)
        executed += threads.run()
    return executed


class Threads:
    """The threads of some programs, their registers and what they share."""

    def __init__(self, program: Program, ids, parameters: dict[str, np.generic], shared_bytes: int, buffers: Buffers):
        self.program, self.parameters, self.buffers = program, parameters, buffers
        self.parameter_places = {name: 8 * i for i, name in enumerate(parameters)}  # where a program would find them
        self.n = len(ids) * program.threads
        thread = np.arange(self.n, dtype=np.uint32)
        self.everyone = np.ones(self.n, np.bool_)
        self.is_whole = True  # all threads execute the present instruction
        self.next = 0  # the block where all go on; after the last they have ended. None: see `block`
        self.block = np.zeros(self.n, np.int64)  # where each goes on, if they are apart
        self.registers = {"%tid.x": thread % np.uint32(program.threads), "%ctaid.x": np.repeat(ids, program.threads)}
        self.shared = Scratch(thread // program.threads, shared_bytes)
        self.local = Scratch(thread, program.local_bytes, LOCAL)
        self.accesses: Accesses | None = None  # that are noted

    def run(self) -> int:
        executed, blocks, steps = 0, self.program.blocks, self.program.steps
        with np.errstate(all="ignore"):
            while (now := int(self.block.min()) if self.next is None else self.next) < len(blocks):
                active, warps = self.everyone, self.n // WARP
                if self.next is None:
                    active = self.block == now
                    warps = int(active.reshape(-1, WARP).any(1).sum())
                self.is_whole = self.next is not None or np.count_nonzero(active) == self.n
                self.go(now + 1, active)
                if now not in steps:
                    steps[now] = [step_of(self.program, self.register_type, x) for x in blocks[now]]
                executed += warps * len(steps[now])
                for step in steps[now]:
                    step(self, active)
        return executed

    def go(self, block: int, active):
        """Active threads, of which there are some, go on at the block."""
        if self.is_whole:
            self.next = block
            return
        if self.next is not None:
            self.block.fill(self.next)
            self.next = None
        self.block[active] = block
        if (self.block == block).all():
            self.next = block

    def register_type(self, register: str) -> np.dtype:
        known = self.program.register_types
        if register not in known:
            known[register] = np.dtype(REGISTERS[self.program.widths[register.rstrip("0123456789")]])
        return known[register]

    def read(self, operand, kind: str):
        """As an array of the type, one element a thread, or as a scalar of it."""
        dtype, value = DTYPES[kind], self.registers.get(operand)
        if value is not None:
            if value.dtype is dtype:
                return value
            if value.dtype.itemsize == dtype.itemsize:
                return value.view(dtype)
            return value.view(self.register_type(operand)).astype(dtype)
        if isinstance(operand, int):
            return constant(operand, dtype)
        if isinstance(operand, Vector):  # the first is the lowest
            part = f"b{8 * dtype.itemsize // len(operand)}"
            return np.stack([self.each(x, part) for x in operand], -1).reshape(-1).view(dtype)
        if operand == "global_smem":  # shared memory begins at 0
            return dtype.type(0)
        if operand.startswith("__local_depot"):
            return dtype.type(LOCAL)
        if operand in self.parameters:
            return dtype.type(self.parameter_places[operand])
        if operand[0] != "%":
            raise NotImplementedError(f"an operand of PTX that is neither a register nor a number: {operand}")
        undefined = self.register_type(operand)  # the compiler may leave undefined what it does not use
        self.registers[operand] = np.frombuffer(b"\xff" * (self.n * undefined.itemsize), undefined)
        return self.read(operand, kind)

    def each(self, operand, kind: str):
        """`read`, always one element a thread."""
        value = self.read(operand, kind)
        return value if value.ndim else np.full(self.n, value)

    def write(self, register: str, value, active):
        if register == "_":
            return
        dtype = self.register_type(register)
        if value.dtype.itemsize != dtype.itemsize:  # a wider register takes the sign along
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
        if not value.ndim:
            value = np.full(self.n, value)
        if not self.is_whole:
            value = np.where(active, value.view(dtype), self.read(register, _bits(dtype)))
        self.registers[register] = value

    def addresses(self, address: Address):
        base, offset = address
        kind = _bits(self.register_type(base)) if base[0] == "%" else "b64"
        places = self.each(base, kind).astype(np.uint64, copy=False)
        return places + np.uint64(offset & (1 << 64) - 1) if offset else places

    def parameter(self, address: Address, kind):
        """A parameter, of which each thread may have chosen another."""
        if address.base in self.parameters:
            return self.parameters[address.base].view(kind)
        by_place = {self.parameter_places[name]: value for name, value in self.parameters.items()}
        chosen, which = np.unique(self.addresses(address), return_inverse=True)
        return np.array([by_place[int(place)].view(kind) for place in chosen])[which]

    def come_together(self, active, threads: int, text: str):
        """All of each group of so many threads are active, or none."""
        if self.is_whole:
            return
        together = active.reshape(-1, threads)
        if (together.any(1) != together.all(1)).any():
            raise RuntimeError(f"only a part of {threads} threads that must come together does: {text}")


@cache
def _bits(dtype: np.dtype) -> str:
    return "pred" if dtype.kind == "b" else f"b{8 * dtype.itemsize}"
