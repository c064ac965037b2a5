"""What the loss sends, computes and holds on many GPUs, on paper: the tables of docs/scaling.md, printed. Nothing is measured.

  sent       `estimate_communication`, which tests count call by call; on the wire by rings
  matmuls    `estimate` of ceil(V / tp) ids; of a part of a vocabulary the selected rows are scored once more
  a step     6 P N FLOP of the student's own forward and backward, 2 P_t N of the teacher's forward; tensor parallelism sends
             4 all-reduces of N D numbers a layer, FSDP 3 times the parameters of a rank's tp part
  seconds    bytes and FLOP over the vendor's peak rates: least times, never reached, and so are the shares made of them

Run: python -m benchmarks.cpu.communication: markdown on stdout, the end of docs/scaling.md (a test compares the two). A second.
Not here: what collectives there are (opd_ops/estimates/communication.py), anything timed (compare.py, gpu/run.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from opd_ops import Communication, LocalSupport, TailAware, estimate, estimate_communication
from opd_ops.selection.budget import Budget

V, FRACTION, TOP_K, DTYPE = 151_936, 0.05, 16, torch.bfloat16
DP = 128  # ranks of FSDP, and of selection beside it
TP_OWN, FSDP_OWN = 4, 3  # all-reduces a layer; passes over the parameters: two all-gathers and a reduce-scatter
MIB, GIB = 2**20, 2**30

# One H100 SXM as its vendor states it; 400 Gbit/s of network a GPU.
RATES = {"bf16": 989e12, "nvlink": 450e9, "network": 50e9}  # FLOP/s, dense; bytes/s each way


class Model(NamedTuple):
    name: str
    parameters: float
    layers: int
    D: int


STUDENTS = (Model("0.6B", 0.6e9, 28, 1024), Model("8B", 8e9, 36, 4096), Model("70B", 70e9, 80, 8192))
STUDENT, TEACHER = STUDENTS[1], STUDENTS[2]

# GPUs, tp, cp; the rest is data parallel.
LAYOUTS = (
    (8, 1, 1),
    (8, 8, 1),
    (64, 1, 1),
    (64, 2, 1),
    (64, 4, 2),
    (256, 8, 2),
    (256, 4, 8),
    (1024, 1, 1),
    (1024, 8, 1),
    (1024, 8, 8),
)
TOKENS = (4_096, 32_768)


class Work(NamedTuple):
    """Of one rank's loss, forward and backward."""

    flops: int
    peak_bytes: int  # over its inputs


