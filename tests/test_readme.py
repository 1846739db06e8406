"""Every claim of README.md that is code, output, a picture, a path or a table is run or looked up."""

import contextlib
import csv
import io
import json
import math
import os
import re
import runpy
from pathlib import Path

import matplotlib
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from matplotlib.testing.compare import compare_images

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
QUICKSTART = (ROOT / "examples/quickstart.py").read_text()
NUMBERS = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the quickstart and then README's code printed, block by block, and the folder that they ran in."""
    matplotlib.use("agg")
    folder, before = tmp_path_factory.mktemp("readme"), Path.cwd()
    os.chdir(folder)
    namespace, printed = {}, []
    try:
        for code in [QUICKSTART, *re.findall(r"```python\n(.*?)```", README, re.DOTALL)]:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "README.md", "exec"), namespace)
            printed.append(out.getvalue())
    finally:
        os.chdir(before)
    return folder, printed, namespace


@pytest.fixture(autouse=True)
def own_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_quickstart_gives_the_numbers_of_the_first_lines(run):
    _, printed, _ = run
    lines = re.findall(r"\[[\d., ]+\]", printed[0])
    for line, expected in zip(lines, re.findall(r"# (\[[\d., ]+\])", README), strict=True):
        # Another processor may round otherwise.
        assert list(map(float, NUMBERS.findall(line))) == pytest.approx(
            list(map(float, NUMBERS.findall(expected))), abs=0.03
        )


def test_the_quickstart_draws_the_picture(run):
    folder, _, _ = run
    assert compare_images(ROOT / "examples/epoch_losses.png", folder / "epoch_losses.png", tol=5) is None


def test_the_recipes_do_what_they_say(run):
    folder, printed, namespace = run
    assert list(folder.glob("epoch=*-train_mean=*.ckpt")) and list(folder.glob("epoch=*-val_mean=*.ckpt"))
    assert re.findall(r"^(epoch|\d),", printed[2], re.MULTILINE) == ["epoch", "0", "1"]
    with open(folder / "lightning_logs/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch_loss"]]
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    table = csv.DictReader(io.StringIO(printed[2][printed[2].index("epoch,") :]))
    table = [{name: float(mean) for name, mean in row.items()} for row in table]
    assert lines == table and [line["epoch"] for line in lines] == [0, 1] and namespace["best"] == 1
    for row, line in zip(rows, lines, strict=True):
        assert float(row["epoch_loss"]) == pytest.approx(line["loss"], rel=1e-6)
        assert float(row["epoch_val_loss"]) == pytest.approx(line["val_loss"], rel=1e-6)
    curves = {line.get_label(): list(line.get_xdata()) for line in namespace["axes"].lines}
    for lr in (0.001, 0.003):
        assert curves[f"lr {lr}: loss (train)"] == [1]
        assert curves[f"lr {lr}: loss (val)"] == [0.25, 0.5, 0.75, 1]
    assert len(namespace["model"].epoch_losses) == 1


def test_a_row_of_an_epoch_without_validation_has_none(run):
    model = run[2]["LitLogged"]()
    trainer = quiet_trainer(max_epochs=3, check_val_every_n_epoch=2, logger=pl.loggers.CSVLogger("."))
    trainer.fit(model, run[2]["train_loader"], run[2]["val_loader"])
    lines = [json.loads(line) for line in Path("losses.jsonl").read_text().splitlines()]
    assert lines == model.epoch_records() and ["val_loss" in line for line in lines] == [False, True, False]


