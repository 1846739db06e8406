"""How much a step counts by its batch.

If the user does not override ``epoch_loss_weight``, the first of these counts:

1. the ``batch_size`` that the step logs with the loss itself;
2. the size of the batch, if all its tensors agree;
3. the ``batch_size`` that the step logs with another value;
4. what the batch says of itself;
5. the size that ``self.log`` would infer, with a warning.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from epoch_mixin._values import Number, Value


class BatchSize(NamedTuple):
    """What a batch tells of its size.

    Attributes:
        tensors: the different lengths of its tensors, first the one that ``self.log`` would infer.
        itself: what a batch of graphs says of itself, as ``num_graphs`` or ``batch_size``.
        kind: the type of the batch, for a message.
    """

    tensors: tuple[int, ...]
    itself: int | None
    kind: str

    @property
    def agreed(self) -> int | None:
        """The length of its tensors, if they all have the same."""
        return self.tensors[0] if len(self.tensors) == 1 else None

    @property
    def inferred(self) -> int:
        """The size, though it may be in doubt; 1 if nothing tells it."""
        return next((size for size in (self.agreed, self.itself, *self.tensors) if size is not None), 1)


def batch_size(batch: Any) -> BatchSize:
    """Look through a batch for its size."""
    tensors = tuple(dict.fromkeys(_sizes(_size_of_tensor, batch)))
    itself = None if len(tensors) == 1 else next(_sizes(_size_of_graph, batch), None)
    return BatchSize(tensors, itself, type(batch).__name__)


def first_size(batch: Any) -> int | None:
    """The length of the first tensor of a batch, as ``self.log`` would infer it.

    As Lightning's ``extract_batch_size``, but it does not read iterables of unknown type.
    """
    return next(_sizes(_size_of_tensor, batch), None)


def size_beside(logged: list[Value]) -> Number | None:
    """The ``batch_size`` that was given with any value of a step."""
    return next((value.size for value in logged if value.size is not None), None)


def _sizes(size_of: Any, batch: Any) -> Iterator[int]:
    with suppress(Exception):  # whatever a batch of unknown type may raise when it is looked through
        yield from (size for part in _parts(batch) if (size := size_of(part)) is not None)


def _size_of_tensor(part: Any) -> int | None:
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])  # on the CPU, always
    return (part.size(0) if part.ndim else 1) if isinstance(part, Tensor) else None


def _size_of_graph(part: Any) -> int | None:
    # Of PyG and of DGL.
    sizes = (getattr(part, name, None) for name in ("num_graphs", "batch_size"))
    return next((size for size in sizes if type(size) is int), None)


def _parts(batch: Any) -> Iterator[Any]:
    """A batch, and what it is made of. To look through other iterables would mean to read them."""
    yield batch
    parts: Any = ()
    if isinstance(batch, (tuple, list, set, frozenset, deque)) and not isinstance(batch, PackedSequence):
        parts = islice(batch, 32)  # what is longer holds plain values, or tensors of one kind
    elif isinstance(batch, Mapping):
        parts = batch.values()
    elif is_dataclass(batch):
        parts = (getattr(batch, field.name, None) for field in fields(batch))
    for part in parts:
        yield from _parts(part)
