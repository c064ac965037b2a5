"""Every method of the documentation's table, run as it is written there.

  Run: make test ARGS=tests/divergences/test_methods.py
Not here: what the losses are (test_divergences.py, test_top_k.py, test_sampled.py), what selectors score (tests/selection/).
"""

import re
from pathlib import Path

import pytest
import torch

import opd_ops
from opd_ops import LocalSupport, TailAware, TopK, score_positions
from tests.divergences.test_divergences import draw_tokens
from tests.support.cases import generator, leaf, logit_pair

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text()
ROWS = re.findall(r"^\| (.*?) \| `(loss\(.*?\))`", PAGE, re.MULTILINE)


def names():
    s, u = (x.view(2, 9, 131) for x in logit_pair(18, 131, scale=2.0, seed=4))
    y = draw_tokens(s.flatten(0, 1)).view(2, 9)
    shifts = (0.3 * torch.randn(2, 9, 131, generator=generator(i)) for i in range(3))
    reference, maths, code = (u + shift for shift in shifts)
    return {name: getattr(opd_ops, name) for name in opd_ops.__all__} | {
        "loss": opd_ops.selective_opd_loss,
        "torch": torch,
        "student": leaf(s),
        "teacher": u,
        "reference": reference,
        "maths": maths,
        "code": code,
        "y": y,
        "log_mu": s.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) - 0.1,
        "stats": score_positions(s, u)[1],
        "index": torch.tensor([0, 1]),
        "id_map": opd_ops.IdMap(torch.where(torch.arange(131) % 5 == 0, -1, 130 - torch.arange(131))),
        "places": torch.where(torch.arange(18) % 4 == 0, -1, torch.arange(18) % 9).view(2, 9),
        "w": 0.5 + torch.rand(2, 9, generator=generator(6)),
    }


@pytest.mark.parametrize(("method", "line"), ROWS, ids=[method.split(",")[0] for method, _ in ROWS])
def test_each_method_of_the_documentation_is_one_line(method, line):
    known = names()
    out = eval(line, known)
    out.loss.backward()
    gradient = known["student"].grad
    assert out.loss.isfinite()
    assert gradient[out.selected].norm() > 0
    assert not gradient[~out.selected].any()


def test_the_table_has_every_method_of_the_family():
    text = " ".join(method for method, _ in ROWS)
    families = (
        "Rethinking OPD, MOPD, LSM, SC-TA, EMA-PG, NeMo-RL #3584, verl #7855, SDPO, DistiLLM, OPSD, Tinker, slime, SkyRL, "
        "prime-rl, PowerOPD, soft-log, DIAL, IER, sparse OPD, SelecTKD, IW-OPD, FiRe, PACED, SCOPE, G-OPD, W2S-OPD, "
        "strict cross-tokenizer"
    )
    missing = [name for name in families.split(", ") if name not in text]
    assert not missing
    assert (LocalSupport(), TailAware()) == (TopK("reverse", "teacher", "drop", 32), TopK("reverse", "teacher", "bucket", 16))
