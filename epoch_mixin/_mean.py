"""One running mean: torchmetrics' ``MeanMetric``, made exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class ExactMean(MeanMetric):
    """``MeanMetric`` in float64 that keeps NaN and never reads the host.

    No ``nan_strategy`` does: ``"disable"`` ignores the weights (torchmetrics issue 3434), the others look at each value
    from the host. And ``set_dtype(float64)`` does not survive a ``.to(device)``. So states and update are our own.

    Args:
        device: where the sums are kept. The CPU stands in for MPS, which has no float64.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        for state in ("mean_value", "weight"):
            self.add_state(state, zero, dist_reduce_fx="sum")

    def update(self, value: Any, weight: Any = 1.0) -> None:
        """Take in losses, a list of tensors without dimensions, and as many weights, numbers or such tensors.

        One weight below zero makes the sum of all weights NaN, so that whoever reads it can tell.
        """
        values, weights = self._vector(value), self._vector(weight)
        weights = torch.where(weights < 0, torch.nan, weights)
        # Not in place: a state that was made in inference mode could not be changed outside of it.
        self.mean_value = self.mean_value + values.dot(weights)
        self.weight = self.weight + weights.sum()

    def totals(self) -> Tensor:
        """sum(weight x loss) and sum(weight), float64, shape (2,)."""
        return torch.stack([self.mean_value, self.weight])

    def _vector(self, values: list[Any]) -> Tensor:
        device = self.mean_value.device
        if {int, float}.issuperset(map(type, values)):
            # Without waiting for the device to be ready for it.
            return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)
        if len({getattr(value, "dtype", None) for value in values}) > 1 or len({value.device for value in values}) > 1:
            # Stacked as they are, some would be rounded to the type of others.
            values = [torch.as_tensor(value, device=device).to(torch.float64) for value in values]
        return torch.stack(values).to(device).to(torch.float64)
