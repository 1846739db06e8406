import copy
import functools
import inspect
import pickle
from abc import ABC, abstractmethod

import pytest

from epoch_mixin._hooks import weave


class Listener:
    """A mixin that notes the calls of ``hook``, ``step`` and ``other_step``."""

    heard: list

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        weave(cls, "hook", before=lambda self, *args, **kwargs: self.heard.append(("before", args, kwargs)))
        for name in ("step", "other_step"):
            weave(cls, name, after=functools.partial(Listener.note, name), step=True)

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.heard = []
        return self

    @staticmethod
    def note(name, self, output, args, kwargs):
        self.heard.append((name, output, args, kwargs))


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


@pytest.mark.parametrize(
    "step",
    [functools.partialmethod(lambda self, factor, x: factor * x, 2), functools.lru_cache(lambda self, x: 2 * x)],
    ids=["partialmethod", "lru_cache"],
)
def test_unusual_methods_are_heard(step):
    model = type("Model", (Listener,), {"step": step})()
    assert model.step(3) == 6
    assert model.heard == [("step", 6, (3,), {})]


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
