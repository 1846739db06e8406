"""Every example runs as a user would run it, scaled down, and shows what it promises."""

import ast
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def last_list(output):
    return ast.literal_eval(output[output.rindex("[") : output.rindex("]") + 1])


def line(output, start):
    """The rest of the line that begins so."""
    (rest,) = re.findall(rf"^{re.escape(start)}(.*)$", output, flags=re.MULTILINE)
    return rest


def check_quickstart(output):
    for name in ("loss    ", "val_loss"):
        losses = ast.literal_eval(line(output, name).strip())
        assert len(losses) == 3 and losses == sorted(losses, reverse=True) and losses[-1] > 0
    assert re.search(r"^saved the curves as .*epoch_losses\.png$", output, flags=re.MULTILINE)
    closed = re.findall(r"^epoch (\d): loss (\S+), val_loss (\S+)$", output, flags=re.MULTILINE)
    losses = ast.literal_eval(line(output, "loss    ").strip())
    assert [(int(epoch), float(loss)) for epoch, loss, _ in closed] == [(i, round(x, 4)) for i, x in enumerate(losses)]


def check_test_my_model(output):
    assert re.search(r"\b3 passed", output)


def check_recipes_compared(output):
    _, _, *rows, _, versions = output.splitlines()
    assert len(rows) == 8 and "pytorch-lightning" in versions
    for row in rows:
        _, recipe, returned, exact, ours, off, ours_off, _ = re.split(r" *\| *", row)
        assert ours == exact and abs(float(ours_off)) < 1e-9
        assert "`" in returned if off == "no number" else returned != exact, recipe
    readme = (ROOT / "README.md").read_text()
    assert versions not in readme or all(row in readme for row in rows)


def check_callback(output):
    bars = re.findall(r"^epoch +(\d+)  (\S+)  #+$", output, flags=re.MULTILINE)
    losses = [float(loss) for _, loss in bars]
    assert [int(epoch) for epoch, _ in bars] == [0, 1, 2] and losses == sorted(losses, reverse=True)
    assert line(output, "best: ") == f"epoch 2 of 3, {losses[-1]:.4f}"


def check_running_mean(output):
    losses = last_list(output)
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert re.search("mean_loss[=:]", output)  # Lightning takes another progress bar where `rich` is installed
    assert re.search(r"batches skipped: [1-9]", output)


def check_early_stopping(output):
    epochs = re.findall(r"^epoch (\d+): loss (\S+), learning rate (\S+)$", output, flags=re.MULTILINE)
    losses, rates = [float(loss) for _, loss, _ in epochs], [float(rate) for _, _, rate in epochs]
    assert line(output, "stopped after ") == f"{len(losses)} epochs, the best loss was {min(losses):.4f}"
    assert len(losses) < 50 and rates[-1] < rates[0]
    best = losses.index(min(losses))
    kept = f"epoch={best}-train_loss={losses[best]:.4f}.ckpt, which ends with loss {losses[best]:.4f}"
    assert line(output, "kept ") == kept


def check_vae(output):
    losses = {name: numbers(line(output, f"{name:18}")) for name in ("loss", "reconstruction", "kl")}
    assert losses["loss"][-1] < losses["loss"][0]
    for loss, reconstruction, kl in zip(*losses.values(), strict=True):
        assert loss == pytest.approx(reconstruction + kl, abs=0.002)
    assert len(numbers(line(output, f"{'val_kl':18}"))) == 3


def check_gan(output):
    losses = re.findall(r"^epoch (\d): g_loss (\S+), d_loss (\S+)$", output, flags=re.MULTILINE)
    assert [int(epoch) for epoch, *_ in losses] == [0, 1, 2]
    assert all(0 < float(loss) < 10 for _, *pair in losses for loss in pair)


def check_third_party_model(output):
    losses = last_list(output)
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def check_existing_module(output):
    for stage in ("train:", "val:  "):
        theirs, ours = numbers(line(output, f"last epoch, {stage}"))
        assert theirs == pytest.approx(ours, rel=2e-6, abs=2e-6)


def check_resume(output):
    (exact,) = numbers(line(output, "every step of the epoch"))
    (ours,) = numbers(line(output, "model.epoch_losses[1]"))
    (logged,) = numbers(line(output, "self.log(on_epoch=True)"))
    assert ours == pytest.approx(exact, rel=1e-9) and logged != pytest.approx(exact, rel=1e-3)
    assert "epoch=1-step=40.ckpt" in output


def check_distributed(output):
    exact = numbers(" ".join(re.findall(r"every step of both (\S+)", output)))
    closed = numbers(" ".join(re.findall(r"epoch_losses\[-1\] +(\S+)", output)))
    assert len(exact) == 3 and closed == pytest.approx(exact, rel=1e-9)
    assert last_list(output) == pytest.approx(exact, rel=1e-9)
    (logged,) = numbers(line(output, "self.log(on_epoch=True, sync_dist=True) says of the last epoch: "))
    assert logged != pytest.approx(exact[-1], rel=1e-3)


# Script, its arguments, and the files that it leaves.
SCRIPTS = [
    ("quickstart.py", ["--max-epochs=3"], ["epoch_losses.png"]),
    ("test_my_model.py", [], []),
    ("recipes_compared.py", [], []),
    ("callback.py", ["--max-epochs=3"], []),
    ("running_mean.py", ["--max-epochs=3"], []),
    ("early_stopping.py", [], []),
    ("vae.py", ["--max-epochs=3"], []),
    ("gan.py", ["--max-epochs=3"], []),
    ("third_party_model.py", ["--max-epochs=3"], []),
    ("existing_module.py", ["--max-epochs=3"], []),
    ("resume.py", [], []),
    ("distributed.py", [], []),
]


def test_no_example_is_missing_here():
    assert sorted(script for script, _, _ in SCRIPTS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments", "leaves"), SCRIPTS, ids=[script for script, _, _ in SCRIPTS])
def test_example(script, arguments, leaves, tmp_path):
    runner = ["-m", "pytest", "-p", "no:cacheprovider"] if script.startswith("test_") else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, *runner, EXAMPLES / script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    globals()[f"check_{script.removesuffix('.py')}"](run.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == leaves
