"""The machine that runs PTX, on programs of a few lines: what instructions compute, and what it refuses to do.

Not here: the kernels (tests/kernels and tests/backends/triton run on it).
"""

import numpy as np
import pytest
import torch

from tests.support.ptx.accesses import Accesses
from tests.support.ptx.machine import launch
from tests.support.ptx.memory import Buffers
from tests.support.ptx.operations import APPROXIMATE
from tests.support.ptx.program import parse

THREADS = 64
LINE = """
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd5, %r1, 4;
    ld.param.b64 %rd1, [test_param_0];
    ld.param.b64 %rd2, [test_param_1];
    add.s64 %rd3, %rd1, %rd5;
    add.s64 %rd4, %rd2, %rd5;
    ld.global.b32 { %r2 }, [ %rd3 + 0 ];
"""


def run(body, x, out=None, programs=1, shared_bytes=0, accesses=None):
    """Each thread has its element of x in %r2 and its place in out at %rd4; returns out."""
    ptx = f""".visible .entry test(
    .param .u64 .ptr .global .align 1 test_param_0,
    .param .u64 .ptr .global .align 1 test_param_1
)
.reqntid {THREADS}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<9>;
{LINE}
{body}
    ret;
}}
"""
    out = torch.zeros(THREADS, dtype=torch.int32) if out is None else out
    buffers = Buffers([x, out])
    launch(parse(ptx), programs, [np.uint64(x.data_ptr()), np.uint64(out.data_ptr())], shared_bytes, buffers, accesses)
    return out


def bits(*values):
    """Their bits, over and over, one to a thread."""
    x = torch.tensor(values) if isinstance(values[0], float) else torch.tensor([v - (v >> 31 << 32) for v in values]).int()
    return x.view(torch.int32).repeat(THREADS)[:THREADS].contiguous()


