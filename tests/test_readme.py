"""Every claim of README.md that is code, output, a picture, a path or a table is run or looked up."""

import contextlib
import io
import os
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib.testing.compare import compare_images

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NUMBERS = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What README's code printed, block by block, and the folder that it ran in."""
    matplotlib.use("agg")
    folder, before = tmp_path_factory.mktemp("readme"), Path.cwd()
    os.chdir(folder)
    namespace, printed = {}, []
    try:
        for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "README.md", "exec"), namespace)
            printed.append(out.getvalue())
    finally:
        os.chdir(before)
    return folder, printed, namespace


def test_the_first_code_prints_what_it_says(run):
    _, printed, _ = run
    (said,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    lines = [line for line in printed[0].splitlines() if line.startswith("[")]
    for line, expected in zip(lines, said.splitlines(), strict=True):
        # Another processor may round otherwise.
        assert list(map(float, NUMBERS.findall(line))) == pytest.approx(
            list(map(float, NUMBERS.findall(expected))), abs=0.03
        )


def test_the_first_code_draws_the_picture(run):
    folder, _, _ = run
    assert compare_images(ROOT / "examples/epoch_losses.png", folder / "epoch_losses.png", tol=5) is None


def test_the_recipes_do_what_they_say(run):
    folder, printed, namespace = run
    assert [row.split(",")[0] for row in printed[1].splitlines()] == ["epoch", *"01234"]
    assert list(folder.glob("epoch*.ckpt")), "ModelCheckpoint saved nothing"
    labels = [line.get_label() for line in namespace["axes"].lines]
    assert len(labels) == 8 and {label.split(":")[0] for label in labels} == {"1 epochs", "3 epochs"}
    assert len(namespace["model"].epoch_losses) == 1


def test_it_stays_a_page():
    assert len(README.splitlines()) <= 170
    assert not re.search("one look at the device|losses that wait|own unit|passes by", README)


@pytest.mark.parametrize("page", ["README.md", "tests/benchmarks/README.md"])
def test_the_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:examples|tests|epoch_mixin|\.ci)/[\w/.-]+)`", text) + re.findall(r"\]\(([\w/.]+)\)", text)
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_example_is_listed():
    listed = re.findall(r"`(\w+\.py)`", (ROOT / "examples/README.md").read_text().split("## ")[0])
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))
