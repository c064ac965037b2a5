# Vocabularies that ranks share out, over gloo: every statistic, selection and gradient against one process that has it all, for
# every backend, divergence and teacher; uneven and empty parts, DTensors, what is refused, and what is sent.
#
# The interpreter takes a third of a second for a row, so kernels get few of them, and each part is scored once.
# Command: make test ARGS=tests/test_vocabulary_parallel.py
# Not here: selection over the positions of several ranks (test_global_selection.py).
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from opd_ops import (
    JSD,
    EntropyAware,
    Extrapolated,
    LocalSupport,
    SampledLogprobs,
    SampledToken,
    TailAware,
    TopKForwardKL,
    TopKLogprobs,
    TotalVariation,
    score_positions,
    selective_opd_loss,
    selective_opd_token_losses,
)
from opd_ops.backends import shards
from opd_ops.ranks import Ranks
from opd_ops.rollout import StudentStats
from tests.cases import generator, head_pair, leaf, leaf_head, logit_pair
from tests.ranks import SIZE, own_pair
from tests.tolerances import assert_stats, relative_error

VOCAB = 97
CUTS = {"uneven": (30, 7, 41, 19), "empty": (60, 0, 37, 0), "narrow": (5, 86, 3, 3)}
SHAPE = (3, 9)
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "jsd": JSD(0.3),
    "total_variation": TotalVariation(),
    "local_support": LocalSupport(top_k=8),
    "tail_aware": TailAware(top_k=8),
    "forward_kl_topk": TopKForwardKL(top_k=8),
    "sampled": SampledToken(clip=3.0),
    "entropy_aware": EntropyAware(tau=0.1, top_k=8),
}
LIST_ALONE = ("local_support", "tail_aware", "forward_kl_topk")


def _cut(side, widths, rank, *, requires_grad=False):
    """A rank's part of a side: a leaf of its own."""
    first = sum(widths[:rank])
    part = slice(first, first + widths[rank])
    if isinstance(side, torch.Tensor):
        found = side[..., part].clone()
        return found.requires_grad_() if requires_grad else found
    bias = None if side.bias is None else side.bias[part].clone()
    found = replace(side, hidden=side.hidden.clone(), weight=side.weight[part].clone(), bias=bias)
    return leaf_head(found) if requires_grad else found


def _sides(kind, dtype=torch.float32, seed=0):
    if kind == "logits":
        student, teacher = logit_pair(math.prod(SHAPE), VOCAB, noise=1.5, seed=seed, dtype=dtype)
        return student.view(*SHAPE, VOCAB), teacher.view(*SHAPE, VOCAB)
    softcap, scale = (20.0, 0.9) if kind == "softcap" else (None, 1.0)
    return head_pair(SHAPE, VOCAB, bias=True, softcap=softcap, scale=scale, seed=seed, dtype=dtype)


def _leaf(side):
    return leaf(side) if isinstance(side, torch.Tensor) else leaf_head(side)


def _gradients(side):
    tensors = [side] if isinstance(side, torch.Tensor) else [side.hidden, side.weight, side.bias]
    return [None if x is None else x.grad for x in tensors]


def _options(**more):
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[0, 5:] = False
    if more.get("backend") == "triton":
        mask[0, 2:] = mask[1:, 4:] = mask[1, :2] = False
    tokens = torch.randint(0, VOCAB, SHAPE, generator=generator(5))
    return {"mask": mask, "tokens": tokens, "fraction": 0.3, "top_k": 6, "backend": "torch"} | more


def _assert_known(got, want, *, alone):
    """Every column but where it is not known, NaN in both; `alone`: a column that `got` need not know."""
    without = {name: None for name, column in want._asdict().items() if column is None or name == alone}
    for name, column in want._asdict().items():
        if name not in without:
            assert torch.equal(getattr(got, name).isnan(), column.isnan()), name
    filled = (
        {name: x.nan_to_num(0.0, torch.inf) for name, x in s._asdict().items() if name not in without} for s in (got, want)
    )
    assert_stats(*(got._replace(**(without | columns)) for columns in filled), absolute=2e-6)


