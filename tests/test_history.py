import math

import pytest

from epoch_mixin._history import History

NAN = pytest.approx(math.nan, nan_ok=True)


def write(history, *means, stage="train", keys=("loss",)):
    """Write epochs one by one, each given as its means, and return the missing keys of the last."""
    for epoch in means:
        missing = history.write(stage, {key: [float(value), 1.0] for key, value in epoch.items()}, keys)
    return missing


def test_a_validation_belongs_to_the_epoch_that_is_written_after_it():
    history = History()
    write(history, {"loss": 3}, {"loss": 2}, stage="val")
    write(history, {"loss": 1})
    write(history, {"loss": 1}, stage="val")
    assert history.means == {"loss": [1.0], "val_loss": [3.0, 2.0, 1.0]}
    assert history.val_epochs == {"val_loss": [0, 0, 1]}


def test_training_is_listed_before_validation():
    history = History()
    write(history, {"loss": 1, "kl": 1}, stage="val", keys=("loss", "kl"))
    held = history.means["val_loss"]
    write(history, {"loss": 1, "kl": 1}, keys=("loss", "kl"))
    assert list(history.means) == ["loss", "kl", "val_loss", "val_kl"]
    assert history.means["val_loss"] is held


def test_weights_of_zero_alone_give_no_mean():
    history = History()
    assert history.write("train", {"loss": [0.0, 0.0]}, ("loss",)) == ["loss"]
    assert history.means == {"loss": [NAN]}


def test_a_key_that_comes_later_has_nan_for_the_epochs_before():
    history = History()
    write(history, {"loss": 1}, {"loss": 2})
    write(history, {"loss": 3, "kl": 9}, keys=("loss", "kl"))
    assert history.means == {"loss": [1.0, 2.0, 3.0], "kl": [NAN, NAN, 9.0]}
    write(history, {"loss": 4}, {"loss": 5})
    write(history, {"loss": 6, "kl": 8}, keys=("loss", "kl"))
    assert history.means["kl"] == [NAN, NAN, 9.0, NAN, NAN, 8.0]


def test_a_key_that_only_validation_gives_has_no_list_in_training():
    history, keys = History(), ("loss", "acc")
    for _ in range(2):
        write(history, {"loss": 1, "acc": 5}, stage="val", keys=keys)
        assert write(history, {"loss": 2}, keys=keys) == []
    assert history.means == {"loss": [2.0, 2.0], "val_loss": [1.0, 1.0], "val_acc": [5.0, 5.0]}
    assert write(history, {"loss": 2, "acc": 4}, {"loss": 3}, keys=keys) == ["acc"]
    assert history.means["acc"] == [NAN, NAN, 4.0, NAN]


def test_several_dataloaders_have_a_curve_each_beside_that_of_all():
    history = History()
    history.write("val", {"loss/dataloader_idx_0": [6.0, 3.0], "loss/dataloader_idx_1": [5.0, 1.0]}, ("loss",))
    assert history.means == {
        "val_loss": [11 / 4],
        "val_loss/dataloader_idx_0": [2.0],
        "val_loss/dataloader_idx_1": [5.0],
    }
    assert set(history.val_epochs) == set(history.means)


def test_a_record_is_a_row_for_each_training_epoch():
    history = History()
    assert history.records() == []
    for epoch in range(3):
        if epoch != 1:
            write(history, {"loss": 10 + epoch}, {"loss": 20 + epoch}, stage="val")
        write(history, {"loss": epoch})
    write(history, {"loss": 99}, stage="val")  # of an epoch that has not ended
    assert history.records() == [
        {"epoch": 0, "loss": 0.0, "val_loss": 20.0},
        {"epoch": 1, "loss": 1.0},
        {"epoch": 2, "loss": 2.0, "val_loss": 22.0},
    ]


def test_a_history_starts_again_when_the_list_of_the_first_key_is_cleared():
    history, keys = History(), ("g_loss", "d_loss")
    write(history, {"g_loss": 1, "d_loss": 2}, {"g_loss": 3, "d_loss": 4}, keys=keys)
    history.list_of("g_loss").clear()
    write(history, {"g_loss": 5, "d_loss": 6}, keys=keys)
    assert history.means == {"g_loss": [5.0], "d_loss": [6.0]}


def test_a_list_that_was_read_before_it_had_a_value_is_the_one_that_gets_it():
    history = History()
    held = history.list_of("loss")
    assert held == [] and history.means == {}
    history.restore({"loss": [1.0]}, {}, {})
    assert held == [1.0] and held is history.means["loss"] is history.list_of("loss")


@pytest.mark.parametrize(
    ("epochs", "parts", "x"),
    [
        ([0, 0, 0, 0, 1], [0.25, 0.5, 0.75, 1.0, 0.25], [0.25, 0.5, 0.75, 1.0, 1.25]),
        ([0, 0, 1, 2], [0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 2.0, 3.0]),
        ([0, 0, 0, 1], [math.nan] * 4, [1 / 3, 2 / 3, 1.0, 2.0]),
        ([1, 3], [math.nan, 1.0], [2.0, 4.0]),
    ],
    ids=["parts", "before training", "unknown", "every other epoch"],
)
def test_a_validation_lies_where_it_ran(epochs, parts, x):
    history = History()
    history.restore({"loss": [1.0] * 4, "val_loss": [1.0] * len(x)}, {"val_loss": epochs}, {"val_loss": parts})
    assert history.validated_at() == {"val_loss": pytest.approx(x)}


@pytest.mark.parametrize("cleared", ["epoch_losses", "all lists", "epoch_history"])
def test_a_cleared_history_starts_again(cleared):
    history = History()
    for _ in range(3):
        write(history, {"loss": 1}, stage="val")
        write(history, {"loss": 1})
    lists = {"epoch_losses": [history.means["loss"]], "all lists": [*history.means.values()]}
    for held in lists.get(cleared, [history.means]):
        held.clear()
    write(history, {"loss": 2}, stage="val")
    write(history, {"loss": 3})
    assert history.means == {"loss": [3.0], "val_loss": [2.0]}
    assert history.records() == [{"epoch": 0, "loss": 3.0, "val_loss": 2.0}]
