"""How often kernels are compiled: once for any number of positions, wherever the rows of their tables begin.

Run: make test ARGS=tests/backends/triton/test_variants.py
Not here: block sizes, which do depend on the number of positions (launch_table.py).
"""

import importlib
import pkgutil
from collections import defaultdict

import opd_kernels
import pytest
import torch
from triton.runtime.jit import JITFunction

from opd_ops import selective_opd_loss
from tests.support import kernels
from tests.support.cases import leaf, logit_pair

SELECTORS = {
    "teachability": {},
    "teachability-released": {"mask": torch.arange(37) > 0},
    "ier": {"tokens": torch.arange(37)},
}


@pytest.mark.skipif(kernels.IS_INTERPRETED, reason="Triton's interpreter compiles nothing")
@pytest.mark.parametrize("selector", SELECTORS)
def test_kernels_are_compiled_once_for_any_number_of_positions(selector, monkeypatch):
    caches = {}
    for module in pkgutil.iter_modules(opd_kernels.__path__):
        for name, kernel in vars(importlib.import_module(f"opd_kernels.{module.name}")).items():
            if isinstance(kernel, JITFunction):
                caches[name] = defaultdict(kernel.create_binder)
                monkeypatch.setattr(kernel, "device_caches", caches[name])
    student, teacher = logit_pair(37, 130)
    for n in (32, 33, 37):
        options = {name: x[:n] for name, x in SELECTORS[selector].items()}
        out = selective_opd_loss(leaf(student[:n]), teacher[:n], selector=selector, backend="triton", **options)
        out.loss.backward()
    n_compiled = {name: len(cache[0][0]) for name, cache in caches.items() if cache}
    assert len(n_compiled) > 10
    assert {name: n for name, n in n_compiled.items() if n > 1} == {}
