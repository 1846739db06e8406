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

from tests.helpers import Tracked, messages

GOOD = {
    "version": 1,
    "history": {"loss": [0.5, math.inf], "val_loss": [0.75], "kl": [1.0, 2.0]},
    "val_epochs": {"val_loss": [1]},
    "val_parts": {"val_loss": [0.5]},
    "open": {
        "val": {"mark": None, "totals": {}},
        "train": {"mark": 2, "totals": {"loss": [1.5, 3.0], "kl": [2.0, 1.0]}},
    },
    "ended": {"val": [{"loss": [4.0, 2.0]}], "train": []},
    "last": {"mark": 1, "totals": {"loss": [3.0, 2.0]}},
    "partners": {"loss": {"train_total": True, "train_part": False}},
}
MISSING = object()


class Model(Tracked):
    epoch_loss_keys = ("loss", "kl")

    def training_step(self, batch, batch_idx):
        return batch


def loaded(record):
    model = Model()
    model.on_load_checkpoint({"epoch_mixin": record})
    return model


def saved(model):
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    return json.loads(json.dumps(checkpoint["epoch_mixin"]))


def changed(path, value):
    """The good record with another value at a path, or with that part missing."""
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


DAMAGED = [
    *((["history"], MISSING), (["history"], None), (["history"], [0.5]), (["history", "loss"], None)),
    *((["history", "loss"], 0.5), (["history", "loss"], "0.5"), (["history", "loss"], [0.5, "0.5"])),
    *((["history", "loss"], [10**400]), (["history", "loss"], [torch.ones(2)]), (["history", "kl"], [[1.0]])),
    *((["val_epochs"], MISSING), (["val_epochs"], ["val_loss"]), (["val_epochs", "val_loss"], 1)),
    *((["val_epochs", "val_loss"], ["1"]), (["val_epochs", "val_loss"], [1, 10.5])),
    *((["open"], MISSING), (["open"], None), (["open"], ["train"]), (["open", "train"], None)),
    *((["open", "train"], [1.5, 3.0]), (["open", "train", "mark"], MISSING), (["open", "train", "mark"], 2.5)),
    *((["open", "train", "totals"], MISSING), (["open", "val", "totals"], [0.0, 0.0])),
    *((["open", "train", "totals", "loss"], [1.5]), (["open", "train", "totals", "loss"], [1.5, 3.0, 1.0])),
    *((["open", "train", "totals", "kl"], [2.0, None]), (["open", "train", "totals", "kl"], [2.0, -1.0])),
    *((["open", "test"], {"mark": None, "totals": {}}), (["ended"], None), (["ended", "val"], {"loss": [4.0, 2.0]})),
    *((["last"], None), (["partners"], {"loss": 3}), (["version"], "1"), (["val_parts"], [0.5])),
    *((["partners", "loss"], {1: True}), (["partners", "loss"], {"x": None}), (["partners", "loss"], "x")),
    *((["val_epochs", "val_loss"], [-1]), (["partners", "loss"], [1])),
]


@pytest.mark.parametrize(("path", "value"), DAMAGED, ids=[".".join(path) for path, _ in DAMAGED])
def test_a_damaged_record_is_refused_and_changes_nothing(path, value):
    model = loaded({**GOOD, "history": {"loss": [9.0], "old": [1.0]}, "val_epochs": {}, "val_parts": {}})
    before, held = saved(model), dict(model.epoch_history)
    damaged = r"^Model: checkpoint\['epoch_mixin'\] is damaged: {.{20,300}}$"
    with pytest.raises(ValueError, match=damaged):
        model.on_load_checkpoint({"epoch_mixin": changed(path, value)})
    assert saved(model) == before
    assert all(model.epoch_history[name] is losses for name, losses in held.items())


@pytest.mark.parametrize("record", [None, [], "history", 3.0])
def test_a_record_that_is_no_mapping_is_refused(record):
    message = f"Model: checkpoint['epoch_mixin'] is damaged: {record!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loaded(record)


def test_a_record_of_a_newer_version_says_so():
    message = "has version 2, and this epoch-mixin reads versions up to 1; install a newer one$"
    with pytest.raises(ValueError, match=rf"^Model: checkpoint\['epoch_mixin'\] {message}"):
        loaded({"version": 2, "form": "another"})


def test_a_record_replaces_all_that_was_there():
    model = loaded({**GOOD, "history": {"loss": [9.0], "old": [1.0]}, "val_epochs": {}, "val_parts": {}})
    loss, old = model.epoch_history["loss"], model.epoch_history["old"]
    model.on_load_checkpoint({"epoch_mixin": copy.deepcopy(GOOD)})
    assert saved(model) == GOOD
    assert model.epoch_history["loss"] is loss and old == []


