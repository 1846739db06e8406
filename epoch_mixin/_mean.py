"""One running mean: torchmetrics' ``MeanMetric``, made exact and cheap."""

from operator import mul
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

# Summing on a device takes as long for one loss as for hundreds, so losses wait until there are this many.
BUFFER_SIZE = 256
# Every sum starts here: a mean at rest holds no tensor of its own.
_ZERO = torch.zeros((), dtype=torch.float64, device="cpu")


class ExactMean(MeanMetric):
    """``MeanMetric`` in float64 that keeps NaN and never reads a device.

    Of ``MeanMetric`` it has the two states, ``mean_value`` and ``weight``, and ``compute`` and ``reset``. How they are
    updated is replaced. No ``nan_strategy`` would do: ``"disable"`` ignores the weights (torchmetrics issue 3434), the
    others read each value. ``set_dtype(float64)`` does not survive a ``.to(device)``. So the sums are formed here, on
    the device of the losses.

    Attributes:
        mean_value: sum(weight x loss), as torchmetrics names it.
        weight: sum(weight).
        buffer: the losses that are not yet in the sums, each with its weight.
    """

    buffer: list[tuple[float | Tensor, float | Tensor]]

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        vars(self).pop("value", None)  # the name of the sum in torchmetrics 1.0
        self._defaults = {"mean_value": _ZERO, "weight": _ZERO}
        vars(self).update(self._defaults)
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        super().reset()
        vars(self).update(self._defaults, buffer=[])

    def update(self, value: Any, weight: Any = 1.0) -> None:
        """Add a loss and its weight: floats, or 0-dim tensors that nobody changes any more."""
        self.buffer.append((value, weight))
        if len(self.buffer) >= BUFFER_SIZE:
            self.flush()

    def compute(self) -> Tensor:
        """The mean, a 0-dim float64 tensor; NaN before the first loss."""
        self.flush()
        return self.mean_value / self.weight

    def flush(self) -> None:
        """Add the buffer to the sums."""
        mean_value, weight = self.sums()
        # All three at once: a signal handler that saves a checkpoint may run between any two lines.
        vars(self).update(mean_value=mean_value, weight=weight, buffer=[])

    def sums(self) -> tuple[Tensor, Tensor]:
        """sum(weight x loss) and sum(weight) with the buffer, 0-dim float64 tensors. Changes nothing."""
        # A weight of 0 adds nothing, also where the loss is NaN.
        pairs = [(loss, weight) for loss, weight in self.buffer if isinstance(weight, Tensor) or weight]
        if not pairs:
            return self.mean_value, self.weight
        losses, weights = zip(*pairs)
        tensors = [item for item in (*losses, *weights) if isinstance(item, Tensor)]
        if not tensors:
            return self.mean_value + sum(map(mul, losses, weights)), self.weight + sum(weights)
        # MPS has no float64.
        devices = (tensor.device for tensor in (*tensors, self.mean_value))
        device = next((device for device in devices if device.type not in ("cpu", "mps")), _ZERO.device)
        values, factors = _vector(losses, device), _vector(weights, device)
        if any(isinstance(weight, Tensor) for weight in weights):
            # A negative weight makes the sum of all weights NaN, so that whoever reads it can tell.
            factors = torch.where(factors < 0, torch.nan, factors)
            values = torch.where(factors == 0, 0.0, values)
        # Not in place: a sum that was made in inference mode could not be changed outside of it.
        return _to(self.mean_value, device) + values.dot(factors), _to(self.weight, device) + factors.sum()


def _vector(items: tuple[Any, ...], device: torch.device) -> Tensor:
    """Floats and 0-dim tensors as one float64 tensor."""
    tensors = [item if isinstance(item, Tensor) else torch.tensor(item, dtype=torch.float64) for item in items]
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [_to(tensor, device) for tensor in tensors]
    return _to(torch.stack(tensors), device).to(torch.float64)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    # Without waiting for a device; a copy to the CPU must be complete before it is read.
    return tensor.to(device, non_blocking=device.type != "cpu")
