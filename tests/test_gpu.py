"""What only a GPU shows. It is skipped where there is none."""

import math
from contextlib import suppress

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin
from tests.helpers import close, epoch_means, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

X = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def loader(batch_size=32):
    return DataLoader(TensorDataset(X, Y), batch_size)


class Plain(pl.LightningModule):
    """Notes its losses on the device."""

    notes = True

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        self.steps, self.val_steps = [], []

    def loss(self, batch, noted):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.notes and not self.trainer.sanity_checking:
            noted.append((self.current_epoch, loss.detach().clone(), len(batch[0])))
        return loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch, self.steps)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch, self.val_steps))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tracked(EpochLossMixin, Plain):
    pass


def gpu_trainer(**options):
    return trainer(**{"accelerator": "gpu", **options})


def expected(steps):
    return close(epoch_means([(epoch, loss.item(), size) for epoch, loss, size in steps]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"])
def test_the_history_is_exact_in_every_precision(precision):
    model = Tracked()
    gpu_trainer(max_epochs=3, precision=precision, accumulate_grad_batches=3).fit(model, loader(), loader(48))
    assert model.epoch_history == {"loss": expected(model.steps), "val_loss": expected(model.val_steps)}


def test_the_weights_are_the_same_bit_for_bit():
    weights = []
    for cls in (Plain, Tracked):
        torch.manual_seed(2)
        model = cls()
        gpu_trainer().fit(model, loader(), loader())
        weights.append(torch.cat([part.flatten().cpu() for part in model.parameters()]))
    assert torch.equal(*weights)


WEIGHTS = {
    "default": EpochLossMixin.epoch_loss_weight,
    "number": lambda self, batch: 3,
    "tensor on the GPU": lambda self, batch: batch[1].sum(),
    "tensor on the CPU": lambda self, batch: torch.tensor(3.0),
}


@pytest.fixture
def errors_at_a_synchronisation():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("logs", [False, True], ids=["returned", "logged"])
def test_steps_do_not_synchronise_with_the_device(weight, logs, errors_at_a_synchronisation):
    class Model(EpochLossMixin, pl.LightningModule):
        epoch_loss_weight = WEIGHTS[weight]

        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(32, 2)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            if not logs:
                return loss
            self.log("train_loss", loss, batch_size=7)

    model, batch = Model().cuda(), (X[:32].cuda(), Y[:32].cuda())
    value = model.training_step(batch, 0)  # outside: cuBLAS synchronises at its first call
    errors_at_a_synchronisation()
    for batch_idx in range(700):
        model.training_step(batch, batch_idx)
    running = model.running_epoch_loss()
    torch.cuda.set_sync_debug_mode("default")
    assert logs or running.item() == close(value.item())


def test_a_fit_does_not_synchronise_in_its_steps(errors_at_a_synchronisation):
    class Strict(pl.Callback):
        def on_train_batch_start(self, *_):
            errors_at_a_synchronisation()

        def on_train_batch_end(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    model = Tracked()
    model.notes = False
    gpu_trainer(callbacks=[Strict()], limit_val_batches=0).fit(model, loader())
    assert len(model.epoch_losses) == 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the latter replays CUDA graphs
@pytest.mark.parametrize("part", ["module", "network"])
def test_a_compiled_model_is_recorded(mode, part):
    steps = []

    class Witness(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            steps.append((trainer.current_epoch, outputs["loss"].detach().clone(), len(batch[0])))

    torch._dynamo.reset()
    model = Tracked()
    model.notes = False
    if part == "network":
        model.net = torch.compile(model.net, mode=mode)
    compiled = torch.compile(model, mode=mode) if part == "module" else model
    gpu_trainer(limit_val_batches=0, callbacks=[Witness()]).fit(compiled, loader())
    assert model.epoch_losses == expected(steps)


def test_a_resume_in_mid_epoch_is_exact(tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 47:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                raise KeyboardInterrupt

    cut, again = Tracked(), Tracked()
    with suppress(KeyboardInterrupt, SystemExit):  # according to the version of Lightning
        gpu_trainer(max_epochs=3, callbacks=[Stops()]).fit(cut, loader())
    gpu_trainer(max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert again.epoch_losses == expected(cut.steps[:47] + again.steps)


def test_ranks_communicate_over_nccl():
    model = Tracked()
    try:
        gpu_trainer(strategy="ddp").fit(model, loader(), loader())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert model.epoch_history == {"loss": expected(model.steps), "val_loss": expected(model.val_steps)}


def test_memory_does_not_grow_with_the_steps_and_a_step_starts_few_kernels():
    loss = torch.ones((), device="cuda", requires_grad=True).square()

    class Model(EpochLossMixin, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return loss

    model, batch = Model(), (torch.ones(8, 4, device="cuda"),)
    model.training_step(batch, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for batch_idx in range(1024):
            model.training_step(batch, batch_idx)
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profile.key_averages() if event.key.startswith("cudaLaunchKernel"))
    assert 0 < kernels <= 3 * 1024
    before = torch.cuda.memory_allocated()
    for batch_idx in range(20_000):
        model.training_step(batch, batch_idx)
    assert torch.cuda.memory_allocated() - before < 1_000_000
    model.on_train_epoch_end()
    assert model.epoch_losses == [1.0] and math.isnan(model.running_epoch_loss())
