"""`opd-inspect`: the effect of selection for your own student, teacher and prompts, as one HTML page.

  opd-inspect --student NAME --teacher NAME --prompts prompts.jsonl [--trained NAME] [--out report.html]

The student answers the prompts once, with a fixed seed. Student and teacher are compared on the tokens of these answers; with a
trained student the gain of each token is computed too (arXiv 2605.26844 section 3). The numbers are written to a JSON file next
to the page. As many errors as possible come before a model loads.
Not here: running models (measure.py), the numbers (study.py), the page (report.py), names of models (trainer/models.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from opd_ops.diagnostics import report
from opd_ops.diagnostics.contexts import Contexts
from opd_ops.diagnostics.fixed_context import named_selectors
from opd_ops.diagnostics.measure import Reader, compare, sample_answers
from opd_ops.diagnostics.study import FRACTIONS, SELECTED, Study, study
from opd_ops.selection.selectors import SELECTORS
from opd_ops.selection.stats import OPTIONAL_COLUMNS
from opd_ops.settings import DEFAULTS, HELP, check_fraction
from opd_ops.trainer.files import check_path, check_text
from opd_ops.trainer.models import load_model, load_tokenizer
from opd_ops.trainer.privileged import PrivilegedContext
from opd_ops.trainer.prompts import Prompt, load_prompts
from opd_ops.trainer.teachers import check_tokenizers

REQUIRED_PACKAGES = ("transformers", "matplotlib", "rich")  # checked first: some are imported only after the models have run
PATHS = ("student", "teacher", "trained", "prompts", "out")  # flags that may be paths
DTYPES = ("auto", "float32", "bfloat16", "float16")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Flags:
    """The values of the flags."""

    student: str
    teacher: str
    trained: str | None
    prompts: str
    teacher_system: str | None
    max_new_tokens: int
    limit: int | None
    batch_size: int
    selectors: list[str]
    fractions: list[float]
    top_k: int
    resamples: int
    seed: int
    dtype: str
    out: Path
    overwrite: bool


def parse(arguments: Sequence[str] | None = None) -> tuple[Flags, list[Prompt]]:
    """The flags and the prompts. A bad flag ends the program; the error has its name, its value and the expected values."""
    parser = argparse.ArgumentParser(
        prog="opd-inspect",
        description="What selective distillation selects and, given a trained student, what training brought: one HTML page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    model = "a folder, a name on the hub, a .gguf file, or package:NAME"
    add("--student", required=True, metavar="MODEL", help=f"the student before training: {model}")
    add("--teacher", required=True, metavar="MODEL", help="the teacher; may be the student's own weights with --teacher-system")
    add("--trained", metavar="MODEL", help="the student after training; without it there are no gains")
    add("--prompts", required=True, metavar="FILE", help='JSONL with "prompt" or "messages", and "teacher_system" if wanted')
    add("--teacher-system", metavar="TEXT", help="a system message for the teacher alone")
    add("--max-new-tokens", type=_integer(1), default=96, metavar="N", help="longest answer, in tokens")
    add("--limit", type=_integer(1), metavar="N", help="the first N prompts alone")
    add("--batch-size", type=_integer(1), default=8, metavar="N", help="answers at a time")
    add("--selectors", type=_selectors, default=list(SELECTED), metavar="A,B", help=f"any of: {', '.join(SELECTORS)}")
    add("--fractions", type=_fractions, default=list(FRACTIONS), metavar="X,Y", help="shares of the tokens, each in (0, 1]")
    add("--top-k", type=_integer(1), default=DEFAULTS.top_k, metavar="K", help=HELP["top_k"])
    add("--resamples", type=_integer(1), default=1000, metavar="N", help="of the prompts, for 95 %% intervals")
    add("--seed", type=_integer(0), default=0, metavar="N", help="of the answers, the resamples and selectors that draw")
    add("--dtype", choices=DTYPES, default="auto", help="of all models; auto: each checkpoint's own")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page; its numbers go to FILE with .json")
    add("--overwrite", action="store_true", help="replace the page and numbers that FILE already has")
    settings = Flags(**vars(parser.parse_args(arguments)))
    try:
        for name, value in asdict(settings).items():
            flag = f"argument --{name.replace('_', '-')}"
            if isinstance(value, (str, Path)):
                check_text(str(value), flag)
            if name in PATHS and value is not None:
                check_path(str(value), flag)
    except ValueError as error:
        parser.error(str(error))
    if not Path(settings.prompts).is_file():
        parser.error(f"argument --prompts: got {settings.prompts!r}, expected a JSONL file")
    try:
        prompts = load_prompts(settings.prompts)[: settings.limit]
        PrivilegedContext(settings.teacher_system).check(prompts)
    except (OSError, ValueError) as error:
        parser.error(f"argument --prompts: {error}")
    if settings.out.is_dir() or settings.out.suffix == ".json":
        parser.error(f"argument --out: got {str(settings.out)!r}, expected the name of an HTML file")
    numbers = settings.out.with_suffix(".json")
    if numbers.resolve() == Path(settings.prompts).resolve():
        parser.error(f"argument --out: got {str(settings.out)!r}, whose numbers would go over the prompts; name it otherwise")
    try:
        _check_output((settings.out, numbers), overwrite=settings.overwrite)
    except ValueError as error:
        parser.error(f"argument --out: {error}")
    except OSError as error:
        parser.error(f"argument --out: got {str(settings.out)!r}, expected a file that can be written ({error.strerror})")
    if settings.trained is not None and len({prompt.messages for prompt in prompts}) < 2:
        parser.error("argument --prompts: got 1 different prompt, expected at least 2: --trained resamples them for intervals")
    return settings, prompts


def _check_output(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Check that the files can be written. Raises: OSError: they cannot. ValueError: a file exists and must not be replaced."""
    for path in paths:
        is_new = not path.exists()
        if not is_new and not overwrite:
            raise ValueError(f"{path} exists; name another file, or pass --overwrite to replace it")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if is_new:
            path.unlink()


