"""A checkpoint of another package's model, loaded and trained on with the mixin.

    python examples/third_party_model.py

Subclass the model with the mixin in front. A checkpoint of the original class loads into the subclass. Lightning's
`BoringModel` is the other package's model here.
"""

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
        max_epochs=max_epochs,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )


pl.seed_everything(0)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
halves = DataLoader(images[:, :32], batch_size=256, shuffle=True)

with tempfile.TemporaryDirectory() as folder:
    published = Path(folder) / "published.ckpt"
    runner = quiet_trainer(max_epochs=1)
    runner.fit(BoringModel(), halves)
    runner.save_checkpoint(published)

    model = Tracked.load_from_checkpoint(published)

quiet_trainer(3).fit(model, halves)
print([round(loss, 4) for loss in model.epoch_losses])
