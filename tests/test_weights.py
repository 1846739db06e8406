from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from epoch_mixin._weights import BatchSize, batch_size, first_size

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
        *(ones(7, 2), ones(7), ones(0, 3), ones(), torch.nn.Parameter(ones(7)), ones(7, 2).to_sparse()),
        *(torch.nested.nested_tensor([ones(2), ones(3)]), ones(7).expand(2, 7)),
        *((ones(7), ones(3)), [ones(7), ones(3)], [ones(), ones(7)], [[[ones(7)]], ones(3)]),
        *({"x": ones(7), "y": ones(3)}, {"y": {"z": [ones(7)]}, 0: ones(3)}, OrderedDict(b=ones(7), a=ones(3))),
        *(UserDict(x=ones(7)), Pair(ones(7), ones(3)), {ones(7)}, deque([ones(7)])),
        *(Sample("name", ones(7)), [Sample(ones(7), ones(3))], (Sample("name"), ones(7)), (Sample, ones(7))),
        *(("text", ones(7)), (b"bytes", ones(7)), (None, 3, 2.5, ones(7)), ([], {}, (), ones(7))),
        *((np.ones((2, 2)), ones(7)), (Opaque(ones(3)), ones(7)), (range(3), ones(7))),
        *(None, 3, 2.5, "text", b"bytes", [], {}, (), ["some", "text"], {"x": [1, 2, 3]}, np.ones((3, 2))),
        *(Opaque(ones(7)), Sample("name"), MagicMock(), [None, (None, [None])]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_the_first_size_is_the_one_that_lightning_infers(batch):
    try:
        expected = extract_batch_size(batch)
    except MisconfigurationException:
        expected = None
    assert first_size(batch) == expected


def test_all_batch_sizes_that_the_tensors_tell():
    batch = {"edge_index": ones(2, 9), "x": [ones(7, 3), Sample("name", ones(7))], "y": ones(), "name": "text"}
    assert batch_size(batch) == BatchSize((2, 7, 1), None, "dict")
    assert batch_size(batch).agreed is None and batch_size(batch).inferred == 2


SEQUENCES = pack_sequence([ones(3), ones(2)])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (SEQUENCES, 2),
        ((SEQUENCES, ones(2)), 2),
        (SimpleNamespace(num_graphs=5, batch_size=9, x=ones(7)), 5),
        ({"graphs": [SimpleNamespace(batch_size=5)], "name": "text"}, 5),
        ((SimpleNamespace(num_graphs=5), ones(7)), 7),
        ((SimpleNamespace(num_graphs=5), ones(7), ones(3)), 5),
        (SimpleNamespace(num_graphs=None, batch_size="all"), 1),
        (SimpleNamespace(num_graphs=torch.tensor(5), batch_size=True), 1),
    ],
    ids=[
        *("sequences", "in a tuple", "graphs", "graphs in a dict", "beside a tensor", "beside tensors that disagree"),
        *("no number", "no int"),
    ],
)
def test_a_batch_may_tell_its_size_itself(batch, size):
    assert batch_size(batch).inferred == size


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: (it, ones(7)), lambda it: {"it": [it], "x": ones(7)}])
def test_iterators_and_dataloaders_in_a_batch_are_left_alone(wrap):
    source, episodes = (ones(count) for count in (1, 2)), DataLoader(list(range(9)), None, shuffle=True)
    random = torch.get_rng_state()
    for it in (source, episodes):
        assert batch_size(wrap(it)).tensors == (() if wrap(it) is it else (7,))
    assert len(list(source)) == 2 and torch.equal(torch.get_rng_state(), random)


class Counted:
    """Counts what is read of it."""

    reads = 0

    def __iter__(self):
        for item in super().__iter__():
            self.reads += 1
            yield item

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


CountedArray, CountedBytes, CountedList = (
    type(base.__name__, (Counted, base), {}) for base in (np.ndarray, bytearray, list)
)


@pytest.mark.parametrize(
    "heavy",
    [
        np.zeros((16, 3, 224, 224), dtype=np.uint8).view(CountedArray),
        CountedBytes(100_000),
        CountedList([0.5] * 100_000),
        CountedList([(0.1, "word")] * 100_000),
    ],
    ids=lambda heavy: type(heavy).__name__,
)
def test_what_holds_no_tensor_is_not_read_through(heavy):
    for batch in ((heavy, ones(7)), {"x": [heavy], "y": ones(7)}):
        heavy.reads = 0
        assert batch_size(batch).agreed == first_size(batch) == 7
        assert heavy.reads <= 4 * 32


def test_the_search_for_one_size_ends_at_the_first_tensor():
    class Endless(deque):
        def __iter__(self):
            yield ones(7)
            raise AssertionError("read further than the first tensor")

    assert first_size([Endless([1]), ones(3)]) == 7
