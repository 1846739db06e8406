"""Which of the values that a step returned or logged are its losses.

For each key, the first of these counts:

- in training: what the step returned, bare or under a name of the key; then what it logged under one;
- in validation: what it returned in a dict; then what it logged, a confirmed name first, then another name of the key,
  then a partner; then a bare value, to which Lightning gives no meaning.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from epoch_mixin._names import Candidate, Candidates, Match, candidates, matches
from epoch_mixin._run import Stage
from epoch_mixin._values import NO_PLACE, Number, Value, as_number, as_size, place_of

# The arguments of `self.log` that reduce a value to its mean, in which alone a size is a weight.
_MEANS = ("mean", "avg", torch.mean)
# What is returned without a name.
_BARE = Candidate(is_logged=False, name="", match=Match(kind=-1))


class KeyLoss(NamedTuple):
    """A loss of a key.

    Attributes:
        key: the key.
        loss: its value.
        size: the ``batch_size`` that was given with the loss itself.
    """

    key: str
    loss: Number
    size: Number | None


class Missing(NamedTuple):
    """A key of which a step gave no loss.

    Attributes:
        key: the key.
        rejected: what was given under a name of the key and is not one number, in words; empty if nothing was.
        numbered: the names that differ in nothing but a number, so that none of them counts.
    """

    key: str
    rejected: str
    numbered: tuple[str, ...]


class Doubt(NamedTuple):
    """A key of which the value that counts may not be the one that the user means.

    Attributes:
        key: the key.
        name: the name of the value that counts; empty if it was returned without one.
        others: names that are as close and have another value; for a bare value, names as which it was logged.
    """

    key: str
    name: str
    others: tuple[str, ...]


class StepLosses(NamedTuple):
    """What a step gave: losses, several of a key where one name was logged several times, and what a user must know."""

    losses: list[KeyLoss]
    missing: list[Missing]
    doubts: list[Doubt]


def losses_of_step(stage: Stage, output: Any, logged: list[Value]) -> StepLosses:
    """Find the losses of each key in what a step returned and logged."""
    step, in_training = _Step(stage, output, logged), stage.name == "train"
    result = StepLosses([], [], [])
    for key, (names, numbered) in step.candidates().items():
        losses, rejected = list[Value](), ""
        for candidate in names:
            values = step.values(candidate)
            losses = [value for value in values if type(value.number) in (float, Tensor)]
            if losses:
                break
            if not rejected and isinstance(values[0].number, str):
                rejected = values[0].number
        if not losses:
            result.missing.append(Missing(key, rejected, numbered))
            continue
        for loss in losses:
            size = _own_size(loss, names, logged) if logged else None
            result.losses.append(KeyLoss(key, cast(Number, loss.number), size))
        if in_training and logged:
            partners = {value.name for value in _same_tensor(losses[0], logged)}
            stage.run.partners.add(key, {value.name: value.name in partners for value in logged})
        others = step.others(candidate, names, losses[0]) if logged or len(names) > 1 else ()
        if others:
            result.doubts.append(Doubt(key, candidate.name, others))
    return result


class _Step:
    """What a step returned and logged, by name."""

    def __init__(self, stage: Stage, output: Any, logged: list[Value]) -> None:
        self.stage, self.logged, self.output, self.entries = stage, logged, output, entries_of(output)
        self.by_name = defaultdict[str, list[Value]](list)
        for value in logged:
            self.by_name[value.name].append(value)

    def candidates(self) -> dict[str, Candidates]:
        """The names that may give the loss of each key, in the order in which they count."""
        returned = [name for name in self.entries or () if isinstance(name, str)]
        found = candidates((*returned,), (*self.by_name,), self.stage.keys, *self.stage.naming())
        if self.entries is not None or "loss" not in found:
            return found
        named, numbered = found["loss"]
        names = [_BARE, *named] if self.stage.name == "train" else [*named, _BARE]
        return {**found, "loss": Candidates(names, numbered)}

    def values(self, candidate: Candidate) -> list[Value]:
        """What was returned under a name, or what each call logged under it."""
        if candidate.is_logged:
            return self.by_name[candidate.name]
        given = self.output if self.entries is None else self.entries[candidate.name]
        place = place_of(given) if self.logged else NO_PLACE
        for other in self.logged if None not in place and not given.ndim else ():
            if other.place == place and other.number is not None:  # what was just logged needs no second copy
                return [Value(candidate.name, given, place, other.number)]
        # In validation one element with dimensions is rather the prediction for a batch of one.
        return [Value(candidate.name, given, place, as_number(given, self.stage.name == "train"))]

    def others(self, chosen: Candidate, names: list[Candidate], loss: Value) -> tuple[str, ...]:
        """Other names that cast doubt on a value: those as close, with another value; and those of a bare value."""
        if chosen is _BARE and self.stage.name == "train":
            return ()  # what a training step returns is its loss, whatever it logs it as
        if chosen is _BARE:
            logged_as = dict.fromkeys(value.name for value in self.logged if _is_same(value, loss))
            return tuple(name for name in logged_as if "loss" not in name.lower())
        rivals = [other for other in names if other.is_logged == chosen.is_logged and other.match == chosen.match]
        return tuple(other.name for other in rivals if other != chosen and _differ(loss, self.values(other)[0]))


def _own_size(loss: Value, names: list[Candidate], logged: list[Value]) -> Number | None:
    """The ``batch_size`` that was given with a loss, under one of its names, or with the same tensor."""
    of_names = [value for name in names if name.is_logged for value in logged if value.name == name.name]
    same = [loss, *of_names, *_same_tensor(loss, logged)]
    return next((value.size for value in same if value.size is not None), None)


def _same_tensor(loss: Value, logged: list[Value]) -> list[Value]:
    """What a step logged of the tensor that is its loss; of its memory before a change in place, if that is all."""
    same = [value for value in logged if value.place.memory and value.place.memory == loss.place.memory]
    return [value for value in same if value.place == loss.place] or same


def _is_same(value: Value, loss: Value) -> bool:
    return value.given is loss.given or (value.place.memory is not None and value.place == loss.place)


def _differ(loss: Value, other: Value) -> bool:
    """Whether two losses differ. Of those on a device only their memory tells."""
    if isinstance(loss.number, float) and isinstance(other.number, float):
        return loss.number != other.number and not (math.isnan(loss.number) and math.isnan(other.number))
    return isinstance(loss.number, Tensor) and isinstance(other.number, Tensor) and loss.place != other.place


def logged_values(stage: Stage, args: Any, kwargs: Any, at_end: bool) -> Iterator[Value]:
    """What is given to ``self.log`` or ``self.log_dict``, in a step or at the end of a validation."""
    given = args[0] if args else kwargs.get("name", kwargs.get("dictionary"))
    if isinstance(given, str):
        given = {given: args[1] if len(args) > 1 else kwargs.get("value")}
    reduction = kwargs.get("reduce_fx", "mean")
    is_mean = (reduction.lower() if isinstance(reduction, str) else reduction) in _MEANS
    size = as_size(kwargs["batch_size"]) if "batch_size" in kwargs and is_mean else None
    for name, value in given.items() if isinstance(given, Mapping) else ():
        means_key = bool(matches(name, stage.keys, *stage.naming()))
        if isinstance(value, Metric):
            value = _metric_value(value, at_end and means_key)
        yield Value(name, value, place_of(value), as_number(value) if means_key else None, size)


def entries_of(output: Any) -> Mapping[Any, Any] | None:
    """What a step returned by name; ``None`` if it has no names."""
    try:
        return output if type(output) is dict else dict(output.items()) if isinstance(output, Mapping) else None
    except Exception:  # a mapping of unknown type may raise whatever it is asked
        return None


def _metric_value(metric: Metric, at_end: bool) -> Any:
    """The value of a metric's latest call, ``None`` if it was only updated; at the end, its value for all batches."""
    with suppress(Exception):  # it may not be able to compute yet
        return metric.compute() if at_end else metric._forward_cache
    return None
