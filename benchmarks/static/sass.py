"""Machine code of NVIDIA GPUs since Volta, with the control codes that ptxas puts into each instruction.

An instruction is 128 bits. Bits 105 to 125 say when it may issue:
  105-108  stall    cycles before the warp's next instruction may issue
  109      yield    0: the scheduler should turn to another warp
  110-112  write    scoreboard that is set until the result is there; 7: none
  113-115  read     scoreboard that is set until the operands are read; 7: none
  116-121  wait     mask of the scoreboards that must be clear before it issues
  Source: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv:1804.06826, section 2.1.

Not here: what an instruction costs (pipes.py), which ones a program runs (path.py).
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NONE = 7  # no scoreboard


class Control(NamedTuple):
    stall: int
    yields: bool
    write: int | None
    read: int | None
    wait: tuple[int, ...]


class Instruction(NamedTuple):
    guard: str  # "", "@P0", "@!UP1"
    name: str  # with its modifiers: LDG.E.128
    operands: str
    control: Control

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a branch jumps to."""
        label = re.search(r"`\((\.L_x_\d+)\)", self.operands) if self.base == "BRA" else None
        return label.group(1) if label else None


class Code(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # the number of the instruction that follows


def decode_control(high: int) -> Control:
    """The control code in the upper 64 bits of an instruction."""
    code = high >> 41
    write, read = code >> 5 & 7, code >> 8 & 7
    wait = tuple(i for i in range(6) if code >> 11 + i & 1)
    return Control(code & 15, not code >> 4 & 1, None if write == NONE else write, None if read == NONE else read, wait)


LABEL = re.compile(r"^\s*(\.L_x_\d+):")
FIRST = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


def parse(text: str) -> Code:
    """The instructions of `nvdisasm -c -hex`; every one has a second line with the upper half of its encoding."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    first = None
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif lower := FIRST.match(line):
            first = lower.groups(default="")
        elif (upper := SECOND.match(line)) and first is not None:
            instructions.append(Instruction(*first, decode_control(int(upper.group(1), 16))))
            first = None
    if not instructions:
        raise ValueError("no instruction with an encoding found; expected the output of `nvdisasm -c -hex`")
    return Code(instructions, labels)


def disassemble(cubin: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([TOOLS / "nvdisasm", "-c", "-hex", path], capture_output=True, text=True, check=True)
    return parse(done.stdout)
