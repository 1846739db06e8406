"""Losses that a step logs and does not return, the batch sizes it logs, and the warnings where there is no loss."""

import math
import weakref

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, close, epoch_means, fit, loader, mean, messages, trainer
from tests.test_cost import Operators

VAL = dict(samples=11, batch_size=4)


class Logging(EpochLossMixin, Net):
    """Its validation only logs, in the way that ``say`` does."""

    def __init__(self, say=lambda module, loss: module.log("val_loss", loss)):
        super().__init__()
        self.say = say
        self.mean_loss = MeanMetric()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.say(self, super().validation_step(batch, batch_idx))


class LoggingInTraining(EpochLossMixin, Net):
    """Optimizes manually and returns nothing; training logs in the way that ``say`` does."""

    def __init__(self, say=lambda module, loss: module.log("train_loss", loss)):
        super().__init__()
        self.automatic_optimization = False
        self.say = say
        self.mean_loss = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = self.noted_loss(batch)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        self.say(self, loss)


@pytest.mark.parametrize("name", ["val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "loss"])
def test_validation_that_only_logs(name, recwarn):
    model = Logging(lambda module, loss: module.log(name, loss))
    fit(model, loader(), loader(**VAL))
    assert len(model.val_steps) == 2 * 3
    assert model.epoch_history == {
        "loss": close(epoch_means(model.steps)),
        "val_loss": close(epoch_means(model.val_steps)),
    }
    assert messages(recwarn, "Logging") == []


@pytest.mark.parametrize("name", ["train_loss", "train/loss", "training_loss", "training/loss", "loss"])
def test_training_that_only_logs(name, recwarn):
    model = LoggingInTraining(lambda module, loss: module.log(name, loss))
    fit(model)
    assert model.epoch_history == {"loss": close(epoch_means(model.steps))}
    assert messages(recwarn, "LoggingInTraining") == []


def call_metric(module, loss, **options):
    module.mean_loss(loss)
    module.log("val_loss", module.mean_loss, **options)


WAYS = {
    "0-dim numpy": lambda module, loss: module.log("val_loss", np.float32(loss.item())),
    "number": lambda module, loss: module.log("val_loss", loss.item()),
    "one element": lambda module, loss: module.log("val_loss", loss.reshape(1)),
    "by keyword": lambda module, loss: module.log(prog_bar=True, value=loss, name="val_loss"),
    "log_dict": lambda module, loss: module.log_dict({"val_acc": 0.5, "val_loss": loss}),
    "log_dict by keyword": lambda module, loss: module.log_dict(on_epoch=True, dictionary={"val_loss": loss}),
    "on_step": lambda module, loss: module.log("val_loss", loss, on_step=True, on_epoch=False),
    "on_step and on_epoch": lambda module, loss: module.log("val_loss", loss, on_step=True, on_epoch=True),
    "another reduction": lambda module, loss: module.log("val_loss", loss, reduce_fx="max"),
    "no dataloader index": lambda module, loss: module.log("val_loss", loss, add_dataloader_idx=False),
    "prog_bar": lambda module, loss: module.log("val_loss", loss, prog_bar=True, logger=False),
    "twice": lambda module, loss: [module.log(name, loss) for name in ("val_loss", "val/loss")],
    "a metric that was called": call_metric,
    "a metric, on_step": lambda module, loss: call_metric(module, loss, on_step=True, on_epoch=True),
    "a metric in log_dict": lambda module, loss: (
        module.mean_loss(loss) and module.log_dict({"val/loss": module.mean_loss})
    ),
}


@pytest.mark.parametrize("say", WAYS.values(), ids=WAYS)
def test_ways_to_log(say, recwarn):
    model = Logging(say)
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))
    assert messages(recwarn, "Logging") == []


def test_a_metric_collection_that_the_step_called():
    class Model(Logging):
        def __init__(self):
            super().__init__()
            self.metrics = MetricCollection({"loss": MeanSquaredError(), "other": MeanSquaredError()}, prefix="val_")

        def loss(self, batch):
            x, y = batch
            return (self.layer(x) - y).square().mean()

        def validation_step(self, batch, batch_idx):
            self.metrics(self.layer(batch[0]), batch[1])
            self.log_dict(self.metrics, on_epoch=True)
            Net.validation_step(self, batch, batch_idx)

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps), rel=1e-6)  # its sums are float32


