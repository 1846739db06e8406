"""Which key a name means. Names are compared by their words, not by a list of spellings.

Words that tell the stage do not count, and numbers tell nothing. For ``"loss"``, words such as ``total`` count less.
The names as which training logs its loss are evidence for those of validation: see `Partners`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

# Words that tell the stage.
_STAGES = {"train": {"train", "training", "trainer"}, "val": {"val", "valid", "validation", "validate", "dev", "eval"}}
STAGE_WORDS = _STAGES["train"] | _STAGES["val"]
# Words that, like numbers, do not tell which loss it is.
_NEUTRAL = {"epoch", "step", "dataloader", "idx"}
# Words that tell nothing beside "loss". A name without them is closer.
_FILLERS = {"total", "avg", "average", "mean"}

Names = tuple[str, ...]
# For some keys, the partners of each.
PartnersOfKeys = tuple[tuple[str, Names], ...]


class Kind(IntEnum):
    """Why a name may mean a key; the least counts first. An author who logs ``val_loss`` means the loss."""

    CONFIRMED = 0  # it has the words of the key, and is a partner
    HAS_WORDS = 1
    PARTNER = 2
    BARE = 3  # it is no name: the value was returned without one


class Match(NamedTuple):
    """How close a name is to a key. The least is the closest.

    Attributes:
        kind: why it may mean the key.
        words_beside_partner: how many words it has, or lacks, beside those of the partner.
        fillers: how many words such as ``total`` it has beside ``loss``.
        tells_no_stage: whether it has no word for the stage.
        other_words: how many other words it has beside those of the key.
    """

    kind: Kind
    words_beside_partner: int = 0
    fillers: int = 0
    tells_no_stage: bool = False
    other_words: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether the name has the words of the key, and no other."""
        return self.kind <= Kind.HAS_WORDS and not (self.words_beside_partner or self.fillers or self.other_words)


class Candidate(NamedTuple):
    """A name that may give the loss of a key.

    Attributes:
        is_logged: whether the step logged it. If not, the step returned it.
        name: the name.
        match: how close it is to the key.
    """

    is_logged: bool
    name: str
    match: Match


class Candidates(NamedTuple):
    """The names that a step gives for a key.

    Attributes:
        names: those that may give its loss, first what is returned, and then the closest.
        numbered: those that differ from each other only in a number. They give none.
    """

    names: list[Candidate]
    numbered: Names


class Partners:
    """The names under which training logs the very loss that it returns.

    A name is a partner of a key as long as every step that logged it gave it the loss of the key. If ``loss = rec``
    holds in a warm-up only, ``train_rec`` is not a partner.

    Attributes:
        evidence: for each key, the names that training has logged, and whether each of them is a partner.
        of_keys: for each key, the names that are partners.
    """

    def __init__(self, evidence: Mapping[str, Mapping[str, bool]]) -> None:
        self.evidence = {key: dict(names) for key, names in evidence.items()}
        self._select()

    def add(self, key: str, logged: Mapping[str, bool]) -> None:
        """Add the names that a training step logged, and whether each of them was the loss of the key."""
        names = self.evidence.setdefault(key, {})
        found = {name: is_loss and names.get(name, True) for name, is_loss in logged.items()}
        if any(names.get(name) is not is_partner for name, is_partner in found.items()):
            names.update(found)
            self._select()

    def _select(self) -> None:
        partners = {key: tuple(name for name in names if names[name]) for key, names in self.evidence.items()}
        self.of_keys: PartnersOfKeys = tuple((key, names) for key, names in partners.items() if names)


@lru_cache(4096)
def words(name: str) -> Names:
    """The words of a name: lower case, split at anything but letters and digits, and within ``valLoss``."""
    # Not within `mIoU` or `mAP`, which are words.
    return tuple(re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z]{2})(?=[A-Z][a-z])", " ", name).lower()))


