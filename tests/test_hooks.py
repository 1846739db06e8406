import copy
import functools
import inspect
import itertools
import pickle
import threading
import types
from abc import ABC, abstractmethod
from unittest import mock

import pytest

from epoch_mixin._hooks import Woven, is_woven, weave


class Listener:
    """A mixin that notes the calls of ``hook``, ``step`` and ``other_step``."""

    heard: list

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        weave(cls, "hook", before=lambda self, args, kwargs: self.heard.append(("before", args, kwargs)))
        for name in ("step", "other_step"):
            weave(
                cls,
                name,
                before=lambda self, args, kwargs: (args, kwargs),
                after=functools.partial(Listener.note, name),
                guard="step",
            )

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.heard = []
        return self

    @staticmethod
    def note(name, self, asked, output, notes):
        self.heard.append((name, output, *asked))


class Silent:
    """No mixin at all."""


class Parent:
    def hook(self):
        self.heard.append("parent")

    def step(self, x):
        """Double it."""
        return 2 * x


class Child(Listener, Parent):
    pass


def test_a_part_runs_before_the_method_with_its_arguments():
    class Model(Listener):
        def hook(self, *args, **kwargs):
            self.heard.append("mine")

    model = Model()
    model.hook(1, two=2)
    assert model.heard == [("before", (1,), {"two": 2}), "mine"]


def test_a_part_runs_after_the_method_with_its_output_and_arguments():
    model = Child()
    assert model.step(3) == 6
    assert model.step(x=4) == 8
    assert model.heard == [("step", 6, (3,), {}), ("step", 8, (), {"x": 4})]


def test_classes_without_the_method_get_none():
    class Model(Listener):
        pass

    assert not hasattr(Model, "hook") and not hasattr(Model, "step")


def test_other_classes_are_left_as_they_are():
    before = dict(vars(Parent))

    class Model(Listener, Parent):
        pass

    assert dict(vars(Parent)) == before
    assert Model.step is not Parent.step


@pytest.mark.parametrize("bases", [(Listener, Parent), (Parent, Listener), (Child,), (Child, Parent)])
def test_every_base_order_hears_each_call_once(bases):
    model = type("Model", bases, {})()
    model.hook()
    model.step(1)
    assert model.heard == [("before", (), {}), "parent", ("step", 2, (1,), {})]


def test_super_chains_of_any_depth_are_heard_once():
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
    assert model.heard == [("before", (), {}), "parent", ("step", 5, (1,), {})]


def test_a_diamond_is_heard_once():
    class Left(Child):
        def step(self, x):
            return super().step(x) + 1

    class Right(Child):
        def step(self, x):
            return super().step(x) * 10

    class Model(Left, Right):
        pass

    model = Model()
    assert model.step(1) == 21
    assert model.heard == [("step", 21, (1,), {})]


def test_of_steps_that_call_each_other_only_the_outermost_is_heard():
    class Model(Listener):
        def step(self, x):
            return x if x == 0 else self.step(x - 1)

        def other_step(self, x):
            return self.step(x)

    model = Model()
    model.other_step(3)
    model.step(2)
    assert [name for name, *_ in model.heard] == ["other_step", "step"]


def test_a_hook_inside_a_step_is_heard():
    class Model(Child):
        def step(self, x):
            self.hook()
            return x

    model = Model()
    model.step(1)
    assert [call[0] for call in model.heard] == ["before", "p", "step"]


def test_instances_do_not_silence_each_other():
    class Student(Child):
        teacher = None

        def step(self, x):
            return self.teacher.step(x) if self.teacher else x

    student, student.teacher = Student(), Student()
    student.step(1)
    assert len(student.heard) == len(student.teacher.heard) == 1


def test_a_method_that_raised_is_not_heard_and_the_next_one_is():
    class Model(Listener):
        def step(self, x):
            return 1 / x

    model = Model()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model.step(0)
    assert model.heard == []
    model.step(1)
    assert model.heard == [("step", 1.0, (1,), {})]


def test_what_the_part_raises_reaches_the_caller_and_does_no_lasting_harm():
    class Model(Listener):
        def hook(self):
            pass

    model = Model()
    del model.heard
    with pytest.raises(AttributeError):
        model.hook()
    model.heard = []
    model.hook()
    assert len(model.heard) == 1


def test_the_method_looks_like_the_users_own():
    assert inspect.signature(Child.step) == inspect.signature(Parent.step)
    assert inspect.signature(Child().step) == inspect.signature(Child.step.__get__(Child()))
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        assert getattr(Child.step, name) == getattr(Parent.step, name)
    assert Child.step.__wrapped__ is Parent.step


