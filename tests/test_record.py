import copy
import json
import math
import re
from collections import OrderedDict
from enum import StrEnum
from fractions import Fraction

import numpy as np
import pytest
import torch

from epoch_mixin._record import restore, saved
from epoch_mixin._recorder import History, Run
from tests.helpers import messages

GOOD = {
    "version": 1,
    "history": {"loss": [0.5, math.inf], "val_loss": [0.75], "kl": [1.0, 2.0]},
    "val_epochs": {"val_loss": [1]},
    "open": {
        "train": {"mark": 2, "totals": {"loss": [1.5, 3.0], "kl": [2.0, 1.0]}},
        "val": {"mark": None, "totals": {}},
    },
    "ended": {"val": [{"loss": [4.0, 2.0]}], "train": []},
    "last": {"mark": 1, "totals": {"loss": [3.0, 2.0]}},
}
MISSING = object()


def restored(record):
    history, run = History("Model"), Run()
    restore(record, history, run)
    return history, run


def used():
    """A history and open epochs, and what they hold as a record."""
    history, run = restored(
        {
            "history": {"loss": [9.0, 8.0, 7.0], "old": [1.0], "val_loss": [6.0]},
            "val_epochs": {"val_loss": [0]},
            "open": {"train": {"mark": 3, "totals": {"loss": [5.0, 2.0]}}},
        }
    )
    run.open["train"].add("loss", torch.tensor(3.0), 4)
    return history, run, saved(history, run.state())


def changed(path, value):
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
        (["history", "loss"], [10**400]),
        (["history", "loss"], [torch.ones(2)]),
        (["history", "val_loss"], [None]),
        (["history", "kl"], {"0": 1.0}),
        (["history", "kl"], [[1.0]]),
        (["val_epochs"], MISSING),
        (["val_epochs"], ["val_loss"]),
        (["val_epochs", "val_loss"], 1),
        (["val_epochs", "val_loss"], ["1"]),
        (["val_epochs", "val_loss"], [math.nan]),
        (["val_epochs", "val_loss"], [1, 10.5]),
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
        (["open", "test"], {"mark": None, "totals": {}}),
        (["ended"], None),
        (["ended", "val"], {"loss": [4.0, 2.0]}),
        (["version"], "1"),
        (["version"], 2),
    ],
)
def test_a_damaged_field_is_named_and_changes_nothing(path, value):
    history, run, before = used()
    held = dict(history.means)
    with pytest.raises(ValueError, match=rf"^{re.escape('.'.join(path))} (is|must) "):
        restore(changed(path, value), history, run)
    assert saved(history, run.state()) == before
    assert all(history.means[name] is losses for name, losses in held.items())


@pytest.mark.parametrize("record", [None, [], "history", 3.0])
def test_a_record_that_is_no_mapping_is_refused(record):
    history, run, before = used()
    with pytest.raises(ValueError, match=re.escape(repr(record))):
        restore(record, history, run)
    assert saved(history, run.state()) == before


def test_the_message_shows_what_is_there():
    with pytest.raises(ValueError, match=r"^history.loss must not be '0.5'$"):
        restored(changed(["history", "loss"], [0.5, "0.5"]))
    with pytest.raises(ValueError, match=r"^open.train.totals.loss must be a total and a weight, not \[1.5\]$"):
        restored(changed(["open", "train", "totals", "loss"], [1.5]))
    with pytest.raises(ValueError, match=r"^version must be 1 or less for this epoch-mixin, not 2$"):
        restored(changed(["version"], 2))


def test_a_record_replaces_all_that_was_there():
    history, run, _ = used()
    loss, old = history.means["loss"], history.means["old"]
    restore(GOOD, history, run)
    assert saved(history, run.state()) == GOOD
    assert history.means["loss"] is loss
    assert old == []


def test_a_record_goes_through_json_and_goes_on_where_it_stood():
    history, run = restored(json.loads(json.dumps(GOOD)))
    run.open["train"].add("loss", torch.tensor(2.5), 1)
    run.end("train")
    history.settle(run.ended, {}, ("loss", "kl"))
    assert history.means == {"loss": [0.5, math.inf, 1.0], "kl": [1.0, 2.0, 2.0], "val_loss": [0.75, 2.0]}
    assert history.val_epochs == {"val_loss": [1, 2]}


