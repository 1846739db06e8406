import math
import subprocess
import sys
import warnings

import matplotlib
import matplotlib.pyplot as plt
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.colors import to_rgba
from torch.utils.data import DataLoader

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
    """The x that wear a mark since their losses have no place on the y axis, and its shape."""
    return [(list(line.get_xdata()), line.get_marker()) for line in ax.lines if line.get_transform() != ax.transData]


def entries(ax):
    """What the legend says, each entry as one line."""
    return [text.get_text().replace("\n", " ") for text in ax.get_legend().get_texts()]


def notes(ax):
    """What the axes say in place of curves."""
    title = ax.get_legend().get_title()
    return [title.get_text()] if title.get_visible() else []


def ticks(ax):
    """The x ticks that are seen."""
    low, high = ax.get_xlim()
    return [tick for tick in ax.get_xticks() if low <= tick <= high]


def width_and_height(ax):
    """Of the legend as a part of the axes, which it must not leave."""
    ax.figure.canvas.draw()
    legend = ax.get_legend().get_window_extent()
    inside = ax.bbox.padded(1)
    assert inside.contains(legend.x0, legend.y0) and inside.contains(legend.x1, legend.y1)
    return legend.width / ax.bbox.width, legend.height / ax.bbox.height


def marked(ax):
    """The indices of the points of the first curve that wear a marker."""
    return ax.lines[0].get_markevery() if ax.lines[0].get_marker() == "o" else []


def decay(epochs):
    return [2 * math.exp(-epoch / epochs) for epoch in range(epochs)]


def test_training_value_lies_at_the_end_of_its_epoch():
    _, ax = plot({"loss": [2.0, 1.0, 0.5]}, {})
    assert curves(ax) == {"loss (train)": ([1, 2, 3], [2.0, 1.0, 0.5])}


@pytest.mark.parametrize(
    "x",
    [[1, 2, 3], [5, 10], [0.25, 0.5, 0.75, 1, 1.25], [0, 1, 2], [0]],
    ids=["every epoch", "every 5 epochs", "4 an epoch", "before training too", "before training alone"],
)
def test_validation_lies_where_it_ran(x):
    losses = decay(len(x))
    _, ax = plot({"val_loss": losses, "loss": decay(10)}, {"val_loss": x})
    assert curves(ax)["loss (val)"] == (x, losses)


@pytest.mark.parametrize("x", [[1], [1, 2, 3]], ids=["value added", "value removed"])
def test_lists_that_a_user_has_edited_are_drawn(x):
    _, ax = plot({"loss": [1.0], "val_loss": [3.0, 2.0]}, {"val_loss": x})
    assert curves(ax)["loss (val)"] == ([1, 2][: len(x)], [3.0, 2.0][: len(x)])


def test_list_of_which_no_value_has_a_place_has_no_legend_entry():
    _, ax = plot({"loss": [1.0], "val_loss": [3.0]}, {"val_loss": []})
    assert entries(ax) == ["loss (train)"]


def test_legend_has_key_and_stage():
    history = {"val_loss": [2.0], "val_kl": [1.0], "loss": [2.0], "kl": [1.0]}
    _, ax = plot(history, {"val_loss": [1], "val_kl": [1]})
    assert entries(ax) == ["loss (train)", "kl (train)", "loss (val)", "kl (val)"]


def test_key_that_begins_like_validation_is_training():
    _, ax = plot({"val_gap": [2.0], "val_val_gap": [1.0]}, {"val_val_gap": [1]})
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
    _, ax = plot(history, {"val_val_gap/dataloader_idx_12": [1]})
    assert entries(ax) == ["val_gap (train)", "val_gap (val, dataloader 12)"]
    assert ax.lines[0].get_color() == ax.lines[1].get_color()


def test_stages_of_a_key_share_a_colour_and_differ_in_line_and_marker():
    names = ("loss", "kl", "val_loss", "val_kl")
    _, ax = plot({name: [2.0, 1.0] for name in names}, {name: [1, 2] for name in names[2:]})
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
        plot({"loss": decay(500), "val_loss": decay(500)}, {"val_loss": range(1, 501)}, ax, run)
    for train, val in zip(ax.lines[::2], ax.lines[1::2]):
        assert grey(train) - grey(val) > 0.15
        assert train.get_linewidth() > val.get_linewidth()


