"""A validation loss that only ``on_validation_epoch_end`` logs, as in Lightning's 2.0 migration guide."""

import math
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torchmetrics import MeanMetric

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, close, epoch_means, fit, loader, messages, trainer
from tests.lightning.processes import run_ranks

VAL = dict(samples=11, batch_size=4)


class Outputs(EpochLossMixin, Net):
    """Its steps only keep their losses. ``ends`` are the means that the end of each validation logged."""

    def __init__(self):
        super().__init__()
        self.outputs, self.ends = [], []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.outputs.append(self.loss(batch))

    def mean_of_outputs(self):
        mean = torch.stack(self.outputs).mean()
        self.outputs.clear()
        if self._trainer is None or not self.trainer.sanity_checking:
            self.ends.append(mean.item())
        return mean

    def on_validation_epoch_end(self):
        self.log_end(self.mean_of_outputs())

    def log_end(self, mean):
        self.log("val_loss", mean)


def assert_as_it_stands(model):
    assert model.epoch_history == {"loss": close(epoch_means(model.steps)), "val_loss": model.ends}


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        (dict(), 2),
        (dict(num_sanity_val_steps=0), 2),
        (dict(check_val_every_n_epoch=2, max_epochs=5), 2),
        (dict(val_check_interval=0.5), 4),
        (dict(val_check_interval=2), 4),
        (dict(val_check_interval=4, check_val_every_n_epoch=None, max_epochs=4), 5),
        (dict(limit_val_batches=1), 2),
        (dict(precision="bf16-true"), 2),
    ],
    ids=str,
)
def test_the_logged_value_counts_as_it_stands_once_for_each_validation(options, validations, recwarn):
    model = Outputs()
    fit(model, loader(), loader(**VAL), **options)
    assert len(model.ends) == validations
    assert_as_it_stands(model)
    assert messages(recwarn, "Outputs") == []


def logged_metric(module, value):
    metric = MeanMetric()
    metric.update(value)
    module.log("val/loss", metric.compute())


WAYS = {
    "log_dict": lambda module, value: module.log_dict({"val_acc": 0.5, "val_loss": value}),
    "number": lambda module, value: module.log("val_loss", value.item(), prog_bar=True),
    "numpy": lambda module, value: module.log("val_loss", np.float32(value.item())),
    "one element": lambda module, value: module.log("val_loss", value.reshape(1)),
    "computed metric": logged_metric,
    "another name": lambda module, value: module.log_dict({"val_best": -1e6, "avg_val_loss": value}),
    "the closest name": lambda module, value: module.log_dict({"avg_val_loss": -1e6, "val_loss": value}),
    "batch size": lambda module, value: module.log("val_loss", value, batch_size=7),
    "batch size of 0": lambda module, value: module.log("val_loss", value, batch_size=0),
    "sync_dist": lambda module, value: module.log("val_loss", value, sync_dist=True, rank_zero_only=True),
}


@pytest.mark.parametrize("log_end", WAYS.values(), ids=WAYS)
def test_ways_to_log_at_the_end(log_end, recwarn):
    model = type("Model", (Outputs,), {"log_end": log_end})()
    fit(model, loader(), loader(**VAL))
    assert_as_it_stands(model)
    assert messages(recwarn, "Model") == []


def test_the_partner_comes_first_at_the_end_too():
    class Model(Outputs):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("ptl/train_loss", loss)
            return loss

        def log_end(self, mean):
            self.log_dict({"val_loss": -1e6, "ptl/val_loss": mean, "ptl/val_accuracy": 0.5})

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert_as_it_stands(model)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_calls_super_counts_once(before, recwarn):
    class Model(Outputs):
        def on_validation_epoch_end(self):
            if before:
                super().on_validation_epoch_end()
            self.log("val_acc", 0.5)
            if not before:
                super().on_validation_epoch_end()

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert_as_it_stands(model)
    assert messages(recwarn, "Model") == []


@pytest.mark.parametrize("way", ["called", "updated"])
def test_a_metric_that_is_logged_at_the_end_counts_with_its_value_of_all_steps(way):
    class Model(Tracked):
        def __init__(self):
            super().__init__()
            self.val_loss = MeanMetric()

        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            self.val_loss(loss) if way == "called" else self.val_loss.update(loss)

        def on_validation_epoch_end(self):
            self.log("val/loss", self.val_loss)

    model = Model()
    runner = fit(model, loader(), loader(**VAL), max_epochs=3)
    alike = [(epoch, loss, 1) for epoch, loss, _ in model.val_steps]
    assert model.epoch_history["val_loss"] == close(epoch_means(alike), rel=1e-6)  # the metric has float32 sums
    assert runner.callback_metrics["val/loss"].item() == model.epoch_history["val_loss"][-1]


