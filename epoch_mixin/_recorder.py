"""Open epochs, ended epochs, and the history that they are settled into. Knows nothing of Lightning.

An epoch *begins*, takes the losses of its steps, and *ends* on this rank as plain data, the sums of each key. Where all
ranks meet, what each of them ended is put `together` and *settled*: written into the history.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from epoch_mixin._mean import ExactMean, blank, new_mean
from epoch_mixin._warn import warn

# sum(weight x loss) and sum(weight) of each key that had a loss.
Totals = dict[str, list[float]]
# Validation ends first, and belongs to the training epoch that is settled after it.
STAGES = ("val", "train")
# Between a key and the number of the dataloader that its losses come from, as Lightning writes it.
LOADER = "/dataloader_idx_"
_ALL_ZERO = "the weights of its steps are all 0"


@dataclass
class OpenEpoch:
    """An epoch that has begun and not ended.

    Args:
        mark: tells this epoch of a Trainer from the next one of its stage; ``None`` in a loop by hand.
        begins: where its sums begin: what a checkpoint brought, over all ranks.
        means: the sums of its steps on this rank.
        batches: how many the fit had had when it began here.
    """

    mark: int | None = None
    begins: Totals = field(default_factory=dict)
    means: dict[str, ExactMean] = field(default_factory=lambda: defaultdict(new_mean))
    batches: int | None = None

    def add(self, key: str, loss: Tensor, weight: float | Tensor) -> None:
        """Record a loss: detached, without dimensions, never to be changed again."""
        # Past the bookkeeping that torchmetrics puts around it, which costs more than all the rest.
        ExactMean.update(self.means[key], loss, weight)

    def mean(self, key: str) -> Tensor:
        """The mean so far on this rank, float64, without dimensions; NaN before the first loss."""
        mean = self.means.get(key) or blank()
        own = ExactMean.compute(mean)
        total, weight = self.begins.get(key, (0.0, 0.0))
        return (mean.mean_value + total) / (mean.weight + weight) if weight else own

    def totals(self, first: bool) -> Totals:
        """The sums so far, with one look at the device; on the ``first`` rank with what a checkpoint brought."""
        sums = [part for mean in self.means.values() for part in mean.sums()]
        numbers = iter(torch.stack([part.to(sums[0].device) for part in sums]).tolist() if sums else ())
        own = {key: [total, weight] for key, total, weight in zip(self.means, numbers, numbers)}
        return _summed([own, self.begins if first else {}])


class Run:
    """The epochs of one runner: a Trainer's, or those of loops by hand.

    Attributes:
        open: the open epoch of each stage that has one.
        ended: for each stage the totals of the epochs that have ended and are not settled.
        words: for each stage what a step that gave no loss returned and logged, for a message.
        sizes: for each stage the batch sizes that the tensors of its first batch tell.
        last: the training epoch that ended last, by its mark, and its totals; over all ranks when it is settled.
        many: for each stage and dataloader the keys of which a step returned several numbers.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what is not settled."""
        self.open: dict[str, OpenEpoch] = {}
        self.ended: dict[str, list[Totals]] = {stage: [] for stage in STAGES}
        self.words: dict[str, str] = {}
        self.sizes: dict[str, list[int]] = {}
        self.many: dict[str, set[str]] = defaultdict(set)
        self.last: dict[str, Any] = {"mark": None, "totals": {}}

    def begin(self, stage: str, mark: int | None = None) -> OpenEpoch:
        """Open an epoch in place of one that may be open."""
        epoch = self.open[stage] = OpenEpoch(mark)
        return epoch

    def end(self, stage: str, first: bool = True) -> None:
        """End the stage's epoch on this rank. A training epoch ends the validation that nobody ended."""
        if stage == "train" and "val" in self.open:
            self.end("val", first)
        epoch = self.open.get(stage, OpenEpoch())
        totals = epoch.totals(first)
        ended = {**self.ended, stage: [*self.ended[stage], totals]}
        last = {"mark": epoch.mark, "totals": totals} if stage == "train" else self.last
        still = {name: self.open[name] for name in self.open if name != stage}
        # All at once: a signal handler that saves a checkpoint may run between any two lines.
        vars(self).update(ended=ended, last=last, open=still)

    def state(self, first: bool = True, with_open: bool = True) -> dict[str, Any]:
        """What is not settled, in plain types."""
        epochs = self.open.items() if with_open else ()
        opened = {stage: {"mark": epoch.mark, "totals": epoch.totals(first)} for stage, epoch in epochs}
        ended = {stage: list(totals) for stage, totals in self.ended.items()}
        return {"open": opened, "ended": ended, "last": self.last}


