"""What the usual recipes for an epoch's mean training loss return, beside the exact mean and `epoch_losses`.

    python tests/benchmarks/recipes_compared.py 2>/dev/null

Each recipe trains a small classifier of handwritten digits that also keeps the loss of every step. The exact mean is
`math.fsum` over these losses, weighted by batch size. It uses neither Lightning nor this package.
"""

import math
import platform
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchmetrics
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from epoch_mixin import EpochLossMixin

EPOCHS = 2


class LitDigits(EpochLossMixin, pl.LightningModule):
    def __init__(self, samples=203, **log):
        super().__init__()
        self.linear = torch.nn.Linear(64, 10)
        images, labels = load_digits(return_X_y=True)
        digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        self.digits = Subset(digits, range(samples))
        self.log_arguments = log
        self.steps = {}  # (epoch, batch size, loss) by number; a step made again after a resume counts once

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.linear(images), labels)
        number = self.trainer.fit_loop.total_batch_idx
        self.steps[number] = (self.current_epoch, len(labels), loss.item())
        self.log("train_loss", loss, **self.log_arguments)
        return loss

    def train_dataloader(self):
        return DataLoader(self.digits, batch_size=16, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def quiet_trainer(**arguments):
    return pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def exact_mean(steps):
    """The mean of the last epoch's losses, weighted by batch size."""
    last = [(size, loss) for epoch, size, loss in steps if epoch == EPOCHS - 1]
    return math.fsum(size * loss for size, loss in last) / math.fsum(size for size, _ in last)


# Each recipe gives what it returned for the last epoch, the exact mean, and ours.


def final_logged_metrics():
    """`self.log("train_loss", loss)`, then `trainer.logged_metrics["train_loss"]`"""
    model, runner = LitDigits(), quiet_trainer()
    runner.fit(model)
    return runner.logged_metrics["train_loss"].item(), exact_mean(model.steps.values()), model.epoch_losses[-1]


class AppendLoggedMetrics(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_epoch_end(self, trainer, pl_module):
        if "train_loss" in trainer.logged_metrics:
            self.losses.append(trainer.logged_metrics["train_loss"].item())


def append_logged_metrics(**log):
    """`self.log("train_loss", loss)`, and a callback that appends `logged_metrics["train_loss"]` at each epoch's end"""
    model, callback = LitDigits(**log), AppendLoggedMetrics()
    quiet_trainer(callbacks=[callback]).fit(model)
    returned = callback.losses[-1] if callback.losses else f"`{callback.losses}`"
    return returned, exact_mean(model.steps.values()), model.epoch_losses[-1]


def append_logged_metrics_with_both():
    """the same callback, with `self.log("train_loss", loss, on_step=True, on_epoch=True)`"""
    return append_logged_metrics(on_step=True, on_epoch=True)


class ReadsInTheStep(LitDigits):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        try:
            self.returned = self.trainer.logged_metrics["train_loss"].item()
        except KeyError as error:  # anybody's training would end here; ours goes on for the other columns
            self.returned = f"`{error!r}`"
        return loss


def read_in_the_step():
    """`logged_metrics["train_loss"]` in `training_step`, with `self.log(..., on_step=True, on_epoch=True)`"""
    model = ReadsInTheStep(on_step=True, on_epoch=True)
    quiet_trainer().fit(model)
    return model.returned, exact_mean(model.steps.values()), model.epoch_losses[-1]


def logged_on_epoch():
    """`self.log("train_loss", loss, on_epoch=True)`, then `trainer.callback_metrics["train_loss"]`"""
    model, runner = LitDigits(on_step=False, on_epoch=True), quiet_trainer()
    runner.fit(model)
    return runner.callback_metrics["train_loss"].item(), exact_mean(model.steps.values()), model.epoch_losses[-1]


class Interruption(pl.Callback):
    """Ends the run in the last epoch's middle, after a checkpoint."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == EPOCHS - 1 and batch_idx == 6:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def resumed(*callbacks):
    """The model, all its steps and the Trainer of a fit that is cut off in mid-epoch and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        interrupted = LitDigits(on_step=False, on_epoch=True)
        try:
            quiet_trainer(callbacks=[Interruption(path)]).fit(interrupted)
        except InterruptedError:
            pass
        model, runner = LitDigits(on_step=False, on_epoch=True), quiet_trainer(callbacks=list(callbacks))
        runner.fit(model, ckpt_path=path)
    return model, {**interrupted.steps, **model.steps}, runner


def resumed_in_mid_epoch():
    """the same, resumed from a checkpoint in mid-epoch"""
    model, steps, runner = resumed()
    return runner.callback_metrics["train_loss"].item(), exact_mean(steps.values()), model.epoch_losses[-1]


class MeanMetricCallback(pl.Callback):
    def __init__(self):
        self.losses, self.metric = [], torchmetrics.MeanMetric()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metric.update(outputs["loss"], len(batch[0]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(self.metric.compute().item())
        self.metric.reset()


def mean_metric():
    """a callback that updates a `MeanMetric` with `outputs["loss"]` and the batch size"""
    model, callback = LitDigits(), MeanMetricCallback()
    quiet_trainer(callbacks=[callback]).fit(model)
    return callback.losses[-1], exact_mean(model.steps.values()), model.epoch_losses[-1]


def mean_metric_resumed():
    """the same callback, resumed from a checkpoint in mid-epoch"""
    callback = MeanMetricCallback()
    model, steps, _ = resumed(callback)
    return callback.losses[-1], exact_mean(steps.values()), model.epoch_losses[-1]


def mean_metric_under_accumulation():
    """the same callback, with `accumulate_grad_batches=4`"""
    model, callback = LitDigits(), MeanMetricCallback()
    quiet_trainer(callbacks=[callback], accumulate_grad_batches=4).fit(model)
    return callback.losses[-1], exact_mean(model.steps.values()), model.epoch_losses[-1]


class UnequalRanks(LitDigits):
    def __init__(self, folder):
        super().__init__(samples=45, on_step=False, on_epoch=True, sync_dist=True)
        self.folder = Path(folder)

    def train_dataloader(self):
        mine = range(self.global_rank, len(self.digits), self.trainer.world_size)
        return DataLoader(Subset(self.digits, mine), batch_size=8, shuffle=True)

    def on_train_end(self):
        torch.save(list(self.steps.values()), self.folder / f"steps_{self.global_rank}.pt")


def two_processes():
    """`self.log("train_loss", loss, on_epoch=True, sync_dist=True)`, two processes with 23 and 22 samples"""
    with tempfile.TemporaryDirectory() as folder:
        model = UnequalRanks(folder)
        runner = quiet_trainer(strategy="ddp_spawn", devices=2, use_distributed_sampler=False)
        runner.fit(model)
        steps = [step for path in Path(folder).iterdir() for step in torch.load(path)]
    return runner.callback_metrics["train_loss"].item(), exact_mean(steps), model.epoch_losses[-1]


RECIPES = [
    final_logged_metrics,
    append_logged_metrics,
    append_logged_metrics_with_both,
    read_in_the_step,
    logged_on_epoch,
    resumed_in_mid_epoch,
    two_processes,
    mean_metric,
    mean_metric_resumed,
    mean_metric_under_accumulation,
]
# These return the mean; in float32, and of the last epoch.
RIGHT = [logged_on_epoch, mean_metric]


def main():
    print("| recipe | it returns | the exact mean | `epoch_losses[-1]` |")
    print("| --- | --- | --- | --- |")
    for recipe in RECIPES:
        pl.seed_everything(0)
        returned, exact, ours = recipe()
        returned = f"{returned:.4f}" if isinstance(returned, float) else returned
        print(f"| {recipe.__doc__} | {returned} | {exact:.4f} | {ours:.4f} |")
    print(
        f"\nMeasured with pytorch-lightning {pl.__version__}, torchmetrics {torchmetrics.__version__},"
        f" torch {torch.__version__}, Python {platform.python_version()}."
    )


if __name__ == "__main__":
    main()
