"""The record that a checkpoint holds, in plain types: writing it, and reading what somebody may have damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

from epoch_mixin._recorder import STAGES, History, Run

_VERSION = 1
_NUMBERS = {str: [Real]}
_SHAPE = {
    "history": _NUMBERS,
    "val_epochs": {str: [int]},
    "open": {str: {"mark": (int, type(None)), "totals": _NUMBERS}},
    "ended": {str: [_NUMBERS]},
    "last": {"mark": (int, type(None)), "totals": _NUMBERS},
    "version": int,
}


def saved(history: History, unsettled: Mapping[str, Any]) -> dict[str, Any]:
    """The history and what is not settled (`Run.state`) as a record."""
    means = {}
    for name, values in history.means.items():
        try:
            means.update(_read({name: list(values)}, _NUMBERS, ""))
        except (TypeError, ValueError):  # whatever a user has put there: a save must not end a run
            history.warn_once(f"save {name}", f".epoch_history[{name!r}] is not saved, for it is no list of numbers")
    val_epochs = {name: list(epochs) for name, epochs in history.val_epochs.items() if name in means}
    return {"version": _VERSION, "history": means, "val_epochs": val_epochs, **unsettled}


def restore(record: Any, history: History, run: Run) -> None:
    """Take on a record in place of what is there.

    Raises:
        ValueError: the record has another shape; nothing is changed.
    """
    empty = {"version": _VERSION, "ended": {}, "last": {"mark": None, "totals": {}}}
    read = _read({**empty, **record} if isinstance(record, Mapping) else record, _SHAPE, "")
    if read["version"] > _VERSION:
        raise ValueError(f"version must be {_VERSION} or less for this epoch-mixin, not {read['version']}")
    for stage in {*read["open"], *read["ended"]}.difference(STAGES):
        raise ValueError(f"open.{stage} is no stage")
    totals = [(f"open.{stage}.totals", epoch["totals"]) for stage, epoch in read["open"].items()]
    totals += [(f"ended.{stage}", totals) for stage, epochs in read["ended"].items() for totals in epochs]
    totals += [("last.totals", read["last"]["totals"])]
    for where, key, pair in ((where, key, pair) for where, pairs in totals for key, pair in pairs.items()):
        if len(pair) != 2 or pair[1] < 0:
            raise ValueError(f"{where}.{key} must be a total and a weight, not {pair!r}")
        if not math.isfinite(pair[1]):
            fault = "had returned a negative number, NaN or infinity when the checkpoint was saved"
            history.warn_once("weight", f".epoch_loss_weight {fault}, so the mean of the epoch that it cuts is nan")
            pair[:] = math.nan, 1.0
    # A user may hold these lists: their contents change, not the objects.
    held = {name: values for name, values in history.means.items() if isinstance(values, list)}
    for values in held.values():
        values.clear()
    history.means.clear()
    history.means.update({name: held.get(name, []) for name in read["history"]})
    for name, values in read["history"].items():
        history.means[name] += values
    history.written, history.settled = [], 0
    history.val_epochs = read["val_epochs"]
    given = {name for name, values in history.means.items() if not all(map(math.isnan, values))}
    history.given = given - set(history.val_epochs)
    run.clear()
    run.ended.update(read["ended"])
    run.last = read["last"]
    for stage, epoch in read["open"].items():
        run.begin(stage, epoch["mark"]).begins = epoch["totals"]


def _read(value: Any, shape: Any, path: str) -> Any:
    """A copy of what has the shape, with numbers as plain floats."""
    if isinstance(shape, dict) and isinstance(value, Mapping):
        names = value if str in shape else shape
        for name in names:
            if name not in value or not isinstance(name, str):
                raise ValueError(f"{path}{name} is missing" if name in shape else f"{path}{name!r} is no name")
        # Of an enum's members, only the text can be loaded again.
        return {str.__str__(n): _read(value[n], shape.get(n, shape.get(str)), f"{path}{n}.") for n in names}
    if isinstance(shape, list) and isinstance(value, list):
        return [_read(item, shape[0], path) for item in value]
    if shape is Real and (isinstance(value, Real) or getattr(value, "ndim", None) == 0):
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):
            # Of a tensor that has a graph, `float` warns.
            return float(value.item() if hasattr(value, "ndim") else value)
    if isinstance(shape, (dict, list)) or shape is Real or not isinstance(value, shape):
        raise ValueError(f"{path[:-1]} must not be {value!r}")
    return value
