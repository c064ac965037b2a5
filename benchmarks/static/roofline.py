"""Static roofline: compiles every shipped kernel configuration ahead of time, on any machine, and counts.

  instructions_per_pair = instructions in the main loop / logit pairs a thread handles in it
  An H200 reads 4.1 logit pairs (bf16) per multiprocessor and cycle, so 31 is where arithmetic, not
  memory, sets the time; the score kernel's budget is 17. Of a kernel that reads one model's logits
  only, a pair is a logit (and with it what is added to).

Counted: the main loop is the strongly connected component of the machine code's control flow that
has global loads and the most instructions; pairs are the bytes its loads bring, over the bytes of
a pair. What a loop inside it holds (the listed ids of off_list.py, fewer than one a block) counts as run
once, its loads for nothing. Registers, stack, shared memory are the assembler's; barriers are those of the whole kernel.
Configurations are those of the launchers themselves: they run on shapes alone (meta tensors) with the launch recorded.

Command: python -m benchmarks.static.roofline --json FILE [--targets sm_80 sm_90 sm_100 gfx942] [--configs bf16 "bf16 rows"]

Not here: what a GPU is needed for (benchmarks/gpu/).
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import networkx
import torch
import triton
from opd_kernels import launch_table
from opd_kernels.argmax import argmax_fwd
from opd_kernels.candidates import ier_fwd
from opd_kernels.choose import choose_fwd
from opd_kernels.forward_kl import forward_kl_grad
from opd_kernels.jsd import jsd_fwd, jsd_grad
from opd_kernels.list_columns import LIST_COLUMNS
from opd_kernels.off_list import off_list_fwd, off_list_grad
from opd_kernels.place import place_fwd
from opd_kernels.quantise import quantise_rows
from opd_kernels.reverse_kl import reverse_kl_grad
from opd_kernels.scale import scale
from opd_kernels.score import COLUMNS, score_fwd
from opd_kernels.skew_kl import forward_skew_fwd, forward_skew_grad, reverse_skew_fwd, reverse_skew_grad
from opd_kernels.support import support_fwd
from opd_kernels.totals import totals_fwd
from opd_kernels.zero_rows import zero_rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions per pair: budgets of their own for the score and the gradients; the others' is memory's, 31 for two streams of
# 16 bits (jsd_fwd two reads; off_list_grad a read and a write), so 31 / 2 for the one of off_list_fwd. Twice the bytes (fp32)
# would allow twice as many.
BUDGET = {
    "score_fwd": 17.1, "reverse_kl_grad": 16.5, "forward_kl_grad": 19, "jsd_fwd": 31, "jsd_grad": 28, "off_list_fwd": 15.5,
    "off_list_grad": 31, "reverse_skew_fwd": 31, "forward_skew_fwd": 31, "reverse_skew_grad": 35, "forward_skew_grad": 33,
}  # fmt: skip
# With soft-cap two tanh a pair set the time, not memory: ceilings a little above what was counted, so that it gets no worse.
CAPPED_BUDGET = {
    "score_fwd": 57, "reverse_kl_grad": 61, "forward_kl_grad": 61, "jsd_fwd": 64, "jsd_grad": 76, "off_list_fwd": 29,
    "off_list_grad": 41,
}  # fmt: skip
# Rows that start anywhere: a little above what was counted.
ODD_BUDGET = {"score_fwd": 27, "reverse_kl_grad": 26, "forward_kl_grad": 30, "jsd_fwd": 35}
# Models whose multipliers differ: each one's logarithms are rounded by themselves.
SCALES_BUDGET = {"reverse_kl_grad": 17, "forward_kl_grad": 21}
VARIANCE_BUDGET = {"score_fwd": 25.3}  # the score with the variance of the log-ratio: what triton 3.6 takes; 3.9 takes 24.1
# The bf16 score, whose maxima are of words of two logits: fewer instructions, and five programs an SM by its registers.
BF16_SCORE = ("bf16", "bf16 rows", "bf16 split", "bf16 V=32008")
BF16_SCORE_BUDGET, BF16_SCORE_REGISTERS = 16, 96
# Barriers of a whole kernel: what triton 3.6 or 3.9 takes, which is more. The score reduces all maxima at once and all sums at
# once, so that a row passes 5 of its barriers with 3.6 (its careful sweep has 6 more); 3.9 gives each number one, 11 and 12.
BARRIERS = {
    "score_fwd": 23, "merge_fwd": 0, "argmax_fwd": 11, "reverse_kl_grad": 3, "forward_kl_grad": 3, "jsd_fwd": 5, "jsd_grad": 3,
    "reverse_skew_fwd": 5, "reverse_skew_grad": 3, "forward_skew_fwd": 5, "forward_skew_grad": 3, "off_list_fwd": 5,
    "off_list_grad": 0, "support_groups_fwd": 39, "support_topk_fwd": 49, "support_stats_fwd": 93, "scale": 0, "zero_rows": 0,
    "quantise": 2, "quantiles_fwd": 23, "place_fwd": 0, "choose_fwd": 42, "list_fwd": 18, "keep_fwd": 8, "totals_fwd": 42,
    "ier_fwd": 48,
}  # fmt: skip
VARIANCE_BARRIERS = 27  # of score_fwd
STREAMING = ("score", "reverse_", "forward_", "jsd_", "off_list_")  # kernels with a main loop over the vocabulary
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SKEW = (reverse_skew_fwd, reverse_skew_grad), (forward_skew_fwd, forward_skew_grad)
PLAIN = {"temperature": 1.0, "s_scale": 1.0, "t_scale": 1.0, "s_softcap": None, "t_softcap": None}
CAPPED = dict(PLAIN, s_softcap=30.0, t_softcap=50.0)
ONE_PLAIN = {"temperature": 1.0, "scale": 1.0, "softcap": None}
ONE_CAPPED = dict(ONE_PLAIN, softcap=30.0)
NARROW = 32_008  # a multiple of 8 and not of 16, as vocabularies padded to 8 are
ODD = 50_257  # rows start anywhere: logits are loaded one by one, which only such configurations may
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {v: k for k, v in TYPES.items()} | {torch.uint8: "u8", torch.int64: "i64", torch.float64: "fp64"}


class Recorder:
    """While open, launching a kernel records (function, arguments, options) and runs nothing; `programs`: how many each has."""

    def __enter__(self):
        self.launches, self.programs, self.run = [], [], JITFunction.run

        def record(fn, *args, grid, warmup, **kwargs):
            self.launches.append((fn, args, kwargs))
            self.programs.append(math.prod(grid))

        JITFunction.run = record
        return self.launches

    def __exit__(self, *_):
        JITFunction.run = self.run


def selection():
    """(configuration name, launches) of a selection among n positions, all of them or some of twice as many."""
    for n in (1024, 16_384, 65_536):
        table = torch.empty((18, n), device="meta")
        rows = torch.empty(n, dtype=torch.int64, device="meta")
        lists = "released_kl", "topk_entropy"
        for selector, names in (("teachability-released", lists), ("teachability+entropy", ()), ("tip", ())):
            with Recorder() as launches:
                own = table[: 16 + len(names)]
                placed = place_fwd(own, rows, 2 * n, selector=selector, loss="reverse_kl", optional=names)
            yield f"N={n} {selector}", launches
        with Recorder() as launches:  # scores by torch, of optional statistics too
            wide, mask = torch.empty((20, n), device="meta"), placed.valid
            place_fwd(wide, rows, 2 * n, mask, selector="all", loss="reverse_kl")
        yield f"N={n} optional", launches
        given, options = (
            tuple(x[:n] for x in (placed.scores[0], *placed.flags.unbind(0))),
            {"numerator": 1, "denominator": 20, "n_rows": n // 20},
        )
        bounds = torch.empty(9, dtype=torch.int32, device="meta")
        keeps = {"bounds": bounds, "places": rows, "keep_scores": given[0]}
        for name, more in (("", {}), (" places", {"places": rows}), (" bounds", {"bounds": bounds}), (" keeps", keeps)):
            with Recorder() as launches:
                choice = choose_fwd(*given, **options, **more)
                if not more:
                    losses, loss = placed.scores[0, : n // 20], {"loss": "reverse_kl", "by_selected": True}
                    sides = choice.rows, losses, losses, placed.scores[0], placed.valid, placed.valid
                    totals_fwd(*sides, placed.stats, choice.selected, placed.infinite, **loss)
            yield f"N={n}{name}", launches


def configurations():
    """(configuration name, launches) of what the library ships."""
    yield from selection()
    V = 151936

    def logits(dtype, n, width=V):
        return torch.empty((n, width), dtype=TYPES[dtype], device="meta")

    def rows(n):
        return torch.empty(n, dtype=torch.int32, device="meta")

    def record(name, launcher, *args, vocab_size=V, **options):
        with Recorder() as launches:
            result = launcher(*args, vocab_size=vocab_size, **options)
        return name, launches, result

    for dtype in TYPES:
        s, t, few = logits(dtype, 8192), logits(dtype, 8192), logits(dtype, 4)
        whole = record(dtype, score_fwd, s, t, None, **PLAIN)
        yield whole[:2]
        yield record(f"{dtype} rows", score_fwd, s, t, rows(4096), **PLAIN)[:2]
        yield record(f"{dtype} split", score_fwd, few, few, None, **PLAIN)[:2]
        for k in (16, 128):
            yield record(f"{dtype} K={k}", support_fwd, s, t, None, whole[2], top_k=k, **PLAIN)[:2]
        columns, top = torch.empty((len(COLUMNS), 409), device="meta"), rows(409)
        yield record(f"{dtype} rows", argmax_fwd, s, rows(8192), whole[2])[:2]
        chosen = (rows(409), torch.empty(409, device="meta"), columns)
        for grad in (reverse_kl_grad, forward_kl_grad):
            yield record(f"{dtype} rows", grad, s, t, *chosen, top=top, out=s, **PLAIN)[:2]
            if dtype == "bf16":
                yield record(f"{dtype} softcap", grad, s, t, *chosen, top=top, out=s, **CAPPED)[:2]
        with Recorder() as launches:
            zero_rows(s, torch.empty(8192, dtype=torch.uint8, device="meta"))
            scale(s, columns[0, :1])
            hidden, eight_bits = torch.empty((512, 4096), dtype=TYPES[dtype], device="meta"), torch.uint8
            quantise_rows(hidden, torch.empty_like(hidden, dtype=eight_bits), columns[0, :1].expand(512, 1).contiguous())
        yield f"{dtype} rows", launches
        sums = torch.empty((2, 409), device="meta")
        ids = torch.empty((409, 32), dtype=torch.int32, device="meta")
        listed = (ids, torch.empty((409, 32), device="meta"), chosen[1], sums)
        kinds = [("", PLAIN, ONE_PLAIN), (" softcap", CAPPED, ONE_CAPPED)]
        for kind, pair, one in kinds if dtype == "bf16" else kinds[:1]:
            yield record(dtype + (kind or " rows"), jsd_fwd, s, t, rows(409), columns, beta=0.5, **pair)[:2]
            yield record(dtype + (kind or " rows"), jsd_grad, s, t, *chosen, sums, top=top, out=s, beta=0.5, **pair)[:2]
            for fwd, grad in SKEW if not kind else ():
                yield record(f"{dtype} rows", fwd, s, t, rows(409), columns, beta=0.9, **pair)[:2]
                yield record(f"{dtype} rows", grad, s, t, *chosen, sums, top=top, out=s, beta=0.9, **pair)[:2]
            yield record(dtype + (kind or " K=32"), off_list_fwd, s, rows(409), ids, **one)[:2]
            one = dict(one, out=t, first_id=0)
            yield record(dtype + (kind or " K=32"), off_list_grad, s, rows(409), *listed, add=False, **one)[:2]
        yield record(f"{dtype} add", off_list_grad, s, rows(409), *listed, add=True, out=t, first_id=0, **ONE_PLAIN)[:2]
    s, t = logits("bf16", 8192), logits("bf16", 8192)
    s32, t32 = logits("fp32", 409), logits("fp32", 409)
    yield record("bf16 softcap", score_fwd, s, t, None, **CAPPED)[:2]
    for dtype in TYPES:
        pair, variance = (logits(dtype, 8192), logits(dtype, 8192)), torch.empty(8192, device="meta")
        yield record(f"{dtype} variance", score_fwd, *pair, None, variance=variance, **PLAIN)[:2]
    few = logits("bf16", 4)
    yield record("bf16 variance split", score_fwd, few, few, None, variance=variance[:4], **PLAIN)[:2]
    yield record("fp32 softcap", score_fwd, s32, t32, None, **CAPPED)[:2]
    yield record("fp32/bf16", score_fwd, logits("fp32", 8192), t, None, **PLAIN)[:2]
    # Heads: tiles of fp32 logits of the selected rows, whose gradient is made in 16 bits; scales that differ.
    tile_rows = (None, *chosen[1:])
    for grad in (reverse_kl_grad, forward_kl_grad):
        for name, pair in (("", PLAIN), (" scales", dict(PLAIN, s_scale=0.5)), (" softcap", CAPPED)):
            yield record(f"fp32 to bf16{name}", grad, s32, t32, *tile_rows, top=top, out=logits("bf16", 409), **pair)[:2]
    yield record("fp32 to bf16", jsd_grad, s32, t32, *tile_rows, sums, top=top, out=logits("bf16", 409), beta=0.5, **PLAIN)[:2]
    yield record("bf16 K=1", support_fwd, s, t, None, whole[2], top_k=1, **PLAIN)[:2]
    for k in (16, 128):
        optional = {name: torch.empty(8192, device="meta") for name in LIST_COLUMNS}
        lists = record(f"bf16 K={k} lists", support_fwd, s, t, None, whole[2], top_k=k, optional=optional, **PLAIN)
        yield lists[:2]
        tokens, at_tokens = torch.empty(8192, dtype=torch.int64, device="meta"), torch.empty((2, 8192), device="meta")
        with Recorder() as launches:
            ier_fwd(lists[2], whole[2], tokens, at_tokens, optional[LIST_COLUMNS[0]])
        yield f"bf16 K={k} token", launches
    # Rows 16 bytes apart but no multiple of 16 elements.
    narrow, other = logits("bf16", 8192, NARROW), logits("bf16", 8192, NARROW)
    narrow_size = {"vocab_size": NARROW}
    score = record(f"bf16 V={NARROW}", score_fwd, narrow, other, None, **narrow_size, **PLAIN)
    yield score[:2]
    yield record(f"bf16 V={NARROW}", support_fwd, narrow, other, None, score[2], top_k=16, **narrow_size, **PLAIN)[:2]
    yield record(f"bf16 V={NARROW}", reverse_kl_grad, narrow, other, *chosen, top=top, out=narrow, **narrow_size, **PLAIN)[:2]
    yield record(f"bf16 V={NARROW}", jsd_fwd, narrow, other, rows(409), columns, beta=0.5, **narrow_size, **PLAIN)[:2]
    yield record(f"bf16 V={NARROW}", off_list_fwd, narrow, rows(409), ids, **narrow_size, **ONE_PLAIN)[:2]
    for dtype in ("bf16", "fp32"):
        odd, other, odd_size = logits(dtype, 8192, ODD), logits(dtype, 8192, ODD), {"vocab_size": ODD}
        score = record(f"{dtype} V={ODD}", score_fwd, odd, other, None, **odd_size, **PLAIN)
        yield score[:2]
        yield record(f"{dtype} V={ODD}", support_fwd, odd, other, None, score[2], top_k=16, **odd_size, **PLAIN)[:2]
        for grad in (reverse_kl_grad, forward_kl_grad):
            yield record(f"{dtype} V={ODD}", grad, odd, other, *chosen, top=top, out=odd, **odd_size, **PLAIN)[:2]
        yield record(f"{dtype} V={ODD}", jsd_fwd, odd, other, rows(409), columns, beta=0.5, **odd_size, **PLAIN)[:2]


def kernel_name(launch) -> str:
    """The launcher's name; the kernels of all gradients and of all sums go by the name of their divergence."""
    kernel = launch[2].get("SLOPE", launch[2].get("TERMS", launch[0])).__name__.strip("_")
    return kernel.removesuffix("_kernel").replace("_slope", "_grad").replace("_terms", "_fwd")