@pytest.mark.parametrize("epochs", [2, 3, 7, 40, 500])
@pytest.mark.parametrize("runs", [1, 4, 100])
def test_ticks_are_whole_from_two_epochs_on(epochs, runs):
    x = [run / runs for run in range(1, epochs * runs + 1)]
    _, ax = plot({"loss": decay(epochs), "val_loss": decay(epochs * runs)}, {"val_loss": x})
    assert len(ticks(ax)) > 1 and set(ticks(ax)) <= set(range(math.ceil(1.05 * epochs) + 1))
    low, high = ax.get_xlim()
    assert low < min(x) and epochs < high


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (2, [1, 2]),
        (5, [1, 2, 3, 4, 5]),
        (10, [2, 4, 6, 8, 10]),
        (30, [0, 5, 10, 15, 20, 25, 30]),
        (100, [0, 20, 40, 60, 80, 100]),
        (1000, range(0, 1001, 200)),
    ],
)
def test_ticks_are_round(epochs, expected):
    assert ticks(plot({"loss": decay(epochs)}, {})[1]) == list(expected)


@pytest.mark.parametrize(
    "x", [[0.25, 0.5, 0.75, 1], [0.5, 1], [0, 0.5], [0.01 * run for run in range(1, 101)], [0.3]], ids=len
)
def test_ticks_of_a_single_epoch_are_round_parts_of_it(x):
    _, ax = plot({"loss": [2.0], "val_loss": decay(len(x))}, {"val_loss": x})
    assert ticks(ax) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("x", [[], [1], [0, 1]], ids=["no validation", "at the end", "before and at the end"])
def test_single_epoch_without_validation_in_it_has_whole_ticks(x):
    _, ax = plot({"loss": [2.0], "val_loss": decay(len(x))}, {"val_loss": x})
    assert ticks(ax) == [0, 1]


def test_validation_of_nan_within_the_epoch_has_parts_of_it_as_ticks():
    _, ax = plot({"loss": [2.0], "val_loss": [math.nan, 1.0]}, {"val_loss": [0.5, 1]})
    assert ticks(ax) == [0, 0.25, 0.5, 0.75, 1]


def test_ticks_are_whole_once_a_longer_run_is_on_the_axes():
    _, ax = plot({"loss": [2.0], "val_loss": [3.0, 2.0]}, {"val_loss": [0.5, 1]})
    plot({"loss": decay(3)}, {}, ax)
    assert ticks(ax) == [0, 1, 2, 3]


@pytest.mark.parametrize("epochs", [1, 5])
def test_no_tick_lies_left_of_the_first_epoch_however_wide_the_margin(epochs):
    _, ax = plot({"loss": decay(epochs), "val_loss": [2.0, 1.0]}, {"val_loss": [0.5, 1]})
    ax.margins(x=0.5)
    assert ticks(ax)[0] == 0


def test_limits_that_a_user_sets_stay():
    _, ax = plot({"loss": decay(5)}, {})
    ax.set_xlim(2, 4)
    assert (ax.get_xlim(), ticks(ax)) == ((2, 4), [2, 3, 4])


def test_axes_are_named_for_a_reader():
    _, ax = plot({"loss": [1.0], "val_loss": [1.0]}, {"val_loss": [1]})
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epochs trained", "loss")
    _, ax = plot({"kl": [1.0]}, {})
    assert ax.get_ylabel() == "kl"
    _, ax = plot({"loss": [1.0], "kl": [1.0]}, {})
    assert ax.get_ylabel() == "mean"


def test_y_axis_is_named_for_every_run_on_it():
    _, ax = plot({"loss": [1.0]}, {}, label="run a")
    plot({"loss": [2.0], "val_loss": [1.0]}, {"val_loss": [1]}, ax, "run b")
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
    assert ax.get_xlim()[1] > 10
    assert ax.get_ylim() == healthy.get_ylim()
    assert marks(ax) == [([4, 5, 6, 7, 8, 9, 10], "x")]
    assert entries(ax) == ["loss (train)", "nan"]