def _agree(student, teacher, widths, group, *, teacher_part=None, loss=selective_opd_loss, **options):
    """The loss on shared-out sides is that on whole ones: statistics, selection, gradients of every part."""
    rank = dist.get_rank(group)
    whole, mine = _leaf(student), _cut(student, widths, rank, requires_grad=True)
    beside = _cut(teacher, widths, rank) if teacher_part is None else teacher_part
    want = loss(whole, teacher, **(options | {"backend": "eager" if options["backend"] == "eager" else "torch"}))
    got = loss(mine, beside, process_group=group, **options)
    assert torch.equal(got.selected, want.selected)
    assert int(want.selected.sum()) > 1
    # Statistics from the rollout: kernels find the selected rows' own divergence alone.
    _assert_known(got.stats, want.stats, alone="forward_kl" if "student_stats" in options else None)
    if loss is selective_opd_loss:
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
        want.loss.backward()
        got.loss.backward()
        for name, value in want.metrics.items():
            torch.testing.assert_close(got.metrics[name], value, rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)
    else:
        factors = torch.randn(SHAPE, generator=generator(8))
        assert relative_error(got.losses, want.losses) < 1e-5
        (want.losses * factors).sum().backward()
        (got.losses * factors).sum().backward()
    first = sum(widths[:rank])
    part = slice(first, first + widths[rank])
    if isinstance(student, torch.Tensor):
        pairs = [(mine.grad, whole.grad[..., part])]
    else:
        (dh, dw, db), (wh, ww, wb) = _gradients(mine), _gradients(whole)
        pairs = [(dh, wh), (dw, ww[part]), (db, wb[part])]
    norm = max(float(x.norm()) for x in _gradients(whole) if x is not None)
    assert norm > 0
    for got_gradient, wanted in pairs:
        assert got_gradient.shape == wanted.shape
        # Of a part that has next to no gradient, in units of the whole one.
        error = float((got_gradient.double() - wanted.double()).norm())
        assert error <= 1e-5 * max(float(wanted.norm()), 1e-2 * norm), (error, float(wanted.norm()), norm)
    return got


# --- what runs on every rank -----------------------------------------------------------------------------------------


def _divergence(name, kind, cut, backend):
    _agree(*_sides(kind), CUTS[cut], dist.group.WORLD, divergence=DIVERGENCES[name], **_options(backend=backend))


def _divergences_by_kernels(kind):
    """All of them after one score pass: what kernels find of a part and some rows does not depend on the divergence."""
    from opd_ops.backends import triton_shards

    found, part = {}, triton_shards._part

    def once(*arguments):
        key = (*arguments[3].tolist(), arguments[4])  # rows, top_k
        if key not in found:
            found[key] = part(*arguments)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_shards, "_part", once)
        for name in DIVERGENCES:
            _divergence(name, kind, "uneven", "triton")


def _two_ranks(kind, backend):
    _agree(*_sides(kind, seed=3), (40, 57), own_pair(), **_options(backend=backend))


def _extrapolated(kind, backend):
    student, teacher = _sides(kind)
    reference = _sides(kind, seed=7)[1]
    rank, widths = dist.get_rank(), CUTS["uneven"]
    of_whole = Extrapolated(1.25, reference, TotalVariation())
    of_part = Extrapolated(1.25, _cut(reference, widths, rank), TotalVariation())
    whole, mine = _leaf(student), _cut(student, widths, rank, requires_grad=True)
    want = selective_opd_loss(whole, teacher, divergence=of_whole, **(_options(backend=backend) | {"backend": "torch"}))
    options = _options(backend=backend, divergence=of_part, process_group=dist.group.WORLD)
    got = selective_opd_loss(mine, _cut(teacher, widths, rank), **options)
    assert torch.equal(got.selected, want.selected)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)