def compile_launch(launch, target: GPUTarget):
    """The kernel that the launcher would have built, and the bytes that it reads of one logit pair."""
    fn, args, kwargs = launch
    named = dict(zip(fn.arg_names, args, strict=False))
    named.update((k, v) for k, v in kwargs.items() if k in fn.arg_names)
    options = {k: v for k, v in kwargs.items() if k not in fn.arg_names}
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(fn.params):
        value = named[param.name]
        plain = not param.do_not_specialize
        if param.is_constexpr or value is None or (plain and type(value) is int and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = "*" + POINTERS.get(value.dtype, "i32")
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
        is_aligned = isinstance(value, torch.Tensor) or (plain and type(value) is int and value % 16 == 0)
        if is_aligned and not param.do_not_specialize_on_alignment:
            attrs[(i,)] = [["tt.divisibility", 16]]
    read = ("s_ptr", "t_ptr", "x_ptr", "out_ptr" if named.get("ADD") else None)
    pair_bytes = sum(named[k].element_size() for k in read if k in named)
    return triton.compile(ASTSource(fn, signature, constants, attrs), target=target, options=options), pair_bytes


def components(successors):
    """Strongly connected components of a graph {node: [node]} that contain a cycle."""
    parts = networkx.strongly_connected_components(networkx.DiGraph(successors))
    return [part for part in parts if len(part) > 1 or any(node in successors[node] for node in part)]


def basic_blocks(lines, label, instruction, branch, always):
    """Blocks of instructions and their successors, from disassembly and the patterns of its syntax."""
    blocks, names = [[]], {}
    for line in lines:
        if m := label.match(line):
            if blocks[-1]:
                blocks.append([])
            names[m.group(1)] = len(blocks) - 1
        elif m := instruction.match(line):
            blocks[-1].append(m.group(1).strip())
            if branch.search(m.group(1)) or always.search(m.group(1)):
                blocks.append([])
    successors = {}
    for i, block in enumerate(blocks):
        last = block[-1] if block else ""
        jump = branch.search(last)
        successors[i] = [names[jump.group(1)]] if jump and jump.group(1) in names else []
        if not always.search(last) and i + 1 < len(blocks):
            successors[i].append(i + 1)
    return blocks, successors


def main_loop(blocks, successors, load):
    """Instructions of the loop that loads the most bytes, of equals the one with the most instructions; [] if none loads."""
    loops = [[x for i in sorted(part) for x in blocks[i]] for part in components(successors)]
    loops = [x for x in loops if any(load.search(y) for y in x)]
    return max(loops, key=lambda x: (sum(load_bytes(y) for y in x if load.search(y)), len(x)), default=[])


def inner_loops(blocks, successors, load, loop):
    """Instructions of the loops that remain without the blocks that have the main loop's widest loads."""
    width = min(16, max((load_bytes(x) for x in loop if load.search(x)), default=16))
    wide = {i for i, block in enumerate(blocks) if any(load.search(x) and load_bytes(x) >= width for x in block)}
    narrow = {i: [j for j in to if j not in wide] for i, to in successors.items() if i not in wide}
    return [x for part in components(narrow) for i in part for x in blocks[i]]


SASS = {
    "label": re.compile(r"^\s*(\.L_x_\d+):"),
    "instruction": re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);"),
    "branch": re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)"),
    "always": re.compile(r"^(BRA|EXIT|RET)\b(?!.*!?UP\d)"),
}
GCN = {
    "label": re.compile(r"^(\.LBB\d+_\d+):"),
    "instruction": re.compile(r"^\t([a-z]\w*_.*?)(?:;.*)?$"),
    "branch": re.compile(r"^s_c?branch\w*\s+(\.LBB\d+_\d+)"),
    "always": re.compile(r"^(s_branch|s_endpgm)\b"),
}
LDG = re.compile(r"\bLDG\b")
GLOBAL_LOAD = re.compile(r"^(global|buffer|flat)_load")
BARRIER = re.compile(r"\b(?:bar\.sync|barrier\.(?:cta\.)?sync|s_barrier)\b")  # the assembler keeps each of them


