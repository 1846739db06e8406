import contextlib
import math
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from epoch_mixin import EpochLossMixin
from tests.helpers import messages, trainer
from tests.lightning.reference import Reference, SaveEverywhere, Tracked, assert_exact, assert_history, loader


@pytest.fixture
def fitted(tmp_path):
    """A model with three epochs of history, and the checkpoint of its end."""
    model = Tracked()
    runner = trainer(max_epochs=3)
    runner.fit(model, loader(), loader(5, 2))
    runner.save_checkpoint(tmp_path / "three.ckpt")
    return model, tmp_path / "three.ckpt"


def shorter(path):
    """A checkpoint of another model of the class, one epoch old."""
    model = Tracked()
    runner = trainer(max_epochs=1)
    runner.fit(model, loader(), loader(5, 2))
    runner.save_checkpoint(path)
    return model


@pytest.mark.parametrize("weights_only", [False, True])
def test_history_is_in_a_checkpoint_in_plain_types(tmp_path, weights_only):
    model = Tracked()
    runner = trainer(max_epochs=2)
    runner.fit(model, loader(), loader(5, 2))
    runner.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert ("optimizer_states" in checkpoint) is not weights_only
    again = Tracked.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.epoch_history == model.epoch_history
    assert_history(again)


@pytest.mark.parametrize(
    ("when", "ended", "validated"),
    [
        ({"save_on_train_epoch_end": True}, [1, 2, 3], [1, 2, 3]),
        ({"save_on_train_epoch_end": True, "save_weights_only": True}, [1, 2, 3], [1, 2, 3]),
        # At validation's end the epoch goes on.
        ({"save_on_train_epoch_end": False}, [0, 1, 2], [1, 2, 3]),
        # After steps 3, 6, 9 and 12; an epoch has four, and 12 comes ahead of the last validation.
        ({"every_n_train_steps": 3}, [0, 1, 2, 2], [0, 1, 2, 2]),
    ],
)
def test_history_is_in_every_checkpoint_that_lightning_saves(tmp_path, when, ended, validated):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step:02d}", save_top_k=-1, **when)
    model = Tracked()
    trainer(max_epochs=3, callbacks=[saving], enable_checkpointing=True).fit(model, loader(), loader(5, 2))
    histories = [Tracked.load_from_checkpoint(path).epoch_history for path in sorted(tmp_path.glob("*.ckpt"))]
    val_losses = model.epoch_history["val_loss"]
    assert [history.get("loss", []) for history in histories] == [model.epoch_losses[:epochs] for epochs in ended]
    assert [history.get("val_loss", []) for history in histories] == [val_losses[:runs] for runs in validated]


def test_resume_brings_the_history_back(fitted):
    model, path = fitted
    again = Tracked()
    trainer(max_epochs=5).fit(again, loader(), loader(5, 2), ckpt_path=path)
    assert again.epoch_losses[:3] == model.epoch_losses
    assert len(again.epoch_losses) == 5
    assert_history(again)


def test_resume_rolls_a_longer_history_back(fitted, tmp_path):
    model, _ = fitted
    one = shorter(tmp_path / "one.ckpt")
    trainer(max_epochs=2).fit(model, loader(), loader(5, 2), ckpt_path=tmp_path / "one.ckpt")
    assert model.epoch_losses[:1] == one.epoch_losses
    assert len(model.epoch_losses) == len(model.epoch_history["val_loss"]) == 2
    assert_history(model)


def test_a_list_that_the_user_holds_stays_the_history(fitted, tmp_path):
    model, _ = fitted
    losses, history = model.epoch_losses, model.epoch_history
    val_losses = history["val_loss"]
    shorter(tmp_path / "one.ckpt")
    trainer(max_epochs=2).fit(model, loader(), loader(5, 2), ckpt_path=tmp_path / "one.ckpt")
    assert len(losses) == len(val_losses) == 2
    trainer(max_epochs=1).fit(model, loader(), loader(5, 2))
    assert len(losses) == len(val_losses) == 3
    assert losses is model.epoch_losses is history["loss"]
    assert history is model.epoch_history and val_losses is history["val_loss"]


