"""A callback that reads the mean loss of each epoch as it closes, and of all of them at the end.

    python examples/callback.py

Lightning calls `on_train_epoch_end` of a callback before that of the module, which closes the epoch. So there the epoch
is still open: all its steps are made, and `running_epoch_loss()` is its mean, on this process. `epoch_losses`, which
counts all processes, has the epoch in every hook that comes later.
"""

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin


class LossBars(pl.Callback):
    """A bar for each epoch, and which one was the best."""

    def on_train_epoch_end(self, trainer, pl_module):
        loss = pl_module.running_epoch_loss().item()
        print(f"epoch {trainer.current_epoch:2}  {loss:.4f}  {'#' * round(30 * loss)}")

    def on_train_end(self, trainer, pl_module):
        losses = pl_module.epoch_losses
        best = losses.index(min(losses))
        print(f"best: epoch {best} of {len(losses)}, {losses[best]:.4f}")


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.linear(images), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-epochs", type=int, default=10)
    args = parser.parse_args()

    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))

    trainer = pl.Trainer(
        max_epochs=args.max_epochs,
        accelerator="cpu",
        callbacks=[LossBars()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(LitDigits(), DataLoader(digits, batch_size=32, shuffle=True))


if __name__ == "__main__":
    main()