def _pieces(kind, name):
    """Many gathers a call, and a temperature."""
    options = _options(divergence=DIVERGENCES[name], workspace_bytes=20_000, temperature=0.7)
    _agree(*_sides(kind), CUTS["uneven"], dist.group.WORLD, **options)


def _selectors(kind, backend, names):
    student, teacher = _sides(kind)
    for name in names:
        torch.manual_seed(dist.get_rank())  # draws of different ranks: the first one's count
        options = _options(backend=backend, selector=name)
        options.pop("fraction")
        rank = dist.get_rank()
        parts = _cut(student, CUTS["uneven"], rank), _cut(teacher, CUTS["uneven"], rank)
        got, stats = score_positions(*parts, process_group=dist.group.WORLD, **options)
        torch.manual_seed(0)
        want, of_whole = score_positions(student, teacher, **(options | {"backend": "torch"}))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)
        assert (stats.jsd is None) == (of_whole.jsd is None)
        assert len({tuple(x.flatten().tolist()) for x in Ranks.world().gather(got)}) == 1  # to the last bit


def _sparse(kind, backend, name):
    student, teacher = _sides(kind)
    logits = teacher if isinstance(teacher, torch.Tensor) else teacher.hidden @ teacher.weight.T + teacher.bias
    log_q, options = torch.log_softmax(logits, -1), _options(backend=backend)
    if name == "sampled":
        tokens = options["tokens"]
        sent = SampledLogprobs(tokens, log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
        options |= {"selector": "entropy"}
    else:
        best = log_q.topk(12)
        sent = TopKLogprobs(best.indices, best.values)
    options["divergence"] = DIVERGENCES[name]
    _agree(student, sent, CUTS["empty"], dist.group.WORLD, teacher_part=sent, **options)


def _student_stats(kind, backend):
    student, teacher = _sides(kind)
    logits = student if isinstance(student, torch.Tensor) else student.hidden @ student.weight.T + student.bias
    options = _options(backend=backend, student_stats=StudentStats.of_logits(logits, top_k=6))
    _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, **options)


def _token_losses(kind, backend, name):
    options = _options(backend=backend, divergence=DIVERGENCES[name])
    _agree(*_sides(kind), CUTS["uneven"], dist.group.WORLD, loss=selective_opd_token_losses, **options)


def _whole_teacher(kind):
    student, teacher = _sides(kind)
    _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, teacher_part=teacher, **_options())


def _cut_vocabulary():
    student, teacher = _sides("heads")
    _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, vocab_size=70, **_options())


def _not_finite(backend):
    student, teacher = (x.clone() for x in _sides("logits"))
    student[1, 2, :30] = -math.inf  # all of the first rank's part
    teacher[1, 3, 30:37] = -math.inf  # the student has mass there: reverse KL is infinite
    teacher[2, 1, 50] = math.nan
    student[2, 2, 1:] = teacher[2, 2, 1:] = -math.inf  # one entry alone
    got = _agree(student, teacher, CUTS["uneven"], dist.group.WORLD, **_options(backend=backend, fraction=0.6))
    assert got.stats.reverse_kl[1, 3] == math.inf
    assert int(got.metrics["n_infinite"]) == 1
    assert int(got.metrics["n_teacher_nonfinite"]) == 1
    student[0, 1, 96] = math.nan
    parts = (_cut(x, CUTS["uneven"], dist.get_rank())[:1] for x in (student, teacher))
    options = {"top_k": 6, "backend": backend, "mask": torch.arange(SHAPE[1]).unsqueeze(0) < 2}
    assert selective_opd_loss(*parts, process_group=dist.group.WORLD, **options).loss.isnan()


