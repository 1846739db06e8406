"""The mean loss of every epoch, training and validation, of a small classifier of handwritten digits.

    python examples/quickstart.py

prints a line per epoch as it ends, then the lists, and saves the curves as `epoch_losses.png`.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from epoch_mixin import EpochLossMixin


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self.net(images), labels))

    def on_train_epoch_end(self):
        loss, val_loss = self.epoch_losses[-1], self.epoch_history["val_loss"][-1]
        self.print(f"epoch {self.current_epoch}: loss {loss:.4f}, val_loss {val_loss:.4f}")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-epochs", type=int, default=10)
    parser.add_argument("--plot", type=Path, default="epoch_losses.png", help="where to save the curves")
    args = parser.parse_args()

    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = random_split(digits, [1400, 397], generator=torch.Generator().manual_seed(0))

    model = LitDigits()
    trainer = pl.Trainer(max_epochs=args.max_epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=256))

    print("loss    ", [round(loss, 4) for loss in model.epoch_losses])
    print("val_loss", [round(loss, 4) for loss in model.epoch_history["val_loss"]])
    figure, _ = model.plot_epoch_losses()
    figure.savefig(args.plot)
    print("saved the curves as", args.plot.resolve())


if __name__ == "__main__":
    main()
