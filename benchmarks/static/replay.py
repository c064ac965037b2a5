"""Replays the programs of one quarter of a multiprocessor (SM): when each instruction issues, and what it waits for.

  A warp's next instruction issues when its stall is over, the scoreboards of its wait mask are clear, its pipe or the queue
  before it has room, and no other warp issues in that cycle. The scheduler stays with a warp until it waits or yields, then
  takes the one whose program began last (Huerta et al., arXiv:2503.20481: greedy, then youngest); with the longest
  waiting first the score's predicted shares are 5 to 10 points higher.
  Memory keeps the quarter to its share of the bandwidth over SMOOTHED cycles: 528 quarters together have no bursts. An answer
  comes `latency` after its request, or later where the share or the way from L2 is used up.
  A barrier waits for the program's warps on this quarter, and BARRIER_CYCLES for those on the others.

Left out: caches of instructions, conflicts of register banks and of shared memory, the start of a program, the last wave,
clocks that change.

Not here: which instructions (path.py), what they cost (pipes.py), the table (model.py).
"""

import heapq
import math
from typing import NamedTuple

from benchmarks.static import pipes
from benchmarks.static.pipes import Device
from benchmarks.static.sass import Instruction

SMOOTHED = 2000.0  # cycles
PIPES = ("FMA", "FMA2", "ALU", "MUFU", "LSU", "FP64", "UNIFORM", "FREE")
QUEUED = frozenset(PIPES.index(x) for x in pipes.QUEUED)
SECOND_HALF = PIPES.index("FMA2")


class Step(NamedTuple):
    """An instruction as the replay needs it."""

    pipe: int
    busy: int
    stall: int
    yields: bool
    wait: tuple[int, ...]
    write: int | None
    read: int | None
    latency: int
    memory: float  # cycles of the quarter's share of the bandwidth
    port: float  # cycles of its share of the SM's way to L2
    is_load: bool
    is_barrier: bool


def make_step(instruction: Instruction, moved: float, device: Device, ghz: float) -> Step:
    """The step of an instruction that moves `moved` bytes a warp to or from memory."""
    name, control, base = pipes.pipe(instruction), instruction.control, instruction.base
    if name in ("FMA", "IFMA"):
        name = "FMA2" if name == "FMA" and device.fma_halves == 2 else "FMA"
    cost = pipes.READ_COST if base == "LDG" else pipes.WRITE_COST
    bytes_a_cycle = device.copy / (device.multiprocessors * pipes.QUARTERS * ghz * 1e9)
    return Step(
        pipe=PIPES.index(name),
        busy=pipes.busy(instruction),
        stall=max(1, control.stall),
        yields=control.yields,
        wait=control.wait,
        write=control.write,
        read=control.read,
        latency=pipes.LATENCY.get(base, pipes.DEFAULT_LATENCY),
        memory=moved * cost / bytes_a_cycle,
        port=moved / pipes.PORT_BYTES,
        is_load=base == "LDG",
        is_barrier=base == "BAR",
    )


def replay(steps: list[Step], path: list[int], *, programs: int, warps: int, latency: float, rounds: int = 1) -> float:
    """Cycles between the ends of two programs, on a quarter with `programs` resident ones of `warps` warps each, out of phase.

    Args:
        path: Numbers of steps, of one program.
        latency: Cycles from a request to its answer where nobody else waits.
        rounds: Whole programs that are timed, one after another in each place.
    """
    n, n_warps = len(path), programs * warps
    jumps = frozenset(i for i in range(n - 1) if path[i + 1] != path[i] + 1)
    position = [(k // warps) * n // programs for k in range(n_warps)]
    boards = [[0.0] * 6 for _ in range(n_warps)]
    begun = list(range(n_warps))  # the greater, the younger
    parked: list[list[tuple[float, int]]] = [[] for _ in range(programs)]
    free = [0.0] * len(PIPES)
    memory_free = port_free = t = start = 0.0
    completed = before = 0
    later = [(0.0, k) for k in range(n_warps)]  # when a warp can issue
    ready: list[int] = []
    last = -1  # the warp that issued in the cycle before and goes on
    while completed < (1 + rounds) * n_warps:
        while later and later[0][0] <= t:
            ready.append(heapq.heappop(later)[1])
        k, soonest = -1, later[0][0] if later else math.inf
        for other in ready:
            pipe = steps[path[position[other]]].pipe
            room = min(free[0], free[1]) if pipe == SECOND_HALF else free[pipe] - (pipes.QUEUE_CYCLES if pipe in QUEUED else 0)
            if room > t:
                soonest = min(soonest, room)
            elif k < 0 or other == last or (k != last and begun[other] > begun[k]):
                k = other
        if k < 0:
            t, last = soonest, -1
            continue
        ready.remove(k)
        step, board = steps[path[position[k]]], boards[k]
        pipe = 0 if step.pipe == SECOND_HALF and free[0] < free[1] else step.pipe
        begins = max(free[pipe], t)
        if step.busy:
            free[pipe] = begins + step.busy
        if step.memory:
            memory_free = max(memory_free, begins - SMOOTHED) + step.memory
        if step.write is not None:
            done = begins + step.busy + step.latency
            if step.is_load:
                port_free = max(port_free, begins) + step.port
                done = max(port_free, memory_free) + (latency if step.memory else latency / 2)
            board[step.write] = max(board[step.write], done)
        if step.read is not None:
            board[step.read] = max(board[step.read], begins + step.busy + pipes.READ_LATENCY)
        able = t + step.stall + (pipes.BRANCH_CYCLES if position[k] in jumps else 0)
        last = -1 if step.yields else k
        position[k] += 1
        if position[k] == n:
            position[k] = 0
            completed += 1
            begun[k] = n_warps + completed
            if completed == n_warps:
                before, start = completed * n + sum(position), t
        for b in steps[path[position[k]]].wait:
            able = max(able, board[b])
        if not step.is_barrier:
            heapq.heappush(later, (able, k))
        else:
            waiting = parked[k // warps]
            waiting.append((able, k))
            if len(waiting) == warps:
                for other_able, other in waiting:
                    heapq.heappush(later, (max(other_able, t + pipes.BARRIER_CYCLES), other))
                waiting.clear()
        t += 1
    done_programs = (completed * n + sum(position) - before) / (n * warps)
    return (t - start) / done_programs
