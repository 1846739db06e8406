import copy
import decimal
import json
import math
import pickle
import re
from abc import ABC, abstractmethod
from collections import deque
from types import SimpleNamespace
from typing import Protocol
from unittest.mock import MagicMock

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, close, loader, mean, messages


class Given(EpochLossMixin, pl.LightningModule):
    """Returns the step outputs that it is given as batches; every step counts 1."""

    def training_step(self, batch, batch_idx=0):
        return batch

    def validation_step(self, batch, batch_idx=0):
        return batch

    def epoch_loss_weight(self, batch):
        return 1


class Weighed(EpochLossMixin, pl.LightningModule):
    """Takes batches of a loss and what `epoch_loss_weight` is to return."""

    def training_step(self, batch, batch_idx=0):
        return torch.tensor(batch[0])

    def epoch_loss_weight(self, batch):
        return batch[1]


class Logs(EpochLossMixin, pl.LightningModule):
    """Calls the functions that it is given as batches with itself, for them to log; every step counts 1."""

    def training_step(self, batch, batch_idx=0):
        return batch(self)

    def validation_step(self, batch, batch_idx=0):
        return batch(self)

    def epoch_loss_weight(self, batch):
        return 1


class Sized(EpochLossMixin, pl.LightningModule):
    """Returns 0 in the first step, 4 in the second, so that the mean tells what each of them counted."""

    def training_step(self, batch, batch_idx):
        return 4.0 * batch_idx


def run(model, *batches):
    """One epoch of a plain loop."""
    model.on_train_epoch_start()
    for index, batch in enumerate(batches):
        model.training_step(batch, index)
    model.on_train_epoch_end()


def validate(model, *batches):
    """One validation run of a plain loop."""
    model.on_validation_epoch_start()
    for index, batch in enumerate(batches):
        model.validation_step(batch, index)
    model.on_validation_epoch_end()


def test_a_plain_loop_records_exact_means():
    model = Tracked()
    optimizer = model.configure_optimizers()
    for _ in range(3):
        run_from = len(model.steps)
        model.on_train_epoch_start()
        for index, batch in enumerate(loader()):
            optimizer.zero_grad()
            model.training_step(batch, index).backward()
            optimizer.step()
        model.on_train_epoch_end()
        assert model.epoch_losses[-1] == close(mean(step[1:] for step in model.steps[run_from:]))
    assert len(model.epoch_losses) == 3


def test_the_start_hook_is_not_needed():
    model = Given()
    for _ in range(2):
        model.training_step(torch.tensor(1.0))
        model.training_step(torch.tensor(3.0))
        model.on_train_epoch_end()
    assert model.epoch_losses == [2.0, 2.0]


@pytest.mark.parametrize("call", [dict(batch=2.0, batch_idx=0), dict(batch_idx=0, batch=2.0)])
def test_steps_may_be_called_by_keyword(call):
    class Model(Given):
        def training_step(self, batch, batch_idx):
            return torch.tensor(batch)

        def epoch_loss_weight(self, batch):
            assert batch == 2.0
            return 1

    model = Model()
    model.training_step(**call)
    assert model.running_epoch_loss() == 2.0


def test_twenty_thousand_hard_losses_are_averaged_exactly():
    losses = torch.rand(20_000)
    losses[::2] *= 1e8
    model = Weighed()
    model.on_train_epoch_start()
    for index, loss in enumerate(losses.tolist()):
        model.training_step((loss, index % 31))
    model.on_train_epoch_end()
    assert model.epoch_losses == [close(mean((loss, index % 31) for index, loss in enumerate(losses.tolist())))]


