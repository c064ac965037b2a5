"""What an instruction costs on one quarter of a multiprocessor (SM), and the GPUs that run it.

  A quarter issues one instruction of a warp each cycle. A pipe of L lanes is busy with it for 32 / L cycles:
  FMA    32 lanes, in two halves of 16; integer multiplications only in the first. One half on sm_80
  ALU    16 lanes: comparisons, maxima, logic, shifts, conversions to 16 bits
  MUFU    4 lanes: exp2, log2, reciprocals, conversions of integers
  FP64   16 lanes;  UNIFORM  one instruction of a whole warp each two cycles
  LSU     8 lanes and a quarter of the SM's 128 bytes a cycle: loads, stores, shuffles; a reduction of a warp takes 8
  LSU and MUFU take instructions from a queue: issue goes on while it has room.
  Sources: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"; shuffles and reductions as measured in
  https://github.com/Dao-AILab/quack/blob/main/AI/gpu_pipe_microbench_notes.md.
  Latencies are given only of what has a scoreboard; the others' are the stall counts of the code.

Not here: decoding (sass.py), the replay (replay.py).
"""

import re
from typing import NamedTuple

from benchmarks.static.sass import Instruction

LANES_A_WARP, QUARTERS = 32, 4
QUEUED = ("LSU", "MUFU")
PORT_BYTES = 16  # a cycle from L2 to a quarter: 64 an SM
QUEUE_CYCLES = 32  # of work that may wait before LSU and MUFU

FMA = {"FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"}
INTEGER_FMA = {"IMAD", "IMAD32I", "XMAD"}
MUFU = {"MUFU", "I2F", "F2I", "I2FP", "FRND", "POPC", "FLO", "BREV", "F2F"}
LSU = {
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDL",
    "STL",
    "LD",
    "ST",
    "SHFL",
    "REDUX",
    "CREDUX",
    "ATOM",
    "ATOMG",
    "ATOMS",
    "RED",
    "LDSM",
    "STSM",
}
FP64 = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
FREE = {"NOP", "BRA", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "CALL", "RET", "BAR", "DEPBAR", "BREAK", "YIELD", "ERRBAR", "MEMBAR",
        "S2R", "S2UR", "CS2R", "LDC", "LDCU", "R2UR", "B2R", "R2B", "VOTE", "VOTEU", "ELECT", "ACQBULK"}  # fmt: skip
LATENCY = {
    "MUFU": 20, "I2F": 20, "F2I": 20, "F2F": 20, "FRND": 20, "POPC": 20, "FLO": 20, "SHFL": 24, "REDUX": 24, "CREDUX": 24,
    "LDS": 30, "LDL": 34, "S2R": 24, "S2UR": 24, "LDC": 30, "LDCU": 30, "R2UR": 12, "DADD": 40, "DMUL": 40, "DFMA": 40,
    "VOTE": 12,
}  # fmt: skip
DEFAULT_LATENCY = 24
READ_LATENCY = 14  # until LSU has read an instruction's operands
BARRIER_CYCLES = 30  # from the last warp's arrival
BRANCH_CYCLES = 8  # what a taken branch costs beyond its stall


class Device(NamedTuple):
    """Figures of a GPU; `copy` is what torch's copy reads and writes together, bytes a second."""

    name: str
    multiprocessors: int
    ghz: float
    copy: float
    cache: int  # bytes of L2
    fma_halves: int = 2
    shared: int = 227 * 1024


# Copies: 90 % of the pins' bytes, as measured on an H100 SXM (3.0 of 3.35 TB/s) in quack's AI/hadamard_roofline_analysis.md.
DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 108, 1.41, 1.80e12, 40 * 2**20, 1, 163 * 1024),
    "sm_90": Device("H200", 132, 1.98, 4.3e12, 50 * 2**20),
    "sm_100": Device("B200", 148, 1.965, 7.2e12, 126 * 2**20),
}
H100 = Device("H100 SXM", 132, 1.98, 3.02e12, 50 * 2**20)
H100_PCIE = Device("H100 PCIe", 114, 1.755, 1.84e12, 50 * 2**20)
# A kernel that only reads is faster than a copy: Liger's KL (published.py) reads 1.975 TB/s on an H100 PCIe, 97 % of the pins'.
READ_COST = 1 / 1.05
WRITE_COST = 2 - READ_COST  # so that a copy costs what it costs

WIDTH = re.compile(r"\.(256|128|64|U16|S16|U8|S8)\b")


def width(instruction: Instruction) -> int:
    """Bytes that a load or store moves for one thread."""
    suffix = WIDTH.search(instruction.name)
    return {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[suffix.group(1)] if suffix else 4


def pipe(instruction: Instruction) -> str:
    base = instruction.base
    if base in FMA:
        return "FMA"
    for name, bases in (("IFMA", INTEGER_FMA), ("MUFU", MUFU), ("LSU", LSU), ("FP64", FP64), ("FREE", FREE)):
        if base in bases:
            return name
    return "UNIFORM" if base.startswith("U") else "ALU"


def busy(instruction: Instruction) -> int:
    """Cycles that the instruction keeps its pipe busy; of FMA, one half."""
    name = pipe(instruction)
    if name == "LSU":
        if instruction.base in ("REDUX", "CREDUX"):
            return 8
        moved = 4 if instruction.base == "SHFL" else width(instruction)
        return max(4, moved * LANES_A_WARP * QUARTERS // 128)
    packed = instruction.base in ("FFMA2", "FADD2", "FMUL2")
    return {"FMA": 4 if packed else 2, "IFMA": 2, "ALU": 2, "MUFU": 8, "FP64": 2, "UNIFORM": 2, "FREE": 0}[name]


def programs(registers: int, warps: int, shared: int, device: Device) -> int:
    """Programs that fit on one multiprocessor."""
    a_warp = -(-registers * LANES_A_WARP // 256) * 256
    by_registers = QUARTERS * min(16, 16384 // a_warp) // warps
    by_shared = device.shared // (shared + 1024)
    return max(1, min(by_registers, by_shared, 32))
