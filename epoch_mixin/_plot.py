"""The curves: training and validation means over the epochs they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError("plot_epoch_losses needs matplotlib: pip install 'epoch-mixin[plot]'") from error

_STYLE: dict[str, Any] = {
    "train": {"linestyle": "-", "fillstyle": "full"},
    "val": {"linestyle": "--", "fillstyle": "none", "alpha": 0.7},
}
# In a longer curve only the points that no line reaches wear a marker.
_MARKED = 50


def plot(
    history: Mapping[str, Sequence[float]], val_epochs: Mapping[str, Sequence[int]], ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draw `Recorder.history`, its validation at `Recorder.val_epochs`, on ``ax`` or in a new figure."""
    if ax is None:
        ax = plt.subplots()[1]
    training = [name for name in history if history[name] and not _is_validation(name, history, val_epochs)]
    validation = [name for name in history if history[name] and name not in training]
    colors: dict[str, Any] = {}
    for name in training + validation:
        losses = history[name]
        marked = _marked(losses)
        if name in training:
            key, stage = name, "train"
            x = [float(epoch) for epoch in range(len(losses))]
        else:
            key, stage = name.removeprefix("val_"), "val"
            x = _spread(val_epochs.get(name, ()), len(losses))
        (line,) = ax.plot(
            x,
            losses,
            label=f"{key} ({stage})",
            color=colors.get(key),
            marker="o" if marked else "",
            markevery=marked,
            markersize=5,
            **_STYLE[stage],
        )
        colors[key] = line.get_color()
    ax.xaxis.set_major_locator(_EpochTicks(integer=True, min_n_ticks=1))
    ax.set_xlabel("epoch (from 0)")
    ax.set_ylabel("mean loss (own unit)")
    if colors:
        ax.legend()
    return ax.figure.figure, ax


class _EpochTicks(MaxNLocator):
    """No tick at -1, where the margin left of the first epoch's validation runs may reach."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return [tick for tick in super().tick_values(vmin, vmax) if tick >= 0]


def _is_validation(name: str, history: Mapping[str, Any], val_epochs: Mapping[str, Any]) -> bool:
    # A training key may begin like this too; and a user may have added a curve that was never recorded.
    return name in val_epochs or (name.startswith("val_") and name.removeprefix("val_") in history)


def _spread(epochs: Sequence[int], runs: int) -> list[float]:
    """Where validation runs lie: those in training epoch k evenly over (k - 1, k], so that the last is at k.

    A user who has cleared the history left its latest runs; of one who has added to it no epochs are known.
    """
    epochs = epochs[len(epochs) - runs :] if len(epochs) >= runs else range(runs)
    x: list[float] = []
    for epoch, group in groupby(epochs):
        number = len(list(group))
        x += [epoch - 1 + run / number for run in range(1, number + 1)]
    return x


def _marked(losses: Sequence[float]) -> list[int]:
    """The points that wear a marker: all of a short curve, else those without a finite neighbour."""
    finite = [False, *map(math.isfinite, losses), False]
    return [i for i in range(len(losses)) if len(losses) <= _MARKED or not (finite[i] or finite[i + 2])]