def work_of(N: int, V: int, Ds: int, Dt: int, tp: int, **options: int) -> Work:
    """Of heads on backend "triton", whose ranks hold V / tp ids each."""
    part, M = -(-V // tp), Budget(FRACTION).most(N)
    alone = estimate(N, part, Ds, Dt, fraction=FRACTION, dtype=DTYPE, **options)
    if tp == 1:
        return Work(alone.flops, alone.peak_bytes)
    # The selected rows' normalisers, and their hidden states' gradient until it is added up.
    return Work(alone.flops + 2 * M * part * (Ds + Dt), alone.peak_bytes + 4 * M * Ds)


def call_communication(N: int, D: int = STUDENT.D, **options: object) -> Communication:
    return estimate_communication(N, V, D, fraction=FRACTION, dtype=DTYPE, top_k=TOP_K, **options)


class Step(NamedTuple):
    """What a rank does for the student itself."""

    flops: float  # forward and backward
    over_tp: float  # bytes on the wire
    over_dp: float  # the same, of FSDP over `DP` ranks

    @property
    def seconds(self) -> float:
        return self.flops / RATES["bf16"]


def student_step(student: Model, N: int, tp: int) -> Step:
    over_tp = TP_OWN * student.layers * N * student.D * DTYPE.itemsize * 2 * (tp - 1) / tp
    return Step(6 * student.parameters * N / tp, over_tp, FSDP_OWN * student.parameters / tp * DTYPE.itemsize * (DP - 1) / DP)


# --- tables ----------------------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(head)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]


def number(x: float) -> str:
    """Three digits, without an exponent."""
    if x >= 1000:
        return f"{x:,.0f}"
    if 0 < x < 0.01:
        return "< 0.01"
    return "0" if x == 0 else f"{x:.{0 if x >= 100 else 1 if x >= 10 else 2}f}"


def percent(x: float) -> str:
    return f"{number(100 * x).removesuffix('.00')} %"


def in_short() -> Iterator[str]:
    N = 16_384
    cost = call_communication(N, tp=8, dp=DP, scope="global")
    vocabulary, selection = (cost.only(group=group) for group in ("vocabulary", "selection"))
    alone, shared_out = (work_of(N, V, STUDENT.D, TEACHER.D, tp).flops / student_step(STUDENT, N, tp).flops for tp in (1, 8))
    yield "## In short"
    yield ""
    yield (
        f"* Sharing out the vocabulary sends {number(vocabulary.bytes_per_token)} bytes a token (an {STUDENT.name} student, "
        f"tp = 8; {number(vocabulary.wire_bytes_per_token)} on the wire), "
        f"{percent(vocabulary.wire_bytes / student_step(STUDENT, N, 8).over_tp)} of what tensor parallelism sends for it."
    )
    yield (
        f"* Selecting over all ranks by `teachability` sends {number(selection.bytes / 1000)} kB in {selection.count} "
        "collectives a call, for any number of tokens; each further rank adds 8 bytes. It costs latency, not bytes: see the "
        "last table."
    )
    shares = (
        f"{percent(work_of(N, V, student.D, TEACHER.D, 1).flops / student_step(student, N, 1).flops)} ({student.name})"
        for student in STUDENTS
    )
    yield f"* On one rank the loss's matmuls are these shares of 6 P N: {', '.join(shares)}."
    yield (
        f"* Where ranks share out the vocabulary, the selected {percent(FRACTION)} are scored once more. That raises the "
        f"share of an {STUDENT.name} student from {percent(alone)} to {percent(shared_out)}."
    )


def layouts() -> Iterator[str]:
    yield "## Layouts"
    yield ""
    yield (
        f"Heads: a student of hidden size {STUDENT.D:,}, a teacher of {TEACHER.D:,}, V = {V:,}, bf16, {percent(FRACTION)} "
        f'selected by `teachability` over all ranks (`scope="global"`), K = {TOP_K}, reverse KL, backend `triton`, 512 MiB of '
        "workspace. Two numbers in a cell: in the vocabulary's group; in the selection's."
    )
    yield ""
    rows = []
    for gpus, tp, cp in LAYOUTS:
        dp = gpus // (tp * cp)
        for N in TOKENS:
            cost = call_communication(N, tp=tp, dp=dp, cp=cp, scope="global")
            both = [cost.only(group=group) for group in ("vocabulary", "selection")]
            work = work_of(N, V, STUDENT.D, TEACHER.D, tp)
            rows.append(
                (
                    f"{gpus:,}",
                    f"{tp} × {cp} × {dp}",
                    f"{N:,}",
                    "; ".join(str(part.count) for part in both),
                    "; ".join(number(part.bytes_per_token) for part in both),
                    "; ".join(number(part.wire_bytes_per_token) for part in both),
                    number(work.peak_bytes / GIB),
                    number(work.flops / 1e12),
                )
            )
    yield from table(
        (
            "GPUs",
            "tp × cp × dp",
            "N",
            "collectives",
            "bytes a token contributed",
            "bytes a token on the wire",
            "peak, GiB",
            "TFLOP",
        ),
        rows,
    )


def selections() -> Iterator[str]:
    yield "## What selection sends"
    yield ""
    yield "One call, whatever its N; bytes of one rank."
    yield ""
    rows = []
    for scope, selector, n_sequences in (
        ("batch", "teachability", 1),
        ("global", "entropy", 1),
        ("global", "teachability", 1),
        ("global", "tip", 1),
        ("sequence", "teachability", 4),
        ("sequence", "teachability", 64),
    ):
        by_ranks = {
            ranks: call_communication(4_096, dp=ranks, cp=ranks, scope=scope, selector=selector, n_sequences=n_sequences)
            if scope == "sequence"
            else call_communication(4_096, dp=ranks, scope=scope, selector=selector)
            for ranks in (8, 1024)
        }
        cost = by_ranks[8]
        rows.append(
            (
                f"`{scope}`" + (f", {n_sequences} sequences over ranks" if scope == "sequence" else ""),
                f"`{selector}`",
                cost.only(kind="all_reduce").count,
                cost.only(kind="all_gather").count,
                number(cost.bytes),
                number(cost.wire_bytes),
                number(by_ranks[1024].wire_bytes),
            )
        )
    yield from table(
        ("scope", "selector", "all-reduces", "all-gathers", "contributed", "on the wire, 8 ranks", "1,024 ranks"), rows
    )


def divergences() -> Iterator[str]:
    N = 16_384
    yield "## What a shared-out vocabulary sends"
    yield ""
    yield f"tp = 8, N = {N:,}, a student of hidden size {STUDENT.D:,}; bytes a token. It does not depend on V."
    yield ""
    rows = []
    for name, options in (
        ("`reverse_kl`, `forward_kl`", {}),
        ("the same, K = 128", {"top_k": 128}),
        ("the same, backend `torch`", {"backend": "torch"}),
        ("the same, selector `random`", {"selector": "random"}),
        ("the same, selector `multinomial`", {"selector": "multinomial"}),
        ("`jsd`, `total_variation`", {"divergence": "jsd"}),
        ("`tail_aware`, K = 16", {"divergence": TailAware(16)}),
        ("`local_support`, K = 32", {"divergence": LocalSupport(32)}),
        ("`sampled`", {"divergence": "sampled"}),
        ("`entropy_aware`", {"divergence": "entropy_aware"}),
    ):
        heads_in, logits_in = (
            estimate_communication(N, V, D, fraction=FRACTION, dtype=DTYPE, tp=8, **options) for D in (STUDENT.D, None)
        )
        rows.append(
            (
                name,
                heads_in.count,
                number(heads_in.only(phase="forward").bytes_per_token),
                number(heads_in.only(phase="backward").bytes_per_token),
                number(heads_in.wire_bytes_per_token),
                number(logits_in.wire_bytes_per_token),
            )
        )
    yield from table(
        ("divergence", "collectives", "contributed forward", "backward", "on the wire, heads", "on the wire, logits"), rows
    )


def steps() -> Iterator[str]:
    N = 16_384
    yield "## Where the loss stops being negligible"
    yield ""
    yield (
        f"Matmuls of a rank, N = {N:,}, with a teacher of {TEACHER.name} and hidden size {TEACHER.D:,}. Share of FLOP: of "
        "6 P N, and of that and the teacher's forward, 2 P N."
    )
    yield ""
    rows = []
    for student in STUDENTS:
        for tp in (1, 8):
            work = work_of(N, V, student.D, TEACHER.D, tp)
            own, teacher_flops = student_step(student, N, tp), 2 * TEACHER.parameters * N / tp
            rows.append(
                (
                    student.name,
                    tp,
                    number(own.flops / 1e12),
                    number(work.flops / 1e12),
                    percent(work.flops / own.flops),
                    percent(work.flops / (own.flops + teacher_flops)),
                )
            )
    yield from table(
        (
            "student",
            "tp",
            "6 P N / tp, TFLOP",
            "loss, TFLOP",
            "share",
            "with the teacher's",
        ),
        rows,
    )
    yield ""
    yield (
        f"Bytes that a rank sends, N = {N:,}, dp = {DP}, beside what the student itself sends over the same links. Least times "
        f"at {RATES['nvlink'] / 1e9:.0f} GB/s (tp) and {RATES['network'] / 1e9:.0f} GB/s (dp)."
    )
    yield ""
    rows = []
    for student in STUDENTS:
        for tp in (1, 2, 8):
            cost = call_communication(N, student.D, tp=tp, dp=DP, scope="global")
            vocabulary, selection = (cost.only(group=group).wire_bytes for group in ("vocabulary", "selection"))
            _, over_tp, over_dp = student_step(student, N, tp)
            rows.append(
                (
                    student.name,
                    tp,
                    f"{number(over_tp / MIB)} ({number(1e3 * over_tp / RATES['nvlink'])} ms)",
                    f"{number(vocabulary / MIB)} ({number(1e3 * vocabulary / RATES['nvlink'])} ms)",
                    percent(vocabulary / over_tp) if over_tp else "–",
                    f"{number(over_dp / MIB)} ({number(1e3 * over_dp / RATES['network'])} ms)",
                    f"{number(selection / MIB)} ({number(1e3 * selection / RATES['network'])} ms)",
                    percent(selection / over_dp),
                )
            )
    yield from table(
        ("student", "tp", "model over tp, MiB", "loss over tp, MiB", "share", "FSDP over dp, MiB", "selection, MiB", "share"),
        rows,
    )
    yield ""
    yield (
        "Small collectives cost their latency, not their bytes. How long each collective of the selection may take before all "
        f"of them are 1 % of 6 P N at {RATES['bf16'] / 1e12:.0f} TFLOP/s, in µs:"
    )
    yield ""
    rows = []
    for student in STUDENTS[1:]:
        for tp in (1, 8):
            cells: list[object] = [student.name, tp]
            for selector in ("teachability", "entropy"):
                for tokens in TOKENS:
                    own = student_step(student, tokens, tp).seconds
                    count = call_communication(tokens, student.D, dp=DP, scope="global", selector=selector).count
                    cells.append(number(1e6 * 0.01 * own / count))
            rows.append(cells)
    heads = (f"`{selector}`, N = {tokens:,}" for selector in ("teachability", "entropy") for tokens in TOKENS)
    yield from table(("student", "tp", *heads), rows)


def page() -> str:
    sections = ("\n".join(section()) for section in (in_short, layouts, selections, divergences, steps))
    return "\n\n".join(sections) + "\n"


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
