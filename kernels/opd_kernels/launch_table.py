"""Launch table: the one place that chooses block sizes and warps, per kernel, stored type and device.

Every reason below is a static count (python -m benchmarks.static.roofline): registers, spills and
instructions per pair of logits, for sm_80, sm_90 and sm_100. None has been measured on a GPU yet.

Not here: kernels; autotuning: there is none.
"""

import functools
from typing import NamedTuple

import torch
from triton.runtime.jit import JITFunction

MAX_PARTS = 64
_target_override: tuple[int, int] | None = None


def set_target(warp_size: int, capability: int) -> None:
    """Compile ahead of time for another device: its lanes a warp, and the major number of its compute capability (0: no
    NVIDIA GPU).
    """
    global _target_override
    _target_override = warp_size, capability


def _warp_size() -> int:
    return _target()[0]


def _target() -> tuple[int, int]:
    """Lanes a warp and compute capability, as `set_target` has them."""
    return _target_override or _target_of(torch.cuda.current_device() if torch.cuda.is_available() else None)


@functools.cache
def _target_of(device: int | None) -> tuple[int, int]:
    """64 lanes on AMD's data-centre GPUs, 32 on all other devices."""
    if device is None:
        return 32, 0
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).warp_size, 0
    return 32, torch.cuda.get_device_capability(device)[0]


def takes_ptx(kernel: object, device: torch.device) -> bool:
    """Whether the kernel may contain instructions of PTX: not on AMD's GPUs, and not where Triton interprets it."""
    compiled = isinstance(kernel, JITFunction)
    return compiled and torch.version.hip is None and _warp_size() == 32 and device.type in ("cuda", "cpu", "meta")


class Tile(NamedTuple):
    """How a kernel is launched: its block sizes, and how many warps a program has."""

    constants: dict  # the compile-time block sizes of the kernel
    num_warps: int
    registers: int | None = None  # the most a thread may take; None: as the assembler likes

    def limits(self) -> dict[str, int]:
        """The launch option that sets `registers`, which compilers for other GPUs than NVIDIA's do not know."""
        return {"maxnreg": self.registers} if self.registers else {}


class SupportTile(NamedTuple):
    """Warps of the three kernels that make the top-K lists: maxima of groups, lists, statistics of both lists."""

    groups_warps: int
    topk_warps: int
    stats_warps: int


# By compute capability, dtype of both models, and whether logits are soft-capped. 96: one more program a multiprocessor. 128:
# by itself ptxas takes fewer and spills 8 bytes (triton 3.9 on sm_100, 3.6 on sm_80).
SCORE_REGISTERS = {
    (9, torch.bfloat16, False): 96,
    (10, torch.float16, False): 128,
    (8, torch.bfloat16, True): 128,
}


