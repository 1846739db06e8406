"""Warnings that point at the user's file."""

import sys
import warnings

from torchmetrics.utilities.prints import rank_zero_only

# What lies between a user's file and us.
_BETWEEN = ("epoch_mixin", "torch", "torchmetrics", "pytorch_lightning", "lightning", "lightning_fabric", "contextlib")


@rank_zero_only
def warn(message: str) -> None:
    """Warn on the first rank, at the line that called into Lightning or into the module."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
