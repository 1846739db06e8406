"""Weaving parts of ours into the methods of a class, so that a user cannot take them out by accident.

A mixin that only overrides a hook is gone as soon as a user's class overrides the same hook without ``super()``. So the
mixin overrides nothing. Whenever a class is made, `weave` puts an entry of its own for each method into it, whether the
class defines the method or inherits it. The entry gives a wrapper that runs our part beside the user's code:

- The user's own method stays in the class under another name. A wrapper without one goes on to the next class in the
  method resolution order, so that diamonds of bases, and bases that are patched later, work as they do without us; who
  asks a class, and no instance, gets what that class would give.
- A method that calls its parent's through ``super()`` meets a second wrapper, and a step may call another step. Only
  the outermost call of an instance in a thread counts; inner ones go straight to the user's code.
- To Lightning the method looks like the user's own. It reads the code and the arguments of a hook through one level of
  ``__wrapped__`` (``is_overridden``, ``is_param_in_hook_signature``), so the wrapper points to where the user's method
  would have pointed. Under ``torch.compile`` only the user's method is compiled.
- An entry is no function, and gives away neither class nor function that could lead back to it: a notebook's
  ``%autoreload`` would write new code into a function, and lose its way in a circle, as ``dill`` would. So it updates
  the user's own.

What this cannot reach is a class that is made in silence, since one of its bases has an ``__init_subclass__`` without
``super()``; the mixin refuses such a class as soon as it is used.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import lru_cache, partial, update_wrapper
from threading import get_ident
from types import FunctionType, MethodType
from typing import Any

import torch

# A failing test shows the user's code, and none of ours between.
__tracebackhide__ = True

# Before the name under which a class keeps its own method.
_OWN = "_unwoven_"

# What `torch.compile` has set to watch the frames that run; this sets another and gives the one before. Our parts run
# unwatched, and so uncompiled. (`get_eval_frame_callback`, which only looks, crashes torch 2.6 and 2.7: it forgets to
# count the reference that it gives.)
_watch: Any = torch._C._dynamo.eval_frame.set_eval_frame

# The outermost calls under way, as (thread, id of the instance, guard), and what was noted in the course of each.
_running: dict[tuple[int, int, str], list[Any]] = {}


class Woven:
    """What lies in a class in place of a method.

    Args:
        name: the method's name.
        before: called as ``before(self, args, kwargs)`` ahead of the method.
        after: called as ``after(self, what before gave, output, notes)`` behind it. Not called when it raised.
        guard: methods with the same guard count as one call where one calls another.
        heard: whether the method is only heard within a call that has this guard, by ``after(self, notes, args,
            kwargs)``.

    Attributes:
        function: the wrapper.
        find: gives the method that an instance would have; ``None`` where that is a function.
        of_class: gives what a class would.
        found: what lies in the base that the method is inherited from, and ``look`` gives what lies there now.
    """

    __slots__ = ("__isabstractmethod__", "find", "found", "function", "look", "of_class", "spec")

    def __init__(self, name: str, before: Any, after: Any, guard: str, heard: bool) -> None:
        self.spec = name, before, after, guard, heard
        self.__isabstractmethod__ = False
        self.look: Any = object  # gives what nothing is, so that the wrapper is made
        self.found: Any = None

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if self.look is not None and self.look() is not self.found:
            self.make(owner or type(instance))
        if instance is None:
            return self.of_class(owner)
        if self.find is None:
            return MethodType(self.function, instance)
        method = self.find(instance)
        return _dress(partial(self.function, instance), method) if callable(method) else method

    def __reduce__(self) -> Any:
        return Woven, self.spec

    def make(self, owner: type) -> None:
        """Make the wrapper: at first, after a pickle, and where a base that the method comes from was patched."""
        name, before, after, guard, heard = self.spec
        cls = next(base for base in owner.__mro__ if vars(base).get(name) is self)
        own_of, key = vars(cls).get, _OWN + name

        def find(self: Any) -> Any:
            own = own_of(key)
            if own is None:
                # `%autoreload` may have set this very function on the class's older self.
                place = cls if isinstance(self, cls) else next(at for at in type(self).__mro__ if name in vars(at))
                return getattr(super(place, self), name)
            return _bound(own, self, type(self))

        def wrapper(find: Any) -> Any:
            def woven(self: Any, *args: Any, **kwargs: Any) -> Any:
                call = (get_ident(), id(self), guard)
                if call in _running or (type(self) is not cls and not _has(type(self), name)):
                    return find(self)(*args, **kwargs)
                watcher = _watch(None)
                notes: list[Any] = []
                try:
                    _running[call] = notes  # within `try`: an interrupt right behind it must not leave it there
                    asked = before and before(self, args, kwargs)
                    own = own_of(key)
                    _watch(watcher)
                    # The first is quicker.
                    output = own(self, *args, **kwargs) if type(own) is FunctionType else find(self)(*args, **kwargs)
                    _watch(None)
                    if after:
                        after(self, asked, output, notes)
                finally:
                    _running.pop(call, None)
                    _watch(watcher)
                return output

            def listening(self: Any, *args: Any, **kwargs: Any) -> Any:
                output = find(self)(*args, **kwargs)
                notes = _running.get((get_ident(), id(self), guard))
                if notes is not None:
                    watcher = _watch(None)
                    after(self, notes, args, kwargs)  # behind what a parent's has heard, for the last note counts
                    _watch(watcher)
                return output

            return skip(listening if heard else woven)

        def of_class(owner: type) -> Any:
            own = own_of(key)
            if own is not None:
                return self.function if type(own) is FunctionType else _bound(own, None, owner)
            # Who asks a class for what it inherits means the class's own order of bases, whatever the instance's.
            method = getattr(super(cls, owner), name)
            return dressed(method) if type(method) is FunctionType and not is_woven(method) else method

        @lru_cache(1)
        def dressed(method: Any) -> Any:
            return _dress(wrapper(lambda self: method.__get__(self)), method)

        # What is public wraps the function, which costs each step a tenth more, and from torch 2.8 on loses `self`.
        from torch._dynamo.decorators import skip  # Lightning has loaded it; before that, it would take seconds

        for function in (find, _bound, _has, _found, Woven.__get__):
            skip(function)
        place, found = _found(cls, name)
        # What is no function may give methods of any looks.
        self.find = None if isinstance(found, FunctionType) else find
        self.of_class = of_class
        self.__isabstractmethod__ = bool(getattr(found, "__isabstractmethod__", False))
        self.function = _dress(wrapper(find), found)
        self.found, self.look = vars(place)[name], None
        if place is not cls and not heard:
            # The last base has stubs, which no step calls, and which another base may hide at any time.
            stub = place.__name__ == "LightningModule"
            self.look = (lambda: vars(_found(cls, name)[0])[name]) if stub else partial(vars(place).get, name)


class _Abstract:
    """Hides that a method is abstract, from `ABCMeta`: it lies under another name."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.method.__get__(instance, owner)


