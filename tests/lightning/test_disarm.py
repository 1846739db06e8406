"""Whatever a user's class does, each step is recorded once, in the stage that Lightning called."""

import copy
import functools
import pickle

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, Witness, close, epoch_means, fit, loader, mean, messages

HOOKS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_fit_end",
    "teardown",
    "on_save_checkpoint",
    "on_load_checkpoint",
]


def hooks_without_super():
    return type("Model", (Tracked,), dict.fromkeys(HOOKS, lambda self, *args, **kwargs: None))


def hooks_with_super():
    def calling_super(name):
        def hook(self, *args, **kwargs):
            return getattr(super(Model, self), name)(*args, **kwargs)

        return hook

    Model = type("Model", (Tracked,), {name: calling_super(name) for name in HOOKS})
    return Model


def hooks_with_super_twice():
    def calling_super(name):
        def hook(self, *args, **kwargs):
            getattr(super(Model, self), name)(*args, **kwargs)
            return getattr(super(Model, self), name)(*args, **kwargs)

        return hook

    Model = type("Model", (Tracked,), {name: calling_super(name) for name in HOOKS})
    return Model


def steps_without_super():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return 2 * self.loss(batch)

        def validation_step(self, batch, batch_idx):
            return 3 * self.loss(batch)

    return Model


def steps_calling_super_once():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return {"loss": 2 * super().training_step(batch, batch_idx)}

        def validation_step(self, batch, batch_idx):
            return 3 * super().validation_step(batch, batch_idx)

    return Model


def steps_calling_super_twice():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 2 * super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return 3 * super().validation_step(batch, batch_idx)

    return Model


def step_of_the_base_called_by_name():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return Net.training_step(self, batch, batch_idx) + Tracked.training_step(self, batch, batch_idx)

    return Model


def validation_step_calling_the_training_step():
    class Model(Tracked):
        def validation_step(self, batch, batch_idx):
            return 2 * self.training_step(batch, batch_idx)

    return Model


def training_step_calling_the_validation_step():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return 2 * self.validation_step(batch, batch_idx)

    return Model


def both_steps_calling_a_shared_one():
    class Model(EpochLossMixin, Net):
        def shared_step(self, batch, batch_idx):
            return self.loss(batch)

        training_step = validation_step = shared_step

    return Model


def recursion():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            x, y = batch
            if len(x) < 2:
                return self.loss(batch)
            return (self.training_step((x[:1], y[:1]), batch_idx) + self.training_step((x[1:], y[1:]), batch_idx)) / 2

    return Model


def deep_inheritance():
    Model = Tracked
    for _ in range(5):

        class Model(Model):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * 1.1

            def on_train_epoch_end(self):
                super().on_train_epoch_end()

    return Model


def nothing_of_its_own():
    return type("Model", (type("Between", (Tracked,), {}),), {})


def decorated(decorator, parameters=2):
    class One(Tracked):
        @decorator
        def training_step(self, batch):
            return 2 * self.loss(batch)

    class Two(Tracked):
        @decorator
        def training_step(self, batch, batch_idx):
            return 2 * self.loss(batch) + 0 * batch_idx

    return One if parameters == 1 else Two


def wrapping(step):
    @functools.wraps(step)
    def decorator(*args, **kwargs):
        return step(*args, **kwargs)

    return decorator


def with_a_wrapping_decorator():
    return decorated(wrapping)


def with_a_wrapping_decorator_and_without_batch_idx():
    return decorated(wrapping, parameters=1)


def with_two_wrapping_decorators():
    return decorated(lambda step: wrapping(wrapping(step)))


def with_a_decorator_that_does_not_wrap():
    return decorated(lambda step: lambda self, *args, **kwargs: step(self, *args, **kwargs))


def with_a_torch_decorator():
    return decorated(torch.autocast("cpu", enabled=False))


def with_a_decorator_that_swallows_the_output():
    def doubled(step):
        return lambda self, batch, batch_idx: {"loss": 2 * step(self, batch, batch_idx)}

    return decorated(doubled)


def with_a_partialmethod():
    return type("Model", (Tracked,), {"training_step": functools.partialmethod(scaled_step, 3.0)})


def scaled_step(self, factor, batch, batch_idx):
    return factor * self.loss(batch)


def without_batch_idx():
    class Model(Tracked):
        def training_step(self, batch):
            return self.loss(batch)

        def validation_step(self, batch):
            return self.loss(batch)

    return Model


def with_other_names_for_the_arguments():
    class Model(Tracked):
        def training_step(self, samples, batch_idx):
            return self.loss(samples)

        def validation_step(self, *args, **kwargs):
            return self.loss(args[0] if args else kwargs["batch"])

    return Model


