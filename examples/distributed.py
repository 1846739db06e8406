"""Two processes on a CPU that share the handwritten digits unequally: one mean, over all samples of both.

    python examples/distributed.py

The processes are spawned, and nothing that they did to their copies of the model reaches the one that called `fit`:
nothing but the weights, and the history.
"""

import argparse
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
        self.steps = []  # batch size and loss of this epoch's steps on this rank

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.linear(images), labels)
        self.steps.append([len(labels), loss.item()])
        self.log("logged", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self):
        steps = self.all_gather(torch.tensor(self.steps, dtype=torch.float64)).reshape(-1, 2).tolist()
        exact = math.fsum(size * loss for size, loss in steps) / math.fsum(size for size, _ in steps)
        self.print(f"epoch {self.current_epoch}: every step of both {exact:.12f}")
        self.print(f"         epoch_losses[-1]   {self.epoch_losses[-1]:.12f}")
        self.steps.clear()

    def train_dataloader(self):
        images, labels = load_digits(return_X_y=True)
        digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        shard = Subset(digits, range(self.global_rank, 45, self.trainer.world_size))  # 23 samples, and 22
        return DataLoader(shard, batch_size=8, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-epochs", type=int, default=3)
    args = parser.parse_args()

    pl.seed_everything(0)
    model = LitDigits()
    trainer = pl.Trainer(
        max_epochs=args.max_epochs,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        use_distributed_sampler=False,  # the shards are made above
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model)

    print("here, after fit:", model.epoch_losses)
    print(f"self.log(on_epoch=True, sync_dist=True) says of the last epoch: {trainer.callback_metrics['logged']:.12f}")


if __name__ == "__main__":
    main()
