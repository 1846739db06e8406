"""The curves: training and validation means over the epochs they belong to."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from epoch_mixin._history import LOADER

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError("plot_epoch_losses needs matplotlib: pip install 'epoch-mixin[plot]'") from error

_Lists = Mapping[str, Sequence[float]]
# The stages of a key share a colour. Pale and dark tells them apart where 500 noisy epochs hide the dashes.
_TRAIN: dict[str, Any] = {"linestyle": "-", "marker": "o", "linewidth": 2, "alpha": 0.5}
# Of a validation, and of three dataloaders of it in turn.
_LINES = [("--", "o"), (":", "s"), ((0, (8, 4)), "D"), ("-.", "p")]
_VAL = [{"linestyle": line, "marker": marker, "linewidth": 1.2, "fillstyle": "none"} for line, marker in _LINES]
# The markers of values that the y axis cannot show, each with its height in the axes, whatever the limits and scale.
_NOT_FINITE = {"nan": ("x", 0.97), "inf": ("^", 0.92), "-inf": ("v", 0.03)}


def plot(history: _Lists, val_epochs: _Lists, ax: Axes | None = None, label: str | None = None) -> tuple[Figure, Axes]:
    """Draw `History.means`, its validation at `History.val_epochs`, on ``ax`` or in a new figure.

    ``label`` names the run in the legend.
    """
    ax = plt.subplots()[1] if ax is None else ax
    colors: dict[str, Any] = {}
    for name in sorted(filter(history.get, history), key=val_epochs.__contains__):
        key, stage, style, x = name, "train", _TRAIN, [*range(len(history[name]))]
        if name in val_epochs:
            key, _, loader = name.removeprefix("val_").partition(LOADER)
            stage, style = (f"val, dataloader {loader}", _VAL[1 + int(loader) % 3]) if loader else ("val", _VAL[0])
            # The validations in epoch k lie evenly over [k, k + 1), a single one at k.
            x = [at + run / number for at, number in Counter(val_epochs[name]).items() for run in range(number)]
        entry = f"{key} ({stage})" if label is None else f"{label}: {key} ({stage})"
        colors[key] = _draw(
            ax, x[: len(history[name])], history[name][: len(x)], color=colors.get(key), label=entry, **style
        )
    ax.xaxis.set_major_locator(_EpochTicks("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    ax.set_xlabel("epoch")
    if colors:
        keys = {ax.get_ylabel(), *colors} - {""}
        ax.set_ylabel("mean" if len(keys) > 1 else keys.pop())
        entries = sorted(zip(*ax.get_legend_handles_labels()), key=lambda entry: entry[1] in _NOT_FINITE)
        ax.legend(*zip(*entries), fontsize="small")
    elif not ax.has_data():
        # The legend of the first curves takes its place.
        note = ax.legend(handles=[], title="no epoch\nhas ended yet", loc="center", frameon=False).get_title()
        note.set(color="gray", multialignment="center")
    return ax.figure.figure, ax


def _draw(ax: Axes, x: Sequence[float], losses: Sequence[float], marker: str, **style: Any) -> Any:
    """Draw a curve and the marks of what has no place on the y axis; give its colour."""
    # In a long curve only the points that no line reaches wear a marker.
    finite = [False, *map(math.isfinite, losses), False]
    alone = [i for i in range(len(x)) if len(x) <= 50 or finite[i : i + 3] == [False, True, False]]
    color = ax.plot(x, losses, marker=marker if alone else "", markevery=alone, markersize=5, **style)[0].get_color()
    for kind, (shape, height) in _NOT_FINITE.items():
        at = [place for place, loss in zip(x, losses) if str(float(loss)) == kind]
        if at:
            ax.plot(at, [height] * len(at), shape, color=color, markersize=5, transform=ax.get_xaxis_transform())
            if kind not in ax.get_legend_handles_labels()[1]:
                # All curves share the marker, so the legend shows it once, in grey.
                ax.plot([], [], shape, color="gray", markersize=5, label=kind)
    return color


class _EpochTicks(MaxNLocator):
    """No tick left of epoch 0, where the margin may reach."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return [tick for tick in super().tick_values(vmin, vmax) if tick >= 0]
