"""Unit tests of the epoch losses of your own module, without a Trainer.

    pytest examples/test_my_model.py

Without a Trainer, the steps and hooks that you call yourself are recorded.
"""

import pytest
import pytorch_lightning as pl
import torch
from torch.nn.functional import mse_loss

from epoch_mixin import EpochLossMixin


class LitLine(EpochLossMixin, pl.LightningModule):
    def __init__(self, slope):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return mse_loss(self.slope * x, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": mse_loss(self.slope * x, y)}


def points(*xs):  # on the line y = x
    return torch.tensor(xs), torch.tensor(xs)


def test_epoch_loss_is_the_mean_over_all_samples():
    model = LitLine(slope=2.0)
    model.training_step(points(1.0, 2.0, 3.0), 0)  # squared errors 1, 4, 9
    model.training_step(points(4.0), 1)  # squared error 16
    model.on_train_epoch_end()
    # By sample, not by batch: (14 / 3 + 16) / 2 would be wrong.
    assert model.epoch_losses == [pytest.approx((1 + 4 + 9 + 16) / 4)]


def test_each_epoch_has_its_own_mean():
    model = LitLine(slope=2.0)
    for x in (1.0, 3.0):
        model.training_step(points(x), 0)
        model.on_train_epoch_end()
    assert model.epoch_losses == [1.0, 9.0]


def test_validation_has_its_own_losses():
    model = LitLine(slope=2.0)

    model.training_step(points(1.0), 0)
    model.validation_step(points(5.0), 0)
    model.on_validation_epoch_end()
    model.on_train_epoch_end()

    assert model.epoch_history == {"val_loss": [25.0], "loss": [1.0]}
