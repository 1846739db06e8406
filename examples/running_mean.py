"""The mean so far of the open epoch, in the step and on the progress bar.

    python examples/running_mean.py

Some of the images are far too bright here. The step skips a batch whose loss is three times the mean so far. It returns
no loss for such a batch, so that the mean of the epoch does not count it. The progress bar shows the mean with the step
that has just ended, so it is logged in `on_train_batch_end`.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)
        self.skipped = 0

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.linear(images), labels)

        if loss > 3 * self.running_epoch_loss():  # of the steps before this one; NaN in the first
            self.skipped += 1
            return None
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("mean_loss", self.running_epoch_loss(), prog_bar=True)

    def on_train_epoch_end(self):
        self.print(f"epoch {self.current_epoch}: loss {self.epoch_losses[-1]:.2f}, batches skipped: {self.skipped}")
        self.skipped = 0

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


pl.seed_everything(0)
images, labels = load_digits(return_X_y=True)
images[::300] *= 1e5
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))

model = LitDigits()
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, DataLoader(digits, batch_size=32, shuffle=True))
print([round(loss, 2) for loss in model.epoch_losses])
