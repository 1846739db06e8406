import csv
import json
import math

import pytest

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, close, epoch_means, fit, loader, mean, trainer


class Runs(EpochLossMixin, Net):
    """Logs its validation losses, and notes those of each run with the epoch it belongs to."""

    def __init__(self):
        super().__init__()
        self.runs = []

    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            self.runs.append((self.current_epoch, []))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        if not self.trainer.sanity_checking:
            self.runs[-1][1].append((loss.item(), len(batch[0])))
        self.log("val_loss", loss)


def expected_records(model):
    rows = [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate(epoch_means(model.steps))]
    for epoch, pairs in model.runs:
        if pairs:
            rows[epoch]["val_loss"] = mean(pairs)
    return rows


def assert_rows(rows, expected):
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, right in zip(rows, expected, strict=True):
        assert {name: row[name] for name in right} == {name: close(value) for name, value in right.items()}
        assert type(row["epoch"]) is int and {type(value) for value in row.values()} == {int, float}


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ({}, {0, 1, 2, 3, 4, 5, 6}),
        (dict(check_val_every_n_epoch=3), {2, 5}),
        (dict(val_check_interval=0.25), {0, 1, 2, 3, 4, 5, 6}),
        (dict(val_check_interval=2, check_val_every_n_epoch=2), {1, 3, 5}),
        (dict(val_check_interval=12, check_val_every_n_epoch=None), {2, 4}),
        (dict(limit_val_batches=0), set()),
    ],
    ids=str,
)
def test_a_validation_belongs_to_its_epoch(options, validated):
    model = Runs()
    fit(model, loader(), loader(samples=11, batch_size=4), max_epochs=7, **options)
    rows = model.epoch_records()
    assert_rows(rows, expected_records(model))
    assert {row["epoch"] for row in rows if "val_loss" in row} == validated


def test_a_run_without_a_loss_leaves_its_epoch_without_one():
    class Model(Runs):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch != 1:
                super().validation_step(batch, batch_idx)

    model = Model()
    with pytest.warns(UserWarning, match="no step of a validation gave a loss"):
        fit(model, loader(), loader(), max_epochs=3)
    assert_rows(model.epoch_records(), expected_records(model))


def test_records_are_plain_data(tmp_path):
    model = Runs()
    fit(model, loader(), [loader(11, 4), loader(6)], max_epochs=4, check_val_every_n_epoch=3)
    rows = model.epoch_records()
    assert json.loads(json.dumps(rows)) == rows
    names = list(dict.fromkeys(name for row in rows for name in row))
    assert names == ["epoch", "loss", "val_loss", "val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    with open(tmp_path / "losses.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    with open(tmp_path / "losses.csv", newline="") as file:
        read = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert read == rows


def test_records_are_a_copy():
    model = Runs()
    fit(model, loader(), loader())
    model.epoch_records()[0]["loss"] = 1e6
    model.epoch_records().clear()
    assert_rows(model.epoch_records(), expected_records(model))


def test_an_epoch_without_a_loss_is_a_row_with_nan():
    class Model(Runs):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.current_epoch != 1 else None

    model = Model()
    with pytest.warns(UserWarning, match="no step of epoch 1 gave a loss"):
        fit(model, loader(), loader(), max_epochs=3)
    rows = model.epoch_records()
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [math.isnan(row["loss"]) for row in rows] == [False, True, False]
    assert [row["val_loss"] for row in rows] == close([mean(pairs) for _, pairs in model.runs])


def test_records_before_during_and_after_fits():
    class Model(Runs):
        def on_train_epoch_end(self):
            assert len(self.epoch_records()) == len(self.epoch_losses)
            assert "val_loss" in self.epoch_records()[-1]

        def on_validation_epoch_end(self):
            assert len(self.epoch_records()) == len(self.epoch_losses)

    model = Model()
    assert model.epoch_records() == []
    fit(model, loader(), loader(), max_epochs=2)
    fit(model, loader(), loader(), max_epochs=1)
    rows = model.epoch_records()
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [row["loss"] for row in rows] == model.epoch_losses
    assert [row["val_loss"] for row in rows] == close([mean(pairs) for _, pairs in model.runs])


@pytest.mark.parametrize("clear", [lambda model: model.epoch_history.clear(), lambda model: model.epoch_losses.clear()])
def test_records_start_afresh_when_the_history_is_cleared(clear):
    model = Runs()
    fit(model, loader(), loader(), max_epochs=3)
    clear(model)
    assert model.epoch_records() == []
    model.steps.clear()
    model.runs.clear()
    fit(model, loader(), loader(), max_epochs=2)
    assert_rows(model.epoch_records(), expected_records(model))


def test_records_after_a_resume(tmp_path):
    options = dict(check_val_every_n_epoch=3)
    model = Runs()
    fit(model, loader(), loader(), max_epochs=4, **options).save_checkpoint(tmp_path / "last.ckpt")
    again = Runs()
    trainer(max_epochs=7, **options).fit(again, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    again.steps[:0], again.runs[:0] = model.steps, model.runs
    assert_rows(again.epoch_records(), expected_records(again))
    assert [row["epoch"] for row in again.epoch_records() if "val_loss" in row] == [2, 5]


def test_records_without_loss_among_the_keys():
    class Model(Runs):
        epoch_loss_keys = ("mse", "mae")

        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            self.log("train/mse", loss)
            return {"loss": loss, "mae": 0.5}

        def validation_step(self, batch, batch_idx):
            self.log("mae", 0.25)
            return {"mse": 1.5}

    model = Model()
    fit(model, loader(), loader())
    for row, loss in zip(model.epoch_records(), epoch_means(model.steps), strict=True):
        assert {**row, "epoch": 0} == {"epoch": 0, "mse": close(loss), "mae": 0.5, "val_mse": 1.5, "val_mae": 0.25}


def test_rows_and_picture_after_the_losses_alone_were_cleared_have_no_validation_of_before():
    model = Runs()
    fit(model, loader(), loader(), max_epochs=3)
    model.epoch_losses.clear()
    model.steps.clear()
    model.runs.clear()
    fit(model, loader(), loader(), max_epochs=3, check_val_every_n_epoch=3)
    assert_rows(model.epoch_records(), expected_records(model))
    (curve,) = [line for line in model.plot_epoch_losses()[1].lines if line.get_label() == "loss (val)"]
    assert list(curve.get_xdata()) == [3]


def test_rows_after_going_back_to_an_earlier_checkpoint(tmp_path):
    model = Runs()
    runner = fit(model, loader(), loader(), max_epochs=1)
    runner.save_checkpoint(tmp_path / "first.ckpt")
    steps, runs = list(model.steps), list(model.runs)
    fit(model, loader(), loader(), max_epochs=3)
    model.steps, model.runs = steps, runs
    trainer(max_epochs=2).fit(model, loader(), loader(), ckpt_path=tmp_path / "first.ckpt")
    assert_rows(model.epoch_records(), expected_records(model))
