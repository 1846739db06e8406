"""A fit remembers its own Trainer, whatever other Trainer a callback starts in the middle of it."""

import pytest
import pytorch_lightning as pl
import torch

from tests.helpers import Tracked, Witness, close, epoch_means, fit, loader, trainer


class Model(Tracked):
    """Notes nothing itself: the inner Trainers call the steps, too."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        return self.loss(batch)

    test_step = predict_step = validation_step


class Raises(pl.Callback):
    def on_validation_batch_end(self, *_):
        raise ArithmeticError


def validate_and_raise(module):
    with pytest.raises(ArithmeticError):
        trainer(callbacks=[Raises()]).validate(module, loader(), verbose=False)


INNER = {
    "test": lambda module: trainer().test(module, loader(), verbose=False),
    "validate": lambda module: trainer().validate(module, loader(), verbose=False),
    "predict": lambda module: trainer().predict(module, loader()),
    "fit of another module": lambda module: fit(Model(), loader(7), loader(7)),
    "validate, which raises": validate_and_raise,
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_train_epoch_end",
    ],
)
def test_a_trainer_within_a_fit_changes_nothing(hook, inner, tmp_path, recwarn):
    """The epoch keeps its mean, no checkpoint keeps an open epoch, and training goes on."""
    ran = []

    def start(self, outer, module, *_):
        if outer.current_epoch == 1 and len(ran) < 3 and not outer.sanity_checking:
            ran.append(INNER[inner](module))

    model, witness = Model(), Witness()
    callbacks = [witness, type("Starts", (pl.Callback,), {hook: start})()]
    outer = fit(model, loader(), loader(11, 4), callbacks=callbacks, max_epochs=3)
    assert ran
    expected = {"loss": close(epoch_means(witness.steps)), "val_loss": close(epoch_means(witness.val_steps))}
    assert model.epoch_history == expected
    outer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["epoch_mixin"]["open"] == {}
    assert not [warning for warning in recwarn if str(warning.message).startswith("Model")]


def test_a_resume_in_mid_epoch_is_exact_although_there_are_inner_trainers_before_and_after(tmp_path):
    class TestsAndSaves(pl.Callback):
        def on_train_batch_end(self, outer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer().test(module, loader(), verbose=False)
                outer.save_checkpoint(tmp_path / "x.ckpt")

    model, witness = Model(), Witness()
    fit(model, callbacks=[witness, TestsAndSaves()], max_epochs=1)

    class FitsTheSameModule(pl.Callback):
        def on_train_batch_end(self, outer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                fit(module, loader(7), max_epochs=1)

    again, rest = Model(), Witness()
    trainer(max_epochs=1, callbacks=[rest, FitsTheSameModule()]).fit(again, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert again.epoch_losses == close(epoch_means(witness.steps[:3] + rest.steps))
