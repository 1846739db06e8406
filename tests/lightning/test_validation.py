import json

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, close, epoch_means, fit, loader, mean, messages, trainer
from tests.lightning.processes import run_ranks
from tests.lightning.reference import Reference, SaveEverywhere, assert_exact, expected_history
from tests.lightning.reference import loader as reference_loader


def test_one_exact_value_for_each_validation_and_none_from_the_sanity_check():
    model = Tracked()
    fit(model, loader(), loader(samples=11, batch_size=4), max_epochs=3, num_sanity_val_steps=2)
    assert len(model.val_steps) == 3 * 3
    assert model.epoch_history == {
        "loss": close(epoch_means(model.steps)),
        "val_loss": close(epoch_means(model.val_steps)),
    }


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_validation_is_exact_at_every_precision(precision):
    model = Tracked()
    fit(model, loader(), loader(samples=11, batch_size=4), precision=precision)
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_validation_dataloaders_are_pooled():
    model = Tracked()
    fit(model, loader(), [loader(samples=11, batch_size=4), loader(samples=6), loader(samples=1)])
    assert len(model.val_steps) == 2 * (3 + 2 + 1)
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


class Runs(Tracked):
    """Notes the losses of each validation run apart."""

    def on_validation_epoch_start(self):
        self.runs = [*getattr(self, "runs", []), []]

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.runs[-1].append((loss.item(), len(batch[0])))
        return loss


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        (dict(check_val_every_n_epoch=2, max_epochs=5), 2),
        (dict(val_check_interval=0.5), 4),
        (dict(val_check_interval=2), 4),
        (dict(val_check_interval=4, check_val_every_n_epoch=None, max_epochs=4), 5),
        (dict(limit_val_batches=1), 2),
    ],
    ids=["every other epoch", "twice an epoch", "every two batches", "across epochs", "one batch"],
)
def test_validations_at_other_times(options, validations):
    model = Runs()
    fit(model, loader(), loader(samples=11, batch_size=4), num_sanity_val_steps=0, **options)
    assert len(model.runs) == validations
    assert model.epoch_history["val_loss"] == close([mean(run) for run in model.runs])
    assert model.epoch_losses == close(epoch_means(model.steps))


@pytest.mark.parametrize(
    "output",
    [
        lambda loss: None,
        lambda loss: {"predictions": torch.ones(3)},
        lambda loss: {"loss": None},
        lambda loss: "text",
        lambda loss: {"loss": "text"},
        lambda loss: torch.ones(3),
        lambda loss: loss.reshape(1),
        lambda loss: torch.ones(2, 2),
    ],
    ids=["None", "predictions", "loss is None", "text", "text as loss", "vector", "(1,)-tensor", "matrix"],
)
def test_a_validation_that_returns_no_loss_leaves_no_entry_and_one_word(output, recwarn):
    class Model(Tracked):
        def validation_step(self, batch, batch_idx):
            return output(self.loss(batch))

    model = Model()
    fit(model, loader(), loader())
    assert list(model.epoch_history) == ["loss"]
    (message,) = messages(recwarn, "Model")
    assert message.startswith("Model: no step of a validation gave a loss: validation_step returned ")


def test_validation_steps_without_a_loss_do_not_count():
    class Model(Tracked):
        def validation_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().validation_step(batch, batch_idx)

    model = Model()
    fit(model, loader(), loader())
    assert len(model.val_steps) == 2 * 4
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_named_losses_in_both_stages(recwarn):
    class Vae(EpochLossMixin, Net):
        epoch_loss_keys = ("loss", "kl")

        def __init__(self):
            super().__init__()
            self.noted = {"loss": [], "kl": [], "val_loss": [], "val_kl": []}

        def note(self, stage, batch):
            kl = self.layer.weight.square().sum()
            loss = self.loss(batch) + kl
            if not self.trainer.sanity_checking:
                for key, value in (("loss", loss), ("kl", kl)):
                    self.noted[stage + key].append((self.current_epoch, value.item(), len(batch[0])))
            return loss, kl

        def training_step(self, batch, batch_idx):
            loss, kl = self.note("", batch)
            return {"loss": loss, "kl": kl.detach(), "logits": batch[0]}

        def validation_step(self, batch, batch_idx):
            loss, kl = self.note("val_", batch)
            return {"kl": kl.item(), "loss": loss}

    model = Vae()
    fit(model, loader(), loader(samples=11, batch_size=4), max_epochs=3)
    assert model.epoch_history == {name: close(epoch_means(noted)) for name, noted in model.noted.items()}
    assert messages(recwarn, "Vae") == []