def _bound(method: Any, instance: Any, owner: type) -> Any:
    bind = getattr(type(method), "__get__", None)
    return bind(method, instance, owner) if bind else method


def _has(cls: type, name: str) -> bool:
    """Whether a class has an entry of that name, as that of a mock or of anything else of another kind has not."""
    return any(isinstance(vars(base).get(name), Woven) for base in cls.__mro__)


def _found(cls: type, name: str) -> tuple[type, Any]:
    """The class that has the method that a class has or inherits, and the method."""
    for base in cls.__mro__:
        found = vars(base).get(name)
        if isinstance(found, Woven):
            found = vars(base).get(_OWN + name, found)
        if name in vars(base) and not isinstance(found, Woven):
            return base, found.method if isinstance(found, _Abstract) else found
    return cls, None


def weave(cls: type, name: str, before: Any = None, after: Any = None, guard: str = "", heard: bool = False) -> bool:
    """Put an entry into a class, for which see `Woven`. Returns whether there is such a method."""
    # By what lies in the classes: a descriptor may be asked through an instance alone.
    found = _found(cls, name)[1]
    if found is None or not (callable(found) or hasattr(type(found), "__get__")):
        return False
    own = vars(cls).get(name)
    if own is None and _OWN + name in vars(cls):  # it has gone since the class was woven
        delattr(cls, _OWN + name)
    elif own is not None and not isinstance(own, Woven):
        setattr(cls, _OWN + name, _Abstract(own) if getattr(own, "__isabstractmethod__", False) else own)
    entry = Woven(name, before, after, guard or name, heard)
    setattr(cls, name, entry)
    entry.make(cls)
    return True


def is_woven(method: Any) -> bool:
    """Whether a method that an instance would call is a wrapper of `weave`, or one around it."""
    return hasattr(method, "_woven")


def _dress(function: Any, method: Any) -> Any:
    """Make a function look like the method."""
    # What a compiler has noted on the method would have it look through the function.
    worn = hasattr(method, "_torchdynamo_orig_callable")
    update_wrapper(function, method, updated=() if worn else ("__dict__",))
    function.__wrapped__ = getattr(method, "__wrapped__", method)
    function._woven = True
    with suppress(TypeError, ValueError):  # it may be no function, but what gives one
        function.__signature__ = inspect.signature(method)
    return function
