"""What each instruction of PTX does to the threads that execute it: `step_of` makes of it a function of the threads and of
which of them are active, so that its text is looked at once.

  STEPS[first part of the opcode]: instructions that move, load, store, exchange or branch; all others only compute.
  A guarded instruction that no active thread executes is skipped.

Not here: arithmetic (operations.py), registers and where threads go on (machine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial, reduce

import numpy as np

from tests.support.ptx.operations import OPERATIONS, TYPES, compare, convert, operation
from tests.support.ptx.program import Instruction, Program, Vector

WARP = 32
DTYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}  # of integers


def step_of(program: Program, register_type: Callable[[str], np.dtype], instruction: Instruction):
    make = STEPS.get(instruction.opcode[0])
    step = _computing(register_type, instruction) if make is None else make(program, register_type, instruction)
    if instruction.guard is None:
        return step
    guard, is_negated = instruction.guard, instruction.negated

    def guarded(threads, active):
        chosen, is_whole = threads.registers.get(guard), threads.is_whole
        if chosen is None:
            chosen = threads.read(guard, "pred")
        if is_negated:
            chosen = ~chosen
        if not is_whole:
            chosen = chosen & active
        count = np.count_nonzero(chosen)
        if count:
            threads.is_whole = count == threads.n
            step(threads, chosen)
            threads.is_whole = is_whole

    return guarded


# --- what computes ---------------------------------------------------------------------------------------------------


def _computing(register_type, instruction: Instruction):
    name, types = _split(instruction.opcode)
    target, *operands = instruction.operands
    if types[-1] == "f32x2":  # the operation on either half
        function = operation(name, (*types[:-1], "f32"))

        def halves(threads, active):
            values = [threads.each(x, "b64").view(np.float32) for x in operands]
            threads.write(target, function(*values).view(np.uint64), active)

        return halves
    if name in ("add", "sub", "fma") and types[-1] in ("bf16", "f16") and "f32" in types:  # in fp32, as the last operand is
        function, kind = operation(name, ("f32",)), types[-1]

        def widened(threads, active):
            values = [convert(("f32", kind), threads.read(x, kind)) for x in operands[:-1]]
            threads.write(target, function(*values, threads.read(operands[-1], "f32")), active)

        return widened
    kinds = _kinds(name, types[-1], len(operands))
    function, constants = operation(name, types), operands[len(kinds) :]
    if constants:
        return _applying(lambda *values: function(*values, *constants), target, operands, kinds, register_type)
    return _applying(function, target, operands, kinds, register_type)


def _applying(function, target, operands, kinds, register_type):
    """Write the function of the operands, each read as the type of its name."""
    read = []
    for operand, kind in zip(operands, kinds, strict=False):
        dtype = DTYPES[kind]
        read.append((operand, kind, dtype, constant(operand, dtype) if isinstance(operand, int) else None))
    size = 0 if target == "_" else register_type(target).itemsize

    def apply(threads, active):
        registers, values = threads.registers, []
        for operand, kind, wanted, value in read:
            if value is None:
                value = registers.get(operand)
                if value is None or value.dtype is not wanted:
                    value = threads.read(operand, kind)
            values.append(value)
        result = function(*values)
        if threads.is_whole and result.ndim and result.dtype.itemsize == size:
            registers[target] = result
        else:
            threads.write(target, result, active)

    return apply


def _setp(program, register_type, instruction: Instruction):
    assert len(instruction.opcode) == 3, f"a comparison that flushes, or joins another: {instruction.text}"
    comparison, kind = instruction.opcode[1:]
    target, a, b = instruction.operands
    if not kind.endswith("x2"):
        function = partial(compare(comparison), (kind,))
        return _applying(function, target, (a, b), (kind, kind), register_type)
    function, dtype = partial(compare(comparison), (kind[:-2],)), TYPES[kind[:-2]]

    def halves(threads, active):
        pairs = [threads.each(x, "b32").view(dtype).reshape(threads.n, 2) for x in (a, b)]
        for i, register in enumerate(target):  # the lower half first
            threads.write(register, function(*(np.ascontiguousarray(x[:, i]) for x in pairs)), active)

    return halves


def _mov(program, register_type, instruction: Instruction):
    (target, source), kind = instruction.operands, instruction.opcode[-1]
    if not isinstance(target, Vector):
        return _applying(lambda x: x, target, (source,), (kind,), register_type)

    def parts(threads, active):
        whole = threads.each(source, kind)
        columns = whole.view(f"u{whole.dtype.itemsize // len(target)}").reshape(threads.n, -1)
        for i, register in enumerate(target):
            threads.write(register, np.ascontiguousarray(columns[:, i]), active)

    return parts


def _cvta(program, register_type, instruction: Instruction):
    target, source = instruction.operands
    return lambda threads, active: threads.write(target, threads.read(source, "u64"), active)


# --- memory ----------------------------------------------------------------------------------------------------------


def _space(opcode: tuple[str, ...]):
    """Of an access: the name of the memory among the threads', bytes of an element, elements."""
    memory = "buffers" if "global" in opcode else "shared" if any(x.startswith("shared") for x in opcode) else "local"
    count = next((int(x[1:]) for x in opcode if x in ("v2", "v4", "v8")), 1)
    return memory, DTYPES[opcode[-1]].itemsize, count


def _ld(program, register_type, instruction: Instruction):
    target, address = instruction.operands
    if instruction.opcode[1] == "param":
        dtype = TYPES[instruction.opcode[2]]
        return lambda threads, active: threads.write(target, threads.parameter(address, dtype), active)
    memory, size, count = _space(instruction.opcode)
    targets, dtype = target if isinstance(target, Vector) else [target], TYPES[instruction.opcode[-1]]

    def load(threads, active):
        places = threads.addresses(address)
        values = getattr(threads, memory).load(places, active, size, count, is_whole=threads.is_whole)
        for register, value in zip(targets, values, strict=True):
            threads.write(register, value.view(dtype), active)

    return load


