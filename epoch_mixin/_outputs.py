"""Reading the batches that steps are given and the outputs that they return."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def batch_size(batch: Any) -> int | None:
    """The batch size that ``self.log`` would infer: the length of the first tensor, 1 if that has no dimensions.

    Follows ``extract_batch_size`` of Lightning (``pytorch_lightning/utilities/data.py``), but stops at the first tensor
    and leaves iterators alone, which can be read only once. ``None`` where there is no tensor.
    """
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else 1
    items: Iterable[Any]
    if isinstance(batch, (tuple, list)):  # the common case needs no look at the abstract classes
        items = batch
    elif isinstance(batch, Mapping):
        items = batch.values()
    elif isinstance(batch, Iterable):
        items = () if isinstance(batch, (str, bytes, Iterator)) else batch
    else:
        is_instance = is_dataclass(batch) and not isinstance(batch, type)
        items = [getattr(batch, field.name) for field in fields(batch)] if is_instance else ()
    for item in items:
        size = batch_size(item)
        if size is not None:
            return size
    return None


def losses_in(output: Any, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """The losses of a step output by key, as detached copies without dimensions. A bare tensor is ``"loss"``."""
    if isinstance(output, Tensor):
        output = {"loss": output}
    elif not isinstance(output, Mapping):
        return {}
    losses = {}
    for key in keys:
        loss = output.get(key)
        if isinstance(loss, Tensor):
            if type(loss) is not Tensor and hasattr(loss, "full_tensor"):
                loss = loss.full_tensor()  # a DTensor, which is the same on every rank of its mesh
            if loss.numel() == 1 and not loss.is_complex():
                # A copy, for the memory of an output may be written again: by the user, or by a replayed CUDA graph.
                # Through `data`, which is quicker than `detach()`.
                loss = loss.data.clone()
                losses[key] = loss.reshape(()) if loss.ndim else loss
        elif isinstance(loss, Real):
            losses[key] = torch.tensor(float(loss), dtype=torch.float64)
    return losses


def why_missing(output: Any, key: str) -> str | None:
    """Why `losses_in` found no such loss, for a message; ``None`` if the step meant to give none."""
    if output is None:
        return None
    if isinstance(output, Tensor):
        output = {"loss": output}
    elif not isinstance(output, Mapping):
        return f"returned a {type(output).__name__}, not a tensor or a dict"
    if key not in output:
        return f"returned only {', '.join(map(repr, output)) or 'an empty dict'}"
    loss = output[key]
    if loss is None:
        return None
    shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
    return f"returned no real scalar for it but a {type(loss).__name__}{shape}"


def checked_weight(weight: Any, owner: str) -> float | Tensor:
    """Return what ``owner.epoch_loss_weight`` gave in a form that can be kept, or raise.

    Whether a tensor is negative or not finite shows when its epoch ends: to look now would wait for the device.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise TypeError(
                f"{owner}.epoch_loss_weight must return one number, not a tensor of shape {tuple(weight.shape)}"
            )
        copy = weight.detach().clone() if weight.requires_grad else weight.clone()
        return copy.reshape(()) if copy.ndim else copy
    if not isinstance(weight, Real):
        raise TypeError(f"{owner}.epoch_loss_weight must return a number, not {weight!r}")
    number = float(weight)
    if not 0 <= number < math.inf:
        raise ValueError(f"{owner}.epoch_loss_weight must return a finite number not below zero, not {number}")
    return number
