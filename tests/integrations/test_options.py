"""The trial of the loss's options that trainers make before their models load: what it refuses, and what it lets pass.

  Run: make test ARGS=tests/integrations/test_options.py

Not here: that each trainer makes it (its neighbours, tests/trainer/test_config.py).
"""

import pytest
import torch

from opd_ops import JSD, Extrapolated, TailAware, TopKForwardKL, selective_opd_token_losses
from opd_ops.distributed.ranks import Ranks
from opd_ops.integrations.options import try_options

GIVEN = ("mask", "num_items_in_batch", "temperature")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractoin": 0.1}, TypeError, "options of the loss: got 'fractoin', expected some of: weights, selector, fraction"),
        ({"mask": None}, TypeError, "mask: got it among the options of the loss, but the trainer passes its own; leave it out"),
        ({"fraction": 1.5}, ValueError, "fraction: got 1.5, expected"),
        ({"selector": "best"}, ValueError, "selector: got 'best', expected"),
        ({"divergence": "l2"}, ValueError, "divergence: got 'l2', expected one of"),
        ({"divergence": JSD}, TypeError, "divergence: got"),
        ({"divergence": "sampled"}, ValueError, "tokens: got None"),  # these hosts pass none
        ({"top_k": 0}, ValueError, "top_k: got 0"),
        ({"top_k": "16"}, TypeError, "top_k: got '16'"),
        ({"scope": "rows"}, ValueError, "scope: got 'rows'"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"score_dtype": "int8"}, ValueError, "score_dtype: got 'int8'"),
        ({"score_dtype": "float8", "threshold": 0.5}, ValueError, "threshold: score_dtype='float8'"),
        ({"generator": 3}, TypeError, "generator: got 3"),
        ({"eos_ids": [7, 7]}, ValueError, "eos_ids: got"),
        ({"denominator": "all"}, ValueError, "denominator: got 'all'"),
    ],
)
def test_it_refuses_what_the_loss_refuses(options, error, message):
    with pytest.raises(error, match=message):
        try_options(options, given=GIVEN)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selector": lambda stats: pytest.fail("a selector of one's own was called")},
        {"divergence": Extrapolated(1.25, torch.zeros(7, 300))},
        {"divergence": TailAware(1000), "top_k": 700},
        {"weights": torch.ones(9, 9), "tokens": torch.zeros(2, dtype=torch.long), "threshold": torch.tensor(0.5)},
        {"eos_ids": (151_643, 151_645), "vocab_size": 151_936},
        {"backend": "triton", "score_dtype": "float8", "inplace_backward": True},
        {"selector": "random", "generator": torch.Generator()},
    ],
)
def test_it_lets_pass_what_only_a_run_can_tell(options):
    try_options(options, given=GIVEN)


def test_a_host_that_passes_labels_may_train_on_sampled_tokens():
    try_options({"divergence": "sampled", "special_ids": (3,)}, given=("labels", "num_items_in_batch"))


def test_a_teacher_of_lists_takes_what_lists_allow():
    options = {"given": ("mask", "cu_seqlens"), "function": selective_opd_token_losses, "teacher_top_k": 16}
    try_options({"divergence": TopKForwardKL(8)}, **options)
    with pytest.raises(ValueError, match="divergence: got 'reverse_kl', which TopKLogprobs cannot give"):
        try_options({}, **options)
    with pytest.raises(TypeError, match="options of the loss: got 'denominator', expected some of"):
        try_options({"denominator": "valid"}, **options)


def test_it_leaves_the_generators_alone():
    before, own = torch.get_rng_state(), torch.Generator().manual_seed(5)
    kept = own.get_state()
    try_options({"selector": "random", "generator": own}, given=GIVEN)
    try_options({"selector": "multinomial"}, given=GIVEN)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own.get_state(), kept)


def test_nothing_is_sent_to_other_ranks(monkeypatch):
    """A trainer may be made on one rank alone."""
    monkeypatch.setattr(Ranks, "size", property(lambda _: pytest.fail("asked for the other ranks")))
    try_options({"scope": "global", "selection_group": object(), "process_group": object()}, given=GIVEN)
