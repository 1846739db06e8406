"""Two processes with unequal shares of the data: the mean is that over all samples of both.

    python examples/distributed.py

Lightning spawns the processes. What they set on their copies of the module is lost, the history is not.
"""

import math

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from epoch_mixin import EpochLossMixin


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)
        self.steps = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.linear(batch[0]), batch[1])
        self.log("logged", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.steps.append([len(batch[1]), loss.item()])
        return loss

    def on_train_epoch_end(self):
        steps = self.all_gather(torch.tensor(self.steps, dtype=torch.float64)).reshape(-1, 2).tolist()
        exact = math.fsum(size * loss for size, loss in steps) / math.fsum(size for size, _ in steps)
        self.steps = []
        self.print(f"epoch {self.current_epoch}: epoch_losses[-1] {self.epoch_losses[-1]:.6f}, exact {exact:.6f}")

    def train_dataloader(self):
        images, labels = load_digits(return_X_y=True)
        digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        shard = range(self.global_rank, 45, self.trainer.world_size)  # 23 samples on one process, 22 on the other
        return DataLoader(Subset(digits, shard), batch_size=8, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model := LitDigits())
    print("after fit:", [round(loss, 6) for loss in model.epoch_losses])
    print(f"self.log(on_epoch=True, sync_dist=True), last epoch: {trainer.callback_metrics['logged']:.6f}")