STORE = "st.global.b32 [ %rd4 + 0 ], { %r3 };"
INF, NAN = float("inf"), float("nan")
UNARY = [
    ("bfe.u32 %r3, %r2, 8, 4;", 0x12345678, 6),
    ("bfe.s32 %r3, %r2, 4, 4;", 0xF8, 0xFFFFFFFF),
    ("prmt.b32 %r3, %r2, 287454020, 0x7043U;", 0xAABBCCDD, 0x11DD44AA),  # 0x11223344 in the upper half
    ("prmt.b32 %r3, %r2, 0, 0x8888U;", 0x000000FF, 0xFFFFFFFF),  # the sign of byte 0
    ("popc.b32 %r3, %r2;", 0xF0F00001, 9),
    ("mov.b64 %rd6, {%r2, %r2}; popc.b64 %r3, %rd6;", 0xF0F00001, 18),
    ("shl.b32 %r3, %r2, 32;", 5, 0),
    ("shr.u32 %r3, %r2, 31;", 0x80000000, 1),
    ("shr.s32 %r3, %r2, 40;", 0x80000000, 0xFFFFFFFF),
    ("not.b32 %r3, %r2;", 0xF0F0F0F0, 0x0F0F0F0F),
    ("neg.s32 %r3, %r2;", 7, 0xFFFFFFF9),
    ("mul.lo.s32 %r3, %r2, -3;", 0x40000000, 0x40000000),
    ("div.s32 %r3, %r2, 2;", 0xFFFFFFF9, 0xFFFFFFFD),  # -7 / 2 is -3
    ("mul.wide.s32 %rd6, %r2, -2; mov.b64 {_, %r3}, %rd6;", 0x40000000, 0xFFFFFFFF),
    ("mad.wide.u32 %rd6, %r2, 16, 1; mov.b64 {%r3, _}, %rd6;", 0xF0000001, 17),
    ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", 0x1234ABCD, 0xABCD1234),
    ("mov.b32 {%rs1, _}, %r2; cvt.s32.s16 %r3, %rs1;", 0xFFFF, 0xFFFFFFFF),
    ("cvt.rn.f32.s32 %r3, %r2;", 0xFFFFFFFE, -2.0),
    ("max.f32 %r3, %r2, 0f3F800000;", NAN, 1.0),
    ("max.NaN.f32 %r3, %r2, 0f3F800000; setp.nan.f32 %p1, %r3, %r3; selp.b32 %r3, 1, 0, %p1;", NAN, 1),
    ("min.xorsign.abs.f32 %r3, %r2, 0f40400000;", -2.0, -2.0),
    ("setp.ne.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 0, %p1;", NAN, 0),  # no order, so not unequal in order
    ("setp.neu.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 0, %p1;", NAN, 1),
    ("setp.lt.u32 %p1, %r2, 1; selp.b32 %r3, 1, 0, %p1;", 0xFFFFFFFF, 0),
    ("setp.lt.s32 %p1, %r2, 1; selp.b32 %r3, 1, 0, %p1;", 0xFFFFFFFF, 1),
    ("cvt.rn.bf16.f32 %rs1, %r2; mov.b16 %rs2, 0; mov.b32 %r3, {%rs2, %rs1};", 1 + 2.0**-8, 1.0),  # a tie: to even
    ("cvt.rn.bf16.f32 %rs1, %r2; mov.b16 %rs2, 0; mov.b32 %r3, {%rs2, %rs1};", 1 + 3 * 2.0**-8, 1 + 2.0**-6),
    ("cvt.rn.bf16x2.f32 %r3, 0f3F800000, %r2;", 2.0, 0x3F804000),
    ("setp.eq.bf16x2 %p1|%p2, %r2, 1073758208; selp.b32 %r3, 1, 2, %p1;", 0x3F804000, 1),
    ("setp.eq.bf16x2 %p1|%p2, %r2, 1073758208; selp.b32 %r3, 1, 2, %p2;", 0x3F804000, 2),
    ("fma.rn.f32 %r3, %r2, %r2, 0fBF800002;", 1 + 2.0**-23, 2.0**-46),  # the square is not rounded before the sum
    ("fma.rn.ftz.f32 %r3, %r2, 0f3F800000, 0f00000000;", 2.0**-130, 0.0),
    ("sub.rn.f32 %r3, %r2, 0f00000000;", 2.0**-130, 2.0**-130),
    ("mov.b64 %rd6, {%r2, %r2}; add.rn.f32x2 %rd6, %rd6, %rd6; mov.b64 {_, %r3}, %rd6;", 1.5, 3.0),
    ("mov.b32 {_, %rs1}, %r2; mov.b16 %rs2, 0xBF80U; max.bf16 %rs1, %rs1, %rs2; mov.b32 %r3, {0, %rs1};", -2.0, -1.0),
    ("max.bf16x2 %r3, %r2, 0xBF803F80;", 0xC0004000, 0xBF804000),  # -2 and 2 against -1 and 1
    ("min.bf16x2 %r3, %r2, 0xBF803F80;", 0xC0007FC0, 0xC0003F80),  # of a number and NaN: the number
    ("min.f16x2 %r3, %r2, 0xBC003C00;", 0xC0004000, 0xC0003C00),
    (
        "mov.b32 {_, %rs1}, %r2; mov.b16 %rs2, 0xC500U; max.f16 %rs1, %rs1, %rs2; mov.b32 %r3, {0, %rs1};",
        0xC0000000,
        0xC0000000,
    ),
    ("mul.rn.ftz.f32 %r3, %r2, 0f3F000000;", 2.0**-126, 0.0),
    ("mov.b32 {_, %rs1}, %r2; sub.rn.f32.bf16 %r3, %rs1, 0f3F000000;", 2.0, 1.5),
    ("mul.hi.u32 %r3, %r2, 0x55555556U;", 100, 33),
    ("cvt.f64.f32 %rd6, %r2; cvt.rzi.s32.f64 %r3, %rd6;", -2.75, 0xFFFFFFFE),
    ("max.relu.s32 %r3, %r2, -9;", 0xFFFFFFFB, 0),
    ("abs.bf16x2 %r3, %r2;", 0xBF80FFC0, 0x3F807FC0),  # also of NaN
    ("mov.b32 {_, %rs1}, %r2; abs.bf16 %rs1, %rs1; mov.b32 %r3, {0, %rs1};", -2.0, 2.0),
    ("div.rn.f32 %r3, %r2, 0f40400000;", 1.0, float(np.float32(1) / np.float32(3))),
    ("cvt.f64.f32 %rd6, %r2; div.rn.f64 %rd6, %rd6, 0d4008000000000000; mov.b64 {%r3, _}, %rd6;", 1.0, 0x55555555),
    ("cvt.f64.f32 %rd6, %r2; sub.rn.f64 %rd6, %rd6, 0d3CA0000000000000; mov.b64 {_, %r3}, %rd6;", 1.0, 0x3FEFFFFF),
    ("cvt.f64.f32 %rd6, %r2; mul.rn.f64 %rd6, %rd6, %rd6; cvt.rn.f32.f64 %r3, %rd6;", 1 + 2.0**-23, 1 + 2.0**-22),
    ("ex2.approx.ftz.f32 %r3, %r2;", 0.0, 1.0),
    ("ex2.approx.ftz.f32 %r3, %r2;", -INF, 0.0),
    ("ex2.approx.ftz.f32 %r3, %r2;", -130.0, 0.0),
]


