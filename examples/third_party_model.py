"""A model class of somebody else's package, tracked without a change to it.

    python examples/third_party_model.py

Subclass it with the mixin in front. Its hooks, its checkpoints and its weights stay what they were; a checkpoint of the
original loads, and training goes on from it. Lightning's `BoringModel` stands for the class that you cannot edit.
"""

import argparse
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from epoch_mixin import EpochLossMixin


class Tracked(EpochLossMixin, BoringModel):
    pass


def quiet_trainer(max_epochs):
    return pl.Trainer(
        max_epochs=max_epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-epochs", type=int, default=5)
    args = parser.parse_args()

    pl.seed_everything(0)
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    halves = DataLoader(images[:, :32], batch_size=256, shuffle=True)  # it takes 32 numbers

    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder) / "published.ckpt"
        runner = quiet_trainer(max_epochs=1)
        runner.fit(BoringModel(), halves)
        runner.save_checkpoint(published)

        model = Tracked.load_from_checkpoint(published)

    quiet_trainer(args.max_epochs).fit(model, halves)
    print(model.epoch_losses)


if __name__ == "__main__":
    main()
