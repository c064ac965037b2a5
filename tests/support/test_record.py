"""The recorder of calls: digests change with every number, comparisons name what differs, and no name is left out.

  Run: make test ARGS=tests/support/test_record.py

Not here: the recorded calls themselves, which take minutes (`python -m tests.support.record`).
"""

import json
from itertools import product

import pytest
import torch

from opd_ops import ImportanceWeighted, Routed, SampledToken, TopK
from opd_ops.divergences import DIVERGENCES
from opd_ops.divergences.base import SUPPORTS
from opd_ops.divergences.ratio import DEFAULT_BOUNDS
from opd_ops.divergences.top_k import DIRECTIONS, TAILS
from opd_ops.inputs.batch import Batch
from opd_ops.selection.selectors import SELECTORS
from opd_ops.selection.weighting import MEANS, WEIGHTINGS
from opd_ops.settings import HELP
from tests.support import record, recorded
from tests.support.recorded import calls, family
from tests.support.recorded.case import Call, Custom
from tests.support.recorded.ranks import ON_RANKS


def recording(*cases, **more):
    written, tensors, failed = record.record(cases)
    assert not failed
    return {"calls": written, **more}, tensors


def numbers(**values):
    return Custom("numbers", "three numbers, made here", lambda: values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_digest_changes_with_a_last_bit_a_sign_of_zero_a_shape_and_a_dtype(dtype):
    x = torch.tensor([[0.0, 1.0, -2.5]], dtype=dtype)
    changed = [x.clone(), x.clone(), x.view(3, 1), x.to(torch.float16)]
    changed[0][0, 1] = torch.nextafter(x[0, 1], torch.tensor(2.0, dtype=dtype))
    changed[1][0, 0] = -0.0
    assert len({record.digest(y) for y in (x, *changed)}) == 5
    assert record.digest(x.expand(2, 3)[:1]) == record.digest(x)
    assert record.digest(0.1) != record.digest(0.1 + 2**-56) != record.digest(torch.tensor(0.1))


def test_flattened_names_what_is_nested():
    named = {"a": (1, {"b": torch.ones(2)}), "c": None}
    assert list(record.flattened(named)) == ["a.0", "a.1.b", "c"]
    assert list(record.flattened(torch.ones(2))) == ["value"]


def test_compare_says_what_differs_by_how_much_and_in_which_call(tmp_path):
    x = torch.tensor([1.0, 2.0, 4.0])
    sides = []
    for i, y in enumerate((x, x + torch.tensor([0.0, 0.0, 4e-6]))):
        side, tensors = recording(numbers(loss=y, gradient=x))
        torch.save(tensors, tmp_path / f"{i}.pt")
        sides.append(side | {"tensors": str(tmp_path / f"{i}.pt")})
    lines = record.compare(*sides)
    assert lines[0] == "0 of 1 calls are equal"
    assert lines[1] == "numbers: loss differs by 9.5e-07\n    three numbers, made here"
    assert record.compare(sides[0], sides[0]) == ["1 of 1 calls are equal"]
    sides[1]["calls"] |= {"more": sides[1]["calls"].pop("numbers")}
    assert record.compare(*sides)[1:] == ["more: only in the second recording", "numbers: only in the first recording"]


def test_the_command_exits_with_one_where_recordings_differ(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(recording(numbers(loss=value))[0]))
    assert record.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert record.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "numbers: loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("x", "y", "want"),
    [
        ([2.0, 0.0], [2.0, 0.0], 0.0),
        ([2.0, -1.0], [2.0, 1.0], 2.0),
        ([float("nan")], [float("nan")], 0.0),
        ([1.0], [float("inf")], float("inf")),
    ],
)
def test_largest_relative_difference(x, y, want):
    assert record.largest_relative_difference(torch.tensor(x), torch.tensor(y)) == want


def test_a_refusal_is_recorded_by_its_words_and_a_crash_fails(capsys):
    def refuse():
        raise ValueError("fraction: got 2")

    def crash():
        raise AttributeError("no such thing")

    written, _, failed = record.record([Custom("refused", "", refuse), Custom("crashed", "", crash)])
    assert written["refused"]["error"] == "ValueError: fraction: got 2"
    assert failed == ["crashed"]
    assert "no such thing" in capsys.readouterr().err


def test_every_divergence_and_selector_is_recorded_on_every_backend():
    recorded_names = {"divergence": set(), "selector": set()}
    for case in calls.cases():
        for kind, names in recorded_names.items():
            value = case.options.get(kind, "")
            names.add((getattr(value, "name", value), case.options["backend"]))
    for kind, known in (("divergence", DIVERGENCES), ("selector", SELECTORS)):
        missing = {(name, backend) for name in known for backend in calls.BACKENDS} - recorded_names[kind]
        assert not missing, kind


