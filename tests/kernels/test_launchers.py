"""Every launcher refuses tensors that its kernels would read wrongly in silence: of other strides, and on another GPU.

Run: make test ARGS=tests/kernels/test_launchers.py
Not here: what kernels compute. Nothing is launched here, so tensors hold any numbers.
"""

import importlib
import inspect
import pkgutil
import re

import opd_kernels
import pytest
import torch
from opd_kernels import gradient, sums
from opd_kernels.argmax import argmax_fwd
from opd_kernels.candidates import ier_fwd
from opd_kernels.choose import choose_fwd
from opd_kernels.off_list import off_list_fwd, off_list_grad
from opd_kernels.place import place_fwd
from opd_kernels.quantiles import quantiles_fwd
from opd_kernels.quantise import quantise_rows
from opd_kernels.scale import scale
from opd_kernels.score import Score, score_fwd
from opd_kernels.support import TopKLists, support_fwd
from opd_kernels.totals import totals_fwd
from opd_kernels.zero_rows import zero_rows

N, V, K = 4, 40, 2
MODEL = {"vocab_size": V, "temperature": 1.0, "scale": 1.0, "softcap": None}
PAIR = {"vocab_size": V, "temperature": 1.0, "s_scale": 1.0, "t_scale": 1.0, "s_softcap": None, "t_softcap": None}


def numbers(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def long(*shape):
    return numbers(*shape, dtype=torch.int64)


def byte(*shape):
    return numbers(*shape, dtype=torch.uint8)


def int32(*shape):
    return numbers(*shape, dtype=torch.int32)


MODELS = {"student": numbers(N, V), "teacher": numbers(N, V), "rows": long(N)}
SCORE = Score(numbers(12, N), numbers(N, 2, 16))
LISTED = {"logits": numbers(N, V), "rows": long(N), "ids": int32(N, K)}
OFF_LIST = {"values": numbers(N, K), "coef": numbers(N), "columns": numbers(2, N), "out": numbers(N, V)}
LOSSES = {"losses": numbers(N), "row_weights": numbers(N)}
POSITIONS = {"scores": numbers(N), "valid": byte(N), "infinite": byte(N)}
FUNCTIONS = {"constants": None, "slope": None}, {"constants": None, "terms": None, "results": None}
# The launchers, each with arguments that it takes.
CASES = {
    argmax_fwd: {"student": numbers(N, V), "rows": long(N), "score": SCORE, "vocab_size": V},
    choose_fwd: {
        **POSITIONS, "numerator": 1, "denominator": 2, "n_rows": 1, "bounds": long(2), "places": long(N),
        "keep_scores": numbers(N),
    },
    gradient.launch: {
        **FUNCTIONS[0], **MODELS, "weights": numbers(N), "columns": numbers(12, N), "sums": numbers(2, N), "top": int32(N),
        "elsewhere": numbers(N), "out": numbers(N, V), **PAIR,
    },
    ier_fwd: {
        "lists": TopKLists(int32(N, 2, K), numbers(N, 4, K), numbers(4, N)), "score": SCORE, "tokens": long(N),
        "at_tokens": numbers(2, N), "out": numbers(N),
    },
    off_list_fwd: {**LISTED, **MODEL},
    off_list_grad: {**LISTED, **OFF_LIST, "add": False, "first_id": 0, **MODEL},
    place_fwd: {
        "table": numbers(16, N), "rows": long(N), "n_positions": N, "unmasked": byte(N), "selector": "all", "loss": None,
    },
    quantiles_fwd: {"table": numbers(16, N), "columns": [0], "levels": [0.0, 1.0]},
    quantise_rows: {"x": numbers(N, V), "values": byte(N, V), "scales": numbers(N, 1)},
    scale: {"x": numbers(N, V), "factor": numbers(1)},
    score_fwd: {**MODELS, "out": numbers(12, N), "variance": numbers(N), **PAIR},
    sums.launch: {**FUNCTIONS[1], **MODELS, "columns": numbers(12, N), "beta": 0.5, **PAIR},
    support_fwd: {**MODELS, "score": SCORE, "optional": {"released_kl": numbers(N)}, "top_k": K, **PAIR},
    totals_fwd: {
        "rows": long(N), **LOSSES, **POSITIONS, "unmasked": byte(N), "stats": numbers(11, N), "selected": byte(N),
        "loss": None, "by_selected": False,
    },
    zero_rows: {"out": numbers(N, V), "keep": byte(N)},
}  # fmt: skip
TABLES = {"student", "teacher", "logits", "table", "at_tokens"}  # their rows have any distance
ANY_STRIDES = {(quantise_rows, "x"), (scale, "factor")}


def each_tensor(arguments):
    """The name of each tensor, and the arguments with a function's value in its place."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, lambda change, name=name, value=value: {**arguments, name: change(value)}
        elif isinstance(value, dict):
            for key, with_changed in each_tensor(value):
                yield key, lambda change, name=name, inner=with_changed: {**arguments, name: inner(change)}


def strided(tensor):
    """The same numbers, at every other place."""
    return torch.stack((tensor, tensor), -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("launcher", CASES, ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_a_tensor_with_gaps_is_refused_by_its_name(launcher):
    for name, with_changed in each_tensor(CASES[launcher]):
        if (launcher, name) in ANY_STRIDES:
            continue
        is_table = name in TABLES or (name == "out" and launcher is not ier_fwd) or launcher is scale
        with pytest.raises(AssertionError, match="unit stride|without gaps" if is_table else f"{name}: got strides"):
            launcher(**with_changed(strided))


class _OnAnotherGPU(torch.Tensor):
    is_cuda = True
    device = torch.device("cuda:1")

    def get_device(self):
        return 1


@pytest.mark.parametrize("launcher", CASES, ids=lambda x: f"{x.__module__}.{x.__name__}")
def test_tensors_on_another_gpu_are_refused(launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    arguments = CASES[launcher]
    for name, _ in each_tensor(arguments):
        if name in arguments:
            arguments = {**arguments, name: arguments[name].as_subclass(_OnAnotherGPU)}
    message = "got tensors on cuda:1, expected the current device, cuda:0; launch inside torch.cuda.device(1)"
    with pytest.raises(AssertionError, match=re.escape(message)):
        launcher(**arguments)


def test_every_launcher_is_tested_here():
    modules = [importlib.import_module(f"opd_kernels.{module.name}") for module in pkgutil.iter_modules(opd_kernels.__path__)]
    functions = [x for module in modules for x in vars(module).values() if inspect.isfunction(x)]
    assert {x for x in functions if "_kernel[(" in inspect.getsource(x)} == set(CASES)
