import math
import subprocess
import sys
import warnings
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.colors import to_rgba

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
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in ax.lines
        if line.get_transform() == ax.transData and len(line.get_xdata())
    }


def marks(ax):
    """The epochs that wear a mark since they have no place on the y axis, and its shape."""
    return [(list(line.get_xdata()), line.get_marker()) for line in ax.lines if line.get_transform() != ax.transData]


def entries(ax):
    """What the legend says."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def notes(ax):
    """What the axes say in place of curves."""
    title = ax.get_legend().get_title()
    return [title.get_text()] if title.get_visible() else []


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
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
        ([0, 0, 1, 3, 3], [0, 0.5, 1, 3, 3.5]),
        ([0], [0]),
    ],
    ids=["every epoch", "every 5 epochs", "4 an epoch", "mixed", "epoch still open"],
)
def test_validation_lies_at_the_epoch_it_belongs_to(epochs, x):
    losses = decay(len(epochs))
    _, ax = plot({"val_loss": losses, "loss": decay(10)}, {"val_loss": epochs})
    assert curves(ax)["loss (val)"] == (x, losses)


@pytest.mark.parametrize("runs", [1, 2, 3, 7, 10, 49])
def test_no_validation_run_lies_left_of_its_epoch_or_on_another(runs):
    epochs = [epoch for epoch in range(30) for _ in range(runs)]
    _, ax = plot({"loss": decay(30), "val_loss": decay(30 * runs)}, {"val_loss": epochs})
    x, _ = curves(ax)["loss (val)"]
    assert [math.floor(place) for place in x] == epochs
    assert all(a < b for a, b in pairwise(x))


@pytest.mark.parametrize("epochs", [[0], [0, 1, 2]], ids=["value added", "value removed"])
def test_lists_that_a_user_has_edited_are_drawn(epochs):
    _, ax = plot({"loss": [1.0], "val_loss": [3.0, 2.0]}, {"val_loss": epochs})
    assert curves(ax)["loss (val)"] == ([0, 1][: len(epochs)], [3.0, 2.0][: len(epochs)])


def test_legend_has_key_and_stage():
    history = {"val_loss": [2.0], "val_kl": [1.0], "loss": [2.0], "kl": [1.0]}
    _, ax = plot(history, {"val_loss": [0], "val_kl": [0]})
    assert entries(ax) == ["loss (train)", "kl (train)", "loss (val)", "kl (val)"]


def test_key_that_begins_like_validation_is_training():
    _, ax = plot({"val_gap": [2.0], "val_val_gap": [1.0]}, {"val_val_gap": [0]})
    assert sorted(curves(ax)) == ["val_gap (train)", "val_gap (val)"]


def test_each_validation_dataloader_has_a_curve_of_its_own():
    names = ["val_loss", "val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    history = {"loss": decay(3), names[0]: [3.0, 2.0], names[1]: [4.0, 3.0], names[2]: [2.0, 1.0]}
    _, ax = plot(history, {name: [1, 2] for name in names})
    assert entries(ax) == ["loss (train)", "loss (val)", "loss (val, dataloader 0)", "loss (val, dataloader 1)"]
    assert [curves(ax)[entry] for entry in entries(ax)[1:]] == [([1, 2], history[name]) for name in names]
    assert len({line.get_color() for line in ax.lines}) == 1
    assert len({line.get_marker() for line in ax.lines[1:]}) == 3
    assert ax.get_ylabel() == "loss"


def test_key_of_one_dataloader_may_begin_like_validation():
    history = {"val_gap": [2.0], "val_val_gap/dataloader_idx_12": [1.0]}
    _, ax = plot(history, {"val_val_gap/dataloader_idx_12": [0]})
    assert entries(ax) == ["val_gap (train)", "val_gap (val, dataloader 12)"]
    assert ax.lines[0].get_color() == ax.lines[1].get_color()


def test_stages_of_a_key_share_a_colour_and_differ_in_line_and_marker():
    names = ("loss", "kl", "val_loss", "val_kl")
    _, ax = plot({name: [2.0, 1.0] for name in names}, {name: [0, 1] for name in names[2:]})
    loss, kl, val_loss, val_kl = ax.lines
    assert loss.get_color() == val_loss.get_color() != kl.get_color() == val_kl.get_color()
    assert loss.get_linestyle() != val_loss.get_linestyle()
    assert loss.get_fillstyle() != val_loss.get_fillstyle()


def test_stages_can_be_told_apart_in_grey_where_noise_hides_the_dashes():
    def grey(line):
        red, green, blue, alpha = to_rgba(line.get_color(), line.get_alpha())
        return 1 - alpha * (1 - (0.3 * red + 0.59 * green + 0.11 * blue))

    _, ax = plt.subplots()
    for run in range(5):
        plot({"loss": decay(500), "val_loss": decay(500)}, {"val_loss": range(500)}, ax, run)
    for train, val in zip(ax.lines[::2], ax.lines[1::2]):
        assert grey(train) - grey(val) > 0.15
        assert train.get_linewidth() > val.get_linewidth()


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 40, 500])
@pytest.mark.parametrize("runs", [1, 4, 100])
def test_ticks_are_whole_epochs(epochs, runs):
    val_epochs = [epoch for epoch in range(epochs) for _ in range(runs)]
    _, ax = plot({"loss": decay(epochs), "val_loss": decay(epochs * runs)}, {"val_loss": val_epochs})
    assert ticks(ax)[0] == 0 and set(ticks(ax)) <= set(range(math.ceil(1.05 * epochs)))
    low, high = ax.get_xlim()
    assert low < 0 and epochs - 1 < high


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (10, [0, 2, 4, 6, 8]),
        (30, [0, 5, 10, 15, 20, 25, 30]),
        (100, [0, 20, 40, 60, 80, 100]),
        (1000, range(0, 1001, 200)),
    ],
)
def test_ticks_are_round(epochs, expected):
    assert ticks(plot({"loss": decay(epochs)}, {})[1]) == list(expected)


def test_no_tick_lies_left_of_the_first_epoch_however_wide_the_margin():
    _, ax = plot({"loss": decay(5)}, {})
    ax.margins(x=0.5)
    assert ticks(ax)[0] == 0


def test_axes_are_named_for_a_reader():
    _, ax = plot({"loss": [1.0], "val_loss": [1.0]}, {"val_loss": [0]})
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")
    _, ax = plot({"kl": [1.0]}, {})
    assert ax.get_ylabel() == "kl"
    _, ax = plot({"loss": [1.0], "kl": [1.0]}, {})
    assert ax.get_ylabel() == "mean"


def test_y_axis_is_named_for_every_run_on_it():
    _, ax = plot({"loss": [1.0]}, {}, label="run a")
    plot({"loss": [2.0], "val_loss": [1.0]}, {"val_loss": [0]}, ax, "run b")
    assert ax.get_ylabel() == "loss"
    plot({"mse": [2.0]}, {}, ax, "run c")
    assert ax.get_ylabel() == "mean"
    ax.clear()
    plot({"mse": [2.0]}, {}, ax)
    assert ax.get_ylabel() == "mse"


def test_short_curve_wears_markers_and_a_long_one_none():
    assert marked(plot({"loss": [1.0]}, {})[1]) == [0]
    assert marked(plot({"loss": decay(5)}, {})[1]) == [0, 1, 2, 3, 4]
    assert marked(plot({"loss": decay(500)}, {})[1]) == []


def test_point_between_nan_and_inf_wears_a_marker():
    losses = decay(500)
    losses[10] = losses[490] = math.nan
    losses[12] = math.inf
    losses[100:200] = [math.nan] * 100
    fig, ax = plot({"loss": losses}, {})
    fig.canvas.draw()
    assert marked(ax) == [11]


def test_diverged_run_does_not_look_like_a_short_one():
    _, healthy = plot({"loss": [2.0, 1.5, 1.0]}, {})
    fig, ax = plot({"loss": [2.0, 1.5, 1.0] + [math.nan] * 7}, {})
    fig.canvas.draw()
    assert ax.get_xlim()[1] > 9
    assert ax.get_ylim() == healthy.get_ylim()
    assert marks(ax) == [([3, 4, 5, 6, 7, 8, 9], "x")]
    assert entries(ax) == ["loss (train)", "nan"]


def test_marks_tell_nan_from_inf_and_are_explained_once():
    history = {"loss": [1.0, math.nan, math.inf, -math.inf, math.nan], "val_loss": [math.nan, math.inf, 1.0]}
    _, ax = plot(history, {"val_loss": [1, 3, 4]}, label="run a")
    shapes = {"nan": "x", "inf": "^", "-inf": "v"}
    assert marks(ax) == [([1, 4], "x"), ([2], "^"), ([3], "v"), ([1], "x"), ([3], "^")]
    plot({"loss": [math.nan, 1.0]}, {}, ax, "run b")
    assert marks(ax)[-1] == ([0], "x")
    assert entries(ax) == ["run a: loss (train)", "run a: loss (val)", "run b: loss (train)", *shapes]
    handles, names = ax.get_legend_handles_labels()
    assert shapes.items() <= dict(zip(names, (line.get_marker() for line in handles))).items()


def test_mark_has_the_colour_of_its_curve():
    _, ax = plot({"loss": [1.0, math.nan], "kl": [1.0, math.nan]}, {})
    loss, loss_mark, _, kl, kl_mark = ax.lines
    assert loss.get_color() == loss_mark.get_color() != kl.get_color() == kl_mark.get_color()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_mark_is_seen_whatever_the_scale(loss, scale):
    fig, ax = plot({"loss": [100.0, 1.0, loss, 0.01]}, {})
    ax.set_yscale(scale)
    fig.canvas.draw()
    _, mark, *_ = ax.lines
    assert ax.bbox.contains(*mark.get_transform().transform(mark.get_xydata()[0]))
    assert ax.get_ylim()[1] < 200


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("epochs", [1, 5])
def test_run_without_any_finite_loss(epochs, scale):
    fig, ax = plot({"loss": [math.nan] * epochs}, {})
    ax.set_yscale(scale)
    fig.canvas.draw()
    assert marks(ax) == [(list(range(epochs)), "x")]
    assert ticks(ax) == list(range(epochs))
    assert all(map(math.isfinite, ax.get_xlim() + ax.get_ylim()))
    assert entries(ax) == ["loss (train)", "nan"]


def test_key_that_came_later_is_drawn_where_it_began():
    history = {"loss": decay(3), "val_loss": decay(3), "val_kl": [math.nan, 2.0, 1.0], "kl": [math.nan, 2.0, 1.0]}
    _, ax = plot(history, {"val_loss": [0, 1, 2], "val_kl": [0, 1, 2]})
    assert curves(ax)["kl (val)"][0] == [0, 1, 2]
    assert marks(ax) == [([0], "x"), ([0], "x")]


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [], "val_loss": []}])
def test_empty_history_says_so_until_curves_are_drawn(history):
    fig, ax = plot(history, {})
    plot(history, {}, ax)
    fig.canvas.draw()
    assert notes(ax) == ["no epoch\nhas ended yet"]
    assert ax.get_xlabel() == "epoch"
    assert not ax.lines and entries(ax) == []
    _, fresh = plot({"loss": decay(5)}, {})
    plot({"loss": decay(5)}, {}, ax)
    assert notes(ax) == []
    assert (ax.get_xlim(), ax.get_ylim(), ax.get_ylabel()) == (fresh.get_xlim(), fresh.get_ylim(), "loss")


def test_empty_history_says_nothing_over_the_curves_of_another_run():
    _, ax = plot({"loss": decay(5)}, {})
    plot({}, {}, ax, "run b")
    assert notes(ax) == [] and entries(ax) == ["loss (train)"]


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


def test_runs_on_one_axes_are_told_apart():
    _, ax = plot({"loss": decay(3), "val_loss": decay(3)}, {"val_loss": [0, 1, 2]}, label="run a")
    plot({"loss": decay(30), "val_loss": decay(30)}, {"val_loss": range(30)}, ax, "run b")
    assert entries(ax) == ["run a: loss (train)", "run a: loss (val)", "run b: loss (train)", "run b: loss (val)"]
    assert ax.get_xlim()[1] > 29
    a, val_a, b, val_b = (line.get_color() for line in ax.lines)
    assert a == val_a != b == val_b


def test_what_else_is_on_the_axes_stays():
    _, ax = plt.subplots()
    ax.axhline(0.5, color="black", label="target")
    plot({"loss": decay(3)}, {}, ax)
    assert sorted(entries(ax)) == ["loss (train)", "target"]


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
    x_y = {"loss (train)": ([0, 1], [4.0, 3.0]), "loss (val)": ([0, 0.5, 1, 1.5], [5.0, 4.0, 3.0, 2.0])}
    assert curves(ax) == x_y
    _, given = plt.subplots()
    assert model.plot_epoch_losses(given) == (given.figure, given) and curves(given) == x_y
    model.plot_epoch_losses(given, label="again")
    assert entries(given)[2:] == ["again: loss (train)", "again: loss (val)"]


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
