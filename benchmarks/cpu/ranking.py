"""How well cheaper rankings choose: the set that each selects against the exact one, on a real model's hidden states.

  overlap = |chosen and exact| / |exact|;  score kept = sum of exact scores over the chosen / over the exact set
  Student SmolLM2-135M-Instruct, teacher the same weights told to answer like a pirate; the student's own sampled answers;
  teachability (arXiv 2605.26844, eq. 12), K = 16.
  bf16 logits      hidden states, weights and matmul in fp32, each logit rounded to bf16
  fp8              hidden states and weights in e4m3 with a scale per row, dequantised, fp32 matmul, logits rounded to bf16
  fp8, shortlist   the best 2 n of these ranked again by exact statistics, as selective_opd_loss(score_dtype="float8") does
  rollout          the student's statistics as recorded while it sampled (a cached step at a time), teacher exact
  rollout, bf16    the same from a bf16 copy of the student reading the same tokens, as an inference engine has them

Run: python -m benchmarks.cpu.ranking [--answers 96 --tokens 48 --out DIR]: ranking.{json,md} under benchmarks/results.
Not here: what the rankings cost (`make gpu`, compare.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cpu.environment import describe_environment
from examples import smollm2
from examples.prompts import HELD_OUT, INSTRUCTION, TRAINING
from opd_ops import Float8Rows, LinearHead, RolloutRecorder, StudentStats, TokenStats, score_positions, select_positions
from opd_ops.selection.budget import SHORTLIST
from opd_ops.selection.selectors import teachability
from opd_ops.trainer.rollouts import head_over, sample

ROOT = Path(__file__).parents[2]
FRACTIONS = (0.05, 0.1, 0.2)


class Inputs(NamedTuple):
    """Both heads over the same tokens, and what the rollouts recorded of the student."""

    student: LinearHead  # hidden (N, D), valid positions alone
    teacher: LinearHead
    recorded: StudentStats
    recorded_bf16: StudentStats


@torch.no_grad()
def real_inputs(n_answers: int, n_tokens: int, seed: int = 0) -> Inputs:
    model, tokenizer = smollm2.load_model()
    questions = [*TRAINING, *HELD_OUT][:n_answers]
    recorder = RolloutRecorder()
    rollouts = sample(model, tokenizer, questions, max_new_tokens=n_tokens, seed=seed, logits_processor=[recorder])
    student, teacher = (head_over(model, tokenizer, rollouts, system=told) for told in (None, INSTRUCTION))
    rounded = head_over(copy.deepcopy(model).bfloat16(), tokenizer, rollouts)
    mask = rollouts.mask
    in_bf16 = StudentStats.from_logits(rounded.hidden[mask] @ rounded.weight.T)
    stats, length = recorder.stats(), mask.shape[1]
    columns = (x[:, :length][mask] for x in (stats.logsumexp, stats.entropy, stats.ids, stats.logprobs))
    heads = [LinearHead(head.hidden[mask], head.weight) for head in (student, teacher)]
    return Inputs(heads[0], heads[1], StudentStats(*columns), in_bf16)


def bf16_logits(head: LinearHead) -> Tensor:
    return (head.hidden @ head.weight.T).bfloat16()


def in_float8(head: LinearHead) -> LinearHead:
    hidden, weight = (Float8Rows.of(x).dequantised(len(x)) for x in (head.hidden, head.weight))
    return LinearHead(hidden, weight)


@torch.no_grad()
def rankings(inputs: Inputs, fraction: float) -> dict[str, Tensor]:
    """The scores of each ranking, (N,); -inf: not a candidate."""
    student, teacher, recorded, recorded_bf16 = inputs
    exact, exact_stats = score_positions(student, teacher)
    eight, eight_stats = score_positions(bf16_logits(in_float8(student)), bf16_logits(in_float8(teacher)))
    shortlist = select_positions(eight, fraction=min(1.0, SHORTLIST * fraction))
    again: TokenStats = eight_stats.replaced(shortlist, exact_stats.take(shortlist.nonzero().squeeze(1)))
    return {
        "exact": exact,
        "bf16 logits": score_positions(bf16_logits(student), bf16_logits(teacher))[0],
        "fp8": eight,
        "fp8, shortlist": torch.where(shortlist, teachability(again), -torch.inf),
        "rollout": score_positions(student, teacher, student_stats=recorded)[0],
        "rollout, bf16": score_positions(student, teacher, student_stats=recorded_bf16)[0],
    }


def compare(inputs: Inputs) -> list[dict[str, Any]]:
    """One row per ranking and fraction."""
    rows = []
    for fraction in FRACTIONS:
        scored = rankings(inputs, fraction)
        exact = select_positions(scored["exact"], fraction=fraction)
        for name, scores in scored.items():
            chosen = select_positions(scores, fraction=fraction)
            kept = scored["exact"][chosen].sum() / scored["exact"][exact].sum()
            rows.append(
                {
                    "ranking": name,
                    "fraction": fraction,
                    "selected": int(chosen.sum()),
                    "overlap": float((chosen & exact).sum() / exact.sum()),
                    "score_kept": float(kept),
                }
            )
    return rows


def differences(inputs: Inputs) -> list[dict[str, Any]]:
    """How far the rollout's statistics are from those of the training pass, nats."""
    _, exact = score_positions(inputs.student, inputs.teacher)
    rows = []
    for name, known in (("rollout", inputs.recorded), ("rollout, bf16", inputs.recorded_bf16)):
        _, stats = score_positions(inputs.student, inputs.teacher, student_stats=known)
        for column in ("student_entropy", "support_mass", "union_kl"):
            error = (getattr(stats, column) - getattr(exact, column)).abs()
            rows.append(
                {
                    "ranking": name,
                    "column": column,
                    "median": float(error.median()),
                    "largest": float(error.max()),
                    "scale": float(getattr(exact, column).abs().median()),
                }
            )
    return rows


