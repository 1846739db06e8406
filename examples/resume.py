"""A run that is interrupted in the middle of an epoch and goes on from its last checkpoint.

    python examples/resume.py

The epoch in which it happened has its exact mean all the same: over the steps before the checkpoint and those after the
resume. `self.log(on_epoch=True)` knows the latter only.
"""

import math
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin

# Epoch, batch size and loss of every step, by its number: a step that is made again after the resume counts once.
steps = {}


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.linear(images), labels)
        self.log("logged", loss, on_step=False, on_epoch=True)
        steps[self.global_step] = (self.current_epoch, len(labels), loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class PowerCut(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 18:
            raise InterruptedError


def checkpointing_trainer(folder, *callbacks):
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=10)
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[*callbacks, checkpoints],
        logger=False,
        enable_progress_bar=False,
    )


def main():
    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    batches = DataLoader(digits, batch_size=64, shuffle=True)

    with tempfile.TemporaryDirectory() as folder:
        interrupted = checkpointing_trainer(folder, PowerCut())
        try:
            interrupted.fit(LitDigits(), batches)
        except InterruptedError:
            print(f"power cut after {interrupted.global_step} of {2 * len(batches)} steps")
        checkpoint = interrupted.checkpoint_callback.best_model_path
        print("going on from", Path(checkpoint).name)

        model, resumed = LitDigits(), checkpointing_trainer(folder)
        resumed.fit(model, batches, ckpt_path=checkpoint)

    last = [(size, loss) for epoch, size, loss in steps.values() if epoch == 1]
    exact = math.fsum(size * loss for size, loss in last) / math.fsum(size for size, _ in last)
    print(f"every step of the epoch   {exact:.12f}")
    print(f"model.epoch_losses[1]     {model.epoch_losses[1]:.12f}")
    print(f"self.log(on_epoch=True)   {resumed.callback_metrics['logged']:.12f}")


if __name__ == "__main__":
    main()
