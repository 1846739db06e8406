import contextlib
import copy
import math

import pytest
import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from tests.helpers import mean, messages, trainer
from tests.lightning.processes import run
from tests.lightning.reference import SaveEverywhere, Tracked, assert_exact, assert_history, expected_history, loader


class At(pl.Callback):
    """Does something in a hook when that many steps have been made."""

    def __init__(self, hook, step, action):
        setattr(self, hook, lambda trainer, *args: action(trainer) if trainer.global_step == step else None)


def interrupt(trainer):
    raise KeyboardInterrupt


def fit(model, *loaders, ckpt_path=None, **options):
    runner = trainer(**{"max_epochs": None, **options})
    # Newer Lightning leaves the process when the user interrupts it.
    with contextlib.suppress(SystemExit):
        runner.fit(model, *loaders, ckpt_path=ckpt_path)
    return runner


def resume_from_each(saved, *loaders, model=Tracked, **options):
    """Resume from each checkpoint with a new model, and assert that its history is what its steps add up to."""
    for path, where in saved.items():
        again = model()
        fit(again, *loaders, ckpt_path=path, **options)
        try:
            assert_history(again)
        except AssertionError as error:
            raise AssertionError(f"resumed from {where}") from error


class Stream(IterableDataset):
    """A dataset whose length nobody knows."""

    def __iter__(self):
        return iter(loader())


TRAIN, VAL, STREAM = loader(), loader(5, 2), DataLoader(Stream(), batch_size=None)


@pytest.mark.parametrize(
    ("loaders", "options", "resumed"),
    [
        pytest.param([TRAIN], dict(max_epochs=3), {}, id="no validation"),
        pytest.param([TRAIN, VAL], dict(max_epochs=3), {}, id="validation"),
        pytest.param([TRAIN, VAL], dict(max_epochs=2, num_sanity_val_steps=0), {}, id="no sanity check"),
        pytest.param([TRAIN, VAL], dict(max_epochs=3, val_check_interval=2), {}, id="two validations an epoch"),
        pytest.param([TRAIN, VAL], dict(max_epochs=3, val_check_interval=3), {}, id="validation off the epoch's end"),
        pytest.param([TRAIN, VAL], dict(max_epochs=4, check_val_every_n_epoch=2), {}, id="every other epoch"),
        pytest.param(
            [TRAIN, VAL],
            dict(max_epochs=4, val_check_interval=6, check_val_every_n_epoch=None),
            {},
            id="validation by steps",
        ),
        pytest.param([TRAIN, VAL], dict(max_epochs=3, accumulate_grad_batches=2), {}, id="accumulation"),
        pytest.param([TRAIN], dict(max_steps=10), {}, id="max_steps"),
        pytest.param([TRAIN, VAL], dict(max_steps=10), {}, id="max_steps and validation"),
        pytest.param([STREAM, VAL], dict(max_epochs=3), {}, id="unknown length"),
        pytest.param([TRAIN, VAL], dict(max_steps=6), dict(max_steps=14), id="more steps"),
        pytest.param([TRAIN], dict(max_steps=8), dict(max_steps=14), id="more steps after an epoch's last"),
        pytest.param([TRAIN, VAL], dict(max_epochs=2), dict(max_epochs=4), id="more epochs"),
        pytest.param([TRAIN], dict(max_epochs=2), dict(max_epochs=4), id="more epochs without validation"),
        pytest.param([TRAIN, VAL], dict(max_epochs=2), dict(max_epochs=3, limit_train_batches=2), id="shorter epochs"),
        pytest.param([TRAIN, VAL], dict(max_epochs=2), dict(max_epochs=3, limit_val_batches=0), id="validation off"),
    ],
)
def test_resume_from_anywhere_is_exact(tmp_path, recwarn, loaders, options, resumed):
    saving = SaveEverywhere(tmp_path)
    model = Tracked()
    fit(model, *loaders, callbacks=[saving], **options)
    assert_history(model)
    steps = sum(note[0] == "train step" for note in model.notes)
    assert sum(where.startswith("on_train_batch_end") for where in saving.saved.values()) == steps > 5
    resume_from_each(saving.saved, *loaders, **(resumed or options))
    # Also not where Lightning passes an epoch by without a step.
    assert messages(recwarn, "Tracked") == []


class Logs(Tracked):
    """Leaves its validation losses to the log, and notes which dataloader each is of."""

    epoch_loss_keys = ("loss", "kl")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_kl", 2 * loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = super().validation_step(batch, batch_idx)
        self.note(f"loader {dataloader_idx}", loss.item(), len(batch[0]))
        self.log("val_loss", loss)
        self.log("val_kl", 2 * loss)


