import json
import math

import pytest
import torch

from epoch_mixin._recorder import OpenEpoch, Recorder
from tests.helpers import close, mean, messages


def alone(totals):
    """The sum over one rank."""
    return totals


def add(recorder, stage, *pairs, key="loss"):
    epoch = recorder.open.setdefault(stage, OpenEpoch())
    for loss, weight in pairs:
        epoch.add({key: torch.tensor(loss)}, weight)


def test_mean_is_exact_however_many_losses_wait():
    epoch, pairs = OpenEpoch(), []
    assert math.isnan(epoch.mean("loss"))
    for count in range(1, 300):
        loss, weight = torch.rand(()), count % 7 + 1
        epoch.add({"loss": loss}, weight)
        pairs.append((loss.item(), weight))
        assert epoch.mean("loss").item() == close(mean(pairs), rel=1e-14)


def test_two_hundred_thousand_steps_are_exact_and_leave_no_losses_behind():
    losses = torch.rand(200_000)
    losses[::1000] *= 1e8
    epoch = OpenEpoch()
    for step, loss in enumerate(losses):
        epoch.add({"loss": loss}, step % 97)
        assert len(epoch._waiting) < 1000
    expected = mean((loss, step % 97) for step, loss in enumerate(losses.tolist()))
    assert epoch.mean("loss").item() == close(expected)


def test_keys_that_come_and_go_have_each_their_own_weight():
    epoch = OpenEpoch()
    epoch.add({"a": torch.tensor(1.0)}, 1)
    epoch.add({"a": torch.tensor(2.0), "b": torch.tensor(10.0)}, 3)
    epoch.add({}, 1000)
    assert epoch.mean("a") == 7 / 4
    assert epoch.mean("b") == 10.0
    assert epoch.totals(("a", "b", "c"), alone) == {"a": (7.0, 4.0), "b": (30.0, 3.0), "c": (0.0, 0.0)}


def test_close_writes_the_mean_and_begins_anew():
    recorder = Recorder("Model")
    add(recorder, "train", (1.0, 1), (4.0, 2))
    recorder.close("train", ("loss",), alone)
    add(recorder, "train", (7.0, 1))
    recorder.close("train", ("loss",), alone)
    assert recorder.history == {"loss": [3.0, 7.0]}


def test_validation_is_filed_under_val_with_the_epoch_it_belongs_to():
    recorder = Recorder("Model")
    for loss in (3.0, 2.0):
        add(recorder, "val", (loss, 1))
        recorder.close("val", ("loss",), alone)
    add(recorder, "train", (1.0, 1))
    recorder.close("train", ("loss",), alone)
    add(recorder, "val", (1.0, 1))
    recorder.close("val", ("loss",), alone)
    assert recorder.history == {"val_loss": [3.0, 2.0, 1.0], "loss": [1.0]}
    assert recorder.val_epochs == {"val_loss": [0, 0, 1]}


def test_training_without_a_loss_is_nan_with_one_warning_and_validation_leaves_nothing(recwarn):
    recorder = Recorder("Model")
    for _ in range(3):
        recorder.close("val", ("loss",), alone)
        recorder.close("train", ("loss",), alone)
    assert recorder.history == {"loss": [pytest.approx(math.nan, nan_ok=True)] * 3}
    assert messages(recwarn, "Model") == ["Model: no step of epoch 0 gave a loss for 'loss', so its mean is nan"]


def test_weights_of_zero_alone_give_no_mean():
    recorder = Recorder("Model")
    add(recorder, "train", (1.0, 0))
    with pytest.warns(UserWarning, match="its mean is nan"):
        recorder.close("train", ("loss",), alone)
    assert math.isnan(recorder.history["loss"][0])


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_tensor_out_of_range_is_refused_when_the_epoch_ends(weight, dtype):
    recorder = Recorder("Model")
    add(recorder, "train", (1.0, 5), (1.0, torch.tensor(weight, dtype=dtype)), (1.0, 5))
    with pytest.raises(ValueError, match="^Model.epoch_loss_weight returned a negative number, NaN or infinity"):
        recorder.close("train", ("loss",), alone)