def test_a_list_that_a_checkpoint_does_not_know_is_emptied(fitted, tmp_path):
    model, _ = fitted
    val_losses = model.epoch_history["val_loss"]
    runner = trainer(max_epochs=1)
    runner.fit(Tracked(), loader())
    runner.save_checkpoint(tmp_path / "no val.ckpt")
    trainer(max_epochs=2).fit(model, loader(), ckpt_path=tmp_path / "no val.ckpt")
    assert val_losses == [] and "val_loss" not in model.epoch_history
    assert_history(model)


def test_second_fit_goes_on_appending(fitted):
    model, _ = fitted
    first = list(model.notes)
    model.notes.clear()
    trainer(max_epochs=2).fit(model, loader(), loader(5, 2))
    assert len(model.epoch_losses) == 5
    assert_exact(model.epoch_history, first, model.notes)


def test_cleared_history_starts_afresh(fitted):
    model, _ = fitted
    model.epoch_losses.clear()
    model.epoch_history["val_loss"].clear()
    model.notes.clear()
    trainer(max_epochs=2).fit(model, loader(), loader(5, 2))
    assert len(model.epoch_losses) == 2
    assert_history(model)


def test_checkpoint_without_the_mixin_loads(tmp_path):
    plain = Reference()
    runner = trainer(max_epochs=1)
    runner.fit(plain, loader())
    runner.save_checkpoint(tmp_path / "plain.ckpt")
    model = Tracked.load_from_checkpoint(tmp_path / "plain.ckpt", strict=True)
    assert model.epoch_losses == []
    assert torch.equal(model.layer.weight, plain.layer.weight)


@pytest.mark.parametrize("epochs", [1, 3])
def test_resume_from_a_checkpoint_without_the_mixin_keeps_the_index_the_epoch(tmp_path, recwarn, epochs):
    """What came before it nobody recorded."""
    runner = trainer(max_epochs=epochs)
    runner.fit(Reference(), loader(), loader(5, 2))
    runner.save_checkpoint(tmp_path / "plain.ckpt")
    model = Tracked()
    trainer(max_epochs=epochs + 2).fit(model, loader(), loader(5, 2), ckpt_path=tmp_path / "plain.ckpt")
    assert [row["epoch"] for row in model.epoch_records() if "val_loss" in row] == [epochs, epochs + 1]
    model.notes = [note for note in model.notes if note[1] >= epochs or note[0] == "train epoch"]
    assert_history(model)
    (message,) = messages(recwarn, "Tracked")
    assert f"{epochs} of {epochs} epochs: nan" in message


def test_resume_from_a_shorter_record_keeps_the_index_the_epoch(fitted, tmp_path, recwarn):
    model, path = fitted
    checkpoint = torch.load(path, weights_only=True)
    for losses in checkpoint["epoch_mixin"]["history"].values():
        del losses[1:]
    torch.save(checkpoint, tmp_path / "shorter.ckpt")
    again = Tracked()
    trainer(max_epochs=5).fit(again, loader(), ckpt_path=tmp_path / "shorter.ckpt")
    assert again.epoch_losses[:1] == model.epoch_losses[:1]
    again.notes = [note for note in again.notes if note[:2] not in (("train step", 1), ("train step", 2))]
    again.notes = [note for note in again.notes if note[0] != "val step" or note[1] == 0]
    assert_history(again)
    assert len(messages(recwarn, "Tracked")) == 1


def test_resume_from_anywhere_in_a_fit_without_the_mixin(tmp_path):
    saving = SaveEverywhere(tmp_path)
    trainer(max_epochs=3, callbacks=[saving]).fit(Reference(), loader(), loader(5, 2))
    for path, where in saving.saved.items():
        saved = len(torch.load(path, weights_only=True)["reference"]["notes"])
        model = Tracked()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(max_epochs=4).fit(model, loader(), loader(5, 2), ckpt_path=path)
        model.notes = [note for i, note in enumerate(model.notes) if i >= saved or note[0] == "train epoch"]
        try:
            assert_history(model)
        except AssertionError as error:
            raise AssertionError(f"resumed from {where}") from error


