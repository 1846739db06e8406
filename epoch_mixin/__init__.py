"""The true mean loss of every epoch, for PyTorch Lightning."""

from epoch_mixin.mixin import EpochLossMixin

__all__ = ["EpochLossMixin"]
__version__ = "0.3.0"
