"""The stages as Lightning runs them. The one file that knows Lightning's loops, ranks, checkpoints and launchers.

The life of an epoch: it *begins* with Lightning's start hook, unless a checkpoint has brought this very one to go on
with. Each step that Lightning calls *adds* the losses that it returned or logged. It *ends* on this rank with the end
hook, ahead of the user's own; where Lightning skips that hook, after some resumes, the next beginning ends it. It is
*settled*, written into the history, where all ranks meet: at the end of a training epoch, and of a validation if no
rank can be elsewhere. A *save* takes along what is not settled, summed over the ranks, and a *resume* goes on there.
Without a Trainer at work the hooks that the user calls do the same, in a run of their own.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from epoch_mixin._hooks import is_woven, weave
from epoch_mixin._outputs import batch_size, batch_sizes, checked_weight, described, losses_in
from epoch_mixin._record import restore, saved
from epoch_mixin._recorder import LOADER, OpenEpoch, Run, together

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from epoch_mixin.mixin import EpochLossMixin

    class Module(EpochLossMixin, LightningModule):
        """What the mixin is woven into. Has no `nn.Module.__getattr__`, to which any misspelt attribute is right."""

        __getattr__: None  # type: ignore[assignment, misc]


# Where a checkpoint keeps the record.
_RECORD = "epoch_mixin"


@dataclass(frozen=True, eq=False)
class Stage:
    """A part of a fit whose steps are recorded.

    Args:
        name: its name in the record.
        running: what Lightning calls it while it runs (`RunningStage` of ``trainer/states.py``).
        step: its step.
        titles: what people write before a loss that they log.
        mark: tells its epochs apart, before a resume and after.
    """

    name: str
    running: str
    step: str
    titles: tuple[str, ...]
    mark: Callable[[Trainer], int]

    def __reduce__(self) -> str:
        return self.name.upper()  # there is one of each, also for a class that was sent to another process


def _batches(trainer: Trainer) -> int:
    """How many a fit has had. Under gradient accumulation several validations may share one global step."""
    return trainer.fit_loop.total_batch_idx


TRAIN = Stage("train", "train", "training_step", ("train", "training"), lambda it: it.current_epoch)
VAL = Stage("val", "validate", "validation_step", ("val", "valid", "validation"), _batches)


def check_keys(keys: Any, owner: str) -> None:
    """Raise if ``owner.epoch_loss_keys`` are none."""
    if not (isinstance(keys, tuple) and keys and all(isinstance(key, str) for key in keys)):
        raise TypeError(f'{owner}.epoch_loss_keys must be a tuple of strings such as ("loss",), not {keys!r}')
    if len({*keys, *("val_" + key for key in keys)}) < 2 * len(keys):
        raise ValueError(f"{owner}.epoch_loss_keys has keys that share a name in the history: {keys!r}")


def running_epoch(module: Module) -> OpenEpoch:
    """The open training epoch of who is at work; at rest that of a loop by hand, or one that was interrupted."""
    recorder = module._epoch_recorder
    runs = (recorder.fit,) if _trainer(module) else (recorder.by_hand, recorder.fit)
    return next((run.open["train"] for run in runs if "train" in run.open), OpenEpoch())


def _trainer(module: Module) -> Trainer | None:
    """The Trainer that is at work on the module, if there is one."""
    trainer = module.__dict__.get("_trainer")
    if trainer is None:
        return None
    state: Any = getattr(trainer, "state", None)
    # A test may have put a mock in its place. `_value_` is there at once; comparing enums takes longer than the rest.
    at_work = isinstance(getattr(state, "stage", None), str) and state.status._value_ == "running"
    return trainer if at_work else None


def _fitting(module: Module) -> Trainer | None:
    trainer = _trainer(module)
    return trainer if trainer is not None and trainer.state.fn == "fit" else None


def _in_run(part: Callable[..., Any], stage: Stage, called: str, module: Module, args: Any, kwargs: Any) -> Any:
    """Run a part of ours, with the run that a call of a method belongs to; ``None`` if it is not to be recorded.

    Where a Trainer is at work, only what it calls itself is, in this stage of a fit.
    """
    trainer = _trainer(module)
    if trainer is None:
        return part(stage, module, module._epoch_recorder.by_hand, args, kwargs)
    state: Any = trainer.state
    if state.stage._value_ == stage.running and state.fn._value_ == "fit" and module._current_fx_name == called:
        return part(stage, module, module._epoch_recorder.fit, args, kwargs)
    return None


def _ask(stage: Stage, module: Module, run: Run, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Ahead of a step, ask what its batch counts, for the step may change it."""
    batch = args[0] if args else kwargs.get(next(iter(inspect.signature(getattr(module, stage.step)).parameters), ""))
    loader = args[2] if len(args) > 2 else kwargs.get("dataloader_idx")
    return run, batch, loader, *_weigh(stage, module, run, batch, ahead=True)


