"""Token heat maps: sampled tokens shaded by score; selected tokens have an outline; statistics appear on hover.

  shade of a token = (score - lowest) / (highest - lowest) over the finite scores of its batch
  The statistics are the columns of TokenStats, arXiv 2605.26844 eqs. 9, 10; the page defines each of them.

`render` makes a whole page of training steps, `heat_map` the tokens of one batch for another page.
The page is one file, with its style and script inside: it needs no network.
Text from outside (questions, tokens, settings, names) may be written left to right or right to left; it is isolated, so that it
does not change the direction of the page's own words.
Not here: the statistics (selection/stats.py), a training loop that writes such a page (examples/prompt_distillation.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

from opd_ops.call.reduce import SelectiveOPDOutput
from opd_ops.selection.stats import TokenStats

MOST_ROLLOUTS = 8  # shown per batch

# Signs for characters that open or close a text direction: a text that closes more than it opens would end its isolation.
SIGNS = {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class ShownStep(NamedTuple):
    """One training step of the page; row b, column i of `output` belongs to token i of completion b."""

    title: str
    questions: Sequence[str]
    tokens: Sequence[Sequence[str]]  # the text of each valid sampled token
    output: SelectiveOPDOutput  # positions (questions, longest completion)


class Answers(NamedTuple):
    """The tokens of a batch, and the data for their shade, outline and hover text; every tensor is (B, L)."""

    questions: Sequence[str]
    tokens: Sequence[Sequence[str]]
    scores: Tensor
    selected: Tensor
    stats: TokenStats
    mark: str  # the hover text's line about a selected token
    gain: Tensor | None = None  # nats; one more line of the hover text


def render(
    batches: Sequence[ShownStep], settings: Mapping[str, str], answers: Sequence[Mapping[str, str]], outcome: str, models: str
) -> str:
    """The whole page of training steps.

    Args:
        settings: values of settings by name.
        answers: one mapping from heading to text per held-out question.
        outcome: the result of the run, in one sentence.
        models: the difference of student and teacher, as a clause: "it has no instruction, its teacher has one".
    """
    sections = "".join(_section(batch) for batch in batches)
    parts = {"facts": facts(settings), "sections": sections, "answers": _table(answers), "models": isolated(models)}
    parts["outcome"] = isolated(outcome.replace("->", "→"))
    return _PAGE.format(style=STYLE, script=SCRIPT, words=WORDS, card=CARD, **parts)


def readable(text: str) -> str:
    """Text from outside as HTML."""
    return escape(text.translate(SIGNS))


def isolated(text: str) -> str:
    """Text from outside as an HTML element with its own text direction, which does not change its neighbours'."""
    return f"<bdi>{readable(text)}</bdi>"


def isolated_in_text(text: str) -> str:
    """Text from outside inside plain text, isolated by Unicode's characters for that purpose."""
    return f"\u2068{text.translate(SIGNS)}\u2069"


def facts(settings: Mapping[str, str]) -> str:
    """The content of a definition list: settings by name."""
    return "".join(f"<div><dt>{isolated(name)}</dt><dd>{isolated(value)}</dd></div>" for name, value in settings.items())


def heat_map(answers: Answers) -> tuple[str, str]:
    """HTML of the first answers of a batch, and the scale of their shades; the page also needs STYLE, SCRIPT and CARD."""
    finite = answers.scores[answers.scores.isfinite()]
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
    shown = min(len(answers.tokens), MOST_ROLLOUTS)
    note = f"<p>The first {shown} of {len(answers.tokens)} answers are shown.</p>" if shown < len(answers.tokens) else ""
    rollouts = "".join(_rollout(answers, row, low, high) for row in range(shown))
    return note + rollouts, f'<span class="scale">shade: score {low:.2f} <i class="ramp"></i> {high:.2f}</span>'


