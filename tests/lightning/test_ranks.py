"""No rank waits for ever, and none is forgotten: what each may do that the others do not."""

import contextlib
import inspect
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric

from epoch_mixin import EpochLossMixin
from tests.helpers import close, mean, trainer
from tests.lightning.processes import run, run_ranks
from tests.lightning.reference import Reference, Tracked, assert_exact
from tests.lightning.test_distributed import Loop, Writes, shard


def fit_on_rank(rank, model, samples=(21, 21), val_samples=(7, 7), ckpt_path=None, **options):
    """Fit two epochs in batches of 2 on two ranks, each with so many samples of its own."""
    runner = trainer(devices=2, strategy="ddp", use_distributed_sampler=False, **options)
    runner.fit(model, shard(0, 1, samples[rank], 2), shard(0, 1, val_samples[rank], 2), ckpt_path=ckpt_path)
    return runner


def assert_all_have_the_history(ranks):
    for _, history in ranks:
        assert str(history) == str(ranks[0][1])
        # The runs of an epoch in their order, whichever rank had more of them.
        assert_exact(history, sorted(chain(*(notes for notes, _ in ranks)), key=lambda note: note[1:4]))
    return ranks[0][1]


class Local(Tracked):
    """Does not wait for the other ranks' gradients, nor do its validations come at the same time on all ranks."""

    def __init__(self, pause=(0, 0)):
        super().__init__()
        self.automatic_optimization = False
        self.pause = pause

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause[self.trainer.global_rank])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.runs_before = self.runs
        super().on_train_epoch_start()

    # `Reference` tells validations apart by the step, which is not the same on all ranks: here by their number in the
    # epoch.
    def note(self, what, *loss_and_weight):
        super().note(what, *loss_and_weight)
        if self.notes and self.notes[-1][0].startswith("val"):
            what, epoch, _, runs, *rest = self.notes.pop()
            self.notes.append((what, epoch, 0, runs - self.runs_before, *rest))


def validate_by_the_clock(rank, pause, seconds, sanity):
    model = Local(pause)
    options = dict(val_check_interval={"seconds": seconds}, num_sanity_val_steps=sanity, check_val_every_n_epoch=None)
    fit_on_rank(rank, model, **options)
    return model.notes, model.epoch_history


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(trainer(), "_val_check_time_interval"), reason="came with a later Lightning")
@pytest.mark.parametrize(
    ("pause", "seconds", "sanity"), [((0.002, 0.03), 0.01, 2), ((0.03, 0.002), 0.3, 0)], ids=["often", "seldom"]
)
def test_validation_by_the_clock(pause, seconds, sanity):
    ranks = run_ranks(validate_by_the_clock, 2, pause, seconds, sanity, seconds=30)
    history = assert_all_have_the_history(ranks)
    assert len(history["loss"]) == 2
    assert len(history["val_loss"]) >= max(notes[-1][3] for notes, _ in ranks) > 0


def fit_keys_on_rank(rank, keys, weights):
    """Each rank records keys of its own, and gives ``rank + 1`` for each of them."""

    class Keys(Reference):
        def training_step(self, batch, batch_idx):
            self.note("train step", rank + 1, len(batch[0]))
            return {"loss": self.loss(batch)} | dict.fromkeys(keys[rank], torch.tensor(rank + 1.0))

        def validation_step(self, batch, batch_idx):
            return dict.fromkeys(keys[rank], rank + 1)

    class Recorded(EpochLossMixin, Keys):
        epoch_loss_keys = keys[rank]

        def epoch_loss_weight(self, batch):
            return weights[rank]

    model = Recorded()
    fit_on_rank(rank, model)
    return model.epoch_history


MANY = tuple(f"{'key' * 20} {i}" for i in range(150))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "weights", "means"),
    [
        ((("a",), ("b",)), (1, 1), {"a": 1, "b": 2}),
        ((("a", "b"), ("b", "a")), (1, 3), {"a": 1.75, "b": 1.75}),
        ((("a", "b", "c"), ("b",)), (1, 1), {"a": 1, "b": 1.5, "c": 1}),
        ((MANY, MANY), (1, 1), dict.fromkeys(MANY, 1.5)),
        ((("a",), MANY), (1, 1), {"a": 1, **dict.fromkeys(MANY, 2)}),
        (
            (("Verlust \N{GREEK SMALL LETTER OMEGA} \0",), ("a",)),
            (1, 1),
            {"Verlust \N{GREEK SMALL LETTER OMEGA} \0": 1, "a": 2},
        ),
    ],
    ids=["apart", "another order", "some", "many", "one and many", "any character"],
)
def test_ranks_that_record_different_keys(keys, weights, means):
    for history in run_ranks(fit_keys_on_rank, 2, keys, weights, seconds=30):
        assert history.keys() == means.keys() | {"val_" + key for key in means}
        for key, value in means.items():
            assert history[key] == history["val_" + key] == close([value] * 2)


