"""How far the selectors agree: which tokens of one batch of a real model each of them selects.

  overlap of two selections A and B = |A and B| / |A or B|      (Jaccard: 1 the same tokens, 0 no common token)
  Two independent random selections of a share rho overlap by rho / (2 - rho): 0.03 at 5 %, 0.11 at 20 %.
  Student SmolLM2-135M-Instruct, teacher the same weights told to answer like a pirate: the demonstration's task; the student's
  own sampled answers, before any training.

Run: python -m benchmarks.cpu.overlap [--answers 64 --tokens 48 --out DIR]: overlap.json under benchmarks/results.
`python -m docs.draw` makes the picture of it.
Not here: what the selectors compute (opd_ops/selection/), which of them trains best (benchmarks/study/).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cpu.environment import describe_environment
from examples import smollm2
from examples.prompts import HELD_OUT, INSTRUCTION, TRAINING
from opd_ops import TokenStats, score_positions, select_positions
from opd_ops.selection.selectors import SELECTORS, Random
from opd_ops.trainer.rollouts import head_over, sample

ROOT = Path(__file__).parents[2]
FRACTIONS = (0.05, 0.2)
# Neighbours read the same statistic: first the student's entropy, then the disagreement of the models.
SHOWN = ("entropy", "teachability+entropy", "tip", "divergence-reverse-kl", "divergence", "teachability", "dial", "random")


@torch.no_grad()
def real_statistics(n_answers: int, n_tokens: int, seed: int = 0) -> TokenStats:
    """(B, L): the statistics of one batch, with the columns that `dial` reads."""
    model, tokenizer = smollm2.load_model()
    rollouts = sample(model, tokenizer, [*TRAINING, *HELD_OUT][:n_answers], max_new_tokens=n_tokens, seed=seed)
    student, teacher = (head_over(model, tokenizer, rollouts, system=told) for told in (None, INSTRUCTION))
    return score_positions(student, teacher, mask=rollouts.mask, tokens=rollouts.tokens, selector="dial")[1]


def overlaps(stats: TokenStats, fraction: float) -> list[list[float]]:
    """The overlap of each pair of `SHOWN`, as a symmetric matrix."""
    selectors = SELECTORS | {"random": Random(torch.Generator().manual_seed(0))}
    selected = [select_positions(selectors[name](stats), mask=stats.valid, fraction=fraction) for name in SHOWN]
    return [[int((a & b).sum()) / int((a | b).sum()) for b in selected] for a in selected]


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.overlap", description="How far the selectors agree.")
    parser.add_argument("--answers", type=int, default=64, help="sampled answers (default 64)")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer (default 48)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of overlap.json")
    options = parser.parse_args(arguments)
    stats = real_statistics(options.answers, options.tokens)
    matrices = {f"{fraction:g}": overlaps(stats, fraction) for fraction in FRACTIONS}
    positions = int(stats.valid.sum())
    result = {"environment": describe_environment(ROOT), "positions": positions, "selectors": SHOWN, "overlaps": matrices}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overlap.json").write_text(json.dumps(result, indent=1) + "\n")
    for fraction, matrix in matrices.items():
        print(f"{float(fraction):.0%} of {positions} tokens")
        for name, row in zip(SHOWN, matrix, strict=True):
            print(f"{name:>22}", *(f"{x:.2f}" for x in row))
    return result


if __name__ == "__main__":
    main()