class ThirdParty(pl.LightningModule):
    """A model that nobody here may edit."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        self.log("train_loss", loss := (self.layer(batch[0]) - batch[1]).square().mean())
        return loss

    def validation_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).abs().mean()

    def on_train_epoch_end(self):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def third_party_base():
    return type("Model", (EpochLossMixin, ThirdParty), {})


def third_party_base_and_an_override():
    class Model(EpochLossMixin, ThirdParty):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 2

    return Model


def third_party_base_in_the_wrong_order():
    return type("Model", (ThirdParty, EpochLossMixin), {})


def lightning_module_first():
    class Model(pl.LightningModule, EpochLossMixin):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            return self.layer(batch[0]).abs().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Model


def wrong_order_and_an_override():
    class Model(Net, EpochLossMixin):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 2

        def on_train_epoch_end(self):
            pass

    return Model


def two_tracked_classes_in_one_mro():
    class Left(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 2

        def on_train_epoch_end(self):
            super().on_train_epoch_end()

    class Right(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 3

        def on_train_epoch_end(self):
            super().on_train_epoch_end()

    return type("Model", (Left, Right), {})


def mixin_of_the_users_own():
    class MyMixin(EpochLossMixin):
        def on_train_epoch_end(self):
            self.said = [*getattr(self, "said", []), self.epoch_losses[-1]]

        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    return type("Model", (MyMixin, Net), {})


def mixin_named_twice():
    return type("Model", (Tracked, EpochLossMixin), {})


def parent_that_keeps_its_subclasses_to_itself():
    class Registry(EpochLossMixin, Net):
        known = []

        def __init_subclass__(cls, **kwargs):
            cls.known.append(cls)

    class Model(Registry):
        def training_step(self, batch, batch_idx):
            return 2 * self.loss(batch)

        def on_train_epoch_end(self):
            pass

    return Model


def base_first_that_keeps_its_subclasses_to_itself():
    class Registry(Net):
        known = []

        def __init_subclass__(cls, **kwargs):
            cls.known.append(cls)

    return type("Model", (Registry, EpochLossMixin), {})


def steps_from_a_mixin_behind():
    class Steps:
        def training_step(self, batch, batch_idx):
            return 2 * self.loss(batch)

    return type("Model", (Steps, Tracked), {})


def init_that_does_nothing_for_the_mixin():
    class Model(EpochLossMixin, Net):
        def __init__(self):
            Net.__init__(self)

    return Model


VARIANTS = [
    hooks_without_super,
    hooks_with_super,
    hooks_with_super_twice,
    steps_without_super,
    steps_calling_super_once,
    steps_calling_super_twice,
    step_of_the_base_called_by_name,
    validation_step_calling_the_training_step,
    training_step_calling_the_validation_step,
    both_steps_calling_a_shared_one,
    recursion,
    deep_inheritance,
    nothing_of_its_own,
    with_a_wrapping_decorator,
    with_a_wrapping_decorator_and_without_batch_idx,
    with_two_wrapping_decorators,
    with_a_decorator_that_does_not_wrap,
    with_a_torch_decorator,
    with_a_decorator_that_swallows_the_output,
    with_a_partialmethod,
    without_batch_idx,
    with_other_names_for_the_arguments,
    third_party_base,
    third_party_base_and_an_override,
    third_party_base_in_the_wrong_order,
    lightning_module_first,
    wrong_order_and_an_override,
    two_tracked_classes_in_one_mro,
    mixin_of_the_users_own,
    mixin_named_twice,
    steps_from_a_mixin_behind,
    init_that_does_nothing_for_the_mixin,
]


@pytest.mark.parametrize(
    "variant", [parent_that_keeps_its_subclasses_to_itself, base_first_that_keeps_its_subclasses_to_itself]
)
def test_a_base_that_hides_its_subclasses_is_refused_loudly(variant):
    def losses():
        fit(model, loader())
        return model.epoch_losses

    model = variant()()
    with pytest.raises(TypeError, match=r"Model was made without EpochLossMixin taking part.*`__init_subclass__`"):
        losses()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_each_step_is_recorded_once_in_its_stage(variant):
    model, witness = variant()(), Witness()
    fit(model, loader(), loader(samples=11, batch_size=4), callbacks=[witness])
    assert len(witness.steps) == 10 and len(witness.val_steps) == 6
    assert model.epoch_history == {
        "loss": close(epoch_means(witness.steps)),
        "val_loss": close(epoch_means(witness.val_steps)),
    }


@pytest.mark.parametrize(
    "variant",
    [
        hooks_without_super,
        hooks_with_super_twice,
        steps_calling_super_twice,
        validation_step_calling_the_training_step,
        recursion,
        deep_inheritance,
        with_a_decorator_that_does_not_wrap,
        third_party_base_in_the_wrong_order,
        two_tracked_classes_in_one_mro,
        mixin_of_the_users_own,
    ],
    ids=lambda variant: variant.__name__,
)
def test_each_step_is_recorded_once_without_a_trainer(variant):
    model, pairs = variant()(), []
    model.on_train_epoch_start()
    for index, batch in enumerate(loader()):
        output = model.training_step(batch, index)
        pairs.append(((output["loss"] if isinstance(output, dict) else output).item(), len(batch[0])))
    model.on_train_epoch_end()
    assert model.epoch_losses == [close(mean(pairs))]


def only_batch(self, batch):
    return self.called(batch)


def batch_and_index(self, batch, batch_idx):
    return self.called(batch, batch_idx)


def batch_and_optional_index(self, batch, batch_idx=None):
    return self.called(batch, batch_idx)


def anything(self, *args, **kwargs):
    return self.called(*args, **kwargs)


@pytest.mark.parametrize("step", [only_batch, batch_and_index, batch_and_optional_index, anything])
@pytest.mark.parametrize("decorators", [0, 1, 2])
def test_steps_get_the_arguments_that_they_would_get_without_the_mixin(step, decorators):
    for _ in range(decorators):
        step = wrapping(step)

    def given(base):
        class Model(base):
            training_step = step
            calls = []

            def called(self, batch, *args, **kwargs):
                self.calls.append((args, kwargs))
                return self.loss(batch)

        try:
            fit(Model(), max_epochs=1)
        except TypeError as error:  # Lightning looks through one decorator only
            return str(error)
        return Model.calls

    assert given(Tracked) == given(Net) != []


def test_the_users_own_epoch_end_sees_this_epoch():
    class Model(Tracked):
        def on_train_epoch_end(self):
            assert len(self.epoch_losses) == self.current_epoch + 1
            assert self.running_epoch_loss().isnan()
            self.log("train_loss", self.epoch_losses[-1])
            self.log("val_loss", self.epoch_history["val_loss"][-1])

    model = Model()
    runner = fit(model, loader(), loader(samples=6), max_epochs=3)
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert runner.callback_metrics["train_loss"] == pytest.approx(model.epoch_losses[-1], rel=1e-6)


class Scripted(Tracked):
    """Its epochs have the mean losses 3, 1, 2, 2, 2, ... and it logs them as ``train_loss``."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * 0 + [3.0, 1.0, 2.0][min(self.current_epoch, 2)]

    def on_train_epoch_end(self):
        self.log("train_loss", self.epoch_losses[-1])