def test_float64_losses_keep_their_precision():
    losses = (torch.rand(1000, dtype=torch.float64) + 1e6).tolist()
    model = Given()
    run(model, *(torch.tensor(loss, dtype=torch.float64) for loss in losses))
    assert model.epoch_losses == [close(mean((loss, 1) for loss in losses), rel=1e-12)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_show_in_their_epoch_and_in_no_other(bad):
    model = Given()
    run(model, torch.tensor(1.0), torch.tensor(bad), torch.tensor(2.0))
    run(model, torch.tensor(1.0))
    assert model.epoch_losses == pytest.approx([bad, 1.0], nan_ok=True)


def test_an_epoch_without_a_loss_is_nan_with_one_warning(recwarn):
    model = Given()
    for epoch in range(3):
        run(model, None, None)
    run(model, torch.tensor(1.0), None)
    assert model.epoch_losses == pytest.approx([math.nan, math.nan, math.nan, 1.0], nan_ok=True)
    (message,) = messages(recwarn, "Given")
    assert "epoch 0" in message and "nan" in message


def test_losses_are_the_history_at_loss_and_can_be_cleared():
    model = Given()
    held = model.epoch_losses
    assert held == [] and model.epoch_history == {}
    run(model, torch.tensor(1.0))
    run(model, torch.tensor(2.0))
    assert held == [1.0, 2.0] and held is model.epoch_losses is model.epoch_history["loss"]
    model.epoch_losses.clear()
    run(model, torch.tensor(3.0))
    assert held == [3.0]


def test_history_is_plain_data():
    model = Given()
    model.validation_step(torch.tensor(4.0))
    model.on_validation_epoch_end()
    run(model, torch.tensor(2.0))
    assert json.loads(json.dumps(model.epoch_history)) == {"loss": [2.0], "val_loss": [4.0]}
    assert all(type(value) is float for values in model.epoch_history.values() for value in values)


@pytest.mark.parametrize("name", ["epoch_losses", "epoch_history"])
def test_history_cannot_be_overwritten_by_accident(name):
    model = Given()
    run(model, torch.tensor(1.0))
    with pytest.raises(
        AttributeError, match=rf"^remove this line: `{name}` is kept by EpochLossMixin; `epoch_history.c"
    ):
        setattr(model, name, [])
    assert model.epoch_losses == [1.0]


def test_without_a_loss_among_the_keys_the_losses_are_those_of_the_first_key():
    class Model(Given):
        epoch_loss_keys = ("g_loss", "d_loss")

    model = Model()
    held = model.epoch_losses
    assert held == [] and model.running_epoch_loss().isnan() and model.epoch_history == {}
    model.training_step({"g_loss": 1.0, "d_loss": 2.0})
    assert model.running_epoch_loss() == 1.0 and model.running_epoch_loss("d_loss") == 2.0
    model.on_train_epoch_end()
    assert held is model.epoch_losses is model.epoch_history["g_loss"]
    assert model.epoch_history == {"g_loss": [1.0], "d_loss": [2.0]}
    with pytest.raises(ValueError, match=r"'loss' is not among Model\.epoch_loss_keys"):
        model.running_epoch_loss("loss")
    model.epoch_history.clear()
    assert model.epoch_losses == []
    run(model, {"g_loss": 3.0, "d_loss": 4.0})
    assert model.epoch_losses == [3.0]


def test_records_are_rows_of_plain_data():
    model = Given()
    assert model.epoch_records() == []
    for epoch in range(3):
        run(model, torch.tensor(float(epoch)))
        if epoch == 1:
            validate(model, torch.tensor(7.0))
    validate(model, torch.tensor(8.0))
    rows = [{"epoch": 0, "loss": 0.0}, {"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 2.0, "val_loss": 7.0}]
    assert json.loads(json.dumps(model.epoch_records())) == rows


def test_two_models_share_nothing():
    one, other = Given(), Given()
    run(one, torch.tensor(1.0))
    assert other.epoch_losses == [] and one.epoch_losses == [1.0]


def test_running_loss_before_during_and_after_an_epoch():
    model = Given()
    assert model.running_epoch_loss().isnan()
    model.on_train_epoch_start()
    assert model.running_epoch_loss().isnan()
    for loss, expected in [(1.0, 1.0), (2.0, 1.5), (6.0, 3.0)]:
        model.training_step(torch.tensor(loss, requires_grad=True))
        running = model.running_epoch_loss()
        assert running == expected
        assert running.shape == () and running.dtype == torch.float64 and not running.requires_grad
    model.on_train_epoch_end()
    assert model.running_epoch_loss().isnan()


def test_running_loss_inside_the_step_is_that_of_the_steps_before():
    class Model(Given):
        def training_step(self, batch, batch_idx=0):
            self.seen.append(self.running_epoch_loss().item())
            return batch

    model = Model()
    model.seen = []
    run(model, torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0))
    assert model.seen == pytest.approx([math.nan, 1.0, 1.5], nan_ok=True)


def test_validation_does_not_touch_the_running_loss():
    model = Given()
    model.training_step(torch.tensor(1.0))
    model.validation_step(torch.tensor(5.0))
    assert model.running_epoch_loss() == 1.0


def test_running_loss_of_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match=r"'kl' is not among Given\.epoch_loss_keys = \('loss',\)"):
        Given().running_epoch_loss("kl")


def test_loss_memory_may_be_written_again():
    model = Given()
    loss = torch.tensor(1.0)
    for value in (1.0, 2.0, 3.0):
        model.training_step(loss.fill_(value))
    loss.zero_()
    model.on_train_epoch_end()
    assert model.epoch_losses == [2.0]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (torch.ones(3), r"a Tensor of shape \(3,\)"),
        ("low", "a str"),
        ((torch.ones(()),), "a tuple"),
        ({"lost": 1.0, "acc": 2.0}, "only 'lost', 'acc'"),
        ({"loss": "low"}, "a str"),
        ({"loss": torch.tensor(1j)}, "Tensor"),
        ({"loss": 1j}, "a complex"),
        ({}, "an empty dict"),
    ],
)
def test_what_cannot_be_recorded_is_warned_of_once(output, reason, recwarn):
    model = Given()
    run(model, output, torch.tensor(2.0), output)
    run(model, output, torch.tensor(3.0))
    assert model.epoch_losses == [2.0, 3.0]
    (message,) = messages(recwarn, "Given")
    assert message.startswith("Given.training_step: no 'loss' is recorded")
    assert re.search(reason, message)


