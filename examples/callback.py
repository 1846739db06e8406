"""A callback that reads the mean loss of each epoch when it ends, and the losses of all epochs after training.

    python examples/callback.py

Lightning calls a callback's `on_train_epoch_end` before the module's, where the epoch is added to `epoch_losses`. So a
callback reads the mean of the epoch, on this process, from `running_epoch_loss()`.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin


class LossBars(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        loss = pl_module.running_epoch_loss().item()
        print(f"epoch {trainer.current_epoch}  {loss:.2f}  {'#' * round(30 * loss)}")

    def on_train_end(self, trainer, pl_module):
        losses = pl_module.epoch_losses
        best = losses.index(min(losses))
        print(f"best: epoch {best} of {len(losses)}, {losses[best]:.2f}")


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.linear(images), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


pl.seed_everything(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
trainer = pl.Trainer(
    max_epochs=3,
    accelerator="cpu",
    callbacks=[LossBars()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(LitDigits(), DataLoader(digits, batch_size=32, shuffle=True))
