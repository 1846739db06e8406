from collections import Counter
from functools import partial
from itertools import chain

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin
from tests.helpers import mean, trainer
from tests.lightning.processes import run, run_ranks
from tests.lightning.reference import Reference, SaveEverywhere, Tracked, assert_exact, expected_history


def shard(rank, world_size, samples, batch_size):
    """The rank's part of the same samples: of unequal size where they cannot be shared out evenly."""
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x[rank::world_size]), batch_size)


class Shared(Tracked):
    """Gives a ``"kl"`` on the first rank only and validation losses on the last one only."""

    epoch_loss_keys = ("loss", "kl")

    def training_step(self, batch, batch_idx):
        output = {"loss": super().training_step(batch, batch_idx)}
        if self.trainer.global_rank == 0:
            output["kl"] = torch.rand(())
            self.note("kl", output["kl"].item(), len(batch[0]))
        return output

    def validation_step(self, batch, batch_idx):
        if self.trainer.global_rank == self.trainer.world_size - 1:
            return super().validation_step(batch, batch_idx)
        return None


def fit_on_rank(rank, world_size, path=None, callbacks=()):
    """Fit three epochs; batches of unequal size on every rank, and more validation batches on the last."""
    options = dict(strategy="ddp", use_distributed_sampler=False) if world_size > 1 else {}
    runner = trainer(devices=world_size, max_epochs=3, val_check_interval=3, callbacks=list(callbacks), **options)
    model = Shared()
    validation = shard(0, 1, 3 + 4 * rank, 2)
    runner.fit(model, shard(rank, world_size, 43, 4), validation, ckpt_path=path)
    assert list(model.state_dict()) == list(Reference().state_dict())
    return model.notes, model.epoch_history


def assert_same_exact_history(ranks):
    """Assert that all ranks have the history that the notes of all of them add up to."""
    notes = [note for notes, _ in ranks for note in notes]
    for _, history in ranks:
        assert history == ranks[0][1]
        assert_exact(history, notes)
        kl = [[note[4:] for note in notes if note[:2] == ("kl", epoch)] for epoch in range(len(history["loss"]))]
        assert history["kl"] == pytest.approx(list(map(mean, kl)), rel=1e-9, abs=0)
    return history


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_history_is_that_of_all_ranks(world_size):
    ranks = run_ranks(fit_on_rank, world_size, world_size)
    history = assert_same_exact_history(ranks)
    # With 2 ranks an epoch has 6 batches and two validations, with 3 ranks 4 batches and one.
    assert [len(history[name]) for name in ("loss", "kl", "val_loss")] == [3, 3, {2: 6, 3: 3}[world_size]]
    sizes = [sum(note[5] for note in notes if note[:2] == ("train step", 0)) for notes, _ in ranks]
    assert sum(sizes) == 43 and len(set(sizes)) > 1


class Silent(Tracked):
    """Gives losses on the first rank only, and in its second epoch none at all."""

    def __init__(self):
        super().__init__()
        # Else the ranks wait for each other's gradients.
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == 0 and self.current_epoch != 1:
            return super().training_step(batch, batch_idx)
        return None

    def validation_step(self, batch, batch_idx):
        return None


class Missing(Tracked):
    """May have nothing to validate on one of its ranks, which then passes validation by."""

    def __init__(self):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True


def fit_unevenly_on_rank(rank, cls, val_samples):
    model = cls()
    runner = trainer(devices=2, max_epochs=3, strategy="ddp", use_distributed_sampler=False)
    runner.fit(model, shard(rank, 2, 21, 4), shard(0, 1, val_samples[rank], 2))
    return model.notes, model.epoch_history


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "val_samples"), [(Silent, (5, 3)), (Missing, (5, 0)), (Missing, (0, 5))])
def test_rank_without_losses_holds_no_other_up(cls, val_samples):
    ranks = run_ranks(fit_unevenly_on_rank, 2, cls, val_samples, seconds=30)
    for _, history in ranks:
        assert str(history) == str(ranks[0][1])
        assert_exact(history, list(chain(*(notes for notes, _ in ranks))))


def save_on_rank(rank, root):
    saving = SaveEverywhere(root, ("on_train_batch_end", "on_train_epoch_end"))
    fit_on_rank(rank, 2, callbacks=[saving])
    return saving.saved


