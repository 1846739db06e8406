"""The life of an epoch in Lightning's loops, and in loops without a Trainer.

An epoch *begins* with Lightning's start hook and takes the losses of its steps. It *ends* on this rank with the end
hook, ahead of the user's own, and is *written to the history* where all ranks synchronize: at the end of a training
epoch, and of a validation if no rank can be elsewhere. Without a Trainer the hooks that the user calls do the same, in
a run of their own.

After a *resume*, the sums begin with those of the checkpoint. Lightning may go on in the epoch that was open. Or it
goes on behind it and never calls its end hook, so that the next epoch's beginning ends it. Or, under ``max_steps``, it
goes on in the epoch at whose end it saved, which is then taken back. The mark of an epoch tells which.
"""

import math
from typing import Any

from torch import Tensor

from epoch_mixin._history import LOADER, Epochs, History, Run, Totals, added
from epoch_mixin._lightning import attached_trainer, batches, current_hook, is_running, is_within_epoch
from epoch_mixin._losses import described, losses_of_step
from epoch_mixin._ranks import all_validate_together, combined, gather, ranks_of
from epoch_mixin._warn import warn

STEP = {"train": "training_step", "val": "validation_step"}


class Recorder:
    """All that is known of a module's losses.

    Args:
        owner: the name of the module's class, for messages.

    Attributes:
        history: the written epochs.
        fit: the fit that began last, with its Trainer. A callback may attach another one to the module.
        without_trainer: the loops without a Trainer.
    """

    def __init__(self, owner: str) -> None:
        self.owner, self.history, self.fit, self.without_trainer = owner, History(), Run(), Run()
        self._warned: set[str] = set()

    def warn_once(self, topic: str, message: str) -> None:
        """Warn unless there was a warning of that topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            warn(f"{self.owner}{message}")

    def warn_missing(self, key: str, step: str, fault: str) -> None:
        """Warn once of a key that a step did not give."""
        self.warn_once(key, f".{step}: no {key!r} is recorded: {key!r} is in epoch_loss_keys, but {step} {fault}")


def check_keys(keys: Any, owner: str) -> None:
    """Raise if ``owner.epoch_loss_keys`` is not what it must be."""
    if not (isinstance(keys, tuple) and keys and all(isinstance(key, str) for key in keys)):
        raise TypeError(f'{owner}.epoch_loss_keys must be a tuple of strings such as ("loss",), not {keys!r}')
    if len({*keys, *("val_" + key for key in keys)}) < 2 * len(keys):
        raise ValueError(f"{owner}.epoch_loss_keys has keys that share a name in the history: {keys!r}")


def trainer_at_work(module: Any) -> Any:
    """The Trainer that runs the module: the attached one; or the fit's, if another one was attached and is done."""
    trainers = (attached_trainer(module), module._epoch_recorder.fit.trainer)
    return next((trainer for trainer in trainers if is_running(trainer)), None)


def run_of_call(module: Any, name: str = "") -> Any:
    """The run that records a call of the step or hook ``name``, or of any; ``None`` if the call is not recorded.

    While a Trainer is at work, only what it calls itself is recorded, in the right stage of the module's fit.
    """
    recorder, trainer = module._epoch_recorder, trainer_at_work(module)
    if trainer is None:
        return recorder.without_trainer
    fits = trainer is recorder.fit.trainer and is_running(trainer, "fit")
    in_stage = not name or str.__eq__(trainer.state.stage or "", "train" if "train" in name else "validate")
    return recorder.fit if fits and in_stage and (not name or current_hook(module, name) == name) else None


def epochs_of_call(module: Any, name: str) -> Any:
    """The epochs that record a call of the step or hook ``name``; ``None`` if the call is not recorded."""
    run = run_of_call(module, name)
    return run and (run.train if "train" in name else run.val)


