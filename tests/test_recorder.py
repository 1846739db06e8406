import json
import math

import pytest
import torch

from epoch_mixin._recorder import History, Run, together
from tests.helpers import close, mean, messages

NAN = pytest.approx(math.nan, nan_ok=True)


def add(run, stage, *pairs, key="loss"):
    if stage not in run.open:
        run.begin(stage)
    for loss, weight in pairs:
        run.open[stage].add(key, torch.tensor(loss), weight)


def ended(*epochs, stage="train"):
    """Totals that a rank has ended; a number stands for a mean of weight 1."""
    totals = [{key: [float(mean), 1.0] for key, mean in epoch.items()} for epoch in epochs]
    return {"train": [], "val": [], stage: totals}


def settle(history, *epochs, stage="train", keys=("loss",), words=()):
    """Settle epochs one by one, each given as its means."""
    for epoch in epochs:
        history.settle(ended(epoch, stage=stage), dict(words), keys)


def test_running_mean_is_exact_however_many_losses_wait():
    run, pairs = Run(), []
    epoch = run.begin("train")
    assert epoch.mean("loss").isnan()
    for count in range(1, 300):
        loss, weight = torch.rand(()), count % 7 + 1
        run.open["train"].add("loss", loss, weight)
        pairs.append((loss.item(), weight))
        assert epoch.mean("loss").item() == close(mean(pairs), rel=1e-14)


def test_keys_that_come_and_go_have_each_their_own_weight():
    run = Run()
    epoch = run.begin("train")
    add(run, "train", (1.0, 1), (2.0, 3), key="a")
    add(run, "train", (10.0, 3), key="b")
    assert epoch.mean("a") == 7 / 4
    assert epoch.mean("b") == 10.0
    assert epoch.totals(first=True) == {"a": [7.0, 4.0], "b": [30.0, 3.0]}


def test_what_a_checkpoint_brought_is_where_the_sums_begin():
    run = Run()
    epoch = run.begin("train", 3)
    epoch.begins = {"loss": [8.0, 2.0], "kl": [1.0, 4.0]}
    assert epoch.mean("loss") == 4.0
    add(run, "train", (1.0, 1))
    assert epoch.mean("loss") == 3.0
    assert epoch.totals(first=True) == {"loss": [9.0, 3.0], "kl": [1.0, 4.0]}
    assert epoch.totals(first=False) == {"loss": [1.0, 1.0]}


def test_an_epoch_ends_as_plain_data_and_the_next_begins_anew():
    run = Run()
    add(run, "train", (1.0, 1), (4.0, 2))
    run.end("train")
    add(run, "train", (7.0, 1))
    run.end("train")
    assert run.open == {}
    assert run.ended == {"train": [{"loss": [9.0, 3.0]}, {"loss": [7.0, 1.0]}], "val": []}


def test_the_end_of_training_ends_a_validation_that_nobody_ended():
    run = Run()
    add(run, "train", (1.0, 1))
    add(run, "val", (2.0, 1))
    run.end("train")
    assert run.ended == {"train": [{"loss": [1.0, 1.0]}], "val": [{"loss": [2.0, 1.0]}]}


def test_beginning_anew_forgets_what_was_open():
    run = Run()
    add(run, "train", (1.0, 1))
    run.begin("train")
    add(run, "train", (3.0, 1))
    assert run.open["train"].mean("loss") == 3.0


def test_a_state_is_plain_and_does_not_change_afterwards():
    run = Run()
    add(run, "val", (9.0, 1))
    run.end("val")
    run.begin("train", 5)
    add(run, "train", (5.0, 2))
    state = run.state()
    before = json.dumps(state)
    assert state["open"] == {"train": {"mark": 5, "totals": {"loss": [10.0, 2.0]}}}
    assert state["ended"] == {"train": [], "val": [{"loss": [9.0, 1.0]}]}
    add(run, "train", (8.0, 8))
    run.end("train")
    run.clear()
    assert json.dumps(state) == before


def test_ranks_are_put_together_whatever_each_of_them_ended():
    one, two = Run(), Run()
    add(one, "val", (1.0, 1))
    one.end("val")  # a validation run that the other passed by
    for run, (loss, weight) in ((one, (1.0, 1)), (two, (4.0, 2))):
        add(run, "train", (loss, weight))
        run.end("train")
        run.begin("train", 7)
    add(two, "train", (6.0, 1), key="kl")
    state = together([one.state(), two.state()], share=1.0)
    assert state["ended"] == {"train": [{"loss": [9.0, 3.0]}], "val": [{"loss": [1.0, 1.0]}]}
    assert state["open"] == {"train": {"mark": 7, "totals": {"kl": [6.0, 1.0]}}}


def test_ranks_that_share_one_copy_of_the_model_count_once():
    run = Run()
    add(run, "train", (1.0, 2))
    alone = run.state()
    assert together([alone, alone], share=0.5) == alone


def test_means_of_ended_epochs_are_written():
    run, history = Run(), History("Model")
    for pairs in [(1.0, 1), (4.0, 2)], [(7.0, 1)]:
        add(run, "train", *pairs)
        run.end("train")
    history.settle(run.ended, {}, ("loss",))
    assert history.means == {"loss": [3.0, 7.0]}


def test_validation_is_filed_under_val_with_the_epoch_it_belongs_to():
    history = History("Model")
    settle(history, {"loss": 3}, {"loss": 2}, stage="val")
    settle(history, {"loss": 1})
    settle(history, {"loss": 1}, stage="val")
    assert history.means == {"loss": [1.0], "val_loss": [3.0, 2.0, 1.0]}
    assert history.val_epochs == {"val_loss": [0, 0, 1]}


