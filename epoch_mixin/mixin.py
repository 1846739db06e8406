"""`EpochLossMixin`: what a user inherits, reads and overrides."""

import difflib
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from epoch_mixin import _checkpoint, _epochs
from epoch_mixin._epochs import Recorder
from epoch_mixin._hooks import Recorded, around_hook, record
from epoch_mixin._losses import batch_sizes
from epoch_mixin._steps import around_step, note_log
from epoch_mixin._warn import warn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LISTS = ("epoch_losses", "epoch_history")
_SETTINGS = ("epoch_loss_keys", "epoch_loss_weight")


def _hook(before: Any = None, after: Any = None, group: str = "") -> Recorded:
    return Recorded(partial(around_hook, before=before, after=after, group=group))


def _set_up(module: Any, *_: Any) -> None:
    record(type(module), EpochLossMixin)  # a notebook or a test may have put a method into a class
    _epochs.set_up(module)


class EpochLossMixin:
    """Records the mean loss of every epoch of a ``LightningModule``.

    .. code-block:: python

        class LitModel(EpochLossMixin, pl.LightningModule): ...

        trainer.fit(model)
        model.epoch_losses  # [1.913, 0.842, 0.511]

    Every loss that ``training_step`` or ``validation_step`` returns or gives to ``self.log`` is recorded. Nothing else
    about the module changes. The mean of an epoch is ``sum(weight x loss) / sum(weight)`` over its steps on all ranks,
    in float64.

    Attributes:
        epoch_loss_keys: which losses to record, a tuple of strings. A bare tensor or number is ``"loss"``.
    """

    epoch_loss_keys: tuple[str, ...] = ("loss",)
    _is_recorded = False

    if not TYPE_CHECKING:  # to a type checker they are what LightningModule says
        training_step = Recorded(around_step)
        validation_step = Recorded(around_step)
        # A step that these call is not recorded.
        test_step = _hook(group="step")
        predict_step = _hook(group="step")
        log = _hook(before=note_log, group="log")
        log_dict = _hook(before=note_log, group="log")
        setup = _hook(before=_set_up)
        # A fit that goes on in the middle of an epoch has no other start.
        on_train_start = _hook(before=_epochs.begin)
        on_train_epoch_start = _hook(before=_epochs.begin)
        on_train_epoch_end = _hook(before=_epochs.end_training)
        on_validation_epoch_start = _hook(before=_epochs.begin)
        # What it logs may be recorded, as in a step.
        on_validation_epoch_end = _hook(_epochs.end_validation, after=_epochs.add_logged_at_end, group="step")
        on_fit_end = _hook(before=_epochs.end_resumed)
        on_save_checkpoint = _hook(before=_checkpoint.save)
        on_load_checkpoint = _hook(before=_checkpoint.load)
        teardown = _hook(after=_checkpoint.send_from_worker)
        load_state_dict = _hook(before=_checkpoint.receive_from_worker)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check(cls)
        cls._is_recorded = True
        # TorchScript would compile the properties.
        cls.__jit_unused_properties__ = [*getattr(cls, "__jit_unused_properties__", []), *_LISTS]  # type: ignore[attr-defined]
        record(cls, EpochLossMixin)

    # Made when first needed, so that the mixin has no ``__init__`` that a user could forget to call.
    @cached_property
    def _epoch_recorder(self) -> Recorder:
        cls = type(self)
        if "_is_recorded" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} was made without EpochLossMixin taking part: one of its bases has an"
                " `__init_subclass__` that does not call `super().__init_subclass__()`"
            )
        if not _is_lightning(cls):
            raise TypeError(f"{cls.__name__} is no LightningModule, and EpochLossMixin works on no other class")
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
        return self._epoch_recorder.history.records()

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
        return _epochs.running_mean(self, key)

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
        return next(iter(batch_sizes(batch, 1)), 1)

    epoch_loss_weight.is_default = True  # type: ignore[attr-defined]

    def plot_epoch_losses(self, ax: "Axes | None" = None, *, label: str | None = None) -> "tuple[Figure, Axes]":
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
            value = vars(base)[setting]
            is_declared = getattr(base, "_is_protocol", False) or getattr(value, "__isabstractmethod__", False)
            if not is_declared and value != getattr(EpochLossMixin, setting):
                raise TypeError(f"EpochLossMixin hides {base.__name__}.{setting}, which is behind it; set it in {name}")
    _epochs.check_keys(cls.epoch_loss_keys, name)
    if not callable(cls.epoch_loss_weight):
        raise TypeError(f"{name}.epoch_loss_weight must be a method that takes a batch, not {cls.epoch_loss_weight!r}")
    for own in vars(cls):
        meant = difflib.get_close_matches(own, _SETTINGS, n=1, cutoff=0.85)
        if meant and own not in meant:
            warn(f"{name}.{own} means nothing to EpochLossMixin; did you mean {meant[0]}?")


def _is_lightning(cls: type) -> bool:
    # By name, for either flavour, and without importing one.
    return any(base.__name__ == "LightningModule" for base in cls.__mro__)


def _kept(name: str) -> str:
    return f"remove this line: `{name}` is kept by EpochLossMixin; `epoch_history.clear()` starts all curves afresh"
