"""Weaving a mixin's part into the methods of a class, so that a user cannot take it out by accident.

A mixin that only overrides a hook is gone as soon as a user's class overrides the same hook without ``super()``. So the
mixin overrides nothing. Whenever a class is made, `weave` looks up each method the way an instance would find it,
wherever it was defined, and puts a wrapper into the new class that runs the mixin's part beside the user's code:

- A class that defines or inherits a method which is not woven yet gets a wrapper of its own; base order, third-party
  bases and missing ``super()`` calls make no difference.
- A method that calls its parent's through ``super()`` meets a second wrapper, and a step may call another step. Only
  the outermost call of an instance counts; inner ones go straight to the user's code.
- To Lightning the method looks like the user's own. It reads the code and the arguments of a hook through one level of
  ``__wrapped__`` (``is_overridden``, ``is_param_in_hook_signature``), so the wrapper points to where the user's method
  would have pointed. Under ``torch.compile`` only the user's method is compiled.

What this cannot reach is a class that is made in silence, since one of its bases has an ``__init_subclass__`` without
``super()``; the mixin refuses such a class as soon as it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch

Part = Callable[..., None]

# What `torch.compile` has set to watch the frames that run. If there is such a thing, the mixin's part must be hidden
# from it, which costs half as much as recording itself. Older versions of torch cannot tell, and always pay.
_watching: Callable[[], Any] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)

# The woven calls under way, as (id of the instance, guard).
_running: set[tuple[int, str]] = set()


def weave(cls: type, name: str, *, before: Part | None = None, after: Part | None = None, step: bool = False) -> None:
    """Run ``before(self, *args, **kwargs)`` ahead of ``cls.<name>`` and ``after(self, output, args, kwargs)`` behind.

    Args:
        cls: the class; nothing happens where it has no such method.
        name: the method's name.
        before: called with the method's own arguments.
        after: called with what the method returned and its arguments, still packed. Not called when it raised.
        step: the method may call, or be called by, another step; together they count as one call.
    """
    method = getattr(cls, name, None)
    if method is None or getattr(method, "_woven", None) == (name, method):
        return
    found = inspect.getattr_static(cls, name)
    if isinstance(found, (staticmethod, classmethod)):
        method = _taking_self(found)
    guard = "step" if step else name

    def woven(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = (id(self), guard)
        if call in _running:
            return method(self, *args, **kwargs)
        _running.add(call)
        try:
            if before is not None:
                before(self, *args, **kwargs)
            output = method(self, *args, **kwargs)
            if after is not None:
                (after if _watching() is None else hidden)(self, output, args, kwargs)
        finally:
            _running.discard(call)
        return output

    hidden: Any = after
    update_wrapper(woven, method)
    if step:
        hidden = torch.compiler.disable(after)  # type: ignore[no-untyped-call]
        woven = _untraced(woven)
    vars(woven).update(
        __wrapped__=getattr(method, "__wrapped__", method),
        __signature__=inspect.signature(method),
        _woven=(name, woven),
    )
    setattr(cls, name, woven)


def is_woven(method: Any) -> bool:
    """Whether a method that an instance would call is a wrapper of `weave`, or one around it."""
    return hasattr(method, "_woven")


def _taking_self(found: Any) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return found.__get__(self, type(self))(*args, **kwargs)

    return update_wrapper(method, found.__func__)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep `torch.compile` out of a function, but not out of those that it calls."""
    from torch._dynamo import decorators  # Lightning has loaded it; before that, it would take seconds

    # What is public wraps the function, which costs each step a tenth more.
    skip: Any = getattr(decorators, "skip", partial(torch.compiler.disable, recursive=False))
    untraced: Callable[..., Any] = skip(function)
    return untraced