def _weigh(stage: Stage, module: Module, run: Run, batch: Any, ahead: bool = False) -> tuple[Any, bool]:
    """What a batch counts, if it tells, and whether the user's own ``epoch_loss_weight`` says so."""
    weigh = module.epoch_loss_weight
    own = getattr(weigh, "is_default", None) is not True
    if own or stage.name not in run.sizes:
        if ahead and hasattr(type(batch), "__next__"):  # an iterator must be left alone
            return None, False
        if own:
            return checked_weight(weigh(batch), type(module).__name__), True
        run.sizes[stage.name] = batch_sizes(batch)
    return batch_size(batch), False


def _add(stage: Stage, module: Module, asked: tuple[Any, ...] | None, output: Any, notes: list[Any]) -> None:
    """Behind a step, record the losses that it returned and logged."""
    if asked is None:
        return
    run, batch, loader, weight, own = asked
    epoch = run.open.get(stage.name) or _open(stage, module, run)
    if weight is None and hasattr(type(batch), "__next__"):
        # Lightning's iterator over dataloaders remembers what it gave (`loops/fetchers.py`).
        fetcher = getattr(batch, "data_fetcher", None)
        batch, combined = getattr(fetcher, "_batch", batch), cast(Any, getattr(fetcher, "combined_loader", None))
        if getattr(combined, "_mode", None) == "sequential" and len(combined.flattened) > 1:
            loader = cast(Any, fetcher)._dataloader_idx
        weight, own = _weigh(stage, module, run, batch)
    logged = {name: value for name, value, _ in notes} if notes else {}
    source = f"{LOADER}{loader}" if stage is VAL and isinstance(loader, int) else ""
    # One element with dimensions is rather the prediction for a batch of one.
    dims = not (stage is VAL and isinstance(output, Tensor))
    names = _names(stage, module.epoch_loss_keys)
    losses = losses_in(output, logged, names, run.many[source or stage.name], dims)
    # Most batches agree about their size, and most steps say no other.
    final = own or not (notes or weight is None or len(run.sizes.get(stage.name, ())) > 1)
    found, fault = False, ""
    for key, loss in losses.items():
        if isinstance(loss, Tensor):
            counts = weight if final else _weight(stage, module, run, batch, weight, notes, key)
            epoch.add(key + source, loss, counts)
            found = True
        elif loss:
            if loss.startswith("gave") and isinstance(output, Mapping):
                fault = f" and {loss}"
            if stage is TRAIN:  # what validation returns need not be a loss
                message = f"no {key!r} is recorded: {key!r} is in epoch_loss_keys, but {stage.step} {loss}"
                module._epoch_recorder.history.warn_once(key, f".{stage.step}: {message}")
    if not found and stage.name not in run.words and (stage is TRAIN or epoch.mark is not None):
        run.words[stage.name] = described(output, logged) + fault


def _weight(stage: Stage, module: Module, run: Run, batch: Any, size: int | None, notes: list[Any], key: str) -> Any:
    """The ``batch_size`` given with the key's loss, or another, or anything that a step logs; else the batch's own."""
    said = {name: size for name, _, size in notes if size is not None}
    names = _names(stage, module.epoch_loss_keys)
    aliases = [name for these in (names[key], *names.values()) for name in these[::-1]]
    with suppress(TypeError, ValueError, StopIteration):  # Lightning takes it as it is
        return checked_weight(next(said[name] for name in (*aliases, *said) if name in said), "")
    if len(sizes := run.sizes.get(stage.name, ())) > 1:
        module._epoch_recorder.history.warn_once(
            f"{stage.step} sizes",
            f".{stage.step}: the tensors of its batch disagree about the batch size: {', '.join(map(str, sizes[:9]))}."
            " The first counts; say `self.log(..., batch_size=...)` in the step, or override `epoch_loss_weight`",
        )
    return module.epoch_loss_weight(batch) if size is None else size


