"""Where the picture of a fit places its means: at the number of epochs that had been trained."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from epoch_mixin import EpochLossMixin
from tests.helpers import Tracked, data, fit, loader, trainer

matplotlib.use("Agg")


def positions(model):
    axes = model.plot_epoch_losses()[1]
    x = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    plt.close("all")
    return x.get("loss (train)"), x.get("loss (val)")


def train_batches(count=8):
    return loader(count, batch_size=1)


@pytest.mark.parametrize(
    ("options", "train", "val"),
    [
        (dict(), [1, 2], [1, 2]),
        (dict(val_check_interval=0.25), [1, 2], [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        (dict(val_check_interval=3), [1, 2], [0.375, 0.75, 1.375, 1.75]),
        (dict(val_check_interval=6, check_val_every_n_epoch=None), [1, 2], [0.75, 1.5]),
        (dict(check_val_every_n_epoch=2, max_epochs=4), [1, 2, 3, 4], [2, 4]),
        (dict(limit_train_batches=4, val_check_interval=2), [1, 2], [0.5, 1, 1.5, 2]),
        (dict(accumulate_grad_batches=4, val_check_interval=0.5), [1, 2], [0.5, 1, 1.5, 2]),
        (dict(max_steps=3, val_check_interval=0.25), [1], [0.25]),
    ],
    ids=str,
)
def test_a_validation_lies_where_it_ran(options, train, val):
    model = Tracked()
    fit(model, train_batches(), loader(4), **options)
    assert positions(model) == (train, val)


def test_a_second_fit_goes_on_and_a_validation_may_come_before_and_behind_an_epoch():
    class Model(Tracked):
        def validate(self):
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

        def on_train_start(self):
            self.validate()

        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                self.validate()

    model = Model()
    assert model.plot_epoch_losses()[1].get_xlabel() == "epochs trained"
    fit(model, train_batches(), loader(4), val_check_interval=0.5)
    assert positions(model) == ([1, 2], [0, 0.5, 1, 1.5, 2, 2])
    assert len(model.epoch_history["val_loss"]) == 6
    fit(model, train_batches(), loader(4), max_epochs=1)
    assert positions(model) == ([1, 2, 3], [0, 0.5, 1, 1.5, 2, 2, 2, 3])
    assert [row["epoch"] for row in model.epoch_records()] == [0, 1, 2]


def test_validations_of_an_epoch_of_unknown_length_lie_evenly_in_it():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data(9))

    model = Tracked()
    fit(model, DataLoader(Stream(), 1), loader(4), val_check_interval=3)
    assert positions(model) == ([1, 2], pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]))


@pytest.mark.parametrize("every", [3, 4, 8])
def test_positions_after_a_resume(every, tmp_path):
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    options = dict(max_epochs=3, val_check_interval=every, num_sanity_val_steps=0)
    model = Tracked()
    fit(model, train_batches(), loader(4), callbacks=[Saving()], **options)
    train, val = positions(model)
    for path in tmp_path.iterdir():
        resumed = Tracked()
        trainer(**options).fit(resumed, train_batches(), loader(4), ckpt_path=path)
        trained, validated = positions(resumed)
        # Lightning may leave out the validation that was due when the checkpoint was saved; older versions repeat one.
        where_saved = {(int(path.stem) - 1) / 8, int(path.stem) / 8}
        assert trained == train, path
        assert {*validated} ^ {*val} <= where_saved and validated == sorted(validated), path


class Loop(EpochLossMixin, pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return batch

    validation_step = training_step

    def epoch_loss_weight(self, batch):
        return 1


def test_positions_in_a_loop_without_a_trainer():
    model = Loop()
    model.validation_step(4.0, 0)
    model.on_validation_epoch_end()
    for _ in range(2):
        for batch_idx in range(2):
            model.training_step(1.0, batch_idx)
            model.validation_step(2.0, 0)
            model.on_validation_epoch_end()
        model.on_train_epoch_end()
    assert positions(model) == ([1, 2], [0, 1 / 2, 1, 1.5, 2])