def test_the_metrics_of_the_most_used_template():
    class Template(EpochLossMixin, Net):
        def __init__(self):
            super().__init__()
            self.train_loss, self.val_loss, self.val_loss_best = MeanMetric(), MeanMetric(), MeanMetric()

        def on_train_start(self):
            self.val_loss.reset()

        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            self.train_loss(loss)
            self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.val_loss(super().validation_step(batch, batch_idx))
            self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)

        def on_validation_epoch_end(self):
            self.val_loss_best(self.val_loss.compute())
            self.log("val/loss_best", self.val_loss_best.compute())
            self.log("val_loss", 1e6)

    model = Template()
    runner = fit(model, loader(), loader(**VAL))
    assert model.epoch_history == {
        "loss": close(epoch_means(model.steps)),
        "val_loss": close(epoch_means(model.val_steps)),
    }
    # its own number counts every batch alike
    plain = [mean((loss, 1) for _, loss, _ in steps) for steps in (model.val_steps[3:],)]
    assert [runner.callback_metrics["val/loss"].item()] == close(plain, rel=1e-6)


def test_a_metric_that_was_only_updated_is_left_alone(recwarn):
    def say(module, loss):
        module.mean_loss.update(loss)
        module.log("val_loss", module.mean_loss)

    model = Logging(say)
    fit(model, loader(), loader())
    assert list(model.epoch_history) == ["loss"]
    (message,) = messages(recwarn, "Logging")
    assert "returned None and logged 'val_loss'" in message


