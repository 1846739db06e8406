"""What the steps that did not give a key returned and logged, in words for a message."""

import difflib
from typing import Any

from torch import Tensor

from epoch_mixin._losses import Missing, entries_of
from epoch_mixin._names import key_for, matches, words
from epoch_mixin._run import Stage
from epoch_mixin._values import RejectedTensor, Value, as_number

# Quantities that are no losses. One is offered as a key only where nothing else was given.
_NO_LOSSES = {"acc", "accuracy", "top1", "f1", "auc", "auroc", "precision", "recall", "iou", "miou", "psnr", "lr"}


class Unrecorded:
    """For the steps of an epoch that gave no loss for a key: what they returned and logged. It holds no tensor.

    Attributes:
        returned: for each key, what the first of them returned.
        logged: the names that they logged, each with a note.
        at_end: the names that ``on_validation_epoch_end`` logged, each with a note.
        numbered: the names that differ only in a number.
        of_tensors: the keys for which a tensor was given that is not one number.
    """

    def __init__(self) -> None:
        self.returned: dict[str, str] = {}
        self.logged: dict[str, str] = {}
        self.at_end: dict[str, str] = {}
        self.numbered: dict[str, None] = {}
        self.of_tensors: set[str] = set()
        # The names of what may be a loss, each with whether it was logged.
        self._names: dict[str, bool] = {}

    def add(self, stage: Stage, missing: Missing, output: Any, logged: list[Value]) -> None:
        """Add a step that did not give a key."""
        if isinstance(missing.rejected, RejectedTensor):
            self.of_tensors.add(missing.key)
        if missing.key not in self.returned:
            entries = entries_of(output) or {}
            self.returned[missing.key] = _described(missing, output, stage)
            self._names.update((name, False) for name in entries if isinstance(name, str) and _is_number(entries[name]))
        self._add_logged(self.logged, missing, logged)

    def add_end(self, missing: Missing, logged: list[Value]) -> None:
        """Add what ``on_validation_epoch_end`` logged."""
        self._add_logged(self.at_end, missing, logged)

    def text(self, key: str) -> str:
        """What the first step that did not give the key returned, and what all such steps logged."""
        text = f"returned {self.returned[key]}" if key in self.returned else "was not called"
        if self.logged:
            text += f" and logged {_listed(self.logged)}"
        if self.at_end:
            text += f", and on_validation_epoch_end logged {_listed(self.at_end)}"
        if self.numbered:
            text += f"; a number does not tell which of {_listed(dict.fromkeys(self.numbered, ''))} is the loss"
        return text

    def keys_like(self, missing: list[str], stage: Stage) -> list[str]:
        """The keys that would record what was given: those that look like a missing key, else what was logged."""
        keys = {name: key_for(name) for name in self._names}
        keys = {name: key for name, key in keys.items() if key not in ("", *stage.keys)}
        keys = {name: key for name, key in keys.items() if matches(name, (key,), stage.name)}
        of_missing = {word for key in missing for word in words(key)}
        related = [key for name, key in keys.items() if of_missing & {*words(name)}]
        alike = [key for name in missing for key in difflib.get_close_matches(name, keys.values(), n=1, cutoff=0.5)]
        logged = [key for name, key in keys.items() if self._names[name]]
        losses = [key for key in logged if not _NO_LOSSES & {*words(key)}]
        return list(dict.fromkeys(related or alike or losses or logged[:1]))

    def _add_logged(self, names: dict[str, str], missing: Missing, logged: list[Value]) -> None:
        for value in logged:
            is_updated = value.given is None
            names.setdefault(value.name, " (a metric that was only updated)" if is_updated else "")
            if not is_updated:
                self._names[value.name] = True
        self.numbered.update(dict.fromkeys(missing.numbered))


def _described(missing: Missing, output: Any, stage: Stage) -> str:
    """What a step that did not give a key returned."""
    entries = entries_of(output)
    if output is None:
        return "None"
    if entries is None:
        what = missing.rejected or f"a {type(output).__name__}"
        return what if isinstance(what, RejectedTensor) else f"only {what}"
    none = [key for key in (missing.key, *stage.keys) if key in entries and entries[key] is None]
    if none:
        return f"a {none[0]} of None"
    what = f"only {', '.join(map(repr, entries))}" if entries else "an empty dict"
    return f"{what} and gave {missing.rejected} for it, which is no real scalar" if missing.rejected else what


def _listed(names: dict[str, str]) -> str:
    return ", ".join(f"{name!r}{note}" for name, note in names.items())


def _is_number(value: Any) -> bool:
    return isinstance(as_number(value), (float, Tensor))
