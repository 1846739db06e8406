"""Reading what steps are given, return and log: a loss, or the reason why there is none; a weight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

# A loss; or the reason why there is none, which is ``None`` for what was left out on purpose.
Read = Tensor | str | None

_in_transform = torch._C._functorch.is_functorch_wrapped_tensor
# What else a batch may be made of. Other things that can be iterated over (arrays, datasets, iterators) would have to
# be read, at a price, to find a tensor in them.
_COLLECTIONS = (tuple, list, set, frozenset, deque)
# A longer collection that begins with a plain value, or a row of them, holds nothing else.
_LONG = 32


def batch_sizes(batch: Any) -> list[int]:
    """The different batch sizes that the tensors of a batch tell: their lengths, 1 if without dimensions.

    The first is the one that ``self.log`` would infer, but ``extract_batch_size`` of Lightning's ``utilities/data.py``
    reads all that can be iterated.
    """
    with suppress(Exception):  # whatever a batch of unknown making may raise when it is looked through
        return list(dict.fromkeys(_sizes(batch)))
    return []


def batch_size(batch: Any) -> int | None:
    """The first of `batch_sizes`; ``None`` where no tensor tells it."""
    first = batch[0] if type(batch) in (list, tuple) and batch else batch
    if isinstance(first, Tensor):  # the commonest batches need no search
        return first.size(0) if first.ndim else 1
    with suppress(Exception):
        return next(_sizes(batch), None)
    return None


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        yield batch.size(0) if batch.ndim else 1
        return
    items: Any = ()
    if isinstance(batch, _COLLECTIONS):
        if len(batch) <= _LONG or not _is_plain(next(iter(batch))):
            items = batch
    elif isinstance(batch, Mapping):
        items = batch.values()
    elif is_dataclass(batch):
        items = [getattr(batch, field.name, None) for field in fields(batch)]
    for item in items:
        yield from _sizes(item)


def _is_plain(item: Any) -> bool:
    if isinstance(item, _COLLECTIONS):
        return 0 < len(item) <= _LONG and all(map(_is_plain, item))
    return isinstance(item, (Real, str, bytes))


def losses_in(
    output: Any, logged: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], many: set[str], dims: bool = True
) -> dict[str, Read]:
    """The losses that a step returned and logged, by key; for each, where there is none, the reason.

    Args:
        output: what the step returned; a bare tensor or number is ``"loss"``.
        logged: what it logged, by name. What is returned comes first.
        names: for each key under which names its loss may be found, the key itself first.
        many: the keys of which a step has returned several numbers, to which this one's are added. Of these, one
            element with dimensions is no loss.
        dims: whether a returned tensor with one element may have dimensions.

    Returns:
        The losses as in `as_loss`.
    """
    returned = {"loss": output} if isinstance(output, Tensor) else _returned(output)
    losses = {}
    for key, aliases in names.items():
        single = dims and key not in many
        loss = as_loss(returned.get(key), single)
        if not isinstance(loss, Tensor):
            others = [(returned[name], single) for name in aliases[1:] if name in returned]
            # Who logs names the curve, who returns names the loss.
            others += [(logged[name], True) for name in aliases[::-1] if name in logged]
            for value, dimensional in others:
                seen = as_loss(value, dimensional)
                loss = loss if seen is None else seen
                if isinstance(loss, Tensor):
                    break
            if isinstance(loss, str):
                with suppress(Exception):
                    many.update(key for name in aliases if name in returned and returned[name].numel() > 1)
                loss = f"gave {loss} for it, which is no real scalar"
            elif loss is None and output is not None and not any(name in returned for name in aliases):
                loss = described(output, logged)
        losses[key] = loss
    return losses


def _returned(output: Any) -> Mapping[str, Any]:
    with suppress(Exception):  # a mapping of unknown making may raise whatever it is asked
        if isinstance(output, Mapping):
            return output if type(output) is dict else dict(output.items())
    return {"loss": output}


def as_loss(value: Any, dims: bool = True) -> Read:
    """The value as a detached copy without dimensions; what it is, if it is no loss; ``None`` for ``None``.

    One element with dimensions is a loss where these are allowed.
    """
    if value is None:
        return None
    try:
        # By far the commonest. What has an address is dense, has a value, and is within no transform of torch.func.
        if type(value) is Tensor and not value.ndim and not value.is_complex() and value.data_ptr():
            # A copy, for the memory of an output may be written again: by the user, or by a replayed CUDA graph.
            # Through `data`, which is quicker than `detach()`.
            return value.data.clone()
    except Exception:  # it is looked at more closely below
        pass
    try:
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout is not torch.strided:
                value = _plain(value)
            if _in_transform(value):
                return f"a {type(value).__name__} within a transform of torch.func"
            # A tensor that stands for others has no address on a device where all have one.
            held = value.data_ptr() or value.device.type in ("xla", "lazy")
            if held and value.numel() == 1 and (dims or not value.ndim) and not value.is_complex():
                return cast(Tensor, value.data.sum())
            return f"a {type(value).__name__} of shape {tuple(value.shape)}{' without values' * value.is_meta}"
        if isinstance(value, Real) or getattr(value, "ndim", None) == 0:
            return torch.tensor(float(value), dtype=torch.float64)
    except Exception as error:  # whatever a value of unknown making may raise: recording must not
        return f"a {type(value).__name__} that cannot be read ({error})"
    return f"a {type(value).__name__}"


def _plain(value: Tensor) -> Tensor:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()  # a DTensor, which is the same on every rank of its mesh
    with torch._C.DisableTorchFunctionSubclass():
        return value.detach().to_dense().as_subclass(Tensor)


def described(output: Any, logged: Mapping[str, Any]) -> str:
    """What a step returned and logged, for a message."""
    returned = None if output is None else f"only a {type(output).__name__}"
    if isinstance(output, Mapping):
        with suppress(Exception):
            returned = f"only {', '.join(map(repr, output.keys()))}" if len(output) else "an empty dict"
    # Lightning takes a metric that was only updated, and logs its value when the epoch ends.
    named = [f"{name!r}{' (a metric that was only updated)' * (value is None)}" for name, value in logged.items()]
    return f"returned {returned}" + (f" and logged {', '.join(named)}" if named else "")


def checked_weight(weight: Any, owner: str) -> float | Tensor:
    """Return what ``owner.epoch_loss_weight`` gave in a form that can be kept, or raise.

    Whether a tensor is negative or not finite shows when its epoch ends: to look now would wait for the device.
    """
    if isinstance(weight, Tensor):
        copy = as_loss(weight)
        if isinstance(copy, Tensor):
            return copy
        raise TypeError(f"{owner}.epoch_loss_weight must return one number, not {copy}")
    if not isinstance(weight, Real):
        raise TypeError(f"{owner}.epoch_loss_weight must return a number, not {weight!r}")
    if not 0 <= float(weight) < math.inf:
        raise ValueError(f"{owner}.epoch_loss_weight must return a finite number not below zero, not {weight}")
    return float(weight)