def _ties(backend):
    student, teacher = _sides("logits", dtype=torch.bfloat16)
    coarse = (x.mul(0.5).round() for x in (student, teacher))
    student, teacher = (x.float() if backend == "eager" else x for x in coarse)
    rank, options = dist.get_rank(), _options(backend=backend, fraction=1.0, selector="all")
    want = selective_opd_loss(student, teacher, **(options | {"backend": "eager"})).stats
    parts = (_cut(x, CUTS["uneven"], rank) for x in (student, teacher))
    assert_stats(selective_opd_loss(*parts, process_group=dist.group.WORLD, **options).stats, want, absolute=2e-6)


def _nothing_valid():
    student, teacher = _sides("heads")
    mine = _cut(student, CUTS["empty"], dist.get_rank(), requires_grad=True)
    options = _options(mask=torch.zeros(SHAPE), process_group=dist.group.WORLD)
    loss = selective_opd_loss(mine, _cut(teacher, CUTS["empty"], dist.get_rank()), **options).loss
    loss.backward()
    assert loss == 0
    assert all(not x.any() for x in _gradients(mine))


def _bf16_heads(backend):
    student, teacher = _sides("heads", dtype=torch.bfloat16)
    rank, widths = dist.get_rank(), CUTS["uneven"]
    whole, mine = _leaf(student), _cut(student, widths, rank, requires_grad=True)
    options = _options(backend=backend)
    oracle = _leaf(replace(student, hidden=student.hidden.double(), weight=student.weight.double(), bias=student.bias.double()))
    want = selective_opd_loss(whole, teacher, **(options | {"backend": "torch"}))
    got = selective_opd_loss(mine, _cut(teacher, widths, rank), process_group=dist.group.WORLD, **options)
    assert torch.equal(got.selected, want.selected)
    everything = _options(backend="eager", mask=want.selected, fraction=1.0)
    exact = replace(teacher, hidden=teacher.hidden.double(), weight=teacher.weight.double(), bias=teacher.bias.double())
    for loss in (selective_opd_loss(oracle, exact, **everything).loss, want.loss, got.loss):
        loss.backward()
    part = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
    for i, index in ((0, slice(None)), (1, part)):
        wanted = _gradients(oracle)[i][index]
        errors = [relative_error(x, wanted) for x in (_gradients(mine)[i], _gradients(whole)[i][index])]
        # Kernels round the logit gradient to 16 bits, as on one process.
        assert errors[0] <= (2.0 if backend == "triton" else 1.1) * errors[1] + 1e-5, errors


