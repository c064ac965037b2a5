"""Memory on large pages: an ordinary tensor to everyone else, whose memory serves the next call once nobody holds it.
Run: make test ARGS=tests/backends/shared/test_pages.py

Not here: what it saves (benchmarks/LOG.md).
"""

import gc
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from opd_ops import selective_opd_loss
from opd_ops.backends.shared import pages
from tests.support.cases import head_pair, leaf_head

CPU = torch.device("cpu")
on_large_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux alone has large pages on request")


@pytest.fixture(scope="module", autouse=True)
def _no_cycle_holds_memory():
    gc.collect()  # once: in a process that holds all of transformers it takes half a second


@pytest.fixture(autouse=True)
def _no_memory_waits():
    pages.release()
    yield
    pages.release()


def floats(n_bytes: int) -> torch.Tensor:
    return pages.empty((n_bytes // 4,), torch.float32, CPU, keep=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_empty_has_the_shape_and_dtype_and_keeps_what_is_written(dtype):
    rows = pages.LARGE // (1000 * dtype.itemsize) + 7
    tensor = pages.empty((rows, 1000), dtype, CPU)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((rows, 1000), dtype, True)
    want = torch.arange(rows * 1000).remainder(251).view(rows, 1000)
    tensor.copy_(want)
    assert torch.equal(tensor, want.to(dtype))


def test_small_tensors_and_systems_without_large_pages_get_ordinary_memory(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("mapped memory of its own")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert pages.empty((3, 5), torch.float32, CPU).shape == (3, 5)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert pages.empty((pages.LARGE,), torch.float32, CPU).numel() == pages.LARGE


def test_a_kernel_that_refuses_large_pages_is_no_error(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # no advice has this number: EINVAL
    assert pages.empty((pages.LARGE,), torch.float32, CPU).zero_().count_nonzero() == 0


def test_a_weight_gradient_on_large_pages_serves_an_optimiser_and_accumulates(tmp_path):
    student, teacher = head_pair((40,), pages.LARGE // (24 * 4) + 100)
    student = leaf_head(student)
    optimiser = torch.optim.SGD([student.weight, student.hidden], lr=1.0)
    selective_opd_loss(student, teacher, fraction=0.5, backend="torch").loss.backward()
    once = student.weight.grad.clone()
    assert once.count_nonzero() > 0
    selective_opd_loss(student, teacher, fraction=0.5, backend="torch").loss.backward()
    assert torch.equal(student.weight.grad, 2 * once)
    torch.save(student.weight.grad, tmp_path / "gradient.pt")
    assert torch.equal(torch.load(tmp_path / "gradient.pt"), 2 * once)
    before = student.weight.detach().clone()
    optimiser.step()
    optimiser.zero_grad()
    assert student.weight.grad is None
    assert torch.equal(student.weight.detach(), before - 2 * once)


@on_large_pages
def test_memory_serves_the_next_tensor_once_no_view_holds_it():
    first = floats(pages.LARGE).fill_(1.0)
    view, place = first.view(2, -1)[1], first.data_ptr()
    del first
    second = floats(pages.LARGE).fill_(2.0)
    assert second.data_ptr() != place
    assert bool((view == 1).all())
    del view
    third = floats(pages.LARGE).fill_(3.0)
    assert third.data_ptr() == place
    assert bool((second == 2).all())


@on_large_pages
def test_memory_that_is_not_to_be_kept_goes_back_at_once():
    del [pages.empty((pages.LARGE,), torch.float32, CPU)][0]
    assert not pages._kept


@on_large_pages
def test_memory_in_a_graph_or_a_gradient_is_not_lent_again():
    weight = torch.ones(pages.LARGE // 4, requires_grad=True)
    saved = floats(pages.LARGE).fill_(3.0)
    loss = (weight * saved).sum()  # the graph holds it
    place = saved.data_ptr()
    del saved
    assert floats(pages.LARGE).data_ptr() != place
    loss.backward()
    assert bool((weight.grad == 3).all())


@on_large_pages
def test_a_gradient_in_used_memory_has_none_of_what_was_there():
    student, teacher = head_pair((40,), pages.LARGE // (24 * 4) + 100)
    gradients = []
    for _ in range(2):
        leaf = leaf_head(student)
        selective_opd_loss(leaf, teacher, fraction=0.5, backend="torch").loss.backward()
        gradients.append(leaf.weight.grad.clone())
        place = leaf.weight.grad.data_ptr()
        leaf.weight.grad.fill_(torch.nan)
        del leaf
    assert floats(gradients[0].nbytes).data_ptr() == place
    assert torch.equal(*gradients)


@on_large_pages
def test_a_small_tensor_does_not_hold_a_large_block():
    large = floats(4 * pages.LARGE)
    place = large.data_ptr()
    del large
    assert floats(pages.LARGE).data_ptr() != place
    half = floats(2 * pages.LARGE)
    assert (half.data_ptr(), half.numel()) == (place, 2 * pages.LARGE // 4)


@on_large_pages
def test_the_last_blocks_wait_and_no_more_than_stated():
    sizes = [(2 + pages.MOST_KEPT - i) * pages.LARGE for i in range(pages.MOST_KEPT + 2)]  # larger ones first
    tensors = [floats(size) for size in sizes]
    while tensors:
        del tensors[0]
    assert list(map(len, pages._kept)) == sizes[2:]
    place = floats(sizes[-1]).data_ptr()
    assert floats(sizes[-1]).data_ptr() == place
    pages.release()
    assert not pages._kept


@on_large_pages
def test_what_waits_is_the_kernels_to_take():
    lazily_freed = Path("/proc/self/smaps_rollup")
    if not lazily_freed.exists():
        pytest.skip("this kernel does not say what was lazily freed")

    def waiting() -> int:
        return next(int(line.split()[1]) << 10 for line in lazily_freed.read_text().splitlines() if line.startswith("LazyFree"))

    before = waiting()
    tensor = floats(8 * pages.LARGE).fill_(1.0)
    del tensor
    # Small pages may still be in a processor's queue, where nobody counts them yet.
    assert 7 * pages.LARGE <= waiting() - before <= 8 * pages.LARGE
    again = floats(8 * pages.LARGE).fill_(2.0)
    assert waiting() - before < pages.LARGE
    assert bool((again == 2).all())


@on_large_pages
def test_a_kernel_that_frees_nothing_lazily_gets_its_memory_back(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_FREE", -1, raising=False)
    del [floats(pages.LARGE)][0]
    assert not pages._kept


def test_threads_never_share_memory():
    def work(number: int) -> bool:
        for _ in range(50):
            tensor = floats(pages.LARGE).fill_(float(number))
            if not bool((tensor[::1024] == number).all()):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