def test_a_key_that_only_one_stage_gives(recwarn):
    class Model(Tracked):
        epoch_loss_keys = ("loss", "accuracy")

        def training_step(self, batch, batch_idx):
            return {"loss": self.noted_loss(batch), "accuracy": None}

        def validation_step(self, batch, batch_idx):
            return {"accuracy": 0.5}

    model = Model()
    fit(model, loader(), loader())
    assert model.epoch_history == {"loss": close(epoch_means(model.steps)), "val_accuracy": [0.5, 0.5]}
    assert messages(recwarn, "Model") == []


def test_history_can_be_written_as_json():
    model = Tracked()
    fit(model, loader(), loader())
    assert json.loads(json.dumps(model.epoch_history)) == model.epoch_history


@pytest.mark.parametrize("step", ["validation_step", "test_step", "predict_step"])
@pytest.mark.parametrize("through_super", [True, False])
def test_a_step_that_calls_the_training_step_leaves_the_training_mean_alone(step, through_super):
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return self.noted_loss(batch) if self.trainer.training else self.loss(batch)

    def calls_the_training_step(self, batch, batch_idx):
        me = super(Caller, self) if through_super else self
        return me.training_step(batch, batch_idx)

    Caller = type("Caller", (Model,), {step: calls_the_training_step})
    model = Caller()
    runner = fit(model, loader(), loader(samples=11, batch_size=4))
    assert model.epoch_losses == close(epoch_means(model.steps))
    history = {name: list(values) for name, values in model.epoch_history.items()}
    works = {"validation_step": runner.validate, "test_step": runner.test, "predict_step": runner.predict}
    works[step](model, loader())
    assert model.epoch_history == history
    assert model.running_epoch_loss().isnan()


def test_validation_step_that_calls_the_training_step_gives_the_validation_mean():
    class Model(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if not self.trainer.sanity_checking:
                steps = self.steps if self.trainer.training else self.val_steps
                steps.append((self.current_epoch, loss.item(), len(batch[0])))
            return loss

        def validation_step(self, batch, batch_idx):
            return {"loss": self.training_step(batch, batch_idx)}

    model = Model()
    fit(model, loader(), loader(samples=11, batch_size=4))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_validate_test_and_predict_write_nothing():
    class Model(Tracked):
        def test_step(self, batch, batch_idx):
            return self.loss(batch)

        def predict_step(self, batch, batch_idx):
            return self.loss(batch)

    model = Model()
    runner = trainer()
    for work in (runner.validate, runner.test, runner.predict):
        work(model, loader())
    assert model.epoch_history == {}


def test_running_loss_is_that_of_training_during_validation():
    class Reader(pl.Callback):
        read = []

        def on_validation_batch_end(self, trainer, module, *args):
            if not trainer.sanity_checking:
                self.read.append(module.running_epoch_loss().item())

    model, reader = Tracked(), Reader()
    fit(model, loader(), loader(samples=4), max_epochs=1, callbacks=[reader])
    assert reader.read == close(epoch_means(model.steps))


class Loaders(EpochLossMixin, Net):
    """Notes the validation losses of each dataloader, and gives none for those in ``silent``."""

    def __init__(self, silent=(), log=True):
        super().__init__()
        self.silent, self.gives_by_log = silent, log
        self.runs = []

    def on_validation_epoch_start(self):
        self.runs.append({})

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch) * (dataloader_idx + 1)
        if dataloader_idx in self.silent:
            return None
        self.runs[-1].setdefault(dataloader_idx, []).append((loss.item(), len(batch[0])))
        if not self.gives_by_log:
            return loss
        self.log("val_loss", loss)

    def expected(self):
        runs = self.runs[1:]  # without the sanity check
        curves = {"val_loss": [mean(pair for pairs in run.values() for pair in pairs) for run in runs]}
        for i in sorted({i for run in runs for i in run}):
            curves[f"val_loss/dataloader_idx_{i}"] = [mean(run[i]) for run in runs]
        return {name: close(means) for name, means in curves.items()}


def val_loaders(*samples):
    return [loader(count, batch_size=4) for count in samples or (11, 6, 1)]


def assert_curves(model):
    assert {name: means for name, means in model.epoch_history.items() if name != "loss"} == model.expected()


