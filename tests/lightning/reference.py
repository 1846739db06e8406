"""A model that keeps its own account of what happens to it: a reference that owes nothing to the mixin."""

import math
from functools import partial
from itertools import chain
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin
from tests.helpers import mean


class Reference(pl.LightningModule):
    """Notes every step and every epoch hook, and saves the notes in its checkpoints.

    The loss has chance in it, so that a step which is made again after a resume is told from the first one.
    """

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        # (what, epoch, batches of training, validation runs ended), and of steps also the loss and the weight
        self.notes = []
        self.runs = 0

    def note(self, what, *loss_and_weight):
        if not self.trainer.sanity_checking:
            batches = self.trainer.fit_loop.total_batch_idx
            self.notes.append((what, self.current_epoch, batches, self.runs, *loss_and_weight))

    def loss(self, batch):
        (x,) = batch
        return self.layer(x).square().mean() + torch.rand(())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.note("train step", loss.item(), len(batch[0]))
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.note("val step", loss.item(), len(batch[0]))
        return loss

    def test_step(self, batch, batch_idx):
        return self.loss(batch)

    def predict_step(self, batch, batch_idx):
        return self.loss(batch)

    def on_train_epoch_start(self):
        self.note("train epoch")

    def on_train_epoch_end(self):
        self.note("train epoch")

    def on_validation_epoch_end(self):
        self.runs += not self.trainer.sanity_checking

    def on_save_checkpoint(self, checkpoint):
        notes = [self.notes] * self.trainer.world_size
        if len(notes) > 1:
            torch.distributed.all_gather_object(notes, self.notes)
        checkpoint["reference"] = {"notes": list(chain(*notes)), "runs": self.runs}

    def on_load_checkpoint(self, checkpoint):
        self.runs = checkpoint["reference"]["runs"]
        # The notes of all ranks go on where the first one's do.
        attached = self._trainer is not None
        self.notes = [] if attached and self.trainer.global_rank else list(checkpoint["reference"]["notes"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Tracked(EpochLossMixin, Reference):
    pass


def loader(samples=11, batch_size=3):
    """By default batches of 3, 3, 3 and 2."""
    return DataLoader(TensorDataset(torch.randn(samples, 3)), batch_size)


def expected_history(notes):
    """The history that the notes of a finished fit add up to.

    An epoch counts if Lightning called one of its hooks: after some resumes it passes an epoch by without a step.
    """
    epochs = 1 + max((note[1] for note in notes if note[0].startswith("train")), default=-1)
    losses = [[note[4:] for note in notes if note[:2] == ("train step", epoch)] for epoch in range(epochs)]
    runs = {}
    for note in notes:
        if note[0] == "val step":
            runs.setdefault(note[1:4], []).append(note[4:])
    return {"loss": [mean(rows) if rows else math.nan for rows in losses], "val_loss": list(map(mean, runs.values()))}


def assert_exact(history, *notes):
    """Assert that a history is what the notes of each fit add up to, one fit after the other."""
    fits = [expected_history(part) for part in notes]
    for name in ("loss", "val_loss"):
        expected = torch.tensor([loss for fit in fits for loss in fit[name]], dtype=torch.float64)
        actual = torch.tensor(history.get(name, []), dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0, equal_nan=True, msg=f"{name}: {{}}".format)


def assert_history(model):
    assert_exact(model.epoch_history, model.notes)


class SaveEverywhere(pl.Callback):
    """Saves a checkpoint in every hook of a fit, and notes which each is."""

    hooks = (
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_train_end",
    )

    def __init__(self, root, hooks=hooks):
        self.root = Path(root)
        self.saved = {}
        for hook in hooks:
            setattr(self, hook, partial(self.save, hook))

    def save(self, hook, trainer, *args, **kwargs):
        if not trainer.sanity_checking:
            path = self.root / f"{len(self.saved):03}.ckpt"
            trainer.save_checkpoint(path)
            self.saved[path] = f"{hook}, epoch {trainer.current_epoch}, step {trainer.global_step}"