def test_checkpoint_loads_without_the_mixin(fitted):
    model, path = fitted
    plain = Reference.load_from_checkpoint(path, strict=True)
    assert torch.equal(plain.layer.weight, model.layer.weight)
    trainer(max_epochs=4).fit(plain, loader(), loader(5, 2), ckpt_path=path)
    assert plain.notes[: len(model.notes)] == model.notes
    assert len(plain.notes) > len(model.notes)


def test_checkpoint_is_the_plain_one_and_a_record(tmp_path):
    saved = {}
    for cls in (Reference, Tracked):
        runner = trainer(max_epochs=1)
        runner.fit(cls(), loader(), loader(5, 2))
        runner.save_checkpoint(tmp_path / "x.ckpt")
        saved[cls] = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved[Tracked].keys() - saved[Reference].keys() == {"epoch_mixin"}
    assert list(saved[Tracked]["state_dict"]) == list(saved[Reference]["state_dict"])


def test_hook_of_the_user_may_leave_out_super(tmp_path):
    class Own(Tracked):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 1

        def on_load_checkpoint(self, checkpoint):
            self.mine = checkpoint["mine"]

    model = Own()
    runner = trainer(max_epochs=2)
    runner.fit(model, loader())
    runner.save_checkpoint(tmp_path / "x.ckpt")
    again = Own.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.mine == 1
    assert again.epoch_losses == model.epoch_losses


def test_a_damaged_record_is_refused(fitted, tmp_path):
    model, path = fitted
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["epoch_mixin"]["history"]["loss"] = "0.5"
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    message = r"^Tracked: checkpoint\['epoch_mixin'\] is damaged: {"
    with pytest.raises(ValueError, match=message):
        Tracked.load_from_checkpoint(tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=4).fit(model, loader(), ckpt_path=tmp_path / "damaged.ckpt")
    assert len(model.epoch_losses) == 3
    assert_history(model)


def test_history_can_be_read_without_the_class(fitted):
    model, path = fitted
    record = torch.load(path, weights_only=True)["epoch_mixin"]
    assert record["history"] == model.epoch_history
    assert isinstance(record["version"], int)


JUNK = {
    "none": [0.1, None],
    "text": ["0.5"],
    "vector": [torch.ones(2)],
    "abstract": [torch.ones((), device="meta")],
    "complex": [1j],
    "huge": [10**400],
    "nested": [[0.5]],
    "number": 0.5,
    "dict": {"a": 0.5},
    7: [0.5],
    None: [0.5],
}
NUMBERS = {
    "tensor": [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)],
    "numpy": [np.float32(0.5), np.array(0.5)],
    "fractions": [Fraction(1, 2), 0.5],
    "array": np.array([0.5, 0.5]),
    "tuple": (0.5, 0.5),
}


@pytest.mark.parametrize("name", [*JUNK, *NUMBERS], ids=str)
def test_what_a_user_puts_into_the_history_never_costs_a_run(tmp_path, name):
    model = Tracked()
    trainer(max_epochs=1).fit(model, loader())
    first = list(model.notes)
    model.epoch_history[name] = {**JUNK, **NUMBERS}[name]
    runner = trainer(max_epochs=2)
    runner.fit(model, loader())
    assert_exact(model.epoch_history, first, model.notes[len(first) :])
    assert [row.keys() for row in model.epoch_records()][-1] <= {"epoch", "loss", name}
    with (
        pytest.warns(match=re.escape(f"Tracked.epoch_history[{name!r}]")) if name in JUNK else contextlib.nullcontext()
    ):
        runner.save_checkpoint(tmp_path / "x.ckpt")
    again = Tracked.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.epoch_losses == model.epoch_losses
    assert again.epoch_history.keys() == model.epoch_history.keys() - JUNK.keys()
    assert {type(value) for values in again.epoch_history.values() for value in values} == {float}
    if name in NUMBERS:
        assert again.epoch_history[name] == [0.5, 0.5]
    trainer(max_epochs=3).fit(model, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert len(model.epoch_losses) == 4 and next(iter(model.epoch_history)) == "loss"


class Weighed(Tracked):
    """Gives one step of the second epoch a wrong weight."""

    wrong = 1.0

    def epoch_loss_weight(self, batch):
        return torch.tensor(self.wrong if self.global_step == 5 else 2.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1.0])