def resume_on_rank(rank, world_size, paths):
    return [fit_on_rank(rank, world_size, path) for path in paths]


@pytest.mark.slow
def test_resume_is_exact_with_as_many_ranks_or_another_number(tmp_path):
    saved, _ = run_ranks(save_on_rank, 2, tmp_path)
    paths = list(saved)
    assert len(paths) == 3 * (6 + 1)
    for world_size, some in ((2, paths[1::3]), (3, paths[2::6]), (1, paths[1::6])):
        for ranks in zip(*run_ranks(resume_on_rank, world_size, world_size, some), strict=True):
            assert len(assert_same_exact_history(ranks)["loss"]) == 3


class Plain(Reference):
    """Three losses a step, of which nobody is told."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        return {"loss": loss, "kl": loss.detach() + 1, "l2": loss.detach() + 2}

    validation_step = training_step


class One(EpochLossMixin, Plain):
    pass


class Three(EpochLossMixin, Plain):
    epoch_loss_keys = ("loss", "kl", "l2")


# All functions of torch.distributed that wait for other ranks.
COLLECTIVES = [
    *("barrier", "monitored_barrier", "new_group", "broadcast", "broadcast_object_list", "reduce", "all_reduce"),
    *("gather", "gather_object", "all_gather", "all_gather_object", "all_gather_into_tensor"),
    *("scatter", "scatter_object_list", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single"),
    *("send", "recv", "isend", "irecv"),
]


def counted_fit(cls, steps, hooks, root):
    """The calls of ``torch.distributed``, and of the strategy, in a fit of two epochs, each with a validation."""
    calls = Counter()

    def counted(name, function, *args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    runner = trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=[SaveEverywhere(root, hooks)])
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(torch.distributed, name, partial(counted, name, getattr(torch.distributed, name)))
        patch.setattr(runner.strategy, "all_gather", partial(counted, "strategy", runner.strategy.all_gather))
        # Lightning shares the samples out.
        runner.fit(cls(), shard(0, 1, 4 * steps, 2), shard(0, 1, 4 * steps, 2))
    return calls


def count_on_rank(rank, fits):
    return [counted_fit(*fit) for fit in fits]


@pytest.mark.slow
def test_ranks_communicate_only_when_an_epoch_ends_or_is_saved(tmp_path):
    ways = [(steps, hooks) for steps in (2, 7) for hooks in ((), ("on_train_batch_end",), ("on_train_end",))]
    fits = [(cls, *way, tmp_path) for way in ways for cls in (Plain, One, Three)]
    for rank in run_ranks(count_on_rank, 2, fits):
        for way, plain, one, three in zip(ways, rank[::3], rank[1::3], rank[2::3], strict=True):
            steps, hooks = way
            # Two epochs and two validations have ended; a save in mid-epoch is another time.
            times = 4 + ("on_train_batch_end" in hooks) * 2 * steps
            assert one - plain == three - plain == {"strategy": times, "all_gather": times}, way
            assert plain - one == plain - three == {}, way


class Loop(EpochLossMixin, pl.LightningModule):
    """A model for loops without a Trainer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.noted = []

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.noted.append((loss.item(), len(batch[0])))
        return loss


def loop_on_rank(rank):
    """Without a Trainer: with Fabric, and with nothing. With a Trainer that is not for several ranks."""
    loops = []
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    for wrap in (lambda model: fabric.setup(model, torch.optim.SGD(model.parameters()))[0], lambda model: model):
        model = Loop()
        runner = wrap(model)
        for _ in range(2):
            for batch_idx, batch in enumerate(shard(rank, 2, 21, 4)):
                runner.training_step(batch, batch_idx).backward()
            runner.on_train_epoch_end()
        loops.append((model.noted, model.epoch_losses))
    alone = Tracked()
    trainer(max_epochs=2).fit(alone, shard(rank, 2, 21, 4), shard(rank, 2, 7, 2))
    return loops, (alone.notes, alone.epoch_history)


