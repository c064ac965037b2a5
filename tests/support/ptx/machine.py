"""A grid of programs executed from their PTX, all threads in step, on numpy arrays with one element a thread.

  Threads that branch apart go on by themselves, those at the earliest block first, until they meet again. A barrier that
  only a part of a program's threads reaches is an error, and so is a shuffle of a part of a warp.
  Programs run in batches: none may wait for another. Since threads run in step, a missing barrier does not show.

Not here: text (program.py), what is computed (operations.py), where it is kept (memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import NamedTuple

import numpy as np

from tests.support.ptx.memory import LOCAL, Buffers, Scratch
from tests.support.ptx.operations import OPERATIONS, TYPES, compare, convert, operation
from tests.support.ptx.program import Address, Instruction, Program, Vector

BATCH = 8192  # threads that run together
WARP = 32
DTYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}  # of integers
REGISTERS = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # by bits


def launch(program: Program, grid: int, arguments: list[np.generic], shared_bytes: int, buffers: Buffers) -> int:
    """Run the programs 0 .. grid - 1; returns how many instructions their warps executed."""
    parameters = dict(zip(program.parameters, arguments, strict=True))
    executed, step = 0, max(1, BATCH // program.threads)
    for first in range(0, grid, step):
        ids = np.arange(first, min(first + step, grid), dtype=np.uint32)
        executed += Threads(program, ids, parameters, shared_bytes, buffers).run()
    return executed


class Threads:
    """The threads of some programs, their registers and what they share."""

    def __init__(self, program: Program, ids, parameters: dict[str, np.generic], shared_bytes: int, buffers: Buffers):
        self.program, self.parameters, self.buffers = program, parameters, buffers
        self.parameter_places = {name: 8 * i for i, name in enumerate(parameters)}  # where a program would find them
        self.n = len(ids) * program.threads
        thread = np.arange(self.n, dtype=np.uint32)
        self.lane = (thread % WARP).astype(np.int64)
        self.everyone = np.ones(self.n, np.bool_)
        self.next = 0  # the block where all go on; after the last they have ended. None: see `block`
        self.block = np.zeros(self.n, np.int64)  # where each goes on, if they are apart
        self.registers = {"%tid.x": thread % np.uint32(program.threads), "%ctaid.x": np.repeat(ids, program.threads)}
        self.shared = Scratch(thread // program.threads, shared_bytes)
        self.local = Scratch(thread, program.local_bytes)

    def run(self) -> int:
        executed, end = 0, len(self.program.blocks)
        with np.errstate(all="ignore"):
            while (now := int(self.block.min()) if self.next is None else self.next) < end:
                active, warps = self.everyone, self.n // WARP
                if self.next is None:
                    active = self.block == now
                    warps = int(active.reshape(-1, WARP).any(1).sum())
                self.is_whole = bool(active.all())
                self._go(now + 1, active)
                executed += warps * len(self.program.blocks[now])
                for instruction in self.program.blocks[now]:
                    self._execute(instruction, active)
        return executed

    def _go(self, block: int, active):
        """Active threads go on at the block."""
        if self.is_whole:
            self.next = block
        elif active.any():
            if self.next is not None:
                self.block.fill(self.next)
                self.next = None
            self.block[active] = block
            if (self.block == block).all():
                self.next = block

    def _execute(self, instruction: Instruction, active):
        execute = getattr(self, "_" + instruction.opcode[0], self._compute)
        if instruction.guard is None:
            execute(instruction, active)
            return
        guard, is_whole = self.read(instruction.guard, "pred"), self.is_whole
        active = active & (~guard if instruction.negated else guard)
        self.is_whole = bool(active.all())
        execute(instruction, active)
        self.is_whole = is_whole

    # Operands

    def _register_type(self, register: str) -> np.dtype:
        known = self.program.register_types
        if register not in known:
            known[register] = np.dtype(REGISTERS[self.program.widths[register.rstrip("0123456789")]])
        return known[register]

    def read(self, operand, kind: str):
        """As an array of the type, one element a thread, or as a scalar of it."""
        dtype = DTYPES[kind]
        if isinstance(operand, int):
            return _constant(operand, dtype)
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
        if operand not in self.registers:  # the compiler may leave undefined what it does not use
            undefined = self._register_type(operand)
            self.registers[operand] = np.frombuffer(b"\xff" * (self.n * undefined.itemsize), undefined)
        value = self.registers[operand]
        if value.dtype == dtype:
            return value
        return value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)

    def each(self, operand, kind: str):
        """`read`, always one element a thread."""
        value = self.read(operand, kind)
        return value if value.ndim else np.full(self.n, value)

    def write(self, register: str, value, active):
        if register == "_":
            return
        value, dtype = np.asarray(value), self._register_type(register)
        if value.dtype != dtype:
            if value.dtype.itemsize != dtype.itemsize:  # a wider register takes the sign along
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
            value = value.view(dtype)
        if not value.ndim:
            value = np.full(self.n, value)
        self.registers[register] = value if self.is_whole else np.where(active, value, self.read(register, _bits(dtype)))

    def addresses(self, address: Address):
        base, offset = address
        kind = _bits(self._register_type(base)) if base[0] == "%" else "b64"
        return self.each(base, kind).astype(np.uint64) + np.uint64(offset & (1 << 64) - 1)

    # What computes

    def _compute(self, instruction: Instruction, active):
        plan = self.program.plans.get(id(instruction))
        if plan is None:
            plan = self.program.plans[id(instruction)] = self._plan(instruction)
        if plan.function is not None:
            values = []
            for operand, kind, dtype, constant in plan.operands:
                value = self.registers.get(operand) if constant is None else constant
                values.append(self.read(operand, kind) if value is None or value.dtype is not dtype else value)
            self.write(plan.target, plan.function(*values, *plan.constants), active)
            return
        name, types = _split(instruction.opcode)
        target, *operands = instruction.operands
        if types[-1] == "f32x2":  # the operation on either half
            halves = [self.each(x, "b64").view(np.float32) for x in operands]
            result = operation(name, (*types[:-1], "f32"))(*halves).view(np.uint64)
        else:  # in fp32, as the last operand is
            values = [convert(("f32", types[-1]), self.read(x, types[-1])) for x in operands[:-1]]
            result = operation(name, ("f32",))(*values, self.read(operands[-1], "f32"))
        self.write(target, result, active)

    def _plan(self, instruction: Instruction) -> Plan:
        name, types = _split(instruction.opcode)
        target, *operands = instruction.operands
        is_widened = name in ("add", "sub", "fma") and types[-1] in ("bf16", "f16") and "f32" in types
        if types[-1] == "f32x2" or is_widened:
            return Plan(None, target, [], [])
        kinds = _kinds(name, types[-1], len(operands))
        read = [
            (operand, kind, DTYPES[kind], _constant(operand, DTYPES[kind]) if isinstance(operand, int) else None)
            for operand, kind in zip(operands, kinds, strict=False)
        ]
        return Plan(operation(name, types), target, read, operands[len(kinds) :])

    def _setp(self, instruction: Instruction, active):
        assert len(instruction.opcode) == 3, f"a comparison that flushes, or joins another: {instruction.text}"
        comparison, kind = instruction.opcode[1:]
        target, a, b = instruction.operands
        if not kind.endswith("x2"):
            self.write(target, compare(comparison)((kind,), self.read(a, kind), self.read(b, kind)), active)
            return
        half = kind[:-2]
        halves = [self.each(x, "b32").view(TYPES[half]).reshape(self.n, 2) for x in (a, b)]
        for i, register in enumerate(target):  # the lower half first
            self.write(register, compare(comparison)((half,), *(np.ascontiguousarray(x[:, i]) for x in halves)), active)

    def _mov(self, instruction: Instruction, active):
        target, source = instruction.operands
        if not isinstance(target, Vector):
            self.write(target, self.read(source, instruction.opcode[-1]), active)
            return
        whole = self.each(source, instruction.opcode[-1])
        parts = whole.view(f"u{whole.dtype.itemsize // len(target)}").reshape(self.n, -1)
        for i, register in enumerate(target):
            self.write(register, np.ascontiguousarray(parts[:, i]), active)

    def _cvta(self, instruction: Instruction, active):
        target, source = instruction.operands
        self.write(target, self.read(source, "u64"), active)

    # Memory

    def _space(self, opcode: tuple[str, ...], address: Address):
        """Of an access: the memory, the addresses in it, bytes of an element, elements."""
        size = np.dtype(TYPES[opcode[-1]]).itemsize
        count = next((int(x[1:]) for x in opcode if x in ("v2", "v4", "v8")), 1)
        places = self.addresses(address)
        if "global" in opcode:
            return self.buffers, places, size, count
        if any(x.startswith("shared") for x in opcode):
            return self.shared, places, size, count
        return self.local, places - np.uint64(LOCAL), size, count

    def _ld(self, instruction: Instruction, active):
        target, address = instruction.operands
        if instruction.opcode[1] == "param":
            self.write(target, self._parameter(address, TYPES[instruction.opcode[2]]), active)
            return
        memory, places, size, count = self._space(instruction.opcode, address)
        values = memory.load(places, active, size, count)
        for register, value in zip(target if isinstance(target, Vector) else [target], values, strict=True):
            self.write(register, value.view(TYPES[instruction.opcode[-1]]), active)

    def _parameter(self, address: Address, kind: str):
        """A parameter, of which each thread may have chosen another."""
        if address.base in self.parameters:
            return self.parameters[address.base].view(kind)
        by_place = {self.parameter_places[name]: value for name, value in self.parameters.items()}
        chosen, which = np.unique(self.addresses(address), return_inverse=True)
        return np.array([by_place[int(place)].view(kind) for place in chosen])[which]

    def _st(self, instruction: Instruction, active):
        address, source = instruction.operands
        memory, places, size, count = self._space(instruction.opcode, address)
        sources = source if isinstance(source, Vector) and len(source) == count else [source]
        memory.store(places, active, size, [self.each(x, f"b{8 * size}") for x in sources])

    def _matrices(self, instruction: Instruction, address: Address):
        """For each 8 x 8 matrix of 16 bits: where each thread's two numbers of it are."""
        assert "trans" not in instruction.opcode, f"transposed matrices: {instruction.text}"
        count = int(next(x for x in instruction.opcode if x in ("x1", "x2", "x4"))[1:])
        rows = self.addresses(address).reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8)  # lane 8 i + r: row r of i
        lane = self.lane[:WARP]  # has the numbers 2 (lane % 4) and the next of row lane / 4
        for i in range(count):
            yield (rows[:, i, lane // 4] + (4 * (lane % 4)).astype(np.uint64)).reshape(-1)

    def _ldmatrix(self, instruction: Instruction, active):
        targets, address = instruction.operands
        for target, places in zip(targets, self._matrices(instruction, address), strict=True):
            self._all_or_none(instruction, active, WARP)
            self.write(target, self.shared.load(places, active, 4, 1)[0], active)

    def _stmatrix(self, instruction: Instruction, active):
        address, sources = instruction.operands
        for source, places in zip(sources, self._matrices(instruction, address), strict=True):
            self._all_or_none(instruction, active, WARP)
            self.shared.store(places, active, 4, [self.each(source, "b32")])

    # What threads exchange

    def _shfl(self, instruction: Instruction, active):
        mode = instruction.opcode[2]
        target, source, by, clamp, members = instruction.operands
        assert members == -1, f"a shuffle of some threads: {instruction.text}"
        assert clamp == (0 if mode == "up" else 31), f"a shuffle in parts of a warp: {instruction.text}"
        self._all_or_none(instruction, active, WARP)
        by = self.read(by, "s32") & 31
        lane = {"bfly": self.lane ^ by, "up": self.lane - by, "down": self.lane + by, "idx": by + 0 * self.lane}[mode]
        lane = np.where((lane < 0) | (lane >= WARP), self.lane, lane)
        self.write(target, self.each(source, "b32")[np.arange(self.n) - self.lane + lane], active)

    def _redux(self, instruction: Instruction, active):
        name, types = _split(instruction.opcode[2:])
        target, source, _ = instruction.operands
        self._all_or_none(instruction, active, WARP)
        values = self.each(source, types[-1]).reshape(-1, WARP)
        combine = REDUCTIONS.get(name) if types[-1] in ("s32", "u32", "b32") else None
        result = reduce(operation(name, types), values.T) if combine is None else combine.reduce(values, axis=1)
        self.write(target, np.repeat(result.astype(values.dtype), WARP), active)

    def _bar(self, instruction: Instruction, active):
        self._all_or_none(instruction, active, WARP if instruction.opcode[1] == "warp" else self.program.threads)

    def _all_or_none(self, instruction: Instruction, active, threads: int):
        together = active.reshape(-1, threads)
        if (together.any(1) != together.all(1)).any():
            raise RuntimeError(f"only a part of {threads} threads that must come together does: {instruction.text}")

    # Branches

    def _bra(self, instruction: Instruction, active):
        self._go(self.program.labels[instruction.operands[0]], active)

    def _ret(self, instruction: Instruction, active):
        self._go(len(self.program.blocks), active)


@cache
def _constant(operand: int, dtype: np.dtype) -> np.generic:
    bits = operand & (1 << 8 * dtype.itemsize) - 1
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()] if dtype.kind != "b" else np.bool_(operand)


class Plan(NamedTuple):
    """How an instruction that only computes is executed; function None: by halves, or widened to fp32."""

    function: Callable[..., np.ndarray] | None
    target: str
    operands: list[tuple[object, str, np.dtype, np.generic | None]]  # each with its type, and its value if it is a number
    constants: list[object]  # as they stand, after the operands


@cache
def _kinds(name: str, kind: str, count: int) -> list[str]:
    """The types of the operands that are read: the instruction's own, but for these."""
    kinds = [kind] * count
    if name == "selp":
        kinds[2] = "pred"
    elif name in ("shl", "shr"):
        kinds[1] = "u32"
    elif name == "mad.wide":
        kinds[2] = kind[0] + "64"
    constants = {"bfe": 2, "prmt": 1}.get(name, 0)  # at the end: fields and bytes are picked by constants
    return kinds[: count - constants]


@cache
def _bits(dtype: np.dtype) -> str:
    return "pred" if dtype.kind == "b" else f"b{8 * dtype.itemsize}"


@cache
def _split(opcode: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The name by which OPERATIONS knows an opcode; and its other parts, how it rounds and, at the end, its types."""
    name = tuple(x for x in opcode if x not in TYPES and x not in ("rn", "rzi", "ftz", "full", "approx"))
    if ".".join(name) not in OPERATIONS:
        raise NotImplementedError(f"an instruction of PTX that operations.py does not have: {'.'.join(opcode)}")
    return ".".join(name), tuple(x for x in opcode if x not in name)
