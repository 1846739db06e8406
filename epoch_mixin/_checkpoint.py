"""The record that a checkpoint holds, in plain types: saving it, loading it, and its way back from a worker process."""

import math
import reprlib
from itertools import chain
from operator import index
from typing import Any

from epoch_mixin._lightning import attached_trainer, current_hook, is_in_worker
from epoch_mixin._loop import open_epoch, synchronize
from epoch_mixin._names import Partners
from epoch_mixin._ranks import ranks_of
from epoch_mixin._recorder import Recorder, run_of_call
from epoch_mixin._run import STAGES, Epoch, Run, RunState, Totals

# Where a checkpoint keeps the record, and the newest version of its form.
_RECORD, _VERSION = "epoch_mixin", 1
# Shows a record in a line.
_short = reprlib.Repr()
_short.maxlevel = 2


def save(module: Any, name: str, args: Any, kwargs: Any) -> None:
    """Put the record into a checkpoint, with the open epochs of all ranks.

    The ranks gather only if all of them save: when Lightning calls this hook on every rank, or when a loop without a
    Trainer calls it. Lightning's hooks open and end the same epochs on all ranks.
    """
    recorder: Recorder = module._epoch_recorder
    checkpoint = _first_dict(args, kwargs)
    attached = attached_trainer(module)
    if _RECORD in checkpoint and attached is not None and attached.lightning_module is not module:
        return  # the module is part of another one, which has put its record there
    by_lightning = current_hook(module) == name
    is_of_loop = not by_lightning and run_of_call(module) is recorder.without_trainer
    run = recorder.without_trainer if is_of_loop else recorder.fit
    trainer = run.trainer
    # An exception may have stopped this rank alone; of SIGTERM, Lightning tells all.
    is_stopped = trainer is not None and trainer.interrupted and not getattr(trainer, "received_sigterm", False)
    all_take_part = trainer is None or (by_lightning and not is_stopped)
    is_open = run.val.is_open or run.train.is_open
    if is_open and all_take_part and ranks_of(trainer).number > 1:
        state = synchronize(module, run, with_open=True)
        state["ended"] = {stage: [] for stage in STAGES}  # they are in the history now
    else:
        state = run.state()
    checkpoint[_RECORD] = _plain_record(module, run, state)


def load(module: Any, name: str, args: Any, kwargs: Any) -> None:
    """Restore the record from a checkpoint, unless a Trainer loads only the weights from it."""
    checkpoint = _first_dict(args, kwargs)
    run = run_of_call(module)
    if run is None:
        return
    if _RECORD in checkpoint:
        _restore(module, checkpoint[_RECORD], run)
    run.is_resuming = run.trainer is not None


def send_from_worker(module: Any, *_: Any) -> None:
    """Send the record from a worker process that Lightning has spawned or forked to the one that called ``fit``.

    Lightning sends only the module's ``state_dict()`` back. It calls it once, after this last hook
    (`strategies/launchers/multiprocessing.py`). The record is added to what a user's own ``state_dict`` returns, which
    may leave out what it does not know.
    """
    fit: Run = module._epoch_recorder.fit
    state_dict = module.state_dict
    if run_of_call(module) is fit and is_in_worker(fit.trainer):
        record = _plain_record(module, fit, fit.state())
        vars(module)["state_dict"] = lambda *args, **kwargs: {**state_dict(*args, **kwargs), _RECORD: record}


def restore_from_worker(module: Any, name: str, args: Any, kwargs: Any) -> None:
    """Take the record out of a ``state_dict`` that a worker has sent."""
    state_dict = _first_dict(args, kwargs)
    if _RECORD in state_dict:
        _restore(module, state_dict.pop(_RECORD), module._epoch_recorder.fit)


def _first_dict(args: Any, kwargs: Any) -> Any:
    """The checkpoint or ``state_dict`` that a method was given, under whatever name."""
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, dict)), {})