def test_every_missing_key_is_warned_of_once_and_the_others_are_recorded(recwarn):
    class Model(Given):
        epoch_loss_keys = ("loss", "kl", "rec")

    model = Model()
    run(model, *[{"loss": 1.0, "k1": 2.0, "rek": 3.0}] * 3)
    assert model.epoch_losses == [1.0]
    warned = [text for text in messages(recwarn, "Model") if "training_step" in text]
    assert len(warned) == 2
    for text, key in zip(warned, ("kl", "rec")):
        assert repr(key) in text and "'loss', 'k1', 'rek'" in text


def test_validation_outputs_that_hold_no_loss_pass_in_silence(recwarn):
    model = Given()
    for output in (None, "text", torch.ones(3), torch.ones(1), {"predictions": torch.ones(3)}, (1, 2)):
        model.validation_step(output)
    model.on_validation_epoch_end()
    assert model.epoch_history == {}
    assert messages(recwarn, "Given") == []


@pytest.mark.parametrize("number", [5, 5.0, np.float32(5), torch.tensor(5)])
def test_a_bare_number_counts_like_a_tensor(number):
    model = Given()
    validate(model, number, 7.0)
    run(model, number, 9.0)
    assert model.epoch_history == {"loss": [7.0], "val_loss": [6.0]}


@pytest.mark.parametrize("name", ["loss", "val_loss", "val/loss", "valid_loss", "validation_loss"])
def test_validation_may_return_its_loss_under_the_name_of_the_curve(name):
    model = Given()
    validate(model, {name: torch.tensor(3.0)}, {name: 5.0, "acc": 0.0})
    assert model.epoch_history == {"val_loss": [4.0]}


def test_named_losses_are_recorded_each_on_its_own():
    class Model(Given):
        epoch_loss_keys = ("g_loss", "d_loss")

    model = Model()
    model.validation_step({"d_loss": 7.0})
    model.on_validation_epoch_end()
    run(model, {"g_loss": 1.0, "d_loss": torch.tensor(10.0)}, {"g_loss": torch.tensor(3.0), "d_loss": None})
    assert model.epoch_history == {"g_loss": [2.0], "d_loss": [10.0], "val_d_loss": [7.0]}
    assert model.running_epoch_loss("g_loss").isnan()
    assert model.epoch_losses == [2.0]


@pytest.mark.parametrize("keys", ["loss", ["loss"], (), (1,), ("loss", None), None, {"loss"}])
def test_keys_that_are_no_tuple_of_strings_are_refused_at_class_creation(keys):
    with pytest.raises(TypeError, match=r"^Model\.epoch_loss_keys must be a tuple of strings .*, not ") as error:
        type("Model", (EpochLossMixin, Net), {"epoch_loss_keys": keys})
    assert repr(keys) in str(error.value)


@pytest.mark.parametrize("keys", [("loss", "loss"), ("kl", "loss", "kl")])
def test_keys_that_would_share_a_list_are_refused_at_class_creation(keys):
    with pytest.raises(ValueError, match=r"^Model\.epoch_loss_keys has keys that share a name") as error:
        type("Model", (EpochLossMixin, Net), {"epoch_loss_keys": keys})
    assert repr(keys) in str(error.value)


