import pytest
import pytorch_lightning as pl
import torch

from tests.helpers import trainer
from tests.lightning.reference import Reference, Tracked, assert_exact, assert_history, loader


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
    model.notes.clear()
    trainer(max_epochs=3).fit(model, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert [note[1] for note in model.notes if note[0] == "train step"] == [0] * 4 + [1] * 4 + [2] * 4
    # What came before the checkpoint, nobody recorded.
    assert_exact(model.epoch_history, [(what, epoch - 1, *rest) for what, epoch, *rest in model.notes if epoch])


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


def test_damaged_record_is_refused_by_name(fitted, tmp_path):
    model, path = fitted
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["epoch_mixin"]["history"]["loss"] = "0.5"
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    message = r"^Tracked: checkpoint\['epoch_mixin'\] is damaged: history.loss .*'0.5'"
    with pytest.raises(ValueError, match=message):
        Tracked.load_from_checkpoint(tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=4).fit(model, loader(), ckpt_path=tmp_path / "damaged.ckpt")
    assert len(model.epoch_losses) == 3
    assert_history(model)
