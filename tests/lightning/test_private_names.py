"""A private name of torch, torchmetrics or Lightning may go: the package still imports, trains and records."""

import json
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch

from epoch_mixin import EpochLossMixin
from tests.helpers import Tracked, close, epoch_means, fit, loader


class Given(EpochLossMixin, pl.LightningModule):
    def training_step(self, batch, batch_idx=0):
        return batch


# Lightning and torchmetrics are compiled with other names in place of some of theirs.
FIT = """
import importlib.machinery, json, re, sys
load, renamed = importlib.machinery.SourceFileLoader.get_code, []

def get_code(self, module):
    if module.partition(".")[0] not in ("pytorch_lightning", "torchmetrics"):
        return load(self, module)
    path = self.get_filename(module)
    source, count = re.subn(r"\\b(NAMES)\\b", r"renamed_\\1", self.get_data(path).decode())
    renamed.append(count)
    return compile(source, path, "exec", dont_inherit=True) if count else load(self, module)

importlib.machinery.SourceFileLoader.get_code = get_code
from tests.helpers import Tracked, fit, loader
model = Tracked()
fit(model, loader(), loader(7), max_epochs=3, val_check_interval=2)
assert sum(renamed)
print(json.dumps([model.steps, model.val_steps, model.epoch_history]))
"""


OTHERS = ["_val_check_time_interval", "total_batch_idx", "batch_progress", "_start_method", "data_fetcher", "_defaults"]


@pytest.mark.slow
@pytest.mark.parametrize("names", ["_trainer", "_current_fx_name|_forward_cache", "|".join(OTHERS)])
def test_a_fit_is_exact_where_lightning_or_torchmetrics_has_other_names(names):
    run = [sys.executable, "-c", FIT.replace("NAMES", names)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    steps, val_steps, history = json.loads(done.stdout.splitlines()[-1])
    assert history["loss"] == close(epoch_means(steps))
    runs = [(index // 2, *step[1:]) for index, step in enumerate(val_steps)]
    assert history["val_loss"] == close(epoch_means(runs))
    assert "epoch_loss" not in done.stderr


def test_steps_are_recorded_where_torch_has_no_way_to_disable_torch_functions(monkeypatch):
    model = Given()
    with monkeypatch.context() as patch:  # `torch` itself needs it in a fit
        patch.delattr(torch._C, "DisableTorchFunctionSubclass")
        for value in (torch.tensor(1.0), torch.tensor(2.0), torch.nn.Parameter(torch.tensor(6.0))):
            model.training_step(value)
        model.on_train_epoch_end()
    assert model.epoch_losses == [3.0]


def test_a_mark_of_the_compiler_that_is_gone_is_not_missed(monkeypatch):
    disable = torch.compiler.disable

    def without_mark(*args, **kwargs):
        disabled = disable(*args, **kwargs)
        vars(disabled).pop("_torchdynamo_orig_callable", None)
        return disabled

    monkeypatch.setattr(torch.compiler, "disable", without_mark)

    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    model = Model()
    fit(model, loader())
    assert model.epoch_losses == close(epoch_means(model.steps))