def test_keys_may_be_set_on_the_instance():
    class Model(Given):
        def __init__(self, keys):
            super().__init__()
            self.epoch_loss_keys = keys

    model = Model(("loss", "kl"))
    run(model, {"loss": 1.0, "kl": 2.0})
    assert model.epoch_history == {"loss": [1.0], "kl": [2.0]}
    with pytest.raises(TypeError, match=r"^Model\.epoch_loss_keys must be a tuple of strings"):
        run(Model("loss"), {"loss": 1.0})
    with pytest.raises(ValueError, match=r"^Model\.epoch_loss_keys has keys that share a name"):
        run(Model(("loss", "loss")), {"loss": 1.0})
    with pytest.raises(ValueError, match=r'^Model\.epoch_loss_keys = .* has a stage in it: write \("loss",\)'):
        run(Model(("loss", "val_loss")), {"loss": 1.0})


class Broken:
    """Raises when it is looked into."""

    def __iter__(self):
        raise RuntimeError("not now")


def endless():
    batch = [None]
    batch.append(batch)
    return batch


@pytest.mark.parametrize("batch", ["text", None, 3, [], {}, object(), Broken(), endless()])
def test_a_batch_without_a_size_counts_1_with_one_warning(batch, recwarn):
    class Model(Given):
        epoch_loss_weight = EpochLossMixin.epoch_loss_weight

        def training_step(self, batch, loss):
            return torch.tensor(loss)

    model = Model()
    for loss in (1.0, 2.0, 6.0):
        model.training_step(batch, loss)
    model.training_step(torch.ones(3), 3.0)
    model.on_train_epoch_end()
    assert model.epoch_losses == [3.0]
    (message,) = messages(recwarn, "Model")
    assert "epoch_loss_weight" in message and type(batch).__name__ in message


def test_a_generator_as_batch_is_not_consumed():
    class Model(Given):
        epoch_loss_weight = EpochLossMixin.epoch_loss_weight

        def training_step(self, batch, batch_idx=0):
            return torch.tensor(3.0)

    batch = (torch.ones(2) for _ in range(4))
    with pytest.warns(UserWarning, match=r"found no tensor in a generator.* override `epoch_loss_weight`"):
        Model().training_step(batch)
    assert len(list(batch)) == 4


