import copy
import functools
import gc
import inspect
import itertools
import operator
import pickle
import threading
import types
import weakref
from abc import ABC, ABCMeta, abstractmethod
from unittest import mock

import pytest

from epoch_mixin._hooks import Recorded, around_hook, wrap_methods
from tests.helpers import BoundAsMethod, Decorator


def note(self, call):
    self.calls.append(call)


class Mixin:
    """Notes the calls of ``hook`` before they run, and those of ``step`` and ``other_step`` when they have returned."""

    hook = Recorded(functools.partial(around_hook, before=lambda self, *call: note(self, call)))
    step = Recorded(functools.partial(around_hook, before=lambda self, *call: call, after=note, group="step"))
    other_step = Recorded(functools.partial(around_hook, before=lambda self, *call: call, after=note, group="step"))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        wrap_methods(cls, Mixin)

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.calls = []
        return self


class Plain:
    """In the mixin's place, for the same classes without it."""


class Parent:
    def hook(self):
        self.calls.append("parent")

    def step(self, x):
        """Double it."""
        return 2 * x


class Child(Mixin, Parent):
    pass


def test_a_call_is_recorded_with_its_arguments():
    model = Child()
    assert (model.step(3), model.step(x=4)) == (6, 8)
    model.hook()
    assert model.calls == [("step", (3,), {}), ("step", (), {"x": 4}), ("hook", (), {}), "parent"]


@pytest.mark.parametrize("bases", [(Mixin, Parent), (Parent, Mixin), (Child,), (Child, Parent), (Child, Mixin)])
def test_every_order_of_bases_records_each_call_once(bases):
    model = type("Model", bases, {})()
    model.hook()
    assert model.step(1) == 2
    assert model.calls == [("hook", (), {}), "parent", ("step", (1,), {})]


def test_the_mixin_adds_no_method_and_changes_no_other_class():
    before = dict(vars(Parent))

    class Model(Mixin):
        pass

    assert not any(hasattr(thing, name) for thing in (Model, Model()) for name in ("hook", "step", "other_step"))
    assert dict(vars(Parent)) == before


def test_record_does_nothing_the_second_time():
    for cls in (Child, type("Model", (Child,), {"step": Parent.step}), type("Model", (Parent, Mixin), {})):
        before = dict(vars(cls))
        wrap_methods(cls, Mixin)
        assert dict(vars(cls)) == before


def test_chains_of_super_are_recorded_once():
    class A(Child):
        def step(self, x):
            return super().step(x) + super().step(x)

    class B(A):
        pass

    class C(B):
        def step(self, x):
            return super().step(x) + 1

        def hook(self):
            super().hook()

    model = C()
    model.hook()
    assert model.step(1) == 5
    assert model.calls == [("hook", (), {}), "parent", ("step", (1,), {})]


def extended(name, bases, body):
    """A class whose step is its own, its own and its parent's, or inherited."""

    def own(self, x):
        return [name, x]

    def with_super(self, x):
        return [name, *super(cls, self).step(x)]

    steps = {"inherited": {}, "own": {"step": own}, "super": {"step": with_super}}
    cls = type(name, bases, steps[body])
    return cls


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("mixed_in", [*itertools.product([False, True], repeat=3)][1:])
def test_diamonds_of_every_shape_run_as_without_the_mixin_and_are_recorded_once(mixed_in, order):
    class Top:
        def step(self, x):
            return ["top", x]

    def build(mixin, bodies):
        parts = [(mixin,) if at else () for at in mixed_in]
        sides = [extended(name, (*parts[at], Top), bodies[at]) for at, name in enumerate(("Left", "Right"))]
        model = extended("Model", tuple(sides[at] for at in order), bodies[2])
        return type("Heir", (model, *parts[2]), {}) if parts[2] else model

    for bodies in itertools.product(("inherited", "own", "super"), repeat=3):
        expected = build(type("Plain", (), {}), bodies)().step(1)
        model = build(Mixin, bodies)()
        assert model.step(1) == expected
        assert model.calls == [("step", (1,), {})]


def test_a_base_that_is_called_by_its_name_follows_its_own_order_of_bases():
    class Left(Child):
        pass

    class Right(Parent):
        def step(self, x):
            return 100 * x

    class Model(Left, Right):
        def step(self, x):
            return Left.step(self, x) + Right.step(self, x)

    model = Model()
    assert model.step(1) == 2 + 100
    assert model.calls == [("step", (1,), {})]


