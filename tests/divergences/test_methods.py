"""Every method of the documentation's table, run as it is written there.

  Compared with NumPy: the rules that weight or drop whole responses, or weight by the place in a response.
  Run: make test ARGS=tests/divergences/test_methods.py
Not here: what the losses are (test_divergences.py, test_top_k.py, test_sampled.py), what selectors score (tests/selection/).
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import opd_ops
from opd_ops import LocalSupport, TailAware, TopK, score_positions
from tests.divergences.test_divergences import draw_tokens
from tests.support.cases import generator, leaf, logit_pair

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "methods.md").read_text()
ROWS = re.findall(r"^\| (.*?) \| `(loss\(.*?\))`", PAGE, re.MULTILINE)


SHAPE, VOCAB = (5, 9), 131


def names(mask=None):
    s, u = (x.view(*SHAPE, VOCAB) for x in logit_pair(45, VOCAB, scale=2.0, seed=4, dtype=torch.float64))
    y = draw_tokens(s.flatten(0, 1)).view(SHAPE)
    shifts = (0.3 * torch.randn(*SHAPE, VOCAB, generator=generator(i)) for i in range(3))
    reference, maths, code = (u + shift for shift in shifts)
    stats = score_positions(s, u, mask=mask, tokens=y, selector="log-ratio")[1]
    return {name: getattr(opd_ops, name) for name in opd_ops.__all__} | {
        "loss": partial(opd_ops.selective_opd_loss, mask=mask),
        "torch": torch,
        "F": F,
        "student": leaf(s),
        "teacher": u,
        "reference": reference,
        "maths": maths,
        "code": code,
        "y": y,
        "log_mu": s.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) - 0.1,
        "stats": stats,
        "log_p": stats.student_logprob.sum(-1) / stats.valid.sum(-1),
        "log_q": stats.teacher_logprob.sum(-1) / stats.valid.sum(-1),
        "passed": torch.tensor([0.25, 0.25, 0.5, 0.875, 0.125]),
        "right": torch.tensor([True, False, False, True, False]),
        "index": torch.tensor([0, 1, 0, 1, 1]),
        "id_map": opd_ops.IdMap(torch.where(torch.arange(VOCAB) % 5 == 0, -1, VOCAB - 1 - torch.arange(VOCAB))),
        "places": torch.where(torch.arange(45) % 4 == 0, -1, torch.arange(45) % 9).view(SHAPE),
    }


def result_of(method, mask=None):
    """The result of a method's line and the student's gradient, and log p(y), log q(y), p and one-hot y in NumPy."""
    known = names(mask)
    (line,) = [line for name, line in ROWS if name.startswith(method)]
    out = eval(line, known)
    out.loss.backward()
    p, q = (known[side].detach().softmax(-1).numpy() for side in ("student", "teacher"))
    is_y = np.eye(VOCAB)[known["y"].numpy()]
    return out, known["student"].grad.numpy(), *(np.log((x * is_y).sum(-1)) for x in (p, q)), p, is_y


def assert_weighted(out, gradient, advantage, log_p, p, is_y):
    """The loss is -sum A log p(y), A (...) with its weights and denominator; the gradient -A (e_y - p)."""
    assert out.loss.item() == pytest.approx(-(advantage * log_p).sum(), rel=1e-6)
    want = -advantage[..., None] * (is_y - p)
    assert np.linalg.norm(gradient - want) < 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize(("method", "line"), ROWS, ids=[method.split(",")[0] for method, _ in ROWS])
def test_each_method_of_the_documentation_is_one_line(method, line):
    known = names()
    out = eval(line, known)
    out.loss.backward()
    gradient = known["student"].grad
    assert out.loss.isfinite()
    assert gradient[out.selected].norm() > 0
    assert not gradient[~out.selected].any()


LENGTHS = np.array([9, 2, 4, 7, 6])
RAGGED = np.arange(SHAPE[1]) < LENGTHS[:, None]


def test_fire_drops_the_responses_of_the_lowest_fifth_of_mean_log_q():
    out, _, _, log_q, _, _ = result_of("the same, without the responses", torch.from_numpy(RAGGED))
    mean = (log_q * RAGGED).sum(1) / LENGTHS
    assert np.argmin(mean) != np.argmin(log_q.mean(1))  # masked positions do not count
    assert np.array_equal(out.selected.numpy(), RAGGED & (mean >= np.percentile(mean, 20))[:, None])


def test_paced_weights_a_prompt_by_how_often_it_is_passed():
    out, gradient, log_p, log_q, p, is_y = result_of("PACED")
    passed = names()["passed"].double().numpy()[:, None]
    assert_weighted(out, gradient, passed * (1 - passed) * (log_q - log_p) / 45, log_p, p, is_y)


def test_scope_weights_right_answers_by_the_students_perplexity_and_wrong_ones_by_the_teachers():
    right = names()["right"].numpy()
    for method, is_right in (("SCOPE", False), ("the right ones", True)):
        out, gradient, log_p, log_q, p, is_y = result_of(method, torch.from_numpy(RAGGED))
        mean_p, mean_q = ((x * RAGGED).sum(1) / LENGTHS for x in (log_p, log_q))
        w = np.where(right == is_right, 1 / np.exp(mean_p) if is_right else np.exp(mean_q), 0)
        advantage = 1 if is_right else log_q - log_p
        assert_weighted(out, gradient, RAGGED * (w / w.sum())[:, None] * advantage, log_p, p, is_y)


def test_the_second_form_of_iw_falls_by_a_cosine_along_a_response():
    out, gradient, log_p, log_q, p, is_y = result_of("its second form", torch.from_numpy(RAGGED))
    u = np.arange(SHAPE[1]) / (LENGTHS[:, None] - 1)
    w = RAGGED * (0.3 + 0.7 * (1 + np.cos(np.pi * u)) / 2)
    assert w[0, 0] == w[1, 0] == 1
    assert w[0, 8] == w[1, 1] == 0.3
    assert_weighted(out, gradient, w * (log_q - log_p) / RAGGED.sum(), log_p, p, is_y)


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