@pytest.mark.parametrize("weigh", [None, lambda self, batch: len(batch["labels"])])
def test_the_weight_is_that_of_the_batch_as_it_was_given(weigh):
    class Model(EpochLossMixin, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            labels, _ = batch.pop("labels"), batch.popitem()
            batch["other"] = torch.ones(99)
            return labels.mean()

        if weigh:
            epoch_loss_weight = weigh

    model = Model()
    run(model, *({"x": torch.ones(n, 2), "labels": torch.full((n,), 4.0 * (n == 3))} for n in (1, 3)))
    assert model.epoch_losses == [3.0]


@pytest.mark.parametrize("name", ["loss", "train_loss"])
@pytest.mark.parametrize("size", [int, np.int64, torch.tensor])
def test_the_batch_size_that_a_step_logs_with_its_loss_is_its_weight(name, size):
    class Model(Sized):
        def training_step(self, batch, batch_idx):
            self.log("other", 1.0)
            self.log(name, 1.0, batch_size=size(batch_idx * 2 + 1))
            return super().training_step(batch, batch_idx)

    model = Model()
    run(model, torch.ones(7), torch.ones(7))
    assert model.epoch_losses == [3.0]


def test_the_batch_size_that_a_step_logs_with_another_value_counts_where_the_tensors_disagree(recwarn):
    class Model(Sized):
        def training_step(self, batch, batch_idx):
            self.log("acc", 1.0, batch_size=batch_idx * 2 + 1)
            return super().training_step(batch, batch_idx)

    agreeing, disagreeing = Model(), Model()
    run(agreeing, *[(torch.ones(7), torch.ones(7, 2))] * 2)
    run(disagreeing, *[(torch.ones(2, 9), torch.ones(7))] * 2)
    assert agreeing.epoch_losses == [2.0]
    assert disagreeing.epoch_losses == [3.0]
    assert messages(recwarn, "Model") == []


def test_the_batch_size_logged_with_the_loss_comes_before_any_other():
    class Model(EpochLossMixin, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            self.log("acc", 1.0, batch_size=50)
            self.log("loss", 100.0, batch_size=70)
            self.log("train_loss", 4.0 * batch_idx, batch_size=batch_idx * 2 + 1)
            self.log_dict({"f1": 1.0}, batch_size=60)

    model = Model()
    run(model, torch.ones(7), torch.ones(7))
    assert model.epoch_losses == [3.0]


def test_an_overridden_weight_comes_before_the_batch_size_that_a_step_logs():
    model = Logs()
    run(model, *(lambda self, n=n: self.log("train_loss", float(n), batch_size=n) for n in (1, 3)))
    assert model.epoch_losses == [2.0]


def test_a_batch_size_that_no_weight_can_be_is_not_taken():
    class Model(Sized):
        def training_step(self, batch, batch_idx):
            self.log("acc", 1.0, batch_size="all")
            return super().training_step(batch, batch_idx)

    model = Model()
    run(model, torch.ones(1), torch.ones(3))
    assert model.epoch_losses == [3.0]


def test_a_batch_is_looked_through_whole_once():
    class Batch(deque):
        """Notes when it is asked for more than its first item."""

        looks = 0

        def __iter__(self):
            yield self[0]
            Batch.looks += 1
            yield self[1]

    class Model(EpochLossMixin, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return batch[0].sum()

    model = Model()
    for batch_idx in range(5):
        model.training_step(Batch([torch.ones(2), torch.ones(2)]), batch_idx)
    assert Batch.looks == 1


def test_tensors_that_disagree_about_the_batch_size_are_warned_of_once(recwarn):
    model = Sized()
    for _ in range(2):
        run(model, {"edge_index": torch.ones(2, 9), "x": torch.ones(5)}, {"edge_index": torch.ones(6, 9)})
    assert model.epoch_losses == [3.0, 3.0]
    (message,) = messages(recwarn, "Sized")
    assert message.startswith("Sized.training_step: the tensors of its batch disagree about the batch size: 2, 5.")
    assert "self.log(..., batch_size=...)" in message and "epoch_loss_weight" in message


@pytest.mark.parametrize("said", ["batch size", "weight"])
def test_who_says_the_weight_is_not_told_that_tensors_disagree(said, recwarn):
    class Model(Sized):
        def training_step(self, batch, batch_idx):
            if said == "batch size":
                self.log("acc", 1.0, batch_size=1)
            return 4.0 * batch_idx

        if said == "weight":

            def epoch_loss_weight(self, batch):
                return 1

    model = Model()
    run(model, *[(torch.ones(2), torch.ones(5))] * 2)
    assert model.epoch_losses == [2.0]
    assert messages(recwarn, "Model") == []


def test_default_weight_is_the_batch_size():
    assert Tracked().epoch_loss_weight((torch.ones(7, 2), torch.ones(3))) == 7


@pytest.mark.parametrize(
    "weights",
    [
        (3, 1),
        (0.75, 0.25),
        (torch.tensor(3), torch.tensor(1)),
        (torch.tensor(0.75), 0.25),
        (torch.tensor([3.0]), torch.tensor([[1.0]])),
        (torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(1, dtype=torch.uint8)),
        (True, torch.tensor(1 / 3, dtype=torch.float64)),
    ],
)
def test_weights_may_be_numbers_or_tensors(weights):
    model = Weighed()
    run(model, (1.0, weights[0]), (5.0, weights[1]))
    assert model.epoch_losses == [close(2.0, rel=1e-15)]


def test_a_weight_of_zero_leaves_the_step_out():
    model = Weighed()
    run(model, (1.0, 2), (100.0, 0))
    assert model.epoch_losses == [1.0]


def test_weighing_by_tokens():
    class Model(EpochLossMixin, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return batch["losses"][batch["mask"]].mean()

        def epoch_loss_weight(self, batch):
            return batch["mask"].sum()

    batches = [dict(losses=torch.rand(4, 6), mask=torch.rand(4, 6) > chance) for chance in (0.2, 0.5, 0.8)]
    model = Model()
    run(model, *batches)
    pairs = [(batch["losses"][batch["mask"]].mean().item(), batch["mask"].sum().item()) for batch in batches]
    assert model.epoch_losses == [close(mean(pairs))]


@pytest.mark.parametrize("weight", [-1, -0.5, math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_weight_out_of_range_is_refused_at_once(weight):
    with pytest.raises(ValueError, match=r"^Weighed\.epoch_loss_weight must return a finite number not below zero"):
        Weighed().training_step((1.0, weight))


@pytest.mark.parametrize(
    "weight",
    [
        None,
        "3",
        1j,
        [3],
        decimal.Decimal(3),
        torch.ones(2),
        torch.ones(0),
        torch.tensor(1j),
        torch.ones((), device="meta"),
    ],
)
def test_a_weight_that_is_no_number_is_refused_at_once(weight):
    with pytest.raises(TypeError, match=r"^Weighed\.epoch_loss_weight must return "):
        Weighed().training_step((1.0, weight))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", [torch.float32, torch.float64, None])
def test_a_weight_tensor_out_of_range_is_refused_when_the_epoch_ends(weight, others):
    other = 5.0 if others is None else torch.tensor(5.0, dtype=others)
    model = Weighed()
    model.on_train_epoch_start()
    for value in (other, torch.tensor(weight), other):
        model.training_step((1.0, value))
    with pytest.raises(ValueError, match=r"^Weighed\.epoch_loss_weight returned a negative number, NaN or infinity"):
        model.on_train_epoch_end()


def test_an_error_in_the_users_weight_is_not_hidden():
    class Model(Given):
        def epoch_loss_weight(self, batch):
            return batch["mask"].sum()

    with pytest.raises(KeyError):
        Model().training_step({"loss": 1.0})


@pytest.mark.parametrize(
    "trainer",
    [MagicMock(), MagicMock(spec=pl.Trainer), SimpleNamespace(current_epoch=3)],
    ids=["MagicMock", "MagicMock(spec)", "SimpleNamespace"],
)
def test_a_mock_may_stand_in_for_the_trainer(trainer):
    model = Given()
    model.trainer = trainer
    run(model, torch.tensor(1.0), torch.tensor(3.0))
    model.validation_step(torch.tensor(5.0))
    model.on_validation_epoch_end()
    assert model.epoch_history == {"loss": [2.0], "val_loss": [5.0]}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_clone_made_in_mid_epoch_goes_on_by_itself(clone):
    model = Given()
    run(model, torch.tensor(8.0))
    model.on_train_epoch_start()
    model.training_step(torch.tensor(1.0))
    twin = clone(model)
    twin.training_step(torch.tensor(3.0))
    twin.on_train_epoch_end()
    model.training_step(torch.tensor(9.0))
    model.on_train_epoch_end()
    assert twin.epoch_losses == [8.0, 2.0]
    assert model.epoch_losses == [8.0, 5.0]


def test_a_deepcopy_made_inside_a_step_records_its_own_steps():
    class Model(Given):
        def training_step(self, batch, batch_idx=0):
            if batch < 100:
                self.twin = [copy.deepcopy(self)]  # in a list, or it would be a submodule
                self.twin[0].training_step(torch.tensor(100.0))
            return batch

    model = Model()
    run(model, torch.tensor(1.0))
    (twin,) = model.twin
    twin.on_train_epoch_end()
    assert model.epoch_losses == [1.0] and twin.epoch_losses == [100.0]


def logging_steps(name):
    return [
        lambda self: self.log(name, torch.tensor(1.0, requires_grad=True)),
        lambda self: self.log(name, 2.0),
        lambda self: self.log(value=np.float32(3), name=name),
        lambda self: self.log_dict({name: np.int64(4), "acc": 9.0}),
        lambda self: self.log_dict(batch_size=3, dictionary={"acc": 9.0, name: torch.tensor([5])}),
    ]


@pytest.mark.parametrize("name", ["train_loss", "train/loss", "training_loss", "training/loss", "loss"])
def test_what_a_training_step_logs_is_recorded(name):
    model = Logs()
    run(model, *logging_steps(name))
    assert model.epoch_history == {"loss": [3.0]}


@pytest.mark.parametrize(
    "name", ["val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss", "loss"]
)
def test_what_a_validation_step_logs_is_recorded(name):
    model = Logs()
    validate(model, *logging_steps(name))
    assert model.epoch_history == {"val_loss": [3.0]}


def test_what_is_returned_comes_before_what_is_logged_and_each_log_counts():
    def step(self):
        self.log("train_loss", 100.0)
        self.log("train_kl", 3.0)
        self.log("train_kl", 5.0)
        return torch.tensor(1.0)

    model = Logs()
    model.epoch_loss_keys = ("loss", "kl")
    run(model, step, step, lambda self: self.log_dict({"train_loss": 4.0, "kl": 8.0}))
    assert model.epoch_history == {"loss": [2.0], "kl": [(3 + 5 + 3 + 5 + 8) / 5]}


def test_other_names_and_other_stages_are_no_losses(recwarn):
    model = Logs()
    validate(model, lambda self: self.log_dict({"train_loss": 1.0, "val_los": 1.0, "my_val_loss": 1.0}))
    run(model, lambda self: self.log("val_loss", 1.0))
    assert model.epoch_history == {"loss": [pytest.approx(math.nan, nan_ok=True)]}
    (message,) = messages(recwarn, "Logs")
    assert "it returned None and logged 'val_loss'" in message


def test_what_is_logged_outside_a_step_is_not_recorded():
    class Model(Logs):
        def on_train_epoch_end(self):
            self.log("train_loss", 100.0)

    model = Model()
    model.log("train_loss", 100.0)
    for _ in range(2):
        run(model, lambda self: self.log("train_loss", 1.0))
    assert model.epoch_losses == [1.0, 1.0]


def test_a_metric_that_the_step_called_counts_with_the_value_of_that_call():
    class Model(Logs):
        def __init__(self):
            super().__init__()
            self.val_loss = torchmetrics.MeanMetric()
            self.others = torchmetrics.MetricCollection({"kl": torchmetrics.MeanMetric()}, prefix="val_")

    def step(self):
        self.val_loss(next(losses))
        self.others(8.0)
        self.log("val_loss", self.val_loss)
        self.log_dict(self.others)

    model, losses = Model(), iter([1.0, 2.0, 6.0])
    model.epoch_loss_keys = ("loss", "kl")
    validate(model, step, step, step)
    assert model.epoch_history == {"val_loss": [3.0], "val_kl": [8.0]}


def test_a_metric_that_was_only_updated_is_left_alone():
    def step(self):
        metric.update(5.0)
        self.log("val_loss", metric)

    metric, model = torchmetrics.MeanMetric(), Logs()
    validate(model, step, step)
    assert model.epoch_history == {}
    assert metric.compute() == 5.0


@pytest.mark.parametrize("words", [(), ("a message",), (["a", "list"], 3.0), ({}, 1, 2), ({1: 2.0, "a": 3.0},)])
def test_a_log_of_the_users_own_may_take_what_it_likes(words):
    class Model(Logs):
        def log(self, *words):
            self.said = words

    model = Model()
    run(model, lambda self: self.log(*words) or 1.0)
    assert model.said == words
    assert model.epoch_losses == [1.0]


@pytest.mark.parametrize("by_keyword", [False, True])
def test_several_dataloaders_without_a_trainer_have_a_curve_each(by_keyword):
    class Model(Weighed):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return batch[0]

    model = Model()
    for losses in ([(0, 1.0, 3), (0, 5.0, 1), (1, 8.0, 4)], [(1, 6.0, 1), (0, 2.0, 3)]):
        for idx, loss, weight in losses:
            args, kwargs = ((), {"dataloader_idx": idx}) if by_keyword else ((idx,), {})
            model.validation_step((loss, weight), 0, *args, **kwargs)
        model.on_validation_epoch_end()
    assert model.epoch_history == {
        "val_loss": [5.0, 3.0],
        "val_loss/dataloader_idx_0": [2.0, 2.0],
        "val_loss/dataloader_idx_1": [8.0, 6.0],
    }


def test_one_dataloader_has_no_curve_beside_the_pooled_one():
    class Model(Given):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return batch

    model = Model()
    validate(model, 1.0, 3.0)
    assert model.epoch_history == {"val_loss": [2.0]}


class Wilful(torch.Tensor):
    """Wants nothing done to it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"no {func.__name__}")


@pytest.mark.parametrize(
    "loss",
    [
        lambda: torch.tensor(3.0).as_subclass(Wilful),
        lambda: torch.tensor([3.0]).to_sparse(),
        lambda: torch.tensor(3.0).to_sparse(),
        lambda: torch.nn.Parameter(torch.tensor(3.0)),
    ],
    ids=["subclass", "sparse vector", "sparse", "parameter"],
)
def test_unusual_losses_are_recorded_beside_usual_ones(loss):
    model = Given()
    run(model, torch.tensor(1.0), loss(), loss())
    run(model, loss(), torch.tensor(1.0))
    assert model.epoch_losses == [close(7 / 3), 2.0]


def test_a_loss_on_the_meta_device_is_left_out_and_warned_of_at_once():
    model = Given()
    with pytest.warns(UserWarning, match=r"^Given\.training_step: no 'loss' is recorded.* without values"):
        model.training_step(torch.ones((), device="meta"))
    run(model, torch.ones((), device="meta"), torch.tensor(3.0))
    assert model.epoch_losses == [3.0]


def test_a_step_under_vmap_goes_on_and_leaves_nothing_behind():
    class Model(Given):
        def training_step(self, batch, batch_idx=0):
            return batch.sum()

    model = Model()
    with pytest.warns(UserWarning, match=r"^Model\.training_step: no .loss. is recorded.* a transform"):
        assert torch.vmap(model.training_step)(torch.ones(4, 3)).tolist() == [3.0] * 4
    run(model, torch.ones(5))
    assert model.epoch_losses == [5.0]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("epoch_loss_key", "epoch_loss_keys"),
        ("epoch_losses_keys", "epoch_loss_keys"),
        ("epoch_loss_weigth", "epoch_loss_weight"),
        ("epoch_loss_weights", "epoch_loss_weight"),
    ],
)
def test_a_misspelt_name_is_warned_of_at_class_creation(name, meant):
    message = rf"^Model\.{name} means nothing to EpochLossMixin; did you mean {meant}\?$"
    with pytest.warns(UserWarning, match=message):
        type("Model", (EpochLossMixin, Net), {name: ("loss",)})


def test_names_of_the_users_own_are_let_be(recwarn):
    type("Model", (EpochLossMixin, Net), {"epoch_loss": 1, "epoch": 2, "loss_weight": 3, "epoch_loss_keys": ("kl",)})
    assert messages(recwarn, "Model") == []


@pytest.mark.parametrize("weight", [3.0, None, torch.ones(2)])
def test_a_weight_that_is_no_method_is_refused_at_class_creation(weight):
    with pytest.raises(TypeError, match=r"^Model\.epoch_loss_weight must be a method that takes a batch, not "):
        type("Model", (EpochLossMixin, Net), {"epoch_loss_weight": weight})


def test_a_module_that_is_not_lightnings_is_refused_at_class_creation():
    with pytest.raises(
        TypeError, match=r"^Model is no LightningModule: write `class Model\(EpochLossMixin, pl\.Lightn"
    ):
        type("Model", (EpochLossMixin, torch.nn.Linear), {})


def test_a_class_that_is_no_module_may_be_a_base_and_is_refused_when_used():
    class Base(EpochLossMixin):
        epoch_loss_keys = ("loss",)

    with pytest.raises(TypeError, match=r"^Base is no LightningModule"):
        print(Base().epoch_history)
    assert type("Model", (Base, Net), {})().epoch_losses == []


@pytest.mark.parametrize("step", ["validation_step", "test_step", "predict_step"])
def test_a_step_that_calls_the_training_step_leaves_the_training_mean_alone(step):
    model = type("Model", (Given,), {step: lambda self, batch: self.training_step(batch)})()
    model.training_step(torch.tensor(1.0))
    assert getattr(model, step)(torch.tensor(100.0)) == 100.0
    model.on_validation_epoch_end()
    model.on_train_epoch_end()
    assert model.epoch_losses == [1.0]
    assert model.epoch_history.get("val_loss", []) == ([100.0] if step == "validation_step" else [])


def test_a_step_that_raised_leaves_the_next_ones_recorded():
    class Model(Given):
        def training_step(self, batch, batch_idx=0):
            return batch / 1

    model = Model()
    with pytest.raises(TypeError):
        model.training_step("text")
    run(model, torch.tensor(1.0))
    assert model.epoch_losses == [1.0]


def test_steps_in_inference_mode_and_out_of_it_add_up():
    model = Given()
    with torch.inference_mode():
        model.training_step(torch.tensor(1.0))
        model.running_epoch_loss()
    model.training_step(torch.tensor(3.0))
    model.on_train_epoch_end()
    assert model.epoch_losses == [2.0]


def test_no_training_step_is_no_matter_without_a_trainer():
    class Empty(EpochLossMixin, pl.LightningModule):
        pass

    assert Empty().epoch_losses == []


@pytest.mark.parametrize("setting", [{"epoch_loss_keys": ("kl",)}, {"epoch_loss_weight": lambda self, batch: 2}])
def test_a_setting_in_a_base_behind_the_mixin_is_refused(setting):
    base = type("Base", (Net,), setting)
    (name,) = setting
    with pytest.raises(TypeError, match=rf"^EpochLossMixin hides Base\.{name}, which is behind it; set it in Model"):
        type("Model", (EpochLossMixin, base), {})
    type("Model", (EpochLossMixin, base), setting)


def test_a_setting_behind_the_mixin_that_hides_nothing_is_let_be():
    class Declares(Protocol):
        epoch_loss_keys: tuple[str, ...] = ()

        def epoch_loss_weight(self, batch): ...

    class Abstract(ABC):
        @abstractmethod
        def epoch_loss_weight(self, batch): ...

    same = {"epoch_loss_keys": ("loss",), "epoch_loss_weight": EpochLossMixin.epoch_loss_weight}
    other = {"epoch_loss_keys": ("kl",), "epoch_loss_weight": lambda self, batch: 2}
    meta = type(Declares)
    for base in (Declares, Abstract, type("Same", (), same)):
        meta("Model", (EpochLossMixin, Net, base), {})
    meta("Model", (EpochLossMixin, Net, type("Other", (), other)), same)


@pytest.mark.parametrize("self", [MagicMock(spec=Given), SimpleNamespace()], ids=["mock", "namespace"])
def test_a_step_of_a_mock_is_what_it_is(self):
    for step in (Given.training_step, Given.validation_step):
        assert step(self, 3) == 3