def test_wrong_weight_leaves_a_checkpoint_that_can_be_read(tmp_path, wrong):
    saving = SaveEverywhere(tmp_path, ("on_train_batch_end",))
    model = Weighed()
    model.wrong = wrong
    with pytest.raises(ValueError, match=r"^Weighed.epoch_loss_weight .* epoch 1"):
        trainer(max_epochs=3, callbacks=[saving]).fit(model, loader())
    assert len(saving.saved) == 8
    path = list(saving.saved)[-1]
    with pytest.warns(match=r"^Weighed.epoch_loss_weight .*nan$"):
        again = Weighed.load_from_checkpoint(path)
    assert torch.equal(again.layer.weight, model.layer.weight)
    assert len(again.epoch_losses) == 1
    resumed = Weighed()
    with pytest.warns(match=r"^Weighed.epoch_loss_weight"):
        trainer(max_epochs=3).fit(resumed, loader(), ckpt_path=list(saving.saved)[5])
    losses = [note[4] for note in resumed.notes if note[:2] == ("train step", 2)]
    assert resumed.epoch_losses == pytest.approx([*again.epoch_losses, math.nan, sum(losses) / 4], nan_ok=True)


class Keyed(Reference):
    def training_step(self, batch, batch_idx):
        return dict.fromkeys(("loss", "kl", "l2"), super().training_step(batch, batch_idx))


class KeyedTracked(EpochLossMixin, Keyed):
    pass


@pytest.mark.filterwarnings("ignore:KeyedTracked. the checkpoint holds no loss")  # of other keys than before
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        [("loss",), ("loss", "kl")],
        [("loss",), ("kl", "loss")],
        [("kl", "loss"), ("loss",), ("kl", "loss")],
        [("kl", "l2"), ("l2",), ("loss", "kl")],
        [("kl",), ("loss",)],
    ],
)
def test_a_key_is_filed_under_its_epochs(tmp_path, parts, resumed):
    """Of fits of two epochs with these keys, one after the other."""
    model, epochs, expected = KeyedTracked(), 0, {}
    for keys in parts:
        if resumed and epochs:
            model = KeyedTracked()
        model.epoch_loss_keys = keys
        assert isinstance(model.epoch_losses, list)  # looking does not count as an epoch
        runner = trainer(max_epochs=epochs + 2 if resumed else 2)
        runner.fit(model, loader(), ckpt_path=tmp_path / "x.ckpt" if resumed and epochs else None)
        runner.save_checkpoint(tmp_path / "x.ckpt")
        for key in keys:
            expected.setdefault(key, []).extend([math.nan] * (epochs - len(expected.get(key, []))))
            expected[key] += [0, 0]
        epochs += 2
    where = {key: [math.isfinite(loss) for loss in losses] for key, losses in model.epoch_history.items() if losses}
    assert where == {key: [math.isfinite(loss) for loss in losses] for key, losses in expected.items()}
    assert len(model.epoch_records()) == epochs


def test_the_losses_are_those_of_the_first_key_where_there_is_no_loss(tmp_path):
    class Two(KeyedTracked):
        epoch_loss_keys = ("kl", "l2")

        def on_train_epoch_end(self):
            assert self.epoch_losses is self.epoch_history["kl"]

    model = Two()
    assert model.epoch_losses == [] and model.epoch_history == {}
    held = model.epoch_losses
    runner = trainer(max_epochs=2)
    runner.fit(model, loader())
    assert list(model.epoch_history) == ["kl", "l2"] and len(held) == 2 and held is model.epoch_losses
    runner.save_checkpoint(tmp_path / "x.ckpt")
    again = Two.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.epoch_losses == held and again.epoch_history == model.epoch_history
