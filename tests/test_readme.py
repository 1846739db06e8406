"""Every claim of README.md that is code, a path or a table is run or looked up."""

import re
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs_from_top_to_bottom(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), namespace)
    assert len(namespace["model"].epoch_losses) == 3
    assert namespace["trainer"].callback_metrics["train_loss"].item() == pytest.approx(
        namespace["model"].epoch_losses[-1]
    )
    assert (tmp_path / "epoch_losses.png").stat().st_size > 0


def test_the_files_it_names_exist():
    named = re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(
        r"`((?:examples|tests|epoch_mixin|\.ci)/[\w/.-]+)`", README
    )
    assert "examples/epoch_losses.png" in named
    assert not [name for name in named if not (ROOT / name).exists()]