def test_several_dataloaders_have_the_one_curve_that_is_logged():
    model = Outputs()
    fit(model, loader(), [loader(**VAL), loader(6), loader(1)])
    assert_as_it_stands(model)


def test_a_further_key_that_only_the_end_logs_while_the_steps_give_the_loss(recwarn):
    class Model(Tracked):
        epoch_loss_keys = ("loss", "rmse")

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_rmse", loss.sqrt())
            return loss

        def on_validation_epoch_end(self):
            self.seen = [*getattr(self, "seen", []), list(self.epoch_history.get("val_loss", []))]
            self.log_dict({"val_loss": -1e6, "val_rmse": float(len(self.seen))})

    model = Model()
    fit(model, loader(), [loader(**VAL), loader(6)])
    losses = model.epoch_history["val_loss"]
    assert losses == close(epoch_means(model.val_steps))
    assert model.seen == [[], losses[:1], losses]  # the first is the sanity check
    assert model.epoch_history["val_rmse"] == [2.0, 3.0]
    assert "val_rmse/dataloader_idx_0" not in model.epoch_history and len(model.epoch_history["rmse"]) == 2
    assert messages(recwarn, "Model") == []


@pytest.mark.parametrize("given", [(), (1,), (0, 1, 2)], ids=["no step", "one step", "every step"])
def test_steps_come_before_the_end_of_their_validation(given):
    class Model(Outputs):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return Net.validation_step(self, batch, batch_idx) if batch_idx in given else None

    model = Model()
    fit(model, loader(), loader(**VAL))
    expected = close(epoch_means(model.val_steps)) if given else model.ends
    assert model.epoch_history["val_loss"] == expected


def test_some_validations_may_give_their_loss_in_steps_and_others_at_the_end(recwarn):
    class Model(Outputs):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return Net.validation_step(self, batch, batch_idx) if self.current_epoch % 2 else None

        def on_validation_epoch_end(self):
            mean = self.mean_of_outputs()
            if self.current_epoch != 2:
                self.log("val_loss", mean)

    model = Model()
    fit(model, loader(), loader(**VAL), max_epochs=4)
    second, fourth = epoch_means(model.val_steps)
    assert model.epoch_history["val_loss"] == [model.ends[0], close(second), close(fourth)]
    assert [row.get("val_loss") for row in model.epoch_records()] == [model.ends[0], close(second), None, close(fourth)]
    (message,) = messages(recwarn, "Model")  # of the third epoch
    assert message.startswith("Model: no step of a validation gave a loss: validation_step returned None;")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_shown(bad):
    model = type("Model", (Outputs,), {"log_end": lambda module, mean: module.log("val_loss", mean * bad)})()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history["val_loss"] == pytest.approx([bad] * 2, nan_ok=True)


def test_the_value_is_there_when_callbacks_are_told_that_validation_has_ended():
    class Reader(pl.Callback):
        seen = []

        def on_validation_end(self, trainer, module):
            self.seen.append(list(module.epoch_history.get("val_loss", [])))

    model, reader = Outputs(), Reader()
    fit(model, loader(), loader(**VAL), callbacks=[reader])
    assert reader.seen == [[], model.ends[:1], model.ends]