@cache
def _names(stage: Stage, keys: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """For each key under which names people return and log its loss."""
    return {key: (key, *(title + mark + key for title in stage.titles for mark in "_/")) for key in keys}


def _listen(module: Module, notes: list[Any], args: Any, kwargs: Any) -> None:
    """Note what a step gives to ``self.log`` and ``self.log_dict``: name, value, batch size."""
    # A step that optimizes by hand calls hooks, and those of callbacks.
    if module._current_fx_name not in (None, TRAIN.step, VAL.step):
        return
    given = args[0] if args else kwargs.get("name", kwargs.get("dictionary"))
    pairs: Any = ()
    if isinstance(given, str):
        pairs = ((given, args[1] if len(args) > 1 else kwargs.get("value")),)
    elif isinstance(given, Mapping):
        pairs = given.items()
    for name, value in pairs:
        # Of a metric Lightning logs the value of its latest call; none if it was only updated.
        value = value._forward_cache if type(value) is not Tensor and isinstance(value, Metric) else value
        notes.append((name, value, kwargs.get("batch_size")))


def _open(stage: Stage, module: Module, run: Run) -> OpenEpoch:
    check_keys(module.epoch_loss_keys, type(module).__name__)
    trainer = _trainer(module)
    return run.begin(stage.name, None if trainer is None else stage.mark(trainer))


def _begin(stage: Stage, module: Module, run: Run, *_: Any) -> None:
    """Open an epoch, unless a checkpoint has brought this very one to go on with.

    When Lightning goes on from the last batch of an epoch, it skips the hooks that end the epoch, and the one that
    starts the next (`_FitLoop.reset` and `on_advance_start`). A mark that has moved on tells so.
    """
    recorder, trainer, epoch = module._epoch_recorder, _trainer(module), run.open.get(stage.name)
    if trainer is None:
        _open(stage, module, run)
        return
    if stage is TRAIN:
        _weave_again(module)
        if recorder.resumed:
            if epoch is None and run.last["mark"] == trainer.current_epoch:
                # Under `max_steps` Lightning goes on in the very epoch at whose end it saved.
                recorder.history.take_back({*module.epoch_loss_keys, *run.last["totals"]})
                epoch = _open(stage, module, run)
                epoch.begins = run.last["totals"]
            index = trainer.current_epoch if epoch is None or epoch.mark is None else epoch.mark
            recorder.history.pad(module.epoch_loss_keys, index - len(run.ended["train"]))
            recorder.resumed = False
    if epoch is not None and epoch.mark != stage.mark(trainer):
        _close(stage, module, run)
    epoch = run.open.get(stage.name) or _open(stage, module, run)
    epoch.batches = _batches(trainer)


def _close(stage: Stage, module: Module, run: Run, *_: Any) -> None:
    """End an epoch, and settle it where all ranks meet."""
    trainer, epoch = _trainer(module), run.open.get(stage.name)
    if trainer and not epoch:
        return  # a callback calls the hook by hand
    if stage is TRAIN and not (trainer and epoch and _passed_by(trainer, epoch)):
        run.words.setdefault("train", "was not called")
    run.end(stage.name, _ranks(module)[1])
    if stage is TRAIN or _all_validate(module):
        _meet(module, run)


def _passed_by(trainer: Trainer, epoch: OpenEpoch) -> bool:
    """Whether Lightning, after some resumes, has not even looked for a batch, so that no step is missed."""
    return epoch.batches == _batches(trainer) and trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0


def _end_brought(module: Module, *_: Any) -> None:
    """End what a checkpoint brought and what Lightning found nothing left to do for, so that it ran no end hook."""
    run = module._epoch_recorder.fit
    if _fitting(module) and run.open.get("train", OpenEpoch()).begins:
        _close(TRAIN, module, run)


def _set_up(module: Module, *_: Any) -> None:
    """Drop what an interrupted fit has left. A checkpoint to go on from is loaded after this."""
    if _fitting(module):
        recorder = module._epoch_recorder
        recorder.fit.clear()
        recorder.by_hand.clear()
        recorder.resumed = False
        for name in ("training_step", "validation_step", "on_train_epoch_end", "on_validation_epoch_end"):
            if getattr(module, name, None) is not None and not is_woven(getattr(module, name)):
                message = "was replaced after the class was made, so that EpochLossMixin cannot see it; define it there"
                recorder.history.warn_once(name, f".{name} {message}")


def _weave_again(module: Module) -> None:
    """Put back what a notebook's ``%autoreload`` has taken out of the classes, together with a method of the user's."""
    for cls in type(module).__mro__:
        if names := weave_into(cls, again=True) if "_epoch_losses_woven" in vars(cls) else ():
            message = f": {', '.join(names)} had gone from {cls.__name__} after it was made, and is woven in again"
            module._epoch_recorder.history.warn_once("again", message)


def _runner(module: Module) -> Trainer | None:
    """The Trainer that runs the module: at work, or at rest and saving it."""
    return module.__dict__.get("_trainer") if module._current_fx_name == "on_save_checkpoint" else _trainer(module)


def _ranks(module: Module) -> tuple[int, bool, float]:
    """The number of ranks, whether this one is the first or shares its copy of the model, and how much each counts."""
    trainer = _runner(module)
    if trainer is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank() == 0, 1.0
    # A Trainer on one device does not take part in a group that others have set up around it.
    world = getattr(trainer, "world_size", 1)
    if trainer is None or not isinstance(world, int) or world == 1:
        return 1, True, 1.0
    sampler = trainer.distributed_sampler_kwargs or {}
    return world, sampler.get("rank", trainer.global_rank) == 0, sampler.get("num_replicas", world) / world


def _all_validate(module: Module) -> bool:
    """Whether no rank can be elsewhere while this one validates."""
    if _ranks(module)[0] == 1:
        return True
    trainer = _trainer(module)
    if trainer is None:
        return False  # in a loop by hand one rank may validate for all
    # It may go by its own clock; or have nothing to validate on, and skip validation, hooks and all. Otherwise
    # Lightning refuses a rank with an empty dataloader (`has_len_all_ranks` of `utilities/data.py`).
    hooks, empty = (module, getattr(trainer, "datamodule", None)), "allow_zero_length_dataloader_with_multiple_devices"
    by_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    return not by_clock and not any(getattr(place, empty, False) for place in hooks)


def _meet(module: Module, run: Run, with_open: bool = False) -> dict[str, Any]:
    """Settle what all ranks have ended; return what is not settled then."""
    world, first, share = _ranks(module)
    state = run.state(first, with_open)
    if world > 1:
        state = together(_gather(module, state), share)
    words = {stage: run.words.pop(stage, None) for stage, epochs in run.ended.items() if epochs}
    for epochs in run.ended.values():
        epochs.clear()
    if state["ended"]["train"]:
        run.last["totals"] = state["ended"]["train"][-1]
    module._epoch_recorder.history.settle(state["ended"], words, module.epoch_loss_keys)
    return {**state, "ended": {}, "last": run.last}


def _gather(module: Module, state: dict[str, Any], size: int = 4096) -> list[dict[str, Any]]:
    """What each rank says, in one collective of a size that all know; in a second one where one has more to say."""
    said, trainer = json.dumps(state).encode(), _runner(module)
    row = torch.tensor([*len(said).to_bytes(8, "big"), *said[:size].ljust(size)], dtype=torch.uint8)[None]
    if trainer is not None:
        # Not the module's device: it may be back on the CPU, of which a group of GPUs knows nothing.
        rows = trainer.strategy.all_gather(row.to(trainer.strategy.root_device))
    else:
        row = row.to(module.device)
        rows = row.new_empty(torch.distributed.get_world_size(), row.size(1))
        torch.distributed.all_gather_into_tensor(rows, row)
    heard = [bytes(said) for said in rows.reshape(-1, row.size(1)).tolist()]
    longest = max(int.from_bytes(said[:8], "big") for said in heard)
    return [json.loads(said[8:]) for said in heard] if longest <= size else _gather(module, state, longest)


def _first_dict(args: Any, kwargs: Any) -> Any:
    """The checkpoint or ``state_dict`` that a method was given, under whatever name."""
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, dict)), {})


