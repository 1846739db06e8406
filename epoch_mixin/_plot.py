"""The curves: training and validation means over the epochs they belong to."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError("plot_epoch_losses needs matplotlib: pip install 'epoch-mixin[plot]'") from error

_VALIDATION = re.compile(r"val_(.+?)(?:/dataloader_idx_(\d+))?", re.DOTALL)
# The stages of a key share a colour. Pale and dark tells them apart where 500 noisy epochs hide the dashes.
_TRAIN: dict[str, Any] = {"linestyle": "-", "marker": "o", "linewidth": 2, "alpha": 0.5}
_VAL: dict[str, Any] = {"linestyle": "--", "marker": "o", "linewidth": 1.2, "fillstyle": "none"}
# What the dataloaders of a validation have instead, in turn.
_LOADERS: list[dict[str, Any]] = [
    {"linestyle": ":", "marker": "s"},
    {"linestyle": (0, (8, 4)), "marker": "D"},
    {"linestyle": "-.", "marker": "p"},
]
# What has no place on the y axis: its marker, and its height in the axes, whatever the limits and the scale.
_NOT_FINITE = {"nan": ("x", 0.97), "inf": ("^", 0.92), "-inf": ("v", 0.03)}
_EMPTY = "no epoch\nhas ended yet"


def plot(
    history: Mapping[str, Sequence[float]],
    val_epochs: Mapping[str, Sequence[int]],
    ax: Axes | None = None,
    label: str | None = None,
) -> tuple[Figure, Axes]:
    """Draw `History.means`, its validation at `History.val_epochs`, on ``ax`` or in a new figure.

    ``label`` names the run in the legend.
    """
    ax = plt.subplots()[1] if ax is None else ax
    colors: dict[str, Any] = {}
    # A training key may begin like validation too; and a user may have added a curve that was never recorded.
    matches = filter(None, map(_VALIDATION.fullmatch, history))
    validation = {match[0]: match for match in matches if match[0] in val_epochs or match[1] in history}
    for name in sorted(filter(history.get, history), key=validation.__contains__):
        key, stage, style, losses = name, "train", _TRAIN, history[name]
        x: Sequence[float] = range(len(losses))
        if name in validation:
            key, loader = validation[name].groups()
            stage = f"val, dataloader {loader}" if loader else "val"
            style = _VAL | (_LOADERS[int(loader) % len(_LOADERS)] if loader else {})
            x = _spread(val_epochs.get(name, ()), len(losses))
            losses = losses[-len(x) :]
        text = f"{key} ({stage})" if label is None else f"{label}: {key} ({stage})"
        # In a longer curve only the points that no line reaches wear a marker.
        finite = [False, *map(math.isfinite, losses), False]
        alone = [i for i in range(len(losses)) if len(losses) <= 50 or finite[i : i + 3] == [False, True, False]]
        style = style | {"markersize": 5, "markevery": alone, "color": colors.get(key)} | ({} if alone else {"marker": ""})
        colors[key] = ax.plot(x, losses, label=text, **style)[0].get_color()
    return ax.figure.figure, ax
