"""No kernel misses a barrier: no two of its threads are in conflict (accesses.py), in launches of few positions.

Not here: that a missing barrier shows (test_machine.py), values (tests/kernels/).
"""

import importlib
import pkgutil

import opd_kernels
import pytest
import torch
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
from opd_kernels.score import score_fwd
from opd_kernels.skew_kl import forward_skew_fwd, forward_skew_grad
from opd_kernels.support import support_fwd
from opd_kernels.totals import totals_fwd
from opd_kernels.zero_rows import zero_rows
from triton.runtime.jit import JITFunction

from tests.kernels.test_selection import drawn_optional, drawn_sequences, drawn_table
from tests.kernels.test_totals import drawn
from tests.support.cases import logit_pair
from tests.support.kernel_oracle import COMMON
from tests.support.ptx.driver import watched

N = 3
ONE_MODEL = {"temperature": 1.0, "scale": 1.0, "softcap": None}


def read_logits(dtype, vocab_size, *, masked):
    """Launches every kernel that reads logits."""
    s, t = logit_pair(N, vocab_size, scale=4, dtype=dtype)
    if masked:
        s[1, ::3] = -torch.inf
    options = {"vocab_size": vocab_size, **COMMON}
    score = score_fwd(s, t, None, variance=torch.empty(N), **options)
    for top_k in (16, 128):
        lists = support_fwd(s, t, None, score, optional={x: torch.empty(N) for x in LIST_COLUMNS}, top_k=top_k, **options)
        ier_fwd(lists, score, torch.arange(N), torch.zeros(2, N), torch.empty(N))
    top, weights = argmax_fwd(s, None, score, vocab_size=vocab_size), torch.ones(N)
    for out in (s.clone(), torch.empty(N, vocab_size, dtype=torch.bfloat16)):
        for gradient in (reverse_kl_grad, forward_kl_grad):
            gradient(s, t, None, weights, score.columns, top=top, out=out, **options)
    own = s.clone()  # overwritten
    reverse_kl_grad(own, t, None, weights, score.columns, top=top, out=own, **options)
    for loss, gradient in ((jsd_fwd, jsd_grad), (forward_skew_fwd, forward_skew_grad)):
        sums, own = loss(s, t, None, score.columns, beta=0.5, **options), s.clone()
        gradient(own, t, None, weights, score.columns, sums, top=top, out=own, beta=0.5, **options)
    ids = torch.arange(0, vocab_size, vocab_size // 9).int().repeat(N, 1)
    off_list = off_list_fwd(s, None, ids, vocab_size=vocab_size, **ONE_MODEL)
    for own in (s, s.clone()):
        listed, adds = (ids, torch.ones(ids.shape), weights, off_list), own is s
        off_list_grad(
            own, None, *listed, out=t.clone() if adds else own, add=adds, first_id=0, vocab_size=vocab_size, **ONE_MODEL
        )
    zero_rows(s.clone(), torch.tensor([1, 0, 1], dtype=torch.uint8))
    scale(s.clone(), torch.tensor([2.0]))
    quantise_rows(s, torch.empty(16, vocab_size, dtype=torch.uint8), torch.empty(16, 1))


def select(n=700):
    """Launches every kernel of the selection."""
    table = drawn_table(3, n)
    placed = place_fwd(table, None, n, selector="tip", loss="reverse_kl")
    optional = drawn_optional(3, n, "teachability-released")
    wide = torch.stack((*table.unbind(), *optional.values()))
    released = place_fwd(wide, None, n, selector="teachability-released", loss=None, optional=list(optional))
    places = torch.arange(n) % 50
    for sequences in (drawn_sequences(3, n, cu_seqlens=x)[0] for x in (True, False)):
        kept = {**sequences, "places": places, "keep_scores": released.scores[1]}
        for options in ({}, {"places": places}, sequences, kept):
            flags = placed.valid, placed.infinite
            choose_fwd(placed.scores[0], *flags, numerator=1, denominator=4, n_rows=200, **options)
    totals_fwd(*drawn(2500, 1100), loss="reverse_kl", by_selected=True)


@pytest.mark.full
def test_no_two_threads_of_a_kernel_are_in_conflict(monkeypatch):
    with watched() as launches:
        read_logits(torch.bfloat16, 5003, masked=False)
        read_logits(torch.float32, 9208, masked=True)
        monkeypatch.setattr(launch_table, "_multiprocessors", lambda device: 132)  # several programs for each row
        read_logits(torch.bfloat16, 9208, masked=False)
        select()
        monkeypatch.setattr(launch_table, "selection", lambda n: launch_table.Tile({"BLOCK": 256}, num_warps=4))
        select()  # keys in memory
    assert [(kernel, conflicts) for kernel, conflicts in launches if conflicts] == []
    modules = [importlib.import_module(f"opd_kernels.{module.name}") for module in pkgutil.iter_modules(opd_kernels.__path__)]
    all_kernels = {name for x in modules for name, kernel in vars(x).items() if isinstance(kernel, JITFunction)}
    assert {kernel for kernel, _ in launches} == {name for name in all_kernels if name.endswith("_kernel")}