def test_what_is_logged_outside_a_step_is_not_recorded(recwarn):
    class Chatter(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            module.log("train_loss", 1e6)

        def on_validation_batch_end(self, trainer, module, *args):
            module.log("val_loss", 1e6)

        def on_validation_epoch_end(self, trainer, module):
            module.log("loss", 1e6)

    class Model(LoggingInTraining):
        def validation_step(self, batch, batch_idx):
            pass

        def on_train_batch_start(self, batch, batch_idx):
            self.log("training_loss", 1e6)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("train/loss", 1e6)

        def on_train_epoch_end(self):
            self.log("loss", 1e6)

    model = Model()
    fit(model, loader(), loader(), callbacks=[Chatter()])
    assert model.epoch_history == {"loss": close(epoch_means(model.steps))}
    (message,) = messages(recwarn, "Model")
    assert "validation_step returned None" in message and "logged" not in message


def test_what_hooks_log_in_the_course_of_a_manual_step_is_not_recorded():
    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            module.log("training/loss", 1e6)

    class Model(LoggingInTraining):
        def on_before_optimizer_step(self, optimizer):
            self.log("grad_norm", 1.0, batch_size=1)

    model = Model(lambda module, loss: module.log("loss", loss))
    fit(model, callbacks=[Norm()])
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_shared_step_that_logs():
    class Model(EpochLossMixin, Net):
        def shared_step(self, batch, stage):
            loss = self.loss(batch)
            self.log(f"{stage}_loss", loss)
            self.log_dict({f"{stage}/size": float(len(batch[0]))})
            if not self.trainer.sanity_checking:
                steps = self.steps if stage == "train" else self.val_steps
                steps.append((self.current_epoch, loss.item(), len(batch[0])))
            return loss

        def training_step(self, batch, batch_idx):
            return self.shared_step(batch, "train")

        def validation_step(self, batch, batch_idx):
            self.shared_step(batch, "valid")

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history == {
        "loss": close(epoch_means(model.steps)),
        "val_loss": close(epoch_means(model.val_steps)),
    }


@pytest.mark.parametrize("calls", [1, 2])
def test_a_step_that_logs_through_super_counts_once(calls):
    class Model(Logging):
        def validation_step(self, batch, batch_idx):
            for _ in range(calls):
                super().validation_step(batch, batch_idx)

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_a_validation_step_that_calls_a_training_step_which_logs():
    class Model(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train_loss", loss)
            if self.trainer.training:
                self.steps.append((self.current_epoch, loss.item(), len(batch[0])))
            return loss

        def validation_step(self, batch, batch_idx):
            loss = self.training_step(batch, batch_idx) * 2
            self.log("val_loss", loss)
            if not self.trainer.sanity_checking:
                self.val_steps.append((self.current_epoch, loss.item(), len(batch[0])))

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


@pytest.mark.parametrize("name", ["loss", "val_loss", "val/loss", "valid_loss", "validation/loss"])
@pytest.mark.parametrize("number", [float, np.float64, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_what_is_returned_wins_under_each_name_and_as_any_number(name, number):
    class Model(EpochLossMixin, Net):
        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx).item()
            self.log_dict({"loss": 1e6, "val_loss": 2e6})
            return {name: number(loss)}

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps), rel=1e-6)


@pytest.mark.parametrize("number", [float, np.float32, np.float64, np.array], ids=lambda kind: kind.__name__)
def test_a_bare_number_that_validation_returns(number):
    class Model(EpochLossMixin, Net):
        def validation_step(self, batch, batch_idx):
            return number(super().validation_step(batch, batch_idx).item())

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_the_name_of_the_curve_comes_before_the_bare_key():
    model = Logging(lambda module, loss: module.log_dict({"val_loss": loss, "loss": 1e6}))
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_names_of_the_other_stage_and_like_names_do_not_count(recwarn):
    others = ("train_loss", "training/loss", "test_loss", "my_val_loss", "val_los", "val_losses")
    model = Logging(lambda module, loss: module.log_dict(dict.fromkeys(others, loss)))
    fit(model, loader(), loader())
    assert list(model.epoch_history) == ["loss"]
    (message,) = messages(recwarn, "Logging")
    assert all(repr(name) in message for name in others)


def test_the_graph_of_what_is_logged_is_not_kept():
    class Model(LoggingInTraining):
        kept = None

        def on_train_batch_start(self, batch, batch_idx):
            assert self.kept is None or self.kept() is None

        def noted_loss(self, batch):
            loss = super().noted_loss(batch)
            self.kept = weakref.ref(loss)
            return loss

    model = Model()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_what_is_logged_without_a_trainer_is_recorded():
    class Model(EpochLossMixin, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            self.log("train_loss", batch.mean())

        def validation_step(self, batch, batch_idx):
            self.log_dict({"val/loss": batch.mean()}, batch_size=len(batch) + 1)

    model = Model()
    for batch in (torch.ones(3), torch.zeros(1)):
        model.training_step(batch, 0)
        model.validation_step(batch, 0)
    model.on_validation_epoch_end()
    model.on_train_epoch_end()
    assert model.epoch_history == {"loss": [3 / 4], "val_loss": [4 / 6]}


def test_only_steps_that_logged_count():
    class Model(Logging):
        def validation_step(self, batch, batch_idx):
            if batch_idx != 1:
                super().validation_step(batch, batch_idx)

    model = Model()
    fit(model, loader(), loader())
    assert len(model.val_steps) == 2 * 4
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_further_keys_by_log_in_both_stages(recwarn):
    class Vae(EpochLossMixin, Net):
        epoch_loss_keys = ("loss", "kl")

        def __init__(self):
            super().__init__()
            self.noted = {"loss": [], "kl": [], "val_loss": [], "val_kl": []}

        def losses(self, batch, stage):
            loss = self.loss(batch)
            kl = loss.detach() * len(batch[0])
            if not self.trainer.sanity_checking:
                for name, value in ((stage + "loss", loss), (stage + "kl", kl)):
                    self.noted[name].append((self.current_epoch, value.item(), len(batch[0])))
            return loss, kl

        def training_step(self, batch, batch_idx):
            loss, kl = self.losses(batch, "")
            self.log("train/kl", kl)
            return loss

        def validation_step(self, batch, batch_idx):
            loss, kl = self.losses(batch, "val_")
            self.log("kl", kl)
            return {"val_loss": loss}

    model = Vae()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history == {name: close(epoch_means(noted)) for name, noted in model.noted.items()}
    assert messages(recwarn, "Vae") == []


def test_a_users_own_log_method_of_another_kind():
    class Model(Tracked):
        def log(self, text):
            self.texts = [*getattr(self, "texts", []), text]

        def log_dict(self):
            pass

        def training_step(self, batch, batch_idx):
            self.log("a text")
            self.log(text={"val_loss": 3})
            self.log(None)
            self.log_dict()
            return super().training_step(batch, batch_idx)

    model = Model()
    fit(model)
    assert len(model.texts) == 3 * 10
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_users_log_method_that_adds_to_the_name():
    class Model(Logging):
        def log(self, name, value, **options):
            super().log(f"val_{name}", value, **options)

    model = Model(lambda module, loss: module.log("loss", loss))
    runner = fit(model, loader(), loader(**VAL))
    assert "val_loss" in runner.callback_metrics
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


class Weighed(EpochLossMixin, Net):
    """Says of each step what it counts, and how it logs: pairs of what is given to ``self.log``."""

    say = {}

    def weight(self, batch):
        return int(batch[0].abs().sum() * 10)

    def training_step(self, batch, batch_idx):
        loss, weight = self.loss(batch), self.weight(batch)
        self.steps.append((self.current_epoch, loss.item(), weight))
        for name, size in self.say.items():
            self.log(name, loss, batch_size=weight if size is None else size)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, weight = self.loss(batch), self.weight(batch)
        if not self.trainer.sanity_checking:
            self.val_steps.append((self.current_epoch, loss.item(), weight))
        for name, size in self.say.items():
            self.log(name.replace("train", "val"), loss, batch_size=weight if size is None else size)


@pytest.mark.parametrize(
    "say",
    [
        {"train_loss": None},
        {"train_loss": None, "other": 999},
        {"other": 999, "train/loss": None},
        {"train_loss": None, "loss": 999},
        {"loss": 999, "train_loss": None},
    ],
    ids=str,
)
def test_the_batch_size_logged_with_the_loss(say):
    model = type("Model", (Weighed,), {"say": say})()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_the_batch_size_logged_with_anything_else():
    class Model(Weighed):
        say = {"accuracy": None}

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return self.loss(batch)

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


@pytest.mark.parametrize("kind", [int, float, np.int64, torch.tensor], ids=lambda kind: kind.__name__)
def test_a_batch_size_of_any_kind(kind):
    class Model(Weighed):
        def training_step(self, batch, batch_idx):
            loss, weight = self.loss(batch), self.weight(batch)
            self.steps.append((self.current_epoch, loss.item(), weight))
            self.log_dict({"train_loss": loss}, batch_size=kind(weight))
            return loss

    model = Model()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_an_overridden_weight_comes_before_a_logged_batch_size():
    class Model(Weighed):
        say = {"train_loss": 999, "other": 5}

        def epoch_loss_weight(self, batch):
            return self.weight(batch)

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_a_batch_size_of_one_step_says_nothing_of_the_next():
    class Model(Weighed):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if batch_idx % 2:
                self.log("train_loss", loss, batch_size=100)
            self.steps.append((self.current_epoch, loss.item(), 100 if batch_idx % 2 else len(batch[0])))
            return loss

    model = Model()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


def dicts(samples=11, batch_size=4):
    """Batches whose first entry tells nothing of their size, as those of graphs do."""

    def collate(items):
        x, y = (torch.stack(part) for part in zip(*items))
        return {"edge_index": torch.zeros(2, 7), "x": x, "y": y}

    return DataLoader(loader(samples).dataset, batch_size, collate_fn=collate)


class Popping(EpochLossMixin, Net):
    """Its steps take their batch apart."""

    def step(self, batch, steps):
        batch.pop("edge_index", None)
        x, y = batch.pop("x"), batch.pop("y")
        batch["x"] = x[:1]
        loss = self.loss((x, y))
        if not self.trainer.sanity_checking:
            steps.append((self.current_epoch, loss.item(), len(x)))
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, self.steps)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch, self.val_steps), batch_size=1 + batch_idx)
        self.val_steps[-1:] = [(*step[:2], 1 + batch_idx) for step in self.val_steps[-1:]]