def together(states: list[dict[str, Any]], share: float) -> dict[str, Any]:
    """Put together what the ranks have not settled.

    Args:
        states: `Run.state` of each rank.
        share: how much each counts: less than 1 where ranks share one copy of the model, so that all made its steps.
    """
    opened, ended = {}, {}
    for stage in STAGES:
        # A rank may have passed a validation run by.
        runs = zip_longest(*(state["ended"][stage] for state in states), fillvalue={})
        ended[stage] = [_summed(totals, share) for totals in runs]
        epochs = [state["open"][stage] for state in states if stage in state["open"]]
        if epochs:
            opened[stage] = {**epochs[0], "totals": _summed([epoch["totals"] for epoch in epochs], share)}
    return {**states[0], "open": opened, "ended": ended}


def _summed(parts: Iterable[Totals], share: float = 1.0) -> Totals:
    sums: Totals = {}
    for key, (total, weight) in (item for part in parts for item in part.items()):
        before = sums.get(key, (0.0, 0.0))
        sums[key] = [before[0] + total * share, before[1] + weight * share]
    return sums


class History:
    """The means of the settled epochs.

    Args:
        owner: the name of the model's class, for messages.

    Attributes:
        means: by name: a key, with ``val_`` before it for validation, and a dataloader's number behind.
        val_epochs: for each validation name the training epoch that each of its values belongs to, -1 for none.
        given: the keys that training has ever given.
        written: those that the last training epoch has written, unless it was before a resume.
        settled: how many training epochs there were when one was last settled.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.means: dict[str, list[float]] = {}
        self.val_epochs: dict[str, list[int]] = {}
        self.given: set[str] = set()
        self.written: list[str] = []
        self.settled = 0
        self._warned: set[str] = set()

    def warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warn(f"{self.owner}{message}")

    def epochs(self, keys: Iterable[str]) -> int:
        """How many training epochs are settled: as many as the first key of the last one has."""
        for names in (self.written[:1], keys, self.given):
            if lengths := [len(self.means[name]) for name in names if name in self.means]:
                return max(lengths)
        return 0

    def settle(self, ended: Mapping[str, list[Totals]], words: Mapping[str, str | None], keys: tuple[str, ...]) -> None:
        """Write the means of ended epochs.

        A training epoch without a loss is NaN, so that the index stays the epoch. A validation without one leaves
        nothing, nor does training for a key that only validation gives.

        Args:
            ended: as in `Run`.
            words: as in `Run`.
            keys: the keys to record; those that another rank gave come with its totals.

        Raises:
            ValueError: a weight was negative or not finite.
        """
        if self.epochs(keys) < self.settled:  # a user has cleared them: what was before belongs to no epoch of now
            self.val_epochs = {name: [-1] * len(epochs) for name, epochs in self.val_epochs.items()}
        for stage in STAGES:
            for totals in ended[stage]:
                epoch = self.epochs(keys)
                if not all(math.isfinite(weight) for _, weight in totals.values()):
                    fault = f"a negative number, NaN or infinity in epoch {epoch}"
                    raise ValueError(f"{self.owner}.epoch_loss_weight returned {fault}")
                means = {key: total / weight for key, (total, weight) in _by_loader(totals).items() if weight}
                settle = self._settle_training if stage == "train" else self._settle_validation
                settle(epoch, keys, totals, means, words.get(stage))
        self.settled = self.epochs(keys)

    def take_back(self, keys: Collection[str]) -> None:
        """Forget the last training epoch, which is to be settled again."""
        epochs = self.epochs(keys)
        for key in keys:
            if len(self.means.get(key, ())) == epochs > 0:
                self.means[key].pop()

    def pad(self, keys: Iterable[str], epochs: int) -> None:
        """Make the next training epoch lie at the index ``epochs``, with NaN where nothing is known."""
        missing = epochs - self.epochs(keys)
        if missing > 0:
            self.warn_once("pad", f": the checkpoint holds no loss of the last {missing} of {epochs} epochs: nan")
            self.written = []
            for key in keys:
                self._curve(key, epochs)

    def records(self, keys: Iterable[str]) -> list[dict[str, float]]:
        """One row a training epoch."""
        rows: list[dict[str, float]] = [{"epoch": epoch} for epoch in range(self.epochs(keys))]
        for name, means in self.means.items():
            if not isinstance(means, list):  # a user has put it there
                continue
            epochs = self.val_epochs.get(name, range(len(means)))
            # The latest of each: a user may have cleared what was before.
            for epoch, mean in zip(epochs[-len(means) :], means[-len(epochs) :]):
                if 0 <= epoch < len(rows):
                    rows[epoch][name] = mean
        return rows

    def _settle_validation(self, epoch: int, keys: Any, totals: Totals, means: dict[str, float], word: Any) -> None:
        for key, mean in means.items():
            values = self.means.setdefault("val_" + key, [])
            epochs = self.val_epochs.setdefault("val_" + key, [])
            del epochs[: max(0, len(epochs) - len(values))]  # of values that a user has cleared
            values.append(mean)
            epochs.append(epoch)
        if not means and (totals or word):
            why = f'validation_step {word}; return the loss, or self.log("val_{keys[0]}", ...)'
            why = _ALL_ZERO if totals else why
            self.warn_once("val", f": no step of a validation gave a loss: {why}")

    def _settle_training(self, epoch: int, keys: Any, totals: Totals, means: dict[str, float], word: Any) -> None:
        self.given.update(means)
        written = []
        for key in dict.fromkeys((*keys, *means)):
            if means and key not in self.given and "val_" + key in self.means:
                self.means.pop(key, None)
                continue
            self._curve(key, epoch).append(means.get(key, math.nan))
            written.append(key)
        missing = next((key for key in written if key not in means), None)
        if missing is not None and (word or totals):  # a Trainer may pass an epoch by, after some resumes
            why = f'did the step return it, or self.log("train_{missing}", ...) it?'
            why = _ALL_ZERO if missing in totals else why if totals else f"it {word}; {why}"
            message = f": no step of epoch {epoch} gave a loss for {missing!r}, so its mean is nan: {why}"
            self.warn_once(f"nan {missing}", message)
        self.written = written

    def _curve(self, name: str, epochs: int) -> list[float]:
        """The list of a training key, with NaN for epochs that did not have it."""
        if name not in self.means:
            # Training is listed before validation.
            validation = {name: self.means.pop(name) for name in self.val_epochs if name in self.means}
            self.means.update({name: []}, **validation)
        values = self.means[name]
        if name not in self.written:  # else the user has cleared what is missing, to start afresh
            values += [math.nan] * (epochs - len(values))
        return values


def _by_loader(totals: Totals) -> Totals:
    """The totals of each key over all dataloaders, and those of each."""
    pooled = _summed({key.partition(LOADER)[0]: pair} for key, pair in totals.items())
    return {**pooled, **totals, **pooled}


class Recorder:
    """All that is known of a model's losses.

    What no Trainer ran belongs to no Trainer's epoch, so loops by hand have a run of their own.
    """

    def __init__(self, owner: str) -> None:
        self.history = History(owner)
        self.fit = Run()
        self.by_hand = Run()
        self.resumed = False  # whether the fit goes on from a checkpoint, so that the index of an epoch is known
