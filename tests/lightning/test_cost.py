import gc
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, TensorDataset

import epoch_mixin
from epoch_mixin import EpochLossMixin
from tests.helpers import lazy_device, trainer
from tests.test_cost import HostReads, Operators

STEPS = 1000
PACKAGE = Path(epoch_mixin.__file__).parent


class Plain(pl.LightningModule):
    keys = ("loss",)
    device_of_losses = "cpu"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def losses(self, batch):
        loss = (batch[0].sum() * self.scale).square().to(self.device_of_losses)
        return {key: loss if key == "loss" else loss.detach() for key in self.keys}

    def training_step(self, batch, batch_idx):
        return self.losses(batch)

    def validation_step(self, batch, batch_idx):
        return self.losses(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class PlainTwoKeys(Plain):
    keys = ("loss", "kl")


class Recorded(EpochLossMixin, Plain):
    pass


class RecordedTwoKeys(EpochLossMixin, PlainTwoKeys):
    epoch_loss_keys = ("loss", "kl")


def fit(model, steps, val_steps=0, epochs=1, **options):
    loaders = [DataLoader(TensorDataset(torch.ones(n, 1)), batch_size=1) if n else None for n in (steps, val_steps)]
    trainer(max_epochs=epochs, num_sanity_val_steps=0, **options).fit(model, *loaders)


def operators(model, steps, val_steps):
    with Operators() as counted:
        fit(model, steps, val_steps)
    return counted.counts.total()


@pytest.mark.parametrize(("steps", "val_steps"), [(STEPS, 0), (1, STEPS)], ids=["train", "val"])
def test_recording_a_step_in_a_fit_takes_at_most_three_operators(steps, val_steps):
    bare, ours = operators(Plain(), steps, val_steps), operators(Recorded(), steps, val_steps)
    assert 0 < ours - bare <= 3 * STEPS


@pytest.mark.parametrize(("bare", "ours"), [(Plain, Recorded), (PlainTwoKeys, RecordedTwoKeys)])
def test_a_fit_reads_a_device_once_an_epoch_and_stage_for_two_numbers_a_key(bare, ours):
    reads = []
    for model in (bare(), ours()):
        model.device_of_losses = lazy_device()
        with HostReads() as seen, Operators() as counted:
            fit(model, 100, 100, epochs=3)
        reads.append((len(seen.sizes), sum(seen.sizes), counted.counts["_local_scalar_dense"]))
    looks, numbers, scalars = (after - before for before, after in zip(*reads))
    assert (looks, numbers, scalars) == (3 * 2, 3 * 2 * 2 * len(ours.keys), 0)


def calls_of_ours(model, loader, batch_idx):
    """The functions of the package that run in one step of a fit."""
    calls = []

    def profile(frame, event, arg):
        if event == "call" and Path(frame.f_code.co_filename).parent == PACKAGE:
            calls.append(frame.f_code.co_qualname)

    class Profiled(pl.Callback):
        def on_train_batch_start(self, _, module, batch, index):
            sys.setprofile(profile if index == batch_idx else None)

        def on_train_batch_end(self, _, module, outputs, batch, index):
            sys.setprofile(None)

    trainer(max_epochs=1, callbacks=[Profiled()]).fit(model, loader)
    return calls


@pytest.mark.parametrize("inherited", [False, True], ids=["own step", "inherited step"])
@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
def test_the_usual_step_makes_at_most_seven_calls_of_ours(inherited, as_tuple):
    class Own(EpochLossMixin, Plain):
        def training_step(self, batch, batch_idx):
            return (batch[0].sum() * self.scale).square()

    class Inherited(Own):
        pass

    model = (Inherited if inherited else Own)()
    samples = TensorDataset(torch.ones(20, 1)) if as_tuple else torch.ones(20, 1)
    calls = calls_of_ours(model, DataLoader(samples, batch_size=2), 5)
    assert 0 < len(calls) <= 7, calls


class Alive(pl.Callback):
    """How many tensors there are when each epoch begins."""

    def __init__(self):
        self.counts = []

    def on_train_epoch_start(self, _, module):
        gc.collect()
        self.counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))


def test_an_epoch_leaves_no_tensor_behind():
    alive = Alive()
    fit(RecordedTwoKeys(), 100, 100, epochs=4, callbacks=[alive])
    first, *later = alive.counts[1:]
    assert max(later) <= first


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_fit_of_a_compiled_module_makes_at_most_one_more_graph(fullgraph):
    graphs = []
    for model, steps in ((Plain(), 2), (Recorded(), 2), (Recorded(), 200)):
        torch._dynamo.reset()
        counter = CompileCounter()
        fit(torch.compile(model, backend=counter, fullgraph=fullgraph), steps)
        graphs.append(counter.frame_count)
    bare, few, many = graphs
    assert bare <= few <= bare + 1
    assert many == few
    assert len(model.epoch_losses) == 1