def test_a_step_may_take_its_batch_apart(recwarn):
    class Model(Popping):
        def epoch_loss_weight(self, batch):
            return len(batch["y"]) + batch["edge_index"].shape[1] - 7

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.step(batch, self.val_steps), batch_size=999)

    model = Model()
    fit(model, dicts(), dicts(23, 5))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))
    assert messages(recwarn, "Model") == []


def test_a_size_is_that_of_the_batch_as_the_step_was_given_it():
    class Model(Popping):
        def step(self, batch, steps):
            del batch["edge_index"]
            return super().step(batch, steps)

    class Listed(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            batch[0] = batch[0][:1]
            batch.clear()
            return loss

    listed = Listed()
    fit(listed)
    assert listed.epoch_losses == close(epoch_means(listed.steps))
    model = Model()
    with pytest.warns(UserWarning, match="disagree about the batch size: 2, 4"):
        fit(model, dicts(), max_epochs=1)
    assert model.epoch_losses == close([mean((loss, 2) for _, loss, _ in model.steps)])


def test_tensors_that_disagree_are_warned_of_once_a_stage(recwarn):
    class Model(Popping):
        def validation_step(self, batch, batch_idx):
            return self.step(batch, self.val_steps)

    model = Model()
    fit(model, dicts(), dicts())
    train, val = sorted(messages(recwarn, "Model"))
    assert train.startswith("Model.training_step: the tensors of its batch disagree about the batch size: 2, 4.")
    assert val.startswith("Model.validation_step: the tensors of its batch disagree about the batch size: 2, 4.")
    assert all("batch_size=" in message and "epoch_loss_weight" in message for message in (train, val))


@pytest.mark.parametrize("names", [("train_loss", "val_loss"), ("size_loss", "size_loss")])
def test_tensors_that_disagree_do_not_matter_where_the_step_says_the_size(names, recwarn):
    class Graphs(Popping):
        def training_step(self, batch, batch_idx):
            self.log(names[0], 0.5, batch_size=len(batch["x"]))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            size = len(batch["x"])
            loss = self.step(batch, self.val_steps)
            self.log(names[1], loss, batch_size=size)
            return None if names[1] == "val_loss" else loss

    model = Graphs()
    fit(model, dicts(), dicts(23, 5))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))
    assert messages(recwarn, "Graphs") == []


