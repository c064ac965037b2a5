"""What the pages state as a list or a number, against the package itself.

  Compared: the worked example's table with its own code; names on the reference pages with the package's; messages of the
  errors' page with errors that are provoked here; the pictures with what docs/draw.py draws; the
  navigation and the links of README.md and CONTRIBUTING.md with the files.
  Run: make test ARGS=tests/docs/test_pages.py

Not here: whether code blocks run (test_code_blocks.py); links between pages, which `make docs` checks.
"""

import re
from dataclasses import fields

import pytest
import torch
import yaml
from torch import nn

import opd_ops
from docs import draw, photograph
from opd_ops import (
    JSD,
    ImportanceWeighted,
    LinearHead,
    Routed,
    SampledToken,
    Settings,
    TopKLogprobs,
    selective_opd_loss,
)
from opd_ops.diagnostics import token_heatmap
from opd_ops.divergences import DIVERGENCES
from opd_ops.selection.selectors import SELECTORS
from opd_ops.trainer.config import OPDConfig
from tests.docs.pages import ROOT, blocks, run
from tests.support.cases import logit_pair

DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"")


def page(name):
    return (DOCS / name).read_text()


def test_the_table_of_five_tokens_is_what_its_code_computes(capsys):
    text = page("concepts/teachability.md")
    names = run(DOCS / "concepts/teachability.md", blocks(text))
    rows = re.findall(r"^\| (\S+) \| [^|]* \| (\S+) \| (\S+) \| (\S+) \| (yes|no) \|$", text, re.MULTILINE)
    stats, scores, selected = names["stats"], names["scores"], names["selected"]
    numbers = zip(names["written"], stats.union_kl, stats.support_mass, scores, selected, strict=True)
    assert rows == [(w, f"{d:.2f}", f"{c:.2f}", f"{s:.2f}", "yes" if x else "no") for w, d, c, s, x in numbers]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("reference/selectors.md", [x for x in SELECTORS if not x.endswith("-released")]),
        ("reference/selectors.md", [x for x in SELECTORS if x.endswith("-released")]),
        ("reference/divergences.md", list(DIVERGENCES)),
        ("reference/api.md", [f"opd_ops.{x}" for x in opd_ops.__all__]),
    ],
)
def test_the_reference_names_everything(name, known):
    text = page(name)
    missing = [x for x in known if f"`{x}`" not in text and f"::: {x}\n" not in text]
    assert not missing


def test_the_page_of_metrics_names_all_of_them():
    s, u = (x.view(2, 9, 31) for x in logit_pair(18, 31))
    y, log_mu = torch.zeros(2, 9, dtype=torch.long), torch.full((2, 9), -3.0)
    ratio = SampledToken(ratio="tis", clip=1.0)
    values, ids = u.log_softmax(-1).topk(16)
    calls = [
        selective_opd_loss(s, u),
        selective_opd_loss(s, u, tokens=y, old_logprobs=log_mu, divergence=ratio),
        selective_opd_loss(s, u, tokens=y, old_logprobs=log_mu, divergence=ImportanceWeighted(JSD(0.5), "tis")),
        selective_opd_loss(s, TopKLogprobs(ids, values), divergence="tail_aware"),
        selective_opd_loss(s, Routed([u, u], torch.tensor([0, 0]))),
        selective_opd_loss(s, u, weighting="fire"),
    ]
    text = page("reference/metrics.md")
    known = {name for call in calls for name in call.metrics if not name.endswith("teacher_1") and "teacher_1" not in name}
    stems = {name.removesuffix("_sum") if name not in ("loss_sum", "loss_teacher_0_sum") else name for name in known}
    assert not [name for name in stems if f"`{name}`" not in text]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))))
    assert named <= known


def _errors():
    s, u = (x.view(2, 12, 31) for x in logit_pair(24, 31))
    values, ids = u.log_softmax(-1).topk(16)
    listed = TopKLogprobs(ids, values)
    lora = nn.Linear(4, 31)
    lora.lora_A = nn.Linear(4, 2)
    return {
        "settings: got 'fractoin', an unknown name; did you mean 'fraction'?": lambda: Settings(fractoin=0.1),
        "selector: got 'foo', expected a callable or one of: ": lambda: Settings(selector="foo"),
        "mask: got shape (2, 12), expected (2, 11)": lambda: selective_opd_loss(s[:, 1:], u[:, 1:], mask=torch.ones(2, 12)),
        "LinearHead.weight: got a module": lambda: LinearHead(torch.ones(2, 4), nn.Linear(4, 31)),
        "a LoRA-wrapped head": lambda: LinearHead.from_module(torch.ones(2, 4), lora),
        "divergence: got 'reverse_kl', which TopKLogprobs cannot give; expected one of: ": lambda: selective_opd_loss(
            s, listed, divergence="reverse_kl"
        ),
        "tokens: got None, but divergence 'sampled' reads the sampled token": lambda: selective_opd_loss(
            s, u, divergence="sampled"
        ),
        "inplace_backward: got True": lambda: selective_opd_loss(s, u, inplace_backward=True),
        "num_items_in_batch: got 0, but ": lambda: selective_opd_loss(s, u, num_items_in_batch=0),
        "got positions of shape": lambda: selective_opd_loss(s, u[:, 1:]),
        "expected those of the student": lambda: selective_opd_loss(s, u[:, 1:]),
        "fraction: got 1.5, expected a number in (0, 1]": lambda: Settings(fraction=1.5),
    }


@pytest.mark.parametrize("message", _errors())
def test_the_page_of_errors_quotes_them(message):
    with pytest.raises((ValueError, TypeError)) as error:
        _errors()[message]()
    assert message in str(error.value)
    assert message.strip() in page("reference/errors.md")


@pytest.mark.full
def test_the_pictures_are_what_the_script_draws(tmp_path, capsys):
    draw.main(tmp_path)
    capsys.readouterr()
    for name in draw.PICTURES:
        for scheme in draw.SCHEMES:
            file = f"{name}-{scheme}.svg"
            assert (tmp_path / file).read_text() == (DOCS / "images" / file).read_text(), file


def test_the_pictures_of_pages_exist_in_both_schemes_and_the_pages_have_both():
    files = [f"{name}-{scheme}.png" for name in photograph.SHOTS for scheme in draw.SCHEMES]
    assert not [file for file in files if not (DOCS / "images" / file).exists()]
    assert photograph.DARK in token_heatmap.STYLE


@pytest.mark.parametrize(
    ("name", "mark", "documented"),
    [("reference/settings.md", "settings", Settings), ("reference/trainer.md", "options", OPDConfig)],
)
def test_every_setting_and_option_has_a_sentence_for_its_table(name, mark, documented):
    assert all(field.metadata["help"] for field in fields(documented))
    assert f"<!-- table of {mark} -->" in page(name)


def test_the_navigation_has_every_page():
    def leaves(entry):
        values = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [leaf for value in values for leaf in leaves(value)]

    listed = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    files = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*files, "changelog.md"])  # docs/hooks.py adds the changelog


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_to_files(name):
    targets = [a or b for a, b in LINK.findall((ROOT / name).read_text())]
    assert not [target for target in targets if "://" not in target and not (ROOT / target).exists()]
