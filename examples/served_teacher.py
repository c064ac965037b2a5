"""A teacher that is only a server: the student learns from the top-K log-probabilities that it sends for the student's tokens.

  loss = 1/|M| sum_{t in M} KL over the teacher's top K and one more outcome, the tail (arXiv 2608.14728); M: the best-scored
  fifth of the sampled tokens, by teachability from the same lists (arXiv 2605.26844, eqs. 12, 13, 17)

The teacher is SmolLM2-135M told to answer like a pirate, the student the same weights, never told. Each request has a
  context: the text that the teacher reads before the answer. This context holds the instruction; the student never reads it.
You will see: every few steps that KL over all sampled tokens, 0.23 nats at first and 0.11 after 12 steps, and the seconds
  that the server took. On 2 CPU cores, in about three minutes.
Run: python -m examples.served_teacher, which starts a server of its own; or with --url http://teacher:8000, vLLM's or that of
  serve_teacher.py, for a teacher with SmolLM2's tokenizer.

Not here: the server (serve_teacher.py), the client (opd_ops/trainer/servers/teacher.py), a teacher in memory
(prompt_distillation.py).
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from examples import smollm2
from examples.prompts import INSTRUCTION, TRAINING
from examples.serve_teacher import NAME, Served, running
from opd_ops import TailAware, selective_opd_loss
from opd_ops.trainer.rollouts import encode, head_over, sample
from opd_ops.trainer.servers.teacher import ServedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(
    student: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    teacher: ServedTeacher,
    steps: int,
    n_questions: int = 6,
    n_tokens: int = 32,
) -> list[float]:
    """The KL of every step over all sampled tokens, in nats a token."""
    torch.manual_seed(0)
    kls, divergence = [], TailAware(top_k=teacher.top_k)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5, weight_decay=0.0)
    for step in range(steps):
        first = step * n_questions % len(TRAINING)
        rollouts = sample(student, tokenizer, (TRAINING * 2)[first : first + n_questions], max_new_tokens=n_tokens)
        # One list of ids per prompt, without padding: a server wants what the teacher would read.
        contexts = [
            encode(tokenizer, [prompt.conversation(INSTRUCTION)])["input_ids"][0].tolist() for prompt in rollouts.prompts
        ]
        answers = [tokens[mask].tolist() for tokens, mask in zip(rollouts.tokens, rollouts.mask, strict=True)]
        start = time.perf_counter()
        logprobs = teacher.score(contexts, answers)
        seconds = time.perf_counter() - start
        mask = rollouts.mask[:, : logprobs.ids.shape[1]]  # where all answers ended before n_tokens, the lists end there too
        head = head_over(student, tokenizer, rollouts._replace(tokens=rollouts.tokens[:, : mask.shape[1]], mask=mask))
        with torch.no_grad():  # how far the models are apart, whatever is selected
            kls.append(selective_opd_loss(head, logprobs, mask=mask, fraction=1.0, divergence=divergence).loss.item())
        out = selective_opd_loss(head, logprobs, mask=mask, fraction=0.2, divergence=divergence)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 4 == 3 or step == 0:
            n_selected, n_valid = int(out.metrics["n_selected"]), int(out.metrics["n_valid"])
            words = f"trained on {n_selected} of {n_valid}, the teacher took {seconds:.1f} s"
            print(f"step {step + 1:3}: KL {kls[-1]:.2f} nats a token, {words}", flush=True)
    return kls


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil from a teacher behind an OpenAI-compatible server.")
    parser.add_argument("--url", help="of a running server; without it, one is started here")
    parser.add_argument("--model", help="its name for the teacher, if it serves several")
    parser.add_argument("--steps", type=int, default=12)
    choices = parser.parse_args()
    model, tokenizer = smollm2.load_model()
    student = copy.deepcopy(model).requires_grad_(True)
    if choices.url is None:
        with running(Served(model, tokenizer, NAME)) as url:
            teacher = ServedTeacher(url)
            teacher.check()
            train(student, tokenizer, teacher, choices.steps)
        return
    teacher = ServedTeacher(choices.url, model=choices.model)
    teacher.check()
    train(student, tokenizer, teacher, choices.steps)


if __name__ == "__main__":
    main()