def test_of_steps_that_call_each_other_only_the_outermost_is_recorded():
    class Model(Mixin):
        def step(self, x):
            return x if x == 0 else self.step(x - 1)

        def other_step(self, x):
            self.hook()
            return self.step(x)

        def hook(self):
            pass

    model = Model()
    model.other_step(3)
    model.step(2)
    # A hook is of another group.
    assert model.calls == [("hook", (), {}), ("other_step", (3,), {}), ("step", (2,), {})]


def test_instances_do_not_silence_each_other():
    class Model(Child):
        def step(self, x):
            return copy.deepcopy(self).step(x - 1) + self.teacher.step(x) if x else self.calls

    model, teacher = Model(), Child()
    model.teacher, teacher.step = teacher, lambda x: teacher.calls
    assert model.step(1) == [("step", (0,), {}), ("step", (1,), {})]
    assert model.calls == [("step", (1,), {})]


def test_threads_do_not_silence_each_other():
    class Model(Mixin):
        def step(self, x):
            if x:
                thread = threading.Thread(target=self.other_step, args=(0,))
                thread.start()
                thread.join()

        def other_step(self, x):
            self.step(x)

    model = Model()
    model.step(1)
    assert model.calls == [("other_step", (0,), {}), ("step", (1,), {})]


def test_a_call_that_raised_is_not_recorded_and_the_next_one_is():
    model = Child()
    with pytest.raises(TypeError):
        model.step(None)
    assert model.calls == []
    del model.calls  # what notes the calls raises now
    for call in (model.hook, lambda: model.step(1)):
        with pytest.raises(AttributeError):
            call()
    model.calls = []
    model.hook()
    model.step(1)
    assert model.calls == [("hook", (), {}), "parent", ("step", (1,), {})]


class BoundAsPartial(Decorator):
    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)


class BoundAsClosure(Decorator):
    def __get__(self, instance, owner=None):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


class OfInstancesAlone:
    def __get__(self, instance, owner=None):
        return functools.partial(double, instance.__dict__ and instance)


def double(self, x):
    return 2 * x


def double_last(*args):
    return 2 * args[-1]


def dispatched(step):
    method = functools.singledispatchmethod(lambda self, *args: pytest.fail("not dispatched"))
    method.register(object, step)
    return method


KINDS = {
    "function": double,
    "partialmethod": functools.partialmethod(lambda self, factor, x: factor * x, 2),
    "partial": functools.partial(double_last),  # from Python 3.14 on it is given the instance
    "lru_cache": functools.lru_cache(double),
    "singledispatchmethod": dispatched(double),
    "property": property(lambda self: lambda x: double(self, x)),
    "staticmethod": staticmethod(lambda x: 2 * x),
    "classmethod": classmethod(double),
    "class with MethodType": BoundAsMethod(double),
    "class with partial": BoundAsPartial(double),
    "class with closure": BoundAsClosure(double),
    "class without __get__": Decorator(lambda x: 2 * x),
    "descriptor of instances alone": OfInstancesAlone(),
    "C function": operator.methodcaller("__mul__", 2),
    "mock": mock.Mock(return_value=6),
}


def of_kind(kind, place, mixin):
    body = {"step": KINDS[kind]}
    if place == "its own":
        return type("Model", (mixin,), body)
    if place == "inherited":
        return type("Model", (mixin, type("Base", (), body)), {})
    cls = type("Model", (type("Base", (mixin,), body),), {"step": lambda self, x: super(cls, self).step(x) + 1})
    return cls


def result_or_error(call, cls):
    try:
        return call(cls)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["its own", "inherited", "behind super"])
def test_methods_of_any_kind_run_as_without_the_mixin_and_are_recorded(kind, place):
    plain, recorded = of_kind(kind, place, Plain), of_kind(kind, place, Mixin)
    model = recorded()
    assert model.step(3) == plain().step(3) == 6 + (place == "behind super")
    assert model.calls == [("step", (3,), {})]
    for call in (lambda cls: cls.step(3), lambda cls: cls.step(cls(), 3)):
        assert result_or_error(call, recorded) == result_or_error(call, plain)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("C function", "mock")])
