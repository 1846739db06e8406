"""A run that stops in the middle of an epoch and goes on from its last checkpoint.

    python examples/resume.py

The mean of that epoch is exact: it has the steps before the checkpoint and those after the resume. That of
`self.log(on_epoch=True)` has the latter only.
"""

import math
import tempfile

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin

steps = {}  # the size and the loss of the last epoch's steps, to compare with


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.linear(images), labels)
        self.log("logged", loss, on_step=False, on_epoch=True)
        if self.current_epoch == 1:
            steps[self.global_step] = len(labels), loss.item()
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


pl.seed_everything(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
loader = DataLoader(digits, batch_size=64)  # 29 batches
checkpoints = ModelCheckpoint(tempfile.mkdtemp(), every_n_train_steps=10)
settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "callbacks": [checkpoints]}

pl.Trainer(max_steps=45, **settings).fit(LitDigits(), loader)  # stops in the second epoch; saved after step 40
model, trainer = LitDigits(), pl.Trainer(max_steps=58, **settings)
trainer.fit(model, loader, ckpt_path=checkpoints.best_model_path)

exact = math.fsum(size * loss for size, loss in steps.values()) / math.fsum(size for size, _ in steps.values())
print(f"every step of the epoch  {exact:.6f}")
print(f"model.epoch_losses[1]    {model.epoch_losses[1]:.6f}")
print(f"self.log(on_epoch=True)  {trainer.callback_metrics['logged']:.6f}")