def page(results: dict[str, Any]) -> str:
    environment = results["environment"]
    lines = [
        "# What cheaper rankings select",
        "",
        f"`{results['command']}` on {environment['cpu']}, commit {environment['commit'][:10]}, {environment['date']}.",
        f"SmolLM2-135M-Instruct, {results['positions']} sampled tokens; "
        f"overlap with the exact selection (share of score kept).",
        "",
        "| ranking | " + " | ".join(f"{fraction:.0%}" for fraction in FRACTIONS) + " |",
        "|---|" + "---|" * len(FRACTIONS),
    ]
    for name in dict.fromkeys(row["ranking"] for row in results["selection"]):
        cells = (f"{x['overlap']:.3f} ({x['score_kept']:.3f})" for x in results["selection"] if x["ranking"] == name)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| the student's statistics from | column | median error | largest | median of the column |",
        "|---|---|---|---|---|",
    ]
    for row in results["differences"]:
        cells = f"{row['median']:.1e} | {row['largest']:.1e} | {row['scale']:.2g}"
        lines.append(f"| {row['ranking']} | {row['column']} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.ranking", description="What cheaper rankings select.")
    parser.add_argument("--answers", type=int, default=64, help="sampled answers (default 64)")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer (default 48)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of ranking.{json,md}")
    options = parser.parse_args(arguments)
    inputs = real_inputs(options.answers, options.tokens)
    results = {
        "environment": describe_environment(ROOT),
        "command": " ".join(["python -m benchmarks.cpu.ranking", *(sys.argv[1:] if arguments is None else arguments)]),
        "positions": len(inputs.student.hidden),
        "selection": compare(inputs),
        "differences": differences(inputs),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ranking.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "ranking.md").write_text(page(results))
    print(page(results))
    return results


if __name__ == "__main__":
    main()