def test_reduction_gets_one_row_a_key_and_one_call_an_epoch():
    calls = []

    def two_equal_ranks(totals):
        calls.append(totals.shape)
        return totals * 2

    recorder = Recorder("Model")
    for _ in range(200):
        recorder.open.setdefault("train", OpenEpoch()).add({"loss": torch.tensor(2.0), "kl": torch.tensor(4.0)}, 3)
    recorder.close("train", ("loss", "kl"), two_equal_ranks)
    assert calls == [(2, 2)]
    assert recorder.history == {"loss": [2.0], "kl": [4.0]}


def recorder_in_mid_epoch():
    recorder = Recorder("Model")
    add(recorder, "train", (1.0, 1), (4.0, 2))
    recorder.close("train", ("loss",), alone)
    add(recorder, "train", (5.0, 2))
    add(recorder, "val", (9.0, 1))
    return recorder


def test_a_saved_recorder_goes_on_where_it_stood():
    saved = json.loads(json.dumps(recorder_in_mid_epoch().state(("loss",), alone)))
    recorder = Recorder("Model")
    recorder.load(saved)
    assert recorder.open["train"].mean("loss") == 5.0
    add(recorder, "train", (2.0, 1))
    assert recorder.open["train"].mean("loss") == 4.0
    recorder.close("val", ("loss",), alone)
    recorder.close("train", ("loss",), alone)
    assert recorder.history == {"loss": [3.0, 4.0], "val_loss": [9.0]}
    assert recorder.val_epochs == {"val_loss": [1]}


def test_a_saved_state_does_not_change_afterwards():
    recorder = recorder_in_mid_epoch()
    saved = recorder.state(("loss",), alone)
    before = json.dumps(saved)
    add(recorder, "train", (8.0, 8))
    recorder.close("train", ("loss",), alone)
    assert json.dumps(saved) == before


def test_load_changes_the_lists_that_a_user_may_hold():
    saved = recorder_in_mid_epoch().state(("loss",), alone)
    recorder = Recorder("Model")
    losses = recorder.history.setdefault("loss", [8.0, 8.0, 8.0])
    gone = recorder.history.setdefault("val_loss", [8.0])
    recorder.load(saved)
    assert losses == [3.0] and losses is recorder.history["loss"]
    assert gone == []


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda record: "text", "history"),
        (lambda record: record.pop("history"), "history"),
        (lambda record: record.update(history=[1.0]), "history"),
        (lambda record: record["history"].update(loss=1.0), "history.loss"),
        (lambda record: record["history"].update(loss=[1.0, "2"]), "history.loss"),
        (lambda record: record.update(val_epochs=None), "val_epochs"),
        (lambda record: record["val_epochs"].update(val_loss=["first"]), "val_epochs.val_loss"),
        (lambda record: record.pop("open"), "open"),
        (lambda record: record["open"].update(train=3), "open.train"),
        (lambda record: record["open"]["train"].update(mark="0"), "open.train.mark"),
        (lambda record: record["open"]["train"].pop("totals"), "open.train.totals"),
        (lambda record: record["open"]["train"]["totals"].update(loss=[1.0]), "open.train.totals.loss"),
    ],
)
def test_a_damaged_record_is_refused_by_name_and_changes_nothing(damage, field):
    record = recorder_in_mid_epoch().state(("loss",), alone)
    damaged = damage(record)
    recorder = recorder_in_mid_epoch()
    before = json.dumps(recorder.state(("loss",), alone))
    with pytest.raises(ValueError, match=f"^{field} "):
        recorder.load(damaged if damaged == "text" else record)
    assert json.dumps(recorder.state(("loss",), alone)) == before
