import json
import math

import pytest
import torch

from epoch_mixin._history import History, Run
from epoch_mixin._ranks import combined
from tests.helpers import close, mean

NAN = pytest.approx(math.nan, nan_ok=True)


def add(epochs, *pairs, key="loss"):
    if not epochs.is_open:
        epochs.begin(("loss", "kl"), None)
    for loss, weight in pairs:
        epochs.add(key, loss, weight)


def write(history, *means, stage="train", keys=("loss",)):
    """Write epochs one by one, each given as its means, and return the missing keys of the last."""
    for epoch in means:
        missing = history.write(stage, {key: [float(value), 1.0] for key, value in epoch.items()}, keys)
    return missing


def test_the_running_mean_is_exact_however_many_losses_there_are():
    train, pairs = Run().train, []
    train.begin(("loss",), None)
    assert train.mean("loss").isnan()
    for count in range(1, 300):
        loss, weight = torch.rand(()), count % 7 + 1
        train.add("loss", loss, weight)
        pairs.append((loss.item(), weight))
        assert train.mean("loss").item() == close(mean(pairs), rel=1e-14)


def test_each_key_has_its_own_weight():
    train = Run().train
    add(train, (1.0, 1), (2.0, 3))
    add(train, (10.0, 3), key="kl")
    assert train.mean("loss") == 7 / 4 and train.mean("kl") == 10.0
    assert train.totals(first=True) == {"loss": [7.0, 4.0], "kl": [30.0, 3.0]}


def test_a_resumed_epoch_begins_with_the_sums_of_the_checkpoint_on_the_first_rank():
    train = Run().train
    train.begin(("loss", "kl"), 3)
    train.resumed = {"loss": [8.0, 2.0], "kl": [1.0, 4.0]}
    assert train.mean("loss") == 4.0
    add(train, (1.0, 1))
    assert train.mean("loss") == 3.0
    assert train.totals(first=True) == {"loss": [9.0, 3.0], "kl": [1.0, 4.0]}
    assert train.totals(first=False) == {"loss": [1.0, 1.0]}


def test_an_epoch_ends_as_plain_data_and_the_next_starts_from_zero():
    train = Run().train
    for pairs in [(1.0, 1), (4.0, 2)], [(7.0, 1)]:
        add(train, *pairs)
        train.end(first=True)
        assert not train.is_open and train.mean("loss").isnan()
    assert train.ended == [{"loss": [9.0, 3.0]}, {"loss": [7.0, 1.0]}]


def test_a_state_does_not_change_afterwards():
    run = Run()
    add(run.val, (9.0, 1))
    run.val.end(first=True)
    run.train.begin(("loss",), 5)
    add(run.train, (5.0, 2))
    state = run.state()
    before = json.dumps(state)
    assert state["open"] == {"train": {"mark": 5, "totals": {"loss": [10.0, 2.0]}}}
    assert state["ended"] == {"train": [], "val": [{"loss": [9.0, 1.0]}]}
    add(run.train, (8.0, 8))
    run.train.end(first=True)
    assert json.dumps(state) == before


def test_the_states_of_ranks_are_combined_whatever_each_of_them_ended():
    one, two = Run(), Run()
    add(one.val, (1.0, 1))
    one.val.end(first=True)  # a validation that the other rank skipped
    for run, pair in ((one, (1.0, 1)), (two, (4.0, 2))):
        add(run.train, pair)
        run.train.end(first=True)
        run.train.begin(("loss", "kl"), 7)
    add(two.train, (6.0, 1), key="kl")
    state = combined([{**run.state(), "keys": ["loss", "kl"]} for run in (one, two)], share=1.0)
    assert state["ended"] == {"train": [{"loss": [9.0, 3.0]}], "val": [{"loss": [1.0, 1.0]}]}
    assert state["open"] == {"train": {"mark": 7, "totals": {"kl": [6.0, 1.0]}}}


def test_ranks_that_share_one_copy_of_the_model_count_once():
    run = Run()
    add(run.train, (1.0, 2))
    alone = {**run.state(), "keys": ["loss"]}
    assert combined([alone, alone], share=0.5) == alone


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
