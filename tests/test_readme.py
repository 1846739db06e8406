"""Every claim of README.md that is code, output, a picture, a path or a table is run or looked up."""

import contextlib
import csv
import io
import math
import os
import re
import runpy
from pathlib import Path

import matplotlib
import pytest
import pytorch_lightning as pl
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
    assert re.findall(r"^(epoch|\d),", printed[1], re.MULTILINE) == ["epoch", "0", "1"]
    with open(folder / "lightning_logs/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch_loss"]]
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert all(float(row["epoch_loss"]) > 0 and float(row["epoch_val_loss"]) > 0 for row in rows)
    assert list(folder.glob("epoch*.ckpt")), "ModelCheckpoint saved nothing"
    curves = {line.get_label(): list(line.get_xdata()) for line in namespace["axes"].lines}
    for lr in (0.001, 0.003):
        assert curves[f"lr {lr}: loss (train)"] == [0]
        assert curves[f"lr {lr}: loss (val)"] == [0, 0.25, 0.5, 0.75]
    assert len(namespace["model"].epoch_losses) == 1


def test_the_recipe_for_early_stopping_stops_at_nan(run):
    class LitNaN(run[2]["LitMonitored"]):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if self.current_epoch else 1.0)

    model, namespace = LitNaN(), run[2]
    stop = pl.callbacks.EarlyStopping("train_loss", check_finite=True, check_on_train_epoch_end=True)
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
    runpy.run_path(str(ROOT / "tests/benchmarks/recipes_compared.py"), run_name="__main__")
    _, _, *rows, _, versions = [row for row in capfd.readouterr().out.splitlines() if row[:1] in ("|", "", "M")]
    assert len(rows) == 8 and "pytorch-lightning" in versions
    for row in rows:
        _, recipe, returned, exact, ours, _ = re.split(r" *\| *", row)
        assert ours == exact != returned, recipe
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
