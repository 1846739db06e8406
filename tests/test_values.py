import decimal
import fractions

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from epoch_mixin._values import as_number, as_size
from tests.helpers import lazy_device


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    "value",
    [
        *(torch.tensor(3.0, requires_grad=True), torch.nn.Parameter(torch.tensor(3.0)), torch.tensor(3)),
        *(torch.tensor([3.0]), torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([3.0]).to_sparse()),
        *(torch.tensor(3.0, dtype=torch.bfloat16), 3.0, 3, np.float32(3), np.int8(3), np.array(3.0)),
        fractions.Fraction(6, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_loss_on_the_cpu_is_a_float(value):
    loss = as_number(value)
    assert type(loss) is float and loss == 3.0


def test_numbers_keep_their_precision(default_dtype):
    default_dtype(torch.float16)
    assert as_number(0.1) == 0.1
    assert as_number(10**15 + 1) == 10**15 + 1
    assert as_number(torch.tensor(0.1, dtype=torch.float64)) == 0.1
    assert as_number(True) == as_number(torch.tensor(True)) == 1.0


def test_one_element_with_dimensions_may_be_no_loss():
    assert as_number(ones(1), dims=False) == "a Tensor of shape (1,)"
    assert as_number(ones(), dims=False) == 1.0


class Unreadable:
    ndim = 0


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (ones(3), "a Tensor of shape (3,)"),
        (ones(0), "a Tensor of shape (0,)"),
        (torch.tensor(1j), "a Tensor of shape () of complex numbers"),
        (ones().to("meta"), "a Tensor of shape () without values"),
        (TwoTensor(torch.tensor(1.0), torch.tensor(2.0)), "a TwoTensor"),
        (1j, "a complex"),
        ("low", "a str"),
        ([1.0], "a list"),
        (decimal.Decimal(1), "a Decimal"),
        (10**400, "a int that cannot be read (int too large to convert to float)"),
        (Unreadable(), "a Unreadable that cannot be read ("),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_loss_is_named(value, what):
    assert as_number(value).startswith(what)


def test_none_is_no_loss_and_no_fault():
    assert as_number(None) is None


def test_a_loss_on_a_device_that_gives_no_address_is_one():
    for value in (torch.tensor(5.0), torch.tensor([5.0]), torch.tensor(5.0, requires_grad=True) * 1):
        assert as_number(value.to(lazy_device())).item() == 5


@pytest.mark.parametrize("size", [-1, float("nan"), float("inf"), "all", None, torch.ones(2), torch.tensor(-1)])
def test_a_batch_size_that_no_step_can_count_is_none(size):
    assert as_size(size) is None


@pytest.mark.parametrize("size", [0, 3, 2.5, np.int64(3), torch.tensor(3), torch.tensor([3])])
def test_a_batch_size_may_be_any_number(size):
    assert as_size(size) == size