@pytest.mark.parametrize(("body", "x", "want"), UNARY)
def test_an_instruction_computes_what_its_definition_says(body, x, want):
    lines = body.replace("; ", ";\n")
    assert torch.equal(run(f"{lines}\n{STORE}", bits(x)), bits(want))


@pytest.mark.parametrize(
    ("body", "exact"), [("ex2.approx.ftz.f32 %r3, %r2;", np.exp2), ("div.full.f32 %r3, 0f3F800000, %r2;", np.reciprocal)]
)
def test_approximate_instructions_err_within_their_bounds_to_both_sides(body, exact):
    x = torch.linspace(-20, 20, THREADS)
    got = run(f"{body}\n{STORE}", x).view(torch.float32).double().numpy()
    want = exact(x.double().numpy())
    ulps = (got - want) / np.spacing(np.abs(want).astype(np.float32))
    assert np.abs(ulps).max() <= APPROXIMATE[body[:3]]
    assert ulps.min() < -0.5
    assert ulps.max() > 0.5


SHUFFLES = {
    "bfly.b32 %r3, %r1, 5, 31": lambda lane: lane ^ 5,
    "up.b32 %r3, %r1, 4, 0": lambda lane: lane - 4 if lane >= 4 else lane,
    "idx.b32 %r3, %r1, 7, 31": lambda lane: 7,
}


@pytest.mark.parametrize("how", SHUFFLES)
def test_shuffles_stay_in_the_warp(how):
    want = [thread // 32 * 32 + SHUFFLES[how](thread % 32) for thread in range(THREADS)]
    assert run(f"shfl.sync.{how}, -1;\n{STORE}", bits(0)).tolist() == want


def test_redux_reduces_a_warp():
    assert run(f"redux.sync.add.s32 %r3, %r1, -1;\n{STORE}", bits(0)).tolist() == [496] * 32 + [496 + 32 * 32] * 32
    assert run(f"redux.sync.max.f32 %r3, %r2, -1;\n{STORE}", torch.arange(64.0)).view(torch.float32).unique().tolist() == [
        31,
        63,
    ]


def test_matrices_are_loaded_by_rows_of_eight_lanes():
    # The first warp stores 32 rows of 16 bytes, four matrices; row r of matrix i has 4 (8 i + r) + column pair.
    body = """
    shl.b32 %r4, %r1, 4;
    shl.b32 %r5, %r1, 2;
    add.s32 %r6, %r5, 1;
    add.s32 %r7, %r5, 2;
    add.s32 %r8, %r5, 3;
    st.shared.v4.b32 [%r4], {%r5, %r6, %r7, %r8};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r3, %r11}, [%r4];
    """
    assert run(body + STORE, bits(0), shared_bytes=16 * THREADS).tolist() == list(range(64, 96)) + list(range(192, 224))


@pytest.mark.parametrize(("load", "want"), [("s16", 0xFFFF8001), ("b16", 0x8001), ("s8", 1)])
def test_narrow_loads_take_the_sign_along_where_they_have_one(load, want):
    body = f"shl.b32 %r4, %r1, 2;\nst.shared.b32 [%r4], %r2;\nld.shared.{load} %r3, [%r4+2];\n"
    assert torch.equal(run(body + STORE, bits(0x80010000), shared_bytes=4 * THREADS), bits(want))


def test_a_guard_leaves_the_others_as_they_were():
    body = "setp.lt.u32 %p1, %r1, 40;\nmov.b32 %r3, 1;\n@!%p1 mov.b32 %r3, 2;\n"
    assert run(body + STORE, bits(0)).tolist() == [1] * 40 + [2] * 24


def test_threads_that_branch_apart_meet_again():
    # a loop that thread i runs i % 4 + 1 times, and a barrier after it
    body = """
    mov.b32 %r3, 0;
    and.b32 %r4, %r1, 3;
$L__BB0_1:
    add.s32 %r3, %r3, 1;
    setp.le.u32 %p1, %r3, %r4;
    @%p1 bra $L__BB0_1;
    bar.sync 0;
    """
    assert run(body + STORE, bits(0)).tolist() == [1, 2, 3, 4] * 16


def test_threads_may_choose_between_parameters():
    body = """
    mov.b64 %rd6, test_param_0;
    mov.b64 %rd7, test_param_1;
    setp.lt.u32 %p1, %r1, 40;
    selp.b64 %rd6, %rd6, %rd7, %p1;
    ld.param.b64 %rd8, [%rd6];
    setp.eq.s64 %p2, %rd8, %rd1;
    selp.b32 %r3, 1, 2, %p2;
    """
    assert run(body + STORE, bits(0)).tolist() == [1] * 40 + [2] * 24


def test_programs_are_run_in_batches(monkeypatch):
    monkeypatch.setattr("tests.support.ptx.machine.BATCH", 3 * THREADS)
    out = torch.zeros(8, dtype=torch.int32)
    body = """
    mov.u32 %r3, %ctaid.x;
    mul.wide.u32 %rd6, %r3, 4;
    add.s64 %rd4, %rd2, %rd6;
    """
    assert run(body + STORE, bits(0), out, programs=8).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [ %rd4 + 4 ], { %r2 };", "out of bounds: thread 63 accesses 4 bytes"),
        ("ld.global.b32 { %r3 }, [ %rd4 + -4 ];", "out of bounds: thread 0"),
        ("ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd4 + 0 ];", "misaligned: an access of 16 bytes"),
        ("st.shared.b32 [%r1], %r2;", "shared or local memory of 0 bytes"),
        ("setp.lt.u32 %p1, %r1, 40;\n@%p1 bra $L__BB0_1;\nbar.sync 0;\n$L__BB0_1:", "only a part of 64 threads"),
        ("setp.lt.u32 %p1, %r1, 40;\n@%p1 redux.sync.add.s32 %r3, %r1, -1;", "only a part of 32 threads"),
        ("setp.lt.u32 %p1, %r1, 5;\n@%p1 shfl.sync.idx.b32 %r3, %r1, 7, 31, -1;", "only a part of 32 threads"),
    ],
)
def test_it_refuses(body, message):
    base = torch.zeros(3 * THREADS, dtype=torch.int32)  # nothing lies next to out within its own storage
    with pytest.raises(RuntimeError, match=message):
        run(body, base[:THREADS].clone(), base[:THREADS].clone())


