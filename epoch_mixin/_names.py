"""Which loss a name means. Names are compared by their words, not by a list of spellings."""

import re
from functools import lru_cache
from typing import Any

# Words that tell the stage.
_STAGES = {"train": {"train", "training", "trainer"}, "val": {"val", "valid", "validation", "validate", "dev", "eval"}}
_ANY_STAGE = _STAGES["train"] | _STAGES["val"]
# Words that, like numbers, do not tell which loss it is.
_NEUTRAL = {"epoch", "step", "dataloader", "idx"}
# Words that tell nothing beside "loss", unless there is a name without them.
_FILLERS = {"total", "avg", "average", "mean"}

Names = tuple[str, ...]
# How far a name is from that of a loss; less for a closer one.
Distance = tuple[int, ...]


@lru_cache(4096)
def words(name: str) -> Names:
    """The words of a name: lower case, split at anything but letters and digits, and within ``valLoss``."""
    # Not within `mIoU` or `mAP`, which are words.
    return tuple(re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z]{2})(?=[A-Z][a-z])", " ", name).lower()))


@lru_cache(4096)
def distances(name: str, keys: Names, stage: str, partners: tuple[tuple[str, Names], ...]) -> dict[str, Distance]:
    """The keys whose loss a name may mean in a stage, each with how far the name is from that of the loss.

    Args:
        name: the name as which a step logs or returns a value.
        keys: all keys; a name means the loss of the key that it is closest to.
        stage: ``"train"`` or ``"val"``.
        partners: of some keys the names as which training logs this very loss. In validation they come first, with the
            stage exchanged: ``val_bpd`` where training logs its loss as ``train_bpd``.
    """
    found = set(words(name))
    to_key = {key: far for key in keys if (far := _distance_to_key(found, key, stage))}
    nearest = {key: (1, *far) for key, far in to_key.items() if far == min(to_key.values())}
    for key, names in partners if not found <= _NEUTRAL else ():
        apart = [found ^ set(words(partner)) for partner in names]
        to_partner = [len(differ - _ANY_STAGE) for differ in apart if not _telling(differ)]
        if to_partner and key in keys:
            nearest[key] = (0, min(to_partner), *to_key.get(key, (9,)))
    of_other_stage = found & (_ANY_STAGE - _STAGES[stage])
    return {key: far for key, far in nearest.items() if of_other_stage <= set(words(key))}


@lru_cache(256)
def candidates(
    returned: Names, logged: Names, logged_first: bool, keys: Names, *stage_and_partners: Any
) -> dict[str, list[tuple[bool, str]]]:
    """For each key the names that may give its loss, each with whether it is logged: the closest first.

    What is returned comes first, unless ``logged_first``; among what is returned, the key itself.
    """
    found: dict[str, list[Any]] = {key: [] for key in keys}
    for is_logged, name in (*((False, name) for name in returned), *((True, name) for name in logged)):
        for key, far in distances(name, keys, *stage_and_partners).items():
            found[key].append((is_logged != logged_first, not is_logged and name != key, far, is_logged, name))
    return {key: [(is_logged, name) for *_, is_logged, name in sorted(names)] for key, names in found.items()}


def key_for(name: str) -> str:
    """The key under which a loss of this name would be recorded."""
    return "_".join(word for word in words(name) if _telling({word}))


def _telling(found: set[str]) -> set[str]:
    return {word for word in found - _ANY_STAGE - _NEUTRAL if not word.isdecimal()}


def _distance_to_key(found: set[str], key: str, stage: str) -> Distance | None:
    extra = found - set(words(key)) - _STAGES[stage]
    fillers = extra & _FILLERS if key == "loss" else set()
    if not found >= set(words(key)) or _telling(extra - fillers):
        return None
    return len(fillers), not found & _STAGES[stage], len(extra)