class Fails(Tracked):
    """Raises on the first rank, and on the second as soon as that has left a checkpoint."""

    def __init__(self, error, step, root):
        super().__init__()
        self.failure = error, step
        self.root = root

    def fail(self, step):
        error, failing = self.failure
        if step == failing and self.current_epoch == 1 and self.global_step > 16:
            deadline = time.monotonic() + 10
            while self.trainer.global_rank == 1 and not any(self.root.iterdir()):
                assert time.monotonic() < deadline, "there is no checkpoint"
                time.sleep(0.01)
            raise error

    def training_step(self, batch, batch_idx):
        self.fail("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.fail("validation_step")
        return super().validation_step(batch, batch_idx)

    # `Reference` asks the other ranks for their notes.
    def on_save_checkpoint(self, checkpoint):
        checkpoint["reference"] = {"notes": self.notes, "runs": self.runs}


def fail_and_resume_on_rank(rank, error, step, callback, root):
    root.mkdir(exist_ok=True)
    saving = callback(root)
    saving.teardown = lambda *args, **kwargs: None  # it would remove the checkpoint
    options = dict(val_check_interval=4, enable_checkpointing=True)
    failed, model = Fails(error, step, root), Tracked()
    with contextlib.suppress(ArithmeticError, SystemExit):
        fit_on_rank(rank, failed, callbacks=[saving], **options)
    (path,) = root.iterdir()
    fit_on_rank(rank, model, ckpt_path=path, val_check_interval=4)
    # What the second rank had not written is lost.
    written = [note for note in failed.notes if note[1] == 0 or (note[0] == "val step" and note[2] < 16)]
    return model.notes + written * rank, model.epoch_history


SAVING = {"OnExceptionCheckpoint": pl.callbacks.OnExceptionCheckpoint}
if "save_on_exception" in inspect.signature(pl.callbacks.ModelCheckpoint).parameters:
    never = dict(every_n_train_steps=10**6, save_on_exception=True)
    SAVING["ModelCheckpoint"] = partial(pl.callbacks.ModelCheckpoint, **never)


@pytest.mark.slow
@pytest.mark.parametrize("callback", SAVING)
@pytest.mark.parametrize(
    ("error", "step"), [(ArithmeticError(), "training_step"), (KeyboardInterrupt(), "validation_step")]
)
def test_checkpoint_saved_on_an_exception_of_one_rank(tmp_path, callback, error, step):
    ranks = run_ranks(fail_and_resume_on_rank, 2, error, step, SAVING[callback], tmp_path / "saved", seconds=30)
    assert_all_have_the_history(ranks)


class Terminated(Tracked):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss


def terminate_and_resume_on_rank(rank, root):
    saving = pl.callbacks.OnExceptionCheckpoint(root)
    saving.teardown = lambda *args, **kwargs: None  # it would remove the checkpoint
    with contextlib.suppress(SystemExit):
        fit_on_rank(rank, Terminated(), callbacks=[saving], enable_checkpointing=True)
    model = Tracked()
    fit_on_rank(rank, model, ckpt_path=saving.ckpt_path)
    return model.notes, model.epoch_history


@pytest.mark.slow
def test_checkpoint_saved_on_a_signal_to_all_ranks_is_exact(tmp_path):
    ranks = run_ranks(terminate_and_resume_on_rank, 2, tmp_path, seconds=30)
    assert len([note for notes, _ in ranks for note in notes if note[0] == "train step"]) == 2 * 2 * 11
    assert_all_have_the_history(ranks)


class Threads(pl.strategies.SingleDeviceStrategy):
    """Ranks that are threads: as with XLA, ``torch.distributed`` knows nothing of them."""

    def __init__(self, rank, sent, barrier, put):
        super().__init__()
        self.global_rank, self.world_size = rank, 2
        self.sent, self.meeting, self.put = sent, barrier, put
        self.collectives = 0

    def all_gather(self, tensor, group=None, sync_grads=False):
        assert tensor.device == self.root_device
        self.collectives += 1
        self.sent[self.global_rank] = tensor
        self.meeting.wait(20)
        answer = self.put(self.sent)
        self.meeting.wait(20)
        return answer


class Moved(Tracked):
    """Lies on another device than its strategy, as a module that was put back on the CPU."""

    def on_train_start(self):
        self._device = torch.device("meta")


@pytest.mark.parametrize("put", [torch.stack, torch.cat])
def test_ranks_of_a_strategy_without_torch_distributed(put):
    sent, barrier = [None, None], threading.Barrier(2)

    def fit(rank):
        model, strategy = Moved(), Threads(rank, sent, barrier, put)
        runner = trainer(devices="auto", strategy=strategy)
        runner.fit(model, shard(rank, 2, 21, 4), shard(rank, 2, 7, 2))
        # At the ends of two epochs and two validations.
        assert strategy.collectives == 4
        return model.notes, model.epoch_history

    with ThreadPoolExecutor(2) as pool:
        assert_all_have_the_history(list(pool.map(fit, range(2))))


def launch(how):
    if how == "Fabric":
        Fabric(accelerator="cpu", devices=2, strategy="ddp").launch()
    else:
        torch.distributed.init_process_group("gloo")


def save_loop_on_rank(rank, how, path):
    """Two epochs of a loop without a Trainer, with a save in the middle of the second."""
    launch(how)
    torch.manual_seed(0)
    model, checkpoint = Loop(), {}
    for batch_idx, batch in enumerate([*shard(rank, 2, 21, 4)] * 2):
        if batch_idx == 5:
            model.on_save_checkpoint(checkpoint)
        model.training_step(batch, batch_idx)
        if batch_idx % 3 == 2:
            model.on_train_epoch_end()
    if rank == 0:
        torch.save(checkpoint, path)
    return model.noted, model.epoch_losses


def resume_loop_on_rank(rank, how, path):
    torch.manual_seed(0)
    model, checkpoint = Loop(), torch.load(path, weights_only=True)
    if how == "loaded before there are ranks":
        model.on_load_checkpoint(checkpoint)
    launch(how)
    if how != "loaded before there are ranks":
        model.on_load_checkpoint(checkpoint)
    model.training_step([*shard(rank, 2, 21, 4)][2], 5)
    model.on_train_epoch_end()
    return model.epoch_losses


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loaded before there are ranks", "loaded on ranks", "Fabric"])
def test_loop_that_goes_on_in_an_epochs_middle(tmp_path, how):
    path = tmp_path / "loop.ckpt"
    saved = run_ranks(save_loop_on_rank, 2, how, path, seconds=30)
    # Batches of 4, 4 and 3 on the first rank, of 4, 4 and 2 on the second.
    epochs = [mean(pair for noted, _ in saved for pair in noted[part]) for part in (slice(3), slice(3, None))]
    resumed = run_ranks(resume_loop_on_rank, 2, how, path, seconds=30)
    for losses in (*(losses for _, losses in saved), *resumed):
        assert losses == close(epochs)


class Head(Writes):
    """Saves only a part of itself, in one of the ways that users and strategies have."""

    def __init__(self, root, ending):
        super().__init__(root)
        self.ending = ending

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        if self.ending == "filtered":
            return {name: value for name, value in state.items() if name.endswith("bias")}
        if self.ending == "emptied":
            state.clear()
        return dict(state) if self.ending == "plain" else state if self.ending == "emptied" else {}

    def load_state_dict(self, state_dict, strict=True):
        assert "epoch_mixin" not in state_dict
        return super().load_state_dict(state_dict, strict=False)


def launch_each(strategy, root, endings):
    for ending in endings:
        model = Head(root, ending)
        trainer(devices=2, strategy=strategy).fit(model, shard(0, 1, 21, 4), shard(0, 1, 7, 2))
        assert_exact(model.epoch_history, model.read())
        assert "epoch_mixin" not in model.state_dict()


@pytest.mark.slow
def test_the_history_returns_from_workers_although_the_user_has_a_state_dict(tmp_path):
    run(launch_each, [("ddp_fork", tmp_path, ("filtered", "plain", "emptied", "none"))], seconds=30)


class ValidatingLoop(Loop):
    def validation_step(self, batch, batch_idx):
        return batch.mean()


def validate_on_first_rank(rank):
    torch.manual_seed(0)
    launch("Fabric")
    model = ValidatingLoop()
    for _ in range(2):
        for index, batch in enumerate(shard(rank, 2, 21, 4)):
            model.training_step(batch, index)
        if rank == 0:
            model.validation_step(torch.ones(1), 0)
            model.on_validation_epoch_end()
        model.on_train_epoch_end()
    return model.noted, model.epoch_history


@pytest.mark.slow
def test_a_loop_that_validates_on_the_first_rank_alone():
    seen = run_ranks(validate_on_first_rank, 2, seconds=30)
    for _, history in seen:
        epochs = [mean(pair for noted, _ in seen for pair in noted[part]) for part in (slice(3), slice(3, None))]
        assert history == {"loss": close(epochs), "val_loss": [1.0, 1.0]}


def loop_after_a_fit(rank):
    torch.manual_seed(0)
    launch("Fabric")
    model = ValidatingLoop()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)
    trainer(max_epochs=1).fit(model, shard(rank, 2, 21, 4))
    model.epoch_history.clear()
    model.noted.clear()
    for index, batch in enumerate(shard(rank, 2, 21, 4)):
        model.training_step(batch, index)
    model.on_train_epoch_end()
    return model.noted, model.epoch_losses


@pytest.mark.slow
def test_a_loop_on_several_ranks_after_a_fit_on_one_device():
    seen = run_ranks(loop_after_a_fit, 2, seconds=30)
    expected = close([mean(pair for noted, _ in seen for pair in noted)])
    assert [losses for _, losses in seen] == [expected, expected]
