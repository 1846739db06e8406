"""`EpochLossMixin`: what a user inherits, reads and overrides."""

from __future__ import annotations

import difflib
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from epoch_mixin import _stages
from epoch_mixin._outputs import batch_size
from epoch_mixin._recorder import Recorder
from epoch_mixin._warn import warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LISTS = ("epoch_losses", "epoch_history")
_SETTINGS = ("epoch_loss_keys", "epoch_loss_weight")


class EpochLossMixin:
    """Records the mean loss of every epoch of a ``LightningModule``.

    .. code-block:: python

        class LitModel(EpochLossMixin, pl.LightningModule): ...

        trainer.fit(model)
        model.epoch_losses  # [1.913, 0.842, 0.511]

    Every loss that ``training_step`` or ``validation_step`` returns is recorded; where a step returns none, the one
    that it gives to ``self.log`` as ``"train_loss"`` or ``"val_loss"``. Nothing else about the module changes. The mean
    of an epoch is ``sum(weight x loss) / sum(weight)`` over its steps on all ranks, in float64.

    Attributes:
        epoch_loss_keys: which losses to record, a tuple of strings. A bare tensor or number is ``"loss"``.
    """

    epoch_loss_keys: tuple[str, ...] = ("loss",)
    _epoch_losses_woven = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check(cls)
        cls._epoch_losses_woven = True
        # TorchScript would compile the properties.
        cls.__jit_unused_properties__ = [*getattr(cls, "__jit_unused_properties__", []), *_LISTS]  # type: ignore[attr-defined]
        _stages.weave_into(cls)

    # Made when first needed, so that the mixin has no ``__init__`` that a user could forget to call.
    @cached_property
    def _epoch_recorder(self) -> Recorder:
        cls = type(self)
        if "_epoch_losses_woven" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} was made without EpochLossMixin taking part: one of its bases has an"
                " `__init_subclass__` that does not call `super().__init_subclass__()`"
            )
        if not _is_lightning(cls):
            raise TypeError(f"{cls.__name__} is no LightningModule, and only on such a class EpochLossMixin can work")
        return Recorder(cls.__name__)

    @property
    def epoch_losses(self) -> list[float]:
        """Mean training loss of every ended epoch, in the loss's own unit; the index is the epoch.

        The list at ``epoch_history["loss"]``, the same object. A second ``fit`` goes on appending;
        ``epoch_history.clear()`` starts afresh. NaN where no step of an epoch gave a loss. Empty where ``"loss"`` is
        not among ``epoch_loss_keys``.
        """
        if "loss" in self.epoch_loss_keys:
            return self.epoch_history.setdefault("loss", [])
        return self.epoch_history.get("loss", [])

    @epoch_losses.setter
    def epoch_losses(self, _: Any) -> None:
        raise AttributeError(_kept("epoch_losses"))

    @property
    def epoch_history(self) -> dict[str, list[float]]:
        """The means of all ended epochs by name, as Keras names them: ``"loss"``, ``"val_loss"``.

        Training keys have one value an epoch, validation keys one for each validation run inside ``fit``. With several
        validation dataloaders there is also one for each, ``"val_loss/dataloader_idx_0"``.
        """
        return self._epoch_recorder.history.means

    @epoch_history.setter
    def epoch_history(self, _: Any) -> None:
        raise AttributeError(_kept("epoch_history"))

    def epoch_records(self) -> list[dict[str, float]]:
        """The history as one row a training epoch, for ``pd.DataFrame``, ``csv.DictWriter`` or ``json``.

        Returns:
            Rows such as ``{"epoch": 0, "loss": 1.9, "val_loss": 1.1}``. A validation key is only where that epoch has a
            run, with the value of its last.
        """
        return self._epoch_recorder.history.records(self.epoch_loss_keys)

    def running_epoch_loss(self, key: str = "loss") -> Tensor:
        """The mean so far of the open training epoch on this rank.

        Returns:
            A float64 tensor without dimensions, detached, on the device of the losses; reading it does not wait for the
            device. NaN before the epoch's first step, and again once the epoch has ended.

        Raises:
            ValueError: ``key`` is not one of ``epoch_loss_keys``.
        """
        if key not in self.epoch_loss_keys:
            raise ValueError(f"{key!r} is not among {type(self).__name__}.epoch_loss_keys = {self.epoch_loss_keys!r}")
        return _stages.running_epoch(cast("_stages.Module", self)).mean(key)

    def epoch_loss_weight(self, batch: Any) -> float | Tensor:
        """How much a step with this batch counts in its epoch's mean; override to weigh by tokens, nodes, pixels.

        Args:
            batch: what the step is about to be given. For a step that takes a ``dataloader_iter``, the batch it fetched
                last.

        Returns:
            A number that is finite and not negative; or such a tensor with one element, which is never read while the
            epoch runs. By default the ``batch_size`` that the step itself gives to ``self.log``; else the one that
            ``self.log`` would infer from the batch, 1 (and a warning) if there is none.
        """
        size = batch_size(batch)
        if size is None:
            self._epoch_recorder.history.warn_once(
                "epoch_loss_weight",
                f": found no tensor in a {type(batch).__name__} that tells the batch size, so its step counts 1 in the"
                " epoch's mean; override `epoch_loss_weight`, or say `self.log(..., batch_size=...)` in the step",
            )
            return 1
        return size

    epoch_loss_weight.is_default = True  # type: ignore[attr-defined]

    def plot_epoch_losses(self, ax: Axes | None = None, *, label: str | None = None) -> tuple[Figure, Axes]:
        """Draw the history: training at its epochs, validation at the epochs it belongs to.

        Args:
            ax: where to draw; by default a new figure. Only this axes is touched, and nothing is shown.
            label: names the run in the legend, where several share the axes.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from epoch_mixin._plot import plot

        return plot(self.epoch_history, self._epoch_recorder.history.val_epochs, ax, label)


def _check(cls: type[EpochLossMixin]) -> None:
    """Refuse what a user has configured wrongly in a class."""
    name = cls.__name__
    if any(base.__module__.startswith("torch.nn.") for base in cls.__mro__) and not _is_lightning(cls):
        raise TypeError(f"{name} is no LightningModule: write `class {name}(EpochLossMixin, pl.LightningModule)`")
    for hidden in _LISTS:
        if getattr(cls, hidden) is not getattr(EpochLossMixin, hidden):
            raise TypeError(f"{name}.{hidden} hides what EpochLossMixin keeps there; remove this line")
    for setting in _SETTINGS:
        first, *behind = (base for base in cls.__mro__ if setting in vars(base))
        for base in behind if first is EpochLossMixin else ():
            if _sets(base, setting):
                raise TypeError(f"EpochLossMixin hides {base.__name__}.{setting}, which is behind it; set it in {name}")
    _stages.check_keys(cls.epoch_loss_keys, name)
    if not callable(cls.epoch_loss_weight):
        raise TypeError(f"{name}.epoch_loss_weight must be a method that takes a batch, not {cls.epoch_loss_weight!r}")
    for own in vars(cls):
        meant = difflib.get_close_matches(own, _SETTINGS, n=1, cutoff=0.85)
        if meant and own not in meant:
            warn(f"{name}.{own} means nothing to EpochLossMixin; did you mean {meant[0]}?")


def _sets(base: type, setting: str) -> bool:
    """Whether a base gives a setting another value than the default, and not only declares it."""
    value = vars(base)[setting]
    declared = getattr(base, "_is_protocol", False) or getattr(value, "__isabstractmethod__", False)
    return not declared and value != getattr(EpochLossMixin, setting)


def _is_lightning(cls: type) -> bool:
    # By name, for either flavour, and without importing one.
    return any(base.__name__ == "LightningModule" for base in cls.__mro__)


def _kept(name: str) -> str:
    return f"remove this line: `{name}` is kept by EpochLossMixin; `epoch_history.clear()` starts all curves afresh"
