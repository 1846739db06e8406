"""Which of the values that a step returned or logged are its losses.

For each key, the first of these counts:

- in training: what the step returned, bare or under a name of the key; then what it logged under one;
- in validation: what it returned in a dict; then what it logged, the closest name first (see `_names.Kind`); then a
  bare value, to which Lightning gives no meaning.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from epoch_mixin._names import Candidate, Candidates, Kind, Match, candidates, words
from epoch_mixin._run import Stage
from epoch_mixin._values import NO_PLACE, Number, Rejected, Value, as_number, place_of

# What is returned without a name.
_BARE = Candidate(is_logged=False, name="", match=Match(Kind.BARE))


class Logged(list[Value]):
    """What a running step, or the end of a validation, logs.

    A list with a slot: making it runs no Python code, which matters in every step.

    Attributes:
        stage: the stage that records it.
    """

    __slots__ = ("stage",)
    stage: Stage


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
        numbered: the names that differ only in a number, so that none of them counts.
    """

    key: str
    rejected: str
    numbered: tuple[str, ...]


class Doubt(NamedTuple):
    """A key of which the value that counts may not be the one that the user means.

    Attributes:
        key: the key.
        name: the name of the value that counts; empty if it was returned without one.
        rivals: names that are as close and have another value; for a bare value, names as which it was logged.
    """

    key: str
    name: str
    rivals: tuple[str, ...]


class StepLosses(NamedTuple):
    """What a step gave, and what a user must know of it. A name that was logged several times gives several losses."""

    losses: list[KeyLoss]
    missing: list[Missing]
    doubts: list[Doubt]

    def of_keys(self, keys: set[str]) -> "StepLosses":
        """What was given for some of the keys."""
        return StepLosses(
            losses=[loss for loss in self.losses if loss.key in keys],
            missing=[missing for missing in self.missing if missing.key in keys],
            doubts=[doubt for doubt in self.doubts if doubt.key in keys],
        )


def losses_of_step(stage: Stage, output: Any, logged: list[Value]) -> StepLosses:
    """Find the losses of each key in what a step returned and logged."""
    step = _Step(stage, output, logged)
    in_training = stage.name == "train"
    result = StepLosses([], [], [])
    for key, (names, numbered) in step.candidates().items():
        losses: list[Value] = []
        rejected = ""
        for candidate in names:
            values = step.values(candidate)
            losses = [value for value in values if type(value.number) in (float, Tensor)]
            if losses:
                break
            if not rejected and isinstance(values[0].number, Rejected):
                rejected = values[0].number
        if not losses:
            result.missing.append(Missing(key, rejected, numbered))
            continue
        same = _same_tensor(losses[0], logged) if logged else []
        for loss in losses:
            size = _own_size(loss, names, same, step) if logged else None
            result.losses.append(KeyLoss(key, loss.number, size))  # type: ignore[arg-type]  # it is a number
        if logged and in_training:
            others = {value.name for value in logged if not any(value is each for each in same)}
            stage.run.partners.add(key, {name: name not in others for name in step.by_name})
        rivals = step.rivals(key, candidate, names, losses[0]) if len(names) > 1 or (logged and not in_training) else ()
        if rivals:
            result.doubts.append(Doubt(key, candidate.name, rivals))
    return result


class _Step:
    """What a step returned and logged, by name."""

    def __init__(self, stage: Stage, output: Any, logged: list[Value]) -> None:
        self.stage, self.logged, self.output, self.entries = stage, logged, output, entries_of(output)
        self.by_name: dict[str, list[Value]] = {}
        for value in logged:
            self.by_name.setdefault(value.name, []).append(value)

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
        place = NO_PLACE
        if self.logged:
            place = place_of(given)
            if place.is_known and not given.ndim:
                for other in self.logged:
                    if other.place == place and other.number is not None:  # it needs no second copy
                        return [Value(candidate.name, given, place, other.number)]
        # In validation one element with dimensions is rather the prediction for a batch of one.
        return [Value(candidate.name, given, place, as_number(given, self.stage.name == "train"))]

    def rivals(self, key: str, chosen: Candidate, names: list[Candidate], loss: Value) -> tuple[str, ...]:
        """Other names that cast doubt on a value: those as close, with another value; and those of a bare value."""
        if chosen is _BARE and self.stage.name == "train":
            return ()  # what a training step returns is its loss, whatever it logs it as
        if chosen is _BARE:
            logged_as = dict.fromkeys(value.name for value in self.logged if _is_same(value, loss))
            return tuple(name for name in logged_as if not any(word.endswith("loss") for word in words(name)))
        if chosen.name == key and not chosen.is_logged:
            return ()  # what is returned under the key itself
        as_close = [other for other in names if other.is_logged == chosen.is_logged and other.match == chosen.match]
        return tuple(
            other.name
            for other in as_close
            if other != chosen and any(_differ(loss, value) for value in self.values(other))
        )


def _own_size(loss: Value, names: list[Candidate], same: list[Value], step: _Step) -> Number | None:
    """The ``batch_size`` that was given with a loss, with the same tensor or number, or under the usual name."""
    if loss.size is not None:
        return loss.size
    of_names = [(name, value) for name in names if name.is_logged for value in step.by_name[name.name]]
    own = [value for name, value in of_names if name.match.is_exact or _is_equal(value.number, loss.number)]
    return next((value.size for value in (*own, *same) if value.size is not None), None)


def _same_tensor(loss: Value, logged: list[Value]) -> list[Value]:
    """What a step logged of the tensor that is its loss; if there is none, of its memory before a change in place."""
    same = [value for value in logged if value.place.memory and value.place.memory == loss.place.memory]
    return [value for value in same if value.place == loss.place] or same


def _is_same(value: Value, loss: Value) -> bool:
    """Whether a logged value is the one that was returned: the same object or memory, or a copy on the CPU."""
    if value.given is loss.given or (value.place.memory is not None and value.place == loss.place):
        return True
    is_on_device = isinstance(value.given, Tensor) and not value.given.is_cpu
    return not is_on_device and _is_equal(as_number(value.given), loss.number)


def _is_equal(number: Any, other: Any) -> bool:
    return type(number) is type(other) is float and number == other


def _differ(loss: Value, other: Value) -> bool:
    """Whether two losses differ. Of those on a device only their memory tells."""
    if isinstance(loss.number, float) and isinstance(other.number, float):
        return loss.number != other.number and not (math.isnan(loss.number) and math.isnan(other.number))
    return isinstance(loss.number, Tensor) and isinstance(other.number, Tensor) and loss.place != other.place


def entries_of(output: Any) -> Mapping[Any, Any] | None:
    """What a step returned by name; ``None`` if it has no names."""
    try:
        return output if type(output) is dict else dict(output.items()) if isinstance(output, Mapping) else None
    except Exception:  # a mapping of unknown type may raise whatever it is asked
        return None