def _save(module: Module, args: Any, kwargs: Any) -> None:
    recorder, checkpoint = module._epoch_recorder, _first_dict(args, kwargs)
    attached = module.__dict__.get("_trainer")
    if _RECORD in checkpoint and attached is not None and attached.lightning_module is not module:
        return  # it is part of another module, whose record this is
    trainer = _runner(module)
    run = recorder.by_hand if trainer is None else recorder.fit
    # An exception may have befallen this rank alone; SIGTERM, Lightning tells all.
    stopped = trainer is not None and trainer.interrupted and not getattr(trainer, "received_sigterm", False)
    by_user = trainer is not None and module._current_fx_name != "on_save_checkpoint"
    alone = stopped or by_user or _ranks(module)[0] == 1
    # Lightning's hooks open and end the same epochs on all ranks.
    unsettled = run.state() if alone or not run.open else _meet(module, run, with_open=True)
    checkpoint[_RECORD] = saved(recorder.history, unsettled)


def _load(module: Module, args: Any, kwargs: Any) -> None:
    recorder, checkpoint = module._epoch_recorder, _first_dict(args, kwargs)
    recorder.resumed = _fitting(module) is not None
    if _RECORD in checkpoint and (recorder.resumed or _trainer(module) is None):  # others only borrow the weights
        try:
            restore(checkpoint[_RECORD], recorder.history, recorder.fit if recorder.resumed else recorder.by_hand)
        except ValueError as error:
            raise ValueError(f"{type(module).__name__}: checkpoint[{_RECORD!r}] is damaged: {error}") from None