@pytest.mark.parametrize("log", [True, False], ids=["logged", "returned"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(limit_val_batches=1), dict(val_check_interval=2), dict(check_val_every_n_epoch=2, max_epochs=4)],
    ids=str,
)
def test_each_validation_dataloader_has_a_curve_of_its_own(options, log, recwarn):
    model = Loaders(log=log)
    fit(model, loader(), val_loaders(), **options)
    assert len(model.epoch_history) == 5
    assert_curves(model)
    assert list(model.epoch_history) == ["loss", "val_loss", *(f"val_loss/dataloader_idx_{i}" for i in range(3))]
    assert messages(recwarn, "Loaders") == []


@pytest.mark.parametrize("silent", [(0,), (1,), (2,)])
def test_a_dataloader_that_gives_nothing_has_no_curve(silent, recwarn):
    model = Loaders(silent)
    fit(model, loader(), val_loaders())
    assert len(model.epoch_history) == 4
    assert_curves(model)
    assert messages(recwarn, "Loaders") == []


def test_one_of_two_dataloaders_gives_nothing():
    model = Loaders(silent=(0,))
    fit(model, loader(), val_loaders(11, 6))
    assert_curves(model)


def test_a_dataloader_that_gives_nothing_in_one_run():
    class Model(Loaders):
        def on_train_epoch_start(self):
            self.silent = (0,) if self.current_epoch == 1 else ()

    model = Model()
    fit(model, loader(), val_loaders(11, 6), max_epochs=3)
    curve = [mean(run[1]) for run in model.runs[1:]]
    assert model.epoch_history["val_loss/dataloader_idx_1"] == close(curve)
    assert model.epoch_history["val_loss/dataloader_idx_0"] == close([mean(model.runs[i][0]) for i in (1, 3)])
    rows = model.epoch_records()
    assert [row.get("val_loss/dataloader_idx_1") for row in rows] == close(curve)
    assert "val_loss/dataloader_idx_0" not in rows[1]


@pytest.mark.parametrize(
    "wrap", [lambda loaders: loaders, lambda loaders: {"a": loaders[0]}, lambda loaders: loaders[0]]
)
def test_one_validation_dataloader_in_any_wrapping_has_no_curve_of_its_own(wrap):
    model = Loaders()
    fit(model, loader(), wrap(val_loaders(11)))
    assert list(model.epoch_history) == ["loss", "val_loss"]
    assert model.epoch_history["val_loss"] == model.expected()["val_loss"]


def test_named_validation_dataloaders():
    model = Loaders()
    fit(model, loader(), dict(zip("abc", val_loaders())))
    assert_curves(model)


def test_curves_of_dataloaders_for_further_keys():
    class Model(Loaders):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            return {"loss": self.loss(batch), "kl": 1.0}

        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx, dataloader_idx)
            if dataloader_idx == 1:
                self.log("val_kl", 2.0)

    model = Model()
    fit(model, loader(), val_loaders(11, 6))
    history = dict(model.epoch_history)
    kl = {name: history.pop(name) for name in list(history) if "kl" in name}
    assert kl == {"kl": [1, 1], "val_kl": [2, 2], "val_kl/dataloader_idx_1": [2, 2]}
    history.pop("loss")
    assert history == model.expected()


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_dataloaders_combined_into_one_batch_have_one_curve(mode):
    class Model(EpochLossMixin, Net):
        def validation_step(self, batch, batch_idx):
            loss = sum(self.loss(part) for part in batch if part is not None)
            if not self.trainer.sanity_checking:
                first = next(part for part in batch if part is not None)
                self.val_steps.append((self.current_epoch, loss.item(), len(first[0])))
            self.log("val_loss", loss)

    model = Model()
    fit(model, loader(), CombinedLoader([loader(6, 3), loader(12, 3)], mode))
    assert list(model.epoch_history) == ["loss", "val_loss"]
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_sequentially_combined_dataloaders():
    model = Loaders()
    fit(model, loader(), CombinedLoader(val_loaders(), "sequential"))
    assert_curves(model)


@pytest.mark.parametrize("samples", [(11,), (11, 6)], ids=["one", "two"])
def test_validation_steps_that_take_a_dataloader_iter(samples):
    class Model(Loaders):
        def validation_step(self, dataloader_iter):
            super().validation_step(*next(dataloader_iter))

    model = Model()
    fit(model, loader(), val_loaders(*samples))
    assert model.epoch_history["val_loss"] == model.expected()["val_loss"]
    assert len(model.epoch_history) == (2 if len(samples) == 1 else 4)
    if len(samples) > 1:
        assert_curves(model)