@pytest.mark.parametrize("fields", [["version"], ["ended"], ["last"], ["version", "ended", "last"]])
def test_records_of_older_versions_load(fields):
    record = {name: value for name, value in GOOD.items() if name not in fields}
    empty = {"version": 1, "ended": {"train": [], "val": []}, "last": {"mark": None, "totals": {}}}
    history, run = restored(record)
    assert saved(history, run.state()) == {**GOOD, **{name: empty[name] for name in fields}}


def test_names_are_plain_text_whatever_a_user_had_for_them():
    class Key(StrEnum):
        LOSS = "loss"

    history, run = restored({**GOOD, "history": {Key.LOSS: [0.5], np.str_("kl"): [1.0]}, "val_epochs": {}})
    record = saved(history, run.state())
    assert record["history"] == {"loss": [0.5], "kl": [1.0]}
    assert {type(name) for name in (*record["history"], *history.means)} == {str}


def test_a_loaded_record_is_not_shared_with_the_checkpoint():
    record = copy.deepcopy(GOOD)
    history, run = restored(record)
    run.end("train")
    history.settle(run.ended, {}, ("loss", "kl"))
    history.means["loss"].append(1.0)
    history.val_epochs["val_loss"].append(2)
    assert record == GOOD


def test_a_saved_record_is_not_shared_with_the_history():
    history, run, record = used()
    run.end("train")
    history.settle(run.ended, {}, ("loss",))
    history.means["loss"].clear()
    history.val_epochs["val_loss"].clear()
    assert record["history"]["loss"] == [9.0, 8.0, 7.0]
    assert record["val_epochs"] == {"val_loss": [0]}
    # 5 of weight 2 came from a checkpoint, 3 x 4 of weight 4 since.
    assert record["open"] == {"train": {"mark": 3, "totals": {"loss": [17.0, 6.0]}}}


def test_other_mappings_will_do():
    history, _ = restored(OrderedDict(GOOD, history=OrderedDict(GOOD["history"])))
    assert history.means == GOOD["history"]


NUMBERS = [np.float32(0.5), np.int64(2), True, Fraction(1, 2), torch.tensor(0.5), np.array(0.5), 3]


def test_only_plain_floats_are_loaded():
    history, _ = restored(changed(["history", "kl"], NUMBERS))
    assert history.means["kl"] == [0.5, 2.0, 1.0, 0.5, 0.5, 0.5, 3.0]
    assert {type(value) for value in history.means["kl"]} == {float}


def test_only_plain_floats_are_saved():
    history, run, _ = used()
    history.means["mine"] = NUMBERS
    values = saved(history, run.state())["history"]["mine"]
    assert values == [0.5, 2.0, 1.0, 0.5, 0.5, 0.5, 3.0]
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize("mine", [[0.1, None], ["low"], None, 3.0, [torch.ones(2)], [10**400], [[1.0]]])
def test_what_is_no_list_of_numbers_is_left_out_of_a_save_with_a_warning(mine, recwarn):
    history, run, before = used()
    history.means["mine"] = mine
    record = saved(history, run.state())
    assert saved(history, run.state()) == record == before
    restored(record)
    assert messages(recwarn, "Model") == ["Model.epoch_history['mine'] is not saved, for it is no list of numbers"]


def test_a_name_that_is_no_string_is_left_out_of_a_save_too(recwarn):
    history, run, before = used()
    history.means[3] = [0.5]
    assert saved(history, run.state()) == before
    assert messages(recwarn, "Model") == ["Model.epoch_history[3] is not saved, for it is no list of numbers"]


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_wrong_weight_does_not_make_a_record_unreadable(weight, recwarn):
    run, history = Run(), History("Model")
    run.begin("train", 0)
    run.open["train"].add("loss", torch.tensor(1.0), torch.tensor(weight))
    record = json.loads(json.dumps(saved(history, run.state())))
    history, run = restored(record)
    (message,) = messages(recwarn, "Model")
    assert message.startswith("Model.epoch_loss_weight had returned a negative number, NaN or infinity when")
    run.open["train"].add("loss", torch.tensor(1.0), 1)
    run.end("train")
    history.settle(run.ended, {}, ("loss",))
    assert history.means == {"loss": [pytest.approx(math.nan, nan_ok=True)]}
