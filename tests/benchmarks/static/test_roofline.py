"""The static roofline as a gate: every shipped kernel configuration, compiled for sm_90, against its limits
(no spill, no local memory, 128-bit loads only, barriers, 16 instructions per logit pair for the bf16 score); every kernel in
one configuration or more for the other targets; then the gates of the model, on the kernels that the counts have compiled.

Run: make test ARGS=tests/benchmarks/static/test_roofline.py; some five minutes, no GPU. Every configuration for every target:
python -m benchmarks.static.roofline
Not here: values (tests/kernels), the model itself (test_model.py).
"""

import pytest

from benchmarks.static import gates, pipes, roofline
from tests.benchmarks.static.commands import rows_of

KERNELS = {
    "score_fwd", "merge_fwd", "argmax_fwd", "support_groups_fwd", "support_topk_fwd", "support_stats_fwd",
    "reverse_kl_grad", "forward_kl_grad", "jsd_fwd", "jsd_grad", "off_list_fwd", "off_list_grad", "scale", "zero_rows",
    "reverse_skew_fwd", "reverse_skew_grad", "forward_skew_fwd", "forward_skew_grad",
    "quantise", "quantiles_fwd", "place_fwd", "choose_fwd", "keep_fwd", "list_fwd", "totals_fwd", "ier_fwd",
}  # fmt: skip
GOOD = {
    "kernel": "score_fwd", "target": "sm_90", "config": "bf16", "registers": 96, "spill_bytes": 0, "local_ops": 0,
    "shared_bytes": 16, "ldg128": 8, "narrow_loads": 0, "barriers": 23, "pairs": 32, "instructions_per_pair": 15.9,
    "budget": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rows_of("roofline", tmp_path_factory.mktemp("roofline"), "--targets", "sm_90")["rows"]


@pytest.mark.full
def test_static_roofline_shipped_kernels_keep_their_limits(rows):
    assert [f"{row['kernel']} {row['config']}: {x}" for row in rows for x in roofline.failures(row)] == []


@pytest.mark.full
def test_static_roofline_other_targets_keep_their_limits(tmp_path):
    targets = "sm_80", "sm_100", "gfx942"
    configs = "bf16", "bf16 rows", "bf16 K=128", "bf16 K=32", "bf16 split", "fp32 to bf16"
    configs += "N=16384", "N=16384 tip", "N=16384 bounds", "N=16384 keeps", "N=16384 teachability-released", "bf16 K=128 lists"
    configs += "bf16 K=16 token", "bf16 K=128 token"
    got = rows_of("roofline", tmp_path, "--targets", *targets, "--configs", *configs)["rows"]
    assert {row["target"] for row in got} == set(targets)
    for target in targets:
        assert {row["kernel"] for row in got if row["target"] == target} == KERNELS
    assert [f"{row['kernel']} {row['target']} {row['config']}: {x}" for row in got for x in roofline.failures(row)] == []


@pytest.mark.full
def test_static_roofline_covers_every_kernel_and_type(rows):
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["config"].split()[0] for row in rows if row["kernel"] == "score_fwd"} >= {"bf16", "fp16", "fp32"}


@pytest.mark.full
def test_static_roofline_score_loop_has_no_barrier(rows):
    scores = [row for row in rows if row["kernel"] == "score_fwd"]
    assert all(row["loop_barriers"] == 0 for row in scores)
    pairs = {"bf16 V=50257": 8, "fp32 V=50257": 8, "fp32 softcap": 16}
    assert all(row["pairs"] == pairs.get(row["config"], 32) for row in scores)


# Here and not beside the model's other tests: Triton's cache has these kernels by now.
@pytest.mark.full
def test_the_model_s_gates_hold_for_our_kernels(tmp_path):
    rows = rows_of("model", tmp_path, "--targets", *pipes.DEVICES, "--gated", "--no-peers")["rows"]
    expected = sorted((gate.target, gate.kernel, gate.config) for gate in gates.GATES)
    assert sorted((r["target"], r["kernel"], r["config"]) for r in rows) == expected
    assert [f"{r['kernel']} {r['target']} {r['config']}: {x}" for r in rows for x in gates.failures(r)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"spill_bytes": 8}, {"local_ops": 1}, {"narrow_loads": 1}, {"instructions_per_pair": 16.01}, {"registers": 97},
        {"shared_bytes": 300_000}, {"pairs": None}, {"barriers": 24},
    ],
)  # fmt: skip
def test_failures_rejects(change):
    assert roofline.failures(GOOD) == []
    assert len(roofline.failures({**GOOD, **change})) == 1


def test_every_kernel_has_a_limit_of_barriers_and_the_variance_more():
    assert set(roofline.BARRIERS) == KERNELS
    wide = {**GOOD, "config": "bf16 variance", "barriers": 27}
    assert roofline.failures(wide) == []
    assert len(roofline.failures({**wide, "barriers": 28})) == 1


def test_only_rows_that_start_anywhere_may_be_loaded_narrowly():
    odd = {**GOOD, "config": "bf16 V=50257", "narrow_loads": 16, "instructions_per_pair": 26.5, "budget": 27}
    assert roofline.failures(odd) == []
    assert len(roofline.failures({**odd, "instructions_per_pair": 27.01})) == 1


SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   FADD R0, R4, R5 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   FMUL R4, R4, 2 ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0090*/               @P0 BRA `(.L_x_3) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   BRA `(.L_x_4) ;
"""


def test_main_loop_includes_out_of_line_blocks_and_skips_loops_without_loads():
    loop = roofline.main_loop(*roofline.basic_blocks(SASS.splitlines(), **roofline.SASS), roofline.LDG)
    assert len(loop) == 6
    assert "FMUL R4, R4, 2" in loop
    assert not any("IADD3" in x for x in loop)


def test_inner_loops_are_those_without_a_wide_load():
    listed = SASS.replace("IADD3 R0, R0, 0x1, RZ", "LDG.E R0, desc[UR4][R2.64]")
    blocks = roofline.basic_blocks(listed.splitlines(), **roofline.SASS)
    inner = roofline.inner_loops(*blocks, roofline.LDG, roofline.main_loop(*blocks, roofline.LDG))
    assert "LDG.E R0, desc[UR4][R2.64]" in inner
    assert not any("128" in x for x in inner)


def test_basic_blocks_follow_every_branch_of_gcn():
    text = "\n".join(("\ts_nop 0", ".LBB0_1:", "\tv_mov_b32_e32 v1, v2", "\ts_branch .LBB0_1", "\ts_endpgm"))
    blocks, successors = roofline.basic_blocks(text.splitlines(), **roofline.GCN)
    assert [len(x) for x in blocks] == [1, 2, 1, 0]
    assert successors[1] == [1]


def test_load_bytes_reads_the_width():
    widths = {
        "LDG.E.128 R4, desc[UR4][R2.64]": 16, "@!P0 LDG.E.U16 R4, desc[UR4][R2.64]": 2, "LDG.E R4, desc[UR4][R2.64]": 4,
        "LDG.E.64 R2, desc[UR4][R2.64]": 8, "global_load_dwordx4 v[0:3], v[4:5], off": 16,
    }  # fmt: skip
    assert {x: roofline.load_bytes(x) for x in widths} == widths