@pytest.mark.parametrize("place", ["its own", "inherited"])
def test_methods_of_any_kind_keep_their_signatures(kind, place):
    recorded, plain = (of_kind(kind, place, mixin)().step for mixin in (Mixin, Plain))
    assert inspect.signature(recorded) == inspect.signature(plain)


@pytest.mark.parametrize(
    "thing", [None, {"some": "options"}, 3, "text", property(lambda self: None)], ids=lambda thing: type(thing).__name__
)
@pytest.mark.parametrize("bases", [(), (Parent,)], ids=["own", "inherited"])
def test_what_is_no_method_is_given_as_it_is(thing, bases):
    cls = type("Heir", (type("Model", (Mixin, *bases), {"step": thing}),), {})
    assert cls.step is thing
    assert cls().step is (None if isinstance(thing, property) else thing)


def test_a_class_gives_the_users_own_function():
    class Model(Child):
        def step(self, x):
            return super().step(x)

        own = step

    assert Model.step is Model.own
    assert Child.step is Parent.step and type("Heir", (Child,), {}).hook is Parent.hook


def test_a_bound_method_looks_like_the_users_own():
    model, plain = Child(), Parent()
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__"):
        assert getattr(model.step, name) == getattr(plain.step, name)
    assert inspect.signature(model.step) == inspect.signature(plain.step)
    assert inspect.ismethod(model.step) and model.step.__self__ is model and model.step == model.step
    assert model.step.__wrapped__ is Parent.step  # where Lightning and `inspect.getsource` find it


def test_a_bound_method_has_what_a_user_set_on_the_method():
    def step(self, x):
        pass

    step.mark = "kept"
    for cls in (type("Model", (Mixin,), {"step": step}), type("Model", (Mixin, type("Base", (), {"step": step})), {})):
        assert cls().step.mark == "kept"


@pytest.mark.parametrize("kind", [lambda method: method, classmethod, staticmethod], ids=["method", "class", "static"])
@pytest.mark.parametrize("place", ["its own", "inherited"])
def test_an_abstract_method_is_abstract_until_a_class_defines_it(kind, place):
    body = {"step": kind(abstractmethod(lambda self, x: None))}
    bases, body = ((Mixin, ABC), body) if place == "its own" else ((Mixin, ABCMeta("Base", (), body)), {})
    Task = ABCMeta("Task", bases, body)
    assert Task.__abstractmethods__ == {"step"}
    for cls in (Task, type("Heir", (Task,), {})):
        with pytest.raises(TypeError, match=r"abstract.*\bstep\b"):
            cls()
    for cls in (type("Model", (Task,), {"step": double}), type("Model", (Parent, Task), {})):
        model = cls()
        assert model.step(3) == 6 and model.calls == [("step", (3,), {})]


def test_a_base_that_is_patched_later_runs_the_patch_with_its_signature():
    class Left(Parent):
        pass

    class Model(Mixin, Left):
        pass

    def patched(self):
        return 7

    model = Model()
    for place in (Parent, Left):
        with mock.patch.object(place, "step", patched):
            assert model.step() == 7
            assert not inspect.signature(model.step).parameters and model.step.__wrapped__ is patched
        with mock.patch.object(place, "step", None):
            assert model.step is None
        assert model.step(1) == 2
    assert model.calls == [("step", (), {}), ("step", (1,), {})] * 2


def test_a_method_that_a_class_is_given_later_is_recorded_once_record_runs_again():
    class Heir(Child):
        def step(self, x):
            return 3 * x

    for cls, before in ((Child, 2), (Heir, 3)):
        model = cls()
        with mock.patch.object(cls, "step", lambda self, x: 7 * x):
            assert model.step(1) == 7
            wrap_methods(cls, Mixin)
            assert model.step(1) == 7
            assert model.calls == [("step", (1,), {})]
        assert model.step(1) == before
        assert model.calls == [("step", (1,), {})] * 2
    del Heir.step
    wrap_methods(Heir, Mixin)
    model = Heir()
    assert model.step(1) == 2 and model.calls == [("step", (1,), {})]


def with_phases(mixin, own):
    """A class whose instances may set their step, and which has a step of its own or inherits it."""

    class Phases(mixin, Parent):
        def first_phase(self, x):
            return super().step(x) + 1

    class OwnPhases(Phases):
        def step(self, x):
            return 10 * super().step(x)

    return OwnPhases if own else Phases