def test_marks_tell_nan_from_inf_and_are_explained_once():
    history = {"loss": [1.0, math.nan, math.inf, -math.inf, math.nan], "val_loss": [math.nan, math.inf, 1.0]}
    _, ax = plot(history, {"val_loss": [2, 4, 5]}, label="run a")
    shapes = {"nan": "x", "inf": "^", "-inf": "v"}
    assert marks(ax) == [([2, 5], "x"), ([3], "^"), ([4], "v"), ([2], "x"), ([4], "^")]
    plot({"loss": [math.nan, 1.0]}, {}, ax, "run b")
    assert marks(ax)[-1] == ([1], "x")
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
    assert marks(ax) == [(list(range(1, epochs + 1)), "x")]
    assert ticks(ax) == ([0, 1] if epochs == 1 else [1, 2, 3, 4, 5])
    assert all(map(math.isfinite, ax.get_xlim() + ax.get_ylim()))
    assert entries(ax) == ["loss (train)", "nan"]


def test_key_that_came_later_is_drawn_where_it_began():
    history = {"loss": decay(3), "val_loss": decay(3), "val_kl": [math.nan, 2.0, 1.0], "kl": [math.nan, 2.0, 1.0]}
    _, ax = plot(history, {"val_loss": [1, 2, 3], "val_kl": [1, 2, 3]})
    assert curves(ax)["kl (val)"][0] == [1, 2, 3]
    assert marks(ax) == [([1], "x"), ([1], "x")]


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [], "val_loss": []}])
def test_empty_history_says_so_until_curves_are_drawn(history):
    fig, ax = plot(history, {})
    plot(history, {}, ax)
    fig.canvas.draw()
    assert notes(ax) == ["no epoch\nhas ended yet"]
    assert ax.get_xlabel() == "epochs trained"
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
    _, ax = plot({"loss": decay(3), "val_loss": decay(3)}, {"val_loss": [1, 2, 3]}, label="run a")
    plot({"loss": decay(30), "val_loss": decay(30)}, {"val_loss": range(1, 31)}, ax, "run b")
    assert entries(ax) == ["run a: loss (train)", "run a: loss (val)", "run b: loss (train)", "run b: loss (val)"]
    assert ax.get_xlim()[1] > 30
    a, val_a, b, val_b = (line.get_color() for line in ax.lines)
    assert a == val_a != b == val_b


def test_label_that_matplotlib_keeps_out_of_the_legend():
    _, ax = plot({"loss": decay(3)}, {}, label="_hidden")
    assert list(curves(ax)) == ["_hidden: loss (train)"] and ax.get_legend() is None


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


# A column of a page, the default, and a slide.
SIZES = [(3.3, 2.5), (6.4, 4.8), (12, 6.75)]
LONG = "resnet50, lr 3e-4, weight decay 0.05, augmented"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("label", [LONG, "/runs/2024-11-03_resnet50/" * 4], ids=["words", "path"])
@pytest.mark.parametrize("given", [False, True], ids=["new figure", "given axes"])
def test_long_label_stays_inside_and_leaves_half_of_the_axes_free(given, label, size, monkeypatch):
    monkeypatch.setitem(plt.rcParams, "figure.figsize", size)
    _, ax = plot(
        {"loss": decay(5), "val_loss": decay(5)}, {"val_loss": range(1, 6)}, plt.gca() if given else None, label
    )
    _, height = width_and_height(ax)
    assert height < 0.5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_runs_with_long_labels_stay_inside(size, monkeypatch):
    monkeypatch.setitem(plt.rcParams, "figure.figsize", size)
    _, ax = plt.subplots()
    for run in range(4):
        plot({"loss": decay(9), "val_loss": decay(9)}, {"val_loss": range(1, 10)}, ax, f"{LONG} {run}")
    assert width_and_height(ax)[1] < 0.7
    assert entries(ax) == [f"{LONG} {run}: loss ({stage})" for run in range(4) for stage in ("train", "val")]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keys_of_several_dataloaders_stay_inside(size, monkeypatch):
    monkeypatch.setitem(plt.rcParams, "figure.figsize", size)
    keys = ["loss", "reconstruction", "kl"]
    names = [f"val_{key}{loader}" for key in keys for loader in ("", "/dataloader_idx_0", "/dataloader_idx_1")]
    _, ax = plot({name: decay(9) for name in keys + names}, {name: range(1, 10) for name in names})
    assert width_and_height(ax)[1] < 0.5
    assert {entry.partition(" ")[0] for entry in entries(ax)} == {*keys}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("label", [None, LONG])
