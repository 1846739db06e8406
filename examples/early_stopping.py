"""EarlyStopping, ModelCheckpoint and ReduceLROnPlateau, fed with the mean loss of each epoch.

    python examples/early_stopping.py

The module's own `on_train_epoch_end` already finds the epoch in `epoch_losses`, and what it logs there reaches all
three in the same epoch. Validation goes the same way, from `epoch_history["val_loss"][-1]`.
"""

import argparse
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
        rate = self.optimizers().param_groups[0]["lr"]
        self.print(f"epoch {self.current_epoch}: loss {self.epoch_losses[-1]:.4f}, learning rate {rate:g}")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=8.0)  # too high at first, for the scheduler to lower
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-epochs", type=int, default=50)
    args = parser.parse_args()

    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))

    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="train_loss", filename="{epoch}-{train_loss:.4f}")
        trainer = pl.Trainer(
            max_epochs=args.max_epochs,
            accelerator="cpu",
            callbacks=[best, EarlyStopping("train_loss", min_delta=0.005, patience=3)],
            logger=False,
            enable_progress_bar=False,
        )
        model = LitDigits()
        trainer.fit(model, DataLoader(digits, batch_size=32, shuffle=True))

        print(f"stopped after {len(model.epoch_losses)} epochs, the best loss was {min(model.epoch_losses):.4f}")
        kept = LitDigits.load_from_checkpoint(best.best_model_path)
        print(f"kept {Path(best.best_model_path).name}, which ends with loss {kept.epoch_losses[-1]:.4f}")


if __name__ == "__main__":
    main()