def _section(batch: ShownStep) -> str:
    out = batch.output
    answers = Answers(batch.questions, batch.tokens, out.scores, out.selected, out.stats, "SELECTED: trained on")
    rollouts, scale = heat_map(answers)
    metrics = {name: value.item() for name, value in out.metrics.items()}
    return (
        f"<section><h2>{isolated(batch.title)}</h2>"
        f'<p class="sum"><span>{metrics["n_selected"]:.0f} of {metrics["n_valid"]:.0f} tokens selected</span>'
        f"<span>reverse KL: {metrics['kl_selected']:.2f} nats on the selected, {metrics['kl_all']:.2f} on all</span>"
        f"{scale}</p>{rollouts}</section>"
    )


def _rollout(answers: Answers, row: int, low: float, high: float) -> str:
    tokens = "".join(_token(answers, row, i, text, low, high) for i, text in enumerate(answers.tokens[row]))
    n = int(answers.selected[row].sum())
    return (
        f"<article><h3>{isolated(answers.questions[row])}<small>{n} of {len(answers.tokens[row])} selected</small></h3>"
        f'<p class="tokens" dir="auto">{tokens}</p></article>'
    )


def _token(answers: Answers, row: int, i: int, text: str, low: float, high: float) -> str:
    score, selected = answers.scores[row, i].item(), bool(answers.selected[row, i])
    shade = (score - low) / (high - low) if high > low and low <= score <= high else 0.0
    mark = answers.mark if selected else "not selected"
    hover = "\n".join((f"token {isolated_in_text(repr(text))}", mark, *_lines(answers, row, i)))
    # A line break is written as a sign before the break, so that its token is visible, shaded and outlined like any other.
    body = readable(text).replace("\n", "↵<br>")
    class_ = "t sel" if selected else "t"
    return f'<span class="{class_}" tabindex="0" style="--s:{shade:.3f}" data-hover="{escape(hover)}">{body}</span>'


def _lines(answers: Answers, row: int, i: int) -> list[str]:
    """The statistics of one position, one line each."""
    stats = answers.stats
    columns = {
        "student entropy": (stats.student_entropy, "nats"),
        "teacher entropy": (stats.teacher_entropy, "nats"),
        "reverse KL(student‖teacher)": (stats.reverse_kl, "nats"),
        "forward KL(teacher‖student)": (stats.forward_kl, "nats"),
        "support mass C": (stats.support_mass, ""),
        "union KL D": (stats.union_kl, "nats"),
    }
    if answers.gain is not None:
        columns["gain G"] = (answers.gain, "nats")
    lines = [f"score: {answers.scores[row, i].item():.3f}"]
    return lines + [f"{name}: {column[row, i].item():.3f} {unit}".rstrip() for name, (column, unit) in columns.items()]