def test_early_stopping_is_fed_from_epoch_losses():
    model = Scripted()
    fit(model, max_epochs=20, callbacks=[EarlyStopping("train_loss", patience=3)])
    assert model.epoch_losses == [3.0, 1.0, 2.0, 2.0, 2.0]


def test_model_checkpoint_is_fed_from_epoch_losses(tmp_path):
    keeper = ModelCheckpoint(tmp_path, "{epoch}", monitor="train_loss")
    fit(Scripted(), max_epochs=4, callbacks=[keeper], enable_checkpointing=True)
    assert keeper.best_model_path == str(tmp_path / "epoch=1.ckpt")
    assert keeper.best_model_score == 1.0
    assert Scripted.load_from_checkpoint(keeper.best_model_path).epoch_losses == [3.0, 1.0]


def test_reduce_lr_on_plateau_is_fed_from_epoch_losses():
    class Model(Scripted):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}

    rates = []

    class Reader(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(Model(), max_epochs=5, callbacks=[Reader()])
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.25]


def test_a_checkpoint_saved_in_the_users_epoch_end_holds_the_epoch(tmp_path):
    class Model(Tracked):
        def on_train_epoch_end(self):
            self.trainer.save_checkpoint(tmp_path / f"{self.current_epoch}.ckpt")

    model = Model()
    fit(model, max_epochs=3)
    for epoch in range(3):
        saved = Model.load_from_checkpoint(tmp_path / f"{epoch}.ckpt")
        assert saved.epoch_losses == model.epoch_losses[: epoch + 1]


def test_a_tracked_model_inside_another_does_not_disturb_it():
    class Student(Tracked):
        def __init__(self):
            super().__init__()
            self.teacher = Tracked()

        def training_step(self, batch, batch_idx):
            return self.noted_loss(batch) + 0 * self.teacher.training_step(batch, batch_idx)

    model = Student()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_training_step_that_a_hook_of_validation_calls_does_not_count():
    class Model(Tracked):
        def noted_loss(self, batch):
            return super().noted_loss(batch) if self.trainer.training else self.loss(batch)

        def on_validation_batch_end(self, outputs, batch, batch_idx):
            self.training_step(batch, batch_idx)

    model = Model()
    fit(model, loader(), loader(samples=6))
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))


