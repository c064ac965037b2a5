"""Ranks that select together: how they share out positions, and what they send.

Not here: the processes (ranks.py), ranks that share out the vocabulary (shards.py).
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from opd_ops.distributed.order_statistics import cost
from opd_ops.distributed.ranks import ALL_GATHER
from tests.support.cases import generator


def parts(sizes, rank):
    """This rank's slice of what all hold, in their order."""
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def unequal(seed, size, most=40):
    """How much each rank holds: nothing on one of them, but for every fifth seed."""
    sizes = torch.randint(1, most, (size,), generator=generator(seed)).tolist()
    if seed % 5:
        sizes[seed % size] = 0
    return sizes


@contextmanager
def collectives():
    """What torch.distributed sends: (name, bytes of the contribution) of each call."""
    sent, names = [], ("all_reduce", ALL_GATHER, "broadcast")
    kept = {name: getattr(dist, name) for name in names}

    def counted(name):
        def call(*tensors, **options):
            sent.append((name, tensors[-1].nbytes))
            return kept[name](*tensors, **options)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield sent
    finally:
        for name in names:
            setattr(dist, name, kept[name])


def assert_sent(sent, *searches, gathered=(), summed=()):
    """Searches (dtype, groups, targets), gathers and further sums, by their bytes."""
    costs = [cost(*search) for search in searches]
    reduced = [n for name, n in sent if name == "all_reduce"]
    assert len(reduced) == sum(n for n, _ in costs) + len(summed)
    assert sum(reduced) == sum(n for _, n in costs) + sum(summed)
    assert [n for name, n in sent if name == ALL_GATHER] == list(gathered)
    assert len(sent) == len(reduced) + len(gathered)