@lru_cache(4096)
def matches(name: str, keys: Names, stage: str, partners: PartnersOfKeys = ()) -> dict[str, Match]:
    """The keys that a name may mean in a stage, each with how close the name is.

    Args:
        name: the name as which a step logs or returns a value.
        keys: all keys. By its words, a name means the key that it is closest to.
        stage: ``"train"`` or ``"val"``.
        partners: the partners of the keys. In validation they count with the stage exchanged: ``val_bpd`` where
            training logs its loss as ``train_bpd``.
    """
    found = set(words(name))
    if found & (STAGE_WORDS - _STAGES[stage]):
        return {}  # a name of the other stage
    by_words = {key: match for key in keys if (match := _match_words(found, key, stage))}
    closest = min(by_words.values(), default=None)
    result = {key: match for key, match in by_words.items() if match == closest}
    for key, names in partners if stage == "val" else ():
        beside = [count for partner in names if (count := _words_beside(found, set(words(partner)))) is not None]
        # A name that has the words of another key means that one.
        is_free = key in by_words or not by_words
        if key in keys and beside and is_free and not found <= _NEUTRAL:
            kind = Kind.CONFIRMED if found >= set(words(key)) else Kind.PARTNER
            other_words = len(found - set(words(key)) - STAGE_WORDS)
            match = by_words.get(key) or Match(kind, other_words=other_words)
            result[key] = match._replace(kind=kind, words_beside_partner=min(beside))
    return result


@lru_cache(256)
def candidates(
    returned: Names, logged: Names, keys: Names, stage: str, partners: PartnersOfKeys
) -> dict[str, Candidates]:
    """For each key, the names that a step returned or logged and that may give its loss."""
    given = (*((False, name) for name in returned), *((True, name) for name in logged))
    result = {}
    for key in keys:
        close = {name: match for _, name in given if (match := matches(name, keys, stage, partners).get(key))}
        groups = [group for group in _differ_in_a_number((*returned, *logged), key, stage) if group & close.keys()]
        numbered = tuple(dict.fromkeys(name for _, name in given if any(name in group for group in groups)))
        names = [Candidate(is_logged, name, close[name]) for is_logged, name in given if name in close]
        # What is returned comes first, and in it the key itself; of names that are as close, the first.
        names.sort(key=lambda each: (each.is_logged, not each.is_logged and each.name != key, each.match))
        result[key] = Candidates([candidate for candidate in names if candidate.name not in numbered], numbered)
    return result


def key_for(name: str) -> str:
    """The key under which a loss of this name would be recorded; empty if there is none."""
    telling = [word for word in words(name) if word not in STAGE_WORDS | _NEUTRAL]
    return "" if all(word.isdecimal() for word in telling) else "_".join(telling)


def without_stage(key: str) -> str:
    """A key without the words that tell a stage; the key itself if there are none."""
    kept = [word for word in words(key) if word not in STAGE_WORDS]
    return key if len(kept) == len(words(key)) else "_".join(kept)


def _telling(found: Iterable[str]) -> set[str]:
    return {word for word in {*found} - STAGE_WORDS - _NEUTRAL if not word.isdecimal()}


def _words_beside(found: set[str], partner: set[str]) -> int | None:
    """How many words a name has, or lacks, beside those of a partner; ``None`` if they tell something else."""
    has_other_number = any(map(str.isdecimal, found - partner)) and any(map(str.isdecimal, partner - found))
    return None if has_other_number or _telling(found ^ partner) else len((found ^ partner) - STAGE_WORDS)


def _match_words(found: set[str], key: str, stage: str) -> Match | None:
    other = found - set(words(key)) - _STAGES[stage]
    fillers = other & _FILLERS if key == "loss" else set()
    if not found >= set(words(key)) or _telling(other - fillers):
        return None
    return Match(Kind.HAS_WORDS, 0, len(fillers), not found & _STAGES[stage], len(other))


def _differ_in_a_number(names: Iterable[str], key: str, stage: str) -> list[set[str]]:
    """The groups of names that differ from each other only in a number, as ``loss_1`` and ``loss_2`` do."""
    alike = defaultdict[frozenset[str], set[str]](set)
    for name in names:
        found = set(words(name))
        is_numbered = any(word.isdecimal() for word in found - set(words(key)))
        if is_numbered and not found & (STAGE_WORDS - _STAGES[stage]):
            alike[frozenset(_telling(found))].add(name)
    return [group for group in alike.values() if len(group) > 1]
