"""`Settings`: what they refuse when they are made, what only a run can tell, and that every function that takes them agrees.

  Run: make test ARGS=tests/test_settings.py

Not here: arguments of a batch (call/test_errors.py), that each trainer checks its settings at once (integrations/, trainer/).
"""

import inspect
from dataclasses import fields, replace

import pytest
import torch

from opd_ops import (
    JSD,
    ImportanceWeighted,
    SampledToken,
    SelectiveOPDLoss,
    Settings,
    TailAware,
    TopKForwardKL,
    score_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.distributed.ranks import Ranks
from opd_ops.settings import DEFAULTS, HELP, LossOptions, ScoringOptions, TokenLossOptions
from tests.support.cases import leaf, logit_pair

GIVEN = ("mask", "num_items_in_batch", "temperature")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractoin": 0.1}, TypeError, "settings: got 'fractoin', an unknown name; did you mean 'fraction'?"),
        ({"xyz": 0.1}, TypeError, "settings: got 'xyz', an unknown name; expected one of: backend, check_finite"),
        ({"fraction": 1.5}, ValueError, "fraction: got 1.5, expected"),
        ({"selector": "best"}, ValueError, "selector: got 'best', expected"),
        ({"divergence": "l2"}, ValueError, "divergence: got 'l2', expected one of"),
        ({"divergence": JSD}, TypeError, "divergence: got"),
        ({"top_k": 0}, ValueError, "top_k: got 0"),
        ({"top_k": "16"}, TypeError, "top_k: got '16'"),
        ({"temperature": 0}, ValueError, "temperature: got 0"),
        ({"scope": "rows"}, ValueError, "scope: got 'rows'"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"score_dtype": "int8"}, ValueError, "score_dtype: got 'int8'"),
        ({"score_dtype": "float8", "threshold": 0.5}, ValueError, "threshold: score_dtype='float8'"),
        ({"score_dtype": "float8", "selector": "random"}, ValueError, "selector: got 'random', which draws"),
        ({"generator": 3}, TypeError, "generator: got 3"),
        ({"check_finite": "no"}, TypeError, "check_finite: got 'no', expected True or False"),
        ({"inplace_backward": 1}, TypeError, "inplace_backward: got 1, expected True or False"),
        ({"eos_ids": [7, 7]}, ValueError, "eos_ids: got"),
        ({"denominator": "all"}, ValueError, "denominator: got 'all'"),
        ({"selection_group": "world"}, TypeError, "selection_group: got str"),
        ({"process_group": 3}, TypeError, "process_group: got int"),
    ],
)
def test_settings_are_refused_when_they_are_made(options, error, message):
    for make in (Settings, SelectiveOPDLoss, Settings.of):
        with pytest.raises(error, match=message):
            make(options) if make == Settings.of else make(**options)


def test_what_a_host_passes_itself_is_no_setting_of_its_users():
    with pytest.raises(TypeError, match="temperature: got it among the settings of the loss, but the host passes its own"):
        Settings.of({"temperature": 2.0}, given=GIVEN)
    assert Settings.of({"fraction": 0.5}, given=GIVEN) == Settings(fraction=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selector": lambda stats: pytest.fail("a selector of one's own was called")},
        {"divergence": TailAware(1000), "top_k": 700},
        {"threshold": torch.tensor(0.5)},
        {"eos_ids": (151_643, 151_645), "vocab_size": 151_936},
        {"backend": "triton", "score_dtype": "float8", "inplace_backward": True},
        {"selector": "random", "generator": torch.Generator()},
    ],
)
def test_what_only_a_run_can_tell_is_taken(options):
    settings = Settings(**options).for_host(passes_tokens=False)
    assert all(getattr(settings, name) is value or getattr(settings, name) == value for name, value in options.items())


def test_a_host_without_tokens_cannot_train_on_them():
    with pytest.raises(ValueError, match="tokens: got None, but divergence 'sampled'"):
        Settings(divergence="sampled").for_host(passes_tokens=False)
    for divergence in (SampledToken(ratio="is"), ImportanceWeighted(JSD())):
        with pytest.raises(ValueError, match=r"old_logprobs: got None, but divergence .* has the ratio .* host does not pass"):
            Settings(divergence=divergence).for_host(passes_tokens=True)
    with pytest.raises(ValueError, match="special_ids: got ids, but this host passes no tokens"):
        Settings(special_ids=(3,)).for_host(passes_tokens=False)
    Settings(divergence="sampled", special_ids=(3,)).for_host(passes_tokens=True)