def _send_home(module: Module, *_: Any) -> None:
    """Send the history home from a worker that Lightning has spawned or forked.

    All that leaves such a worker is the module's ``state_dict()``, taken once after this last hook, for the process
    that called ``fit`` to load (`strategies/launchers/multiprocessing.py`). The record travels in it, put there behind
    a user's own ``state_dict``, which may leave out what it does not know.
    """
    trainer = _fitting(module)
    if trainer is not None and hasattr(trainer.strategy.launcher, "_start_method"):
        recorder, state_dict = module._epoch_recorder, module.state_dict
        record = saved(recorder.history, recorder.fit.state())
        module.__dict__["state_dict"] = lambda *args, **kwargs: {**state_dict(*args, **kwargs), _RECORD: record}


def _come_home(module: Module, args: Any, kwargs: Any) -> None:
    state = _first_dict(args, kwargs)
    if _RECORD in state:
        restore(state.pop(_RECORD), module._epoch_recorder.history, module._epoch_recorder.fit)


# What is woven into which method, as `weave` takes it.
_PARTS: dict[str, dict[str, Any]] = {
    "test_step": {"guard": "step"},
    "predict_step": {"guard": "step"},
    TRAIN.step: {"before": partial(_in_run, _ask, TRAIN, TRAIN.step), "after": partial(_add, TRAIN), "guard": "step"},
    VAL.step: {"before": partial(_in_run, _ask, VAL, VAL.step), "after": partial(_add, VAL), "guard": "step"},
    "log": {"after": _listen, "guard": "step", "heard": True},
    "log_dict": {"after": _listen, "guard": "step", "heard": True},
    "setup": {"before": _set_up},
    # A fit that goes on in an epoch's middle has no other start.
    "on_train_start": {"before": partial(_in_run, _begin, TRAIN, "on_train_start")},
    "on_train_epoch_start": {"before": partial(_in_run, _begin, TRAIN, "on_train_epoch_start")},
    "on_train_epoch_end": {"before": partial(_in_run, _close, TRAIN, "on_train_epoch_end")},
    "on_validation_epoch_start": {"before": partial(_in_run, _begin, VAL, "on_validation_epoch_start")},
    "on_validation_epoch_end": {"before": partial(_in_run, _close, VAL, "on_validation_epoch_end")},
    "on_fit_end": {"before": _end_brought},
    "on_save_checkpoint": {"before": _save},
    "on_load_checkpoint": {"before": _load},
    "teardown": {"after": _send_home},
    "load_state_dict": {"before": _come_home},
}


def weave_into(cls: type, again: bool = False) -> list[str]:
    """Weave recording into a class, or what has gone since into one that was woven; return the methods' names."""
    return [name for name, part in _PARTS.items() if not (again and name in vars(cls)) and weave(cls, name, **part)]