def load_bytes(instruction: str) -> int:
    """Bytes a load brings one thread, from its mnemonic (the operands may hold a .64 of their own)."""
    mnemonic = re.sub(r"^@!?\w+\s+", "", instruction).split()[0]
    for pattern, size in (
        (r"\.256|dwordx8", 32), (r"\.128|dwordx4", 16), (r"dwordx3", 12), (r"\.64|dwordx2", 8),
        (r"\.[US]16|short", 2), (r"\.[US]8|byte", 1),
    ):  # fmt: skip
        if re.search(pattern, mnemonic):
            return size
    return 4


def nvidia_counts(kernel, streams):
    """Disassembled, which takes the tool most of a second, only where a loop is counted or a frame is looked into."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])

        def tool(name, *options):
            return subprocess.run([tools / name, *options, cubin], capture_output=True, text=True, check=True).stdout

        used = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage"))}
        if not streams and not used.get("STACK", 0) + used.get("LOCAL", 0):
            return {"registers": used["REG"], "spill_bytes": 0, "local_ops": 0}, [], [], LDG
        sass = tool("nvdisasm", "-c")
    blocks, successors = basic_blocks(sass.splitlines(), **SASS)
    loop = main_loop(blocks, successors, LDG)
    every = [x for b in blocks for x in b]
    local = sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in every)
    # A frame that no instruction touches is not a spill.
    spill = used.get("STACK", 0) + used.get("LOCAL", 0) if local else 0
    inner = inner_loops(blocks, successors, LDG, loop)
    return {"registers": used["REG"], "spill_bytes": spill, "local_ops": local}, loop, inner, LDG


def amd_counts(kernel, _):
    text = kernel.asm["amdgcn"]
    fields = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
    used = {k: int(v) for k, v in re.findall(fields, text)}
    blocks, successors = basic_blocks(text.splitlines(), **GCN)
    loop = main_loop(blocks, successors, GLOBAL_LOAD)
    every = [x for b in blocks for x in b]
    local = sum(x.startswith("scratch_") for x in every)
    spill = used["private_segment_fixed_size"] + 4 * used["vgpr_spill_count"]
    inner = inner_loops(blocks, successors, GLOBAL_LOAD, loop)
    return {"registers": used["vgpr_count"], "spill_bytes": spill, "local_ops": local}, loop, inner, GLOBAL_LOAD


def count(config: str, launch, target: str) -> dict:
    kernel, pair_bytes = compile_launch(launch, TARGETS[target])
    read = amd_counts if TARGETS[target].backend == "hip" else nvidia_counts
    name = kernel_name(launch)
    streams = name.startswith(STREAMING)
    resources, loop, inner, load = read(kernel, streams)
    loads = [load_bytes(x) for x in loop if load.search(x) and x not in inner] if streams else []
    pairs = sum(loads) / pair_bytes if loads else 0
    return dict(
        kernel=name,
        target=target,
        config=config,
        **resources,
        shared_bytes=kernel.metadata.shared,
        ldg128=sum(load_bytes(x) >= 16 for x in loop if load.search(x)) if streams else None,
        narrow_loads=sum(size < 16 for size in loads),
        loop_barriers=sum(bool(re.search(r"\bBAR\b|s_barrier", x)) for x in loop) if streams else None,
        barriers=len(BARRIER.findall(kernel.asm["amdgcn" if read is amd_counts else "ptx"])),
        pairs=pairs or None,
        instructions_per_pair=round(len(loop) / pairs, 2) if pairs else None,
        budget=budget(name, config),
    )


def budget(name: str, config: str) -> float | None:
    """Instructions per pair that the kernel may take on sm_90."""
    if name == "score_fwd" and config in BF16_SCORE:
        return BF16_SCORE_BUDGET
    if "variance" in config:
        return VARIANCE_BUDGET.get(name)
    budgets = CAPPED_BUDGET if "softcap" in config else ODD_BUDGET if _is_odd(config) else BUDGET
    return SCALES_BUDGET.get(name) if "scales" in config else budgets.get(name)


def _is_odd(config: str) -> bool:
    return f"V={ODD}" in config


def failures(row: dict) -> list:
    """What a shipped kernel may not do; the same rules for the test and the command's exit status."""
    faults = [f"{key} = {row[key]}" for key in ("spill_bytes", "local_ops") if row[key]]
    if row["shared_bytes"] > SHARED_LIMIT[row["target"]]:
        faults.append(f"shared_bytes = {row['shared_bytes']}")
    if row["kernel"].startswith(STREAMING) and not row["pairs"]:
        faults.append("no main loop found")
    if row["narrow_loads"] and not _is_odd(row["config"]):
        faults.append(f"narrow_loads = {row['narrow_loads']}")
    is_bf16_score = row["kernel"] == "score_fwd" and row["config"] in BF16_SCORE
    if row["target"] == "sm_90" and is_bf16_score and row["registers"] > BF16_SCORE_REGISTERS:
        faults.append(f"registers = {row['registers']} > {BF16_SCORE_REGISTERS}")
    most = VARIANCE_BARRIERS if "variance" in row["config"] else BARRIERS[row["kernel"]]
    if row["target"] == "sm_90" and row["barriers"] > most:
        faults.append(f"barriers = {row['barriers']} > {most}")
    if row["target"] == "sm_90" and row["budget"] and row["instructions_per_pair"] > row["budget"]:
        faults.append(f"instructions_per_pair = {row['instructions_per_pair']} > {row['budget']}")
    return faults


