"""The epochs of a run: those that are open, and those that have ended and are not yet written to the history.

An epoch *begins*, takes the losses of its steps, and *ends* on this rank as plain data, the sums of each key. This
module knows nothing of Lightning's loops.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor

from epoch_mixin._mean import ExactMean
from epoch_mixin._names import Partners, PartnersOfKeys

# sum(weight x loss) and sum(weight) of each key that had a loss.
Totals = dict[str, list[float]]
# Validation ends first, and belongs to the training epoch that is written after it.
STAGES = ("val", "train")
STEP = {"train": "training_step", "val": "validation_step"}
# Between a key and the number of the dataloader that its losses come from, as Lightning writes it.
LOADER = "/dataloader_idx_"


class Epoch(TypedDict):
    """The sums of an epoch, and its mark: see `Stage`."""

    mark: int | None
    totals: Totals


class RunState(TypedDict):
    """What a run has not written to the history, in plain types.

    Keys:
        open: the open epoch of each stage that has one.
        ended: for each stage, the epochs that have ended and are not written.
        keys: the keys of validation.
    """

    open: dict[str, Epoch]
    ended: dict[str, list[Totals]]
    keys: list[str]


class Stage:
    """Training or validation in a run: the open epoch, and the epochs that have ended and are not written.

    Args:
        run: the run.
        name: ``"train"`` or ``"val"``.

    Attributes:
        ended: the totals of the epochs that have ended and are not written.
        last: the epoch that ended last. Once it is written, its totals are over all ranks.
        is_open: whether an epoch is open.
        keys: the keys to record.
        mark: a number that tells an epoch of a fit from the next one; ``None`` without a Trainer.
        begun_at: the index of the latest batch in the fit when the epoch began, or was resumed.
        resumed_totals: the sums that the open epoch begins with, from a checkpoint, over all ranks.
        means: the mean of each key that had a loss on this rank.
        weight_is_default: whether ``epoch_loss_weight`` is not overridden, so that logged sizes count.
        size_is_length: whether the length of the first tensor of a batch is its size: the weight is the default, and
            all tensors of the first batch that gave a loss had the same length.
        fast_mean: the mean that a usual step adds its loss to without a call of ours. The first step of an epoch sets
            it, if it is a usual one.
    """

    def __init__(self, run: "Run", name: str) -> None:
        self.run, self.name = run, name
        self.ended: list[Totals] = []
        self.last: Epoch = {"mark": None, "totals": {}}
        # Kept from epoch to epoch, since making one takes longer than recording a step.
        self._accumulators: defaultdict[str, ExactMean] = defaultdict(ExactMean)
        self.is_open, self.weight_is_default = False, False
        self.keys: tuple[str, ...] = ()
        self.mark: int | None = None
        self.begun_at: Any = None
        self._reset()

    def begin(self, keys: tuple[str, ...], mark: int | None, weight_is_default: bool = True) -> None:
        """Open an epoch in place of one that may be open."""
        self._reset()
        self.is_open, self.keys, self.mark, self.weight_is_default = True, keys, mark, weight_is_default

    def end(self, is_first_rank: bool) -> None:
        """End the open epoch on this rank."""
        totals = self.totals(is_first_rank)
        # All at once: a signal handler that saves a checkpoint may run between any two lines.
        vars(self).update(is_open=False, ended=[*self.ended, totals], last={"mark": self.mark, "totals": totals})
        self._reset()

    def _reset(self) -> None:
        for mean in self._accumulators.values():
            mean.reset()
        self.means: dict[str, ExactMean] = {}
        self.fast_mean: ExactMean | None = None
        self.size_is_length = False
        self.resumed_totals: Totals = {}

    def naming(self) -> tuple[str, PartnersOfKeys]:
        """What decides, beside the keys, which key a name means: see `_names.matches`."""
        return self.name, self.run.partners.of_keys

    def add(self, key: str, loss: float | Tensor, weight: float | Tensor) -> None:
        """Add a loss: a float, or a detached tensor without dimensions that nobody changes any more."""
        self.means[key] = self._accumulators[key]
        # Not `self.means[key].update`: what torchmetrics wraps around it takes longer than all the rest.
        ExactMean.update(self.means[key], loss, weight)

    def mean(self, key: str) -> Tensor:
        """The mean so far on this rank, a 0-dim float64 tensor; NaN before the first loss."""
        own = self._accumulators[key]
        mean = ExactMean.compute(own)  # which adds its buffer to its sums
        if key not in self.resumed_totals:
            return mean
        total, weight = self.resumed_totals[key]
        return (own.mean_value + total) / (own.weight + weight)

    def totals(self, is_first_rank: bool) -> Totals:
        """The sums so far, with one read of the device.

        The sums of a checkpoint are over all ranks, so that the first rank alone adds them.
        """
        sums = [part for mean in self.means.values() for part in mean.sums()]
        numbers = iter(torch.stack([part.to(sums[0].device) for part in sums]).tolist() if sums else ())
        own = {key: [total, weight] for key, total, weight in zip(self.means, numbers, numbers)}
        return added([own, self.resumed_totals if is_first_rank else {}])


class Run:
    """One fit, or the loops without a Trainer.

    Args:
        trainer: the Trainer of the fit; ``None`` for the loops.

    Attributes:
        is_resuming: whether a checkpoint was loaded, and no training epoch has begun since.
        val, train: its two stages.
        partners: the names under which its training logs its losses.
    """

    def __init__(self, trainer: Any = None) -> None:
        self.trainer = trainer
        self.reset()

    def reset(self) -> None:
        """Forget all epochs that are not written."""
        self.is_resuming = False
        self.partners = Partners({})
        self.val, self.train = Stage(self, "val"), Stage(self, "train")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "trainer": None}

    def stage(self, name: str) -> Stage:
        """The stage that a step or hook of this name belongs to."""
        return self.train if "train" in name else self.val

    def state(self, is_first_rank: bool = True, with_open: bool = True) -> RunState:
        """What is not written, in plain types."""
        opened = [stage for stage in (self.val, self.train) if stage.is_open and with_open]
        return {
            "open": {stage.name: {"mark": stage.mark, "totals": stage.totals(is_first_rank)} for stage in opened},
            "ended": {"val": [*self.val.ended], "train": [*self.train.ended]},
            "keys": [*self.val.keys],
        }


def added(parts: Iterable[Totals], share: float = 1.0) -> Totals:
    """The sums of several parts, multiplied by ``share``."""
    sums: Totals = {}
    for key, (total, weight) in (item for part in parts for item in part.items()):
        before = sums.get(key, (0.0, 0.0))
        sums[key] = [before[0] + total * share, before[1] + weight * share]
    return sums


def history_name(stage: str, key: str) -> str:
    """The name in the history of a key in a stage."""
    return "val_" + key if stage == "val" else key


def given_keys(names: Iterable[str]) -> set[str]:
    """The keys of names, some of which have the number of a dataloader behind the key."""
    return {name.partition(LOADER)[0] for name in names}
