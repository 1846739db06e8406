import decimal
import fractions
import math
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.utils.rnn import pack_sequence

from epoch_mixin._outputs import batch_size, checked_weight, losses_in, why_missing

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    name: Any
    x: Any = None


class Bag:
    """Can be iterated over, and is no container of any known kind."""

    def __init__(self, *items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Opaque:
    """Nothing in it can be seen."""

    def __init__(self, x):
        self.x = x


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    "batch",
    [
        ones(7, 2),
        ones(7),
        ones(0, 3),
        ones(),
        torch.nn.Parameter(ones(7)),
        ones(7, 2).to_sparse(),
        torch.nested.nested_tensor([ones(2), ones(3)]),
        pack_sequence([ones(3), ones(2)]),
        (ones(7), ones(3)),
        [ones(7), ones(3)],
        [ones(), ones(7)],
        [[[ones(7)]], ones(3)],
        {"x": ones(7), "y": ones(3)},
        {"y": {"z": [ones(7)]}, 0: ones(3)},
        OrderedDict(b=ones(7), a=ones(3)),
        UserDict(x=ones(7)),
        Pair(ones(7), ones(3)),
        {ones(7)},
        deque([ones(7)]),
        Bag(ones(7), ones(3)),
        Bag(Bag(), "text", Bag(ones(7))),
        Sample("name", ones(7)),
        [Sample(ones(7), ones(3))],
        (Sample("name"), ones(7)),
        # a class is no instance of it
        (Sample, ones(7)),
        ("text", ones(7)),
        (b"bytes", ones(7)),
        (None, 3, 2.5, ones(7)),
        ([], {}, (), ones(7)),
        (np.ones((2, 2)), ones(7)),
        (Opaque(ones(3)), ones(7)),
        (range(3), ones(7)),
        ones(7).expand(2, 7),
        None,
        3,
        2.5,
        "text",
        b"bytes",
        [],
        {},
        (),
        ["some", "text"],
        {"x": [1, 2, 3]},
        np.ones((3, 2)),
        Opaque(ones(7)),
        Sample("name"),
        MagicMock(),
        [None, (None, [None])],
    ],
    ids=lambda batch: str(type(batch).__name__),
)
def test_batch_size_is_the_one_that_lightning_infers(batch):
    try:
        expected = extract_batch_size(batch)
    except MisconfigurationException:
        expected = None
    assert batch_size(batch) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda source: source,
        lambda source: (source, ones(7)),
        lambda source: {"source": [source]},
        lambda source: Sample("name", source),
    ],
)
def test_iterators_are_left_alone(make):
    source = (ones(count) for count in (1, 2))
    batch = make(source)
    assert batch_size(batch) == (7 if isinstance(batch, tuple) else None)
    assert len(list(source)) == 2


def test_the_search_ends_at_the_first_tensor():
    def never():
        raise AssertionError("looked further than the first tensor")

    class Endless:
        def __iter__(self):
            yield ones(7)
            never()

    assert batch_size([Endless(), ones(3)]) == 7


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor(2.5, requires_grad=True),
        torch.tensor([2.5]),
        torch.tensor([[2.5]], dtype=torch.float64),
        torch.tensor(2.5, dtype=torch.bfloat16),
        {"loss": torch.tensor(2.5)},
        UserDict(loss=torch.tensor(2.5)),
        OrderedDict(other="text", loss=2.5),
        {"loss": np.float32(2.5)},
        {"loss": fractions.Fraction(5, 2)},
    ],
)
def test_a_loss_is_read_as_a_detached_scalar(output):
    (loss,) = losses_in(output, ("loss",)).values()
    assert loss.shape == () and not loss.requires_grad
    assert loss == 2.5


def test_plain_numbers_are_read_in_full_precision(default_dtype):
    default_dtype(torch.float16)
    losses = losses_in({"loss": 0.1, "kl": 10**15 + 1}, ("loss", "kl"))
    assert [loss.item() for loss in losses.values()] == [0.1, 10**15 + 1]


def test_integers_and_booleans_are_losses_too():
    losses = losses_in({"errors": torch.tensor(3), "wrong": True}, ("errors", "wrong"))
    assert losses == {"errors": 3, "wrong": 1}


def test_only_the_keys_asked_for_are_read():
    output = {"loss": torch.tensor(1.0), "kl": torch.tensor(2.0), "logits": ones(3)}
    assert losses_in(output, ("kl", "loss")) == {"kl": 2.0, "loss": 1.0}
    assert losses_in(output, ("kl", "missing")) == {"kl": 2.0}
    assert losses_in(torch.tensor(1.0), ("kl", "loss")) == {"loss": 1.0}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_loss_is_a_copy_of_its_own(shape):
    loss = torch.full(shape, 2.0)
    read = losses_in(loss, ("loss",))
    loss.zero_()
    assert read == {"loss": 2.0}


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (ones(3), "returned no real scalar for it but a Tensor of shape (3,)"),
        (ones(0), "returned no real scalar for it but a Tensor of shape (0,)"),
        ({"loss": ones(2, 2)}, "returned no real scalar for it but a Tensor of shape (2, 2)"),
        ({"loss": "low"}, "returned no real scalar for it but a str"),
        ({"loss": 1j}, "returned no real scalar for it but a complex"),
        ({"loss": [1.0]}, "returned no real scalar for it but a list"),
        ({"loss": decimal.Decimal(1)}, "returned no real scalar for it but a Decimal"),
        ({"Loss": ones(), "acc": 1.0}, "returned only 'Loss', 'acc'"),
        ({}, "returned only an empty dict"),
        ("low", "returned a str, not a tensor or a dict"),
        (2.5, "returned a float, not a tensor or a dict"),
        ((ones(), ones()), "returned a tuple, not a tensor or a dict"),
    ],
)
def test_what_is_no_loss_is_left_out_and_can_be_explained(output, reason):
    assert losses_in(output, ("loss",)) == {}
    assert why_missing(output, "loss") == reason


def test_a_complex_tensor_is_no_loss():
    output = torch.tensor(1j)
    assert losses_in(output, ("loss",)) == {}
    assert "real" in why_missing(output, "loss")


@pytest.mark.parametrize("output", [None, {"loss": None}])
def test_none_means_no_loss_on_purpose(output):
    assert losses_in(output, ("loss",)) == {}
    assert why_missing(output, "loss") is None


@pytest.mark.parametrize(
    "weight", [3, 2.5, 0, True, fractions.Fraction(5, 2), np.float64(2.5), np.int32(3), ones()[None], torch.tensor(3)]
)
def test_weights_may_be_any_real_number(weight):
    checked = checked_weight(weight, "Model")
    assert checked == weight and (not isinstance(checked, torch.Tensor) or checked.shape == ())


def test_a_weight_tensor_is_kept_as_it_was():
    weight = torch.tensor([3.0], requires_grad=True)
    checked = checked_weight(weight, "Model")
    with torch.no_grad():
        weight.zero_()
    assert checked == 3.0 and not checked.requires_grad


@pytest.mark.parametrize("weight", [-1, -0.5, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match=r"^Model\.epoch_loss_weight must return a finite number not below zero, not "):
        checked_weight(weight, "Model")


@pytest.mark.parametrize("weight", [None, "3", 1j, [3], decimal.Decimal(3), ones(2), ones(0), torch.tensor(1j)])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(TypeError, match=r"^Model\.epoch_loss_weight must return (a|one) number, not "):
        checked_weight(weight, "Model")