def test_every_member_of_a_family_is_recorded():
    by_backend = {name: [case for case in family.cases() if case.options["backend"] == name] for name in calls.BACKENDS}
    for backend, cases in by_backend.items():
        divergences = [case.options.get("divergence") for case in cases]
        lists = {(x.direction, x.support, x.tail) for x in divergences if isinstance(x, TopK)}
        ensembles = {getattr(case.teacher, "kind", type(case.teacher)) for case in cases}
        assert {"geometric", "arithmetic", Routed} <= ensembles
        if backend == "triton":  # each support and each tail, in pairs
            assert {support for _, support, _ in lists} == set(family.SUPPORTS)
            assert {tail for _, _, tail in lists} == set(TAILS)
            continue
        assert lists == {named for named in product(DIRECTIONS, SUPPORTS, TAILS) if is_offered(*named)}
        for kind in (SampledToken, ImportanceWeighted):
            ratios = {x.ratio for x in divergences if isinstance(x, kind)}
            assert ratios == set(DEFAULT_BOUNDS) - ({"ppo"} if kind is ImportanceWeighted else set())
        weightings = {case.options.get("weighting") for case in cases}
        assert set(WEIGHTINGS) <= {x for x in weightings if isinstance(x, str)}
        assert set(MEANS) <= {case.options.get("weight_mean") for case in cases}


def is_offered(direction, support, tail):
    try:
        TopK(direction, support, tail, 8)
    except ValueError:
        return False
    return True


def test_every_setting_and_every_tensor_of_a_batch_is_recorded():
    given = {name for case in recorded.cases() if isinstance(case, Call) for name in case.options}
    elsewhere = {"process_group", "selection_group", "generator"}  # on ranks; a generator's draws depend on earlier calls
    assert {*HELP, *Batch._fields} - given == elsewhere


def test_every_divergence_and_selector_is_recorded_on_ranks():
    assert all(f"ranks/vocabulary/{name}/{kind}/torch" in ON_RANKS for name in DIVERGENCES for kind in ("logits", "heads"))
    assert all(f"ranks/selection/{scope}/{name}" in ON_RANKS for name in SELECTORS for scope in ("global", "sequence"))


def test_each_call_has_a_name_of_its_own_and_words():
    names = [(case.name, case.words) for case in recorded.cases()]
    assert len({name for name, _ in names}) == len(names)
    assert all(words for _, words in names)
    assert {name.split("/")[0] for name, _ in names} >= {
        "divergence",
        "selector",
        "ranks",
        "trl",
        "hf",
        "verl",
        "nemo_rl",
        "trainer",
    }
    words = dict(names)["setting/temperature-jsd/heads/torch"]
    assert words == (
        "selective_opd_loss(LinearHead(hidden fp32 (3, 9, 24), weight (97, 24)), LinearHead(hidden fp32 (3, 9, 40), "
        "weight (97, 40)), mask=bool (3, 9), fraction=0.3, top_k=6, backend='torch', temperature=1.6, "
        "divergence=JSD(beta=0.3, entry_clip=None))"
    )


REPEATED = (
    "divergence/jsd/heads/bf16/torch",
    "divergence/tail_aware/logits/fp32/eager",
    "selector/multinomial/logits/torch",
    "token_losses/jsd/heads/triton",
    "setting/refused-fraction/logits/eager",
    "select_positions/ties/sequence/0.5",
    "trl/generalized_jsd_loss/0.3/mean",
)


@pytest.fixture(scope="module")
def repeated():
    cases = [case for case in recorded.cases() if case.name in REPEATED]
    assert len(cases) == len(REPEATED)
    return cases


def test_a_call_recorded_twice_gives_equal_digests(repeated):
    first, second = recording(*repeated)[0], recording(*reversed(repeated))[0]
    assert record.compare(first, second) == [f"{len(repeated)} of {len(repeated)} calls are equal"]
    digests = first["calls"]["divergence/jsd/heads/bf16/torch"]["digests"]
    assert {"loss", "selected", "scores", "stats.student_entropy", "metrics.n_selected", "gradient.hidden"} <= set(digests)


def test_another_temperature_changes_losses_statistics_and_gradients(repeated):
    case = next(x for x in repeated if x.name == "divergence/tail_aware/logits/fp32/eager")
    other = Call(case.name, case.student, case.teacher, {**case.options, "temperature": 1.0 + 2**-20})
    line = record.compare(recording(case)[0], recording(other)[0])[1].splitlines()[0]
    changed = line.removeprefix(f"{case.name}: ").split("; ")
    assert {"loss", "stats.student_entropy", "gradient.logits"} <= set(changed)
    assert "selected" not in changed


def test_a_call_on_ranks_is_recorded_by_rank(ranks, monkeypatch):
    monkeypatch.setattr(recorded.ranks, "processes", lambda: ranks)
    names = ("ranks/vocabulary/jsd/heads/torch", "ranks/selection/sequence/prefix")
    cases = [case for case in recorded.ranks.cases() if case.name in names]
    (first, _), (second, _) = recording(*cases), recording(*cases)
    assert record.compare(first, second)[0] == "2 of 2 calls are equal"
    assert "rank3.gradient.weight" in first["calls"][names[0]]["digests"]
    assert "which counts the positions of whole sequences" in first["calls"][names[1]]["error"]
