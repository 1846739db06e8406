"""Recording around a user's methods, in a way that no subclass can switch off by accident.

A mixin that overrides a hook is switched off when a subclass overrides the same hook without ``super()``. So the mixin
has a descriptor, `Recorded`, in place of each method that it takes part in. The descriptor finds the method that comes
next in the method resolution order and gives it with recording around it. `wrap_methods` puts another `Recorded` into
each class in which a method of the user comes ahead of the mixin's. The descriptor then holds the user's method.

- A class gives its methods as it would without the mixin; only an instance gives them with recording. So
  ``Base.training_step(self, batch)``, abstract classes and a notebook's ``%autoreload`` work as usual.
- A step may call ``super()`` or another step. Only the outermost call of an instance in a thread is recorded.
- Lightning reads the arguments of a hook through one level of ``__wrapped__``, so the user's method is put there.
- A compiler sees the user's method only: ``torch.compiler.disable`` excludes what is around it.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial, update_wrapper
from threading import get_ident
from types import FunctionType, MethodType
from typing import Any

import torch

# A failing test shows the user's code, and no frames of ours between.
__tracebackhide__ = True

# Tells a compiler to leave a function alone. It has no annotations.
_disable: Any = torch.compiler.disable
# Makes a function that runs a method with recording, from the method and its name.
Around = Callable[[Callable[..., Any], str], Callable[..., Any]]
# The outermost calls that are running, as (thread, id of the instance, group). Each has what `before` returned, or what
# a step logs (`_losses.Logged`): there `note_log` finds it.
running: dict[tuple[int, int, str], Any] = {}


class Recorded:
    """A method of a class, with recording around it.

    Args:
        around: makes the function that records.
        own: the method that the class itself defines; by default the one that it inherits.
        name: the method's name; by default that of the attribute.
    """

    def __init__(self, around: Around, own: Any = ..., name: str = "") -> None:
        self.around, self.own, self.name = around, own, name
        self.__isabstractmethod__ = getattr(own, "__isabstractmethod__", False)
        self._functions: dict[Callable[..., Any], Any] = {}

    def __reduce__(self) -> Any:
        return Recorded, (self.around, self.own, self.name)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        method = function = self.own
        if instance is None or self.name in vars(instance) or type(method) is not FunctionType:
            method = self._find(instance, owner)
            if instance is None or not callable(method):
                return method
            function = getattr(method, "__func__", None) if getattr(method, "__self__", None) is instance else None
            # What is set on the instance and is no method of its class may be a closure that holds the instance. The
            # class must not keep it.
            if self.name in vars(instance) and getattr(owner, getattr(function, "__name__", ""), None) is not function:
                function = None
        if type(function) is FunctionType:
            return MethodType(self._functions.get(function) or self._function(function), instance)
        # A static method, a partial, an object with `__call__`.
        bound = _Bound(self._functions.get(self._call) or self._function(self._call), instance)
        vars(bound).update(method=method, __wrapped__=getattr(method, "__wrapped__", method))
        _copy_signature(bound, method)
        return bound

    def __set__(self, instance: Any, value: Any) -> None:
        # As in `self.training_step = self.first_phase_step`.
        vars(instance)[self.name] = value
        self._put_into(type(instance))

    def __delete__(self, instance: Any) -> None:
        if vars(instance).pop(self.name, self) is self:
            raise AttributeError(self.name)

    def _put_into(self, cls: type) -> None:
        # Only the descriptor of the instance's class gives the instance's own method. `super()` in that finds the next.
        if self.name not in vars(cls):
            setattr(cls, self.name, Recorded(self.around, name=self.name))

    def _find(self, instance: Any, owner: type) -> Any:
        """The method that the instance, or the class, would give without us."""
        name = self.name
        if instance is not None and name in vars(instance) and inspect.getattr_static(owner, name) is self:
            self._put_into(type(instance))  # the method may come from a pickle
            return vars(instance)[name]
        if self.own is not ...:
            bind = getattr(type(self.own), "__get__", None)
            return bind(self.own, instance, owner) if bind else self.own
        for cls in owner.__mro__:  # not stored: `dill` recurses for ever into a class that refers to itself
            if cls.__dict__.get(name) is self:
                break
        return getattr(super(cls, owner if instance is None else instance), name)

    def _call(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        return self._find(instance, type(instance))(*args, **kwargs)

    def _function(self, method: Callable[..., Any]) -> Any:
        # A compiler may be watching.
        function = self._functions[method] = _disable(_recording)(self.around, method, self.name)
        return function


class _Bound(partial[Any]):
    """A method that is no function, bound to its instance; it has the attributes of the method, as those of a mock."""

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["method"], name)


def _recording(around: Around, method: Callable[..., Any], name: str) -> Any:
    """The function that runs a method with recording; it looks like the method."""
    function = _disable(around(method, name), recursive=False)
    # Some versions of torch would compile what this names, and not find `self`.
    vars(function).pop("_torchdynamo_orig_callable", None)
    # What a compiler has noted on the method is not meant for this.
    update_wrapper(function, method, updated=() if hasattr(method, "_torchdynamo_orig_callable") else ("__dict__",))
    function.__wrapped__ = getattr(method, "__wrapped__", method)
    _copy_signature(function, method)
    return function


def _copy_signature(to: Any, method: Callable[..., Any]) -> None:
    with suppress(TypeError, ValueError):
        to.__signature__ = inspect.signature(method)


def wrap_methods(cls: type, mixin: type) -> None:
    """Put a `Recorded` into a class for each method that comes ahead of the mixin's; does nothing the second time."""
    for name, method in vars(mixin).items():
        if isinstance(method, Recorded) and not isinstance(inspect.getattr_static(cls, name), Recorded):
            setattr(cls, name, Recorded(method.around, vars(cls).get(name, ...), name))


def around_hook(
    method: Callable[..., Any], name: str, before: Any = None, after: Any = None, group: str = ""
) -> Callable[..., Any]:
    """Run ``before(instance, name, args, kwargs)`` ahead of a method, and ``after(instance, result of before)`` behind.

    If methods of the same group call each other, only the outermost call counts. If ``before`` returns
    ``NotImplemented``, a call within may count instead: a user's ``log(text)`` may call ``super().log(name, value)``.
    """
    before, after = (part and _disable(part) for part in (before, after))

    def hook(instance: Any, *args: Any, **kwargs: Any) -> Any:
        call = get_ident(), id(instance), group or name
        if call in running:
            return method(instance, *args, **kwargs)
        try:
            running[call] = None  # within `try`: an interrupt right behind it must not leave it there
            running[call] = noted = before and before(instance, name, args, kwargs)
            if noted is NotImplemented:
                del running[call]
            output = method(instance, *args, **kwargs)
            if after:
                after(instance, noted)
            return output
        finally:
            running.pop(call, None)

    return hook