def test_curves_of_dataloaders_are_in_checkpoints(tmp_path):
    model = Loaders()
    runner = fit(model, loader(), val_loaders())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    assert Loaders.load_from_checkpoint(tmp_path / "last.ckpt").epoch_history == model.epoch_history
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch_mixin"]
    assert saved["history"] == model.epoch_history
    again = Loaders()
    trainer(max_epochs=3).fit(again, loader(), val_loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert {name: means[:2] for name, means in again.epoch_history.items()} == model.epoch_history
    assert {len(means) for means in again.epoch_history.values()} == {3}


def test_a_resume_in_mid_validation_with_two_dataloaders(tmp_path):
    class Model(Reference):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.runs_of_loader = getattr(self, "runs_of_loader", {})
            loss = super().validation_step(batch, batch_idx)
            self.notes[-1:] = [(*note, dataloader_idx) for note in self.notes[-1:]]
            self.log("val_loss", loss)

        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()

    class Both(EpochLossMixin, Model):
        pass

    def assert_exact_for_each_loader(model):
        pooled = [note[:6] for note in model.notes]
        assert_exact(model.epoch_history, pooled)
        for i in range(2):
            part = [note[:6] for note in model.notes if len(note) < 7 or note[6] == i]
            assert model.epoch_history[f"val_loss/dataloader_idx_{i}"] == close(expected_history(part)["val_loss"])

    val, saver = [reference_loader(5, 2), reference_loader(4, 3)], SaveEverywhere(tmp_path)
    model = Both()
    trainer(max_epochs=2, val_check_interval=2, callbacks=[saver]).fit(model, reference_loader(), val)
    assert_exact_for_each_loader(model)
    for path, where in saver.saved.items():
        again = Both()
        trainer(max_epochs=2, val_check_interval=2).fit(again, reference_loader(), val, ckpt_path=path)
        try:
            assert_exact_for_each_loader(again)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"resumed from {where}") from error


def fit_loaders_on_rank(rank):
    model = Loaders()
    loaders = [loader(samples, batch_size=2) for samples in ((5, 3), (4, 7))[rank]]
    options = dict(devices=2, strategy="ddp", use_distributed_sampler=False, num_sanity_val_steps=0)
    trainer(**options).fit(model, loader(), loaders)
    return model.runs, model.epoch_history


@pytest.mark.slow
def test_curves_of_dataloaders_are_those_of_all_ranks():
    (runs, history), (others, other_history) = run_ranks(fit_loaders_on_rank, 2)
    assert history == other_history
    model = Loaders()
    model.runs = [{}, *({i: run[i] + other[i] for i in run} for run, other in zip(runs, others, strict=True))]
    history.pop("loss")
    assert history == model.expected()


SIZES = [4, 4, 1]


class Samples(EpochLossMixin, pl.LightningModule):
    """Returns what `output` makes of the losses of single samples."""

    output = staticmethod(lambda losses: None)

    def training_step(self, batch, batch_idx):
        return None

    def validation_step(self, batch, batch_idx):
        return self.output(batch)

    def configure_optimizers(self):
        return None


def samples():
    return torch.utils.data.DataLoader([torch.full((size,), float(size)) for size in SIZES], batch_size=None)


def test_the_loss_of_the_only_sample_of_a_batch_is_no_mean_where_others_gave_many(recwarn):
    class Model(Samples):
        output = staticmethod(lambda losses: {"loss": losses})

    model = Model()
    fit(model, samples(), samples(), max_epochs=1)
    assert "val_loss" not in model.epoch_history
    (message,) = [message for message in messages(recwarn, "Model:") if "validation" in message]
    assert "returned only 'loss' and gave a Tensor of shape (4,) for it, which is no real scalar" in message


def test_a_scalar_beside_the_losses_of_single_samples_is_the_loss():
    class Model(Samples):
        output = staticmethod(lambda losses: {"loss": losses, "val_loss": losses.mean()})

    model = Model()
    with pytest.warns(UserWarning, match=r"^Model: no step of epoch 0 gave a loss"):
        fit(model, samples(), samples(), max_epochs=1)
    assert model.epoch_history["val_loss"] == close([mean((size, size) for size in SIZES)])


def test_the_losses_of_single_samples_of_one_key_say_nothing_of_another(recwarn):
    class Model(EpochLossMixin, pl.LightningModule):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            return {"loss": batch.mean()[None], "kl": "n/a" if batch_idx else batch}

    model = Model()
    for index, size in enumerate(SIZES):
        model.training_step(torch.full((size,), float(size)), index)
    model.on_train_epoch_end()
    (message,) = messages(recwarn, "Model")
    assert "no 'kl' is recorded" in message
    assert model.epoch_losses == close([mean((size, size) for size in SIZES)])