def _table(answers: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{isolated(name)}</th>" for name in (answers[0] if answers else ()))
    rows = "".join("<tr>" + "".join(f"<td>{isolated(text)}</td>" for text in row.values()) + "</tr>" for row in answers)
    return f"<section><h2>Held-out questions, greedy answers</h2><table><tr>{head}</tr>{rows}</table></section>"


CARD = '<div id="card" role="status" hidden></div>'  # SCRIPT shows a token's hover text here

WORDS = """<section class="words"><h2>The numbers</h2>
<p>p is the student's distribution at that position, q the teacher's, both over the whole vocabulary; S and T are the ids of
their K largest logits. <b>Entropy</b>: −Σ p log p, −Σ q log q. <b>Reverse KL</b>: Σ p log(p/q), what the loss lowers unless
another divergence is set. <b>Forward KL</b>: Σ q log(q/p). <b>Support mass C</b>: Σ<sub>S</sub> q, the share of the teacher's
belief that lies on what the student already considers. <b>Union KL D</b>: KL(q‖p) with both renormalised on S ∪ T.
The teachability score is Norm(D)·Norm(C): the two disagree, and on tokens within the student's reach. Norm is fitted on
each batch, so scores of two batches are not comparable; the divergences are.</p></section>"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Selected tokens</title><style>{style}</style></head><body>
<h1>Which tokens were trained on</h1>
<p class="how"><b>How to read it.</b> Each span is one token that the student sampled; {models}.
<span class="t demo" style="--s:.9">The stronger the shade</span>, the higher the token's score; a
<span class="t sel demo" style="--s:.9">heavy outline</span> marks a selected token: the loss trains on those and on nothing
else. Hover over a token, or move to it with the Tab key, for its numbers.</p>
<p><b>What came of it.</b> {outcome}</p>
<dl>{facts}</dl>
{sections}{answers}
{words}
{card}<script>{script}</script></body></html>
"""

# `plaintext` isolates a token and takes its direction from its letters; dir="auto" takes the order of tokens from the answer's.
# Both colour schemes have a contrast of at least 4.5 : 1 between text and every shade; selection is a line, not only a colour.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1a1a;--dim:#595959;--line:#d0d0d0;--hot:#f59e0b;--ring:#1a1a1a;--card:#fff}
@media(prefers-color-scheme:dark){:root{--bg:#16181c;--fg:#ececec;--dim:#a8adb5;--line:#3a3f47;--hot:#a05008;--ring:#fff;
--card:#24272d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:24px;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:break-word}
h1,h2,h3,dt{overflow-wrap:anywhere}
section>table :is(td,th){overflow-wrap:anywhere;min-width:7em}
h1{font-size:26px;margin:0 0 8px}h2{font-size:19px;margin:28px 0 6px}
h3{font-size:15px;margin:0 0 2px}h3 small{font-weight:400;color:var(--dim);margin-left:10px}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:8px 18px;margin:16px 0;padding:12px 14px;
border:1px solid var(--line);border-radius:8px}
dt{font-size:12px;color:var(--dim)}dd{margin:0;font-size:14px;overflow-wrap:anywhere}
.sum{display:flex;flex-wrap:wrap;gap:4px 24px;margin:0 0 10px;font-size:14px;color:var(--dim)}
.scale{display:inline-flex;align-items:center;gap:8px}
.ramp{width:120px;height:12px;border:1px solid var(--line);background:linear-gradient(90deg,var(--bg),var(--hot))}
article{padding:10px 0;border-top:1px solid var(--line)}
.tokens{margin:0;font-size:17px;line-height:1.85;white-space:pre-wrap;overflow-wrap:anywhere}
.t{unicode-bidi:plaintext;padding:2px 0;border-radius:3px;cursor:default;
background:color-mix(in srgb,var(--hot) calc(var(--s)*100%),var(--bg))}
.sel{outline:2px solid var(--ring);font-weight:600;position:relative}
.tokens .t:hover,.tokens .t:focus{text-decoration:underline 2px}
.demo{padding:1px 4px}
#card{position:absolute;z-index:2;max-width:340px;padding:8px 12px;border:1px solid var(--ring);border-radius:6px;
background:var(--card);font:13px/1.5 ui-monospace,monospace;white-space:pre-wrap;pointer-events:none}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;vertical-align:top;padding:6px 10px;border:1px solid var(--line)}
.words p{font-size:14px;color:var(--dim)}
"""

SCRIPT = """
const card = document.getElementById("card");
function show(event) {
  const token = event.target.closest("[data-hover]");
  card.hidden = !token;
  if (!token) return;
  card.textContent = token.dataset.hover;
  const box = token.getClientRects()[0], page = document.documentElement;
  card.style.left = scrollX + Math.max(8, Math.min(box.left, page.clientWidth - card.offsetWidth - 8)) + "px";
  const below = box.bottom + card.offsetHeight + 12 < page.clientHeight;
  card.style.top = scrollY + (below ? box.bottom + 8 : box.top - card.offsetHeight - 8) + "px";
}
for (const name of ["mouseover", "focusin"]) document.addEventListener(name, show);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") card.hidden = true; });
"""
