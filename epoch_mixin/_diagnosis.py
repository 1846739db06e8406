"""Why a loss is missing, or may not be the one that the user means: all warnings about what is recorded.

Recording, ending and writing tell a `Diagnosis` what happened, and hold no sentence. It notes what the steps that did
not give a key returned and logged, and warns once for each key and stage: in training at the first such step, or at the
end of the epoch where a later step or a validation may still give the key; in validation at its end.
"""

from collections.abc import Collection
from typing import Any

from epoch_mixin._history import History
from epoch_mixin._losses import Doubt, Missing, StepLosses, entries_of
from epoch_mixin._run import STEP, Stage, Totals, given_keys, history_name
from epoch_mixin._settings import as_code
from epoch_mixin._unrecorded import Unrecorded
from epoch_mixin._values import Value
from epoch_mixin._warn import warn
from epoch_mixin._weights import BatchSize

_ALL_ZERO = "the weights of its steps are all 0; `epoch_loss_weight` or `batch_size=` must be above 0 for some of them"


class Diagnosis:
    """Tells a user what is missing and what is in doubt.

    Args:
        owner: the name of the module's class.
        history: the history that is written.
    """

    def __init__(self, owner: str, history: History) -> None:
        self.owner, self.history = owner, history
        # The topics that were told, such as ``("missing", stage, key)``.
        self._said: set[Any] = set()
        self._unrecorded = {"train": Unrecorded(), "val": Unrecorded()}
        self._has_validated = False

    def epoch_begins(self, stage: str) -> None:
        """Forget the steps of the last epoch."""
        self._unrecorded[stage] = Unrecorded()

    def step(self, stage: Stage, found: StepLosses, output: Any, logged: list[Value]) -> None:
        """Note the keys that a step did not give. Tell a key of training that no later step or validation can give."""
        for doubt in found.doubts:
            self._tell_doubt(stage, doubt, STEP[stage.name])
        for missing in found.missing:
            self._unrecorded[stage.name].add(stage, missing, output, logged)
        for missing in found.missing if stage.name == "train" else ():
            if self._is_final(missing, stage, output, found):
                self._tell_missing(stage, missing.key)

    def end_of_validation(self, val: Stage, found: StepLosses, logged: list[Value]) -> None:
        """Note what ``on_validation_epoch_end`` logged for keys that the steps had not given."""
        for doubt in found.doubts:
            self._tell_doubt(val, doubt, "on_validation_epoch_end")
        for missing in found.missing:
            self._unrecorded["val"].add_end(missing, logged)

    def training_written(self, train: Stage, totals: Totals, nan_keys: list[str], was_done: bool) -> None:
        """Tell the keys of which a written training epoch has no loss.

        Args:
            train: the stage.
            totals: the sums of the epoch, over all ranks.
            nan_keys: the keys whose mean is NaN for want of a loss.
            was_done: whether all batches of the epoch were done before a resume.
        """
        unrecorded = self._unrecorded["train"]
        self._tell_nan([key for key in nan_keys if key in totals], _ALL_ZERO)
        missing = [key for key in nan_keys if key not in totals and ("missing", "train", key) not in self._said]
        if totals:
            for key in missing:
                if key in self.history.given or not self._validation_may_give(key, train):
                    self._tell_missing(train, key)
        elif missing and (unrecorded.returned or not was_done):
            what = self._text(train, missing, given=()) if unrecorded.returned else "was not called"
            how = f'did the step return it, or self.log("train_{missing[0]}", ...) it?'
            self._tell_nan(missing, f"it {what}; {how}")

    def validation_ended(self, val: Stage, totals: Totals) -> None:
        """Tell the keys of which a validation has no loss, neither of its steps nor of its end."""
        self._has_validated = True
        unrecorded = self._unrecorded["val"]
        given = given_keys(totals)
        in_fit = val.run.trainer is not None
        start = ": no step of a validation gave a loss: "
        if totals and not any(weight for _, weight in totals.values()):
            self._say("validation", start + _ALL_ZERO)
        elif not given and (unrecorded.numbered or (in_fit and unrecorded.returned)):
            how = f'return the loss, or self.log("val_{val.keys[0]}", ...)' + self._as_one_number(val, val.keys[0])
            self._say("validation", f"{start}{STEP['val']} {self._text(val, [*val.keys], given)}; {how}")
        elif in_fit:
            given_in_training = self.history.given | given_keys(val.run.train.means)
            for key in unrecorded.returned:
                if key not in given | given_in_training:
                    self._tell_missing(val, key, given)

    def size_in_doubt(self, stage: Stage, size: BatchSize) -> None:
        """Tell that a step counts by a size that its batch does not tell for certain."""
        what = f"found no tensor in a {size.kind} that tells the batch size, so its steps count 1"
        if size.tensors:
            sizes = ", ".join(map(str, size.tensors[:9]))
            what = f"the tensors of its batch disagree about the batch size: {sizes}. The first counts"
        how = "override `epoch_loss_weight`, or say `self.log(..., batch_size=...)` in the step"
        self._say(("size", stage.name), f".{STEP[stage.name]}: {what}; {how}")

    def losses_not_in_checkpoint(self, missing: int, count: int) -> None:
        """Tell that a resume finds fewer epochs in the history than Lightning has trained."""
        how = "`epoch_history.clear()` removes them"
        self._say("resume", f": the checkpoint holds no loss of the last {missing} of {count} epochs: nan; {how}")

    def list_not_saved(self, name: Any) -> None:
        """Tell that a checkpoint leaves out something that a user has put into the history."""
        self._say(("save", str(name)), f".epoch_history[{name!r}] is not saved, for it is no list of numbers")

    def weight_was_wrong(self) -> None:
        """Tell that a checkpoint was saved in an epoch that had a wrong weight."""
        what = "had returned a negative number, NaN or infinity when the checkpoint was saved"
        self._say("weight", f".epoch_loss_weight {what}, so the mean of that epoch is nan")

    def _is_final(self, missing: Missing, train: Stage, output: Any, found: StepLosses) -> bool:
        """Whether a key that a training step did not give can come neither from a later step nor from validation."""
        key = missing.key
        entries = entries_of(output) or {}
        if missing.rejected or missing.numbered:
            return True
        # Lightning skips a step that returns None, and one that optimizes manually may log another loss each time. None
        # for a key says the same of that loss.
        if output is None or any(name in entries and entries[name] is None for name in train.keys):
            return False
        may_come = key in train.means or key in self.history.given or self._validation_may_give(key, train)
        return not (found.losses and may_come)

    def _validation_may_give(self, key: str, train: Stage) -> bool:
        trainer = train.run.trainer
        # A module that was loaded from a checkpoint has validated elsewhere.
        has_validated = self._has_validated or self.history.val_epochs
        is_to_come = trainer is not None and trainer.enable_validation and not has_validated
        return is_to_come or history_name("val", key) in self.history.means

    def _tell_missing(self, stage: Stage, key: str, given: Collection[str] = ()) -> None:
        step = STEP[stage.name]
        missing = [key, *self._unrecorded[stage.name].returned]
        what = f"{key!r} is in epoch_loss_keys, but {step} {self._text(stage, missing, given)}"
        how = f'return it as "{key}", or self.log("{stage.name}_{key}", ...)' + self._as_one_number(stage, key)
        self._say(("missing", stage.name, key), f".{step}: no {key!r} is recorded for this step: {what}; {how}")

    def _tell_nan(self, keys: list[str], why: str) -> None:
        told = [key for key in keys if self._is_new(("missing", "train", key))]
        if told:
            names, epoch = ", ".join(map(repr, told)), self.history.count - 1
            self._warn(f": no step of epoch {epoch} gave a loss for {names}, so its mean is nan: {why}")

    def _tell_doubt(self, stage: Stage, doubt: Doubt, method: str) -> None:
        curve = history_name(stage.name, doubt.key)
        closest = f"{stage.name}_{doubt.key}"
        rivals = ", ".join(map(repr, doubt.rivals))
        if not doubt.name:
            what = f"{curve!r} is the value that it returns and logs as {rivals}"
            how = f'if that is not the loss, log the loss: self.log("{closest}", ...)'
        else:
            what = f"{curve!r} is what it gives as {doubt.name!r}, but {rivals} is as close and has another value"
            is_there = closest in (doubt.name, *doubt.rivals)
            how = f'to choose, self.log("{closest}", ...), or return {{"{doubt.key}": ...}}'
            if is_there:
                how = f'to choose, log one of them under another name, or return {{"{doubt.key}": ...}}'
        self._say(("doubt", stage.name, doubt.key), f".{method}: {what}; {how}")

    def _text(self, stage: Stage, missing: list[str], given: Collection[str]) -> str:
        """What the steps that did not give some keys returned and logged, and the keys that would record it."""
        unrecorded = self._unrecorded[stage.name]
        works = [key for key in stage.keys if key in given or self._works(key, stage)]
        others = unrecorded.keys_like(missing, stage)
        if not others:
            return unrecorded.text(missing[0])
        them = "it" if len(others) == 1 else "them"
        return f"{unrecorded.text(missing[0])} (record {them} with epoch_loss_keys = {as_code((*works, *others))})"

    def _as_one_number(self, stage: Stage, key: str) -> str:
        return ", as one number such as its `.mean()`" if key in self._unrecorded[stage.name].of_tensors else ""

    def _works(self, key: str, stage: Stage) -> bool:
        """Whether training or validation has given a key."""
        in_history = key in self.history.given or history_name("val", key) in self.history.means
        return in_history or key in given_keys([*stage.run.train.means, *stage.run.val.means])

    def _say(self, topic: Any, message: str) -> None:
        if self._is_new(topic):
            self._warn(message)

    def _is_new(self, topic: Any) -> bool:
        is_new = topic not in self._said
        self._said.add(topic)
        return is_new

    def _warn(self, message: str) -> None:
        warn(f"{self.owner}{message}")