def test_an_epoch_goes_on_with_the_sums_of_the_checkpoint():
    model = loaded(GOOD)
    model.training_step({"loss": 2.5, "kl": 2.0, "x": torch.ones(1)}, 0)
    model.on_train_epoch_end()
    assert model.epoch_history["loss"] == [0.5, math.inf, (1.5 + 2.5) / (3 + 1)]
    assert model.epoch_history["kl"] == [1.0, 2.0, (2.0 + 2.0) / (1 + 1)]
    assert model.epoch_history["val_loss"] == [0.75, 4.0 / 2]


@pytest.mark.parametrize(
    "parts", [["version"], ["ended"], ["last"], ["partners"], ["version", "ended", "last", "partners"]]
)
def test_records_of_older_versions_load(parts):
    record = {name: value for name, value in GOOD.items() if name not in parts}
    empty = {"version": 1, "ended": {"train": [], "val": []}, "last": {"mark": None, "totals": {}}, "partners": {}}
    assert saved(loaded(record)) == {**GOOD, **{name: empty[name] for name in parts}}


def test_a_record_of_version_0_2_has_a_list_of_partners_and_no_parts_of_epochs():
    old = {name: part for name, part in GOOD.items() if name != "val_parts"} | {"partners": {"loss": ["train_total"]}}
    read = saved(loaded(old))
    assert read.pop("val_parts") == {"val_loss": [pytest.approx(math.nan, nan_ok=True)]}
    assert read.pop("partners") == {"loss": {"train_total": True}}
    assert read == {name: GOOD[name] for name in read}


def test_names_are_plain_text_whatever_a_user_had_for_them():
    class Key(StrEnum):
        LOSS = "loss"

    model = loaded({**GOOD, "history": {Key.LOSS: [0.5], np.str_("kl"): [1.0]}, "val_epochs": {}})
    assert model.epoch_history == {"loss": [0.5], "kl": [1.0]}
    assert {type(name) for name in model.epoch_history} == {str}


def test_a_record_is_shared_neither_with_the_checkpoint_it_came_from_nor_with_the_one_it_goes_to():
    record = copy.deepcopy(GOOD)
    model, checkpoint = loaded(record), {}
    model.on_save_checkpoint(checkpoint)
    model.on_train_epoch_end()
    model.epoch_history["loss"].append(1.0)
    assert record == GOOD and saved(loaded(checkpoint["epoch_mixin"])) == GOOD


def test_any_mapping_is_loaded():
    assert loaded(OrderedDict(GOOD, history=OrderedDict(GOOD["history"]))).epoch_history == GOOD["history"]


NUMBERS = [np.float32(0.5), np.int64(2), True, Fraction(1, 2), torch.tensor(0.5), np.array(0.5), 3]


def test_only_plain_floats_are_loaded_and_saved():
    model, checkpoint = loaded(changed(["history", "kl"], NUMBERS)), {}
    model.epoch_history["mine"] = NUMBERS
    model.on_save_checkpoint(checkpoint)
    for values in (model.epoch_history["kl"], checkpoint["epoch_mixin"]["history"]["mine"]):
        assert values == [0.5, 2.0, 1.0, 0.5, 0.5, 0.5, 3.0]
        assert {type(value) for value in values} == {float}


@pytest.mark.parametrize(
    ("name", "mine"),
    [("mine", [0.1, None]), ("mine", None), ("mine", 3.0), ("mine", [torch.ones(2)]), ("mine", [[1.0]]), (3, [0.5])],
)
def test_what_is_no_list_of_numbers_is_left_out_of_a_checkpoint_with_a_warning(name, mine, recwarn):
    model = loaded(GOOD)
    model.epoch_history[name] = mine
    assert saved(model) == saved(model) == GOOD
    assert messages(recwarn, "Model") == [f"Model.epoch_history[{name!r}] is not saved, for it is no list of numbers"]


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_wrong_weight_does_not_make_a_checkpoint_unreadable(weight, recwarn):
    model = loaded(changed(["open", "train", "totals", "loss"], [1.0, weight]))
    (message,) = messages(recwarn, "Model")
    assert message.startswith("Model.epoch_loss_weight had returned a negative number, NaN or infinity when")
    model.on_train_epoch_end()
    assert math.isnan(model.epoch_losses[-1])
