import copy
import importlib
import inspect
import pickle
import subprocess
import sys
from unittest.mock import MagicMock

import lightning.pytorch
import pytest
import pytorch_lightning
import torch

from epoch_mixin import EpochLossMixin
from tests.helpers import close, epoch_means, loader, mean


class Both:
    """The user's part of a model of either flavour. Notes its steps as `Net` does."""

    def __init__(self, width: int = 4, rate: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
        self.steps = []
        self.val_steps = []

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.steps.append((self.current_epoch, loss.item(), len(batch[0])))
        return loss

    def validation_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[1]).abs().mean()
        if self._trainer is None or not self.trainer.sanity_checking:
            self.val_steps.append((self.current_epoch, loss.item(), len(batch[0])))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(samples=11, batch_size=4)


class OldModel(Both, EpochLossMixin, pytorch_lightning.LightningModule):
    pass


class NewModel(EpochLossMixin, Both, lightning.pytorch.LightningModule):
    pass


flavours = pytest.mark.parametrize(
    ("flavour", "Model"), [(pytorch_lightning, OldModel), (lightning.pytorch, NewModel)], ids=["pytorch_", "lightning."]
)

QUIET = dict(
    accelerator="cpu",
    devices=1,
    max_epochs=2,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)


def assert_exact(model):
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


@flavours
def test_fit(flavour, Model):
    model = Model()
    flavour.Trainer(**QUIET).fit(model)
    assert_exact(model)


@flavours
def test_checkpoint(flavour, Model, tmp_path):
    model, runner = Model(), flavour.Trainer(**QUIET)
    runner.fit(model)
    runner.save_checkpoint(tmp_path / "model.ckpt")
    assert Model.load_from_checkpoint(tmp_path / "model.ckpt").epoch_history == model.epoch_history


@flavours
def test_clones_made_in_mid_epoch(flavour, Model):
    class Cloner(flavour.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2):
                self.clones = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]

    model, cloner = Model(), Cloner()
    flavour.Trainer(**QUIET, callbacks=[cloner]).fit(model)
    for clone in cloner.clones:
        clone.steps.clear(), clone.val_steps.clear()
        clone.epoch_history.clear()
        flavour.Trainer(**QUIET).fit(clone)
        assert_exact(clone)
    assert_exact(model)


@flavours
def test_mock_trainer(flavour, Model):
    model = Model()
    model.trainer = MagicMock(current_epoch=0)
    for index, batch in enumerate(loader()):
        model.training_step(batch, index)
    model.on_train_epoch_end()
    assert model.epoch_losses == close(epoch_means(model.steps))


def fabric_of(flavour):
    names = {"pytorch_lightning": "lightning_fabric", "lightning.pytorch": "lightning.fabric"}
    return importlib.import_module(names[flavour.__name__]).Fabric


@flavours
def test_fabric(flavour, Model):
    fabric = fabric_of(flavour)(accelerator="cpu", devices=1)
    fabric.launch()
    model = Model()
    wrapped, optimizer = fabric.setup(model, model.configure_optimizers())
    batches = fabric.setup_dataloaders(loader())
    expected = []
    for _ in range(3):
        model.steps.clear()
        model.on_train_epoch_start()
        for index, batch in enumerate(batches):
            fabric.backward(wrapped.training_step(batch, index))
            optimizer.step()
            optimizer.zero_grad()
        model.on_train_epoch_end()
        expected.append(mean(step[1:] for step in model.steps))
    assert model.epoch_losses == close(expected)


@flavours
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_fabric_precision(flavour, Model, precision, dtype):
    fabric = fabric_of(flavour)(accelerator="cpu", devices=1, precision=precision)
    model = Model()
    wrapped, _ = fabric.setup(model, model.configure_optimizers())
    assert model.layer.weight.dtype == dtype
    model.on_train_epoch_start()
    for index, batch in enumerate(loader(dtype=dtype)):
        fabric.backward(wrapped.training_step(batch, index))
    model.on_train_epoch_end()
    assert model.epoch_losses == close(epoch_means(model.steps))


def cli_of(flavour):
    return importlib.import_module(flavour.__name__ + ".cli").LightningCLI


@flavours
def test_lightning_cli(flavour, Model, tmp_path):
    LightningCLI = cli_of(flavour)
    quiet = {**QUIET, "default_root_dir": str(tmp_path)}
    cli = LightningCLI(
        Model, trainer_defaults=quiet, save_config_callback=None, args=["fit", "--model.width=4", "--model.rate=0.02"]
    )
    assert cli.model.hparams.rate == 0.02
    assert_exact(cli.model)


@flavours
def test_lightning_cli_sees_the_users_init(flavour, Model, tmp_path):
    LightningCLI = cli_of(flavour)
    plain = type("Plain", (Both, flavour.LightningModule), {})
    assert inspect.signature(Model) == inspect.signature(plain)
    options = []
    for cls in (Model, plain):
        cli = LightningCLI(cls, run=False, trainer_defaults=QUIET, save_config_callback=None, args=["--model.rate=0.5"])
        options.append(cli.config["model"].as_dict())
        assert cli.model.hparams.rate == 0.5
    assert options[0] == options[1]


class Traceable:
    """Steps that can be compiled without a break."""

    def training_step(self, batch):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch):
        return (self.layer(batch[0]) - batch[1]).abs().mean()


@flavours
@pytest.mark.parametrize("options", [dict(backend="eager", fullgraph=True), dict(backend="aot_eager")], ids=str)
def test_compiled_model_in_a_trainer(flavour, Model, options):
    class Witness(flavour.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.steps.append((trainer.current_epoch, outputs["loss"].item(), len(batch[0])))

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if not trainer.sanity_checking:
                module.val_steps.append((trainer.current_epoch, outputs.item(), len(batch[0])))

    torch._dynamo.reset()
    model = type("Model", (Traceable, Model), {})()
    flavour.Trainer(**QUIET, callbacks=[Witness()]).fit(torch.compile(model, **options))
    assert len(model.steps) == 10 and len(model.val_steps) == 6
    assert_exact(model)


@pytest.mark.parametrize("options", [dict(backend="eager", fullgraph=True), dict(backend="aot_eager")], ids=str)
@pytest.mark.parametrize("flavour", [OldModel, NewModel])
def test_compiled_step_without_a_trainer(flavour, options):
    torch._dynamo.reset()
    model, pairs = type("Model", (Traceable, flavour), {})(), []
    step = torch.compile(model.training_step, **options)
    model.on_train_epoch_start()
    for batch in loader():
        loss = step(batch)
        loss.backward()
        pairs.append((loss.item(), len(batch[0])))
    model.on_train_epoch_end()
    assert model.epoch_losses == [close(mean(pairs))]


def test_weights_of_a_compiled_model_are_the_same_bit_for_bit():
    weights = []
    for bases in ((Traceable, Both, pytorch_lightning.LightningModule), (Traceable, OldModel)):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = type("Model", bases, {})()
        pytorch_lightning.Trainer(**QUIET).fit(torch.compile(model, backend="aot_eager"))
        weights.append(model.layer.weight)
    assert torch.equal(*weights)


def test_the_package_imports_neither_flavour():
    code = "import sys, epoch_mixin; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "epoch_mixin" in modules
    assert not {"pytorch_lightning", "lightning", "lightning_fabric", "jsonargparse"} & set(modules)
