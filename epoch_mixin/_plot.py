"""The curves: training and validation means over the epochs trained so far."""

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from epoch_mixin._run import LOADER

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError("plot_epoch_losses needs matplotlib: pip install 'epoch-mixin[plot]'") from error

_Lists = Mapping[str, Sequence[float]]
# The stages of a key share a colour. Training is pale and validation dark: long noisy curves hide the dashes.
_TRAIN: dict[str, Any] = {"linestyle": "-", "marker": "o", "linewidth": 2, "alpha": 0.5}
# Of a validation, and of three dataloaders of it in turn.
_LINES = [("--", "o"), (":", "s"), ((0, (8, 4)), "D"), ("-.", "p")]
_VAL = [{"linestyle": line, "marker": marker, "linewidth": 1.2, "fillstyle": "none"} for line, marker in _LINES]
# The markers of values that the y axis cannot show, each with its height in the axes from 0 to 1.
_NOT_FINITE = {"nan": ("x", 0.97), "inf": ("^", 0.92), "-inf": ("v", 0.03)}
# Font sizes for the legend, each with how many letters fit in one line of a narrow figure.
_LETTERS: dict[str | int, int] = {"small": 26, "x-small": 32, "xx-small": 42, 4: 56}


def plot(means: _Lists, validated_at: _Lists, ax: Axes | None = None, label: str | None = None) -> tuple[Figure, Axes]:
    """Draw ``means`` by name, on ``ax`` or in a new figure.

    ``validated_at`` has for each validation name how many epochs had been trained when each of its values was taken.
    ``label`` names the run in the legend.
    """
    if not isinstance(ax, Axes | None):
        hint = f"; write label={ax!r} to name the run" if isinstance(ax, str) else ""
        raise TypeError(f"plot_epoch_losses: ax must be a matplotlib Axes, not {ax!r}{hint}")
    # This layout makes room for the axis labels, also when the figure gets another size later.
    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    ax.set_xlabel("epochs trained")
    ax.xaxis.set_major_locator(_EpochTicks("auto", min_n_ticks=1))
    colors: dict[str, Any] = {}
    for name in sorted(filter(means.get, means), key=validated_at.__contains__):
        key, stage, style = name, "train", _TRAIN
        if name in validated_at:
            key, _, loader = name.removeprefix("val_").partition(LOADER)
            stage, style = (f"val, dataloader {loader}", _VAL[1 + int(loader) % 3]) if loader else ("val", _VAL[0])
        entry = f"{key} ({stage})" if label is None else f"{label}: {key} ({stage})"
        x = validated_at.get(name, range(1, 1 + len(means[name])))
        if both := min(len(x), len(means[name])):
            colors[key] = _draw(ax, x[:both], means[name][:both], color=colors.get(key), label=entry, **style)
    if colors:
        keys = {ax.get_ylabel(), *colors} - {""}
        ax.set_ylabel("mean" if len(keys) > 1 else keys.pop())
        if ax.dataLim.x1 < 2:
            # A single epoch is shown from its start, which a lone point would not tell.
            ax.update_datalim([(0, 0)], updatey=False)
        _add_legend(ax)
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
        if at := [place for place, loss in zip(x, losses) if str(float(loss)) == kind]:
            ax.plot(at, [height] * len(at), shape, color=color, markersize=5, transform=ax.get_xaxis_transform())
            if kind not in ax.get_legend_handles_labels()[1]:
                # All curves share the marker, so the legend shows it once, in grey.
                ax.plot([], [], shape, color="gray", markersize=5, label=kind)
    return color


def _add_legend(ax: Axes) -> None:
    """Name the curves, at the first font size that leaves half of the axes free."""
    entries = sorted(zip(*ax.get_legend_handles_labels()), key=lambda entry: entry[1] in _NOT_FINITE)
    if not entries:
        return  # matplotlib leaves out a label that begins with "_"
    lines, labels = zip(*entries)
    for size, letters in _LETTERS.items():
        wrapped = [fill(label, letters) for label in labels]
        box = ax.legend(lines, wrapped, fontsize=size, labelspacing=0.2).get_window_extent()
        if box.width < ax.bbox.width and box.height < ax.bbox.height / 2:
            break


class _EpochTicks(MaxNLocator):
    """Whole epochs, or parts of the first. No tick is below 0."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        whole = vmax >= 2 or self.axis.get_minpos() >= 1  # type: ignore[union-attr]
        self.set_params(integer=whole, steps=[1, 2, 5, 10] if whole else [2.5, 5, 10])
        return [tick for tick in super().tick_values(vmin, vmax) if tick >= 0]
