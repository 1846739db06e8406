import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner

from tests.helpers import messages, trainer
from tests.lightning.reference import Tracked, assert_exact, assert_history, loader


class Tunable(Tracked):
    """A model that the tuners can change."""

    def __init__(self):
        super().__init__()
        self.lr = 0.01
        self.batch_size = 2

    def train_dataloader(self):
        return loader(24, self.batch_size)

    def val_dataloader(self):
        return loader(7, self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


@pytest.fixture
def fitted():
    """A model with a history of two epochs, and its notes so far put away."""
    model = Tunable()
    trainer(max_epochs=2).fit(model)
    assert_history(model)
    first = list(model.notes)
    model.notes.clear()
    return model, first


def copied(model):
    return {name: list(losses) for name, losses in model.epoch_history.items()}


def test_test_of_an_old_checkpoint_leaves_all_ten_epochs(tmp_path):
    class Worsens(Tracked):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            self.log("score", float(self.current_epoch))

    model = Worsens()
    best = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="min")
    runner = trainer(max_epochs=10, callbacks=[best], enable_checkpointing=True)
    runner.fit(model, loader(), loader(5, 2))
    assert best.best_model_path.endswith("epoch=0.ckpt")
    before, notes = copied(model), list(model.notes)
    runner.test(model, loader(), ckpt_path="best")
    runner.validate(model, loader(), ckpt_path="best")
    runner.predict(model, loader(), ckpt_path="best")
    assert len(model.epoch_losses) == 10
    assert model.epoch_history == before
    assert_exact(model.epoch_history, notes)


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
@pytest.mark.parametrize("same", [True, False], ids=["same trainer", "another trainer"])
def test_other_runs_leave_no_trace(run, same):
    model = Tracked()
    runner = trainer(max_epochs=2)
    runner.fit(model, loader(), loader(5, 2))
    before, notes = copied(model), list(model.notes)
    getattr(runner if same else trainer(), run)(model, loader())
    assert model.epoch_history == before
    assert torch.isnan(model.running_epoch_loss())
    trainer(max_epochs=1).fit(model, loader(), loader(5, 2))
    fresh = [note for note in model.notes[len(notes) :] if note[3] >= 2 + (run == "validate")]
    assert_exact(model.epoch_history, notes, fresh)


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_other_runs_of_an_unfitted_model_write_nothing(run):
    model = Tracked()
    getattr(trainer(), run)(model, loader())
    assert model.epoch_losses == []
    assert model.epoch_history == {}


def test_sanity_check_leaves_no_trace():
    class Looks(Tracked):
        def on_train_start(self):
            self.at_start = copied(self)

    model = Looks()
    trainer(max_epochs=1, num_sanity_val_steps=-1).fit(model, loader(), loader(5, 2))
    assert not any(model.at_start.values())
    assert len(model.epoch_history["val_loss"]) == 1
    assert_history(model)


def lr_find(runner, model):
    Tuner(runner).lr_find(model, num_training=30, early_stop_threshold=None)
    assert model.lr != 0.01


def scale_batch_size(runner, model):
    Tuner(runner).scale_batch_size(model, max_trials=2, steps_per_trial=5)
    assert model.batch_size > 2


def scale_batch_size_for_validation(runner, model):
    Tuner(runner).scale_batch_size(model, method="validate", max_trials=2, steps_per_trial=2)
    assert model.batch_size > 2


@pytest.mark.parametrize("tune", [lr_find, scale_batch_size, scale_batch_size_for_validation])
def test_tuner_leaves_no_trace(tmp_path, fitted, tune):
    model, first = fitted
    before, losses = copied(model), model.epoch_losses
    runner = trainer(max_epochs=3, default_root_dir=tmp_path)
    tune(runner, model)
    assert model.epoch_history == before
    assert model.epoch_losses is losses
    model.notes.clear()
    runner.fit(model)
    assert len(losses) == 2 + 3
    assert_exact(model.epoch_history, first, model.notes)


@pytest.mark.parametrize("tune", [lr_find, scale_batch_size, scale_batch_size_for_validation])
def test_tuner_of_an_unfitted_model_leaves_no_trace(tmp_path, tune):
    model = Tunable()
    runner = trainer(max_epochs=2, default_root_dir=tmp_path)
    tune(runner, model)
    assert model.epoch_losses == []
    model.notes.clear()
    runner.fit(model)
    assert len(model.epoch_losses) == len(model.epoch_history["val_loss"]) == 2
    assert_history(model)


class FindLearningRateEachEpoch(pl.callbacks.LearningRateFinder):
    """As in Lightning's documentation."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, module):
        self.lr_find(trainer, module)


class FindLearningRateLater(FindLearningRateEachEpoch):
    """Also as there: not at the beginning, but at milestones."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch in (1, 2):
            self.lr_find(trainer, module)


class ScaleBatchSizeEachEpoch(pl.callbacks.BatchSizeFinder):
    """As in Lightning's documentation."""

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, module):
        self.scale_batch_size(trainer, module)


@pytest.mark.parametrize(
    ("finder", "options"),
    [
        (pl.callbacks.LearningRateFinder, dict(num_training_steps=30, early_stop_threshold=None)),
        (FindLearningRateEachEpoch, dict(num_training_steps=30, early_stop_threshold=None)),
        (FindLearningRateLater, dict(num_training_steps=30, early_stop_threshold=None)),
        (pl.callbacks.BatchSizeFinder, dict(max_trials=2, steps_per_trial=5)),
        (ScaleBatchSizeEachEpoch, dict(max_trials=2, steps_per_trial=5)),
    ],
)
def test_finder_within_fit_leaves_no_trace(tmp_path, fitted, recwarn, finder, options):
    model, first = fitted
    trainer(max_epochs=3, default_root_dir=tmp_path, callbacks=[finder(**options)]).fit(model)
    # As after other resumes at an epoch's start, Lightning may pass the epoch by without a step or a validation.
    assert len(model.epoch_losses) == 2 + 3
    assert_exact(model.epoch_history, first, model.notes)
    assert messages(recwarn, "Tunable") == []
