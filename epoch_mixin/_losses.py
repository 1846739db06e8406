"""A step's losses and weights: from what it returned and logged, and from its batch."""

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import fields, is_dataclass
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torchmetrics import Metric

from epoch_mixin._history import Epochs
from epoch_mixin._names import candidates, distances, key_for

Loss = float | Tensor


class Value(NamedTuple):
    """A value that a step returned or logged.

    Attributes:
        name: its name; ``"loss"`` if it was returned without one.
        value: what was given; of a metric its latest value.
        place: of a tensor, where its memory is and how often that has been changed.
        loss: what `as_loss` made of it at that moment; ``None`` if its name is not that of a loss.
        size: the ``batch_size`` that was given with it.
    """

    name: str
    value: Any
    place: tuple[int | None, int | None]
    loss: Loss | str | None = None
    size: Any = None


def batch_sizes(batch: Any, limit: int | None = None) -> list[int]:
    """The different sizes that a batch tells, up to a limit.

    These are the lengths of its tensors, the first as ``self.log`` would infer it (Lightning's ``extract_batch_size``,
    but that reads all that can be iterated); else what the batch says of itself, as graphs do.
    """
    for size_of in (_size_of_tensor, _size_of_graph):
        with suppress(Exception):  # whatever a batch of unknown type may raise when it is looked through
            sizes = (size for size in map(size_of, _parts(batch)) if size is not None)
            if found := list(dict.fromkeys(islice(sizes, limit))):
                return found
    return []


def _size_of_tensor(part: Any) -> int | None:
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])  # on the CPU, always
    return (part.size(0) if part.ndim else 1) if isinstance(part, Tensor) else None


def _size_of_graph(part: Any) -> int | None:
    # Of PyG and of DGL.
    sizes = (getattr(part, name, None) for name in ("num_graphs", "batch_size"))
    return next((size for size in sizes if type(size) is int), None)


def _parts(batch: Any) -> Iterator[Any]:
    """A batch, and what it is made of. To look through other iterables would mean to read them."""
    yield batch
    parts: Any = ()
    if isinstance(batch, (tuple, list, set, frozenset, deque)) and not isinstance(batch, PackedSequence):
        parts = islice(batch, 32)  # what is longer holds plain values, or tensors of one kind
    elif isinstance(batch, Mapping):
        parts = batch.values()
    elif is_dataclass(batch):
        parts = (getattr(batch, field.name, None) for field in fields(batch))
    for part in parts:
        yield from _parts(part)


def as_loss(value: Any, dims: bool = True) -> Loss | str | None:
    """Give a loss as a float, or as a detached copy without dimensions if it is on a device.

    If the value is no loss, give words that say what it is; for ``None``, ``None``. ``dims`` tells whether one element
    with dimensions is a loss.
    """
    kind = type(value).__name__
    try:
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.layout is not torch.strided:
                value = _plain(value)
            # A tensor that stands for others has no address on a device where all have one.
            has_value = value.device.type in ("xla", "lazy") or value.data_ptr()
            if not has_value or value.numel() != 1 or (value.ndim and not dims) or value.is_complex():
                return f"a {kind} of shape {tuple(value.shape)}{' without values' * value.is_meta}"
            if value.is_cpu:
                return float(value.item())
            # A copy: the user, or a replayed CUDA graph, may write to the memory again. MPS has no float64.
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            return cast(Tensor, value).data.sum(dtype=dtype)
        if isinstance(value, Real) or getattr(value, "ndim", None) == 0:
            return float(value)
    except Exception as error:  # whatever a value of unknown type may raise: recording must not
        where = ", as within a transform of torch.func" * isinstance(value, Tensor)
        return f"a {kind} that cannot be read{where} ({error})"
    return None if value is None else f"a {kind}"


def _plain(value: Tensor) -> Tensor:
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()  # a DTensor, which is the same on every rank of its mesh
    with getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)():
        return value.detach().to_dense().as_subclass(Tensor)


def checked_weight(weight: Any, owner: str) -> Loss:
    """Return what ``owner.epoch_loss_weight`` gave as a float or a tensor without dimensions, or raise.

    Whether a tensor is negative or not finite shows when its epoch ends: to look now would wait for its device.
    """
    number = as_loss(weight)
    if not isinstance(weight, (Real, Tensor)) or number is None or isinstance(number, str):
        raise TypeError(f"{owner}.epoch_loss_weight must return one number, not {weight!r}")
    if isinstance(weight, Real) and not 0 <= number < math.inf:
        raise ValueError(f"{owner}.epoch_loss_weight must return a finite number not below zero, not {weight}")
    return math.nan if isinstance(number, float) and number < 0 else number


def logged_values(epochs: Epochs, args: Any, kwargs: Any, at_end: bool) -> Iterator[Value]:
    """What is given to ``self.log`` or ``self.log_dict``, in a step or at the end of a validation."""
    given = args[0] if args else kwargs.get("name", kwargs.get("dictionary"))
    if isinstance(given, str):
        given = {given: args[1] if len(args) > 1 else kwargs.get("value")}
    for name, value in given.items() if isinstance(given, Mapping) else ():
        is_near = bool(distances(name, *epochs.naming()))
        if isinstance(value, Metric):
            value = _metric_value(value, at_end and is_near)
        loss = as_loss(value) if is_near else None
        yield Value(name, value, _place(value), loss, kwargs.get("batch_size"))