def test_a_tracked_method_under_another_name_counts_for_that_name():
    class Model(Tracked):
        validation_step = Tracked.training_step
        on_validation_epoch_end = Tracked.on_train_epoch_end

    model, witness = Model(), Witness()
    fit(model, loader(), loader(samples=11, batch_size=4), callbacks=[witness])
    assert model.epoch_history == {
        "loss": close(epoch_means(witness.steps)),
        "val_loss": close(epoch_means(witness.val_steps)),
    }


def test_a_static_hook_and_a_class_method_go_on_working():
    class Model(Tracked):
        called = []

        @staticmethod
        def on_train_epoch_end():
            Model.called.append("static")

        @classmethod
        def on_train_epoch_start(cls):
            cls.called.append("class")

    model = Model()
    fit(model, loader())
    assert Model.called == ["class", "static"] * len(model.epoch_losses) != []


class Phased(Tracked):
    """Sets its steps on its own instance."""

    def __init__(self):
        super().__init__()
        self.ended = 0
        self.set_steps()

    def first_phase_step(self, batch, batch_idx):
        return 2 * self.noted_loss(batch)


class OwnMethod(Phased):
    def set_steps(self):
        self.training_step = self.first_phase_step


class OwnMethodThatCallsSuper(Phased):
    def set_steps(self):
        self.training_step = self.first_phase_step

    def first_phase_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


class WrapperAroundTheStep(Phased):
    def set_steps(self):
        step = self.training_step
        self.training_step = functools.wraps(step)(lambda *args, **kwargs: 2 * step(*args, **kwargs))


class FunctionWithoutTheStep(Phased):
    def set_steps(self):
        self.training_step = lambda batch, batch_idx: 2 * self.noted_loss(batch)


class PartialOfAMethod(Phased):
    def set_steps(self):
        self.training_step = functools.partial(self.scaled_step, 2)

    def scaled_step(self, factor, batch, batch_idx):
        return factor * self.noted_loss(batch)


class StepsAndHooks(Phased):
    def set_steps(self):
        validation_step, end = self.validation_step, self.on_train_epoch_end
        self.training_step = self.first_phase_step
        self.validation_step = lambda *args: validation_step(*args)
        self.on_train_epoch_end = lambda: (end(), setattr(self, "ended", len(self.epoch_losses)))


class OtherPhaseFromTheSecondEpochOn(OwnMethod):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.training_step = lambda batch, batch_idx: 2 * self.noted_loss(batch)


@pytest.mark.parametrize(
    "cls",
    [
        OwnMethod,
        OwnMethodThatCallsSuper,
        WrapperAroundTheStep,
        FunctionWithoutTheStep,
        PartialOfAMethod,
        StepsAndHooks,
        OtherPhaseFromTheSecondEpochOn,
    ],
)
def test_a_step_that_a_module_sets_on_its_own_instance_is_recorded_once(cls, recwarn):
    model = cls()
    fit(model, loader(), loader(7))
    assert model.epoch_history == {
        "loss": close([2 * mean for mean in epoch_means(model.steps)]),
        "val_loss": close(epoch_means(model.val_steps)),
    }
    assert model.ended in (0, 2)
    assert messages(recwarn, cls.__name__) == []


@pytest.mark.parametrize("cls", [OwnMethod, OwnMethodThatCallsSuper])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_clone_of_a_module_that_has_set_its_step_records_its_own_steps(cls, clone):
    model = cls()
    fit(model, loader(), max_epochs=1)
    twin = clone(model)
    fit(twin, loader(), max_epochs=1)
    assert twin.epoch_losses == close([2 * mean(step[1:] for step in steps) for steps in (model.steps, twin.steps[5:])])
    assert len(model.epoch_losses) == 1 and len(model.steps) == 5


@pytest.mark.parametrize("name", ["epoch_losses", "epoch_history"])
def test_a_class_attribute_that_hides_a_list_is_refused(name):
    with pytest.raises(TypeError, match=rf"Model\.{name} hides what EpochLossMixin keeps there"):
        type("Model", (Tracked,), {name: []})


@pytest.mark.parametrize("name", ["epoch_losses", "epoch_history"])
def test_an_assignment_is_told_how_to_clear_instead(name):
    with pytest.raises(AttributeError, match=rf"remove this line: `{name}` .* `epoch_history\.clear\(\)` starts all"):
        setattr(Tracked(), name, [])


def test_keywords_in_any_order_find_the_batch():
    class Model(EpochLossMixin, pl.LightningModule):
        def training_step(self, data, batch_idx):
            return data.mean()

    model = Model()
    model.training_step(batch_idx=0, data=torch.ones(1))
    model.training_step(batch_idx=1, data=torch.zeros(3))
    model.on_train_epoch_end()
    assert model.epoch_losses == [1 / 4]
