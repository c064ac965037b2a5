"""The flags of the demonstration, checked before the model loads: a bad one costs no waiting.

  An error names the flag, what came and what was expected, as the library's own errors do.

Not here: what they do (prompt_distillation.py); selectors and divergences by name (opd_ops/selection/selectors.py,
divergences/).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from opd_ops.divergences import DIVERGENCES
from opd_ops.selection.selectors import SELECTORS


@dataclass(frozen=True)
class Flags:
    """What the command line can change, with its defaults."""

    selector: str = "teachability"
    fraction: float = 0.05
    divergence: str = "reverse_kl"
    steps: int = 6
    batch_size: int = 8
    max_new_tokens: int = 40
    learning_rate: float = 2e-5
    seed: int = 0
    out: Path = Path("out/demo")


def parse_flags(arguments: Sequence[str] | None = None, *, n_ranks: int = 1) -> Flags:
    """The flags as `Flags`; a bad one ends the program with its name and what was expected.

    Args:
        n_ranks: Processes that share out the questions of a step; each needs one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.prompt_distillation",
        description="On-policy prompt distillation of SmolLM2-135M on the few tokens that are worth it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--selector", type=_one_of(SELECTORS), metavar="NAME", help=f"what makes a token worth it: {', '.join(SELECTORS)}")
    add("--fraction", type=_share, metavar="SHARE", help="share of the sampled tokens to train on, in (0, 1]")
    add("--divergence", type=_one_of(DIVERGENCES), metavar="NAME", help=f"the loss on them: {', '.join(DIVERGENCES)}")
    add("--steps", type=_integer(1), metavar="N", help="updates of the student")
    add("--batch-size", type=_integer(1), metavar="N", help="questions answered in each step")
    add("--max-new-tokens", type=_integer(1), metavar="N", help="longest answer, in tokens")
    add("--learning-rate", type=_rate, metavar="RATE", help="of AdamW, constant")
    add("--seed", type=_integer(0), metavar="N", help="of the order of the questions and of the sampling")
    add("--out", type=Path, metavar="FOLDER", help="where tokens.html and kl.png go")
    parser.set_defaults(**asdict(Flags()))
    settings = Flags(**vars(parser.parse_args(arguments)))
    if settings.batch_size < n_ranks:
        parser.error(f"argument --batch-size: got {settings.batch_size}, expected a question for each of {n_ranks} processes")
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: got {str(settings.out)!r}, expected a folder that can be written to ({error.strerror})")
    return settings


def _checked(convert: Callable, accept: Callable, expected: str) -> Callable:
    """A type for argparse: the converted text if `accept` agrees, else an error that says what was expected."""

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


def _one_of(known: dict) -> Callable:
    return _checked(str, known.__contains__, f"one of: {', '.join(known)}")


def _integer(least: int) -> Callable:
    # torch's seeds end at 2**63; nothing else comes near it.
    return _checked(int, lambda value: least <= value < 2**63, f"an integer of at least {least}")


_share = _checked(float, lambda value: 0 < value <= 1, "a number in (0, 1]")
_rate = _checked(float, lambda value: 0 < value < math.inf, "a finite number > 0")
