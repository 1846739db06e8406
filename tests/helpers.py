"""What the tests share: a tiny model that notes every loss it makes, and exact means to hold the mixin's against."""

import functools
import math
import types

import pytest
import pytorch_lightning as pl
import torch
import torch._lazy.ts_backend
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin


class Net(pl.LightningModule):
    """Least squares, without the mixin. ``steps`` and ``val_steps`` are what it noted: (epoch, loss, batch size)."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.steps = []
        self.val_steps = []

    def loss(self, batch):
        x, y = batch
        return (self.layer(x) - y).square().mean()

    def noted_loss(self, batch):
        loss = self.loss(batch)
        self.steps.append((self.current_epoch, loss.item(), len(batch[0])))
        return loss

    def training_step(self, batch, batch_idx):
        return self.noted_loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        if not self.trainer.sanity_checking:
            self.val_steps.append((self.current_epoch, loss.item(), len(batch[0])))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Tracked(EpochLossMixin, Net):
    pass


class Witness(pl.Callback):
    """Notes, as `Net` does, the step outputs that Lightning was given. They are raw only without accumulation."""

    def __init__(self):
        self.steps = []
        self.val_steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append((trainer.current_epoch, outputs["loss"].item(), len(batch[0])))

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.val_steps.append((trainer.current_epoch, outputs.item(), len(batch[0])))


def data(samples=23, dtype=torch.float32):
    """Samples whose losses grow along the way, so that a mean which forgets a weight or a step is far off."""
    x = torch.randn(samples, 4, dtype=dtype)
    y = torch.linspace(0, 5, samples, dtype=dtype).square().unsqueeze(1)
    return TensorDataset(x, y)


def loader(samples=23, batch_size=5, dtype=torch.float32):
    """By default batches of 5, 5, 5, 5 and 3."""
    return DataLoader(data(samples, dtype), batch_size)


def trainer(**options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 2, **quiet, **options})


def fit(model, *loaders, **options):
    """Fit the model, by default for two epochs, and return its trainer."""
    runner = trainer(**options)
    runner.fit(model, *(loaders or (loader(),)))
    return runner


def mean(pairs):
    """The exact mean of (loss, weight) pairs."""
    pairs = list(pairs)
    return math.fsum(loss * weight for loss, weight in pairs) / math.fsum(weight for _, weight in pairs)


def epoch_means(steps):
    """The exact mean of each epoch of (epoch, loss, weight) triples."""
    return [mean(step[1:] for step in steps if step[0] == epoch) for epoch in sorted({step[0] for step in steps})]


def close(expected, rel=1e-9):
    return pytest.approx(expected, rel=rel, abs=0)


def messages(warned, owner):
    """The warnings, as pytest's ``recwarn`` caught them, that speak of the class ``owner``."""
    return [text for text in (str(warning.message) for warning in warned) if text.startswith(owner)]


@functools.cache
def lazy_device():
    """A device other than the CPU, in any build of torch: its tensors compute nothing until somebody reads them."""
    torch._lazy.ts_backend.init()
    return torch.device("lazy")


class Decorator:
    """A decorator that is a class, bound as its subclass says."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class BoundAsMethod(Decorator):
    def __get__(self, instance, owner=None):
        return self if instance is None else types.MethodType(self, instance)