def test_a_teacher_of_lists_takes_what_lists_allow():
    Settings(divergence=TopKForwardKL(8)).for_host(passes_tokens=False, teacher="TopKLogprobs")
    with pytest.raises(ValueError, match="divergence: got 'reverse_kl', which TopKLogprobs cannot give"):
        Settings().for_host(passes_tokens=False, teacher="TopKLogprobs")
    with pytest.raises(ValueError, match="selector: got 'tip', which needs the teacher's whole row"):
        Settings(divergence="tail_aware", selector="tip").for_host(passes_tokens=False, teacher="TopKLogprobs")
    with pytest.raises(TypeError, match="denominator: got a setting that this function does not read"):
        Settings.of({"denominator": "valid"}, of=TokenLossOptions)


def test_making_settings_sends_nothing_to_other_ranks(monkeypatch):
    """A trainer may be made on one rank alone."""
    monkeypatch.setattr(Ranks, "size", property(lambda _: pytest.fail("asked for the other ranks")))
    Settings(scope="global").for_host(passes_tokens=False)


def test_the_settings_by_name_are_those_of_the_class():
    names = {x.name for x in fields(Settings)}
    assert LossOptions.__optional_keys__ == names
    assert ScoringOptions.__optional_keys__ < TokenLossOptions.__optional_keys__ < names
    taken = inspect.signature(selective_opd_loss).parameters
    assert names <= set(taken)
    assert all(taken[name].default == getattr(DEFAULTS, name) for name in names)
    assert selective_opd_loss.__doc__ is not None
    words = selective_opd_loss.__doc__.split()
    assert all(f"{name}:" in words for name in HELP)
    assert "{settings}" not in words


def test_evaluation_takes_every_token_whatever_is_selected():
    settings = Settings(fraction=0.1, selector="tip", threshold=3.0, scope="sequence", top_k=5, divergence="jsd")
    assert settings.every_token == Settings(fraction=1.0, selector="all", top_k=5, divergence="jsd")
    assert replace(settings, fraction=0.2).fraction == 0.2


def test_the_module_is_the_function():
    student, teacher = logit_pair(24, 61)
    mask = torch.arange(24) > 3
    options = {"fraction": 0.25, "divergence": JSD(0.3), "denominator": "valid", "top_k": 5}
    runs = []
    for call in (SelectiveOPDLoss(**options), SelectiveOPDLoss(Settings(**options)), selective_opd_loss):
        own = leaf(student)
        more = options if call is selective_opd_loss else {}
        out = call(own, teacher, mask=mask, num_items_in_batch=50, **more)
        out.loss.backward()
        runs.append((out.loss, out.selected, own.grad))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert runs[0][2].any()
    with pytest.raises(TypeError, match="settings: got them and fraction"):
        SelectiveOPDLoss(Settings(), fraction=0.5)
    with pytest.raises(TypeError, match="settings: got dict"):
        SelectiveOPDLoss({"fraction": 0.5})


def test_functions_refuse_settings_that_they_do_not_have():
    student, teacher = logit_pair(6, 31)
    with pytest.raises(TypeError, match="fraction: got a setting that this function does not read"):
        score_positions(student, teacher, fraction=0.5)
    with pytest.raises(TypeError, match="inplace_backward: got a setting that this function does not read"):
        selective_opd_token_losses(student, teacher, inplace_backward=True)
    with pytest.raises(TypeError, match="inplace_backward: got True in settings, which this function does not read"):
        selective_opd_token_losses(student, teacher, settings=Settings(inplace_backward=True))
    with pytest.raises(TypeError, match="num_items_in_batch: got an argument of a batch, which is not taken here"):
        selective_opd_token_losses(student, teacher, num_items_in_batch=3)
    with pytest.raises(TypeError, match="settings: got 'masc', an unknown name; did you mean 'mask'"):
        selective_opd_loss(student, teacher, masc=torch.ones(6))


def test_ids_may_be_a_tensor():
    settings = Settings(special_ids=torch.tensor([7, 3]), eos_ids=torch.tensor([2], dtype=torch.int32))
    assert (settings.special_ids, settings.eos_ids) == ((7, 3), (2,))
    with pytest.raises(TypeError, match=r"special_ids: got 1\.5, expected an integer"):
        Settings(special_ids=torch.tensor([1.5]))
