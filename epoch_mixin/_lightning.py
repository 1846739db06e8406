"""What is asked of Lightning by names that are not public. Where one is gone, there is a default.

All are read here, but for `TRAINER` and `CURRENT_HOOK`, which a step reads itself, since a call would take longer than
all the rest. Nothing is imported from Lightning: the objects may be those of ``pytorch_lightning`` or of
``lightning.pytorch``.
"""

import math
from contextlib import suppress
from typing import Any

# Where a module keeps the Trainer that is attached to it, and the name of the hook or step that it is calling.
TRAINER, CURRENT_HOOK = "_trainer", "_current_fx_name"


def is_lightning_module(cls: type) -> bool:
    """Whether a class is a LightningModule: by name, for either flavour, and without importing one."""
    return any(base.__name__ == "LightningModule" for base in cls.__mro__)


def attached_trainer(module: Any) -> Any:
    """The Trainer that is attached to a module, or what a test has put in its place."""
    with suppress(RuntimeError):  # from the public property, where there is none
        return vars(module)[TRAINER] if TRAINER in vars(module) else module.trainer  # noqa: SIM401
    return None


def current_hook(module: Any, default: str | None = None) -> Any:
    """The hook or step of a module that its Trainer is calling."""
    return vars(module).get(CURRENT_HOOK, default)


def is_running(trainer: Any, function: str | None = None) -> bool:
    """Whether a Trainer is at work, in ``fit`` where that is asked for. A mock never is."""
    state: Any = getattr(trainer, "state", None)
    # The ``==`` of Lightning's enums takes longer than recording a step.
    at_work = isinstance(getattr(state, "status", None), str) and str.__eq__(state.status, "running")
    return at_work and (function is None or str.__eq__(state.fn, function))


def is_in_stage(trainer: Any, stage: str) -> bool:
    """Whether a Trainer trains, or validates outside of the sanity check."""
    return str.__eq__(trainer.state.stage or "", "train" if stage == "train" else "validate")


def batch_index(trainer: Any) -> Any:
    """The index of the latest batch in the whole fit. Unlike the global step it counts batches that are accumulated."""
    return getattr(trainer.fit_loop, "total_batch_idx", trainer.global_step)


def trained_part(trainer: Any, batches_since: int) -> float:
    """Which part of its training epoch a Trainer had trained a number of batches ago, from 0 to 1.

    NaN if that is not known, as for an iterable dataset without a length.
    """
    with suppress(AttributeError):
        batches = trainer.fit_loop.epoch_loop.batch_progress
        done = batches.current.ready - batches_since
        if batches.is_last_batch and batches_since == 0:
            return 1.0
        if math.isfinite(trainer.num_training_batches) and 0 <= done <= trainer.num_training_batches:
            return done / trainer.num_training_batches  # type: ignore[no-any-return]
    return math.nan


def has_batches(trainer: Any) -> bool:
    """Whether the current training epoch has had batches, be it before a resume."""
    progress = getattr(trainer.fit_loop.epoch_loop, "batch_progress", None)
    return progress is not None and progress.current.ready > 0


def validates_by_clock(trainer: Any) -> bool:
    """Whether ``val_check_interval`` is a time."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def is_in_worker(trainer: Any) -> bool:
    """Whether Lightning has spawned or forked this process."""
    return hasattr(getattr(trainer.strategy, "launcher", None), "_start_method")


def fetched_batch(iterator: Any, loader: Any) -> tuple[Any, Any]:
    """The batch that a ``dataloader_iter`` gave last, and the number of its dataloader if there are several."""
    fetcher = getattr(iterator, "data_fetcher", None)  # `loops/fetchers.py`
    loaders: Any = getattr(fetcher, "combined_loader", None)
    if getattr(loaders, "_mode", None) == "sequential" and len(loaders.flattened) > 1:
        loader = getattr(fetcher, "_dataloader_idx", None)
    return getattr(fetcher, "_batch", iterator), loader