def test_lists_of_images(recwarn):
    class Detector(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            images, _ = batch
            loss = sum(self.layer(image).square().mean() for image in images)
            self.log("train_boxes", loss, batch_size=len(images))
            self.steps.append((self.current_epoch, loss.item(), len(images)))
            return loss

    def collate(items):
        return tuple(x.expand(3, 2, 4) for x, _ in items), [{"boxes": torch.ones(i, 4)} for i in range(len(items))]

    model = Detector()
    fit(model, DataLoader(loader().dataset, 4, collate_fn=collate))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert messages(recwarn, "Detector") == []


RECORD_ACC = ' (record it with epoch_loss_keys = ("loss", "acc"))'


@pytest.mark.parametrize(
    ("output", "names", "what"),
    [
        (None, (), "returned None"),
        ({"predictions": 1}, (), "returned only 'predictions'"),
        (None, ("val_acc", "val_f1"), "returned None and logged 'val_acc', 'val_f1'" + RECORD_ACC),
        ({}, ("val_acc",), "returned an empty dict and logged 'val_acc'" + RECORD_ACC),
        ("text", (), "returned only a str"),
        ([1.0], (), "returned only a list"),
    ],
    ids=str,
)
def test_a_validation_without_a_loss_says_so_once(output, names, what, recwarn):
    class Model(Tracked):
        def validation_step(self, batch, batch_idx):
            for name in names:
                self.log(name, 0.5)
            return output

    model = Model()
    fit(model, loader(), loader(), max_epochs=3, val_check_interval=2)
    assert list(model.epoch_history) == ["loss"]
    hint = 'return the loss, or self.log("val_loss", ...)'
    assert messages(recwarn, "Model") == [f"Model: no step of a validation gave a loss: validation_step {what}; {hint}"]


def test_no_warning_outside_a_fit_or_without_a_validation(recwarn):
    class Model(Tracked):
        def validation_step(self, batch, batch_idx):
            pass

    model = Model()
    runner = fit(model)
    runner.validate(model, loader())
    fit(model, loader(), loader(), limit_val_batches=0)
    assert messages(recwarn, "Model") == []


def only_message(recwarn, model, **options):
    fit(model, **options)
    (message,) = messages(recwarn, type(model).__name__)
    return message


def test_a_training_epoch_without_a_loss_asks_whether_the_step_returned_it(recwarn):
    model = LoggingInTraining(lambda module, loss: module.log("my_loss", loss))
    message = only_message(recwarn, model)
    assert model.epoch_losses == pytest.approx([math.nan] * 2, nan_ok=True)
    assert "no step of epoch 0 gave a loss for 'loss'" in message
    assert "it returned None and logged 'my_loss'" in message
    assert 'did the step return it, or self.log("train_loss", ...) it?' in message


def test_a_training_epoch_whose_weights_are_all_0_says_that(recwarn):
    class Model(Tracked):
        def epoch_loss_weight(self, batch):
            return 0

    message = only_message(recwarn, Model())
    assert "so its mean is nan: the weights of its steps are all 0" in message


def test_batch_sizes_that_are_all_0_say_that_too(recwarn):
    class Model(Weighed):
        say = {"train_loss": 0}

    assert "the weights of its steps are all 0" in only_message(recwarn, Model())


def test_the_warning_names_the_keys_that_are_recorded(recwarn):
    class Gan(LoggingInTraining):
        epoch_loss_keys = ("g_loss", "d_loss")

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    fit(Gan(), loader(), loader())
    val, train = messages(recwarn, "Gan")
    assert "logged 'val_loss'" in val and 'self.log("val_g_loss", ...)' in val
    assert 'self.log("train_g_loss", ...)' in train


def test_a_missing_key_is_told_with_those_that_were_returned(recwarn):
    class Model(Tracked):
        epoch_loss_keys = ("loss", "kll")

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "kl": loss.detach()}

    fit(Model())
    (missing,) = messages(recwarn, "Model")
    assert "'kll' is in epoch_loss_keys, but training_step returned only 'loss', 'kl'" in missing


