"""What a step gives, as a number: a float, or a copy on its device that nobody reads while the epoch runs."""

import math
from contextlib import nullcontext, suppress
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

# A float, or a detached tensor without dimensions that nobody changes any more.
Number = float | Tensor


class Place(NamedTuple):
    """The memory of a tensor, which tells the same tensor without a look at its values.

    Attributes:
        memory: its address; ``None`` if it has none.
        version: how often it has been changed in place.
    """

    memory: int | None
    version: int | None

    @property
    def is_known(self) -> bool:
        """Whether it tells the same tensor from a changed one; not in inference mode."""
        return self.memory is not None and self.version is not None


NO_PLACE = Place(None, None)


class Rejected(str):
    """What a value is that is not one number, in words."""


class RejectedTensor(Rejected):
    """The shape of a tensor that is not one number."""


class Value(NamedTuple):
    """A value that a step returned or logged.

    Attributes:
        name: its name; empty if it was returned without one.
        given: the value itself; of a metric, that of its latest call.
        place: the memory of a tensor.
        number: what `as_number` made of it at that moment; ``None`` also if its name means no key.
        size: the ``batch_size`` that was given with it.
    """

    name: str
    given: Any
    place: Place
    number: Number | Rejected | None = None
    size: Number | None = None


def as_number(value: Any, dims: bool = True) -> Number | Rejected | None:
    """Give a value as a float, or as a detached copy without dimensions if it is on a device.

    For ``None``, give ``None``. ``dims`` tells whether one element with dimensions is one number.
    """
    kind = type(value).__name__
    try:
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout is not torch.strided:
                value = _plain(value)
            # A meta or fake tensor has the address 0. XLA and lazy tensors always have.
            has_value = value.device.type in ("xla", "lazy") or value.data_ptr()
            if not has_value or value.numel() != 1 or (value.ndim and not dims) or value.is_complex():
                what = " without values" if value.is_meta else " of complex numbers" if value.is_complex() else ""
                return RejectedTensor(f"a {kind} of shape {tuple(value.shape)}{what}")
            if value.is_cpu:
                return float(value.item())
            # A copy: the user, or a replayed CUDA graph, may write to the memory again. MPS has no float64.
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            return cast(Tensor, value).data.sum(dtype=dtype)
        if isinstance(value, Real) or getattr(value, "ndim", None) == 0:
            return float(value)
    except Exception as error:  # whatever a value of unknown type may raise: recording must not
        where = ", as within a transform of torch.func" * isinstance(value, Tensor)
        return Rejected(f"a {kind} that cannot be read{where} ({error})")
    return None if value is None else Rejected(f"a {kind}")


def as_size(size: Any) -> Number | None:
    """Give the ``batch_size`` of a ``self.log``; ``None`` if it is no number, negative or not finite."""
    number = as_number(size) if isinstance(size, (Real, Tensor)) else None
    if isinstance(number, float):
        return number if 0 <= number < math.inf else None
    return number if isinstance(number, Tensor) else None  # whether that is negative, no step waits to see


def place_of(value: Any) -> Place:
    """The memory of a value, if it is a tensor."""
    with suppress(Exception):  # what is no tensor, or one of unknown type, may have no memory
        return Place(value.data_ptr() or None, None if value.is_inference() else value._version)
    return NO_PLACE


def _plain(value: Tensor) -> Tensor:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()  # a DTensor, which is the same on every rank of its mesh
    with getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)():
        return value.detach().to_dense().as_subclass(Tensor)
