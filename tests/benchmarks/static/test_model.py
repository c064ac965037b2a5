"""The model of the kernels' loops: decoding of control codes, paths and replays of tiny programs whose cycles are known; the
published times of others.

Run: make test ARGS=tests/benchmarks/static/test_model.py; with its test marked `full` about a minute, no GPU.
Not here: counts of instructions, and the gates on our kernels (test_roofline.py).
"""

from statistics import median

import pytest

from benchmarks.static import gates, path, pipes, published, replay, sass
from tests.benchmarks.static.commands import rows_of

# One quarter whose memory brings 4 bytes a cycle at 1 GHz.
TINY = pipes.Device("tiny", 1, 1.0, 16e9, 2**20)


def line(text, stall=1, write=7, read=7, wait=0, yields=False, label=None):
    """Two lines of a disassembly."""
    code = stall | (not yields) << 4 | write << 5 | read << 8 | wait << 11
    head = f"{label}:\n" if label else ""
    return head + f"        /*0000*/   {text} ;   /* 0x0000000000000000 */\n   /* 0x{code << 41:016x} */\n"


def run(*lines, warps=1, programs=1, latency=100, moved=None, device=TINY, rounds=4):
    code = sass.parse("".join(lines))
    steps = [replay.make_step(x, (moved or {}).get(i, 0.0), device, device.ghz) for i, x in enumerate(code.instructions)]
    order = list(range(len(steps)))
    return replay.replay(steps, order, programs=programs, warps=warps, latency=latency, rounds=rounds)


REAL = """
.L_x_1:
        /*0410*/              @!P2 LDG.E.128 R12, desc[UR18][R4.64+0x80] ;   /* 0x00008012040ca981 */
                                                                             /* 0x000ee8000c1e1d00 */
        /*0430*/              @!P3 LDG.E.128 R60, desc[UR18][R4.64+0xc0] ;   /* 0x0000c012043cb981 */
                                                                             /* 0x000162000c1e1d00 */
        /*0580*/                   PRMT R88, R16.reuse, 0x7632, R88 ;        /* 0x0000763210587816 */
                                                                             /* 0x044fe40000000058 */
        /*0600*/                   MOV R18, 0xff80ff80 ;                     /* 0xff80ff8000127802 */
                                                                             /* 0x000fc40000000f00 */
        /*6240*/               @P0 BRA `(.L_x_1) ;                           /* 0xffffffd000940947 */
                                                                             /* 0x000fec000383ffff */
"""


def test_control_codes_of_a_real_listing_are_decoded():
    code = sass.parse(REAL)
    first, load, prmt, mov, branch = code.instructions
    assert (first.guard, first.name, first.base) == ("@!P2", "LDG.E.128", "LDG")
    assert first.control == sass.Control(stall=4, yields=False, write=3, read=None, wait=())
    assert load.control == sass.Control(stall=1, yields=False, write=5, read=0, wait=())
    assert prmt.control == sass.Control(stall=2, yields=False, write=None, read=None, wait=(2,))
    assert mov.control == sass.Control(stall=2, yields=True, write=None, read=None, wait=())
    assert (branch.target, code.labels, branch.control.stall) == (".L_x_1", {".L_x_1": 0}, 6)


def test_a_control_code_that_was_put_together_is_taken_apart_again():
    (x,) = sass.parse(line("FADD R1, R2, R3", stall=11, write=2, read=5, wait=0b101001, yields=True)).instructions
    assert x.control == sass.Control(11, True, 2, 5, (0, 3, 5))


def test_a_listing_without_encodings_is_refused():
    with pytest.raises(ValueError, match="nvdisasm -c -hex"):
        sass.parse("        /*0000*/                   MOV R1, R2 ;")


@pytest.mark.parametrize(
    ("text", "cycles"),
    [
        ("FFMA R1, R2, R3, R4", 1),
        ("IMAD R1, R2, R3, R4", 2),
        ("FMNMX R1, R2, R3, PT", 2),
        ("MUFU.EX2 R1, R2", 8),
        ("SHFL.BFLY PT, R1, R2", 4),
    ],
)
def test_a_pipe_takes_an_instruction_in_32_over_its_lanes_cycles(text, cycles):
    assert run(*[line(text)] * 50, programs=4) == pytest.approx(50 * cycles, rel=0.03)


def test_one_half_of_the_fma_pipe_takes_two_cycles():
    assert run(*[line("FFMA R1, R2, R3, R4")] * 50, device=TINY._replace(fma_halves=1)) == pytest.approx(100, rel=0.03)


def test_a_lone_warp_waits_for_its_stalls_and_a_second_one_fills_them():
    stalled = [line("FADD R1, R1, R2", stall=4)] * 20
    assert run(*stalled) == pytest.approx(80, rel=0.01)
    assert run(*stalled, programs=2) == pytest.approx(40, rel=0.03)
    assert run(*stalled, programs=8) == pytest.approx(20, rel=0.03)


def test_a_wait_mask_holds_an_instruction_until_its_scoreboard_is_clear():
    load, use = line("LDG.E R1, [R2.64]", write=0), line("FADD R3, R1, R1", wait=1)
    # 4 cycles of LSU, 32 of the way from L2 for 128 bytes, which is also the share of memory less 5 %
    assert run(load, use, latency=500, moved={0: 128.0}) == pytest.approx(500 + 8 + 1, abs=4)
    assert run(load, line("FADD R3, R4, R4"), latency=500, moved={0: 128.0}, rounds=400) < 40