@pytest.mark.parametrize("when", [dict(), dict(check_val_every_n_epoch=2)], ids=str)
def test_a_key_that_only_validation_gives_leaves_no_list_of_nan_and_no_warning(when, recwarn):
    class Model(Logging):
        epoch_loss_keys = ("loss", "accuracy")

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val_accuracy", 0.5)

    model = Model()
    fit(model, loader(), loader(**VAL), max_epochs=4, **when)
    assert messages(recwarn, "Model") == []
    assert list(model.epoch_history) == ["loss", "val_loss", "val_accuracy"]
    assert set(model.epoch_history["val_accuracy"]) == {0.5}
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_resume_before_the_first_validation_leaves_no_list_of_nan_either(tmp_path, recwarn):
    class Model(Logging):
        epoch_loss_keys = ("loss", "accuracy")

        def validation_step(self, batch, batch_idx):
            self.log("val_accuracy", 0.5)

    options, path = dict(check_val_every_n_epoch=3), tmp_path / "last.ckpt"
    fit(Model(), loader(), loader(), max_epochs=2, **options).save_checkpoint(path)
    model = Model()
    trainer(max_epochs=4, **options).fit(model, loader(), loader(), ckpt_path=path)
    assert list(model.epoch_history) == ["loss", "val_accuracy"]
    assert len(model.epoch_losses) == 4 and model.epoch_history["val_accuracy"] == [0.5]


def test_a_key_that_only_training_gives_leaves_no_list_of_nan(recwarn):
    class Model(Logging):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            self.log("kl", 0.25)
            return super().training_step(batch, batch_idx)

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert list(model.epoch_history) == ["loss", "kl", "val_loss"]
    assert model.epoch_history["kl"] == [0.25, 0.25]
    assert messages(recwarn, "Model") == []


class Everything(Net):
    """Without the mixin: logs in many ways, with chance in its steps."""

    def __init__(self):
        super().__init__()
        self.train_mean, self.val_mean = MeanMetric(), MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) * torch.rand(())
        self.train_mean(loss)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=3)
        self.log_dict({"train/mean": self.train_mean, "train/size": float(len(batch[0]))})
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch) * torch.rand(())
        self.val_mean.update(loss)
        self.log_dict({"val_loss": loss, "val/mean": self.val_mean}, prog_bar=True, add_dataloader_idx=False)


class EverythingTracked(EpochLossMixin, Everything):
    pass


def test_weights_and_logged_metrics_are_the_same_as_without_the_mixin():
    seen = []
    for cls in (Everything, EverythingTracked):
        torch.manual_seed(1)
        model = cls()
        runner = fit(model, loader(), loader(**VAL), max_epochs=3)
        metrics = {**runner.callback_metrics, **runner.logged_metrics, **runner.progress_bar_metrics}
        seen.append(
            ({**model.state_dict(), **{name: torch.as_tensor(value) for name, value in metrics.items()}}, model)
        )
    (bare, _), (ours, model) = seen
    assert list(bare) == list(ours) and all(torch.equal(bare[name], ours[name]) for name in bare)
    assert len(model.epoch_losses) == len(model.epoch_history["val_loss"]) == 3


