import copy
import gc
import inspect
import io
import warnings
import weakref

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.model_summary import ModelSummary

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, fit, loader, trainer

# Every method of a LightningModule that Lightning may call or ask about.
METHODS = [
    name
    for name, _ in inspect.getmembers(pl.LightningModule, inspect.isfunction)
    if name.startswith(("on_", "configure_", "optimizer_"))
    or name.endswith(("_step", "_dataloader"))
    or name in ("setup", "teardown", "forward", "load_state_dict", "transfer_batch_to_device")
]


class Deep(Net):
    """Has chance in its steps and something of each kind that ends up in a ``state_dict``."""

    def __init__(self, width=8, dropout=0.5):
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.ones(2, 4)
        self.layer = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(dropout), torch.nn.Linear(width, 1)
        )
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.layer(x) * self.scale


class DeepTracked(EpochLossMixin, Deep):
    pass


def both(*args, **kwargs):
    """The same model without the mixin and with it."""
    models = []
    for cls in (Deep, DeepTracked):
        torch.manual_seed(1)
        models.append(cls(*args, **kwargs))
    return models


def assert_same(one, other):
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "options",
    [{}, dict(accumulate_grad_batches=2), dict(precision="bf16-mixed"), dict(precision="64-true", max_steps=7)],
    ids=["plain", "accumulation", "bf16-mixed", "64-true, max_steps"],
)
def test_weights_are_the_same_bit_for_bit(options):
    states = []
    for model in both():
        torch.manual_seed(2)
        runner = fit(model, loader(), loader(samples=6), **options)
        states.append((model.state_dict(), runner.optimizers[0].state_dict()["param_groups"], torch.rand(3)))
    (weights, groups, chance), (tracked_weights, tracked_groups, tracked_chance) = states
    assert_same(weights, tracked_weights)
    assert groups == tracked_groups
    assert torch.equal(chance, tracked_chance)


def test_the_module_looks_the_same_before_and_after_training():
    plain, tracked = both()
    for model in (plain, tracked):
        model.seen = []
    for _ in range(2):
        for look in (
            lambda model: list(model.state_dict()),
            lambda model: [name for name, _ in model.named_modules()],
            lambda model: [name for name, _ in model.named_parameters()],
            lambda model: [name for name, _ in model.named_buffers()],
            lambda model: dict(model.hparams),
            lambda model: str(ModelSummary(model, max_depth=-1)),
            lambda model: repr(model).replace("DeepTracked", "Deep"),
        ):
            assert look(tracked) == look(plain)
        for model in (plain, tracked):
            torch.manual_seed(2)
            fit(model, loader(), loader())


def test_weights_load_both_ways_strictly():
    plain, tracked = both()
    fit(tracked)
    plain.load_state_dict(tracked.state_dict(), strict=True)
    assert_same(plain.state_dict(), tracked.state_dict())
    tracked.load_state_dict(plain.state_dict(), strict=True)


def test_hyperparameters_are_those_of_the_users_init():
    class Model(EpochLossMixin, pl.LightningModule):
        def __init__(self, width, rate=0.1):
            super().__init__()
            self.save_hyperparameters()

    assert dict(Model(3).hparams) == {"width": 3, "rate": 0.1}
    assert inspect.signature(Model) == inspect.signature(type("Plain", (pl.LightningModule,), dict(vars(Model))))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("script", [torch.jit.script, Deep.to_torchscript], ids=["torch.jit.script", "to_torchscript"])
def test_torchscript(script, trained):
    scripts, x = [], torch.ones(3, 4)
    for model in both():
        if trained:
            torch.manual_seed(2)
            fit(model)
        # a bare `torch.jit.script` would stumble over `LightningModule.trainer`
        model._jit_is_scripting = True
        file = io.BytesIO()
        torch.jit.save(script(model.eval()), file)
        file.seek(0)
        scripts.append(torch.jit.load(file))
    assert scripts[0].code == scripts[1].code
    assert torch.equal(scripts[0](x), scripts[1](x))


def test_traced_and_exported_models_are_the_same():
    plain, tracked = (model.eval() for model in both())
    fit(tracked)
    tracked.trainer = None
    plain.load_state_dict(tracked.state_dict())
    x = torch.ones(3, 4)
    exported = [torch.export.export(model.eval(), (x,)).module()(x) for model in (plain, tracked)]
    assert torch.equal(*exported)


