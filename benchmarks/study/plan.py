"""The plan of the study: every pair, arm, seed and size, fixed before the first run.

  arm     a selector with a fraction, or a weighting of all tokens, and a loss. Exact reverse KL: all arms;
          the sampled token's loss, in which the paper on teachability trained (arXiv 2605.26844): four arms.
  measure KL(student || teacher) at held-out tokens, the quantity that the losses reduce; KL(teacher || student) second
  order   seed 0 of every arm and both pairs, then seed 1, ...: a study that was cut short is balanced all the same

Sizes come from a pilot on another seed, the number of seeds from the spread over seeds of an earlier study (benchmarks/LOG.md).
Not here: the pairs' models (pairs.py), the runs (run.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SELECTORS = (
    "random",
    "prefix",
    "entropy",
    "divergence",
    "divergence-reverse-kl",
    "tip",
    "teachability",
    "teachability+entropy",
    "teachability-released",
    "incompatibility",
    "dial",
)
FRACTIONS = (0.05, 0.2)
SAMPLED = ("random", "entropy", "teachability")  # at the larger fraction, and all tokens
SEEDS = 9
CPU_HOURS = 9.3  # no run begins once the finished ones took this much; healing and the pilot take the other 0.7


@dataclass(frozen=True)
class Arm:
    """What one student is trained on, and by which loss."""

    selector: str = "all"
    fraction: float = 1.0
    divergence: str = "reverse_kl"
    weighting: str | None = None

    @property
    def name(self) -> str:
        """A name that may stand in a file's name."""
        parts = [self.selector]
        if self.selector != "all":
            parts.append(f"{100 * self.fraction:g}")
        if self.weighting is not None:
            parts = ["weights", self.weighting]
        if self.divergence != "reverse_kl":
            parts.append(self.divergence)
        return "-".join(parts)


ARMS = (
    Arm(),
    *(Arm(selector, fraction) for fraction in FRACTIONS for selector in SELECTORS),
    Arm(weighting="teachability"),
    Arm(divergence="sampled"),
    *(Arm(selector, max(FRACTIONS), "sampled") for selector in SAMPLED),
)


@dataclass(frozen=True)
class Sizes:
    """The size of every run of a pair."""

    learning_rate: float
    steps: int = 8
    evaluated: tuple[int, ...] = (2, 4, 8)  # after this many steps
    batch_size: int = 8
    max_new_tokens: int = 24
    held_out_tokens: int = 32


SIZES = {"instruction": Sizes(learning_rate=1e-5), "shallow": Sizes(learning_rate=5e-5)}


@dataclass(frozen=True)
class Job:
    """One run of the plan."""

    seed: int
    pair: str
    arm: Arm

    @property
    def file_name(self) -> str:
        return f"{self.pair}-{self.arm.name}-seed{self.seed}.json"


def jobs(n_seeds: int = SEEDS) -> Iterator[Job]:
    """Every run, in the order in which they are made."""
    return (Job(seed, pair, arm) for seed in range(n_seeds) for pair in SIZES for arm in ARMS)