def running_mean(module: Any, key: str) -> Tensor:
    """The mean so far of the open training epoch: of a loop, if no Trainer is running, else of the fit."""
    fit, loop = module._epoch_recorder.fit.train, module._epoch_recorder.without_trainer.train
    return (loop if loop.is_open and trainer_at_work(module) is None else fit).mean(key)  # type: ignore[no-any-return]


def set_up(module: Any) -> None:
    """Remember the Trainer of a fit, and forget what an interrupted fit has left. A checkpoint is loaded after this."""
    recorder, trainer = module._epoch_recorder, attached_trainer(module)
    within_a_fit = recorder.fit.trainer is not trainer and is_running(recorder.fit.trainer, "fit")
    if is_running(trainer, "fit") and not within_a_fit:
        recorder.fit, recorder.without_trainer = Run(trainer), Run()


def open_epoch(module: Any, epochs: Epochs) -> None:
    """Open an epoch in place of one that may be open."""
    check_keys(module.epoch_loss_keys, type(module).__name__)
    epochs.begin(module.epoch_loss_keys, _mark(epochs))


def _mark(epochs: Epochs) -> Any:
    """A number that is another one for each epoch of a fit, also after a resume."""
    trainer = epochs.run.trainer
    return trainer and (trainer.current_epoch if epochs.stage == "train" else batches(trainer))


def begin(module: Any, name: str, *_: Any) -> None:
    """Begin an epoch, unless it is already open, restored from a checkpoint."""
    epochs = epochs_of_call(module, name)
    if epochs is not None and epochs.run.trainer is None:
        open_epoch(module, epochs)
    elif epochs is not None:
        if epochs.stage == "train" and epochs.run.resumes:
            _resume(module, epochs)
        if epochs.is_open and epochs.mark != _mark(epochs):
            end(module, epochs)
        if not epochs.is_open:
            open_epoch(module, epochs)
        epochs.batches = batches(epochs.run.trainer)


def _resume(module: Any, train: Epochs) -> None:
    """Go on from a checkpoint. The first epoch gets the index that Lightning has for it."""
    recorder, history, current = module._epoch_recorder, module._epoch_recorder.history, _mark(train)
    train.run.resumes = False
    if not train.is_open and train.last["mark"] == current:  # it goes on in the epoch at whose end it saved
        history.resize({*module.epoch_loss_keys, *train.last["totals"]}, history.epochs - 1)
        open_epoch(module, train)
        train.resumed = train.last["totals"]
    index = (train.mark if train.is_open and train.mark is not None else current) - len(train.ended)
    if (missing := index - history.epochs) > 0:
        history.resize(module.epoch_loss_keys, index)
        recorder.warn_once("resume", f": the checkpoint holds no loss of the last {missing} of {index} epochs: nan")


def end_resumed(module: Any, *_: Any) -> None:
    """End a restored epoch if Lightning found nothing left to do, so that it ran no end hook."""
    fit = module._epoch_recorder.fit
    if run_of_call(module) is fit and fit.train.resumed:
        end(module, fit.train)


def end_training(module: Any, name: str, *_: Any) -> None:
    """End a training epoch, ahead of the user's hook, which finds its mean in the history."""
    end(module, epochs_of_call(module, name))


def end_validation(module: Any, name: str, *_: Any) -> Any:
    """End a validation, ahead of the user's hook; return what `add_logged_at_end` needs.

    That is the epochs, a list for what the hook logs, the keys without a loss, and why they have none.
    """
    val = epochs_of_call(module, name)
    if val is None or not val.is_open:
        return None
    fault, val.fault = val.fault, ""  # no fault yet: the user's hook may log the loss
    state = end(module, val) or val.run.state(with_open=False)
    given = {key.partition(LOADER)[0] for key in val.last["totals"]}
    return val, [], [key for key in state["keys"] if key not in given], "" if given else fault


