"""`EpochLossMixin`: what a user inherits, reads and overrides."""

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from epoch_mixin import _checkpoint, _loop, _recorder
from epoch_mixin._hooks import Recorded, around_hook, wrap_methods
from epoch_mixin._lightning import is_lightning_module
from epoch_mixin._recorder import Recorder
from epoch_mixin._settings import LISTS, check_class
from epoch_mixin._steps import around_step, note_log
from epoch_mixin._weights import batch_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _hook(before: Any = None, after: Any = None, group: str = "") -> Recorded:
    return Recorded(partial(around_hook, before=before, after=after, group=group))


def _before_setup(module: Any, *_: Any) -> None:
    wrap_methods(type(module), EpochLossMixin)  # a notebook or a test may have put a method into a class
    _recorder.remember_trainer(module)


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
    # Set in each class whose `__init_subclass__` ran.
    _is_wrapped: bool

    if not TYPE_CHECKING:  # to a type checker they are what LightningModule says
        training_step = Recorded(around_step)
        validation_step = Recorded(around_step)
        # Of the calls in a group, only the outermost counts: a `training_step` that `test_step` calls is not recorded.
        test_step = _hook(group="step")
        predict_step = _hook(group="step")
        log = _hook(before=note_log, group="log")
        log_dict = _hook(before=note_log, group="log")
        setup = _hook(before=_before_setup)
        # A fit that goes on in the middle of an epoch has no other start.
        on_train_start = _hook(before=_loop.begin)
        on_train_epoch_start = _hook(before=_loop.begin)
        on_train_epoch_end = _hook(before=_loop.end_training)
        on_validation_epoch_start = _hook(before=_loop.begin)
        # In the group of the steps, so that `note_log` finds it: what it logs may be recorded.
        on_validation_epoch_end = _hook(before=_loop.end_validation, after=_loop.add_logged_at_end, group="step")
        on_fit_end = _hook(before=_loop.end_resumed)
        on_save_checkpoint = _hook(before=_checkpoint.save)
        on_load_checkpoint = _hook(before=_checkpoint.load)
        teardown = _hook(after=_checkpoint.send_from_worker)
        load_state_dict = _hook(before=_checkpoint.restore_from_worker)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, EpochLossMixin)
        cls._is_wrapped = True
        # TorchScript would compile the properties.
        cls.__jit_unused_properties__ = [*getattr(cls, "__jit_unused_properties__", []), *LISTS]  # type: ignore[attr-defined]
        wrap_methods(cls, EpochLossMixin)

    # Made when first needed, so that the mixin has no ``__init__`` that a user could forget to call.
    @cached_property
    def _epoch_recorder(self) -> Recorder:
        cls = type(self)
        if "_is_wrapped" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} was made without EpochLossMixin taking part: one of its bases has an"
                " `__init_subclass__` that does not call `super().__init_subclass__()`"
            )
        if not is_lightning_module(cls):
            raise TypeError(f"{cls.__name__} is no LightningModule, and EpochLossMixin works on no other class")
        return Recorder(cls.__name__)

    @property
    def epoch_losses(self) -> list[float]:
        """Mean training loss of every ended epoch, in the loss's own unit; the index is the epoch.

        The list at ``epoch_history["loss"]``, the same object; where ``"loss"`` is not among ``epoch_loss_keys``, that
        of the first key. NaN where no step of an epoch gave a loss. A second ``fit`` goes on appending;
        ``epoch_history.clear()`` starts afresh.
        """
        return self._epoch_recorder.history.list_of(self._main_key())

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
            Rows such as ``{"epoch": 0, "loss": 1.9, "val_loss": 1.1}``. A row has a validation key only if that epoch
            was validated. It holds the last value.
        """
        return self._epoch_recorder.history.records()

    def running_epoch_loss(self, key: str | None = None) -> Tensor:
        """The mean so far of the open training epoch on this rank.

        Args:
            key: one of ``epoch_loss_keys``; by default ``"loss"`` if it is one, else the first.

        Returns:
            A float64 tensor without dimensions, detached, on the device of the losses; reading it does not wait for the
            device. NaN before the epoch's first step, and again once the epoch has ended.

        Raises:
            ValueError: ``key`` is not one of ``epoch_loss_keys``.
        """
        key = self._main_key() if key is None else key
        if key not in self.epoch_loss_keys:
            where = f"{type(self).__name__}.epoch_loss_keys = {self.epoch_loss_keys!r}"
            raise ValueError(f"{key!r} is not among {where}; write one of these")
        return _recorder.running_mean(self, key)

    def epoch_loss_weight(self, batch: Any) -> float | Tensor:
        """How much a step with this batch counts in its epoch's mean; override to weigh by tokens, nodes, pixels.

        An override comes before a ``batch_size`` that the step gives to ``self.log``.

        Args:
            batch: what the step is about to be given. For a step that takes a ``dataloader_iter``, the batch it fetched
                last.

        Returns:
            A number that is finite and not negative, or a tensor with one such number, which is not read while the
            epoch runs. By default the size of the batch: the length that all its tensors have; else what it says of
            itself, as ``num_graphs`` or ``batch_size``; else the length of its first tensor, as ``self.log`` would
            infer it; 1 if it has none.
        """
        return batch_size(batch).inferred

    epoch_loss_weight.is_default = True  # type: ignore[attr-defined]

    def plot_epoch_losses(self, ax: "Axes | None" = None, *, label: str | None = None) -> "tuple[Figure, Axes]":
        """Draw the history over the epochs trained: the first training mean at 1, a validation where it ran.

        Args:
            ax: where to draw; by default a new figure. Only this axes is touched, and nothing is shown.
            label: names the run in the legend, where several share the axes.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: ``ax`` is no axes.
        """
        from epoch_mixin._plot import plot

        return plot(self.epoch_history, self._epoch_recorder.history.validated_at(), ax, label)

    def _main_key(self) -> str:
        keys = self.epoch_loss_keys
        # The first that training gives, if validation alone gives some.
        return "loss" if "loss" in keys else next((key for key in keys if key in self.epoch_history), keys[0])


def _kept(name: str) -> str:
    return f"remove this line: `{name}` is kept by EpochLossMixin; `epoch_history.clear()` starts all curves afresh"
