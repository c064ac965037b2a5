"""Heads that FSDP2 shards over ranks with data of their own: gathered once a call, gradients the mean over ranks, as one
process
has them that holds all data.

Command: make test ARGS=tests/inputs/test_unshard.py
Not here: heads over which ranks share out the vocabulary (test_vocabulary.py), the trainer under FSDP2
(trainer/test_processes.py).
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from opd_ops import LinearHead, selective_opd_loss
from tests.support.cases import generator
from tests.support.ranks import SIZE
from tests.support.tolerances import relative_error

VOCAB, WIDTH, ROWS = 61, 16, 12


class Model(nn.Module):
    """A body whose outputs are hidden states, and a head that the loss reads without calling it."""

    def __init__(self, *, tied):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return torch.tanh(self.body(self.embedding(tokens)))


def _batch(rank):
    g = generator(rank)
    return torch.randint(0, VOCAB, (ROWS,), generator=g), 3 * torch.randn(ROWS, VOCAB, generator=g)


def _loss(model, rank, **options):
    tokens, teacher = _batch(rank)
    head = LinearHead.from_module(model(tokens), model.head)
    return selective_opd_loss(head, teacher, fraction=0.4, top_k=5, selector="divergence", **options)


def _fsdp2(tied, wrapped, scope, shape=(SIZE,)):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)
    model = Model(tied=tied)
    nn.init.normal_(model.embedding.weight)
    whole = copy.deepcopy(model)
    names = ("replicated", "sharded")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for name in wrapped:
        fully_shard(getattr(model, name), mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if scope == "batch":
        sum(_loss(whole, rank).loss for rank in range(SIZE)).div(SIZE).backward()
    else:  # one process that has all positions
        batches = [_batch(rank) for rank in range(SIZE)]
        tokens, teacher = (torch.cat(x) for x in zip(*batches, strict=True))
        head = LinearHead.from_module(whole(tokens), whole.head)
        selective_opd_loss(head, teacher, fraction=0.4, top_k=5, selector="divergence").loss.backward()
    for _ in range(2):  # and again: gradients do not depend on what a call before has gathered
        model.zero_grad()
        with CommDebugMode() as sent:
            loss = _loss(model, dist.get_rank(), scope=scope).loss
            (loss if scope == "batch" else loss * SIZE).backward()
        for (name, got), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert relative_error(got.grad.full_tensor(), wanted.grad) < 1e-5, name
    # FSDP2's own go by "c10d." alone.
    return {str(kind).split(".")[-1]: n for kind, n in sent.get_comm_counts().items() if "c10d_functional" in str(kind)}


def _mixed_precision():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model, mesh = Model(tied=False), init_device_mesh("cpu", (SIZE,))
    nn.init.normal_(model.embedding.weight)
    whole = copy.deepcopy(model)
    for module in (model.head, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    tokens, teacher = _batch(dist.get_rank())
    head = LinearHead.from_module(model(tokens), model.head)
    assert head.hidden.dtype == head.weight.dtype == head.bias.dtype == torch.bfloat16
    selective_opd_loss(head, teacher, fraction=1.0, selector="all").loss.backward()
    for rank in range(SIZE):
        tokens, teacher = _batch(rank)
        student = LinearHead.from_module(whole(tokens), whole.head)
        (selective_opd_loss(student, teacher, fraction=1.0, selector="all").loss / SIZE).backward()
    for got, wanted in zip(model.head.parameters(), whole.head.parameters(), strict=True):
        assert got.grad.dtype == torch.float32
        assert relative_error(got.grad.full_tensor(), wanted.grad) < 0.02  # what bf16 rounds


@pytest.mark.parametrize("scope", ["batch", "global"])
@pytest.mark.parametrize(
    ("tied", "wrapped"), [(False, ("head",)), (False, ("body",)), (True, ("body",)), (False, ("head", "body", "embedding"))]
)
def test_gradients_are_those_of_one_process(ranks, tied, wrapped, scope):
    assert len(ranks.run(_fsdp2, tied, wrapped, scope)) == SIZE


def test_gradients_where_shards_are_replicated(ranks):
    ranks.run(_fsdp2, False, ("head",), "batch", (2, 2))


def test_a_head_is_gathered_in_the_precision_of_its_hidden_states(ranks):
    ranks.run(_mixed_precision)


def test_a_head_is_gathered_once_a_call(ranks):
    for sent in ranks.run(_fsdp2, False, ("head",), "batch"):
        assert sent == {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}  # weight and bias, forward and backward