def test_only_the_hook_of_the_module_in_a_fit_counts():
    class Chatter(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            self.log("val_loss", 1e6)
            module.log("validation_loss", 1e6)

        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking and trainer.state.fn == "fit":
                module.outputs.append(torch.tensor(1e6))
                module.log = lambda *args: None
                module.on_validation_epoch_end()
                del module.log, module.ends[-1]

    class Model(Outputs):
        def on_train_epoch_end(self):
            self.log("val/loss", 1e6)

    model = Model()
    runner = fit(model, loader(), loader(**VAL), callbacks=[Chatter()])
    assert_as_it_stands(model)
    runner.validate(model, loader(**VAL), verbose=False)
    assert len(model.ends) == 3 and model.epoch_history["val_loss"] == model.ends[:2]


def test_checkpoints_and_resumes(tmp_path):
    model, resumed, path = Outputs(), Outputs(), tmp_path / "last.ckpt"
    fit(model, loader(), loader(**VAL)).save_checkpoint(path)
    assert torch.load(path, weights_only=True)["epoch_mixin"]["history"] == model.epoch_history
    trainer(max_epochs=3).fit(resumed, loader(), loader(**VAL), ckpt_path=path)
    assert len(resumed.ends) == 1
    assert resumed.epoch_history["val_loss"] == model.ends + resumed.ends


def test_without_a_trainer():
    class Loop(EpochLossMixin, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return batch.mean()

        def validation_step(self, batch, batch_idx):
            self.outputs = [*getattr(self, "outputs", []), batch.mean()]

        def on_validation_epoch_end(self):
            self.log("val_loss", torch.stack(self.outputs).mean())
            del self.outputs

    model = Loop()
    for value in (1.0, 5.0):
        model.training_step(torch.full((2,), value), 0)
        for batch in (torch.full((2,), value), torch.full((1,), 3 * value)):
            model.validation_step(batch, 0)
        model.on_validation_epoch_end()
        model.on_train_epoch_end()
    assert model.epoch_history == {"loss": [1.0, 5.0], "val_loss": [2.0, 10.0]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "validation_step returned None; return the loss,"),
        (
            ("val_acc", "val_f1"),
            "validation_step returned None, and on_validation_epoch_end logged 'val_acc', 'val_f1'"
            ' (record it with epoch_loss_keys = ("loss", "acc")); return the loss,',
        ),
    ],
    ids=["nothing", "other names"],
)
def test_a_validation_whose_end_logs_no_loss_has_one_message(names, message, recwarn):
    model = type("Model", (Outputs,), {"log_end": lambda self, mean: self.log_dict(dict.fromkeys(names, 0.5))})()
    fit(model, loader(), loader(**VAL), max_epochs=3)
    assert list(model.epoch_history) == ["loss"]
    start, end = "Model: no step of a validation gave a loss: ", ' or self.log("val_loss", ...)'
    assert messages(recwarn, "Model") == [start + message + end]


class OnRanks(Outputs):
    """What ``way`` is, on two ranks with validation batches of their own."""

    def __init__(self, rank, way):
        super().__init__()
        self.rank, self.way = rank, way
        if way == "other keys":
            self.epoch_loss_keys = (("loss", "kl"), ("acc", "loss"))[rank]
        if way.startswith("not together"):
            self.allow_zero_length_dataloader_with_multiple_devices = True

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        if self.way.endswith("steps of one rank") and self.rank == 1:
            return Net.validation_step(self, batch, batch_idx)

    def log_end(self, mean):
        if self.way != "one rank" or self.rank == 1:
            self.log("val_loss", mean)
        if self.way == "other keys":
            self.log_dict({"val_kl": 1.0 + self.rank, "val_acc": 3.0 + self.rank})


def fit_on_rank(rank, way):
    model = OnRanks(rank, way)
    options = dict(devices=2, strategy="ddp", use_distributed_sampler=False, val_check_interval=2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer(**options).fit(model, loader(), loader(samples=(5, 3)[rank], batch_size=2))
    del model.epoch_history["loss"]
    return model.ends, model.val_steps, model.epoch_history, messages(warned, "OnRanks")


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    ["all ranks", "one rank", "other keys", "steps of one rank", "not together", "not together, steps of one rank"],
)
def test_the_end_of_validation_on_two_ranks(way):
    (ends, _, history, warned), (others, steps, other_history, _) = run_ranks(fit_on_rank, 2, way, seconds=30)
    assert len(ends) == len(others) == 4
    assert history == other_history
    expected = close([(one + other) / 2 for one, other in zip(ends, others)])
    if way == "one rank":
        expected = others
    if way == "steps of one rank":
        runs = [[(0, *step[1:]) for step in steps[i : i + 2]] for i in range(0, 8, 2)]
        expected = close([mean for run in runs for mean in epoch_means(run)])
    means = history.pop("val_loss")
    # Where a rank cannot know what the others' steps gave, its end counts beside them.
    assert len(means) == 4 if way == "not together, steps of one rank" else means == expected
    assert history == ({"val_kl": [1.0] * 4, "val_acc": [4.0] * 4} if way == "other keys" else {})
    assert [message for message in warned if "validation" in message] == []