def test_resume_with_losses_that_are_only_logged_and_several_dataloaders(tmp_path):
    saving = SaveEverywhere(tmp_path)
    options = dict(max_epochs=2, val_check_interval=2)
    fit(Logs(), TRAIN, [VAL, VAL], callbacks=[saving], **options)
    for path, where in saving.saved.items():
        model = Logs()
        fit(model, TRAIN, [VAL, VAL], ckpt_path=path, **options)
        history = model.epoch_history
        expected = {name: history[name] for name in ("loss", "val_loss")}
        for number in range(2):
            notes = [("val step", *note[1:]) for note in model.notes if note[0] == f"loader {number}"]
            expected[f"val_loss/dataloader_idx_{number}"] = expected_history(notes)["val_loss"]
        expected |= {name.replace("loss", "kl"): [2 * loss for loss in expected[name]] for name in expected}
        try:
            assert_history(model)
            assert history.keys() == expected.keys()
            for name, losses in expected.items():
                assert history[name] == pytest.approx(losses, rel=1e-9, abs=0, nan_ok=True), name
        except AssertionError as error:
            raise AssertionError(f"resumed from {where}") from error


def test_resume_of_a_resume_is_exact(tmp_path):
    path = None
    for step in range(1, 13):
        model = Tracked()
        cut = At("on_train_batch_start", step, interrupt)
        runner = fit(model, TRAIN, VAL, ckpt_path=path, callbacks=[cut], max_epochs=3, val_check_interval=2)
        path = tmp_path / f"{step}.ckpt"
        runner.save_checkpoint(path)
    assert len([note for note in model.notes if note[0] == "train step"]) == 12
    assert_history(model)


@pytest.mark.parametrize(
    ("when", "count"),
    [
        ({"every_n_train_steps": 1}, 12),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, 6),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 3),
    ],
)
def test_resume_from_what_modelcheckpoint_saved(tmp_path, when, count):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, **when)
    options = dict(max_epochs=3, val_check_interval=2)
    fit(Tracked(), TRAIN, VAL, callbacks=[saving], enable_checkpointing=True, **options)
    saved = {path: path.name for path in tmp_path.glob("*.ckpt")}
    assert len(saved) == count
    resume_from_each(saved, TRAIN, VAL, **options)


def resumed(path):
    model = Tracked()
    fit(model, TRAIN, VAL, ckpt_path=path, max_epochs=3, val_check_interval=2)
    return model.notes, model.epoch_history


@pytest.mark.slow
def test_resume_in_another_process_is_exact(tmp_path):
    saving = SaveEverywhere(tmp_path)
    fit(Tracked(), TRAIN, VAL, callbacks=[saving], max_epochs=3, val_check_interval=2)
    paths = [path for path, where in saving.saved.items() if where.startswith(("on_train_batch_end", "on_val"))][::3]
    for path in paths:
        ((notes, history),) = run(resumed, [(path,)])
        assert_exact(history, notes)


def test_resume_with_nothing_left_to_train_ends_the_cut_off_epoch(tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    model = Tracked()
    fit(model, TRAIN, callbacks=[saving], enable_checkpointing=True, max_steps=10)
    again = Tracked()
    fit(again, TRAIN, ckpt_path=tmp_path / "step=10.ckpt", max_steps=10)
    assert sum(note[0] == "train step" for note in again.notes) == 10
    assert len(again.epoch_losses) == 3
    assert again.epoch_losses == pytest.approx(model.epoch_losses, rel=1e-9, abs=0)


@pytest.mark.parametrize("loaders", [[TRAIN], [TRAIN, VAL]], ids=["no validation", "validation"])
@pytest.mark.parametrize(("first", "second"), [(8, 12), (10, 14), (8, 8)])
def test_resume_of_what_was_saved_when_the_steps_were_all_made(tmp_path, loaders, first, second):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}")
    fit(Tracked(), *loaders, callbacks=[saving], enable_checkpointing=True, max_steps=first)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "again {step}")
    again = Tracked()
    path = tmp_path / f"step={first}.ckpt"
    runner = fit(again, *loaders, callbacks=[saving], enable_checkpointing=True, max_steps=second, ckpt_path=path)
    assert_history(again)
    assert len(again.epoch_records()) == len({note[1] for note in again.notes})
    path = tmp_path / "saved.ckpt"
    runner.save_checkpoint(path)
    third = Tracked()
    fit(third, *loaders, ckpt_path=path, max_steps=second + 3)
    assert_history(third)


def assert_next_fit_is_clean(model, *loaders):
    before = {name: list(losses) for name, losses in model.epoch_history.items()}
    model.notes.clear()
    fit(model, *loaders, max_epochs=1)
    for name, losses in before.items():
        assert model.epoch_history[name][: len(losses)] == losses
        del model.epoch_history[name][: len(losses)]
    assert_history(model)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 6),
        ("on_train_batch_end", 6),
        ("on_train_batch_end", 4),
        ("on_validation_batch_end", 4),
        ("on_validation_end", 4),
        ("on_train_epoch_end", 4),
    ],
)
@pytest.mark.parametrize("loaders", [[TRAIN], [TRAIN, VAL]], ids=["no validation", "validation"])
def test_interrupted_epoch(tmp_path, loaders, hook, step):
    """It does not leak into the next fit, and is exact if that goes on from a checkpoint saved after the interrupt."""
    model = Tracked()
    runner = fit(model, *loaders, callbacks=[At(hook, step, interrupt)], max_epochs=3)
    runner.save_checkpoint(tmp_path / "saved.ckpt")
    resume_from_each({tmp_path / "saved.ckpt": f"the interrupt in {hook}"}, *loaders, max_epochs=3)
    assert_next_fit_is_clean(model, *loaders)


