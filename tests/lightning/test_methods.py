"""Whatever ran without the mixin runs with it, just the same: classes, steps of any kind, threads, compilers."""

import collections
import functools
import itertools
import linecache
import operator
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, Protocol, TypeVar
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature

import epoch_mixin
from epoch_mixin import EpochLossMixin
from tests.helpers import BoundAsMethod, Decorator, Tracked, Witness, close, epoch_means, fit, loader, mean, trainer

T = TypeVar("T")


class Nothing:
    """In the mixin's place, for the same classes without it."""


def exact(model, witness):
    return model.epoch_history == {
        "loss": close(epoch_means(witness.steps)),
        "val_loss": close(epoch_means(witness.val_steps)),
    }


class Trained(pl.LightningModule):
    """Half a model, as bases often are."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.ran = []

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


HOOKS = (
    "setup",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_save_checkpoint",
    "on_fit_end",
    "teardown",
)


def noting(name):
    def hook(self, *args, **kwargs):
        self.ran.append(name)

    return hook


class Validated(pl.LightningModule):
    """The other half, and hooks that leave a trace."""

    def validation_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).abs().mean()

    locals().update({name: noting(name) for name in HOOKS})


def side_by_side(mixin):
    return type("C", (type("A", (mixin, Trained), {}), Validated), {})


def other_side_first(mixin):
    return type("C", (Validated, type("A", (mixin, Trained), {})), {})


def mixin_on_the_hooks(mixin):
    return type("C", (Trained, type("A", (mixin, Validated), {})), {})


def mixin_on_an_empty_one(mixin):
    return type("C", (type("A", (mixin, pl.LightningModule), {}), Trained, Validated), {})


def mixin_on_both(mixin):
    return type("C", (type("A", (mixin, Trained), {}), type("B", (mixin, Validated), {})), {})


def mixin_last(mixin):
    return type("C", (Trained, Validated, mixin), {})


def three_levels(mixin):
    class A(mixin, Trained):
        pass

    class B(A):
        def on_train_epoch_end(self):
            self.ran.append("b")
            super().on_train_epoch_end()

    class C(B, Validated):
        def setup(self, stage):
            super().setup(stage)
            self.ran.append("c")

    return type("D", (C,), {})


def a_base_that_calls_super(mixin):
    class A(mixin, Trained):
        def on_train_epoch_end(self):
            super().on_train_epoch_end()
            self.ran.append("a")

        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    class Scaled(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return 3 * super().training_step(batch, batch_idx)

    return type("C", (Scaled, A, Validated), {})


def abstract(mixin):
    class A(mixin, Trained, ABC):
        @abstractmethod
        def validation_step(self, batch, batch_idx): ...

        @abstractmethod
        def on_train_epoch_end(self): ...

    class B(A):
        def validation_step(self, batch, batch_idx):
            return Validated.validation_step(self, batch, batch_idx)

        def on_train_epoch_end(self):
            Validated.on_train_epoch_end(self)

    with pytest.raises(TypeError, match="abstract"):
        A()
    return B


def generic(mixin):
    class A(mixin, Trained, Generic[T]):
        pass

    class C(A[int], Validated):
        pass

    return C


def protocol(mixin):
    class Steps(Protocol):
        def on_train_epoch_end(self): ...

    class A(mixin, Trained):
        pass

    class C(A, Validated, Steps):
        pass

    return C


@pytest.mark.parametrize(
    "build",
    [
        side_by_side,
        other_side_first,
        mixin_on_the_hooks,
        mixin_on_an_empty_one,
        mixin_on_both,
        mixin_last,
        three_levels,
        a_base_that_calls_super,
        abstract,
        generic,
        protocol,
    ],
    ids=lambda build: build.__name__,
)
def test_a_diamond_runs_what_it_runs_without_the_mixin(build, tmp_path):
    ran, weights = [], []
    Plain, Model = build(Nothing), build(EpochLossMixin)
    for cls in (Plain, Model):
        torch.manual_seed(0)
        model, witness = cls(), Witness()
        runner = fit(model, loader(), loader(11, 4), callbacks=[witness])
        runner.save_checkpoint(tmp_path / "model.ckpt")
        ran.append(model.ran)
        weights.append(model.layer.weight)
    assert ran[0] == ran[1] != []
    assert torch.equal(*weights)
    assert len(witness.val_steps) == 6 and exact(model, witness)
    assert Model.load_from_checkpoint(tmp_path / "model.ckpt").epoch_history == model.epoch_history
    for name in (*HOOKS, "training_step", "validation_step", "test_step", "configure_optimizers"):
        assert is_overridden(name, model, pl.LightningModule) == is_overridden(name, Plain(), pl.LightningModule), name


def test_a_validation_step_that_is_none_means_no_validation():
    for bases in ((Tracked,), (type("A", (EpochLossMixin, Trained), {}), Validated)):
        model = type("Model", bases, {"validation_step": None, "val_steps": []})()
        fit(model, loader(), loader(), max_epochs=1)
        assert list(model.epoch_history) == ["loss"]


@pytest.mark.parametrize("place", ["Third", "Base"])
def test_a_step_of_a_base_that_is_patched_later_is_recorded(place):
    class Third(Trained):
        pass

    class Base(EpochLossMixin, Third):
        pass

    class Model(Base):
        pass

    def patched(self, batch, batch_idx):
        return 0 * Trained.training_step(self, batch, batch_idx) + 7

    model = Model()
    with mock.patch.object({"Third": Third, "Base": Base}[place], "training_step", patched):
        fit(model, max_epochs=1)
    witness = Witness()
    fit(model, max_epochs=1, callbacks=[witness])
    assert model.epoch_losses == [7.0, close(epoch_means(witness.steps)[0])]


class BoundAsPartial(Decorator):
    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self.function, instance)


class BoundSilently(Decorator):
    """Does not show what it decorates."""

    def __init__(self, function):
        self.function = function

    __get__ = BoundAsPartial.__get__


def dispatched(step):
    method = functools.singledispatchmethod(lambda self, *args: pytest.fail("not dispatched"))
    method.register(list, step)
    return method


LAYER = torch.nn.Linear(4, 1)


def function(self, batch, batch_idx):
    return (self.layer(batch[0]) - batch[1]).square().mean()


def loss_of(batch, batch_idx):
    return (LAYER(batch[0]) - batch[1]).square().mean()


def only_batch(self, batch):
    return (self.layer(batch[0]) - batch[1]).square().mean()


STEPS = {
    "function": function,
    "lambda": lambda self, batch, batch_idx: function(self, batch, batch_idx),
    "without batch_idx": only_batch,
    "anything": lambda self, *args, **kwargs: only_batch(self, args[0] if args else kwargs["batch"]),
    "class, bound as a method": BoundAsMethod(function),
    "class, bound as a partial": BoundAsPartial(function),
    "class, bound as a partial, without batch_idx": BoundAsPartial(only_batch),
    "class, bound silently": BoundSilently(function),
    "class in a class": BoundAsMethod(BoundAsMethod(only_batch)),
    "singledispatchmethod": dispatched(function),
    "partial": functools.partial(loss_of),
    "partial with a batch_idx": functools.partial(loss_of, batch_idx=0),
    "partialmethod": functools.partialmethod(lambda self, _, batch, batch_idx: function(self, batch, batch_idx), 1),
    "partialmethod of one without batch_idx": functools.partialmethod(
        lambda self, _, batch: only_batch(self, batch), 1
    ),
    "property": property(lambda self: lambda batch, batch_idx: function(self, batch, batch_idx)),
    "property without batch_idx": property(lambda self: lambda batch: only_batch(self, batch)),
    "staticmethod": staticmethod(loss_of),
    "classmethod": classmethod(lambda cls, batch, batch_idx: loss_of(batch, batch_idx)),
    "object": Decorator(loss_of),
    "bound method": Decorator(loss_of).__call__,
    "C function": operator.methodcaller("loss"),
}


# Lightning looks for their code, and finds none; from Python 3.14 on, a class binds a partial like a function.
REFUSED = ["class in a class", "C function"] + ["partial", "partial with a batch_idx"] * (sys.version_info >= (3, 14))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("place", ["its own", "inherited", "overridden"])
def test_steps_of_any_kind_run_and_are_recorded(kind, place):
    class Model(Trained):
        loss_seen = ()

        def validation_step(self, batch, batch_idx):
            return self.layer(batch[0]).abs().mean()

    class Batch(list):
        def loss(self):
            return loss_of(self, 0)

    def collate(samples):
        return Batch(torch.utils.data.default_collate(samples))

    def build(mixin):
        space = dict.fromkeys(("training_step", "validation_step"), STEPS[kind])
        if place == "its own":
            return type("Model", (mixin, Model), space)
        return type("Model", (mixin, type("Parent", (Model,), space)), {})

    def result(mixin):
        torch.manual_seed(0)
        torch.nn.init.ones_(LAYER.weight), torch.nn.init.ones_(LAYER.bias)
        model, witness = build(mixin)(), Witness()
        if place == "overridden":
            model = type("Heir", (type(model),), {"on_train_epoch_end": lambda self: None})()
        loaders = [torch.utils.data.DataLoader(loader().dataset, 5, collate_fn=collate) for _ in range(2)]
        try:
            fit(model, *loaders, callbacks=[witness])
        except Exception as error:  # what Lightning cannot run, it cannot run with the mixin either
            return str(error)
        if mixin is EpochLossMixin:
            assert exact(model, witness)
        step = model.training_step
        return witness.steps, witness.val_steps, is_param_in_hook_signature(step, "batch_idx", explicit=True)

    expected = result(Nothing)
    assert isinstance(expected, tuple) == (kind not in REFUSED), expected
    assert result(EpochLossMixin) == expected


def test_hooks_may_have_arguments_of_their_own_and_be_called_by_name(tmp_path):
    class Model(Tracked):
        def on_validation_epoch_end(self, extra=0):
            self.extra = extra

        def on_train_epoch_start(self, *, extra=0): ...

        def on_train_epoch_end(self, first=None, *rest, **more):
            self.on_validation_epoch_end(extra=1)

        def on_save_checkpoint(self, ckpt, extra=0):
            ckpt["extra"] = extra

        def on_load_checkpoint(self, ckpt, extra=0): ...

        def setup(self, stage=None, extra=0): ...

        def teardown(self, stage=None, extra=0): ...

        def load_state_dict(self, state, extra=0):
            return super().load_state_dict(state)

    model = Model()
    fit(model, loader(), loader(6))
    assert model.extra == 1 and len(model.epoch_losses) == len(model.epoch_history["val_loss"]) == 2
    checkpoint = {}
    model.on_save_checkpoint(ckpt=checkpoint, extra=1)
    twin = Model()
    twin.setup(extra=1)
    twin.on_load_checkpoint(extra=1, ckpt=checkpoint)
    twin.load_state_dict(state=model.state_dict(), extra=1)
    twin.teardown(extra=1)
    assert twin.epoch_history == model.epoch_history
    twin.on_train_epoch_start(extra=1)
    twin.training_step(next(iter(loader())), 0)
    twin.on_validation_epoch_end(extra=2)
    twin.on_train_epoch_end(1, 2, three=3)
    assert len(twin.epoch_losses) == 3


CALLBACK_HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_train_epoch_end",
    "on_train_end",
)


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
@pytest.mark.parametrize("of", ["callback", "module"])
@pytest.mark.parametrize("hook", CALLBACK_HOOKS)
def test_a_step_that_a_hook_calls_does_not_count(hook, of, step):
    batch = (torch.full((50, 4), 9.0), torch.zeros(50, 1))

    def calling(self, *args):
        module = self if of == "module" else args[1]
        module.called = True
        getattr(module, step)(batch, 0)

    class Model(EpochLossMixin, Trained):
        validation_step = Validated.validation_step

    Looking = type("Looking", (pl.Callback,), {hook: calling} if of == "callback" else {})
    model, witness = type("Model", (Model,), {hook: calling} if of == "module" else {})(), Witness()
    fit(model, loader(), loader(11, 4), callbacks=[Looking(), witness])
    assert model.called and exact(model, witness)


def test_closures_of_an_optimizer_are_recorded_as_lightning_calls_them():
    class Model(EpochLossMixin, Trained):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.ran.append((self.current_epoch, loss.item(), len(batch[0])))
            return loss

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=4)

    model = Model()
    fit(model)
    assert len(model.ran) > 2 * 2 * 5
    assert model.epoch_losses == close(epoch_means(model.ran))


def test_a_loop_without_a_trainer_and_a_fit_do_not_mix():
    class Model(EpochLossMixin, Trained):
        pass

    model, witness = Model(), Witness()
    pairs = [(model.training_step(batch, 0).item(), len(batch[0])) for batch in loader()]
    model.on_train_epoch_end()
    model.training_step(next(iter(loader())), 0)
    fit(model, callbacks=[witness])
    assert model.epoch_losses == [close(mean(pairs)), *map(close, epoch_means(witness.steps))]


def in_threads(*works):
    failed = []

    def run(work):
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("other", ["predict_step", "test_step", "validation_step", "training_step"])
def test_a_step_in_another_thread_does_not_silence_a_fit(other):
    entered, done = threading.Event(), threading.Event()

    class Model(EpochLossMixin, Trained):
        waits = False

        def training_step(self, batch, batch_idx):
            return self.answer(batch) if batch_idx == -1 else super().training_step(batch, batch_idx)

        def answer(self, batch, batch_idx=-1):
            entered.set()
            assert done.wait(60)

    if other != "training_step":
        setattr(Model, other, None)
        Model = type("Model", (Model,), {other: Model.answer})
    model, witness = Model(), Witness()
    answering = threading.Thread(target=lambda: getattr(model, other)((torch.ones(1, 4), None), -1))
    model._current_fx_name = None
    answering.start()
    assert entered.wait(60)
    try:
        fit(model, callbacks=[witness])
    finally:
        done.set()
        answering.join()
    assert model.epoch_losses == close(epoch_means(witness.steps))


def test_models_in_threads_of_their_own():
    class Model(EpochLossMixin, Trained):
        pass

    models, witnesses = [Model() for _ in range(3)], [Witness() for _ in range(3)]
    batches = [loader(13 + 10 * at) for at in range(3)]
    in_threads(*(lambda at=at: fit(models[at], batches[at], callbacks=[witnesses[at]]) for at in range(3)))
    for model, witness in zip(models, witnesses):
        assert model.epoch_losses == close(epoch_means(witness.steps))


def interrupted_at(number, call):
    """Interrupt a call ahead of a line of ours, by its number in the course of the call; return whether it came."""
    lines = itertools.count()

    def trace(frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(str(Path(epoch_mixin.__file__).parent)):
            return None
        # Python runs signal handlers after a call or a jump, so never between a `finally` and the line behind it.
        may_come = linecache.getline(code.co_filename, frame.f_lineno).strip() not in (
            "finally:",
            "running.pop(call, None)",
        )
        if event == "line" and may_come and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupt_anywhere_in_a_step_leaves_the_next_fit_exact():
    batch = next(iter(loader()))
    for number in itertools.count():
        model, witness = Tracked(), Witness()
        came = interrupted_at(number, lambda model=model: model.training_step(batch, 0))
        model.on_train_epoch_start()
        assert model.training_step(batch, 0) == model.running_epoch_loss(), number
        if number % 10 == 0:
            fit(model, max_epochs=1, callbacks=[witness])
            assert model.epoch_losses == close(epoch_means(witness.steps))
        if not came:
            break
    assert number > 30


@pytest.mark.parametrize(
    "decorator", [torch.compile(backend="eager"), torch.compiler.disable], ids=["compile", "disable"]
)
@pytest.mark.parametrize("place", ["its own", "inherited"])
@pytest.mark.parametrize("how", ["plainly", "step", "loop", "trainer", "compiled trainer"])
def test_a_step_with_a_decorator_of_a_compiler_is_recorded_each_time(decorator, place, how):
    torch._dynamo.reset()

    class Base(Trained):
        @decorator
        def training_step(self, batch, batch_idx):
            return (self.layer(batch[0]) - batch[1]).square().mean()

    space = {"training_step": vars(Base)["training_step"]} if place == "its own" else {}
    model, witness = type("Model", (EpochLossMixin, Base), space)(), Witness()
    if "trainer" in how:
        fit(torch.compile(model, backend="eager") if "compiled" in how else model, callbacks=[witness])
        assert model.epoch_losses == close(epoch_means(witness.steps))
        return
    step = {
        "plainly": lambda batch: model.training_step(batch, 0),
        "step": functools.partial(torch.compile(model.training_step, backend="eager"), batch_idx=0),
        "loop": torch.compile(lambda batch: model.training_step(batch, 0) + 0, backend="eager"),
    }[how]
    pairs = [(step(batch).item(), len(batch[0])) for batch in loader()]
    model.on_train_epoch_end()
    assert model.epoch_losses == [close(mean(pairs))]


def warnings_of(work):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [(warning.filename, str(warning.message)) for warning in caught if "Model" in str(warning.message)[:6]]


class Silent(EpochLossMixin, Trained):
    epoch_loss_keys = ("loss", "kl")

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "lk": 0.0}


def test_warnings_point_at_the_users_file():
    model, data = type("Model", (Silent,), {})(), loader()

    def without_trainer():
        model.training_step(next(iter(data)), 0)
        model.on_train_epoch_end()

    for work in (without_trainer, lambda: trainer().fit(type("Model", (Silent,), {})(), data)):
        found = warnings_of(work)
        assert [filename for filename, _ in found] == [__file__]
    (misspelt,) = warnings_of(lambda: type("Model", (Silent,), {"epoch_loss_wieght": None}))
    assert misspelt[0] == __file__


def test_a_failing_step_shows_no_frame_of_the_hooks():
    class Model(EpochLossMixin, Trained):
        def training_step(self, batch, batch_idx):
            raise ArithmeticError

    for call in (lambda: Model().training_step((torch.ones(1),), 0), lambda: fit(Model())):
        with pytest.raises(ArithmeticError) as error:
            call()
        ours = [entry for entry in error.traceback if "epoch_mixin" in entry.path.parts]
        assert ours and all(entry.ishidden(error) for entry in ours)


def test_a_usual_fit_gives_no_warning(recwarn):
    class Model(EpochLossMixin, Trained):
        validation_step = Validated.validation_step

    fit(Model(), loader(), loader(), num_sanity_val_steps=2)
    assert not [warning for warning in recwarn if "epoch" in str(warning.message).partition(":")[0].lower()]


@pytest.mark.parametrize("weight", [3.0, None, torch.ones(())], ids=str)
def test_a_weight_that_is_no_method_is_refused_by_name(weight):
    with pytest.raises(TypeError, match=r"Model\.epoch_loss_weight must be a method"):
        type("Model", (Tracked,), {"epoch_loss_weight": weight})


@pytest.mark.parametrize("missing", [lambda self, name: self[name], lambda self, name: type(self)()])
def test_a_batch_that_answers_to_any_name_is_not_asked(missing):
    Batch = type("Batch", (collections.defaultdict,), {"__getattr__": missing})

    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            assert set(batch) == {"x", "y"}
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    def collate(samples):
        return Batch(Batch, zip("xy", torch.utils.data.default_collate(samples)))

    model = Model()
    fit(model, torch.utils.data.DataLoader(loader().dataset, 5, collate_fn=collate))
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_hook_that_a_callback_calls_ends_no_epoch():
    class Calls(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            module.on_train_epoch_end()

    model = Tracked()
    fit(model, callbacks=[Calls()])
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_part_that_is_asked_to_save_itself_leaves_the_record_of_the_whole(tmp_path):
    class Whole(Tracked):
        def __init__(self):
            super().__init__()
            self.part = Tracked()

        def on_save_checkpoint(self, checkpoint):
            self.part.on_save_checkpoint(checkpoint)

    model = Whole()
    fit(model).save_checkpoint(tmp_path / "whole.ckpt")
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    assert saved["epoch_mixin"]["history"]["loss"] == model.epoch_losses