def test_no_graph_is_kept_alive():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            hidden = self.layer(batch[0])
            loss = hidden.square().mean()
            self.refs = [weakref.ref(hidden), weakref.ref(loss)]
            return {"loss": loss, "hidden": hidden}

    model = Model()
    model.on_train_epoch_start()
    gc.disable()
    try:
        for batch in loader():
            model.training_step(batch, 0)
            assert [ref() for ref in model.refs] == [None, None]
    finally:
        gc.enable()
    assert not model.running_epoch_loss().requires_grad


def test_no_batch_is_kept_alive():
    model = Tracked()
    batch = (torch.ones(3, 4), torch.ones(3, 1))
    refs = [weakref.ref(tensor) for tensor in batch]
    model.training_step(batch, 0)
    del batch
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize("name", METHODS)
def test_lightning_finds_the_same_methods_overridden(name):
    def own(self, *args, **kwargs):
        pass

    for base in (pl.LightningModule, Net, type("Own", (Net,), {name: own})):
        tracked = type("Model", (EpochLossMixin, base), {})
        assert is_overridden(name, tracked()) == is_overridden(name, base())
        assert inspect.signature(getattr(tracked, name)) == inspect.signature(getattr(base, name))
        assert getattr(tracked, name).__name__ == getattr(base, name).__name__


def test_a_step_keeps_its_name_doc_and_signature():
    class Plain(pl.LightningModule):
        def training_step(self, batch: tuple, batch_idx: int = 0, *, extra: str = "") -> torch.Tensor:
            """What the user wrote."""

    class Model(EpochLossMixin, Plain):
        pass

    for name in ("__doc__", "__name__", "__qualname__", "__annotations__", "__module__"):
        assert getattr(Model.training_step, name) == getattr(Plain.training_step, name)
    assert inspect.signature(Model.training_step) == inspect.signature(Plain.training_step)
    assert inspect.signature(Model().training_step) == inspect.signature(Plain().training_step)
    assert inspect.getsource(Model.training_step) == inspect.getsource(Plain.training_step)


def test_step_output_is_handed_on_as_it_is():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return batch

    model = Model()
    for output in ({"loss": torch.ones((), requires_grad=True), "more": [1]}, torch.ones(1), None):
        before = copy.copy(output)
        assert model.training_step(output, 0) is output
        assert output == before


def warnings_of(work):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(warning.message) for warning in caught]


def test_training_says_nothing_that_it_would_not_say_without_the_mixin():
    plain, tracked = (
        set(warnings_of(lambda model=model: fit(model, loader(), loader(), enable_model_summary=True)))
        for model in both()
    )
    assert {text.replace("DeepTracked", "Deep") for text in tracked} == plain


@pytest.mark.parametrize(
    "missing", ["training_step", "configure_optimizers", "validation_step", "test_step", "predict_step"]
)
def test_what_a_module_lacks_lightning_says_as_ever(missing):
    methods = {name: getattr(Net, name) for name in ("training_step", "validation_step", "configure_optimizers")}
    methods.pop(missing, None)
    works = {"test_step": "test", "predict_step": "predict", "validation_step": "validate"}

    def warnings_and_errors(*bases):
        model = type("Model", bases, methods)()
        model.loss = model.noted_loss = lambda batch: torch.ones((), requires_grad=True)
        model.val_steps = []
        errors = []

        def work():
            try:
                getattr(trainer(), works.get(missing, "fit"))(model, loader())
            except Exception as error:
                errors.append((type(error), str(error)))

        return warnings_of(work), errors

    assert warnings_and_errors(EpochLossMixin, pl.LightningModule) == warnings_and_errors(pl.LightningModule)


@pytest.mark.filterwarnings("ignore:Model.training_step")
@pytest.mark.parametrize("output", ["text", torch.ones(3), {"lost": torch.ones(())}], ids=str)
def test_what_lightning_refuses_it_refuses_in_its_own_words(output):
    def refusal(base):
        try:
            fit(type("Model", (base,), {"training_step": lambda self, batch, batch_idx: output})())
        except Exception as error:
            return type(error), str(error)

    assert refusal(Net) is not None
    assert refusal(Tracked) == refusal(Net)


def test_errors_of_the_users_step_come_through():
    class Mine(Exception):
        pass

    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            raise Mine("as it was")

    with pytest.raises(Mine, match="as it was"):
        fit(Model())
