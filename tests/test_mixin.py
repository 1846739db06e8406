import copy
import json
import math
import pickle
import re
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import pytorch_lightning as pl
import torch

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


def run(model, *batches):
    """One epoch of a plain loop."""
    model.on_train_epoch_start()
    for index, batch in enumerate(batches):
        model.training_step(batch, index)
    model.on_train_epoch_end()


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
    assert model.epoch_losses == [] and model.epoch_losses is model.epoch_history["loss"]
    run(model, torch.tensor(1.0))
    held = model.epoch_losses
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
    with pytest.raises(AttributeError):
        setattr(model, name, [])
    assert model.epoch_losses == [1.0]


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
        ({"Loss": 1.0, "acc": 2.0}, "only 'Loss', 'acc'"),
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
    for output in (None, "text", torch.ones(3), {"predictions": torch.ones(3)}, (1, 2), 3.0):
        model.validation_step(output)
    model.on_validation_epoch_end()
    assert model.epoch_history == {}
    assert messages(recwarn, "Given") == []


def test_named_losses_are_recorded_each_on_its_own():
    class Model(Given):
        epoch_loss_keys = ("g_loss", "d_loss")

    model = Model()
    model.validation_step({"d_loss": 7.0})
    model.on_validation_epoch_end()
    run(model, {"g_loss": 1.0, "d_loss": torch.tensor(10.0)}, {"g_loss": torch.tensor(3.0), "d_loss": None})
    assert model.epoch_history == {"g_loss": [2.0], "d_loss": [10.0], "val_d_loss": [7.0]}
    assert model.running_epoch_loss("g_loss").isnan()
    assert model.epoch_losses == []


@pytest.mark.parametrize("keys", ["loss", ["loss"], (), (1,), ("loss", None), None, {"loss"}])
def test_keys_that_are_no_tuple_of_strings_are_refused_at_class_creation(keys):
    with pytest.raises(TypeError, match=r"^Model\.epoch_loss_keys must be a tuple of strings .*, not ") as error:
        type("Model", (EpochLossMixin, Net), {"epoch_loss_keys": keys})
    assert repr(keys) in str(error.value)


@pytest.mark.parametrize("keys", [("loss", "loss"), ("loss", "val_loss"), ("val_kl", "kl")])
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


@pytest.mark.parametrize("weight", [-1, -0.5, math.nan, math.inf])
def test_a_weight_out_of_range_is_refused_at_once(weight):
    with pytest.raises(ValueError, match=r"^Weighed\.epoch_loss_weight must return a finite number not below zero"):
        Weighed().training_step((1.0, weight))


@pytest.mark.parametrize("weight", [None, "3", 1j, [3], torch.ones(2), torch.ones(0)])
def test_a_weight_that_is_no_number_is_refused_at_once(weight):
    with pytest.raises(TypeError, match=r"^Weighed\.epoch_loss_weight must return "):
        Weighed().training_step((1.0, weight))


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_tensor_out_of_range_is_refused_when_the_epoch_ends(weight):
    model = Weighed()
    model.on_train_epoch_start()
    for value in (5.0, weight, 5.0):
        model.training_step((1.0, torch.tensor(value)))
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
            twin = copy.deepcopy(self)
            Given.training_step(twin, torch.tensor(100.0))
            self.twin = [twin]  # in a list, or it would be a submodule
            return batch

    model = Model()
    run(model, torch.tensor(1.0))
    (twin,) = model.twin
    twin.on_train_epoch_end()
    assert model.epoch_losses == [1.0] and twin.epoch_losses == [100.0]


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
