"""The instructions that one program runs, in order, from its machine code and the bytes of its row: no GPU, no values.

  A loop lies between a branch backwards and its target. It streams if it loads at least half as many bytes as the loop that
  loads most. A streaming loop runs until its row is read; another loop runs once, or not where a branch jumps over it.
  A branch forwards is taken if it jumps over a loop that does not stream, or over a call (the slow path of a division).
  Loads before or after the loops, as wide as theirs, read what the loops leave of the row (a masked block).
  A second loop over the row reads a part from L2: all if the rows in flight take half of it, none if they take all of it, since
  each half of L2 keeps copies of the other's lines.

Not here: time (replay.py).
"""

from collections import Counter
from typing import NamedTuple

from benchmarks.static.pipes import LANES_A_WARP, width
from benchmarks.static.sass import Code, Instruction

MOST_STEPS = 2_000_000
SECTOR = 32


class Loop(NamedTuple):
    first: int
    last: int  # the branch backwards
    loaded: int  # bytes a thread and iteration


class Path(NamedTuple):
    steps: list[int]  # numbers of instructions, in the order in which they run
    moved: dict[int, float]  # bytes that a warp's load or store moves to or from memory, by number of instruction
    loops: list[Loop]  # those that stream


def is_load(instruction: Instruction) -> bool:
    return instruction.base == "LDG"


def find_loops(code: Code) -> list[Loop]:
    ends: dict[int, int] = {}
    for last, instruction in enumerate(code.instructions):
        first = code.labels.get(instruction.target or "", last)
        if first < last:  # the code of every kernel ends with a jump to itself
            ends[first] = last
    return [
        Loop(first, last, sum(width(x) for x in code.instructions[first : last + 1] if is_load(x)))
        for first, last in ends.items()
    ]


def streaming(loops: list[Loop]) -> list[Loop]:
    most = max((loop.loaded for loop in loops), default=0)
    chosen = [loop for loop in loops if most and 2 * loop.loaded >= most]
    return [x for x in chosen if not any(y != x and x.first <= y.first and y.last <= x.last for y in chosen)]


def walk(code: Code, row_bytes: float, threads: int, cached: float = 0.0) -> Path:
    """The path of a program of `threads` threads whose streaming loops each read `row_bytes`.

    Args:
        cached: Share of the row that a second loop finds in L2.
    """
    loops = find_loops(code)
    streams = streaming(loops)
    inside = {i for s in streams for i in range(s.first, s.last + 1)}
    widest = max((width(code.instructions[i]) for i in inside if is_load(code.instructions[i])), default=16)
    outside = [
        i for i, x in enumerate(code.instructions) if i not in inside and x.base in ("LDG", "STG") and width(x) == widest
    ]
    is_masked_outside = any(is_load(code.instructions[i]) for i in outside)
    trips = {}
    for s in streams:
        n, left = divmod(int(row_bytes), s.loaded * threads)
        trips[s.first] = max(1, n + (left > 0 and not is_masked_outside))
    skippable = [loop for loop in loops if not any(s.first <= loop.first and loop.last <= s.last for s in streams)]
    steps: list[int] = []
    left_trips = dict(trips)
    i: int | None = 0
    while i is not None and i < len(code.instructions):
        steps.append(i)
        if len(steps) > MOST_STEPS:
            raise ValueError(f"a path of more than {MOST_STEPS} instructions, expected a loop that ends; check the row's bytes")
        i = _next(code, i, skippable, trips, left_trips)
    counts = Counter(steps)
    warps = threads // LANES_A_WARP
    moved = {
        i: _bytes(code.instructions[i], widest)
        for i in counts
        if code.instructions[i].base == "STG" or (is_load(code.instructions[i]) and (i in inside or i in outside))
    }

    def read(numbers) -> float:
        return warps * sum(moved[i] * counts[i] for i in numbers if i in moved and is_load(code.instructions[i]))

    def scale(numbers, factor: float) -> None:
        for i in numbers:
            if i in moved:
                moved[i] *= factor

    for s in streams:
        own = range(s.first, s.last + 1)
        if read(own) > row_bytes:  # its last iteration is masked
            scale(own, row_bytes / read(own))
    if streams and read(outside):
        scale(outside, max(0.0, row_bytes - read(range(streams[0].first, streams[0].last + 1))) / read(outside))
    for s in streams[1:]:
        for i in range(s.first, s.last + 1):
            if i in moved and is_load(code.instructions[i]):
                moved[i] *= 1 - cached
    return Path(steps, moved, streams)


def _bytes(instruction: Instruction, widest: int) -> float:
    """That a warp moves. A store far narrower than the loads is one of few lanes: a sector."""
    is_narrow = instruction.base == "STG" and 4 * width(instruction) < widest
    return float(SECTOR if is_narrow else width(instruction) * LANES_A_WARP)


def _next(code: Code, i: int, skippable: list[Loop], trips: dict[int, int], left: dict[int, int]) -> int | None:
    """What runs after instruction i; None at the program's end."""
    instruction = code.instructions[i]
    # BRA may have its predicate among the operands: BRA.U !UP0, `(.L_x_1)
    is_guarded = bool(instruction.guard) or "P" in instruction.operands.split("`")[0]
    if instruction.base == "EXIT":
        return i + 1 if is_guarded else None
    target = code.labels.get(instruction.target or "")
    if target is None:
        return i + 1
    if target > i:
        if not is_guarded:
            return target
        # A call to a label of the kernel itself is a jump out of a loop.
        calls = any(x.base == "CALL" and ".L_x_" not in x.operands for x in code.instructions[i + 1 : target])
        return target if calls or any(i < loop.first and loop.last < target for loop in skippable) else i + 1
    if target in trips:
        left[target] -= 1
        if left[target] > 0:
            return target
        left[target] = trips[target]
        return i + 1
    return i + 1 if is_guarded else None


def cached_share(row_bytes: float, resident: int, cache: int) -> float:
    """Share of a row that a second loop finds in L2, with `resident` programs on the whole GPU."""
    return min(1.0, max(0.0, 2 - 2 * row_bytes * resident / cache))
