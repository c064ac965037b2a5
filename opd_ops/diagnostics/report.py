"""The report: one HTML page with the numbers, the plots and the tokens of a study. It needs no network.

  gains by selector, regression, quadrants, distributions, heat maps, settings; each with a paragraph on how to read it.

Not here: the numbers (study.py), the plots (plots.py), the tokens' style and script (token_heatmap.py), models (cli.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from opd_ops.diagnostics import plots, token_heatmap
from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.intervals import Interval
from opd_ops.diagnostics.study import Study


def render(contexts: Contexts, study: Study, settings: Mapping[str, str]) -> str:
    """The whole page. `settings`: values of settings by name. Needs matplotlib."""
    facts = {
        "answers": f"{study.n_contexts} to {study.n_prompts} prompts",
        "tokens": f"{study.n_positions:,}" + (f", and {study.n_left_out} of infinite KL left out" if study.n_left_out else ""),
        "intervals": f"95 %, {study.resamples} resamples of the prompts, seed {study.seed}" if study.gains else "none",
        **settings,
    }
    sections = (
        _gains(study),
        _regression(study),
        _quadrants(contexts, study),
        _distributions(contexts),
        _tokens(contexts, study),
    )
    return _PAGE.format(
        style=token_heatmap.STYLE + _STYLE,
        facts=token_heatmap.facts(facts),
        sections="".join(sections),
        words=token_heatmap.WORDS,
        card=token_heatmap.CARD,
        script=token_heatmap.SCRIPT,
    )


def _gains(study: Study) -> str:
    if study.gains is None:
        return _section(
            "Gains by selector",
            "There is no trained student, so no gain: a gain is KL(teacher‖student) before minus after, at the same tokens. "
            "Train the student on whatever selection and give it as well, to see which tokens its training helped.",
        )
    all_tokens, *selected = study.gains
    ordered = [all_tokens, *sorted(selected, key=lambda row: row.fraction)]
    rows = [
        (
            token_heatmap.isolated(row.selector),
            f"{100 * row.fraction:g} %",
            f"{row.n_selected:,}",
            _number(row.gain),
            _number(row.relative_gain),
            f"{row.kl_before:.3f}",
        )
        for row in ordered
    ]
    heads = ("selector", "share", "tokens", "mean gain, nats", "mean relative gain", "mean KL before, nats")
    return _section(
        "Gains by selector",
        "G = KL(teacher‖student) before training minus after, at the same tokens of frozen answers. A dot is the mean of G "
        "over the tokens that a selector ranks highest by what was known <i>before</i> training; more is better, and a dot "
        "right of the dashed line beats the average token. Bars are 95 % bootstrap intervals over prompts (the selection "
        "made once, on all answers); two bars that overlap widely say that these prompts cannot tell the two apart. A dash "
        "in the table: the tokens come from too few prompts for an interval. The relative gain is G / KL before, cut to its "
        "own 1 % and 99 % quantiles. The student was trained on one selection, whose tokens it knows best: compare with that "
        "in mind.",
        plots.gains(study),
        _table(heads, rows, numbers_from=1),
    )


def _regression(study: Study) -> str:
    if study.gains is None:
        return ""
    title = "Teachability against incompatibility"
    if study.regression is None:
        return _section(title, f"Not on these tokens. {token_heatmap.isolated(study.regression_refused or '')}")
    regression = study.regression
    rows = [
        ("teachability D·C", _number(regression.teachability)),
        ("incompatibility D·(1 − C)", _number(regression.incompatibility)),
        ("R²", _number(regression.r_squared)),
    ]
    return _section(
        title,
        "Least squares of the gain on both at once, every column standardised. D, the disagreement, and C, the share of the "
        "teacher's belief on what the student already considers, are quantile-normalised. A coefficient says by how many of "
        "its standard deviations the gain rises with one of the score's. If disagreement within reach is what is learned, the "
        "first is the larger. Where R² is small, most of the gain comes from elsewhere.",
        plots.regression(study),
        _table(("column", "standardised coefficient"), rows, numbers_from=1),
    )


def _quadrants(contexts: Contexts, study: Study) -> str:
    quadrants = study.quadrants
    with_gains = study.gains is not None
    rows = [
        (
            q.name,
            q.meaning,
            f"{q.n:,}",
            _percent(q.share_of_tokens),
            _percent(q.share_of_kl),
            *((_number(q.gain),) if q.gain is not None else ()),
            " ".join(f"{_visible(text)}&nbsp;×{n}" for text, n in q.frequent),
        )
        for q in quadrants.quadrants
    ]
    gain = ("mean gain, nats",) if with_gains else ()
    heads = ("", "the student is", "tokens", "share of tokens", "share of KL", *gain, "most frequent")
    return _section(
        "Quadrants",
        "Each token by how unsure the student is and how far it is from the teacher; the dashed lines are the medians "
        f"({quadrants.entropy_median:.3f} and {quadrants.kl_median:.3f} nats). Both axes are logarithmic, and values below "
        f"{plots.LEAST_SHOWN:g} nats lie on the edge. In Q1 the student is unsure and disagrees; in Q3 it is sure and "
        "disagrees, which entropy alone never selects; in Q4 there is little to teach. Q1 and Q3 hold most of the KL by "
        "construction; how much of it is in Q3 says what a selector by entropy would miss.",
        plots.quadrant_map(contexts, quadrants),
        _table(heads, rows, numbers_from=2, numbers_to=5 + len(gain)),
    )


def _distributions(contexts: Contexts) -> str:
    return _section(
        "Distributions over tokens",
        "Dashed lines are medians; divergences and entropies are on logarithmic axes, and what is below "
        f"{plots.LEAST_SHOWN:g} nats is counted in the first bar. A long right tail of KL beside a small median is what makes "
        "selection cheap: few tokens carry the signal. Support mass near 1 means that the teacher's choice is within the "
        "student's top K; tokens near 0 disagree outside its reach.",
        plots.distributions(contexts),
    )


def _tokens(contexts: Contexts, study: Study) -> str:
    shown, gain = study.shown, None
    if contexts.after_forward_kl is not None:
        gain = torch.where(contexts.measured, contexts.before.forward_kl - contexts.after_forward_kl, 0)
    share = f"{100 * shown.fraction:g} %"
    mark = f"SELECTED by {token_heatmap.isolated_in_text(shown.selector)}, {share}"
    answers = token_heatmap.Answers(contexts.prompts, contexts.tokens, shown.scores, shown.selected, contexts.stats, mark, gain)
    tokens, scale = token_heatmap.heat_map(answers)
    return _section(
        "The tokens",
        f"The frozen answers: the stronger the shade, the higher a token's score by {token_heatmap.isolated(shown.selector)}; "
        f"a heavy outline marks the best {share}, which a loss would train on. Hover over a token, or move to it with the Tab "
        "key, for its numbers.",
        f'<p class="sum"><span>{int(shown.selected.sum()):,} of {study.n_positions:,} tokens selected</span>{scale}</p>',
        tokens,
    )


def _section(title: str, how_to_read: str, *parts: str) -> str:
    figures = "".join(f"<figure>{part}</figure>" if part.startswith("<svg") else part for part in parts)
    return f'<section><h2>{title}</h2><p class="how">{how_to_read}</p>{figures}</section>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int, numbers_to: int | None = None) -> str:
    """A table of cells that are already HTML; columns in [numbers_from, numbers_to) are aligned as numbers."""
    number_columns = range(len(heads))[numbers_from:numbers_to]

    def cells(tag: str, row: Sequence[str]) -> str:
        classes = (' class="n"' if i in number_columns else "" for i in range(len(row)))
        return "".join(f"<{tag}{class_}>{cell}</{tag}>" for class_, cell in zip(classes, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", heads)}</tr>{body}</table></div>'


def _number(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    bounds = "–" if math.isnan(interval.low) else f"{interval.low:.3f} … {interval.high:.3f}"
    return f"{interval.value:.3f} <small>{bounds}</small>"


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def _visible(text: str) -> str:
    """A token's text with visible spaces and line breaks."""
    return f"<bdi><code>{token_heatmap.readable(text).replace(' ', '␣').replace(chr(10), '↵')}</code></bdi>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What selection does</title><style>{style}</style></head><body>
<h1>What selection does</h1>
<dl>{facts}</dl>
{sections}
{words}
{card}<script>{script}</script></body></html>
"""

_STYLE = """
figure{margin:12px 0}figure svg{display:block;width:100%;height:auto;color:var(--fg)}
figure svg text{font-family:system-ui,sans-serif}
.how{max-width:85ch}.wide{overflow-x:auto}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td small{color:var(--dim);margin-left:6px}
code{font:13px ui-monospace,monospace;padding:0 3px;border:1px solid var(--line);border-radius:3px;white-space:nowrap}
"""
