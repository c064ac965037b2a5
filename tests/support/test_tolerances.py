"""The comparison helper itself: it must reject what a lenient one lets pass.

Run: make test ARGS=tests/support/test_tolerances.py
Not here: anything of the library (tests/loss/test_loss.py and its neighbours).
"""

import pytest
import torch

from opd_ops import selective_opd_loss
from tests.support.cases import leaf, logit_pair
from tests.support.tolerances import assert_gradient, assert_within, relative_error


def mean_loss_gradient() -> torch.Tensor:
    student, teacher = logit_pair(64, 4099, dtype=torch.float64)
    student = leaf(student)
    selective_opd_loss(student, teacher, backend="eager").loss.backward()
    return student.grad


def test_assert_gradient_rejects_an_all_zero_gradient():
    want = mean_loss_gradient()
    # The trap: at these shapes a tolerance of 1e-2 on each element of a mean-reduced gradient accepts zeros nearly everywhere.
    assert (want.abs() < 1e-2).double().mean() > 0.999
    with pytest.raises(AssertionError, match="relative error"):
        assert_gradient(torch.zeros_like(want), want)


def test_assert_gradient_rejects_a_gradient_two_percent_off():
    want = mean_loss_gradient()
    with pytest.raises(AssertionError, match="relative error"):
        assert_gradient(want * 1.02, want)


def test_assert_gradient_rejects_nan():
    want = mean_loss_gradient()
    with pytest.raises(AssertionError):
        assert_gradient(want * torch.nan, want)


def test_assert_gradient_rejects_an_oracle_of_zeros():
    with pytest.raises(AssertionError, match="prove nothing"):
        assert_gradient(torch.zeros(3), torch.zeros(3))


def test_assert_within_rejects_infinity_and_nan_against_numbers():
    for wrong in (torch.inf, torch.nan):
        with pytest.raises(AssertionError):
            assert_within(torch.tensor([wrong]), torch.tensor([1.0]), absolute=1e-6, relative=1e-4, name="x")
        with pytest.raises(AssertionError):
            assert_within(torch.tensor([1.0]), torch.tensor([wrong]), absolute=1e-6, relative=1e-4, name="x")


def test_relative_error_of_nothing_is_zero():
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == torch.inf