def run(settings: Flags, prompts: Sequence[Prompt]) -> tuple[Contexts, Study]:
    """Models, answers, statistics, study. Raises: SystemExit: a model cannot be loaded, or the tokenizers differ."""
    names = {"student": settings.student, "teacher": settings.teacher, "trained": settings.trained}
    tokenizers = {role: _loaded(role, name, load_tokenizer) for role, name in names.items() if name is not None}
    try:
        for role in set(tokenizers) - {"student"}:
            check_tokenizers(tokenizers["student"], tokenizers[role], f"--{role}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if settings.top_k > len(tokenizers["student"]):
        raise SystemExit(f"error: --top-k: got {settings.top_k}, expected at most the vocabulary, {len(tokenizers['student'])}")
    selectors = named_selectors(settings.selectors)
    columns = frozenset[str]().union(*(getattr(selector, "needs", ()) for selector in selectors.values())) & OPTIONAL_COLUMNS

    def reader(role: str, name: str) -> Reader:
        model = _loaded(role, name, lambda name: load_model(name, dtype=settings.dtype))
        # The student's tokenizer writes the prompts of all models, as in training.
        return Reader(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizers["student"])

    n = -(-len(prompts) // settings.batch_size)
    student, teacher = reader("student", settings.student), reader("teacher", settings.teacher)
    sizes = {"max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size}
    frozen = list(_progress(sample_answers(student, prompts, **sizes, seed=settings.seed), "the student answers", n))
    system, top_k = settings.teacher_system, settings.top_k
    batches = _progress(frozen, "student and teacher read", n)
    before = compare(student, teacher, batches, top_k=top_k, teacher_system=system, columns=columns)
    after, texts = None, [row for rollouts in frozen for row in rollouts.token_texts(student.tokenizer)]
    del student  # so that at most two models are in memory
    if settings.trained is not None:
        trained = reader("trained", settings.trained)
        batches = _progress(frozen, "trained and teacher read", n)
        after = compare(trained, teacher, batches, top_k=top_k, teacher_system=system).forward_kl
    contexts = Contexts(before, after, texts, [prompt.text for prompt in prompts], _clusters(prompts))
    return contexts, study(contexts, settings.selectors, settings.fractions, settings.resamples, settings.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags, run the models, write the page and its numbers."""
    settings, prompts = parse(arguments)
    for package in REQUIRED_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"error: {package} is not installed; pip install 'opd-ops[inspect]'")
    contexts, results = run(settings, prompts)
    shown = {name.replace("_", " "): _text(value) for name, value in asdict(settings).items() if value is not None}
    for name in ("out", "overwrite", "resamples", "seed"):  # the page says the last two itself
        shown.pop(name)
    settings.out.write_text(report.render(contexts, results, shown), encoding="utf-8")
    numbers = settings.out.with_suffix(".json")
    numbers.write_text(json.dumps({"settings": asdict(settings), **results.to_json()}, indent=1, default=str), encoding="utf-8")
    print(f"{results.n_positions:,} tokens of {results.n_contexts} answers: see {settings.out}; numbers in {numbers}")
    for row in results.gains or ():
        print(f"  {row.selector:<22} {100 * row.fraction:>5g} %   gain {row.gain.value:+.4f} nats")


def _loaded(role: str, name: str, load: Callable[[str], Item]) -> Item:
    try:
        return load(name)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        reason = " ".join(str(error).split())  # one line, also if a library's error has several
        raise SystemExit(f"error: --{role}: got {name!r}, expected a model that can be loaded ({reason})") from error


def _clusters(prompts: Sequence[Prompt]) -> torch.Tensor:
    """The cluster of each answer: answers to the same conversation are one cluster; an equal last message is not enough."""
    numbers: dict[tuple[tuple[str, str], ...], int] = {}
    return torch.tensor([numbers.setdefault(prompt.messages, len(numbers)) for prompt in prompts])


def _progress(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    from rich.progress import track

    tracked: Iterable[Item] = track(items, description=what, total=total)
    return tracked


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _integer(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {least}")
        return int(text)

    return convert


def _selectors(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SELECTORS:
            raise argparse.ArgumentTypeError(f"got {name!r}, expected names with commas between, of: {', '.join(SELECTORS)}")
    return names


def _fractions(text: str) -> list[float]:
    try:
        return [check_fraction(float(part)) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers in (0, 1] with commas between") from error


if __name__ == "__main__":
    main()