def quiet_trainer(**options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return pl.Trainer(accelerator="cpu", **{**quiet, **options})


@pytest.mark.parametrize(
    "options",
    [{}, dict(check_val_every_n_epoch=2), dict(val_check_interval=0.5), dict(num_sanity_val_steps=0)],
    ids=str,
)
def test_each_kept_file_is_named_with_the_loss_of_its_own_epoch(run, options):
    stop, *keep = run[2]["stop"], run[2]["best_train"], run[2]["best_val"]
    own = [
        pl.callbacks.EarlyStopping(stop.monitor, check_finite=True, check_on_train_epoch_end=True),
        pl.callbacks.EarlyStopping("val_mean", check_finite=True, check_on_train_epoch_end=False),
    ]
    for kept in keep:
        at = kept._save_on_train_epoch_end
        own.append(
            pl.callbacks.ModelCheckpoint("kept", kept.filename, kept.monitor, save_top_k=-1, save_on_train_epoch_end=at)
        )
    model = run[2]["LitMonitored"]()
    trainer = quiet_trainer(max_epochs=4, callbacks=own, enable_checkpointing=True, **options)
    trainer.fit(model, run[2]["train_loader"], run[2]["val_loader"])
    assert len(model.epoch_losses) == 4
    means = {"train_mean": [], "val_mean": []}
    for path in sorted(Path("kept").iterdir(), key=lambda path: int(re.search(r"step=(\d+)", path.name)[1])):
        name, mean = re.search(r"(train_mean|val_mean)=([\d.]+)\.ckpt", path.name).groups()
        means[name].append(float(mean))
        history = torch.load(path, weights_only=True)["epoch_mixin"]["history"]
        assert history[{"train_mean": "loss", "val_mean": "val_loss"}[name]][-1] == pytest.approx(float(mean), abs=1e-4)
    assert means["train_mean"] == pytest.approx(model.epoch_losses, abs=1e-4)
    # README: the file of the best validation has no training mean of its own epoch yet.
    first_val = min(Path("kept").glob("*val_mean*"), key=lambda path: int(re.search(r"step=(\d+)", path.name)[1]))
    history = torch.load(first_val, weights_only=True)["epoch_mixin"]["history"]
    assert len(history.get("loss", [])) == (1 if "check_val_every_n_epoch" in options else 0)
    assert means["val_mean"] == pytest.approx(model.epoch_history["val_loss"], abs=1e-4)


def test_the_recipe_for_the_progress_bar_shows_the_mean_with_the_latest_step(run):
    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append((outputs["loss"].item(), len(batch[0])))
            shown.append(module.running_epoch_loss().item())

    losses, shown = [], []
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=9, callbacks=[Reads()])
    trainer.fit(run[2]["LitBar"](), run[2]["train_loader"], run[2]["val_loader"])
    mean = math.fsum(loss * size for loss, size in losses) / math.fsum(size for _, size in losses)
    assert shown[-1] == pytest.approx(mean)
    assert trainer.progress_bar_metrics["mean_loss"] == pytest.approx(mean)


def test_a_loop_with_fabric(run):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = run[2]["LitDigits"]()
    ours, optimizer = fabric.setup(model, model.configure_optimizers())
    losses = []
    for batch_idx, batch in enumerate(run[2]["train_loader"]):
        optimizer.zero_grad()
        loss = ours.training_step(batch, batch_idx)
        fabric.backward(loss)
        optimizer.step()
        losses.append((loss.item(), len(batch[0])))
    ours.on_train_epoch_end()
    mean = math.fsum(loss * size for loss, size in losses) / math.fsum(size for _, size in losses)
    assert ours.epoch_losses == model.epoch_losses == [pytest.approx(mean, rel=1e-9)]


def test_the_recipe_for_early_stopping_stops_at_nan(run):
    class LitNaN(run[2]["LitMonitored"]):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if self.current_epoch else 1.0)

    model, namespace = LitNaN(), run[2]
    stop = pl.callbacks.EarlyStopping("train_mean", check_finite=True, check_on_train_epoch_end=True)
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        val_check_interval=0.5,
        callbacks=[stop],
    )
    trainer.fit(model, namespace["train_loader"], namespace["val_loader"])
    assert len(model.epoch_losses) == 2 and math.isnan(model.epoch_losses[1])


@pytest.mark.slow
def test_the_table_of_recipes_is_what_its_script_prints(capfd):
    printed = runpy.run_path(str(ROOT / "tests/benchmarks/recipes_compared.py"), run_name="__main__")
    _, _, *rows, _, versions = [row for row in capfd.readouterr().out.splitlines() if row[:1] in ("|", "", "M")]
    assert len(rows) == len(printed["RECIPES"]) == 10 and "pytorch-lightning" in versions
    right = [recipe.__doc__ for recipe in printed["RIGHT"]]
    for row in rows:
        _, recipe, returned, exact, ours, _ = re.split(r" *\| *", row)
        assert ours == exact and (returned == exact) is (recipe in right), recipe
    assert versions not in README or all(row in README for row in rows)


def test_it_stays_a_page():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("page", ["README.md", "tests/benchmarks/README.md", ".github/CONTRIBUTING.md"])
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:examples|tests|epoch_mixin|\.ci|\.github)/[\w/.-]+)`", text) + re.findall(
        r"\]\(([\w/.]+)\)", text
    )
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_example_is_listed():
    listed = re.findall(r"`(\w+\.py)`", (ROOT / "examples/README.md").read_text().split("## ")[0])
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
