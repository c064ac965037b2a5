"""PTX text, as Triton's compiler writes it, as blocks of instructions.

  A block is entered at its top and left at its bottom; its last instruction alone may branch.
  An operand is an int (the bits of a number), a register or special register ("%r1"), a Vector of operands ("{a, b}", and
  "p|q"), an Address, or a name (a label, a parameter).

Not here: what instructions do (steps.py, operations.py), how threads walk the blocks (machine.py).
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import NamedTuple

WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64, "u32": 32, "s32": 32, "u64": 64, "s64": 64}
DECLARATION = re.compile(r"\.reg \.(\w+)\s+(%\w+?)(?:<\d+>)?;")
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);")
OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+")
NUMBER = re.compile(r"0[fFdD]([0-9A-Fa-f]{8,16})|(0[xX][0-9A-Fa-f]+)U?|(-?\d+)U?")


class Vector(tuple):
    """Several operands in one: {a, b}."""


class Address(NamedTuple):
    base: str | int  # a register or a name; a number is absolute
    offset: int


class Instruction(NamedTuple):
    opcode: tuple[str, ...]  # ("ld", "global", "v4", "b32")
    operands: tuple
    guard: str | None  # the predicate it is executed under
    negated: bool
    text: str


class Program(NamedTuple):
    name: str
    parameters: tuple[str, ...]  # in the order of the arguments
    threads: int
    local_bytes: int  # of a thread
    widths: dict[str, int]  # bits of a register by its prefix: {"%r": 32}
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # label -> block
    register_types: dict[str, object]  # machine.py: of each register that was used
    steps: dict[int, list]  # machine.py: functions of the instructions of each block that was reached


@cache  # kernels that differ in what they do not use have the same text
def parse(ptx: str) -> Program:
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*)", ptx, re.DOTALL)
    depot = re.search(r"\.local \.align \d+ \.b8\s+__local_depot\d+\[(\d+)\]", ptx)
    widths: dict[str, int] = {}
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in entry[3].splitlines():
        line = line.partition("//")[0].strip()
        if line.startswith(".reg ") and (declared := DECLARATION.fullmatch(line)):
            widths[declared[2]] = WIDTHS[declared[1]]
        elif line.startswith("$L_") and line[-1] == ":":
            if line.startswith(("$L__tmp", "$L__func")):  # a place in the source: no branch goes there
                continue
            if blocks[-1]:
                blocks.append([])
            labels[line[:-1]] = len(blocks) - 1
        elif line.startswith(".section"):
            break
        elif line not in ("", "{", "}") and line[0] not in ".$":
            instruction = _instruction(line)
            blocks[-1].append(instruction)
            if instruction.opcode[0] in ("bra", "ret"):
                blocks.append([])
    return Program(
        name=entry[1],
        parameters=tuple(re.findall(r"\w+_param_\d+", entry[2])),
        threads=int(re.search(r"\.reqntid (\d+)", ptx)[1]),
        local_bytes=int(depot[1]) if depot else 0,
        widths=widths,
        blocks=blocks,
        labels=labels,
        register_types={},
        steps={},
    )


def _instruction(line: str) -> Instruction:
    match = INSTRUCTION.fullmatch(line)
    if match is None:
        raise ValueError(f"not an instruction of PTX: {line!r}")
    negation, guard, opcode, operands = match.groups()
    parts = tuple(_operand(x.strip()) for x in OPERAND.findall(operands))
    return Instruction(_opcode(opcode), parts, guard, bool(negation), line)


@lru_cache(maxsize=4096)
def _opcode(text: str) -> tuple[str, ...]:
    return tuple(text.split("."))


@lru_cache(maxsize=65536)  # most lines name registers of lines before
def _operand(text: str) -> object:
    if text[0] == "{":
        return Vector(_operand(x.strip()) for x in text[1:-1].split(","))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_operand(base), int(offset or 0))
    if "|" in text:
        return Vector(_operand(x) for x in text.split("|"))
    if number := NUMBER.fullmatch(text):
        bits, hexadecimal, decimal = number.groups()
        return int(bits, 16) if bits else int(hexadecimal, 16) if hexadecimal else int(decimal)
    return text