def score(s_dtype: torch.dtype, t_dtype: torch.dtype, *, aligned: bool = True, capped: bool = False) -> Tile:
    """128 threads; with aligned rows each takes 32 logits of each model an iteration (soft-capped fp32: 16).

    VEC logits are one 128-bit load. The work once per lane and iteration (rescaling, group maxima) is spread over R * VEC
    pairs of logits. bf16: 15.9 instructions a pair. ptxas would take 127 registers for it on sm_90, with 96 it spills none:
    five programs an SM instead of four. On sm_100 it takes 85 by itself; limited, it would spill there and on sm_80.
    With QUAD = 4, one load of 4 neighbouring threads is 64 bytes, two full sectors, of one group of 128.
    Soft-capped fp32 takes 16 pairs (56.4 instructions a pair, 91 registers): with 32 ptxas 12.9 spills 8 bytes for sm_90.

    Unaligned rows (a vocabulary of 50,257) are read one logit at a time for any VEC. With VEC = 8, triton moves the logits
    between threads through shared memory: two barriers, 44.8 instructions, 219 registers. With VEC = 1 they stay in
    their thread: 26.5 instructions, 48 registers, blocks of 1024. Requested sectors per existing sector, in 16 rows
    of 50,257: 1.9 with QUAD = 16 (an unaligned 32 bytes lie in two sectors), 2.9 with 8 (24.5 instructions), 1.5 with 32 (38).
    """
    if not aligned:
        return Tile({"R": 8, "GROUPS": 8, "QUAD": 16, "VEC": 1}, num_warps=128 // _warp_size())
    vec = 4 if s_dtype == t_dtype == torch.float32 else 8
    pairs = 16 if capped and vec == 4 else 32
    registers = SCORE_REGISTERS.get((_target()[1], s_dtype, capped)) if s_dtype == t_dtype else None
    return Tile({"R": pairs // vec, "GROUPS": pairs, "QUAD": 128 // pairs, "VEC": vec}, 128 // _warp_size(), registers)


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

    groups: 32 keys a thread of 2048 group maxima (V = 152k). topk: 16-64 of 128 K candidates. By warps, K = 16 takes 11.2k
    instructions of PTX a row in all; with 4 warps 14.8k, with 1 9.2k. At K = 128 more keys would spill, fewer would need more
    warps, and each counting round a longer barrier. stats: lists are short, 16-32 comparisons a thread and chunk. With 64 lanes
    a warp, K = 128 takes 4 warps, 64 keys a thread: with 8 warps triton 3.6 spills 356 bytes, triton 3.9 none.
    """
    scale = 32 / _warp_size()
    groups_warps = 8 if n_groups > 4096 else 2 if top_k <= 16 else 4
    topk_warps = 2 if top_k <= 16 else 8 if top_k <= 64 or _warp_size() == 64 else 16
    stats_warps = 1 if top_k <= 32 else 4
    return SupportTile(*(max(1, int(w * scale)) for w in (groups_warps, topk_warps, stats_warps)))


def candidates(top_k: int) -> Tile:
    """2 K + 1 candidates, each compared with 16 listed ids at a time: 32 comparisons a thread. K = 16 is one warp."""
    size = 2 ** (2 * top_k).bit_length()
    warps = max(1, 16 * size // 32 // _warp_size())
    return Tile({"SIZE": size, "CHUNK": 16}, min(8, warps))


def run(n_picked: int, n_keys: int) -> int:
    """Keys in a run, so that n_keys / run tops and then n_picked * run keys are searched: near the square root, at most 16."""
    run = 1
    while run < 16 and 4 * run * run * n_picked <= n_keys * 2:
        run *= 2
    return run


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


def quantise() -> Tile:
    """128 threads with a 128-bit load each: with two, triton gives each thread 32 neighbouring bytes, half a sector a load."""
    return Tile({"BLOCK": 1024}, num_warps=128 // _warp_size())


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
    """One program, a number a thread: fifteen sums in each. On sm_100 ptxas takes 32 registers by itself and spills 8 bytes."""
    threads = 256 if n <= 1024 else 1024
    return Tile({"BLOCK": threads}, threads // _warp_size(), 64 if _target()[1] == 10 else None)


def place() -> Tile:
    """256 threads, one position each: N = 16,384 gives 64 programs, and eleven columns are in flight at once."""
    return Tile({"BLOCK": 256}, num_warps=256 // _warp_size())


def off_list(dtype: torch.dtype) -> Tile:
    """128 threads, each takes 32 logits an iteration, as in `score`: 8.9 instructions a logit and 53 registers."""
    vec = 4 if dtype == torch.float32 else 8
    return Tile({"LANES": 128, "R": 32 // vec, "VEC": vec}, num_warps=128 // _warp_size())


def off_list_grad() -> Tile:
    """128 threads with two 128-bit loads in flight: 13.4 instructions a logit and 46 registers.

    No larger block: each listed id is compared with every lane of its block.
    """
    return Tile({"BLOCK_V": 2048}, num_warps=128 // _warp_size())