def test_a_decorated_method_is_unwrapped_to_what_it_decorates():
    def decorated(self, x):
        return x

    @functools.wraps(decorated)
    def decorator(*args, **kwargs):
        return decorated(*args, **kwargs)

    model = type("Model", (Listener,), {"step": decorator})
    assert model.step.__wrapped__ is decorated


class Binding:
    """A decorator that is a class, bound as its subclass says."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class AsMethod(Binding):
    def __get__(self, instance, owner=None):
        return self if instance is None else types.MethodType(self, instance)


class AsPartial(Binding):
    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)


class AsClosure(Binding):
    def __get__(self, instance, owner=None):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def double(self, x):
    return 2 * x


def dispatched():
    method = functools.singledispatchmethod(lambda self, x: None)
    method.register(int, double)
    return method


KINDS = {
    "function": double,
    "lambda": lambda self, x: 2 * x,
    "partialmethod": functools.partialmethod(lambda self, factor, x: factor * x, 2),
    "partial": functools.partial(lambda factor, x: factor * x, 2),
    "lru_cache": functools.lru_cache(double),
    "singledispatchmethod": dispatched(),
    "property": property(lambda self: lambda x: double(self, x)),
    "staticmethod": staticmethod(lambda x: 2 * x),
    "classmethod": classmethod(double),
    "class with MethodType": AsMethod(double),
    "class with partial": AsPartial(double),
    "class with closure": AsClosure(double),
    "callable without __get__": Binding(lambda x: 2 * x),
    "bound method": (2).__mul__,
    "C function": functools.partial(__import__("operator").mul, 2),
    "mock": mock.Mock(return_value=6),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inherited", [False, True])
def test_methods_of_any_kind_are_heard(kind, inherited):
    space = {"step": KINDS[kind]}
    bases = (Listener, type("Parent", (), space)) if inherited else (Listener,)
    model = type("Model", bases, {} if inherited else space)()
    assert model.step(3) == 6
    assert model.heard == [("step", 6, (3,), {})]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_class_gives_its_methods_of_any_kind_as_it_would(kind, inherited, by_hand):
    def called(mixin):
        space = {"step": KINDS[kind]}
        bases = (mixin, type("Parent", (), space)) if inherited else (mixin,)
        model = type("Model", bases, {} if inherited else space)()
        try:
            return type(model).step(*[model] * by_hand, 3)
        except Exception as error:
            return type(error)

    assert called(Listener) == called(Silent)


def test_a_function_that_a_class_gives_is_heard():
    for model in (Child(), type("Model", (Listener,), {"step": Parent.step})()):
        assert type(model).step(model, 3) == 6
        assert model.heard == [("step", 6, (3,), {})]


def test_a_base_that_inherits_means_its_own_order_of_bases():
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
    assert model.heard == [("step", 102, (1,), {})]


def test_a_descriptor_that_is_asked_through_an_instance_alone():
    class Bound:
        def __get__(self, instance, owner=None):
            return types.MethodType(double, instance)

    class Peeks:
        def __get__(self, instance, owner=None):
            return functools.partial(double, instance.__dict__ and instance)

    for descriptor in (Bound(), Peeks()):
        model = type("Model", (Listener,), {"step": descriptor})()
        assert model.step(3) == 6
        assert model.heard == [("step", 6, (3,), {})]


def test_an_abstract_method_of_a_later_base_is_no_hindrance():
    class Task(Listener, ABC):
        @abstractmethod
        def step(self, x):
            return 5 * x

    class Model(Parent, Task):
        pass

    class Heir(Task):
        def step(self, x):
            return super().step(x) + 1

    assert Task.__abstractmethods__ == {"step"}
    model = Model()
    assert model.step(3) == 6 and model.heard == [("step", 6, (3,), {})]
    heir = Heir()
    assert heir.step(3) == 16 and heir.heard == [("step", 16, (3,), {})]
    with pytest.raises(TypeError, match=r"step\b"):
        type("Other", (Task,), {})()


def test_a_base_patched_later_is_seen_with_its_signature():
    class Base(Parent):
        def step(self, x):
            return x

    class Model(Listener, Base):
        pass

    def patched(self):
        return 7

    with mock.patch.object(Base, "step", patched):
        assert Model().step() == 7
        assert list(inspect.signature(Model().step).parameters) == []
        assert Model().step.__wrapped__ is patched
    assert list(inspect.signature(Model().step).parameters) == ["x"]
    with mock.patch.object(Base, "step", None):
        assert Model().step is None


def test_a_method_set_on_a_woven_base_is_seen_with_its_signature():
    class Base(Listener):
        def step(self, x):
            return x

    class Before(Base):
        pass

    Base.step = lambda self: 7

    class After(Base):
        pass

    for model in (Before(), After()):
        assert model.step() == 7
        assert list(inspect.signature(model.step).parameters) == []
        assert len(model.heard) == 1


def test_a_class_gives_the_same_each_time():
    assert Child.hook is Child.hook and Child.step is Child.step


def test_an_abstract_class_method_stays_abstract():
    class Task(Listener, ABC):
        @classmethod
        @abstractmethod
        def step(cls, x): ...

    with pytest.raises(TypeError, match="abstract"):
        type("Model", (Task,), {})()


def test_a_step_of_a_thing_that_is_no_such_instance():
    class Model(Listener):
        def step(self, x):
            return self.factor * x

    assert Model.step(types.SimpleNamespace(factor=3), 2) == 6
    assert Model.step(mock.Mock(factor=3), 2) == 6
    assert Model.step(mock.Mock(spec=Model, factor=3), 2) == 6
    assert Model.step(self=types.SimpleNamespace(factor=3), x=2) == 6


@pytest.mark.parametrize("thing", [{"some": "options"}, 3, "text"])
def test_what_is_no_method_is_left_alone(thing):
    assert type("Model", (Listener,), {"hook": thing})().hook is thing


def test_a_property_may_give_nothing():
    assert type("Model", (Listener,), {"step": property(lambda self: None)})().step is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_may_call_super_whatever_kind_its_parent_has(kind):
    class Parent(Listener):
        step = KINDS[kind]

    class Model(Parent):
        def step(self, x):
            return super().step(x) + 1

    model = Model()
    assert model.step(3) == 7
    assert model.heard == [("step", 7, (3,), {})]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bound method", "mock")])
@pytest.mark.parametrize("inherited", [False, True])
def test_a_bound_method_of_any_kind_has_the_signature_that_it_would_have(kind, inherited):
    def signature(*bases):
        space = {"step": KINDS[kind]}
        model = type("Model", (*bases, type("P", (), space)), {}) if inherited else type("Model", bases, space)
        return inspect.signature(model().step)

    assert signature(Listener) == signature()


def test_an_abstract_method_stays_abstract():
    class Base(Listener, ABC):
        @abstractmethod
        def step(self, x): ...

    with pytest.raises(TypeError, match="abstract"):
        Base()

    class Model(Base):
        def step(self, x):
            return x

    model = Model()
    model.step(1)
    assert len(model.heard) == 1


def test_a_class_that_keeps_its_subclasses_to_itself_is_heard_all_the_same():
    class Selfish:
        def __init_subclass__(cls, **kwargs):
            pass

        def step(self, x):
            return x

    class Model(Listener, Selfish):
        def step(self, x):
            return x + 1

    model = Model()
    model.step(1)
    assert len(model.heard) == 1


def test_instances_can_be_copied_and_pickled():
    model = Child()
    model.step(1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.step(2)
        assert len(twin.heard) == 2
    assert len(model.heard) == 1


def test_a_copy_made_inside_a_step_is_heard_on_its_own():
    class Model(Child):
        def step(self, x):
            if x:
                self.twin = copy.deepcopy(self)
                self.twin.step(x - 1)
            return x

    model = Model()
    model.step(1)
    assert len(model.heard) == len(model.twin.heard) == 1


def grown(name, bases, body):
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
def test_diamonds_of_every_shape_resolve_as_without_the_mixin(mixed_in, order):
    def build(mixin, bodies):
        parts = [(mixin,) if at else () for at in mixed_in]
        sides = [grown(name, (*parts[at], Parent), bodies[at]) for at, name in enumerate(("Left", "Right"))]
        model = grown("Model", tuple(sides[at] for at in order), bodies[2])
        return type("Heir", (model, *parts[2]), {})() if parts[2] else model()

    class Parent:
        def step(self, x):
            return ["parent", x]

    class Nothing:
        def __new__(cls, *args):
            return super().__new__(cls)

    for bodies in itertools.product(("inherited", "own", "super"), repeat=3):
        model, expected = build(Listener, bodies), build(Nothing, bodies).step(1)
        assert model.step(1) == expected
        assert model.heard == [("step", expected, (1,), {})]


def test_a_base_patched_later_is_seen_and_so_is_its_return():
    class Heir(Child):
        pass

    for place in (Parent, Child, Heir):
        model = Heir()
        with mock.patch.object(place, "step", lambda self, x: 7 * x):
            assert model.step(1) == 7
        assert model.step(1) == 2
        seen = [("step", 7, (1,), {})] if place is not Heir else []  # it is the entry that was patched away
        assert model.heard == [*seen, ("step", 2, (1,), {})]


def test_a_patched_instance_runs_the_patch():
    model = Child()
    with mock.patch.object(model, "step", lambda x: 7 * x):
        assert model.step(1) == 7
        assert not is_woven(model.step)
    assert model.step(1) == 2
    assert model.heard == [("step", 2, (1,), {})]


def test_a_method_that_a_base_gets_later_hides_those_behind_it():
    class Left(Parent):
        pass

    class Model(Listener, Left):
        pass

    Left.step = lambda self, x: 5 * x
    assert Model().step(1) == 5
    del Left.step
    assert Model().step(1) == 2


@pytest.mark.parametrize("bases", [(Listener,), (Listener, Parent), (Child,)])
def test_a_method_set_to_none_stays_none(bases):
    model = type("Heir", (type("Model", bases, {"step": None}),), {})()
    assert model.step is None


def test_an_entry_that_has_gone_can_be_put_back():
    class Model(Child):
        def step(self, x):
            return 3 * x

    del Model.step
    assert weave(Model, "step", guard="step")
    assert Model().step(1) == 2


def test_another_thread_in_the_same_instance_is_heard_on_its_own():
    class Model(Listener):
        def step(self, x):
            if x:
                thread = threading.Thread(target=self.other_step, args=(0,))
                thread.start()
                thread.join()

        def other_step(self, x):
            self.step(x)

    model = Model()
    model.step(1)
    assert [call[:1] + call[2:] for call in model.heard] == [("other_step", (0,), {}), ("step", (1,), {})]


class Speaker(Parent):
    """Notes what ``say`` is given within ``step``."""

    def __init_subclass__(cls):
        weave(cls, "step", before=lambda *_: None, after=lambda self, asked, output, notes: self.noted.append(notes))
        weave(cls, "say", after=lambda self, notes, args, kwargs: notes.append(args), guard="step", heard=True)

    def __init__(self):
        self.noted = []
        self.said = []

    def say(self, x):
        self.said.append(x)


class Speaking(Speaker):
    def step(self, x):
        self.say(x)
        if x:
            self.step(x - 1)


def test_what_is_said_within_a_call_is_noted_for_the_outermost():
    model = Speaking()
    model.say("before")
    model.step(2)
    model.say("after")
    assert model.noted == [[(2,), (1,), (0,)]]
    assert model.said == ["before", 2, 1, 0, "after"]


def test_the_last_note_is_what_was_said_whatever_classes_make_of_it():
    class Louder(Speaking):
        def say(self, x):
            super().say(10 * x)

    class Loudest(Louder):
        def say(self, x):
            super().say(10 * x)

    class Inherits(Loudest):
        pass

    for cls, said in ((Louder, 10), (Loudest, 100), (Inherits, 100)):
        model = cls()
        with mock.patch.object(Speaking, "step", lambda self, x: self.say(x)):
            model.step(1)
        assert model.said == [said]
        assert model.noted[0][-1] == (1,)


def test_what_another_thread_says_is_not_noted():
    class Threaded(Speaker):
        def step(self, x):
            thread = threading.Thread(target=self.say, args=("elsewhere",))
            thread.start()
            thread.join()
            self.say(x)

    model = Threaded()
    model.step(1)
    assert model.noted == [[(1,)]]


def test_frames_of_ours_are_hidden_from_a_traceback():
    class Model(Child):
        def step(self, x):
            return super().step(x / 0)

        hook = property(lambda self: 1 / 0)

    for call in (lambda: Model().step(1), lambda: Model().hook()):
        with pytest.raises(ZeroDivisionError) as error:
            call()
        ours = [entry for entry in error.traceback if entry.path.name == "_hooks.py"]
        assert all(entry.ishidden(error) for entry in ours)


def test_no_entry_leads_back_to_its_class():
    entry = vars(Child)["step"]
    assert isinstance(entry, Woven) and not isinstance(entry, types.FunctionType)
    assert not any(value is Child for value in vars(Child).values())
    # What a pickle by value takes along.
    twin = pickle.loads(pickle.dumps(Woven("hook", None, None, "hook", False)))
    assert twin.spec == ("hook", None, None, "hook", False)
    model = type("Model", (Parent,), {"hook": twin, "_unwoven_hook": lambda self: "own"})()
    assert model.hook() == "own"
