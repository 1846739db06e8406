import json

import pytest
import pytorch_lightning as pl
import torch

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, close, epoch_means, fit, loader, mean, messages, trainer


def test_one_exact_value_for_each_validation_and_none_from_the_sanity_check():
    model = Tracked()
    fit(model, loader(), loader(samples=11, batch_size=4), max_epochs=3, num_sanity_val_steps=2)
    assert len(model.val_steps) == 3 * 3
    assert model.epoch_history == {
        "loss": close(epoch_means(model.steps)),
        "val_loss": close(epoch_means(model.val_steps)),
    }


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_validation_is_exact_at_every_precision(precision):
    model = Tracked()
    fit(model, loader(), loader(samples=11, batch_size=4), precision=precision)
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_validation_dataloaders_are_pooled():
    model = Tracked()
    fit(model, loader(), [loader(samples=11, batch_size=4), loader(samples=6), loader(samples=1)])
    assert len(model.val_steps) == 2 * (3 + 2 + 1)
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


class Runs(Tracked):
    """Notes the losses of each validation run apart."""

    def on_validation_epoch_start(self):
        self.runs = [*getattr(self, "runs", []), []]

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.runs[-1].append((loss.item(), len(batch[0])))
        return loss


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        (dict(check_val_every_n_epoch=2, max_epochs=5), 2),
        (dict(val_check_interval=0.5), 4),
        (dict(val_check_interval=2), 4),
        (dict(val_check_interval=4, check_val_every_n_epoch=None, max_epochs=4), 5),
        (dict(limit_val_batches=1), 2),
    ],
    ids=["every other epoch", "twice an epoch", "every two batches", "across epochs", "one batch"],
)
def test_validations_at_other_times(options, validations):
    model = Runs()
    fit(model, loader(), loader(samples=11, batch_size=4), num_sanity_val_steps=0, **options)
    assert len(model.runs) == validations
    assert model.epoch_history["val_loss"] == close([mean(run) for run in model.runs])
    assert model.epoch_losses == close(epoch_means(model.steps))


@pytest.mark.parametrize(
    "output",
    [
        lambda loss: None,
        lambda loss: {"predictions": torch.ones(3)},
        lambda loss: {"loss": None},
        lambda loss: "text",
        lambda loss: {"loss": "text"},
        lambda loss: torch.ones(3),
        lambda loss: loss.reshape(1),
        lambda loss: torch.ones(2, 2),
    ],
    ids=["None", "predictions", "loss is None", "text", "text as loss", "vector", "(1,)-tensor", "matrix"],
)
def test_a_validation_that_returns_no_loss_leaves_no_entry_and_no_noise(output, recwarn):
    class Model(Tracked):
        def validation_step(self, batch, batch_idx):
            return output(self.loss(batch))

    model = Model()
    fit(model, loader(), loader())
    assert list(model.epoch_history) == ["loss"]
    assert messages(recwarn, "Model") == []


def test_validation_steps_without_a_loss_do_not_count():
    class Model(Tracked):
        def validation_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().validation_step(batch, batch_idx)

    model = Model()
    fit(model, loader(), loader())
    assert len(model.val_steps) == 2 * 4
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_named_losses_in_both_stages(recwarn):
    class Vae(EpochLossMixin, Net):
        epoch_loss_keys = ("loss", "kl")

        def __init__(self):
            super().__init__()
            self.noted = {"loss": [], "kl": [], "val_loss": [], "val_kl": []}

        def note(self, stage, batch):
            kl = self.layer.weight.square().sum()
            loss = self.loss(batch) + kl
            if not self.trainer.sanity_checking:
                for key, value in (("loss", loss), ("kl", kl)):
                    self.noted[stage + key].append((self.current_epoch, value.item(), len(batch[0])))
            return loss, kl

        def training_step(self, batch, batch_idx):
            loss, kl = self.note("", batch)
            return {"loss": loss, "kl": kl.detach(), "logits": batch[0]}

        def validation_step(self, batch, batch_idx):
            loss, kl = self.note("val_", batch)
            return {"kl": kl.item(), "loss": loss}

    model = Vae()
    fit(model, loader(), loader(samples=11, batch_size=4), max_epochs=3)
    assert model.epoch_history == {name: close(epoch_means(noted)) for name, noted in model.noted.items()}
    assert messages(recwarn, "Vae") == []


def test_a_key_that_only_one_stage_gives():
    class Model(Tracked):
        epoch_loss_keys = ("loss", "accuracy")

        def training_step(self, batch, batch_idx):
            return {"loss": self.noted_loss(batch), "accuracy": None}

        def validation_step(self, batch, batch_idx):
            return {"accuracy": 0.5}

    model = Model()
    with pytest.warns(UserWarning, match="no step of epoch 0 gave a loss for 'accuracy'"):
        fit(model, loader(), loader())
    assert model.epoch_history["val_accuracy"] == [0.5, 0.5]
    assert "val_loss" not in model.epoch_history


def test_history_can_be_written_as_json():
    model = Tracked()
    fit(model, loader(), loader())
    assert json.loads(json.dumps(model.epoch_history)) == model.epoch_history


@pytest.mark.parametrize("step", ["validation_step", "test_step", "predict_step"])
@pytest.mark.parametrize("through_super", [True, False])
def test_a_step_that_calls_the_training_step_leaves_the_training_mean_alone(step, through_super):
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return self.noted_loss(batch) if self.trainer.training else self.loss(batch)

    def calls_the_training_step(self, batch, batch_idx):
        me = super(Caller, self) if through_super else self
        return me.training_step(batch, batch_idx)

    Caller = type("Caller", (Model,), {step: calls_the_training_step})
    model = Caller()
    runner = fit(model, loader(), loader(samples=11, batch_size=4))
    assert model.epoch_losses == close(epoch_means(model.steps))
    history = {name: list(values) for name, values in model.epoch_history.items()}
    works = {"validation_step": runner.validate, "test_step": runner.test, "predict_step": runner.predict}
    works[step](model, loader())
    assert model.epoch_history == history
    assert model.running_epoch_loss().isnan()


def test_validation_step_that_calls_the_training_step_gives_the_validation_mean():
    class Model(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if not self.trainer.sanity_checking:
                steps = self.steps if self.trainer.training else self.val_steps
                steps.append((self.current_epoch, loss.item(), len(batch[0])))
            return loss

        def validation_step(self, batch, batch_idx):
            return {"loss": self.training_step(batch, batch_idx)}

    model = Model()
    fit(model, loader(), loader(samples=11, batch_size=4))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_validate_test_and_predict_write_nothing():
    class Model(Tracked):
        def test_step(self, batch, batch_idx):
            return self.loss(batch)

        def predict_step(self, batch, batch_idx):
            return self.loss(batch)

    model = Model()
    runner = trainer()
    for work in (runner.validate, runner.test, runner.predict):
        work(model, loader())
    assert model.epoch_history == {}


def test_running_loss_is_that_of_training_during_validation():
    class Reader(pl.Callback):
        read = []

        def on_validation_batch_end(self, trainer, module, *args):
            if not trainer.sanity_checking:
                self.read.append(module.running_epoch_loss().item())

    model, reader = Tracked(), Reader()
    fit(model, loader(), loader(samples=4), max_epochs=1, callbacks=[reader])
    assert reader.read == close(epoch_means(model.steps))