def _both_ways():
    """Two by two: a vocabulary over ranks 2i and 2i + 1, positions over the ranks across; as one process that has all."""
    rank = dist.get_rank()
    place, row, widths = rank % 2, rank // 2, (40, 57)
    across = [dist.new_group([i, i + 2]) for i in range(2)][place]
    sides = [_sides("heads", seed=seed) for seed in (3, 4)]  # of each row
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
        whole = _leaf(together[0])
        if scope == "sequence":  # each of the three sequences goes on from row to row
            joined = [x.view(2, *SHAPE, *x.shape[2:]).transpose(0, 1).flatten(1, 2) for x in (whole.hidden, together[1].hidden)]
            of_whole = [replace(x, hidden=hidden) for x, hidden in zip((whole, together[1]), joined, strict=True)]
            beside = {"mask": mask.transpose(0, 1).flatten(1), "tokens": tokens.transpose(0, 1).flatten(1)}
        else:
            of_whole, beside = [whole, together[1]], {"mask": mask.flatten(0, 1), "tokens": tokens.flatten(0, 1)}
        want = selective_opd_loss(*of_whole, **options, **beside, scope="batch" if scope == "global" else scope)
        want.loss.backward()
        hidden = [sides[row][i].hidden.clone() for i in range(2)]
        mine = leaf_head(_cut(replace(together[0], hidden=hidden[0]), widths, place))
        taught = _cut(replace(together[1], hidden=hidden[1]), widths, place)
        options |= {"mask": mask[row], "tokens": tokens[row], "scope": scope}
        got = selective_opd_loss(mine, taught, process_group=own_pair(), selection_group=across, **options)
        got.loss.backward()
        selected = want.selected.view(3, 2, 9)[:, row] if scope == "sequence" else want.selected.view(2, *SHAPE)[row]
        assert torch.equal(got.selected, selected), name
        assert relative_error(mine.hidden.grad, whole.hidden.grad.view(2, *SHAPE, -1)[row]) < 1e-5
        part = slice(sum(widths[:place]), sum(widths[: place + 1]))
        for gradient, of_all in ((mine.weight.grad, whole.weight.grad), (mine.bias.grad, whole.bias.grad)):
            assert relative_error(Ranks(across).sum(gradient.clone()), of_all[part]) < 1e-5  # what data parallelism adds up
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

    mesh, options = init_device_mesh("cpu", (SIZE,)), _options()

    def share(x, placement):
        return None if x is None else distribute_tensor(x.clone(), mesh, [placement])

    def shared_out(side):
        if isinstance(side, torch.Tensor):
            return share(side, Shard(side.dim() - 1))
        hidden, weight = share(side.hidden, Replicate()), share(side.weight, Shard(0))
        return replace(side, hidden=hidden, weight=weight, bias=share(side.bias, Shard(0)))

    student, teacher = _sides(kind)
    whole, mine = _leaf(student), _leaf(shared_out(student))
    want, got = selective_opd_loss(whole, teacher, **options), selective_opd_loss(mine, shared_out(teacher), **options)
    assert torch.equal(got.selected, want.selected)
    want.loss.backward()
    got.loss.backward()
    for mine_, of_whole in zip(_gradients(mine), _gradients(whole), strict=True):
        assert relative_error(mine_.full_tensor(), of_whole) < 1e-5
    if kind == "heads":  # hidden states that are no DTensor, as modules give them
        with_local = replace(
            mine, hidden=leaf(student.hidden), weight=leaf(mine.weight.detach()), bias=leaf(mine.bias.detach())
        )
        selective_opd_loss(with_local, shared_out(teacher), **options).loss.backward()
        assert relative_error(with_local.hidden.grad, whole.hidden.grad) < 1e-5
    # A whole teacher, as a DTensor that every rank has and as a plain tensor.
    if kind == "logits":
        replicated = share(teacher, Replicate())
        for beside in (replicated, teacher):
            assert torch.equal(selective_opd_loss(shared_out(student), beside, **options).selected, want.selected)
        with pytest.raises(ValueError, match=r"student: got a DTensor placed .*expected Shard"):
            selective_opd_loss(share(student, Shard(0)), teacher, **options)
        with pytest.raises(ValueError, match="teacher: is shared out over ranks, but the student is not"):
            selective_opd_loss(student, shared_out(teacher), **options)


