"""Vocabularies that ranks share out, at their edges: DTensors, groups that share out positions too, what is refused on every
rank, what is sent.

Command: make test ARGS=tests/backends/shared/test_joined.py
Not here: statistics, selections and gradients of every divergence (inputs/test_vocabulary.py).
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from opd_ops import (
    selective_opd_loss,
)
from opd_ops.backends.shared import joined
from opd_ops.distributed.ranks import Ranks
from opd_ops.inputs.rollout import StudentStats
from tests.support.cases import generator, leaf, leaf_head
from tests.support.ranks import SIZE, own_pair
from tests.support.shards import CUTS, DIVERGENCES, SHAPE, VOCAB, cut, gradients_of, leaf_side, options_of, sides_of
from tests.support.tolerances import relative_error


def _both_ways():
    """Two by two: a vocabulary over ranks 2i and 2i + 1, positions over the ranks across; as one process that has all."""
    rank = dist.get_rank()
    place, row, widths = rank % 2, rank // 2, (40, 57)
    across = [dist.new_group([i, i + 2]) for i in range(2)][place]
    sides = [sides_of("heads", seed=seed) for seed in (3, 4)]  # of each row
    tokens = torch.randint(0, VOCAB, (2, *SHAPE), generator=generator(5))
    mask = torch.rand((2, *SHAPE), generator=generator(6)) < 0.8
    together = [
        replace(x, hidden=torch.cat([x.hidden, y.hidden])) for x, y in zip(*sides, strict=True)
    ]  # heads of the first row: the other's hidden states go through them, too
    for name, scope, selector in (
        ("reverse_kl", "global", "teachability"),
        ("jsd", "global", "tip"),
        ("tail_aware", "global", "entropy"),
        ("sampled", "sequence", "divergence"),
    ):
        options = {"divergence": DIVERGENCES[name], "fraction": 0.3, "top_k": 6, "backend": "torch", "selector": selector}
        whole = leaf_side(together[0])
        if scope == "sequence":  # each of the three sequences goes on from row to row
            flat = [x.view(2, *SHAPE, *x.shape[2:]).transpose(0, 1).flatten(1, 2) for x in (whole.hidden, together[1].hidden)]
            whole_sides = [replace(x, hidden=hidden) for x, hidden in zip((whole, together[1]), flat, strict=True)]
            tensors = {"mask": mask.transpose(0, 1).flatten(1), "tokens": tokens.transpose(0, 1).flatten(1)}
        else:
            whole_sides, tensors = [whole, together[1]], {"mask": mask.flatten(0, 1), "tokens": tokens.flatten(0, 1)}
        want = selective_opd_loss(*whole_sides, **options, **tensors, scope="batch" if scope == "global" else scope)
        want.loss.backward()
        hidden = [sides[row][i].hidden.clone() for i in range(2)]
        mine = leaf_head(cut(replace(together[0], hidden=hidden[0]), widths, place))
        taught = cut(replace(together[1], hidden=hidden[1]), widths, place)
        options |= {"mask": mask[row], "tokens": tokens[row], "scope": scope}
        got = selective_opd_loss(mine, taught, process_group=own_pair(), selection_group=across, **options)
        got.loss.backward()
        selected = want.selected.view(3, 2, 9)[:, row] if scope == "sequence" else want.selected.view(2, *SHAPE)[row]
        assert torch.equal(got.selected, selected), name
        assert relative_error(mine.hidden.grad, whole.hidden.grad.view(2, *SHAPE, -1)[row]) < 1e-5
        part = slice(sum(widths[:place]), sum(widths[: place + 1]))
        for gradient, whole_gradient in ((mine.weight.grad, whole.weight.grad), (mine.bias.grad, whole.bias.grad)):
            added_up = Ranks(across).sum(gradient.clone())  # as data parallelism does
            assert relative_error(added_up, whole_gradient[part]) < 1e-5
        total = Ranks(across).sum(got.loss.detach().clone())
        torch.testing.assert_close(total, want.loss.detach(), rtol=1e-5, atol=1e-6)
    for selector in ("random", "multinomial"):  # one draw for a pair
        options |= {"selector": selector, "divergence": "reverse_kl", "scope": "global"}
        torch.manual_seed(rank)
        got = selective_opd_loss(mine, taught, process_group=own_pair(), selection_group=across, **options)
        assert len({tuple(x.flatten().tolist()) for x in Ranks(own_pair()).gather(got.selected.long())}) == 1
        assert int(Ranks(across).sum(got.selected.sum())) == math.ceil(0.3 * int(mask.sum()))


# --- DTensors --------------------------------------------------------------------------------------------------------


def _dtensors(kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, options = init_device_mesh("cpu", (SIZE,)), options_of()

    def share(x, placement):
        return None if x is None else distribute_tensor(x.clone(), mesh, [placement])

    def shared_out(side):
        if isinstance(side, torch.Tensor):
            return share(side, Shard(side.dim() - 1))
        hidden, weight = share(side.hidden, Replicate()), share(side.weight, Shard(0))
        return replace(side, hidden=hidden, weight=weight, bias=share(side.bias, Shard(0)))

    student, teacher = sides_of(kind)
    whole, mine = leaf_side(student), leaf_side(shared_out(student))
    want, got = selective_opd_loss(whole, teacher, **options), selective_opd_loss(mine, shared_out(teacher), **options)
    assert torch.equal(got.selected, want.selected)
    want.loss.backward()
    got.loss.backward()
    for mine_, whole_gradient in zip(gradients_of(mine), gradients_of(whole), strict=True):
        assert relative_error(mine_.full_tensor(), whole_gradient) < 1e-5
    if kind == "heads":  # hidden states that are no DTensor, as modules give them
        with_local = replace(
            mine, hidden=leaf(student.hidden), weight=leaf(mine.weight.detach()), bias=leaf(mine.bias.detach())
        )
        selective_opd_loss(with_local, shared_out(teacher), **options).loss.backward()
        assert relative_error(with_local.hidden.grad, whole.hidden.grad) < 1e-5
    with torch.inference_mode():
        unseen = shared_out(teacher)
    assert torch.equal(selective_opd_loss(shared_out(student), unseen, **options).selected, want.selected)
    # A whole teacher, as a DTensor that every rank has and as a plain tensor.
    if kind == "logits":
        replicated = share(teacher, Replicate())
        for side in (replicated, teacher):
            assert torch.equal(selective_opd_loss(shared_out(student), side, **options).selected, want.selected)
        with pytest.raises(ValueError, match=r"student: got a DTensor placed .*expected Shard"):
            selective_opd_loss(share(student, Shard(0)), teacher, **options)
        with pytest.raises(ValueError, match="teacher: is shared out over ranks, but the student is not"):
            selective_opd_loss(student, shared_out(teacher), **options)


def _refused():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    student, teacher = sides_of("logits")
    rank, group, options = dist.get_rank(), dist.group.WORLD, options_of()
    mine, taught = (cut(x, CUTS["uneven"], rank) for x in (student, teacher))
    with pytest.raises(ValueError, match=r"teacher: got 27, 18, 27, 27 positions on the ranks"):
        selective_opd_loss(mine, taught[: 2 if rank == 1 else 3], process_group=group)
    known = StudentStats.from_logits(student, top_k=6)
    with pytest.raises(
        ValueError, match=r"student_stats: are over the student's own vocabulary of 97, but .* first 70 entries"
    ):
        selective_opd_loss(mine, taught, process_group=group, student_stats=known, vocab_size=70, **options)
    strided = cut(student, CUTS["empty"], rank).transpose(0, 1).contiguous().transpose(0, 1)
    on_kernels = options | {"backend": "triton"}
    with pytest.raises(ValueError, match="backend: got 'triton', but"):
        selective_opd_loss(strided, cut(teacher, CUTS["empty"], rank), process_group=group, **on_kernels)
    with pytest.raises(ValueError, match="teacher: got 70 entries on each rank beside a student of 97 in all"):
        selective_opd_loss(mine, teacher[..., :70], process_group=group, **options)
    with pytest.raises(ValueError, match=r"selection_group: has ranks \[0, 1, 2, 3\] in common with the group"):
        selective_opd_loss(mine, taught, process_group=group, scope="global", selection_group=group, **options)
    turned = DeviceMesh("cpu", torch.tensor([3, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"student: got a DTensor on a mesh of ranks \[3, 1, 2, 0\], expected ascending"):
        selective_opd_loss(distribute_tensor(student, turned, [Shard(2)]), teacher, **options)
    everywhere = distribute_tensor(student, init_device_mesh("cpu", (SIZE,)), [Replicate()])
    with pytest.raises(ValueError, match="process_group: got a group beside a student DTensor that every rank has whole"):
        selective_opd_loss(everywhere, teacher, process_group=group, **options)
    heads, mesh = sides_of("heads"), init_device_mesh("cpu", (2, 2))
    placed = [distribute_tensor(x.weight, mesh, [Replicate(), Shard(0)]) for x in heads]
    parts = [replace(x, weight=weight, bias=None) for x, weight in zip(heads, placed, strict=True)]
    with pytest.raises(ValueError, match=r"student\.weight: got a DTensor on a mesh of shape \(2, 2\) beside hidden states"):
        selective_opd_loss(*parts, **options)
    few = slice(0, 2 if rank == 1 else 3)
    with pytest.raises(ValueError, match=r"student: got 27, 18, 27, 27 positions on the ranks"):
        selective_opd_loss(mine[few], taught[few], process_group=group)
    with pytest.raises(ValueError, match=r"teacher: its 97 ids are shared out as \(60, 0, 37, 0\).*\(30, 7, 41, 19\)"):
        selective_opd_loss(mine, cut(teacher, CUTS["empty"], rank), process_group=group, **options)
    with pytest.raises(ValueError, match="eos_ids: ids cannot be merged where ranks"):
        selective_opd_loss(mine, taught, process_group=group, eos_ids=(1, 2), **options)
    with pytest.raises(ValueError, match="top_k: got 98, expected at most the vocabulary size, 97"):
        selective_opd_loss(mine, taught, process_group=group, **(options | {"top_k": 98}))
    with pytest.raises(ValueError, match="selection_group: got None where ranks share out the vocabulary"):
        selective_opd_loss(mine, taught, process_group=group, scope="global", **options)
    with pytest.raises(ValueError, match="inplace_backward: got True"):
        selective_opd_loss(mine, taught, process_group=group, inplace_backward=True, **(options | {"backend": "triton"}))


# --- what is sent ----------------------------------------------------------------------------------------------------


class _Sent:
    """Counts what `Ranks` sends inside."""

    def __init__(self, patch):
        self.calls = []
        for name in ("sum", "gather", "first"):
            patch.setattr(Ranks, name, self.counting(name, getattr(Ranks, name)))

    def counting(self, name, method):
        def call(ranks, x):
            if ranks.size > 1 and x.numel():
                self.calls.append((name, x.numel() * x.element_size()))
            return method(ranks, x)

        return call


def _sent(kind, divergence, backend):
    student, teacher = sides_of(kind)
    mine = cut(student, CUTS["uneven"], dist.get_rank(), requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        sent = _Sent(patch)
        options = options_of(backend=backend, divergence=DIVERGENCES[divergence])
        out = selective_opd_loss(mine, cut(teacher, CUTS["uneven"], dist.get_rank()), process_group=dist.group.WORLD, **options)
        forward = list(sent.calls)
        out.loss.backward()
    return forward, sent.calls[len(forward) :], int(out.metrics["n_valid"]), int(out.metrics["n_selected"])


# --- tests ---


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_dtensors_bring_their_group(ranks, kind):
    ranks.run(_dtensors, kind)


def test_ranks_may_share_out_both_vocabulary_and_positions(ranks):
    ranks.run(_both_ways)


def test_what_does_not_fit_raises_on_every_rank(ranks):
    ranks.run(_refused)


@pytest.mark.full
def test_what_is_sent_is_what_is_stated(ranks):
    def of(*case):
        got = ranks.run(_sent, *case)
        assert all(each == got[0] for each in got)
        return got[0]

    for backend in ("torch", "triton"):
        forward, backward, n, m = of("logits", "reverse_kl", backend)
        score = [("gather", n * joined.row_bytes(6, torch.float32, columns=7 if backend == "triton" else 11))]
        again = [("gather", m * joined.row_bytes(1, torch.float64, columns=7))] if backend == "triton" else []
        assert forward == [("gather", 32), *([("sum", 8)] if backend == "triton" else []), *score, *again]
        assert backward == []
    forward, backward, n, m = of("heads", "forward_kl", "torch")
    assert forward[2:] == []
    assert backward == [("sum", m * 24 * 4)]  # the hidden states' gradient, fp32
    forward, backward, n, m = of("heads", "forward_kl", "triton")
    gather = ("gather", m * joined.row_bytes(1, torch.float64, columns=7))
    assert forward[3:] == [gather, ("sum", m * 24 * 4)]  # made in the forward
    assert backward == []
    forward, backward, n, m = of("logits", "jsd", "torch")
    assert forward[2:] == [("sum", m * 24)]
    assert backward == []
