"""The open epochs and the history of both stages, and their saved form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from epoch_mixin._mean import ExactMean

Weight: TypeAlias = "float | Tensor"
Totals = dict[str, tuple[float, float]]
# Takes this rank's totals, one row a key, and returns those of all ranks.
Reduce = Callable[[Tensor], Tensor]

_PREFIX = {"train": "", "val": "val_"}

# Taking losses in costs a CPU some 200 microseconds, however many they are: at this number less than one for each.
_WAITING = 256


class OpenEpoch:
    """An epoch that has begun and not ended.

    The losses of its latest steps wait to be taken in together: that is what makes recording one cheap.

    Args:
        mark: tells this epoch from the next one of its stage; ``None`` if nobody said when it began.
        brought: the totals over all ranks of steps that were made before a checkpoint.
    """

    def __init__(self, mark: int | None = None, brought: Totals | None = None) -> None:
        self.mark = mark
        self.brought = brought or {}
        self._means: dict[str, ExactMean] = {}
        self._waiting: list[dict[str, Tensor]] = []
        self._weights: list[Weight] = []

    def add(self, losses: dict[str, Tensor], weight: Weight) -> None:
        """Record the losses of a step: detached, without dimensions, never to be changed again."""
        self._waiting.append(losses)
        self._weights.append(weight)
        if len(self._waiting) >= _WAITING:
            self._take_in()

    def mean(self, key: str) -> Tensor:
        """The mean so far on this rank, without dimensions; NaN before the first loss."""
        self._take_in()
        total, weight = self.brought.get(key, (0.0, 0.0))
        if key not in self._means:
            return torch.tensor(total / weight if weight else math.nan, dtype=torch.float64)
        metric = self._means[key]
        return (metric.mean_value + total) / (metric.weight + weight)

    def totals(self, keys: tuple[str, ...], reduce: Reduce) -> Totals:
        """sum(weight x loss) and sum(weight) of each key over all ranks: one reduction, one look at the device."""
        self._take_in()
        pairs = [self._means[key].totals() if key in self._means else None for key in keys]
        device = next((pair.device for pair in pairs if pair is not None), torch.device("cpu"))
        none = torch.zeros(2, dtype=torch.float64, device=device)
        rows = reduce(torch.stack([none if pair is None else pair.to(device) for pair in pairs])).tolist()
        before = [self.brought.get(key, (0.0, 0.0)) for key in keys]
        return {key: (a[0] + b[0], a[1] + b[1]) for key, a, b in zip(keys, rows, before, strict=True)}

    def _take_in(self) -> None:
        waiting, weights = self._waiting, self._weights
        self._waiting, self._weights = [], []
        for key in set().union(*waiting):
            steps = [step for step, losses in enumerate(waiting) if key in losses]
            losses = [waiting[step][key] for step in steps]
            if key not in self._means:
                self._means[key] = ExactMean(losses[0].device)
            self._means[key].update(losses, [weights[step] for step in steps])


class Recorder:
    """All that is known of a model's losses.

    Args:
        owner: the name of the model's class, for messages.

    Attributes:
        history: the means of the ended epochs; validation under ``val_`` and the key.
        val_epochs: for each validation key the training epoch that each of its values belongs to.
        open: the open epoch of each stage that has one.
        ended: validation epochs of this rank that have ended but not yet met those of the other ranks.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.history: dict[str, list[float]] = {}
        self.val_epochs: dict[str, list[int]] = {}
        self.open: dict[str, OpenEpoch] = {}
        self.ended: list[OpenEpoch] = []
        self._warned: set[str] = set()

    def warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            rank_zero_warn(f"{self.owner}{message}", UserWarning)

    def begin(self, stage: str, keys: tuple[str, ...], mark: int | None = None) -> OpenEpoch:
        """Open an epoch in place of one that may be open."""
        if stage == "train":
            for key in keys:  # now, for validation ends first and would come before them
                self.history.setdefault(key, [])
        epoch = self.open[stage] = OpenEpoch(mark)
        return epoch

    def close(self, stage: str, keys: tuple[str, ...], reduce: Reduce) -> None:
        """End the stage's epoch and write its means into the history.

        A training epoch without a loss is NaN, so that the index stays the epoch; a validation without one leaves
        nothing.

        Raises:
            ValueError: a weight was negative or not finite.
        """
        totals = self.open.pop(stage, OpenEpoch()).totals(keys, reduce)
        epoch = len(self.history.get(keys[0], []))
        for key, (total, weight) in totals.items():
            if not math.isfinite(weight):
                fault = f"a negative number, NaN or infinity in epoch {epoch}"
                raise ValueError(f"{self.owner}.epoch_loss_weight returned {fault}")
            name = _PREFIX[stage] + key
            if weight:
                self.history.setdefault(name, []).append(total / weight)
                if stage == "val":
                    self.val_epochs.setdefault(name, []).append(epoch)
            elif stage == "train":
                self.history.setdefault(name, []).append(math.nan)
                self.warn_once("nan", f": no step of epoch {epoch} gave a loss for {key!r}, so its mean is nan")

    def state(self, keys: tuple[str, ...], reduce: Reduce) -> dict[str, Any]:
        """Everything in plain types, the open epochs as totals over all ranks."""
        return {
            "history": {name: list(losses) for name, losses in self.history.items()},
            "val_epochs": {name: list(epochs) for name, epochs in self.val_epochs.items()},
            "open": {
                stage: {
                    "mark": epoch.mark,
                    "totals": {key: list(pair) for key, pair in epoch.totals(keys, reduce).items()},
                }
                for stage, epoch in self.open.items()
            },
        }

    def load(self, record: Any) -> None:
        """Take on a saved state in place of the present one.

        Raises:
            ValueError: the record has another shape; nothing is changed.
        """
        history = _field(record, "history", Mapping)
        val_epochs = _field(record, "val_epochs", Mapping)
        saved = _field(record, "open", Mapping)
        for name in history:
            _numbers(history, name, "history")
        for name in val_epochs:
            _numbers(val_epochs, name, "val_epochs")
        open_epochs = {}
        for stage in saved:
            if stage not in _PREFIX:
                raise ValueError(f"open.{stage} is no stage")
            epoch = _field(saved, stage, Mapping, "open")
            mark = _field(epoch, "mark", (int, type(None)), f"open.{stage}")
            totals = _field(epoch, "totals", Mapping, f"open.{stage}")
            for key in totals:
                pair = _numbers(totals, key, f"open.{stage}.totals")
                if len(pair) != 2 or not 0 <= pair[1] < math.inf:
                    raise ValueError(f"open.{stage}.totals.{key} must be a total and a weight, not {pair!r}")
            open_epochs[stage] = OpenEpoch(mark, {key: (pair[0], pair[1]) for key, pair in totals.items() if pair[1]})
        # A user may hold these lists: their contents change, not the objects.
        for name in set(self.history) - set(history):
            self.history.pop(name).clear()
        for name, losses in history.items():
            self.history.setdefault(name, [])[:] = losses
        self.val_epochs = {name: list(epochs) for name, epochs in val_epochs.items()}
        self.open = open_epochs
        self.ended = []


def _field(record: Any, name: str, kind: Any, where: str = "") -> Any:
    path = f"{where}.{name}" if where else name
    if not isinstance(record, Mapping) or name not in record:
        raise ValueError(f"{path} is missing")
    if not isinstance(record[name], kind):
        raise ValueError(f"{path} must not be {record[name]!r}")
    return record[name]


def _numbers(record: Mapping[str, Any], name: str, where: str) -> list[float]:
    if not isinstance(name, str):
        raise ValueError(f"{where} must have names that are strings, not {name!r}")
    values: list[float] = _field(record, name, list, where)
    for value in values:
        if not isinstance(value, Real):
            raise ValueError(f"{where}.{name} must hold numbers, not {value!r}")
    return values