def _refused():
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    student, teacher = _sides("logits")
    rank, group, options = dist.get_rank(), dist.group.WORLD, _options()
    mine, beside = (_cut(x, CUTS["uneven"], rank) for x in (student, teacher))
    with pytest.raises(ValueError, match=r"teacher: got 27, 18, 27, 27 positions on the ranks"):
        selective_opd_loss(mine, beside[: 2 if rank == 1 else 3], process_group=group)
    known = StudentStats.of_logits(student, top_k=6)
    with pytest.raises(
        ValueError, match=r"student_stats: are over the student's own vocabulary of 97, but .* first 70 entries"
    ):
        selective_opd_loss(mine, beside, process_group=group, student_stats=known, vocab_size=70, **options)
    strided = _cut(student, CUTS["empty"], rank).transpose(0, 1).contiguous().transpose(0, 1)
    on_kernels = options | {"backend": "triton"}
    with pytest.raises(ValueError, match="backend: got 'triton', but"):
        selective_opd_loss(strided, _cut(teacher, CUTS["empty"], rank), process_group=group, **on_kernels)
    with pytest.raises(ValueError, match="teacher: got 70 entries on each rank beside a student of 97 in all"):
        selective_opd_loss(mine, teacher[..., :70], process_group=group, **options)
    with pytest.raises(ValueError, match=r"selection_group: has ranks \[0, 1, 2, 3\] in common with the group"):
        selective_opd_loss(mine, beside, process_group=group, scope="global", selection_group=group, **options)
    turned = DeviceMesh("cpu", torch.tensor([3, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"student: got a DTensor on a mesh of ranks \[3, 1, 2, 0\], expected ascending"):
        selective_opd_loss(distribute_tensor(student, turned, [Shard(2)]), teacher, **options)
    heads, mesh = _sides("heads"), init_device_mesh("cpu", (2, 2))
    placed = [distribute_tensor(x.weight, mesh, [Replicate(), Shard(0)]) for x in heads]
    parts = [replace(x, weight=weight, bias=None) for x, weight in zip(heads, placed, strict=True)]
    with pytest.raises(ValueError, match=r"student\.weight: got a DTensor on a mesh of shape \(2, 2\) beside hidden states"):
        selective_opd_loss(*parts, **options)
    few = slice(0, 2 if rank == 1 else 3)
    with pytest.raises(ValueError, match=r"student: got 27, 18, 27, 27 positions on the ranks"):
        selective_opd_loss(mine[few], beside[few], process_group=group)
    with pytest.raises(ValueError, match=r"teacher: its 97 ids are shared out as \(60, 0, 37, 0\).*\(30, 7, 41, 19\)"):
        selective_opd_loss(mine, _cut(teacher, CUTS["empty"], rank), process_group=group, **options)
    with pytest.raises(ValueError, match="eos_ids: ids cannot be merged where ranks"):
        selective_opd_loss(mine, beside, process_group=group, eos_ids=(1, 2), **options)
    with pytest.raises(ValueError, match="top_k: got 98, expected at most the vocabulary size, 97"):
        selective_opd_loss(mine, beside, process_group=group, **(options | {"top_k": 98}))
    with pytest.raises(ValueError, match="selection_group: got None where ranks share out the vocabulary"):
        selective_opd_loss(mine, beside, process_group=group, scope="global", **options)
    with pytest.raises(ValueError, match="inplace_backward: got True"):
        selective_opd_loss(mine, beside, process_group=group, inplace_backward=True, **(options | {"backend": "triton"}))


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
    student, teacher = _sides(kind)
    mine = _cut(student, CUTS["uneven"], dist.get_rank(), requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        sent = _Sent(patch)
        options = _options(backend=backend, divergence=DIVERGENCES[divergence])
        out = selective_opd_loss(
            mine, _cut(teacher, CUTS["uneven"], dist.get_rank()), process_group=dist.group.WORLD, **options
        )
        forward = list(sent.calls)
        out.loss.backward()
    return forward, sent.calls[len(forward) :], int(out.metrics["n_valid"]), int(out.metrics["n_selected"])


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_every_divergence_is_that_of_one_process(ranks, name, kind):
    ranks.run(_divergence, name, kind, "uneven", "torch")


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_every_divergence_after_kernels_scored_the_parts(ranks, kind):
    ranks.run(_divergences_by_kernels, kind)


@pytest.mark.parametrize("cut", ["empty", "narrow"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "tail_aware", "local_support"])
@pytest.mark.parametrize("kind", ["logits", "softcap"])
def test_parts_may_be_empty_or_narrower_than_k(ranks, name, kind, cut):
    ranks.run(_divergence, name, kind, cut, "torch")


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "entropy_aware"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_the_oracle_takes_parts_too(ranks, name, kind):
    ranks.run(_divergence, name, kind, "empty", "eager")


@pytest.mark.parametrize("cut", ["empty", "narrow"])
def test_kernels_score_parts_that_are_empty_or_narrower_than_k(ranks, cut):
    ranks.run(_divergence, "reverse_kl", "logits", cut, "triton")


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_two_ranks(ranks, kind):
    ranks.run(_two_ranks, kind, "torch")


@pytest.mark.parametrize(
    ("kind", "backend"), [("logits", "torch"), ("heads", "torch"), ("heads", "triton"), ("logits", "eager"), ("heads", "eager")]
)
def test_an_extrapolated_teacher_has_a_reference_of_the_same_parts(ranks, kind, backend):
    ranks.run(_extrapolated, kind, backend)


def test_selectors_score_as_one_process_and_draw_alike_on_every_rank(ranks):
    names = ["teachability", "tip", "teachability-released", "overconfident", "random", "multinomial"]
    ranks.run(_selectors, "logits", "torch", names)
    ranks.run(_selectors, "logits", "triton", names[-1:])


@pytest.mark.parametrize("name", [*LIST_ALONE, "sampled"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_a_teacher_that_sends_lists(ranks, kind, name):
    ranks.run(_sparse, kind, "torch", name)


def test_a_teacher_that_sends_lists_to_kernels(ranks):
    ranks.run(_sparse, "logits", "triton", "tail_aware")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_statistics_from_the_rollout(ranks, backend):
    ranks.run(_student_stats, "heads", backend)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "local_support"])
def test_losses_of_positions(ranks, name):
    ranks.run(_token_losses, "heads", "torch", name)


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_a_teacher_may_be_whole(ranks, kind):
    ranks.run(_whole_teacher, kind)


def test_the_common_vocabulary_may_end_inside_a_part(ranks):
    ranks.run(_cut_vocabulary)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_that_are_not_finite(ranks, backend):
    ranks.run(_not_finite, backend)


@pytest.mark.parametrize("backend", ["eager", "torch", "triton"])
def test_ties_go_to_the_lower_id_of_the_whole_vocabulary(ranks, backend):
    ranks.run(_ties, backend)


def test_no_valid_position(ranks):
    ranks.run(_nothing_valid)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_heads_in_bf16_are_as_exact_as_on_one_process(ranks, backend):
    ranks.run(_bf16_heads, backend)


@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_dtensors_bring_their_group(ranks, kind):
    ranks.run(_dtensors, kind)


def test_ranks_may_share_out_both_vocabulary_and_positions(ranks):
    ranks.run(_both_ways)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "tail_aware"])
@pytest.mark.parametrize("kind", ["logits", "heads"])
def test_a_small_workspace_takes_many_gathers(ranks, kind, name):
    ranks.run(_pieces, kind, name)


def test_what_does_not_fit_raises_on_every_rank(ranks):
    ranks.run(_refused)


def test_what_is_sent_is_what_is_stated(ranks):
    def of(*case):
        found = ranks.run(_sent, *case)
        assert all(each == found[0] for each in found)
        return found[0]

    for backend in ("torch", "triton"):
        forward, backward, n, m = of("logits", "reverse_kl", backend)
        score = [("gather", n * shards.row_bytes(6, torch.float32))]
        again = [("gather", m * shards.row_bytes(1, torch.float64))] if backend == "triton" else []
        assert forward == [("gather", 32), *([("sum", 8)] if backend == "triton" else []), *score, *again]
        assert backward == []
    forward, backward, n, m = of("heads", "forward_kl", "torch")
    assert forward[2:] == []
    assert backward == [("sum", m * 24 * 4)]  # the hidden states' gradient, fp32
    forward, backward, n, m = of("heads", "forward_kl", "triton")
    assert forward[3:] == [("gather", m * shards.row_bytes(1, torch.float64)), ("sum", m * 24 * 4)]  # made in the forward
    assert backward == []
    forward, backward, n, m = of("logits", "jsd", "torch")
    assert forward[2:] == [("sum", m * 24)]
    assert backward == []