def test_loads_come_no_faster_than_memory_brings_them():
    code = [line("LDG.E.128 R4, [R2.64]", write=0), line("FADD R3, R4, R4", wait=1)]
    cycles = run(*code, programs=16, latency=200, moved={0: 512.0}, rounds=400)
    assert cycles == pytest.approx(512 / 4 * pipes.READ_COST, rel=0.03)
    assert run(*code, programs=1, latency=1000, moved={0: 512.0}) > 1000


def test_stores_take_bandwidth_so_that_a_copy_costs_what_a_copy_costs():
    code = [line("LDG.E.128 R4, [R2.64]", write=0), line("STG.E.128 [R2.64], R4", wait=1, read=1), line("MOV R4, R5", wait=2)]
    cycles = run(*code, programs=16, latency=100, moved={0: 512.0, 1: 512.0}, rounds=400)
    assert cycles == pytest.approx(1024 / 4, rel=0.03)


def test_a_barrier_waits_for_the_last_warp_of_its_program():
    ahead = [line("MUFU.EX2 R1, R2")] * 2
    cycles = run(*ahead, line("BAR.SYNC 0x0"), line("FADD R1, R1, R1"), warps=4)
    assert cycles >= 4 * 2 * 8 - pipes.QUEUE_CYCLES
    assert cycles >= pipes.BARRIER_CYCLES
    assert run(*ahead, line("FADD R1, R1, R1"), warps=1) < cycles


ROW = 4096  # bytes: 8 iterations of 32 threads with 16 bytes each
LOOP = [
    line("MOV R1, R2"),
    line("@P1 BRA `(.L_x_2)"),
    line("STG.E [R2.64], R1", label=".L_x_1"),  # an own loop for rows that are left out
    line("@P0 BRA `(.L_x_1)"),
    line("LDG.E.128 R4, [R2.64]", label=".L_x_2"),
    line("@!P2 BRA `(.L_x_3)"),
    line("CALL.REL.NOINC `($division)"),
    line("FADD R4, R4, R4", label=".L_x_3"),
    line("@P0 BRA `(.L_x_2)"),
    line("EXIT"),
    line("BRA `(.L_x_4)", label=".L_x_4"),
]


def test_a_path_repeats_the_streaming_loop_and_leaves_out_other_loops_and_calls():
    walked = path.walk(sass.parse("".join(LOOP)), ROW, 32)
    assert walked.loops == [path.Loop(4, 8, 16)]
    assert walked.steps == [0, 1, *[4, 5, 7, 8] * 8, 9]
    assert walked.moved == {4: 512.0}


@pytest.mark.parametrize(("row", "threads"), [(4000, 32), (4096, 64), (1000, 128)])
def test_a_path_moves_the_bytes_of_its_row(row, threads):
    walked = path.walk(sass.parse("".join(LOOP)), row, threads)
    assert threads // 32 * sum(walked.moved.get(i, 0) for i in walked.steps) == pytest.approx(row)


def test_a_masked_block_before_the_loop_reads_what_the_loop_leaves():
    masked = "".join([line("@P3 LDG.E.128 R8, [R2.64]"), *LOOP])
    walked = path.walk(sass.parse(masked), ROW + 100, 32)
    assert walked.steps.count(5) == 8
    assert walked.moved[0] == pytest.approx(100)


def test_a_second_loop_finds_in_l2_what_the_programs_in_flight_leave_there():
    assert path.cached_share(100, 1, 1000) == 1.0
    assert path.cached_share(750, 1, 1000) == 0.5
    assert path.cached_share(100, 10, 1000) == 0.0
    again = [x.replace("L_x_2", "L_x_5").replace("L_x_3", "L_x_6") for x in LOOP[4:9]]
    walked = path.walk(sass.parse("".join(LOOP[:9] + again + LOOP[9:])), ROW, 32, cached=0.75)
    assert [walked.moved[loop.first] for loop in walked.loops] == [512.0, 128.0]


def test_programs_are_as_many_as_registers_and_shared_memory_allow():
    h200 = pipes.DEVICES["sm_90"]
    assert [pipes.programs(n, 4, 0, h200) for n in (128, 96, 40, 16)] == [4, 5, 12, 16]
    assert pipes.programs(64, 32, 0, h200) == 1
    assert pipes.programs(32, 4, 100_000, h200) == 2


GATE = gates.Gate("sm_90", "score_fwd", "bf16", (0.9, 0.8, 0.7), issue=0.8, alu=0.6, programs=4)
KEPT = {
    "target": "sm_90", "kernel": "score_fwd", "config": "bf16", "predicted": [0.95, 0.85, 0.75], "programs": 4,
    "shares": {"issue": 0.72, "alu": 0.58},
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"predicted": [0.95, 0.79, 0.75]},
        {"programs": 3},
        {"shares": {"issue": 0.81, "alu": 0.58}},
        {"shares": {"issue": 0.7, "alu": 0.61}},
    ],
)
def test_a_gate_refuses_a_figure_that_got_worse(monkeypatch, change):
    monkeypatch.setattr(gates, "GATES", (GATE,))
    assert gates.failures(KEPT) == []
    assert len(gates.failures(KEPT | change)) == 1
    assert gates.failures(KEPT | change | {"config": "no gate"}) == []


@pytest.mark.full
def test_predictions_of_published_times_are_within_the_stated_error(tmp_path):
    peers = rows_of("model", tmp_path, "--configs", "none")["peers"]
    assert len(peers) == len(published.FIGURES)
    assert {r["kernel"].replace(",", "").split()[0] for r in peers} == {"TRL", "Liger"}
    assert [f"{r['kernel']} {r['config']}: {r['error']:+.1%}" for r in peers if abs(r["error"]) > gates.MODEL_ERROR] == []
    assert median(abs(r["error"]) for r in peers) <= gates.MEDIAN_ERROR