def test_new_figure_cuts_nothing_off_when_its_size_changes(label, size):
    fig, ax = plot({"loss": decay(5), "val_loss": decay(5)}, {"val_loss": range(1, 6)}, label=label)
    fig.set_size_inches(size)
    width_and_height(ax)
    drawn, inside = ax.get_tightbbox(), fig.bbox.padded(1)
    assert inside.contains(drawn.x0, drawn.y0) and inside.contains(drawn.x1, drawn.y1)


def test_label_in_the_place_of_the_axes_is_refused():
    with pytest.raises(TypeError) as error:
        plot({"loss": [1.0]}, {}, "run 1")
    message = "plot_epoch_losses: ax must be a matplotlib Axes, not 'run 1'; write label='run 1' to name the run"
    assert str(error.value) == message
    assert not plt.get_fignums()


def test_what_is_no_axes_is_refused():
    with pytest.raises(TypeError, match=r"^plot_epoch_losses: ax must be a matplotlib Axes, not 3$"):
        plot({"loss": [1.0]}, {}, 3)
    _, axes = plt.subplots(1, 2)
    with pytest.raises(TypeError, match=r"ax must be a matplotlib Axes, not array\(\["):
        plot({"loss": [1.0]}, {}, axes)


class Model(EpochLossMixin, pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return batch.requires_grad_().mean()

    def validation_step(self, batch, batch_idx):
        return batch.mean()

    def configure_optimizers(self):
        pass

    def on_train_epoch_end(self):
        pass

    def on_validation_epoch_end(self):
        pass


def losses(count):
    return DataLoader(torch.arange(float(count), 0, -1), batch_size=1)


@pytest.mark.parametrize(
    ("settings", "x", "val_x"),
    [
        ({"max_epochs": 2}, [1, 2], [1, 2]),
        ({"max_epochs": 2, "val_check_interval": 0.25}, [1, 2], [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [1, 2, 3, 4], [2, 4]),
    ],
    ids=["every epoch", "4 an epoch", "every 2 epochs"],
)
def test_curves_of_a_fit_lie_where_the_means_were_taken(settings, x, val_x, tmp_path):
    model = Model()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of few workers
        trainer = pl.Trainer(**settings, **quiet, default_root_dir=tmp_path, num_sanity_val_steps=0)
        trainer.fit(model, losses(8), losses(2))
    _, ax = model.plot_epoch_losses()
    assert curves(ax) == {"loss (train)": (x, [4.5] * len(x)), "loss (val)": (val_x, [1.5] * len(val_x))}


def test_history_of_a_loop_is_drawn():
    model = Model()
    model.validation_step(torch.tensor([5.0]), 0)
    model.on_validation_epoch_end()
    for epoch in range(2):
        model.training_step(torch.tensor([4.0 - epoch]), 0)
        model.on_train_epoch_end()
    _, ax = model.plot_epoch_losses()
    x_y = {"loss (train)": ([1, 2], [4.0, 3.0]), "loss (val)": ([0], [5.0])}
    assert curves(ax) == x_y
    _, given = plt.subplots()
    assert model.plot_epoch_losses(given) == (given.figure, given) and curves(given) == x_y
    model.plot_epoch_losses(given, label="again")
    assert entries(given)[2:] == ["again: loss (train)", "again: loss (val)"]


def test_model_says_how_to_name_a_run():
    with pytest.raises(TypeError, match="write label='run 1' to name the run"):
        Model().plot_epoch_losses("run 1")


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
