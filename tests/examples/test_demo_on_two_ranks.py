"""The demonstration on two processes, started by torch's launcher, over gloo, against one process: its step with the same
answers, who is asked what, and a whole run; on tiny models.

  Compared: what is selected exactly; parameters and gradients after a step within 1e-5 as relative norms, metrics too; the
  parameters of the two ranks with each other to the bit. One of two budgets is a single token, so that a rank has none.
Command: make test ARGS=tests/examples/test_demo_on_two_ranks.py. The file is also what each process runs, once for all tests.

Not here: selection over ranks (selection/test_budget_over_ranks.py), the demonstration in one process (examples/test_demo.py).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from examples import processes, prompt_distillation, prompts, smollm2
from examples.flags import Flags, parse_flags
from opd_ops.distributed.ranks import Ranks
from opd_ops.trainer.prompts import Prompt
from opd_ops.trainer.rollouts import Rollouts
from tests.integrations.models import VOCAB, language_model, tokenizer
from tests.support.tolerances import assert_gradient, relative_error

QUESTIONS = [Prompt.of(" ".join(f"w{3 + i + j}" for j in range(2 + i))) for i in range(5)]  # two on a rank, three on the other
FRACTIONS = (0.2, 0.01)
BOUND = 1e-5


def pair():
    return prompt_distillation.Pair(language_model(0), language_model(1).requires_grad_(False), tokenizer())


def answers(model, tokenizer, questions, **_):
    """In the place of sampling: fixed tokens, as many valid ones as the question has words."""
    tokens = torch.randint(3, VOCAB, (len(QUESTIONS), 8), generator=torch.Generator().manual_seed(1))
    rows = [QUESTIONS.index(question) for question in questions]
    return Rollouts(questions, tokens[rows], torch.arange(8) < torch.tensor([[2 + row] for row in rows]))


def step(fraction, ranks):
    """One step: parameters, their gradients, what was selected, the metrics of each rank."""
    models = pair()
    parameters = list(models.student.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    settings, mine = Flags(fraction=fraction), processes.share(QUESTIONS, ranks)
    with mock.patch.object(prompt_distillation, "sample", answers):
        _, output = prompt_distillation.train_step(models, optimizer, mine, settings, torch.Generator(), ranks)
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    return flat, gradient, output.selected, processes.metrics_by_rank(output.metrics, ranks)


def asked(ranks):
    """The questions of this rank's steps, into a second pass, where the selector draws more on one rank."""
    settings = Flags(selector="random", steps=3, batch_size=21, max_new_tokens=1)
    steps = prompt_distillation.training(pair(), settings, ranks)
    return [[prompt.text for prompt in done.rollouts.prompts] for done in steps]


def on_each_rank(folder):
    with processes.joined() as ranks:
        got = {"steps": [step(fraction, ranks) for fraction in FRACTIONS], "asked": asked(ranks)}
        flags = {"steps": 2, "batch-size": 4, "max-new-tokens": 4, "fraction": 0.3, "out": folder}
        with (
            mock.patch.object(processes, "joined", return_value=nullcontext(ranks)),  # the store is that of one group
            mock.patch.object(smollm2, "load_model", return_value=(language_model(0), tokenizer())),
            mock.patch.object(prompt_distillation, "HELD_OUT", prompts.HELD_OUT[:2]),
        ):
            record = prompt_distillation.main([f"--{name}={value}" for name, value in flags.items()])
        got["returned"] = None if record is None else [len(metrics) for metrics in record.by_rank]
        torch.save(got, folder / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What both processes printed, their folder, and what each found."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    here = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-m", "tests.examples.test_demo_on_two_ranks", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.full
def test_a_step_on_two_ranks_is_that_of_one_process(launched):
    _, _, (first, second) = launched
    for i, fraction in enumerate(FRACTIONS):
        parameters, gradient, selected, [metrics] = step(fraction, Ranks())
        assert torch.equal(first["steps"][i][0], second["steps"][i][0])
        assert relative_error(first["steps"][i][0], parameters) <= BOUND
        assert_gradient(first["steps"][i][1], gradient, BOUND)
        assert torch.equal(torch.cat((first["steps"][i][2], second["steps"][i][2])), selected)
        by_rank = first["steps"][i][3]
        assert by_rank == second["steps"][i][3]
        assert processes.together(by_rank) == pytest.approx(metrics, rel=BOUND)
        n_selected = [rank["n_selected"] for rank in by_rank]
        assert n_selected != [math.ceil(fraction * rank["n_valid"]) for rank in by_rank]  # a budget for each would not do
        assert (0 in n_selected) == (fraction == min(FRACTIONS))


@pytest.mark.full
def test_ranks_share_out_each_step_s_questions_also_where_the_selector_draws(launched):
    _, _, (first, second) = launched
    order = prompt_distillation.question_batches(21, torch.Generator().manual_seed(0))
    for asked_by_first, asked_by_second in zip(first["asked"], second["asked"], strict=True):
        assert (len(asked_by_first), len(asked_by_second)) == (10, 11)
        assert asked_by_first + asked_by_second == [prompt.text for prompt in next(order)]


@pytest.mark.full
def test_the_first_rank_alone_shows_and_writes(launched):
    said, folder, (first, second) = launched
    assert first["returned"] == [2, 2]
    assert second["returned"] is None
    assert said.count("Held-out forward KL(teacher || student) before") == 1
    assert "(rank 0: " in said
    assert "; rank 1: " in said
    assert "Step 1: the student before any update, rank 0 of 2" in (folder / "tokens.html").read_text(encoding="utf-8")
    assert (folder / "kl.png").is_file()


def test_share_keeps_the_order_and_leaves_out_nothing():
    for size in (1, 2, 3, 5):
        parts = [processes.share(range(7), SimpleNamespace(rank=rank, size=size)) for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(7))
        assert {len(part) for part in parts} <= {7 // size, -(-7 // size)}


def test_fewer_questions_than_processes_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--batch-size", "1", "--out", str(tmp_path)], n_ranks=2)
    assert "argument --batch-size: got 1, expected a question for each of 2 processes" in capsys.readouterr().err
    assert parse_flags(["--batch-size", "2", "--out", str(tmp_path)], n_ranks=2).batch_size == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_each_rank(Path(sys.argv[1]))
