# Fresh memory on large pages: it must be an ordinary tensor to everyone else. Run: make test ARGS=tests/test_pages.py
#
# Not here: what it saves (benchmarks/LOG.md).
import mmap

import pytest
import torch

from opd_ops import selective_opd_loss
from opd_ops.backends import pages
from tests.cases import head_pair, leaf_head

CPU = torch.device("cpu")


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
