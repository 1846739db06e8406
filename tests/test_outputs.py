import decimal
import fractions
import subprocess
import sys
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
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader

from epoch_mixin._outputs import as_loss, batch_size, batch_sizes, checked_weight, described, losses_in

Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    name: Any
    x: Any = None


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


class Walked:
    """Counts what is read of it."""

    reads = 0

    def __iter__(self):
        for item in super().__iter__():
            self.reads += 1
            yield item

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


class WalkedArray(Walked, np.ndarray):
    pass


class WalkedBytes(Walked, bytearray):
    pass


class WalkedList(Walked, list):
    pass


@pytest.mark.parametrize(
    "heavy",
    [
        np.zeros((16, 3, 224, 224), dtype=np.uint8).view(WalkedArray),
        WalkedBytes(100_000),
        WalkedList([0.5] * 100_000),
        WalkedList(["word"] * 100_000),
        WalkedList([(0.1, 0.2, 0.3, 0.4)] * 100_000),
    ],
    ids=lambda heavy: type(heavy).__name__,
)
@pytest.mark.parametrize("make", [lambda heavy: (heavy, ones(7)), lambda heavy: {"x": [heavy], "y": ones(7)}])
def test_what_holds_no_tensor_is_not_walked_through(heavy, make):
    heavy.reads = 0
    assert batch_size(make(heavy)) == 7
    assert batch_sizes(make(heavy)) == [7]
    assert heavy.reads <= 2


def test_a_dataloader_inside_a_batch_draws_no_random_numbers():
    episodes = DataLoader(list(range(9)), shuffle=True)
    before = torch.get_rng_state()
    assert batch_size((episodes, ones(7))) == 7
    assert batch_size([episodes]) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_the_search_ends_at_the_first_tensor():
    class Endless(deque):
        def __iter__(self):
            yield ones(7)
            raise AssertionError("looked further than the first tensor")

    assert batch_size([Endless([1]), ones(3)]) == 7


def test_all_batch_sizes_that_the_tensors_tell():
    batch = {"edge_index": ones(2, 9), "x": [ones(7, 3), Sample("name", ones(7))], "y": ones(), "name": "text"}
    assert batch_sizes(batch) == [2, 7, 1]


LOSS = {"loss": ("loss", "val_loss", "val/loss", "valid_loss")}


def read(output, logged=(), names=LOSS):
    """The losses as numbers, and the reasons."""
    found = losses_in(output, dict(logged), names, set())
    losses = {key: loss.item() for key, loss in found.items() if isinstance(loss, torch.Tensor)}
    return losses, {key: reason for key, reason in found.items() if isinstance(reason, str)}


def keys(*names):
    return {name: (name,) for name in names}


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(2.5, requires_grad=True),
        torch.nn.Parameter(torch.tensor(2.5)),
        torch.tensor([2.5]),
        torch.tensor([[2.5]], dtype=torch.float64),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([2.5]).to_sparse(),
        2.5,
        np.float32(2.5),
        np.array(2.5),
        fractions.Fraction(5, 2),
    ],
)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: UserDict(other="text", loss=value)])
def test_a_loss_is_read_as_a_detached_scalar(value, wrap):
    losses = losses_in(wrap(value), {}, LOSS, set())
    assert type(losses["loss"]) is torch.Tensor
    assert losses["loss"].shape == () and not losses["loss"].requires_grad
    assert losses == {"loss": 2.5}


def test_plain_numbers_are_read_in_full_precision(default_dtype):
    default_dtype(torch.float16)
    assert as_loss(0.1).item() == 0.1
    assert as_loss(10**15 + 1).item() == 10**15 + 1


@pytest.mark.parametrize("value", [torch.tensor(3), 3, np.int8(3)])
def test_integers_are_losses_too(value):
    assert as_loss(value) == 3
    assert as_loss(value > 2) == 1


def test_only_the_keys_asked_for_are_read():
    output = {"loss": torch.tensor(1.0), "kl": torch.tensor(2.0), "logits": ones(3)}
    assert read(output, names=keys("kl", "loss"))[0] == {"kl": 2.0, "loss": 1.0}
    assert read(output, names=keys("kl", "missing"))[0] == {"kl": 2.0}
    assert read(torch.tensor(1.0), names=keys("kl", "loss"))[0] == {"loss": 1.0}


