"""EarlyStopping and ModelCheckpoint, monitoring the mean loss of each epoch.

    python examples/early_stopping.py

The module's own `on_train_epoch_end` already finds the epoch in `epoch_losses`. What it logs there reaches callbacks
and schedulers in the same epoch. Validation works the same way, with `epoch_history["val_loss"][-1]`.
"""

import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.linear(images), labels)

    def on_train_epoch_end(self):
        self.log("train_loss", self.epoch_losses[-1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


pl.seed_everything(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))

with tempfile.TemporaryDirectory() as folder:
    stop = EarlyStopping("train_loss", min_delta=0.01, patience=1, check_finite=True)
    best = ModelCheckpoint(folder, monitor="train_loss", filename="{epoch}-{train_loss:.3f}")
    trainer = pl.Trainer(
        max_epochs=30, accelerator="cpu", callbacks=[best, stop], logger=False, enable_progress_bar=False
    )
    model = LitDigits()
    trainer.fit(model, DataLoader(digits, batch_size=32, shuffle=True))
    kept = LitDigits.load_from_checkpoint(best.best_model_path)

print("losses:", [round(loss, 3) for loss in model.epoch_losses])
print(f"kept {Path(best.best_model_path).name}, whose last loss is {kept.epoch_losses[-1]:.3f}")