@pytest.mark.slow
def test_loop_on_several_ranks_reduces_and_a_trainer_of_one_device_does_not():
    ranks = run_ranks(loop_on_rank, 2)
    for loops in zip(*(loops for loops, _ in ranks), strict=True):
        # Batches of 4, 4 and 3 on the first rank, of 4, 4 and 2 on the second.
        epochs = [mean(pair for noted, _ in loops for pair in noted[part]) for part in (slice(3), slice(3, None))]
        for _, losses in loops:
            assert losses == pytest.approx(epochs, rel=1e-9, abs=0)
    for _, (notes, history) in ranks:
        assert_exact(history, notes)


class Writes(Tracked):
    """Leaves the notes of each rank in a file, for nothing but weights returns from a launched process."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def on_fit_start(self):
        self.notes = []

    def on_fit_end(self):
        torch.save(self.notes, self.root / f"notes {self.trainer.global_rank}")

    def read(self):
        return list(chain(*(torch.load(self.root / f"notes {rank}") for rank in range(2))))


def launch(strategy, root, again):
    """Fit with processes that Lightning launches, and assert in this one that all returned; perhaps go on fitting."""
    model = Writes(root)
    losses = model.epoch_losses
    saving = pl.callbacks.ModelCheckpoint(root, "{epoch}", save_top_k=-1)
    runner = trainer(devices=2, strategy=strategy, max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    runner.fit(model, shard(0, 1, 21, 4), shard(0, 1, 7, 2))
    first = model.read()
    assert {len(note) for note in first if note[0] == "train step"} == {6}
    assert len(losses) == 2 and losses is model.epoch_losses
    assert_exact(model.epoch_history, first)
    # A checkpoint has the record in its place, and the weights are the plain model's.
    checkpoint = torch.load(root / "epoch=1.ckpt", weights_only=True)
    assert checkpoint["epoch_mixin"]["history"] == model.epoch_history
    assert list(checkpoint["state_dict"]) == list(model.state_dict()) == list(Reference().state_dict())
    if not again:
        return
    before = {name: list(losses) for name, losses in model.epoch_history.items()}
    runner.validate(model, shard(0, 1, 7, 2))
    runner.test(model, shard(0, 1, 7, 2), ckpt_path=root / "epoch=0.ckpt")
    assert model.epoch_history == before
    options = dict(devices=2, strategy=strategy, use_distributed_sampler=False)
    trainer(max_epochs=1, **options).fit(model, shard(0, 1, 21, 4))
    assert_exact(model.epoch_history, first, model.read())
    # One more epoch after the first checkpoint: the history is rolled back.
    trainer(max_epochs=2, **options).fit(model, shard(0, 1, 21, 4), ckpt_path=root / "epoch=0.ckpt")
    (second,) = expected_history([(what, epoch - 1, *rest) for what, epoch, *rest in model.read()])["loss"]
    assert losses == [before["loss"][0], pytest.approx(second, rel=1e-9, abs=0)]
    assert losses is model.epoch_losses


@pytest.mark.slow
# Spawned processes take seconds to start.
@pytest.mark.parametrize(("strategy", "again"), [("ddp_fork", True), ("ddp_notebook", True), ("ddp_spawn", False)])
def test_the_history_returns_from_launched_processes(tmp_path, strategy, again):
    run(launch, [(strategy, tmp_path, again)])


class LoggedOnAllRanks(Tracked):
    """Logs what Lightning reduces over the ranks when somebody first reads it."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("logged", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)
        self.log("val_logged", loss, sync_dist=True)
        return loss


class ReadsOnRankZero(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.is_global_zero:
            assert trainer.callback_metrics

    on_validation_epoch_end = on_train_epoch_end


def fit_with_callback(rank, callback):
    runner = trainer(devices=2, strategy="ddp", max_epochs=2, enable_progress_bar=True, callbacks=[callback])
    model = LoggedOnAllRanks()
    runner.fit(model, shard(0, 1, 16, 4), shard(0, 1, 8, 4))
    return model.notes, model.epoch_history


@pytest.mark.slow
@pytest.mark.parametrize("callback", [pl.callbacks.TQDMProgressBar(), ReadsOnRankZero()], ids=["bar", "callback"])
def test_a_read_of_synchronized_metrics_on_one_rank_does_not_hang_a_fit(callback):
    # In Lightning such a read is a collective, which the other ranks join when they read the same.
    ranks = run_ranks(fit_with_callback, 2, callback)
    for _, history in ranks:
        assert history == ranks[0][1]
        assert_exact(history, [note for notes, _ in ranks for note in notes])