def test_a_loss_may_be_returned_or_logged_under_the_name_of_its_curve():
    for name in LOSS["loss"]:
        assert read({name: 1.0}) == ({"loss": 1.0}, {})
        assert read(None, {name: 1.0}) == ({"loss": 1.0}, {})
    assert read({"loss": 1.0, "val_loss": 2.0})[0] == {"loss": 1.0}
    assert read(None, {"loss": 1.0, "val_loss": 2.0})[0] == {"loss": 2.0}


class Awkward(UserDict):
    """A mapping as tensordict makes them: not true or false, iterated over otherwise, names in a list."""

    __iter__ = __len__ = None

    def __bool__(self):
        raise RuntimeError("ambiguous")

    def keys(self):
        return list(self.data)

    def items(self):
        return self.data.items()


@pytest.mark.parametrize("output", [Awkward(predictions=ones(3)), MagicMock(spec=UserDict)])
def test_a_mapping_of_any_making_without_a_loss(output):
    assert read(output)[0] == {}
    assert described(output, {}).startswith("returned ")


def test_the_losses_in_a_mapping_of_any_making():
    assert read(Awkward(loss=ones(3), val_loss=1.0))[0] == {"loss": 1.0}


def test_a_tensor_that_holds_others_is_no_loss():
    both = TwoTensor(torch.tensor(1.0), torch.tensor(2.0))
    assert read(both)[1]["loss"].startswith("gave a ")


def test_what_is_returned_comes_before_what_is_logged():
    names = keys("loss", "kl")
    assert read(torch.tensor(1.0), {"loss": 5.0, "kl": 2.0}, names) == ({"loss": 1.0, "kl": 2.0}, {})
    assert read({"loss": "low"}, {"loss": 5.0})[0] == {"loss": 5.0}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_loss_is_a_copy_of_its_own(shape):
    loss = torch.full(shape, 2.0)
    copy = as_loss(loss)
    loss.zero_()
    assert copy == 2.0


class Unreadable:
    ndim = 0


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (ones(3), "a Tensor of shape (3,)"),
        (ones(0), "a Tensor of shape (0,)"),
        (torch.tensor(1j), "a Tensor of shape ()"),
        (ones().to("meta"), "a Tensor of shape () without values"),
        (1j, "a complex"),
        ("low", "a str"),
        ([1.0], "a list"),
        (decimal.Decimal(1), "a Decimal"),
        (10**400, "a int that cannot be read (int too large to convert to float)"),
        (Unreadable(), "a Unreadable that cannot be read ("),
    ],
)
def test_what_is_no_loss_is_named(value, what):
    assert as_loss(value).startswith(what)
    losses, reasons = read({"loss": value}, {"loss": None})
    assert losses == {}
    assert reasons == {"loss": f"gave {as_loss(value)} for it, which is no real scalar"}


@pytest.mark.parametrize(
    ("output", "logged", "words"),
    [
        ({"Loss": ones(), "acc": 1.0}, {}, "returned only 'Loss', 'acc'"),
        ({"Loss": ones()}, {"acc": 1.0, "f1": 1.0}, "returned only 'Loss' and logged 'acc', 'f1'"),
        ({}, {}, "returned an empty dict"),
        (None, {"acc": 1.0}, "returned None and logged 'acc'"),
        ("low", {}, "returned only a str"),
    ],
)
def test_a_missing_loss_is_explained_with_what_is_there(output, logged, words):
    assert described(output, logged) == words
    if isinstance(output, dict):
        assert read(output, logged) == ({}, {"loss": words})


@pytest.mark.parametrize("output", [None, {"loss": None}])
def test_none_means_no_loss_on_purpose(output):
    assert read(output) == ({}, {})


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


def test_a_loss_on_a_device_that_gives_no_address_is_one():
    code = """
import torch, torch._lazy.ts_backend
from epoch_mixin._outputs import as_loss
torch._lazy.ts_backend.init()
print([as_loss(torch.full(shape, 5.0).to("lazy")).item() for shape in ((), (1,))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.endswith("[5.0, 5.0]\n"), done.stderr
