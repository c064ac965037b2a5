"""Launch table: the one place that chooses block sizes and warps, per kernel, stored type and device.

Every reason below is a static count (python -m benchmarks.static.roofline): registers, spills and
instructions per pair of logits, for sm_80, sm_90 and sm_100. None has been measured on a GPU yet.

Not here: kernels; autotuning: there is none.
"""

import functools
from typing import NamedTuple

import torch

MAX_PARTS = 64
_warp_size_override: int | None = None


def set_warp_size(size: int | None) -> None:
    """Set the warp size for ahead-of-time compilation for another device; None: the current device's warp size."""
    global _warp_size_override
    _warp_size_override = size


def _warp_size() -> int:
    return _warp_size_override or _warp_size_of(torch.cuda.current_device() if torch.cuda.is_available() else None)


@functools.cache
def _warp_size_of(device: int | None) -> int:
    """Lanes a warp: 64 on AMD's data-centre GPUs, 32 on all other devices."""
    return 32 if device is None or not torch.version.hip else torch.cuda.get_device_properties(device).warp_size


class Tile(NamedTuple):
    constants: dict  # the compile-time block sizes of the kernel
    num_warps: int


class SupportTile(NamedTuple):
    groups_warps: int
    topk_warps: int
    stats_warps: int


def score(s_dtype: torch.dtype, t_dtype: torch.dtype, *, aligned: bool = True, capped: bool = False) -> Tile:
    """128 threads; with aligned rows each takes 32 logits of each model an iteration (soft-capped fp32: 16).

    VEC logits are one 128-bit load. The work once per lane and iteration (rescaling, the fold of VEC sums, two maxima) is
    spread over R * VEC pairs of logits:
      32 pairs   22.8 instructions a pair, 128 registers, four programs an SM
      16 pairs   24.5 instructions a pair, 80 registers
      64 pairs   21.4 instructions a pair, 168 registers, three programs an SM
    With QUAD = 4, one load of 4 neighbouring threads is 64 bytes, two full sectors, of one group of 128.
    Soft-capped fp32 takes 16 pairs (57.6 instructions a pair, 79 registers): with 32 (54.4 and 128) ptxas 12.9 spills 8
    bytes for sm_90.

    Unaligned rows (a vocabulary of 50,257) are read one logit at a time for any VEC. With VEC = 8, triton moves the logits
    between threads through shared memory: two barriers, 44.8 instructions, 219 registers. With VEC = 1 they stay in
    their thread: 28.8 instructions, 48 registers, blocks of 1024. Requested sectors per existing sector, in 16 rows
    of 50,257: 1.9 with QUAD = 16 (an unaligned 32 bytes lie in two sectors), 2.9 with 8 (24.5 instructions), 1.5 with 32 (38).
    """
    if not aligned:
        return Tile({"R": 8, "GROUPS": 8, "QUAD": 16, "VEC": 1}, num_warps=128 // _warp_size())
    vec = 4 if s_dtype == t_dtype == torch.float32 else 8
    pairs = 16 if capped and vec == 4 else 32
    return Tile({"R": pairs // vec, "GROUPS": pairs, "QUAD": 128 // pairs, "VEC": vec}, num_warps=128 // _warp_size())


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":  # also ROCm
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 64


def score_parts(n: int, vocab_size: int, tile: Tile, device: torch.device) -> int:
    """Programs per row: 1 if there are two rows per multiprocessor or more, else enough for four programs on each."""
    units = _multiprocessors(device)
    if n >= 2 * units:
        return 1
    block = 128 * tile.constants["GROUPS"]
    return max(1, min(-(-4 * units // n), vocab_size // block, MAX_PARTS))


def support(top_k: int, n_groups: int) -> SupportTile:
    """Warps of the three kernels, from the keys per thread.

    groups: 16 keys a thread of 2048 group maxima (V = 152k). topk: 16-32 of 128 K candidates; more keys would spill at
    K = 128, fewer would need more warps, and each counting round a longer barrier. stats: lists are short, 16-32
    comparisons a thread and chunk. With 64 lanes a warp, K = 128 takes 4 warps, 64 keys a thread: with 8 warps triton 3.6
    spills 356 bytes, triton 3.9 none.
    """
    scale = 32 / _warp_size()
    groups_warps = 4 if n_groups <= 4096 else 8
    topk_warps = 4 if top_k <= 16 else 8 if top_k <= 64 or _warp_size() == 64 else 16
    stats_warps = 1 if top_k <= 32 else 4
    return SupportTile(*(max(1, int(w * scale)) for w in (groups_warps, topk_warps, stats_warps)))


def grad() -> Tile:
    """128 threads with two 128-bit loads of each model in flight: two inputs and one output, each read or written once.

    JSD's sums take the same tile: 30.8 instructions a pair and 72 registers.
    """
    return Tile({"BLOCK_V": 2048}, num_warps=128 // _warp_size())


def zero_rows() -> Tile:
    """128 threads with four 128-bit stores each an iteration: nothing is read, so nothing waits."""
    return Tile({"WORDS": 2048}, num_warps=128 // _warp_size())


def scale() -> Tile:
    """128 threads; each has four 128-bit loads of 16-bit numbers in flight."""
    return Tile({"BLOCK": 4096}, num_warps=128 // _warp_size())


def selection(n: int) -> Tile:
    """One program for n positions, 2 to 16 numbers a thread; of more than 16,384 positions 8 a thread at a time.

    Few numbers a thread: each round of a search waits for one thread's numbers and one barrier. 16 stay in registers
    (1024 threads have 64 each); 32 would leave no room for what a scan of them needs.
    """
    block, threads = (1024, 512) if n <= 1024 else (4096, 1024) if n <= 4096 else (16_384, 1024)
    if n > block:  # read again by each round: 16 addresses a thread would not stay in registers
        block = 8192
    return Tile({"BLOCK": block}, num_warps=threads // _warp_size())


def totals(n: int) -> Tile:
    """One program, a number a thread: fifteen sums in each. So many numbers are read at a time."""
    threads = 256 if n <= 1024 else 1024
    return Tile({"BLOCK": threads}, num_warps=threads // _warp_size())


def place() -> Tile:
    """256 threads, one position each: N = 16,384 gives 64 programs, and eleven columns are in flight at once."""
    return Tile({"BLOCK": 256}, num_warps=256 // _warp_size())


def rest(dtype: torch.dtype) -> Tile:
    """128 threads, each takes 32 logits an iteration, as in `score`: 8.9 instructions a logit and 53 registers."""
    vec = 4 if dtype == torch.float32 else 8
    return Tile({"LANES": 128, "R": 32 // vec, "VEC": vec}, num_warps=128 // _warp_size())


def rest_grad() -> Tile:
    """128 threads with two 128-bit loads in flight: 13.4 instructions a logit and 46 registers.

    No larger block: each listed id is compared with every lane of its block.
    """
    return Tile({"BLOCK_V": 2048}, num_warps=128 // _warp_size())