def around(model):
    step = model.step
    return lambda self, x: step(x) + 1


SET = {
    "method": lambda model: model.first_phase,
    "the recorded one": lambda model: model.step,
    "lambda around the recorded one": lambda model: functools.partial(around(model), model),
    "method around the recorded one": lambda model: types.MethodType(around(model), model),
    "decorated": lambda model: functools.wraps(model.step)(functools.partial(around(model), model)),
    "method of another instance": lambda model: type(model)().step,
    "object": lambda model: Decorator(lambda x: 2 * x),
    "mock": lambda model: mock.Mock(return_value=6),
}
own_or_inherited = pytest.mark.parametrize("own", [False, True], ids=["inherited", "own"])


@own_or_inherited
@pytest.mark.parametrize("kind", SET)
def test_a_method_that_is_set_on_an_instance_runs_as_without_the_mixin_and_is_recorded_once(kind, own):
    plain, model = with_phases(Plain, own)(), with_phases(Mixin, own)()
    before = plain.step(3)
    for instance in (plain, model):
        instance.step = SET[kind](instance)
    assert model.step(3) == plain.step(3)
    assert model.calls == [("step", (3,), {})]
    other = type(model)()
    del model.step
    assert model.step(3) == other.step(3) == before
    assert model.calls == [("step", (3,), {})] * 2 and other.calls == [("step", (3,), {})]


def test_a_method_that_is_not_set_on_an_instance_cannot_be_deleted_from_it():
    for instance in (Parent(), Child()):
        with pytest.raises(AttributeError, match="step"):
            del instance.step


@own_or_inherited
def test_a_method_that_a_pickle_brings_to_an_instance_is_recorded_once(own):
    # In another process, in which no instance of the class was given one before.
    model = with_phases(Mixin, own)()
    vars(model).update(step=model.first_phase)
    assert model.step(3) == 7
    assert model.calls == [("step", (3,), {})]


@own_or_inherited
def test_a_method_that_is_patched_on_an_instance_is_recorded_until_it_comes_back(own):
    model = with_phases(Mixin, own)()
    before = model.step(3)
    for patch in (lambda x: 7, mock.Mock(return_value=7)):
        with mock.patch.object(model, "step", patch):
            assert model.step(3) == 7
    with mock.patch.object(model, "step", None):
        assert model.step is None
    assert model.step(3) == before
    assert model.calls == [("step", (3,), {})] * 4


def test_a_mock_that_is_set_on_an_instance_can_be_asked_for_its_calls():
    model = Child()
    model.step = mock.Mock()
    model.step(3)
    model.step.assert_called_once_with(3)


def test_an_instance_with_a_method_of_its_own_is_freed():
    def made():
        model = Child()
        model.step = types.MethodType(around(model), model)
        assert model.step(1) == 3
        return weakref.ref(model)

    ref = made()
    gc.collect()
    assert ref() is None


class Phases(Child):
    def first_phase(self, x):
        return super().step(x) + 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_clones_record_their_own_calls(clone):
    model = Phases()
    twin = clone(model)
    model.step = model.first_phase
    phased = clone(model)
    assert (twin.step(1), phased.step(1)) == (2, 3)
    assert twin.calls == phased.calls == [("step", (1,), {})]
    assert model.calls == []


def test_a_class_that_is_pickled_by_value_goes_on_recording():
    cloudpickle = pytest.importorskip("cloudpickle")

    def made():
        class Base(Child):
            def step(self, x):
                return super().step(x) + 1

        class Model(Base):
            pass

        return cloudpickle.dumps(Model())

    pickled = made()
    gc.collect()  # as long as it lives, cloudpickle gives the same class
    model = pickle.loads(pickled)
    assert model.step(1) == 3 and type(model).__name__ == "Model"
    assert model.calls == [("step", (1,), {})]


def test_no_frame_of_ours_shows_in_a_traceback():
    class Model(Child):
        def step(self, x):
            return super().step(x / 0)

        hook = property(lambda self: 1 / 0)

    for call in (lambda: Model().step(1), lambda: Model().hook(), lambda: Child().step(None)):
        with pytest.raises((ZeroDivisionError, TypeError)) as error:
            call()
        ours = [entry for entry in error.traceback if entry.path.parent.name == "epoch_mixin"]
        assert ours and all(entry.ishidden(error) for entry in ours)
