"""Every example runs as a user would run it, scaled down, and shows what it promises."""

import ast
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
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
    for name in ("loss:", "val_loss:"):
        losses = ast.literal_eval(line(output, name).strip())
        assert len(losses) == 5 and losses == sorted(losses, reverse=True) and losses[-1] > 0


def check_test_my_model(output):
    assert re.search(r"\b3 passed", output)


def check_callback(output):
    bars = re.findall(r"^epoch (\d+)  (\S+)  #+$", output, flags=re.MULTILINE)
    losses = [float(loss) for _, loss in bars]
    assert [int(epoch) for epoch, _ in bars] == [0, 1, 2] and losses == sorted(losses, reverse=True)
    assert line(output, "best: ") == f"epoch 2 of 3, {losses[-1]:.2f}"


def check_running_mean(output):
    losses = last_list(output)
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert re.search("mean_loss[=:]", output)  # Lightning takes another progress bar where `rich` is installed
    assert re.search(r"batches skipped: [1-9]", output)


def check_early_stopping(output):
    losses = ast.literal_eval(line(output, "losses:").strip())
    epoch, kept, last = re.search(r"epoch=(\d+)-val_mean=(\S+).ckpt, whose val_loss is (\S+)", output).groups()
    assert float(kept) == float(last) and int(epoch) < len(losses) < 30


def check_vae(output):
    losses = {name: numbers(line(output, f"{name:18}")) for name in ("loss", "reconstruction", "kl")}
    assert losses["loss"][-1] < losses["loss"][0]
    for loss, reconstruction, kl in zip(*losses.values(), strict=True):
        assert loss == pytest.approx(reconstruction + kl, abs=0.02)
    assert len(numbers(line(output, f"{'val_kl':18}"))) == 3


def check_gan(output):
    losses = re.findall(r"^epoch (\d): g_loss (\S+), d_loss (\S+)$", output, flags=re.MULTILINE)
    assert [int(epoch) for epoch, *_ in losses] == [0, 1, 2]
    assert all(0 < float(loss) < 10 for _, *pair in losses for loss in pair)


def check_third_party_model(output):
    losses = last_list(output)
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def check_existing_module(output):
    for name in ("loss:", "val_loss:"):
        *ours, logged = numbers(line(output, name))
        assert len(ours) == 3 and ours[-1] == logged


def check_resume(output):
    (exact,) = numbers(line(output, "every step of the epoch"))
    (ours,) = numbers(line(output, "model.epoch_losses[1]"))
    (logged,) = numbers(line(output, "self.log(on_epoch=True)"))
    assert ours == exact and logged != pytest.approx(exact, rel=1e-3)


def check_distributed(output):
    pairs = re.findall(r"epoch_losses\[-1\] (\S+), exact (\S+)", output)
    assert len(pairs) == 3 and all(ours == exact for ours, exact in pairs)
    assert [f"{loss:.6f}" for loss in last_list(output)] == [exact for _, exact in pairs]
    (logged,) = numbers(line(output, "self.log(on_epoch=True, sync_dist=True), last epoch: "))
    assert logged != pytest.approx(float(pairs[-1][1]), rel=1e-3)


# A script, and the files that it leaves.
SCRIPTS = {path.name: [] for path in EXAMPLES.glob("*.py")} | {"quickstart.py": ["epoch_losses.png"]}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_example(script, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    if script in ("distributed.py", "test_my_model.py"):  # these need a process of their own
        runner = ["-m", "pytest", "-p", "no:cacheprovider"] if script.startswith("test_") else []
        monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        subprocess.run([sys.executable, *runner, EXAMPLES / script], timeout=120, check=True)
    else:
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    globals()[f"check_{script.removesuffix('.py')}"](capfd.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == SCRIPTS[script]


def test_an_example_is_short():
    assert all(len((EXAMPLES / script).read_text().splitlines()) < 60 for script in SCRIPTS)