def _plain_record(module: Any, run: Run, state: RunState) -> dict[str, Any]:
    history = module._epoch_recorder.history
    means: dict[str, list[float]] = {}
    for name, values in history.means.items():
        try:
            means[_text(name)] = _floats(values)
        except Exception:  # whatever a user has put there: a save must not end a run
            module._epoch_recorder.diagnosis.list_not_saved(name)
    return {
        "version": _VERSION,
        "history": means,
        "val_epochs": {name: list(epochs) for name, epochs in history.val_epochs.items() if name in means},
        "val_parts": {name: list(parts) for name, parts in history.val_parts.items() if name in means},
        "open": state["open"],
        "ended": state["ended"],
        "last": run.train.last,
        "partners": {key: dict(names) for key, names in run.partners.evidence.items()},
    }


def _restore(module: Any, record: Any, run: Run) -> None:
    """Take over a record in place of what is there. One of an older version has fewer parts.

    Raises:
        ValueError: the record is damaged, or of a newer version of the package; nothing is changed.
    """
    recorder = module._epoch_recorder
    try:
        version = index(record.get("version", _VERSION))
        if version <= _VERSION:
            history = {_text(name): _floats(values) for name, values in record["history"].items()}
            val_epochs = {_text(name): _indices(epochs) for name, epochs in record["val_epochs"].items()}
            val_parts = {_text(name): _floats(parts) for name, parts in record.get("val_parts", {}).items()}
            opened = {_stage(name): _epoch(epoch) for name, epoch in record["open"].items()}
            ended = {_stage(name): list(map(_totals, epochs)) for name, epochs in record.get("ended", {}).items()}
            last = _epoch(record.get("last", {"mark": None, "totals": {}}))
            partners = Partners({_text(key): _evidence(names) for key, names in record.get("partners", {}).items()})
    except Exception as error:  # whatever a record of another form may raise
        where = f"checkpoint[{_RECORD!r}]"
        raise ValueError(f"{recorder.owner}: {where} is damaged: {_short.repr(record)}") from error
    if version > _VERSION:
        what = f"has version {version}, and this epoch-mixin reads versions up to {_VERSION}; install a newer one"
        raise ValueError(f"{recorder.owner}: checkpoint[{_RECORD!r}] {what}")

    totals = [*chain(*ended.values()), *(epoch["totals"] for epoch in (*opened.values(), last))]
    wrong = [pair for sums in totals for pair in sums.values() if not math.isfinite(pair[1])]
    for pair in wrong:  # an infinite or NaN weight would end the resumed fit with an error
        pair[:] = math.nan, 1.0
    if wrong:
        recorder.diagnosis.weight_was_wrong()
    unknown = {name: [math.nan] * len(epochs) for name, epochs in val_epochs.items()}
    recorder.history.restore(history, val_epochs, unknown | val_parts)
    run.reset()
    run.partners = partners
    run.train.last = last
    for stage in (run.val, run.train):
        stage.ended = ended.get(stage.name, [])
        if stage.name in opened:
            open_epoch(module, stage)  # with the module's present keys: a user may have changed them
            stage.mark = opened[stage.name]["mark"]
            stage.resumed_totals = opened[stage.name]["totals"]


def _epoch(epoch: Any) -> Epoch:
    mark = epoch["mark"]
    return {"mark": None if mark is None else index(mark), "totals": _totals(epoch["totals"])}


def _totals(totals: Any) -> Totals:
    read = {_text(key): _floats(pair) for key, pair in totals.items()}
    if any(weight < 0 for _, weight in read.values()):
        raise ValueError("a negative weight")
    return read


def _indices(values: Any) -> list[int]:
    indices = [index(value) for value in values]
    if any(value < 0 for value in indices):
        raise ValueError("a negative epoch")
    return indices


def _evidence(names: Any) -> dict[str, bool]:
    # Version 0.2 of the package saved the partners only.
    evidence = names if isinstance(names, dict) else dict.fromkeys(list(names), True)
    if isinstance(names, str) or not all(type(is_partner) is bool for is_partner in evidence.values()):
        raise ValueError("partners without evidence")
    return {_text(name): is_partner for name, is_partner in evidence.items()}


def _stage(name: Any) -> str:
    if name not in STAGES:
        raise ValueError(f"no stage: {name!r}")
    return _text(name)


def _text(name: Any) -> str:
    return str.__str__(name)  # an enum member cannot be loaded again, its text can


def _floats(values: Any) -> list[float]:
    # `float` warns of a tensor that has a graph. Adding 0.0 refuses a string.
    return [float((value.item() if hasattr(value, "item") else value) + 0.0) for value in values]
