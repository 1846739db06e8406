"""One running mean: torchmetrics' ``MeanMetric``, made exact, and the losses that it has not yet summed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

# Summing costs a CPU some 200 microseconds, however many losses there are: at this number less than one for each.
_WAITING = 256
# What every mean begins with, wherever its losses lie: at rest it holds no tensor of its own.
_ZERO = torch.zeros((), dtype=torch.float64, device="cpu")


class ExactMean(MeanMetric):
    """``MeanMetric`` in float64 that keeps NaN and never reads the host.

    No ``nan_strategy`` does: ``"disable"`` ignores the weights (torchmetrics issue 3434), the others look at each value
    from the host. And ``set_dtype(float64)`` does not survive a ``.to(device)``. So the sums are formed here; they lie
    where the losses do.
    """

    waiting: list[tuple[Tensor, Any]]

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        vars(self).pop("value", None)  # what torchmetrics 1.0 calls its sum
        self._defaults = {"mean_value": _ZERO, "weight": _ZERO}
        vars(self).update(self._defaults)
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        vars(self).update(self._defaults, waiting=[])

    def update(self, value: Any, weight: Any = 1.0) -> None:
        """Take a loss, a tensor without dimensions that nobody changes any more, and its weight, such or a number."""
        self.waiting.append((value, weight))
        if len(self.waiting) >= _WAITING:
            self.sum_up()

    def compute(self) -> Tensor:
        """The mean, float64, without dimensions; NaN before the first loss."""
        self.sum_up()
        return self.mean_value / self.weight

    def sum_up(self) -> None:
        """Add the losses that wait to the sums."""
        mean_value, weight = self.sums()
        # All three at once: a signal handler that saves a checkpoint may run between any two lines.
        vars(self).update(mean_value=mean_value, weight=weight, waiting=[])

    def sums(self) -> tuple[Tensor, Tensor]:
        """sum(weight x loss) and sum(weight) over all losses, float64, without dimensions. Changes nothing."""
        if not self.waiting:
            return self.mean_value, self.weight
        losses, weights = zip(*self.waiting)
        # MPS has no float64.
        device = next((loss.device for loss in losses if not loss.is_cpu), self.mean_value.device)
        device = _ZERO.device if device.type == "mps" else device
        if len(losses) == 1 and type(weights[0]) in (int, float) and losses[0].device == device:
            with suppress(RuntimeError):  # quicker, for a progress bar that asks after each step; not for every type
                return torch.add(self.mean_value, losses[0], alpha=weights[0]), self.weight + weights[0]
        values, factors = _vector(losses, device), _vector(weights, device)
        # One weight below zero makes the sum of all weights NaN, so that whoever reads it can tell.
        factors = torch.where(factors < 0, torch.nan, factors)
        # Not in place: a sum that was made in inference mode could not be changed outside of it.
        return _to(self.mean_value, device) + values.dot(factors), _to(self.weight, device) + factors.sum()


# One of nothing, to read or to copy: making one takes torchmetrics longer than an epoch's end may.
blank = cache(ExactMean)


def new_mean() -> ExactMean:
    """A mean of nothing yet."""
    mean = copy(blank())
    mean.waiting = []
    return mean


def _vector(items: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers and tensors without dimensions as one float64 tensor."""
    kinds = set(map(type, items))
    if kinds <= {int, float}:
        return _to(torch.tensor(items, dtype=torch.float64), device)
    # Of several types, some would be rounded to the type of others.
    if kinds == {Tensor} and len({item.dtype for item in items}) == 1:
        with suppress(RuntimeError):  # of several devices
            return torch.stack(tuple(items)).to(device).to(torch.float64)
    tensors = [item if isinstance(item, Tensor) else torch.tensor(item, dtype=torch.float64) for item in items]
    return torch.stack([_to(tensor, device).to(torch.float64) for tensor in tensors])


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    # Without waiting for a device to be ready for it; what comes to the CPU must be there before it is read.
    return tensor.to(device, non_blocking=device.type != "cpu")
