"""The report of the diagnostics: one page that needs no network, shows the numbers of the study, and marks what is selected.

  Compared: the page's spans with the selection; its tables with the study; its pictures' text with what must be labelled.
  Run: make test ARGS=tests/diagnostics/test_report.py

Not here: the numbers (test_diagnostics.py), a whole run (test_inspect.py).
"""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch

from opd_ops.diagnostics import Contexts, plots, study
from opd_ops.diagnostics.report import render
from opd_ops.diagnostics.token_heatmap import MOST_ROLLOUTS
from tests.support.diagnostics_cases import frozen_contexts


@pytest.fixture(scope="module")
def contexts():
    return frozen_contexts(length=15)


@pytest.fixture(scope="module")
def got(contexts):
    return study(contexts, ["divergence", "teachability", "entropy"], [0.2, 0.05], resamples=100)


@pytest.fixture(scope="module")
def page(contexts, got):
    return render(contexts, got, {"student": "<i>one</i>"})


class _Page(HTMLParser):
    """The token spans, the cells of tables, the texts of pictures, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.spans, self.rows, self.pictures, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "data-hover" in attributes:
            self.spans.append(("sel" in attributes["class"].split(), attributes["data-hover"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "svg":
            self.pictures.append("")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "svg" in self.open and "style" not in self.open:
            self.pictures[-1] += data


def test_page_needs_no_network_and_is_closed(page):
    assert not re.search(r'https?:|src=|<link|@import|url\((?!#)|href="(?!#|data:)', page)
    assert not _Page(page).open
    assert len(_Page(page).pictures) == 4


def test_page_escapes_what_came_from_outside_and_counts_what_it_left_out(contexts):
    after = contexts.after_forward_kl.clone()
    after[0, 0] = torch.inf
    fewer = dataclasses.replace(contexts, after_forward_kl=after)
    page = render(fewer, study(fewer, {"<own>": lambda stats: stats.reverse_kl}, [0.2], resamples=5), {"<dt>": "a & <u>"})
    for raw in ("<own>", "<dt><dt>", "<u>", "question <0>", " a&b", "<b>×", "<b>&nbsp;", '""q""'):
        assert raw not in page
    assert page.count("</script>") == 1
    for shown in ("&lt;own&gt;", "a &amp; &lt;u&gt;", "question &lt;0&gt;", "␣a&amp;b", "line↵break"):
        assert shown in page
    assert "and 1 of infinite KL left out" in page
    assert "gain G: 0.000 nats" in _Page(page).spans[0][1]


def test_page_isolates_every_text_from_outside(contexts):
    text = "\u05d0\u05d1\u202e(1)\u2069\u202d"  # Hebrew, and what would turn around the words after it
    shown = "\u05d0\u05d1⟨U+202E⟩(1)⟨U+2069⟩⟨U+202D⟩"
    named = dataclasses.replace(
        contexts, tokens=[[text] * len(row) for row in contexts.tokens], prompts=[text] * len(contexts.prompts)
    )
    named = dataclasses.replace(named, clusters=torch.arange(len(named.prompts)))
    got = study(named, {text: lambda stats: stats.union_kl}, [0.2], resamples=5)
    page = render(named, got, {text: text})
    for control in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067":
        assert control not in page
    assert page.count("\u2068") == page.count("\u2069") >= len(_Page(page).spans)
    body = re.sub(r' data-hover="[^"]*"', "", page)  # each label of a picture is a text of its own
    body = re.sub(r"<svg.*?</svg>", "", body, flags=re.S)
    before = [body[max(0, place.start() - 30) : place.start()] for place in re.finditer(re.escape(shown), body)]
    assert len(before) > len(_Page(page).spans) + MOST_ROLLOUTS
    for words in before:
        assert words.endswith(("<bdi>", "<bdi><code>")) or re.search(r'style="--s:[\d.]+">$', words)


def test_page_marks_exactly_the_selected_tokens(contexts, got, page):
    spans = _Page(page).spans
    shown = torch.zeros_like(contexts.measured)
    shown[:MOST_ROLLOUTS] = contexts.measured[:MOST_ROLLOUTS]
    assert [marked for marked, _ in spans] == got.shown.selected[shown].tolist()
    assert all(("SELECTED by \u2068divergence\u2069, 20 %" in hover) == marked for marked, hover in spans)
    gains = (contexts.before.forward_kl - contexts.after_forward_kl)[shown].tolist()
    assert [hover.split("\n")[-1] for _, hover in spans] == [f"gain G: {g:.3f} nats" for g in gains]


def test_page_shows_every_number_of_the_study(got, page):
    rows = _Page(page).rows
    for row in got.gains:
        (cells,) = [cells for cells in rows if cells[:2] == [row.selector, f"{100 * row.fraction:g} %"]]
        gain, relative = row.gain, row.relative_gain
        assert cells[2] == str(row.n_selected)
        assert cells[3].split() == f"{gain.value:.3f} {gain.low:.3f} … {gain.high:.3f}".split()
        assert cells[4].split() == f"{relative.value:.3f} {relative.low:.3f} … {relative.high:.3f}".split()
        assert cells[5] == f"{row.kl_before:.3f}"
    for name, x in (("teachability D·C", got.regression.teachability), ("R²", got.regression.r_squared)):
        assert [name, f"{x.value:.3f} {x.low:.3f} … {x.high:.3f}"] in rows
    for q in got.quadrants.quadrants:
        (cells,) = [cells for cells in rows if cells[0] == q.name]
        assert cells[2:5] == [str(q.n), f"{100 * q.share_of_tokens:.1f} %", f"{100 * q.share_of_kl:.1f} %"]
        assert f"×{q.frequent[0][1]}" in cells[6]


def test_pictures_are_labelled_and_take_the_pages_colour(page):
    gains, regression, quadrants, distributions = _Page(page).pictures
    labels = ("mean gain, nats per token", "best 5 % of the tokens", "best 20 % of the tokens", "teachability", "divergence")
    assert all(label in gains for label in labels)
    assert "standardised coefficient" in regression
    labels = ("Q1", "Q2", "Q3", "Q4", "student entropy, nats", "reverse KL(student‖teacher), nats", "tokens", "0.1")
    assert all(label in quadrants for label in labels)
    assert all(label in distributions for label in ("before", "after", "support mass C", "entropy, nats"))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "currentColor" in drawn
    assert "#000000" not in drawn.replace("fill: #000000; stroke", "")  # black would vanish in a dark scheme
    assert "#010203" not in drawn


def test_pictures_are_repeatable(contexts, got, page):
    assert plots.quadrant_map(contexts, got.quadrants) in page
    assert plots.gains(got) in page


def test_page_without_a_trained_student_says_so():
    bare = frozen_contexts(4, 8, trained=False)
    page = render(bare, study(bare, ["tip"], [0.1]), {})
    assert "There is no trained student, so no gain" in page
    assert "Teachability against incompatibility" not in page
    assert len(_Page(page).pictures) == 2
    assert "gain G" not in "".join(hover for _, hover in _Page(page).spans)


def test_page_of_equal_models_and_of_one_token_still_opens(contexts):
    one = frozen_contexts(1, 2, trained=False)
    assert "<svg" in render(one, study(one, ["entropy"], [1.0]), {})
    before = contexts.before
    zero = torch.zeros_like(before.forward_kl)
    equal = before._replace(reverse_kl=zero, forward_kl=zero, union_kl=zero)
    same = Contexts(equal, zero, contexts.tokens, contexts.prompts)
    page = render(same, study(same, ["teachability"], [0.1], resamples=20), {})
    assert "teachability is the same at all" in page
    assert "nan" not in "".join(cell for row in _Page(page).rows for cell in row)
