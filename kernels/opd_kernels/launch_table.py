"""Launch table: the one place that chooses block sizes and warps, per kernel, stored type and device.

Every reason below is a static count (python -m benchmarks.static.roofline): registers, spills and
instructions per pair for sm_80, sm_90 and sm_100. None has been measured on a GPU yet.

Not here: kernels; autotuning, which there is none of.
"""

import functools
from typing import NamedTuple

import torch

MAX_PARTS = 64
_other_warp_size: int | None = None


def set_warp_size(size: int | None) -> None:
    """For compiling ahead of time for another device than the one at hand; None: that of the device at hand."""
    global _other_warp_size
    _other_warp_size = size


def _warp_size() -> int:
    return _other_warp_size or _warp_size_of(torch.cuda.current_device() if torch.cuda.is_available() else None)


@functools.cache
def _warp_size_of(device: int | None) -> int:
    """AMD's data-centre GPUs have 64 lanes a warp, its others 32, all others 32."""
    return 32 if device is None or not torch.version.hip else torch.cuda.get_device_properties(device).warp_size


class Tile(NamedTuple):
    constants: dict  # the compile-time block sizes of the kernel
    num_warps: int


class SupportTile(NamedTuple):
    groups_warps: int
    topk_warps: int
    stats_warps: int


def score(s_dtype: torch.dtype, t_dtype: torch.dtype, *, aligned: bool = True, capped: bool = False) -> Tile:
    """128 threads; of aligned rows each takes 32 logits of each model an iteration (soft-capped fp32: 16).

    VEC is a 128-bit load. R * VEC = 32 spreads what an iteration does once per lane (rescaling, the
    fold of VEC sums, two maxima) over 32 pairs: 22.8 instructions a pair and 128 registers, four
    programs an SM. 16 pairs: 24.5 and 80 registers; 64 pairs: 21.4 but 168 registers, three programs.
    QUAD = 4 makes one load of 4 neighbours 64 bytes, two full sectors, of one group of 128.
    Soft-capped fp32 takes 16 pairs: of 32, ptxas 12.9 spills 8 bytes for sm_90 (57.6 instructions a pair and 79
    registers, for 54.4 and 128).

    Rows that start anywhere (a vocabulary of 50,257) are read one logit at a time whatever VEC is; eight to
    a thread would be brought to it through shared memory, at two barriers, 44.8 instructions and 219 registers. With
    VEC = 1 they stay where they are loaded: 28.8 and 48, blocks of 1024. Sectors asked for, over those there are, in 16
    rows of 50,257: QUAD = 16 1.9 (a sector's width that lies in two), 8 2.9 at 24.5 instructions, 32 1.5 at 38.
    """
    if not aligned:
        return Tile({"R": 8, "GROUPS": 8, "QUAD": 16, "VEC": 1}, num_warps=128 // _warp_size())
    vec = 4 if s_dtype == t_dtype == torch.float32 else 8
    pairs = 16 if capped and vec == 4 else 32
    return Tile({"R": pairs // vec, "GROUPS": pairs, "QUAD": 128 // pairs, "VEC": vec}, num_warps=128 // _warp_size())


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":  # ROCm calls itself cuda
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 64


def score_parts(n: int, vocab_size: int, tile: Tile, device: torch.device) -> int:
    """Programs per row: 1 from two rows a multiprocessor on, else enough for four programs each."""
    units = _multiprocessors(device)
    if n >= 2 * units:
        return 1
    block = 128 * tile.constants["GROUPS"]
    return max(1, min(-(-4 * units // n), vocab_size // block, MAX_PARTS))


def support(top_k: int, n_groups: int) -> SupportTile:
    """Keys a thread: 16 of the groups' 2048 (V = 152k), 16-32 of the candidates' 128 K, more
    would spill at K = 128; fewer make the barrier of each counting round longer. The lists themselves are
    short: 16-32 comparisons a thread and chunk. On warps of 64 lanes K = 128 takes 4 of them, 64 keys a
    thread: with 8, triton 3.6 spills 356 bytes where 3.9 spills none.
    """
    scale = 32 / _warp_size()
    groups_warps = 4 if n_groups <= 4096 else 8
    topk_warps = 4 if top_k <= 16 else 8 if top_k <= 64 or _warp_size() == 64 else 16
    stats_warps = 1 if top_k <= 32 else 4
    return SupportTile(*(max(1, int(w * scale)) for w in (groups_warps, topk_warps, stats_warps)))


def grad() -> Tile:
    """128 threads with two 128-bit loads of each model in flight; three streams, no reuse. Also of the sums of JSD:
    30.8 instructions a pair and 72 registers.
    """
    return Tile({"BLOCK_V": 2048}, num_warps=128 // _warp_size())


def rest(dtype: torch.dtype) -> Tile:
    """128 threads, each 32 logits an iteration, as in the score: 8.9 instructions a logit and 53 registers."""
    vec = 4 if dtype == torch.float32 else 8
    return Tile({"LANES": 128, "R": 32 // vec, "VEC": vec}, num_warps=128 // _warp_size())


def rest_grad() -> Tile:
    """128 threads with two 128-bit loads in flight: 13.4 instructions a logit and 46 registers; all of the block's
    comparisons with a listed id are made again for the next id, so no larger.
    """
    return Tile({"BLOCK_V": 2048}, num_warps=128 // _warp_size())
