"""Heads that DeepSpeed's ZeRO-3 partitions, on two processes: parameters after three steps against those of one process that
has
all data, in plain torch. Nothing is timed.

  model    an embedding, a linear body, a head with a bias; untied, and tied with the embedding; fp32, SGD with momentum
  passes   if no parameter differs by more than 1e-5 (they move by 1e-3 and more), with 1 and with 2 micro-batches a step

Run, where DeepSpeed is installed (on CPUs it compiles an operation of its own first, a minute or two):
  DS_ACCELERATOR=cpu python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.cpu.check_zero3
Not here: how it is done (opd_ops/inputs/zero3.py), the stand-in that tests use (tests/inputs/test_zero3.py).
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opd_ops import LinearHead, selective_opd_loss

VOCAB, WIDTH, SEQUENCES, LENGTH, RANKS, STEPS = 64, 16, 2, 5, 2, 3
BOUND = 1e-5


class Model(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(tokens)))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def expected(model: Model, steps: list[list[list[tuple[Tensor, Tensor]]]]) -> dict[str, Tensor]:
    """One process: the KL by torch's own operations on all ranks' data."""
    model = copy.deepcopy(model)
    stepper = optimizer(model)
    for micro_batches in steps:
        stepper.zero_grad()
        for rank_batches in micro_batches:
            tokens, teacher = (torch.cat(x) for x in zip(*rank_batches, strict=True))
            log_p = model.head(model(tokens)).log_softmax(-1)
            kl = (log_p.exp() * (log_p - teacher.log_softmax(-1))).sum(-1).mean()
            (kl / len(micro_batches)).backward()
        stepper.step()
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def worst(*, tied: bool, n_micro_batches: int) -> float:
    """The largest difference of any parameter."""
    torch.manual_seed(0)
    model, generator = Model(tied=tied), torch.Generator().manual_seed(1)

    def drawn() -> tuple[Tensor, Tensor]:
        shape = SEQUENCES, LENGTH
        return torch.randint(VOCAB, shape, generator=generator), 2 * torch.randn(*shape, VOCAB, generator=generator)

    steps = [[[drawn() for _ in range(RANKS)] for _ in range(n_micro_batches)] for _ in range(STEPS)]
    want = expected(model, steps)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_accumulation_steps": n_micro_batches,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    for micro_batches in steps:
        for rank_batches in micro_batches:
            tokens, teacher = rank_batches[dist.get_rank()]
            head = LinearHead.from_module(engine(tokens), model.head)
            engine.backward(selective_opd_loss(head, teacher, fraction=1.0).loss)
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return max(float((x.detach() - want[name]).abs().max()) for name, x in model.named_parameters())


def main() -> None:
    is_good = True
    for tied in (False, True):
        for n in (1, 2):
            difference = worst(tied=tied, n_micro_batches=n)
            is_good &= difference <= BOUND
            if dist.get_rank() == 0:
                print(f"tied {tied!s:5}  {n} micro-batches a step: largest difference {difference:.1e}", flush=True)
    dist.destroy_process_group()
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
