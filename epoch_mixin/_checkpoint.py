"""The record that a checkpoint holds, in plain types: saving it, loading it, and its way back from a worker process."""

import math
import reprlib
from collections.abc import Callable, Mapping
from itertools import chain
from operator import index
from typing import Any

from epoch_mixin._epochs import run_of_call, synchronize, trainer_at_work
from epoch_mixin._history import STAGES, Run
from epoch_mixin._lightning import attached_trainer, current_hook, is_in_worker
from epoch_mixin._ranks import ranks_of

# Where a checkpoint keeps the record, and the newest version of its form.
_RECORD, _VERSION = "epoch_mixin", 1


def save(module: Any, name: str, args: Any, kwargs: Any) -> None:
    """Put the record into a checkpoint, with the open epochs of all ranks."""
    recorder, checkpoint, attached = module._epoch_recorder, _first_dict(args, kwargs), attached_trainer(module)
    if _RECORD in checkpoint and attached is not None and attached.lightning_module is not module:
        return  # it is part of another module, whose record this is
    by_lightning = current_hook(module) == name
    trainer = (recorder.fit.trainer or attached) if by_lightning else trainer_at_work(module)
    run = recorder.without_trainer if trainer is None else recorder.fit
    # An exception may have stopped this rank alone; SIGTERM, Lightning tells all. A user may call this on one rank.
    stopped = trainer is not None and trainer.interrupted and not getattr(trainer, "received_sigterm", False)
    alone = stopped or (trainer is not None and not by_lightning) or ranks_of(trainer)[0] == 1
    # Lightning's hooks open and end the same epochs on all ranks.
    is_open = run.val.is_open or run.train.is_open
    state = synchronize(module, run, with_open=True) if is_open and not alone else run.state()
    checkpoint[_RECORD] = _record(module, state)


def load(module: Any, name: str, args: Any, kwargs: Any) -> None:
    """Restore the record from a checkpoint, unless a Trainer loads only the weights from it."""
    checkpoint, run = _first_dict(args, kwargs), run_of_call(module)
    if run is not None and _RECORD in checkpoint:
        _restore(module, checkpoint[_RECORD], run)
    if run is not None:
        run.resumes = run.trainer is not None


def send_from_worker(module: Any, *_: Any) -> None:
    """Send the record from a worker process that Lightning has spawned or forked to the one that called ``fit``.

    All that leaves such a worker is the module's ``state_dict()``, taken once after this last hook, for that process to
    load (`strategies/launchers/multiprocessing.py`). The record travels in it, put there behind a user's own
    ``state_dict``, which may leave out what it does not know.
    """
    fit, state_dict = module._epoch_recorder.fit, module.state_dict
    if run_of_call(module) is fit and is_in_worker(fit.trainer):
        record = _record(module, fit.state())
        vars(module)["state_dict"] = lambda *args, **kwargs: {**state_dict(*args, **kwargs), _RECORD: record}


def receive_from_worker(module: Any, name: str, args: Any, kwargs: Any) -> None:
    """Take the record out of a ``state_dict`` that a worker has sent."""
    state_dict = _first_dict(args, kwargs)
    if _RECORD in state_dict:
        _restore(module, state_dict.pop(_RECORD), module._epoch_recorder.fit)


def _first_dict(args: Any, kwargs: Any) -> Any:
    """The checkpoint or ``state_dict`` that a method was given, under whatever name."""
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, dict)), {})


def _record(module: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    history, means = module._epoch_recorder.history, {}
    for name, values in history.means.items():
        try:
            means[_text(name)] = _floats(values)
        except Exception:  # whatever a user has put there: a save must not end a run
            fault = f".epoch_history[{name!r}] is not saved, for it is no list of numbers"
            module._epoch_recorder.warn_once(f"save {name}", fault)
    val_epochs = {name: list(epochs) for name, epochs in history.val_epochs.items() if name in means}
    record = {"version": _VERSION, "history": means, "val_epochs": val_epochs, **state}
    return {part: record[part] for part in _PARTS}


def _restore(module: Any, record: Any, run: Run) -> None:
    """Take over a record in place of what is there.

    Raises:
        ValueError: a part of the record has another form; nothing is changed.
    """
    # Records of older versions have fewer parts.
    defaults = {"version": _VERSION, "ended": {}, "last": {"mark": None, "totals": {}}, "partners": {}}
    part, given, read, recorder = "it", record, {}, module._epoch_recorder
    try:
        record = {**defaults, **record}
        for part, reader in _PARTS.items():
            given = record.get(part)
            read[part] = reader(given)
        totals = [*chain(*read["ended"].values()), *(it["totals"] for it in (*read["open"].values(), read["last"]))]
        part, given = "a total and a weight", [pair for pairs in totals for pair in pairs.values()]
        if any(weight < 0 for _, weight in given):
            raise ValueError
    except Exception as error:
        fault = f"{part} must not be {reprlib.repr(given)}"
        raise ValueError(f"{recorder.owner}: checkpoint[{_RECORD!r}] is damaged: {fault}") from error
    for pair in [pair for pair in given if not math.isfinite(pair[1])]:
        fault = "had returned a negative number, NaN or infinity when the checkpoint was saved"
        recorder.warn_once("weight", f".epoch_loss_weight {fault}, so the mean of the epoch that it cuts is nan")
        pair[:] = math.nan, 1.0
    recorder.history.restore(read["history"], read["val_epochs"])
    run.__init__(run.trainer)  # type: ignore[misc]  # anew, and still the recorder's
    run.partners.update(read["partners"])
    run.train.last = read["last"]
    for epochs in (run.val, run.train):
        epochs.ended = read["ended"].get(epochs.stage, [])
        if epochs.stage in read["open"]:
            epochs.begin(module.epoch_loss_keys, read["open"][epochs.stage]["mark"])
            epochs.resumed = read["open"][epochs.stage]["totals"]


def _text(name: Any) -> str:
    return str.__str__(name)  # of an enum's members, only the text can be loaded again


def _floats(values: Any) -> list[float]:
    # Of a tensor that has a graph, `float` warns; what nothing can be added to is no number.
    return [float((value.item() if hasattr(value, "item") else value) + 0.0) for value in values]


def _dict(of: Callable[[Any], Any], name: Callable[[Any], str] = _text) -> Callable[[Any], dict[str, Any]]:
    return lambda given: {name(key): of(value) for key, value in given.items()}


def _epoch(given: Any) -> dict[str, Any]:
    mark = given["mark"]
    return {"mark": None if mark is None else index(mark), "totals": _totals(given["totals"])}


_totals, _stage = _dict(_floats), dict(zip(STAGES, STAGES)).__getitem__
# The parts of a record, each with what reads it.
_PARTS: dict[str, Callable[[Any], Any]] = {
    "version": lambda version: range(_VERSION + 1)[version],
    "history": _dict(_floats),
    "val_epochs": _dict(lambda epochs: list(map(index, epochs))),
    "open": _dict(_epoch, _stage),
    "ended": _dict(lambda epochs: list(map(_totals, epochs)), _stage),
    "last": _epoch,
    "partners": _dict(tuple),
}