def add_logged_at_end(module: Any, noted: Any) -> None:
    """Where no step gave a loss, take the one that the user's hook logged, as in Lightning's 2.0 migration guide.

    It counts like a validation of one step on each rank.
    """
    if noted and noted[2]:
        val, logged, missing, fault = noted
        losses = {key: loss for key, loss, _ in losses_of_step(val, None, logged)[0]}
        also = f", and on_validation_epoch_end {described(None, logged, val.keys)}" if logged else ""
        val.begin(val.keys, val.mark)
        for key in losses.keys() & missing:
            val.add(key, losses[key], 1.0)
        val.fault = fault and fault + also
        end(module, val)
        if val.ended:  # not written yet: what the steps gave and what the hook logged are one validation
            val.ended[-2:] = [added(val.ended[-2:])]


def end(module: Any, epochs: Epochs | None) -> dict[str, Any] | None:
    """End an epoch; if all ranks synchronize here, write it and return what `synchronize` returns."""
    trainer = epochs and epochs.run.trainer
    if epochs is None or (trainer is not None and not epochs.is_open):
        return None  # a callback calls the hook itself
    in_training = epochs.stage == "train"
    if in_training and epochs.run.val.is_open:  # a validation that nobody ended
        end(module, epochs.run.val)
    epochs.end(ranks_of(trainer)[1])
    # After some resumes Lightning does not even look for a batch, so that no step is missed.
    skipped = trainer is not None and epochs.batches == batches(trainer) and is_within_epoch(trainer)
    if in_training and not epochs.ended[-1] and not skipped:
        epochs.fault = epochs.fault or "was not called"
    return synchronize(module, epochs.run) if in_training or all_validate_together(module, trainer) else None


def synchronize(module: Any, run: Run, with_open: bool = False) -> dict[str, Any]:
    """Combine what all ranks have ended and write it to the history.

    Returns:
        `Run.state` of all ranks together, without what is now written.
    """
    _, is_first, share = ranks_of(run.trainer)
    state = combined(gather(run.trainer, run.state(is_first, with_open)), share)
    run.val.ended, run.train.ended = [], []
    for epochs in (run.val, run.train):
        for totals in state["ended"][epochs.stage]:
            epochs.last["totals"] = totals
            _write(module, epochs, totals)
    return {**state, "last": run.train.last, "ended": {}}


def _write(module: Any, epochs: Epochs, totals: Totals) -> None:
    """Write an epoch to the history, and say why it has no loss."""
    recorder, history, keys = module._epoch_recorder, module._epoch_recorder.history, module.epoch_loss_keys
    epoch, step, fault, trainer = history.epochs, STEP[epochs.stage], epochs.fault, epochs.run.trainer
    all_zero = "the weights of its steps are all 0"
    if not all(math.isfinite(weight) for _, weight in totals.values()):
        what = f"a negative number, NaN or infinity in epoch {epoch}"
        raise ValueError(f"{recorder.owner}.epoch_loss_weight returned {what}")
    missing = history.write(epochs.stage, totals, keys)
    if epochs.stage == "val" and (fault if not totals else not any(weight for _, weight in totals.values())):
        why = all_zero if totals else f'{step} {fault}; return the loss, or self.log("val_{keys[0]}", ...)'
        recorder.warn_once("val", f": no step of a validation gave a loss: {why}")
    # A key that only validation gives is no fault of training; it may come with the first validation.
    if totals and trainer is not None and trainer.enable_validation and not history.val_epochs:
        missing = [key for key in missing if key in history.given]
    for key in missing if totals and fault else ():
        recorder.warn_missing(key, step, fault)
    if missing and (totals or fault):
        why = f'did the step return it, or self.log("train_{missing[0]}", ...) it?'
        why = all_zero if missing[0] in totals else why if totals else f"it {fault}; {why}"
        message = f"no step of epoch {epoch} gave a loss for {missing[0]!r}, so its mean is nan: {why}"
        recorder.warn_once(f"nan {missing[0]}", f": {message}")