EXCHANGE = """
    shl.b32 %r4, %r1, 2;
    xor.b32 %r5, %r4, {distance};
    st.shared.b32 [%r4], %r1;
    {barrier}
    ld.shared.b32 %r3, [%r5];
"""
EVERY_BYTE = 4 * THREADS


@pytest.mark.parametrize(
    ("distance", "barrier", "conflicts"),
    [
        (128, "", {"shared, between warps": EVERY_BYTE}),
        (128, "bar.warp.sync -1;", {"shared, between warps": EVERY_BYTE}),
        (128, "bar.sync 0;", {}),
        (4, "", {"shared, in a warp": EVERY_BYTE}),
        (4, "bar.warp.sync -1;", {}),
        (4, "bar.sync 0;", {}),
        (0, "", {}),
    ],
)
def test_noted_accesses_show_a_missing_barrier(distance, barrier, conflicts):
    accesses = Accesses()
    exchanged = run(EXCHANGE.format(distance=distance, barrier=barrier) + STORE, bits(0), shared_bytes=256, accesses=accesses)
    assert exchanged.tolist() == [thread ^ distance // 4 for thread in range(THREADS)]  # with a barrier and without
    assert accesses.conflicts() == conflicts


@pytest.mark.parametrize(
    ("value", "conflicts"),
    [
        ("%ctaid.x", {"global, between programs": 1}),  # the other three bytes are 0
        ("%tid.x", {"global, between warps": 2, "global, in a warp": 4, "global, between programs": 1}),
        ("7", {}),  # all write the same
    ],
)
@pytest.mark.parametrize("batch", [THREADS, 2 * THREADS])
def test_noted_accesses_show_who_writes_to_one_place(value, conflicts, batch, monkeypatch):
    monkeypatch.setattr("tests.support.ptx.machine.BATCH", batch)
    accesses = Accesses()
    run(f"mov.u32 %r3, {value};\nst.global.b32 [ %rd2 + 0 ], {{ %r3 }};", bits(0), programs=2, accesses=accesses)
    assert accesses.conflicts() == conflicts


def test_an_instruction_it_does_not_know_is_an_error():
    for body, message in (
        ("sin.approx.f32 %r3, %r2;", r"operations\.py does not have: sin\.approx\.f32"),
        ("add.rn.bf16x2 %r3, %r2, %r2;", "add of bf16x2"),
        ("mov.b32 %r3, elsewhere;", "neither a register nor a number: elsewhere"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            run(body, bits(0))
