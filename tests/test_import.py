import subprocess
import sys

import pytest


def printed(*lines):
    """The words that a fresh interpreter prints as its last line."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_adds_only_its_own_modules_to_torchmetrics():
    added = printed(
        "import sys, torchmetrics",
        "before = set(sys.modules)",
        "import epoch_mixin",
        "print(*set(sys.modules) - before)",
    )
    assert "epoch_mixin.mixin" in added
    assert {name.partition(".")[0] for name in added} == {"epoch_mixin"}


@pytest.mark.parametrize(
    ("flavour", "other"), [("pytorch_lightning", "lightning"), ("lightning.pytorch", "pytorch_lightning")]
)
def test_recording_under_one_flavour_of_lightning_leaves_the_other_alone(flavour, other):
    names = printed(
        f"import sys, torch, {flavour} as pl",
        "from epoch_mixin import EpochLossMixin",
        "class Model(EpochLossMixin, pl.LightningModule):",
        "    def training_step(self, batch, batch_idx):",
        "        return batch.sum()",
        "model = Model()",
        "model.training_step(torch.ones(2), 0)",
        "model.on_train_epoch_end()",
        "assert model.epoch_losses == [2]",
        "print(*sys.modules)",
    )
    assert flavour in names
    assert other not in names