def counted(cls, logs, samples=201):
    class Model(cls):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            for i in range(logs):
                self.log(f"metric_{i}", 0.5)
            return loss

    model = Model()
    with Operators() as operators:
        fit(model, loader(samples, batch_size=1), max_epochs=1)
    return operators.counts.total()


def test_recording_what_is_logged_costs_no_operator():
    recording = counted(Tracked, 0) - counted(Net, 0)
    assert counted(Tracked, 3) - counted(Net, 3) == recording


class LogsInAnotherUnit(LoggingInTraining):
    def log(self, name, value, *args, **kwargs):
        super().log(name, 100 * value, *args, **kwargs)


def test_a_loss_counts_as_the_step_logged_it_whatever_the_class_makes_of_it():
    model = LogsInAnotherUnit()
    fit(model, loader())
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_an_own_weight_wins_over_a_logged_batch_size_for_any_iterator():
    class Own(EpochLossMixin, pl.LightningModule):
        def epoch_loss_weight(self, batch):
            return 5.0

        def training_step(self, batches, batch_idx):
            self.log("train_loss", float(batch_idx), batch_size=1 + batch_idx)

    model = Own()
    for batch_idx in range(2):
        model.training_step(iter([1]), batch_idx)
    model.on_train_epoch_end()
    assert model.epoch_losses == [0.5]


def test_each_key_has_the_batch_size_that_was_logged_with_it():
    class Model(EpochLossMixin, Net):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            return {"loss": self.loss(batch), "kl": 1.0}

        def validation_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("val_kl", 2 * loss, batch_size=len(batch[0]))
            self.log("val_loss", loss, batch_size=1)
            self.val_steps.append((loss.item(), len(batch[0])))

    model = Model()
    fit(model, loader(), loader(), max_epochs=1, num_sanity_val_steps=0)
    assert model.epoch_history["val_loss"] == close([mean((loss, 1) for loss, _ in model.val_steps)])
    assert model.epoch_history["val_kl"] == close([2 * mean(model.val_steps)], rel=1e-6)


def test_a_training_that_only_logs_is_said_to_have_been_called_beside_a_validation(recwarn):
    class Gan(LoggingInTraining):
        def training_step(self, batch, batch_idx):
            self.log("g_loss", 1.0)

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    fit(Gan(), loader(), loader())
    (message,) = messages(recwarn, "Gan")
    assert "it returned None and logged 'g_loss'" in message


def test_a_validation_whose_weights_are_all_0_says_that(recwarn):
    class Model(Tracked):
        def epoch_loss_weight(self, batch):
            return int(self.trainer.training)

    model = Model()
    fit(model, loader(), loader())
    assert list(model.epoch_history) == ["loss"]
    (message,) = messages(recwarn, "Model")
    assert message.startswith("Model: no step of a validation gave a loss: the weights of its steps are all 0")


def test_the_nan_of_a_second_key_does_not_hide_the_warning_of_the_first(recwarn):
    class Model(Tracked):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss} if self.current_epoch == 0 else None

    fit(Model())
    kl, loss = messages(recwarn, "Model")
    assert "no 'kl' is recorded" in kl and "no step of epoch 1 gave a loss for 'loss', so its mean is nan" in loss


def test_a_metric_that_was_only_updated_is_named_as_that(recwarn):
    class Model(Tracked):
        def __init__(self):
            super().__init__()
            self.metric = MeanMetric()

        def validation_step(self, batch, batch_idx):
            self.metric.update(self.loss(batch))
            self.log("val_loss", self.metric)

    fit(Model(), loader(), loader())
    (message,) = messages(recwarn, "Model:")
    assert "logged 'val_loss' (a metric that was only updated)" in message


def test_a_stream_that_is_used_up_is_warned_of(recwarn):
    class Once(IterableDataset):
        rows = iter(torch.randn(6, 5))

        def __iter__(self):
            return ((row[:4], row[4:]) for row in self.rows)

    model = Tracked()
    fit(model, DataLoader(Once(), 2), max_epochs=3)
    assert model.epoch_losses[:1] == close(epoch_means(model.steps))
    assert len(model.epoch_losses) == 3 and all(map(math.isnan, model.epoch_losses[1:]))
    (message,) = messages(recwarn, "Tracked:")
    assert "no step of epoch 1 gave a loss for 'loss'" in message and "it was not called" in message
