"""How to test the epoch losses of your own module: no Trainer, no mocks, no data.

    pytest examples/test_my_model.py

Without a Trainer the steps and hooks that you call yourself are what is recorded.
"""

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from epoch_mixin import EpochLossMixin


# In your project this stands in its own file, and the test imports it.
class LitLine(EpochLossMixin, pl.LightningModule):
    def __init__(self, slope):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.slope * x, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": F.mse_loss(self.slope * x, y)}


def points(*xs):
    """Points on the line y = x."""
    return torch.tensor(xs), torch.tensor(xs)


def test_epoch_loss_is_the_mean_over_all_samples():
    model = LitLine(slope=2.0)

    model.training_step(points(1.0, 2.0, 3.0), 0)  # squared errors 1, 4, 9
    model.training_step(points(4.0), 1)  # squared error 16
    model.on_train_epoch_end()

    # By sample, not by batch: (14 / 3 + 16) / 2 would be wrong.
    assert model.epoch_losses == [pytest.approx((1 + 4 + 9 + 16) / 4)]


def test_each_epoch_starts_afresh():
    model = LitLine(slope=2.0)

    for x in (1.0, 3.0):
        model.training_step(points(x), 0)
        model.on_train_epoch_end()

    assert model.epoch_losses == [1.0, 9.0]


def test_validation_is_apart_from_training():
    model = LitLine(slope=2.0)

    model.training_step(points(1.0), 0)
    model.validation_step(points(5.0), 0)
    model.on_validation_epoch_end()
    model.on_train_epoch_end()

    assert model.epoch_history == {"val_loss": [25.0], "loss": [1.0]}
