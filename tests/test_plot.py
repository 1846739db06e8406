import math
import subprocess
import sys
import warnings

import matplotlib
import matplotlib.pyplot as plt
import pytest
import pytorch_lightning as pl
import torch

from epoch_mixin import EpochLossMixin
from epoch_mixin._plot import plot

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def curves(ax):
    """Each curve by its legend entry, as (x, y)."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def ticks(ax):
    """The x ticks that are seen."""
    low, high = ax.get_xlim()
    return [tick for tick in ax.get_xticks() if low <= tick <= high]


def marked(ax):
    """The indices of the points of the first curve that wear a marker."""
    return ax.lines[0].get_markevery() if ax.lines[0].get_marker() == "o" else []


def decay(epochs):
    return [2 * math.exp(-epoch / epochs) for epoch in range(epochs)]


def test_training_value_lies_at_its_epoch():
    _, ax = plot({"loss": [2.0, 1.0, 0.5]}, {})
    assert curves(ax) == {"loss (train)": ([0, 1, 2], [2.0, 1.0, 0.5])}


@pytest.mark.parametrize(
    ("epochs", "x"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([4, 9], [4, 9]),
        ([0, 0, 0, 0, 1, 1, 1, 1], [-0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]),
        ([0, 0, 1, 3, 3], [-0.5, 0, 1, 2.5, 3]),
        ([0], [0]),
    ],
    ids=["every epoch", "every 5 epochs", "4 an epoch", "mixed", "epoch still open"],
)
def test_validation_lies_at_the_epoch_it_belongs_to(epochs, x):
    losses = decay(len(epochs))
    _, ax = plot({"val_loss": losses, "loss": decay(10)}, {"val_loss": epochs})
    assert curves(ax)["loss (val)"] == (x, losses)


def test_values_added_or_cleared_by_hand_are_drawn():
    _, ax = plot({"val_loss": [3.0, 2.0]}, {"val_loss": [0, 1, 2, 0, 0]})
    assert curves(ax)["loss (val)"][0] == [-0.5, 0]
    _, ax = plot({"loss": [1.0], "val_loss": [3.0, 2.0]}, {"val_loss": [5]})
    assert curves(ax)["loss (val)"][0] == [0, 1]
    _, ax = plot({"loss": [1.0], "val_loss": [3.0, 2.0]}, {})
    assert curves(ax)["loss (val)"][0] == [0, 1]


def test_legend_has_key_and_stage():
    history = {"val_loss": [2.0], "val_kl": [1.0], "loss": [2.0], "kl": [1.0]}
    _, ax = plot(history, {"val_loss": [0], "val_kl": [0]})
    entries = [text.get_text() for text in ax.get_legend().get_texts()]
    assert entries == ["loss (train)", "kl (train)", "loss (val)", "kl (val)"]


def test_key_that_begins_like_validation_is_training():
    _, ax = plot({"val_gap": [2.0], "val_val_gap": [1.0]}, {"val_val_gap": [0]})
    assert sorted(curves(ax)) == ["val_gap (train)", "val_gap (val)"]


def test_stages_of_a_key_share_a_colour_and_differ_in_line_and_marker():
    _, ax = plot({name: [2.0, 1.0] for name in ("loss", "kl", "val_loss", "val_kl")}, {})
    loss, kl, val_loss, val_kl = ax.lines
    assert loss.get_color() == val_loss.get_color() != kl.get_color() == val_kl.get_color()
    assert loss.get_linestyle() != val_loss.get_linestyle()
    assert loss.get_fillstyle() != val_loss.get_fillstyle()


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 40, 500])
@pytest.mark.parametrize("runs", [1, 4, 100])
def test_ticks_are_whole_epochs(epochs, runs):
    val_epochs = [epoch for epoch in range(epochs) for _ in range(runs)]
    _, ax = plot({"loss": decay(epochs), "val_loss": decay(epochs * runs)}, {"val_loss": val_epochs})
    assert ticks(ax) and set(ticks(ax)) <= set(range(math.ceil(1.05 * epochs)))
    low, high = ax.get_xlim()
    assert low < 0 and epochs - 1 < high


def test_axes_are_labelled_with_units():
    _, ax = plot({"loss": [1.0]}, {})
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch (from 0)", "mean loss (own unit)")


def test_short_curve_wears_markers_and_a_long_one_none():
    assert marked(plot({"loss": [1.0]}, {})[1]) == [0]
    assert marked(plot({"loss": decay(5)}, {})[1]) == [0, 1, 2, 3, 4]
    assert marked(plot({"loss": decay(500)}, {})[1]) == []


def test_nan_and_inf_are_gaps_and_a_point_between_them_is_seen():
    losses = decay(500)
    losses[10] = losses[490] = math.nan
    losses[12] = math.inf
    fig, ax = plot({"loss": losses}, {})
    fig.canvas.draw()
    assert marked(ax) == [11]
    assert all(map(math.isfinite, ax.get_xlim() + ax.get_ylim()))
    plot({"loss": [math.nan]}, {})[0].canvas.draw()


@pytest.mark.parametrize("history", [{}, {"loss": []}])
def test_empty_history_gives_empty_axes(history):
    fig, ax = plot(history, {})
    fig.canvas.draw()
    assert not ax.lines and ax.get_legend() is None


def test_given_axes_alone_is_touched():
    fig, axes = plt.subplots(2, 2, figsize=(5, 3), layout="constrained")
    other, _ = plt.subplots()
    engine, size, title = fig.get_layout_engine(), fig.get_size_inches().tolist(), fig.get_suptitle()
    untouched = [ax for ax in axes.flat if ax is not axes[0, 1]]
    before = [(ax.get_position().bounds, ax.get_xlim(), ax.get_xlabel()) for ax in axes.flat]
    assert plot({"loss": decay(5)}, {}, axes[0, 1]) == (fig, axes[0, 1])
    assert len(axes[0, 1].lines) == 1
    assert not any(ax.lines or ax.get_legend() for ax in untouched)
    after = [(ax.get_position().bounds, ax.get_xlim(), ax.get_xlabel()) for ax in axes.flat]
    assert [a == b for a, b in zip(before, after)] == [True, False, True, True]
    assert (fig.get_layout_engine(), fig.get_size_inches().tolist(), fig.get_suptitle()) == (engine, size, title)
    assert plt.gcf() is other


def test_axes_of_a_subfigure():
    fig = plt.figure()
    left, _ = fig.subfigures(1, 2)
    assert plot({"loss": decay(5)}, {}, left.subplots())[0] is fig


def test_two_models_on_one_axes():
    _, ax = plot({"loss": decay(3)}, {})
    plot({"loss": decay(30)}, {}, ax)
    assert ax.get_xlim()[1] > 29
    assert ax.lines[0].get_color() != ax.lines[1].get_color()


def test_new_figure_is_the_current_one_and_is_not_shown(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("shown"))
    before = plt.get_fignums()
    fig, ax = plot({"loss": decay(5)}, {})
    assert plt.gcf() is fig and plt.gca() is ax and fig.axes == [ax]
    assert len(plt.get_fignums()) == len(before) + 1


class Model(EpochLossMixin, pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return batch.mean()

    def validation_step(self, batch, batch_idx):
        return batch.mean()

    def on_train_epoch_end(self):
        pass

    def on_validation_epoch_end(self):
        pass


def test_plot_epoch_losses_draws_the_history_of_a_model():
    model = Model()
    for epoch in range(2):
        for run in range(2):
            model.validation_step(torch.tensor([5.0 - 2 * epoch - run]), 0)
            model.on_validation_epoch_end()
        model.training_step(torch.tensor([4.0 - epoch]), 0)
        model.on_train_epoch_end()
    _, ax = model.plot_epoch_losses()
    expected = {"loss (train)": ([0, 1], [4.0, 3.0]), "loss (val)": ([-0.5, 0, 0.5, 1], [5.0, 4.0, 3.0, 2.0])}
    assert curves(ax) == expected
    _, given = plt.subplots()
    assert model.plot_epoch_losses(given) == (given.figure, given) and curves(given) == expected


def test_without_matplotlib_the_error_says_what_to_install():
    # torchmetrics asks for the installed distributions, so matplotlib vanishes only after its import.
    code = """
import sys
import pytorch_lightning as pl
from epoch_mixin import EpochLossMixin

class Model(EpochLossMixin, pl.LightningModule):
    pass

for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
try:
    Model().plot_epoch_losses()
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert output.stdout == "plot_epoch_losses needs matplotlib: pip install 'epoch-mixin[plot]'\n"