def test_error_in_the_step_does_not_leak_into_the_next_fit():
    class Fails(Tracked):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 6:
                raise ArithmeticError
            return loss

    model = Fails()
    with pytest.raises(ArithmeticError):
        fit(model, TRAIN, VAL, max_epochs=3)
    ended = [note for note in model.notes if note[1] == 0]
    model.notes.clear()
    fit(model, TRAIN, VAL, max_steps=5)
    assert_exact(model.epoch_history, ended, model.notes)


def test_fresh_fit_of_a_model_loaded_from_anywhere_starts_clean(tmp_path):
    saving = SaveEverywhere(tmp_path, ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_end"))
    fit(Tracked(), TRAIN, VAL, callbacks=[saving], max_epochs=2)
    for path in saving.saved:
        assert_next_fit_is_clean(Tracked.load_from_checkpoint(path), TRAIN, VAL)


def test_fit_of_another_trainer_resumes_a_model_that_has_a_history(tmp_path):
    saving = SaveEverywhere(tmp_path)
    model = Tracked()
    fit(model, TRAIN, VAL, callbacks=[saving], max_epochs=2)
    resume_from_each(saving.saved, TRAIN, VAL, model=lambda: model, max_epochs=3)


def test_running_mean_goes_on_from_the_checkpoint(tmp_path):
    class Running(Tracked):
        def on_train_batch_start(self, batch, batch_idx):
            made = [note[4:] for note in self.notes if note[:2] == ("train step", self.current_epoch)]
            self.seen.append((self.running_epoch_loss().item(), mean(made) if made else math.nan))

    saving = SaveEverywhere(tmp_path)
    fit(Tracked(), TRAIN, callbacks=[saving], max_epochs=2)
    for path in saving.saved:
        model = Running()
        model.seen = []
        fit(model, TRAIN, ckpt_path=path, max_epochs=2)
        for seen, expected in model.seen:
            assert seen == pytest.approx(expected, rel=1e-9, abs=0, nan_ok=True)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"])
@pytest.mark.parametrize("every", [1, 3])
def test_resume_within_a_validation_under_accumulation(tmp_path, hook, every):
    """The global step does not tell two validations apart that have no step of the optimizer between them."""
    options = dict(max_epochs=2, accumulate_grad_batches=4, val_check_interval=every, num_sanity_val_steps=0)
    for cut in range(2):
        saving = pl.callbacks.OnExceptionCheckpoint(tmp_path, f"{cut}")
        saving.teardown = lambda *args, **kwargs: None  # it would remove the checkpoint
        calls = iter([False] * cut + [True])

        def fail(*args, calls=calls):
            if next(calls, False):
                raise ArithmeticError

        failing = pl.Callback()
        setattr(failing, hook, fail)
        with contextlib.suppress(ArithmeticError):
            fit(Tracked(), TRAIN, VAL, callbacks=[failing, saving], enable_checkpointing=True, **options)
        resume_from_each({saving.ckpt_path: f"{hook} {cut}"}, TRAIN, VAL, **options)


def loop_without_trainer(model):
    model.trainer.training = False
    for batch_idx, batch in enumerate(TRAIN):
        model.training_step(batch, batch_idx)
        model.validation_step(batch, batch_idx)


@pytest.mark.parametrize("cut", [None, 6], ids=["ended", "interrupted"])
def test_steps_without_a_trainer_around_a_fit_leave_no_trace(tmp_path, cut):
    """As in the cells of a notebook."""
    model = Tracked()
    model.trainer = trainer()
    loop_without_trainer(model)
    model.notes.clear()
    callbacks = [At("on_train_batch_end", cut, interrupt)] if cut else []
    runner = fit(model, TRAIN, VAL, callbacks=callbacks, max_epochs=3)
    notes, history = list(model.notes), copy.deepcopy(model.epoch_history)
    loop_without_trainer(model)
    assert model.epoch_history == history
    model.notes = notes
    runner.save_checkpoint(tmp_path / "x.ckpt")
    resume_from_each({tmp_path / "x.ckpt": "there"}, TRAIN, VAL, max_epochs=4)
    loop_without_trainer(model)
    assert_next_fit_is_clean(model, TRAIN, VAL)


def test_fits_one_after_the_other_with_resumes_between(tmp_path):
    """The history is that of all fits; the trainer's own epochs begin at 0 with each."""
    model, parts = Tracked(), []
    for step in (6, 2, 9):
        model.notes = []
        runner = fit(model, TRAIN, VAL, callbacks=[At("on_train_batch_end", step, interrupt)], max_epochs=3)
        path = tmp_path / f"{step}.ckpt"
        runner.save_checkpoint(path)
        model = Tracked() if step == 2 else model
        fit(model, TRAIN, VAL, ckpt_path=path, max_epochs=3)
        parts.append(list(model.notes))
        assert_exact(model.epoch_history, *parts)
