"""A module that you may not edit and never make yourself: it only logs its validation loss, and a factory builds it.

    python examples/existing_module.py

Put the mixin in front of the class, and give the result to the factory. For scvi-tools this is all of it:

    class Plan(EpochLossMixin, scvi.train.TrainingPlan): ...

    class TrackedSCVI(scvi.model.SCVI):
        _training_plan_cls = Plan

The two classes below stand for such a package; their module is Lightning's `BoringModel`.
"""

import argparse

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from epoch_mixin import EpochLossMixin


class TheirModule(BoringModel):
    """Somebody else's: its validation returns nothing, and its batch says nothing of the number of samples."""

    def training_step(self, batch, batch_idx):
        loss = self.step(batch["halves"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["halves"]))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("validation_loss", self.step(batch["halves"]), batch_size=len(batch["halves"]))


class TheirFactory:
    """Somebody else's: makes the module and trains it."""

    _training_plan_cls = TheirModule

    def train(self, images, max_epochs):
        self.plan = self._training_plan_cls()
        self.trainer = pl.Trainer(max_epochs=max_epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
        train, val = (
            DataLoader(part, batch_size=100, collate_fn=self.collate) for part in (images[:1250], images[1250:])
        )
        self.trainer.fit(self.plan, train, val)

    @staticmethod
    def collate(images):
        return {"size": torch.tensor([8, 4]), "halves": torch.stack(images)[:, :32]}


class Tracked(EpochLossMixin, TheirModule):
    pass


class Factory(TheirFactory):
    _training_plan_cls = Tracked


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-epochs", type=int, default=5)
    args = parser.parse_args()

    pl.seed_everything(0)
    factory = Factory()
    factory.train(torch.tensor(load_digits().data / 16, dtype=torch.float32), args.max_epochs)

    history, theirs = factory.plan.epoch_history, factory.trainer.callback_metrics
    print("loss    ", history["loss"])
    print("val_loss", history["val_loss"])
    print(f"last epoch, train: theirs {theirs['train_loss']:.6f}, ours {history['loss'][-1]:.6f}")
    print(f"last epoch, val:   theirs {theirs['validation_loss']:.6f}, ours {history['val_loss'][-1]:.6f}")


if __name__ == "__main__":
    main()