def _st(program, register_type, instruction: Instruction):
    address, source = instruction.operands
    memory, size, count = _space(instruction.opcode)
    sources, kind = source if isinstance(source, Vector) and len(source) == count else [source], f"b{8 * size}"

    def store(threads, active):
        values = [threads.each(x, kind) for x in sources]
        getattr(threads, memory).store(threads.addresses(address), active, size, values, is_whole=threads.is_whole)

    return store


def _matrices(threads, instruction: Instruction, address):
    """For each 8 x 8 matrix of 16 bits: where each thread's two numbers of it are."""
    assert "trans" not in instruction.opcode, f"transposed matrices: {instruction.text}"
    count = int(next(x for x in instruction.opcode if x in ("x1", "x2", "x4"))[1:])
    rows = threads.addresses(address).reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8)  # lane 8 i + r: row r of i
    lane = np.arange(WARP)  # has the numbers 2 (lane % 4) and the next of row lane / 4
    for i in range(count):
        yield (rows[:, i, lane // 4] + (4 * (lane % 4)).astype(np.uint64)).reshape(-1)


def _ldmatrix(program, register_type, instruction: Instruction):
    targets, address = instruction.operands

    def load(threads, active):
        threads.come_together(active, WARP, instruction.text)
        for target, places in zip(targets, _matrices(threads, instruction, address), strict=True):
            threads.write(target, threads.shared.load(places, active, 4, 1, is_whole=threads.is_whole)[0], active)

    return load


def _stmatrix(program, register_type, instruction: Instruction):
    address, sources = instruction.operands

    def store(threads, active):
        threads.come_together(active, WARP, instruction.text)
        for source, places in zip(sources, _matrices(threads, instruction, address), strict=True):
            threads.shared.store(places, active, 4, [threads.each(source, "b32")], is_whole=threads.is_whole)

    return store


# --- what threads exchange -------------------------------------------------------------------------------------------


@lru_cache(maxsize=128)
def _partners(mode: str, by: int, n: int):
    """Of each of n threads: the one whose number it takes, itself where that is not in its warp."""
    thread = np.arange(n)
    lane = thread % WARP
    other = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by + 0 * lane}[mode]
    return thread - lane + np.where((other < 0) | (other >= WARP), lane, other)


def _shfl(program, register_type, instruction: Instruction):
    mode = instruction.opcode[2]
    target, source, by, clamp, members = instruction.operands
    assert members == -1, f"a shuffle of some threads: {instruction.text}"
    assert clamp == (0 if mode == "up" else 31), f"a shuffle in parts of a warp: {instruction.text}"
    assert isinstance(by, int) or mode == "idx", f"a shuffle by a register's number of lanes: {instruction.text}"

    def shuffle(threads, active):
        threads.come_together(active, WARP, instruction.text)
        if isinstance(by, int):
            partners = _partners(mode, by & 31, threads.n)
        else:
            thread = np.arange(threads.n)
            partners = thread - thread % WARP + (threads.read(by, "s32") & 31)
        threads.write(target, threads.each(source, "b32").take(partners), active)

    return shuffle


def _redux(program, register_type, instruction: Instruction):
    name, types = _split(instruction.opcode[2:])
    target, source, _ = instruction.operands
    combine = REDUCTIONS.get(name) if types[-1] in ("s32", "u32", "b32") else None
    function = operation(name, types)

    def reduce_warps(threads, active):
        threads.come_together(active, WARP, instruction.text)
        values = threads.each(source, types[-1]).reshape(-1, WARP)
        result = reduce(function, values.T) if combine is None else combine.reduce(values, axis=1)
        threads.write(target, np.repeat(result.astype(values.dtype), WARP), active)

    return reduce_warps


def _bar(program, register_type, instruction: Instruction):
    is_of_warp = instruction.opcode[1] == "warp"
    count = WARP if is_of_warp else program.threads

    def wait(threads, active):
        threads.come_together(active, count, instruction.text)
        if threads.accesses is not None:
            threads.accesses.pass_barrier(active, is_of_warp=is_of_warp)

    return wait


# --- branches --------------------------------------------------------------------------------------------------------


def _bra(program, register_type, instruction: Instruction):
    block = program.labels[instruction.operands[0]]
    return lambda threads, active: threads.go(block, active)


def _ret(program, register_type, instruction: Instruction):
    return lambda threads, active: threads.go(len(program.blocks), active)


STEPS = {
    "setp": _setp, "mov": _mov, "cvta": _cvta, "ld": _ld, "st": _st, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix,
    "shfl": _shfl, "redux": _redux, "bar": _bar, "bra": _bra, "ret": _ret,
}  # fmt: skip


@cache
def constant(operand: int, dtype: np.dtype) -> np.generic:
    bits = operand & (1 << 8 * dtype.itemsize) - 1
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()] if dtype.kind != "b" else np.bool_(operand)


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
def _split(opcode: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The name by which OPERATIONS knows an opcode; and its other parts, how it rounds and, at the end, its types."""
    name = tuple(x for x in opcode if x not in TYPES and x not in ("rn", "rzi", "ftz", "full", "approx"))
    if ".".join(name) not in OPERATIONS:
        raise NotImplementedError(f"an instruction of PTX that operations.py does not have: {'.'.join(opcode)}")
    return ".".join(name), tuple(x for x in opcode if x not in name)