def _metric_value(metric: Metric, at_end: bool) -> Any:
    """The value of a metric's latest call, ``None`` if it was only updated; at the end, its value for all batches."""
    with suppress(Exception):  # it may not be able to compute yet
        return metric.compute() if at_end else metric._forward_cache
    return None


def losses_of_step(
    epochs: Epochs, output: Any, logged: list[Value], bare_first: bool = False
) -> tuple[list[tuple[str, Loss, Loss | None]], dict[str, str]]:
    """The losses that a step returned or logged.

    ``bare_first`` tells whether a value that is returned without a name comes before those with a name.

    Returns:
        The losses, each with its key and the batch size that was logged with it, several of a key where one name was
        logged several times. And for each key without a loss what was given for it that is none; empty if nothing was.
    """
    entries, logs = entries_of(output), defaultdict[str, list[Value]](list)
    for value in logged:
        logs[value.name].append(value)
    given = {"loss": output} if entries is None else {name: entries[name] for name in entries if isinstance(name, str)}
    logged_first = bool(logs) and entries is None and not bare_first
    losses: list[tuple[str, Any, Loss | None]] = []
    faults: dict[str, str] = {}
    for key, names in candidates((*given,), (*logs,), logged_first, *epochs.naming()).items():
        fault = ""
        for is_logged, name in names:
            values = logs[name] if is_logged else [_returned(name, given[name], logged, epochs.stage)]
            found = [value for value in values if type(value.loss) in (float, Tensor)]
            losses += [
                (key, value.loss, _logged_size(epochs, key, value, logged) if logged else None) for value in found
            ]
            if found and logged and epochs.stage == "train" and (partners := _names_of(found[0], logged)):
                epochs.run.partners.setdefault(key, partners)
            if found:
                break
            if values[0].loss is not None:
                fault = fault or f"gave {values[0].loss} for it, which is no real scalar"
        else:
            faults[key] = fault
    return losses, faults


def entries_of(output: Any) -> Mapping[Any, Any] | None:
    """What a step returned by name; ``None`` if it has no names."""
    try:
        return output if type(output) is dict else dict(output.items()) if isinstance(output, Mapping) else None
    except Exception:  # a mapping of unknown type may raise whatever it is asked
        return None


def _returned(name: str, value: Any, logged: list[Value], stage: str) -> Value:
    """A value that a step returned; it needs no second copy if the step has just logged it."""
    place = _place(value) if logged else (None, None)
    for other in logged if None not in place and not value.ndim else ():
        if other.place == place and other.loss is not None:
            return Value(name, value, place, other.loss)
    # In validation one element with dimensions is rather the prediction for a batch of one.
    return Value(name, value, place, as_loss(value, stage == "train"))


def _place(value: Any) -> tuple[int | None, int | None]:
    with suppress(Exception):  # what is no tensor, or one of unknown type, may have no memory
        return value.data_ptr() or None, None if value.is_inference() else value._version
    return None, None


def _names_of(value: Value, logged: list[Value]) -> tuple[str, ...]:
    """The names as which a step logs the very tensor, or its memory before a change in place. Reads no device."""
    same = [other for other in logged if other.place[0] == value.place[0] is not None]
    unchanged = [other for other in same if other.place == value.place]
    return tuple(dict.fromkeys(other.name for other in unchanged or same))


def _logged_size(epochs: Epochs, key: str, value: Value, logged: list[Value]) -> Loss | None:
    """The ``batch_size`` that was given with a loss, or with another of its names, or with anything in the step."""
    others = sorted(logged, key=lambda other: distances(other.name, *epochs.naming()).get(key, (9,)))
    for size in (value.size, *(other.size for other in others)):
        with suppress(TypeError, ValueError):  # Lightning takes it as it is
            return checked_weight(size, "")
    return None


def described(output: Any, logged: list[Value], keys: tuple[str, ...]) -> str:
    """What a step returned and logged, for a message, and how to record it."""
    entries = entries_of(output)
    what = "None" if output is None else f"only a {type(output).__name__}"
    if entries is not None:
        none = [f"a {key} of None" for key in keys if entries.get(key, ...) is None]
        what = (none or [f"only {', '.join(map(repr, entries))}" if entries else "an empty dict"])[0]
    updated = {value.name: " (a metric that was only updated)" * (value.value is None) for value in logged}
    other = next((key for name in updated if not updated[name] and (key := key_for(name)) not in ("", *keys)), None)
    hint = f" (record it with epoch_loss_keys = {(*keys, other)})".replace("'", '"') if other else ""
    names = ", ".join(f"{name!r}{note}" for name, note in updated.items())
    return f"returned {what}" + (f" and logged {names}{hint}" if names else "")