def test_a_validation_settled_with_its_epoch_belongs_to_it():
    history = History("Model")
    for _ in range(2):
        history.settle({"train": [{"loss": [1.0, 1.0]}], "val": [{"loss": [2.0, 1.0]}]}, {}, ("loss",))
    assert history.val_epochs == {"val_loss": [0, 1]}


def test_training_is_listed_before_validation():
    history = History("Model")
    settle(history, {"loss": 1, "kl": 1}, stage="val", keys=("loss", "kl"))
    held = history.means["val_loss"]
    settle(history, {"loss": 1, "kl": 1}, keys=("loss", "kl"))
    assert list(history.means) == ["loss", "kl", "val_loss", "val_kl"]
    assert history.means["val_loss"] is held


def test_weights_of_zero_alone_give_no_mean():
    history = History("Model")
    with pytest.warns(UserWarning, match=r"for 'loss', so its mean is nan: the weights of its steps are all 0$"):
        history.settle({"train": [{"loss": [0.0, 0.0]}], "val": []}, {}, ("loss",))
    assert history.means == {"loss": [NAN]}


def test_an_epoch_without_a_loss_says_what_its_steps_gave(recwarn):
    history = History("Model")
    settle(history, {}, {}, words={"train": "returned only 'Loss'"})
    settle(history, {}, {}, stage="val", words={"val": "returned None and logged 'acc'"})
    assert history.means == {"loss": [NAN, NAN]}
    train, val = messages(recwarn, "Model")
    assert train.startswith("Model: no step of epoch 0 gave a loss for 'loss', so its mean is nan: it returned only")
    assert val == (
        "Model: no step of a validation gave a loss: validation_step returned None and logged 'acc';"
        ' return the loss, or self.log("val_loss", ...)'
    )


def test_a_key_that_comes_later_is_filed_under_its_epochs():
    history = History("Model")
    settle(history, {"loss": 1}, {"loss": 2})
    settle(history, {"loss": 3, "kl": 9}, keys=("loss", "kl"))
    assert history.means == {"loss": [1.0, 2.0, 3.0], "kl": [NAN, NAN, 9.0]}
    settle(history, {"loss": 4}, {"loss": 5})
    settle(history, {"loss": 6, "kl": 8}, keys=("loss", "kl"))
    assert history.means["kl"] == [NAN, NAN, 9.0, NAN, NAN, 8.0]


def test_a_key_that_only_validation_gives_leaves_no_list_in_training(recwarn):
    history, keys = History("Model"), ("loss", "acc")
    for _ in range(2):
        settle(history, {"loss": 1, "acc": 5}, stage="val", keys=keys)
        settle(history, {"loss": 2}, keys=keys)
    assert history.means == {"loss": [2.0, 2.0], "val_loss": [1.0, 1.0], "val_acc": [5.0, 5.0]}
    settle(history, {"loss": 2, "acc": 4}, {"loss": 3}, keys=keys)
    assert history.means["acc"] == [NAN, NAN, 4.0, NAN]


def test_several_dataloaders_have_a_curve_each_beside_the_pooled_one():
    history = History("Model")
    totals = {"loss/dataloader_idx_0": [6.0, 3.0], "loss/dataloader_idx_1": [5.0, 1.0]}
    history.settle({"train": [], "val": [totals]}, {}, ("loss",))
    assert history.means == {
        "val_loss": [11 / 4],
        "val_loss/dataloader_idx_0": [2.0],
        "val_loss/dataloader_idx_1": [5.0],
    }
    assert set(history.val_epochs) == set(history.means)


def test_the_index_is_the_epoch_where_a_checkpoint_knows_less(recwarn):
    history = History("Model")
    settle(history, {"loss": 1})
    held = history.means["loss"]
    history.pad(("loss",), 3)
    history.pad(("loss",), 3)
    settle(history, {"loss": 4})
    assert held == [1.0, NAN, NAN, 4.0]
    assert messages(recwarn, "Model") == ["Model: the checkpoint holds no loss of the last 2 of 3 epochs: nan"]


def test_a_record_is_a_row_for_each_training_epoch():
    history = History("Model")
    assert history.records(("loss",)) == []
    for epoch in range(3):
        if epoch != 1:
            settle(history, {"loss": 10 + epoch}, {"loss": 20 + epoch}, stage="val")
        settle(history, {"loss": epoch})
    settle(history, {"loss": 99}, stage="val")  # of an epoch that has not ended
    assert history.records(("loss",)) == [
        {"epoch": 0, "loss": 0.0, "val_loss": 20.0},
        {"epoch": 1, "loss": 1.0},
        {"epoch": 2, "loss": 2.0, "val_loss": 22.0},
    ]


@pytest.mark.parametrize("lists_alone", [False, True])
def test_a_cleared_history_starts_afresh(lists_alone):
    history = History("Model")
    for _ in range(3):
        settle(history, {"loss": 1}, stage="val")
        settle(history, {"loss": 1})
    for held in [*history.means.values()] if lists_alone else [history.means]:
        held.clear()
    settle(history, {"loss": 2}, stage="val")
    settle(history, {"loss": 3})
    assert history.means == {"loss": [3.0], "val_loss": [2.0]}
    assert history.val_epochs == {"val_loss": [0]}
    assert history.records(("loss",)) == [{"epoch": 0, "loss": 3.0, "val_loss": 2.0}]


def test_rows_of_a_history_whose_losses_alone_were_cleared_have_the_validation_of_their_epoch():
    history = History("Model")
    for epoch in range(3):
        settle(history, {"loss": 10 + epoch}, stage="val")
        settle(history, {"loss": epoch})
    history.means["loss"].clear()
    settle(history, {"loss": 20}, stage="val")
    settle(history, {"loss": 5})
    assert history.records(("loss",)) == [{"epoch": 0, "loss": 5.0, "val_loss": 20.0}]
