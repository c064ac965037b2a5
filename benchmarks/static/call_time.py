"""Predicted time of a call for two heads over its matmul floor on an H200, each term listed: from the trace and the model.

  floor    FLOP of all matmuls / MATMUL_RATE
  matmuls  beyond the floor: whole tiles of the matmul in whole waves over the multiprocessors, or the bytes of its operands
  kernels  over the vocabulary: cycles that the replay of their machine code takes (model.py), with as many programs at a time
           as the launch gives a multiprocessor; the top-K's, which have no such loop: their counted instructions
  others   bytes that they move / a copy's speed
  gaps     GAP_US for each launch

Assumed, because nothing here can tell: MATMUL_RATE, GAP_US, TOP_K_ISSUE; that the library splits the sum of a product with few
result tiles over the multiprocessors (`unsplit` is the cost if it does not); that launches come in time.

Command: python -m benchmarks.static.call_time [--n 16384]; `make model` ends with it

Not here: the trace (launches.py), the replay (replay.py), anything timed on a GPU (benchmarks/gpu/heads.py).
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from opd_kernels import launch_table

from benchmarks.static import launches, roofline
from benchmarks.static.launches import Matmul, Traced
from benchmarks.static.model import POINTS, Kernel
from benchmarks.static.pipes import DEVICES, QUARTERS

TARGET = "sm_90"
DEVICE = DEVICES[TARGET]
MATMUL_RATE = 790e12  # FLOP a second of a large bf16 matmul on an H200
TILE_ROWS, TILE_COLUMNS = (64, 128), 256  # of the vendor's matmul
GAP_US = 1.5  # from the last program of a kernel to the first of the next
TOP_K_INSTRUCTIONS = 11_300  # by warps, a row at K = 16 and V = 151,936, at most: tests/support/ptx/test_traffic.py
TOP_K_ISSUE = 0.5  # share of the issue slots that they fill, between their barriers
IDLE_PROGRAMS = 16  # of four warps, on a multiprocessor
LIMIT = 1.14  # of the time over the floor, at N = 16,384


class Term(NamedTuple):
    name: str
    ms: float


class CallTime(NamedTuple):
    floor_ms: float
    terms: list[Term]
    unsplit_ms: float  # more, if the library does not split long sums

    @property
    def over_floor(self) -> float:
        return 1 + sum(term.ms for term in self.terms) / self.floor_ms


def matmul_ms(matmul: Matmul, *, splits: bool = True) -> float:
    """Time of a product: whole waves of whole tiles, or its bytes if they take longer.

    `splits`: the library shares out the sums of results of less than a wave.
    """
    waves = []
    for rows in TILE_ROWS:
        tiles = -(-matmul.rows // rows) * -(-matmul.columns // TILE_COLUMNS)
        whole = -(-tiles // DEVICE.multiprocessors) * DEVICE.multiprocessors
        filled = tiles if splits and tiles < DEVICE.multiprocessors else whole
        waves.append(filled * 2 * rows * TILE_COLUMNS * matmul.inner / MATMUL_RATE)
    return 1e3 * max(min(waves), matmul.nbytes / DEVICE.copy)


def kernel_ms(launch, programs: int) -> float:
    """Time of a launch of a kernel over the vocabulary, at the first of the model's points."""
    clock, latency_ns = POINTS[0]
    ghz = clock * DEVICE.ghz
    programs_each = -(-programs // DEVICE.multiprocessors)  # programs of the multiprocessor that has most
    return programs_each * Kernel(launch, TARGET, DEVICE).cycles(ghz, latency_ns, programs_each) / (ghz * 1e6)


def _kernels(part: Traced, where: str) -> Iterator[Term]:
    """A term for each kernel over the vocabulary, and one for the top-K."""
    known: dict[tuple[str, int], float] = {}
    totals: dict[str, float] = {}
    for launch, programs in zip(part.kernels, part.programs, strict=True):
        name = roofline.kernel_name(launch)
        if name.startswith(roofline.STREAMING):
            if (name, programs) not in known:
                known[name, programs] = kernel_ms(launch, programs)
            totals[name] = totals.get(name, 0.0) + known[name, programs]
    yield from (Term(f"{where}: kernel {name}", ms) for name, ms in totals.items())
    if rows := _programs(part, "support_stats_fwd"):
        slots = DEVICE.multiprocessors * QUARTERS * DEVICE.ghz * 1e6 * TOP_K_ISSUE  # a millisecond
        yield Term(f"{where}: kernels of the top-K", rows * TOP_K_INSTRUCTIONS / slots)
    if idle := _programs(part, "scale"):  # by 1: each program reads the factor and returns
        at_a_time = DEVICE.multiprocessors * IDLE_PROGRAMS
        yield Term(f"{where}: kernel scale, by 1", idle / at_a_time * POINTS[0][1] * 1e-6)


def _programs(part: Traced, name: str) -> int:
    """Programs of all launches of a kernel."""
    named = zip(part.kernels, part.programs, strict=True)
    return sum(programs for launch, programs in named if roofline.kernel_name(launch) == name)


def call_time(n: int) -> CallTime:
    """The terms of a call of n positions."""
    launch_table.set_target(32, roofline.TARGETS[TARGET].arch // 10)
    floor, unsplit, terms = 0.0, 0.0, []
    for where, part in zip(("score", "loss"), launches.parts(n), strict=True):
        at_rate = 1e3 * sum(x.flops for x in part.matmuls) / MATMUL_RATE
        floor += at_rate
        split = sum(map(matmul_ms, part.matmuls))
        unsplit += sum(matmul_ms(x, splits=False) for x in part.matmuls) - split
        terms.append(Term(f"{where}: matmuls beyond the floor", split - at_rate))
        terms += _kernels(part, where)
        terms.append(Term(f"{where}: other operators' bytes", 1e3 * sum(part.nbytes.values()) / DEVICE.copy))
        terms.append(Term(f"{where}: gaps of {part.launches} launches", 1e-3 * GAP_US * part.launches))
    return CallTime(floor, terms, unsplit)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predict the time of a call over its matmul floor.")
    parser.add_argument("--n", type=int, default=16_384)
    options = parser.parse_args(argv)
    time = call_time(options.n)
    sizes = f"N = {options.n}, V = {launches.V}, two heads of {launches.STUDENT_DIM} and {launches.TEACHER_DIM}"
    print(f"{DEVICE.name}, {sizes}, reverse KL of {launches.FRACTION:.0%}: predicted")
    print(f"{time.floor_ms:8.2f} ms  floor: all matmuls at {MATMUL_RATE / 1e12:.0f} TFLOP/s")
    for term in time.terms:
        print(f"{term.ms:8.2f} ms  {term.ms / time.floor_ms:6.1%}  {term.name}")
    total = time.floor_ms * time.over_floor
    print(f"{total:8.2f} ms, {time.over_floor:.3f} of the floor")
    unsplit = total + time.unsplit_ms
    print(f"{unsplit:8.2f} ms, {unsplit / time.floor_ms:.3f}, if long sums are not split")
    if options.n != 16_384 or time.over_floor <= LIMIT:
        return 0
    print(f"expected at most {LIMIT} of the floor")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
