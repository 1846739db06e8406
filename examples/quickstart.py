"""The mean loss of every epoch, training and validation, of a small classifier of handwritten digits.

    python examples/quickstart.py

It prints both lists and saves the curves as `epoch_losses.png`.
"""

import pytorch_lightning as pl  # or: import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from epoch_mixin import EpochLossMixin


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self, lr=3e-3):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


pl.seed_everything(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
train_loader, val_loader = (DataLoader(part, batch_size=32) for part in random_split(digits, [1400, 397]))

model = LitDigits()
trainer = pl.Trainer(max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, train_loader, val_loader)

print("loss:    ", [round(loss, 2) for loss in model.epoch_losses])
print("val_loss:", [round(loss, 2) for loss in model.epoch_history["val_loss"]])
figure, axes = model.plot_epoch_losses()
figure.savefig("epoch_losses.png")
