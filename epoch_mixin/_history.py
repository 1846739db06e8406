"""The epochs of a run, open and ended, and the history that they are written to. Knows nothing of Lightning.

An epoch *begins*, takes the losses of its steps, and *ends* on this rank as plain data, the sums of each key. Where all
ranks synchronize, the sums of all ranks are combined and *written to the history* as means.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from epoch_mixin._mean import ExactMean

# sum(weight x loss) and sum(weight) of each key that had a loss.
Totals = dict[str, list[float]]
# Validation ends first, and belongs to the training epoch that is written after it.
STAGES = ("val", "train")
# Between a key and the number of the dataloader that its losses come from, as Lightning writes it.
LOADER = "/dataloader_idx_"


class Epochs:
    """The epochs of one stage in a run: one that may be open, and those that have ended and are not written.

    Args:
        run: what they belong to.
        stage: one of `STAGES`.

    Attributes:
        ended: the totals of those that have ended and are not written.
        last: of the epoch that ended last the mark, and the totals, over all ranks when they are written.
        is_open: whether one is open; if not, the rest is that of the last one.
        keys: the keys to record.
        mark: tells an epoch of a fit from the next one; ``None`` without a Trainer.
        resumed: the sums restored from a checkpoint, over all ranks.
        means: of each key that had a loss on this rank.
        usual_mean: that of ``"loss"``, if this is the only key; else ``None``.
        sizes: the sizes that the first batch tells, if the weight is the default; ``None`` if no epoch is open.
        batches: how many batches the fit had had when the epoch began here.
        fault: what the first step that did not give each key returned and logged.
    """

    def __init__(self, run: "Run", stage: str) -> None:
        self.run, self.stage = run, stage
        self.ended: list[Totals] = []
        self.last: dict[str, Any] = {"mark": None, "totals": {}}
        self._accumulators: defaultdict[str, ExactMean] = defaultdict(ExactMean)
        self.begin((), None)
        self.is_open = False

    def begin(self, keys: tuple[str, ...], mark: int | None) -> None:
        """Open an epoch in place of one that may be open."""
        self._reset()
        self.is_open, self.keys, self.mark, self.batches, self.fault = True, keys, mark, -1, ""

    def end(self, first: bool) -> None:
        """End the open epoch on this rank."""
        totals = self.totals(first)
        # All at once: a signal handler that saves a checkpoint may run between any two lines.
        vars(self).update(is_open=False, ended=[*self.ended, totals], last={"mark": self.mark, "totals": totals})
        self._reset()

    def _reset(self) -> None:
        for mean in self._accumulators.values():
            mean.reset()
        self.means: dict[str, ExactMean] = {}
        self.usual_mean: ExactMean | None = None
        self.sizes: list[int] | None = None
        self.resumed: Totals = {}

    def naming(self) -> tuple[Any, ...]:
        """What decides which loss a name means, as `_names` takes it."""
        return self.keys, self.stage, tuple(self.run.partners.items())

    def add(self, key: str, loss: float | Tensor, weight: float | Tensor) -> None:
        """Add a loss: a float, or a detached tensor without dimensions that nobody changes any more."""
        self.means[key] = self._accumulators[key]
        # Not `self.means[key].update`: what torchmetrics wraps around it takes longer than all the rest.
        ExactMean.update(self.means[key], loss, weight)

    def mean(self, key: str) -> Tensor:
        """The mean so far on this rank, a 0-dim float64 tensor; NaN before the first loss."""
        own, (total, weight) = self._accumulators[key], self.resumed.get(key, (0.0, 0.0))
        mean = ExactMean.compute(own)
        return (own.mean_value + total) / (own.weight + weight) if weight else mean

    def totals(self, first: bool) -> Totals:
        """The sums so far, with one read of the device; on the ``first`` rank with those of a checkpoint."""
        sums = [part for mean in self.means.values() for part in mean.sums()]
        numbers = iter(torch.stack([part.to(sums[0].device) for part in sums]).tolist() if sums else ())
        own = {key: [total, weight] for key, total, weight in zip(self.means, numbers, numbers)}
        return added([own, self.resumed if first else {}])


class Run:
    """The epochs of one fit, or of the loops without a Trainer.

    Args:
        trainer: who runs the fit; ``None`` for a loop.

    Attributes:
        resumes: whether it goes on from a checkpoint, and no epoch has begun since that was loaded.
        val, train: the epochs of each stage.
        partners: for each key the names as which training logs its loss.
    """

    def __init__(self, trainer: Any = None) -> None:
        self.trainer, self.resumes = trainer, False
        self.partners: dict[str, tuple[str, ...]] = {}
        self.val, self.train = Epochs(self, "val"), Epochs(self, "train")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "trainer": None}

    def state(self, first: bool = True, with_open: bool = True) -> dict[str, Any]:
        """What is not written, in plain types."""
        opened = [epochs for epochs in (self.val, self.train) if epochs.is_open and with_open]
        return {
            "open": {epochs.stage: {"mark": epochs.mark, "totals": epochs.totals(first)} for epochs in opened},
            "ended": {"val": [*self.val.ended], "train": [*self.train.ended]},
            "last": self.train.last,
            "partners": {**self.partners},
            "keys": [*self.val.keys],
        }


def added(parts: Iterable[Totals], share: float = 1.0) -> Totals:
    """The sums of several parts, each of which counts as much."""
    sums: Totals = {}
    for key, (total, weight) in (item for part in parts for item in part.items()):
        before = sums.get(key, (0.0, 0.0))
        sums[key] = [before[0] + total * share, before[1] + weight * share]
    return sums


class History:
    """The means of the written epochs.

    Attributes:
        means: by name: a key, with ``val_`` before it for validation, and a dataloader's number behind.
        val_epochs: for each validation name the training epoch that each of its values belongs to.
        given: the keys that training has ever given.
    """

    def __init__(self) -> None:
        self.means: dict[str, list[float]] = {}
        self.val_epochs: dict[str, list[int]] = {}
        self.given: set[str] = set()
        self._epochs = 0

    @property
    def epochs(self) -> int:
        """How many training epochs there are; none once the user has cleared ``epoch_losses`` or ``epoch_history``."""
        names = ["loss"] if "loss" in self.given else self.given or self.means
        return self._epochs if any(self.means.get(name) for name in names) else 0

    def write(self, stage: str, totals: Totals, keys: tuple[str, ...]) -> list[str]:
        """Write the means of an epoch; return the keys that training should have given.

        A validation key without a loss leaves nothing. A training key without one is NaN, so that the index stays the
        epoch, unless only validation gives it.
        """
        if self._epochs and not self.epochs:
            self.restore({name: [] for name in self.means}, {})
        pooled = added({key.partition(LOADER)[0]: pair} for key, pair in totals.items())
        # A key is listed ahead of its dataloaders.
        means = {key: total / weight for key, (total, weight) in {**pooled, **totals, **pooled}.items() if weight}
        if stage == "val":
            for key, mean in means.items():
                self.means.setdefault("val_" + key, []).append(mean)
                self.val_epochs.setdefault("val_" + key, []).append(self.epochs)
            return []
        epochs = self.epochs
        self.given.update(means)
        only_val = {key for key in {*keys} - self.given if means and "val_" + key in self.means}
        written = [key for key in dict.fromkeys((*keys, *means)) if key not in only_val]
        self.resize(written, epochs)
        for key in written:
            self.means[key].append(means.get(key, math.nan))
        for key in only_val:
            self.means.pop(key, None)
        self._epochs = epochs + 1
        return [key for key in written if key not in means]

    def resize(self, keys: Iterable[str], epochs: int) -> None:
        """Make the lists of training keys as long, with NaN for epochs of which nothing is known."""
        for key in keys:
            if key not in self.means:
                # Training is listed before validation.
                validation = {name: self.means.pop(name) for name in self.val_epochs if name in self.means}
                self.means.update({key: []}, **validation)
            del self.means[key][epochs:]
            self.means[key] += [math.nan] * (epochs - len(self.means[key]))
        self._epochs = epochs

    def restore(self, means: Mapping[str, list[float]], val_epochs: dict[str, list[int]]) -> None:
        """Take over a history. A user may hold the lists: their contents change, not the objects."""
        held = {name: values for name, values in self.means.items() if isinstance(values, list)}
        for values in held.values():
            values.clear()
        self.means.clear()
        for name, values in means.items():
            self.means[name] = held.get(name, [])
            self.means[name] += values
        self.val_epochs = val_epochs
        training = {name: values for name, values in means.items() if name not in val_epochs}
        self.given = {name for name, values in training.items() if not all(map(math.isnan, values))}
        self._epochs = len(means["loss"]) if "loss" in self.given else max(map(len, training.values()), default=0)

    def records(self) -> list[dict[str, float]]:
        """One row a training epoch, with the last validation of each."""
        rows: list[dict[str, float]] = [{"epoch": epoch} for epoch in range(self.epochs)]
        for name, means in self.means.items():
            epochs = self.val_epochs.get(name, range(len(rows)))
            for epoch, mean in zip(epochs, means if isinstance(means, list) else ()):  # a user may put anything there
                if epoch < len(rows):
                    rows[epoch][name] = mean
        return rows
