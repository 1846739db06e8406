"""A module of another package, which is made by a factory and only logs its validation loss.

    python examples/existing_module.py

Subclass the module with the mixin in front, and give the subclass to the factory. With scvi-tools:

    class Plan(EpochLossMixin, scvi.train.TrainingPlan): ...

    class TrackedSCVI(scvi.model.SCVI):
        _training_plan_cls = Plan
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from epoch_mixin import EpochLossMixin


class TheirModule(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("validation_loss", self.step(batch))


class TheirFactory:
    module_class = TheirModule

    def train(self, train, val):
        self.module = self.module_class()
        self.trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
        self.trainer.fit(self.module, DataLoader(train, batch_size=100), DataLoader(val, batch_size=100))


class Tracked(EpochLossMixin, TheirModule):
    pass


class Factory(TheirFactory):
    module_class = Tracked


pl.seed_everything(0)
images = torch.tensor(load_digits().data[:, :32] / 16, dtype=torch.float32)
factory = Factory()
factory.train(images[:1250], images[1250:])

for name, logged in (("loss", "train_loss"), ("val_loss", "validation_loss")):
    losses = [round(loss, 4) for loss in factory.module.epoch_history[name]]
    print(f"{name}: {losses}; they logged for the last epoch: {factory.trainer.callback_metrics[logged]:.4f}")
