"""`EpochLossMixin`: what a user inherits, reads and overrides. The one file that knows Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from epoch_mixin._hooks import is_woven, weave
from epoch_mixin._outputs import batch_size, checked_weight, losses_in, why_missing
from epoch_mixin._recorder import OpenEpoch, Recorder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where a checkpoint keeps the record.
_RECORD = "epoch_mixin"
# What Lightning calls the stages while `fit` runs (`RunningStage` of `trainer/states.py`).
_RUNNING_STAGE = {"train": "train", "val": "validate"}
# What tells an epoch of a stage from the next, before a resume and after.
_MARK = {"train": "current_epoch", "val": "global_step"}


class EpochLossMixin:
    """Records the mean loss of every epoch of a ``LightningModule``.

    .. code-block:: python

        class LitModel(EpochLossMixin, pl.LightningModule): ...

        trainer.fit(model)
        model.epoch_losses  # [1.913, 0.842, 0.511]

    Every loss that ``training_step`` or ``validation_step`` returns is recorded, and nothing else about the module
    changes. The mean of an epoch is ``sum(weight x loss) / sum(weight)`` over its steps on all ranks, in float64.

    Attributes:
        epoch_loss_keys: which losses of a dict output to record, a tuple of strings. A bare tensor is ``"loss"``.
    """

    epoch_loss_keys: tuple[str, ...] = ("loss",)
    _epoch_losses_woven_into: type | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._epoch_losses_woven_into = cls
        for name in ("epoch_losses", "epoch_history"):
            if getattr(cls, name) is not getattr(EpochLossMixin, name):
                raise TypeError(f"{cls.__name__}.{name} hides what EpochLossMixin keeps there; give it another name")
        _check_keys(cls.epoch_loss_keys, cls.__name__)
        # TorchScript would compile the properties.
        unused = getattr(cls, "__jit_unused_properties__", [])
        cls.__jit_unused_properties__ = [*unused, "epoch_losses", "epoch_history"]  # type: ignore[attr-defined]
        weave(cls, "training_step", after=partial(_record, "train"), step=True)
        weave(cls, "validation_step", after=partial(_record, "val"), step=True)
        weave(cls, "test_step", step=True)
        weave(cls, "predict_step", step=True)
        weave(cls, "setup", before=_set_up)
        weave(cls, "on_train_start", before=partial(_begin, "train"))
        weave(cls, "on_train_epoch_start", before=partial(_begin, "train"))
        weave(cls, "on_train_epoch_end", before=partial(_end, "train"))
        weave(cls, "on_validation_epoch_start", before=partial(_begin, "val"))
        weave(cls, "on_validation_epoch_end", before=partial(_end, "val"))
        weave(cls, "on_fit_end", before=partial(_close_brought, "train"))
        weave(cls, "on_save_checkpoint", before=_save)
        weave(cls, "on_load_checkpoint", before=_load)
        weave(cls, "teardown", after=_send_home)
        weave(cls, "load_state_dict", before=_come_home)

    # Made when first needed, so that the mixin has no ``__init__`` that a user could forget to call.
    @cached_property
    def _epoch_recorder(self) -> Recorder:
        if self._epoch_losses_woven_into is not type(self):
            raise TypeError(
                f"{type(self).__name__} was made without EpochLossMixin taking part: one of its bases has an"
                " `__init_subclass__` that does not call `super().__init_subclass__()`"
            )
        return Recorder(type(self).__name__)

    @property
    def epoch_losses(self) -> list[float]:
        """Mean training loss of every ended epoch, in the loss's own unit; the index is the epoch.

        The list at ``epoch_history["loss"]``, the same object. A second ``fit`` goes on appending;
        ``epoch_losses.clear()`` starts afresh. NaN where no step of an epoch gave a loss.
        """
        return self.epoch_history.setdefault("loss", [])

    @epoch_losses.setter
    def epoch_losses(self, _: Any) -> None:
        raise AttributeError("`epoch_losses` is kept by EpochLossMixin; `epoch_losses.clear()` starts it afresh")

    @property
    def epoch_history(self) -> dict[str, list[float]]:
        """The means of all ended epochs by key, named as Keras does: ``"loss"``, ``"val_loss"``.

        Training keys have one value an epoch, validation keys one for each validation run inside ``fit``.
        """
        return self._epoch_recorder.history

    @epoch_history.setter
    def epoch_history(self, _: Any) -> None:
        raise AttributeError("`epoch_history` is kept by EpochLossMixin; `epoch_history.clear()` starts it afresh")

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
        epoch = self._epoch_recorder.open.get("train", OpenEpoch())
        return epoch.mean(key)

    def epoch_loss_weight(self, batch: Any) -> float | Tensor:
        """How much a step with this batch counts in its epoch's mean; override to weigh by tokens, nodes, pixels.

        Args:
            batch: what the step was given. For a step that takes a ``dataloader_iter``, the batch it fetched last.

        Returns:
            A number that is finite and not negative; or such a tensor with one element, which is never read while the
            epoch runs. The default is the batch size that ``self.log`` would infer, 1 (and a warning) if there is none.
        """
        try:
            size = batch_size(batch)
        except Exception:  # whatever a batch of unknown making may raise when it is looked through
            size = None
        if size is None:
            self._epoch_recorder.warn_once(
                "epoch_loss_weight",
                f": found no tensor in a {type(batch).__name__} that tells the batch size, so its step counts 1 in the"
                " epoch's mean; override `epoch_loss_weight` to say how much it counts",
            )
            return 1
        return size

    def plot_epoch_losses(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the history: training at its epochs, validation at the epochs it belongs to.

        Args:
            ax: where to draw; by default a new figure. Only this axes is touched, and nothing is shown.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from epoch_mixin._plot import plot

        return plot(self.epoch_history, self._epoch_recorder.val_epochs, ax)


def _check_keys(keys: Any, owner: str) -> None:
    if not (isinstance(keys, tuple) and keys and all(isinstance(key, str) for key in keys)):
        raise TypeError(f'{owner}.epoch_loss_keys must be a tuple of strings such as ("loss",), not {keys!r}')
    names = [*keys, *("val_" + key for key in keys)]
    if len(set(names)) < len(names):
        raise ValueError(f"{owner}.epoch_loss_keys has keys that share a name in the history: {keys!r}")


def _trainer_state(module: Any) -> Any:
    """The state of the Trainer that is at work on the module, if there is one."""
    trainer = module.__dict__.get("_trainer")
    state = None if trainer is None else getattr(trainer, "state", None)
    # There is no stage while a Trainer rests, nor a true one where a test has put a mock in its place.
    return state if isinstance(getattr(state, "stage", None), str) else None


def _is_fitting(module: Any) -> bool:
    state = _trainer_state(module)
    return state is not None and bool(state.fn == "fit")


def _writes(module: Any, stage: str) -> bool:
    """Whether the stage is under way: as Lightning says, or, without a Trainer at work, as the caller does."""
    state = _trainer_state(module)
    # `_value_` is there at once; comparing the enums themselves takes longer than all the rest.
    return state is None or bool(state.stage._value_ == _RUNNING_STAGE[stage] and state.fn._value_ == "fit")


def _record(stage: str, module: Any, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not _writes(module, stage):
        return
    recorder = module._epoch_recorder
    epoch = recorder.open.get(stage) or _open(stage, module)
    if stage == "val" and isinstance(output, Tensor) and output.ndim:
        return  # with one element it is rather the prediction for a batch of one than a loss
    keys = module.epoch_loss_keys
    losses = losses_in(output, keys)
    if losses:
        batch = args[0] if args else kwargs.get(_first_parameter(module, stage))
        if isinstance(batch, Iterator):
            # Lightning's iterator over a dataloader remembers what it gave (`loops/fetchers.py`).
            batch = getattr(getattr(batch, "data_fetcher", None), "_batch", batch)
        weight = module.epoch_loss_weight(batch)
        if type(weight) is not int or weight < 0:
            weight = checked_weight(weight, recorder.owner)
        epoch.add(losses, weight)
    if len(losses) < len(keys) and stage == "train":  # what validation returns need not be a loss
        _warn_of_missing(module, output, losses)


def _first_parameter(module: Any, stage: str) -> str:
    step = module.training_step if stage == "train" else module.validation_step
    return next(iter(inspect.signature(step).parameters), "")


def _warn_of_missing(module: Any, output: Any, losses: Mapping[str, Tensor]) -> None:
    for key in module.epoch_loss_keys:
        reason = None if key in losses else why_missing(output, key)
        if reason is not None:
            module._epoch_recorder.warn_once(key, f".training_step: no {key!r} is recorded where it {reason}")


def _open(stage: str, module: Any, mark: int | None = None) -> OpenEpoch:
    _check_keys(module.epoch_loss_keys, type(module).__name__)
    return cast(OpenEpoch, module._epoch_recorder.begin(stage, module.epoch_loss_keys, mark))


def _begin(stage: str, module: Any, *args: Any) -> None:
    """Open an epoch, unless a checkpoint has brought this very one to go on with.

    When Lightning goes on from the last batch of an epoch, it skips the hooks that end the epoch, and the one that
    starts the next (`_FitLoop.reset` and `on_advance_start`). A mark that has moved on tells so.
    """
    if not _writes(module, stage):
        return
    mark = None if _trainer_state(module) is None else getattr(module.trainer, _MARK[stage])
    epoch = module._epoch_recorder.open.get(stage)
    if epoch is not None and epoch.mark is not None and mark is not None:
        if epoch.mark == mark:
            return
        _close(stage, module)
    _open(stage, module, mark)


def _end(stage: str, module: Any, *args: Any) -> None:
    if not _writes(module, stage):
        return
    recorder = module._epoch_recorder
    if stage == "val" and _may_pass_validation_by(module):
        recorder.ended.append(recorder.open.pop("val", OpenEpoch()))
    else:
        _close(stage, module)


def _close(stage: str, module: Any) -> None:
    if stage == "train":
        _close_ended(module)
        _close_brought("val", module)
    module._epoch_recorder.close(stage, module.epoch_loss_keys, partial(_sum_over_ranks, module))


def _may_pass_validation_by(module: Any) -> bool:
    """Whether a rank with nothing to validate on may skip validation, hooks and all, so that no other must wait for it.

    Otherwise Lightning refuses a rank with an empty dataloader (`has_len_all_ranks` of `utilities/data.py`).
    """
    if _world_size(module) == 1:
        return False
    trainer = module.__dict__.get("_trainer")
    hooks = [module, getattr(trainer, "datamodule", None)]
    return any(getattr(hook, "allow_zero_length_dataloader_with_multiple_devices", False) for hook in hooks)


def _close_ended(module: Any) -> None:
    """Close the validation runs that could not be closed at once, where all ranks come together."""
    if _may_pass_validation_by(module):
        recorder = module._epoch_recorder
        ended, recorder.ended = recorder.ended, []
        runs = int(_gather(module, torch.tensor([len(ended)])).max())
        for epoch in ended + [OpenEpoch()] * (runs - len(ended)):
            recorder.open["val"] = epoch
            _close("val", module)


def _close_brought(stage: str, module: Any) -> None:
    """Close what a checkpoint brought and what Lightning found nothing left to do for, so that it ran no end hook."""
    epoch = module._epoch_recorder.open.get(stage)
    if epoch is not None and epoch.brought:
        _close(stage, module)


def _set_up(module: Any, *args: Any, **kwargs: Any) -> None:
    """Drop what an interrupted `fit` left open. A checkpoint to go on from is loaded after this."""
    if not _is_fitting(module):
        return
    module._epoch_recorder.open.clear()
    module._epoch_recorder.ended.clear()
    for name in ("training_step", "validation_step", "on_train_epoch_end", "on_validation_epoch_end"):
        if not is_woven(getattr(module, name)):
            module._epoch_recorder.warn_once(
                name,
                f".{name} was replaced after the class was made, so EpochLossMixin cannot see it and losses will be"
                " missing; define it in the class",
            )


def _world_size(module: Any) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    # A Trainer on one device does not take part in a group that others have set up around it.
    trainer = module.__dict__.get("_trainer")
    return torch.distributed.get_world_size() if trainer is None else int(trainer.world_size)


def _gather(module: Any, tensor: Tensor) -> Tensor:
    return torch.stack(gather_all_tensors(tensor.to(module.device)))


def _sum_over_ranks(module: Any, totals: Tensor) -> Tensor:
    return totals if _world_size(module) == 1 else _gather(module, totals).sum(dim=0)


def _save(module: Any, checkpoint: dict[str, Any], *args: Any) -> None:
    _close_ended(module)
    reduce = partial(_sum_over_ranks, module)
    checkpoint[_RECORD] = module._epoch_recorder.state(module.epoch_loss_keys, reduce)


def _load(module: Any, checkpoint: dict[str, Any], *args: Any) -> None:
    # A Trainer at work on something else than `fit` only borrows the weights.
    if _RECORD in checkpoint and (_trainer_state(module) is None or _is_fitting(module)):
        try:
            module._epoch_recorder.load(checkpoint[_RECORD])
        except ValueError as error:
            raise ValueError(f"{type(module).__name__}: checkpoint[{_RECORD!r}] is damaged: {error}") from None


def _send_home(module: Any, *args: Any) -> None:
    """Send the history home from a worker that Lightning has spawned or forked.

    All that leaves such a worker is the module's ``state_dict()``, taken once after this last hook, for the process
    that called ``fit`` to load (`strategies/launchers/multiprocessing.py`). The record travels in it.
    """
    if _is_fitting(module) and hasattr(module.trainer.strategy.launcher, "_start_method"):
        module.register_state_dict_post_hook(_enclose_record)


def _enclose_record(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    if not prefix:
        state_dict[_RECORD] = module._epoch_recorder.state(module.epoch_loss_keys, lambda totals: totals)


def _come_home(module: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
    if _RECORD in state_dict:
        module._epoch_recorder.load(state_dict[_RECORD])
