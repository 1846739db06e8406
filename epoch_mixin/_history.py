"""The history: the means of the epochs that all ranks have ended, in plain lists."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from epoch_mixin._run import LOADER, Totals, added, history_name


class History:
    """The means of the written epochs.

    Attributes:
        means: by name: a key, with ``val_`` before it for validation, and a dataloader's number behind.
        val_epochs: for each validation name, the index of the training epoch that each of its values belongs to.
        val_parts: for each validation name, which part of that epoch had been trained, from 0 to 1; NaN if unknown.
        given: the keys that training has ever given.
    """

    def __init__(self) -> None:
        self.means: dict[str, list[float]] = {}
        self.val_epochs: dict[str, list[int]] = {}
        self.val_parts: dict[str, list[float]] = {}
        self.given: set[str] = set()
        # Lists that were read before they had a value.
        self._empty: defaultdict[str, list[float]] = defaultdict(list)
        # The number of epochs, whatever the user has cleared since.
        self._written = 0

    @property
    def count(self) -> int:
        """How many training epochs there are; none once the user has cleared ``epoch_losses`` or ``epoch_history``."""
        first = next((name for name in ("loss", *self.means) if name in self.given), None)
        has_values = self.means.get(first) if first else any(self.means.values())
        return self._written if has_values else 0

    def list_of(self, key: str) -> list[float]:
        """The list of a training key, which `means` holds as soon as it has a value."""
        return self.means[key] if key in self.means else self._empty[key]

    def write(self, stage: str, totals: Totals, keys: tuple[str, ...], part: float = math.nan) -> list[str]:
        """Write the means of an epoch.

        A validation key without a loss leaves nothing. A training key without one is NaN, so that the index stays the
        epoch, unless only validation gives it.

        Args:
            stage: ``"train"`` or ``"val"``.
            totals: the sums of the epoch, over all ranks.
            keys: the keys to record.
            part: of a validation, which part of the open training epoch had been trained.

        Returns:
            The keys of training whose mean is NaN for want of a loss.
        """
        if self._written and not self.count:  # the user has cleared the history
            self.restore({name: [] for name in self.means}, {}, {})
        means = _means(totals)
        if stage == "val":
            for key, mean in means.items():
                name = history_name("val", key)
                self.means.setdefault(name, []).append(mean)
                self.val_epochs.setdefault(name, []).append(self.count)
                self.val_parts.setdefault(name, []).append(part)
            return []
        count = self.count
        self.given.update(means)
        # In an epoch in which training gave nothing, each of its keys is NaN.
        only_val = {key for key in {*keys} - self.given if means and history_name("val", key) in self.means}
        written = [key for key in dict.fromkeys((*keys, *means)) if key not in only_val]
        self.resize(written, count)
        for key in written:
            self.means[key].append(means.get(key, math.nan))
        for key in only_val:  # NaN was written for it before the first validation
            self.means.pop(key, None)
        self._written = count + 1
        return [key for key in written if key not in means]

    def resize(self, keys: Iterable[str], count: int) -> None:
        """Give the lists of training keys this length, with NaN for epochs of which nothing is known."""
        for key in keys:
            if key not in self.means:
                # Training is listed before validation.
                validation = {name: self.means.pop(name) for name in self.val_epochs if name in self.means}
                self.means.update({key: self._empty.pop(key, [])}, **validation)
            del self.means[key][count:]
            self.means[key] += [math.nan] * (count - len(self.means[key]))
        self._written = count

    def restore(
        self, means: Mapping[str, list[float]], val_epochs: dict[str, list[int]], val_parts: dict[str, list[float]]
    ) -> None:
        """Take over a history. A user may hold the lists: their contents change, not the objects."""
        held = {name: values for name, values in (self._empty | self.means).items() if isinstance(values, list)}
        for values in held.values():
            values.clear()
        self.means.clear()
        for name, values in means.items():
            self.means[name] = held.pop(name, [])
            self.means[name] += values
        self._empty.update(held)
        self.val_epochs, self.val_parts = val_epochs, val_parts
        training = {name: values for name, values in means.items() if name not in val_epochs}
        self.given = {name for name, values in training.items() if not all(map(math.isnan, values))}
        self._written = len(means["loss"]) if "loss" in self.given else max(map(len, training.values()), default=0)

    def records(self) -> list[dict[str, float]]:
        """One row a training epoch, with the last validation of each."""
        rows: list[dict[str, float]] = [{"epoch": epoch} for epoch in range(self.count)]
        for name, means in self.means.items():
            epochs = self.val_epochs.get(name, range(len(rows)))
            for epoch, mean in zip(epochs, means if isinstance(means, list) else ()):  # a user may put anything there
                if epoch < len(rows):
                    rows[epoch][name] = mean
        return rows

    def validated_at(self) -> dict[str, list[float]]:
        """For each validation name, how many epochs had been trained when each of its values was measured.

        Validations of an epoch of unknown length are taken to lie evenly in it.
        """
        result: dict[str, list[float]] = {}
        for name, epochs in self.val_epochs.items():
            places = list(zip(epochs, self.val_parts[name]))
            runs = Counter(epoch for epoch, part in places if part != 0)
            before = Counter[int]()
            result[name] = []
            for epoch, part in places:
                before[epoch] += part != 0
                result[name].append(epoch + (before[epoch] / runs[epoch] if math.isnan(part) else part))
        return result


def _means(totals: Totals) -> dict[str, float]:
    """The mean of each key, first that of all dataloaders and then those of each."""
    pooled = added({key.partition(LOADER)[0]: pair} for key, pair in totals.items())
    of_loaders = {key: pair for key, pair in totals.items() if key not in pooled}
    return {key: total / weight for key, (total, weight) in {**pooled, **of_loaders}.items() if weight}