def measure(targets, only=None):
    for target in targets:
        launch_table.set_target(TARGETS[target].warp_size, TARGETS[target].arch // 10 if target.startswith("sm_") else 0)
        for config, launches in configurations():
            if only is not None and config not in only:
                continue
            seen = set()
            for launch in launches:
                if kernel_name(launch) in seen:  # top-K runs once per model, the same kernel
                    continue
                seen.add(kernel_name(launch))
                yield count(config, launch, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--configs", nargs="+", help="only these configurations, like bf16 'bf16 rows'; default: all")
    options = parser.parse_args()
    columns = ("kernel", "target", "config", "registers", "spill_bytes", "shared_bytes", "ldg128", "barriers",
               "instructions_per_pair", "budget")  # fmt: skip
    print("".join(f"{c:<24}" if i == 0 else f"{c:<13}" for i, c in enumerate(columns)))
    rows, bad = [], []
    for row in measure(options.targets, options.configs):
        rows.append(row)
        shown = ["-" if row[c] is None else row[c] for c in columns]
        print("".join(f"{v!s:<24}" if i == 0 else f"{v!s:<13}" for i, v in enumerate(shown)), flush=True)
        bad += [f"{row['kernel']} {row['target']} {row['config']}: {x}" for x in failures(row)]
    bad += [
        f"--configs: no configuration is called {x!r}" for x in set(options.configs or ()) - {row["config"] for row in rows}
    ]
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    print("\n".join(bad) or f"{len(rows)} kernels within their limits")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
