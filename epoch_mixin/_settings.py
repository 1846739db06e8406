"""What a user configures, and what is refused of it: the keys, the weight, and names that hide ours."""

import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from epoch_mixin._lightning import is_lightning_module
from epoch_mixin._names import STAGE_WORDS, without_stage, words
from epoch_mixin._values import Number, Rejected, as_number
from epoch_mixin._warn import warn

LISTS = ("epoch_losses", "epoch_history")
_SETTINGS = ("epoch_loss_keys", "epoch_loss_weight")


def check_class(cls: type, mixin: type) -> None:
    """Refuse what is wrong in a class that inherits from the mixin; warn of a misspelt setting.

    Raises:
        TypeError: the class is a module that is not Lightning's; it hides a list or a setting of the mixin; or a
            setting has another type.
        ValueError: see `check_keys`.
    """
    name: str = cls.__name__
    if any(base.__module__.startswith("torch.nn.") for base in cls.__mro__) and not is_lightning_module(cls):
        raise TypeError(f"{name} is no LightningModule: write `class {name}(EpochLossMixin, pl.LightningModule)`")
    for hidden in LISTS:
        if getattr(cls, hidden) is not getattr(mixin, hidden):
            raise TypeError(f"{name}.{hidden} hides what EpochLossMixin keeps there; remove this line")
    for setting in _SETTINGS:
        _check_not_hidden(cls, mixin, setting)
    keys, weight = (getattr(cls, setting) for setting in _SETTINGS)
    check_keys(keys, name)
    if not callable(weight):
        raise TypeError(f"{name}.epoch_loss_weight must be a method that takes a batch, not {weight!r}")
    for own in vars(cls):
        meant = difflib.get_close_matches(own, _SETTINGS, n=1, cutoff=0.85)
        if meant and own not in meant:
            warn(f"{name}.{own} means nothing to EpochLossMixin; did you mean {meant[0]}?")


def check_keys(keys: Any, owner: str) -> None:
    """Refuse a wrong ``owner.epoch_loss_keys``.

    Raises:
        TypeError: it is no tuple of strings.
        ValueError: a key tells a stage, or is there twice.
    """
    setting = f"{owner}.epoch_loss_keys"
    if not (isinstance(keys, tuple) and keys and all(isinstance(key, str) for key in keys)):
        such = (keys,) if isinstance(keys, str) else ("loss",)
        raise TypeError(f"{setting} must be a tuple of strings such as {as_code(such)}, not {keys!r}")
    if any(word in STAGE_WORDS for key in keys for word in words(key)):
        right = as_code(tuple(dict.fromkeys(without_stage(key) or "loss" for key in keys)))
        apart = "training and validation of a key are recorded apart"
        raise ValueError(f"{setting} = {as_code(keys)} has a stage in it: write {right}; {apart}")
    if len({*keys}) < len(keys):
        raise ValueError(f"{setting} has keys that share a name in the history: {keys!r}; write each key once")


def checked_weight(weight: Any, owner: str) -> Number:
    """Return what ``owner.epoch_loss_weight`` gave as a float or a tensor without dimensions.

    A tensor that is negative or not finite is refused when its epoch ends. To look now would wait for its device.

    Raises:
        TypeError: it is not one number.
        ValueError: it is negative, NaN or infinite.
    """
    number = as_number(weight)
    if not isinstance(weight, (Real, Tensor)) or number is None or isinstance(number, Rejected):
        given = number if isinstance(number, Rejected) else repr(weight)
        raise TypeError(f"{owner}.epoch_loss_weight must return one number, not {given}")
    if isinstance(weight, Real) and not 0 <= number < math.inf:
        raise ValueError(f"{owner}.epoch_loss_weight must return a finite number not below zero, not {weight}")
    return math.nan if isinstance(number, float) and number < 0 else number


def check_sums(totals: Mapping[str, list[float]], owner: str, epoch: int) -> None:
    """Refuse an ``owner.epoch_loss_weight`` that returned a wrong tensor, which shows in the sums of its epoch.

    Raises:
        ValueError: it was negative, NaN or infinite.
    """
    if not all(math.isfinite(weight) for _, weight in totals.values()):
        what = f"a negative number, NaN or infinity in epoch {epoch}"
        raise ValueError(f"{owner}.epoch_loss_weight returned {what}; return a finite number not below zero")


def as_code(keys: tuple[str, ...]) -> str:
    """A tuple of strings as a user types it: ``("loss",)``."""
    quoted = ", ".join(f'"{key}"' for key in keys)
    return f"({quoted},)" if len(keys) == 1 else f"({quoted})"


def _check_not_hidden(cls: type, mixin: type, setting: str) -> None:
    """Refuse a setting of a base class that comes after the mixin, so that the mixin's default hides it."""
    first, *behind = (base for base in cls.__mro__ if setting in vars(base))
    for base in behind if first is mixin else ():
        value = vars(base)[setting]
        is_declared = getattr(base, "_is_protocol", False) or getattr(value, "__isabstractmethod__", False)
        if not is_declared and value != getattr(mixin, setting):
            raise TypeError(
                f"EpochLossMixin hides {base.__name__}.{setting}, which is behind it; set it in {cls.__name__}"
            )
