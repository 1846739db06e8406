"""EarlyStopping and ModelCheckpoint, monitoring the mean training loss and the mean validation loss of each epoch.

    python examples/early_stopping.py

The module's own end hooks already find the epoch in the history. What they log there reaches callbacks in the same
epoch. Nothing is recorded in the sanity check.
"""

import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from epoch_mixin import EpochLossMixin


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.linear(images), labels)

    validation_step = training_step

    def on_train_epoch_end(self):
        self.log("train_mean", self.epoch_losses[-1])

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("val_mean", self.epoch_history["val_loss"][-1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


pl.seed_everything(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
train, val = random_split(digits, [1400, 397])

with tempfile.TemporaryDirectory() as folder:
    stop = EarlyStopping("train_mean", min_delta=0.01, patience=1, check_on_train_epoch_end=True)
    best = ModelCheckpoint(folder, "{epoch}-{val_mean:.3f}", monitor="val_mean", save_on_train_epoch_end=False)
    trainer = pl.Trainer(max_epochs=30, accelerator="cpu", callbacks=[best, stop], logger=False)
    model = LitDigits()
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=128))
    kept = LitDigits.load_from_checkpoint(best.best_model_path)

print("losses:", [round(loss, 3) for loss in model.epoch_losses])
print(f"kept {Path(best.best_model_path).name}, whose val_loss is {kept.epoch_history['val_loss'][-1]:.3f}")
