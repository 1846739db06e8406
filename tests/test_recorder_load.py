import copy
import math
import re
from collections import OrderedDict

import pytest
import torch

from epoch_mixin._recorder import OpenEpoch, Recorder

GOOD = {
    "history": {"loss": [0.5, math.inf], "val_loss": [0.75], "kl": [1, 2]},
    "val_epochs": {"val_loss": [1]},
    "open": {
        "train": {"mark": 2, "totals": {"loss": [1.5, 3.0], "kl": [2.0, 1]}},
        "val": {"mark": None, "totals": {}},
    },
}


def alone(totals):
    """The sum over one rank."""
    return totals


def used():
    """A recorder with a history and open epochs."""
    recorder = Recorder("Model")
    recorder.history.update(loss=[9.0, 8.0, 7.0], old=[1.0])
    recorder.history["val_loss"] = [6.0]
    recorder.val_epochs["val_loss"] = [0]
    recorder.open["train"] = OpenEpoch(3, {"loss": (5.0, 2.0)})
    recorder.open["train"].add({"loss": torch.tensor(3.0)}, 4)
    return recorder


def damaged(path, value):
    """The good record with another value at a path, or with that field missing."""
    record = copy.deepcopy(GOOD)
    *parents, name = path
    place = record
    for parent in parents:
        place = place[parent]
    if value is MISSING:
        del place[name]
    else:
        place[name] = value
    return record


MISSING = object()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["history"], MISSING),
        (["history"], None),
        (["history"], [0.5]),
        (["history", "loss"], None),
        (["history", "loss"], 0.5),
        (["history", "loss"], "0.5"),
        (["history", "loss"], [0.5, "0.5"]),
        (["history", "val_loss"], [None]),
        (["history", "kl"], {"0": 1.0}),
        (["history", "kl"], [[1.0]]),
        (["val_epochs"], MISSING),
        (["val_epochs"], ["val_loss"]),
        (["val_epochs", "val_loss"], 1),
        (["val_epochs", "val_loss"], ["1"]),
        (["open"], MISSING),
        (["open"], None),
        (["open"], ["train"]),
        (["open", "train"], None),
        (["open", "train"], [1.5, 3.0]),
        (["open", "train", "mark"], MISSING),
        (["open", "train", "mark"], "2"),
        (["open", "train", "mark"], 2.5),
        (["open", "train", "totals"], MISSING),
        (["open", "val", "totals"], [0.0, 0.0]),
        (["open", "train", "totals", "loss"], 1.5),
        (["open", "train", "totals", "loss"], [1.5]),
        (["open", "train", "totals", "loss"], [1.5, 3.0, 1.0]),
        (["open", "train", "totals", "loss"], ["1.5", 3.0]),
        (["open", "train", "totals", "kl"], [2.0, None]),
        (["open", "train", "totals", "kl"], [2.0, -1.0]),
        (["open", "train", "totals", "kl"], [2.0, math.nan]),
        (["open", "test"], {"mark": None, "totals": {}}),
    ],
)
def test_damaged_field_is_named_and_changes_nothing(path, value):
    recorder = used()
    before = recorder.state(("loss",), alone)
    held = dict(recorder.history)
    with pytest.raises(ValueError, match=rf"^{re.escape('.'.join(path))} (is|must) "):
        recorder.load(damaged(path, value))
    assert recorder.state(("loss",), alone) == before
    assert all(recorder.history[name] is losses for name, losses in held.items())


@pytest.mark.parametrize("record", [None, [], "history", 3.0])
def test_record_that_is_no_mapping_is_refused(record):
    recorder = used()
    before = recorder.state(("loss",), alone)
    with pytest.raises(ValueError, match="history"):
        recorder.load(record)
    assert recorder.state(("loss",), alone) == before


def test_message_shows_what_is_there():
    with pytest.raises(ValueError, match=r"^history.loss must hold numbers, not '0.5'$"):
        Recorder("Model").load(damaged(["history", "loss"], [0.5, "0.5"]))
    with pytest.raises(ValueError, match=r"^open.train.totals.loss must be a total and a weight, not \[1.5\]$"):
        Recorder("Model").load(damaged(["open", "train", "totals", "loss"], [1.5]))


def test_good_record_replaces_all_that_was_there():
    recorder = used()
    loss, old = recorder.history["loss"], recorder.history["old"]
    recorder.load(GOOD)
    state = recorder.state(("loss", "kl"), alone)
    assert state["history"] == GOOD["history"]
    assert state["val_epochs"] == GOOD["val_epochs"]
    assert state["open"]["train"] == GOOD["open"]["train"]
    assert recorder.history["loss"] is loss
    assert old == []


def test_loaded_record_is_not_shared_with_the_checkpoint():
    record = copy.deepcopy(GOOD)
    recorder = Recorder("Model")
    recorder.load(record)
    recorder.close("val", ("loss",), alone)
    recorder.close("train", ("loss", "kl"), alone)
    recorder.history["loss"].append(1.0)
    recorder.val_epochs["val_loss"].append(2)
    assert record == GOOD


def test_state_is_not_shared_with_the_recorder():
    recorder = used()
    state = recorder.state(("loss",), alone)
    recorder.close("train", ("loss",), alone)
    recorder.history["loss"].clear()
    recorder.val_epochs["val_loss"].clear()
    assert state["history"]["loss"] == [9.0, 8.0, 7.0]
    assert state["val_epochs"] == {"val_loss": [0]}
    # 5 of weight 2 came from a checkpoint, 3 x 4 of weight 4 since.
    assert state["open"] == {"train": {"mark": 3, "totals": {"loss": [17.0, 6.0]}}}


def test_other_mappings_will_do():
    recorder = Recorder("Model")
    recorder.load(OrderedDict(GOOD, history=OrderedDict(GOOD["history"])))
    assert recorder.history == GOOD["history"]
