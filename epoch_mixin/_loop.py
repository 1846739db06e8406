"""The life of an epoch in Lightning's loops, and in loops without a Trainer.

An epoch *begins* with Lightning's start hook and takes the losses of its steps. It *ends* on this rank with the end
hook, ahead of the user's own, and is *written to the history* where all ranks synchronize: at the end of a training
epoch, and of a validation if no rank can be elsewhere. Without a Trainer, the hooks that the user calls do the same.

**A resume.** The sums start from those in the checkpoint. Lightning goes on in one of three ways. The mark of the epoch
in the checkpoint, its index, tells which:

1. It goes on in the epoch that was open. The epoch stays open.
2. It goes on after the epoch that was open, and never calls its end hook. We end the epoch.
3. Under ``max_steps``, it goes on in the epoch that had just ended. We take it back from the history, and open it.
"""

import math
from typing import Any

from epoch_mixin._lightning import batch_index, has_batches, trained_part
from epoch_mixin._losses import Logged, losses_of_step
from epoch_mixin._ranks import all_validate_together, combined, gather, ranks_of
from epoch_mixin._recorder import run_of_call, stage_of_call
from epoch_mixin._run import Run, RunState, Stage, Totals, added, given_keys
from epoch_mixin._settings import check_keys, check_sums


class EndedValidation(Logged):
    """A validation whose steps are over, and what the user's ``on_validation_epoch_end`` logs.

    Attributes:
        totals: the sums of the steps, over all ranks if they have synchronized.
        missing: the keys of which no step gave a loss.
        is_written: whether the ranks have synchronized, so that the validation is written.
    """

    def __init__(self, stage: Stage, totals: Totals, missing: set[str], is_written: bool) -> None:
        super().__init__()
        self.stage = stage
        self.totals = totals
        self.missing = missing
        self.is_written = is_written


def open_epoch(module: Any, stage: Stage) -> None:
    """Open an epoch in place of one that may be open."""
    check_keys(module.epoch_loss_keys, type(module).__name__)
    weight_is_default = getattr(module.epoch_loss_weight, "is_default", False)
    stage.begin(module.epoch_loss_keys, _mark(stage), weight_is_default)
    module._epoch_recorder.diagnosis.epoch_begins(stage.name)


def _mark(stage: Stage) -> Any:
    """What tells an epoch from the next: its index; for a validation, the index of the latest training batch."""
    trainer = stage.run.trainer
    if trainer is None:
        return None
    return trainer.current_epoch if stage.name == "train" else batch_index(trainer)


def begin(module: Any, name: str, *_: Any) -> None:
    """Begin an epoch, unless it is already open, restored from a checkpoint."""
    stage = stage_of_call(module, name)
    if stage is None:
        return
    if stage.run.trainer is None:
        open_epoch(module, stage)
        return
    if stage.name == "train":
        stage.begun_at = batch_index(stage.run.trainer)
        if stage.run.is_resuming:
            _resume(module, stage)
    if stage.is_open and stage.mark != _mark(stage):
        end(module, stage)  # a validation that was open in a checkpoint, and that Lightning does not go on with
    if not stage.is_open:
        open_epoch(module, stage)


def _resume(module: Any, train: Stage) -> None:
    """Go on from a checkpoint, in one of the three ways that are listed above."""
    history = module._epoch_recorder.history
    current = _mark(train)
    train.run.is_resuming = False
    # In way 1, the open epoch goes on as it is.
    if train.is_open and train.mark != current:  # way 2
        _fill(module, (current if train.mark is None else train.mark) - len(train.ended))
        end(module, train)
    elif not train.is_open and train.last["mark"] == current:  # way 3
        totals = train.last["totals"]
        history.resize({*module.epoch_loss_keys, *totals}, history.count - 1)
        open_epoch(module, train)
        train.resumed_totals = totals
    _fill(module, current - len(train.ended))


def _fill(module: Any, count: int) -> None:
    """Fill the history with NaN up to this many epochs, if the checkpoint holds no losses of them.

    Epochs that have ended and are not written do not count: a signal handler may have saved the checkpoint between.
    """
    recorder = module._epoch_recorder
    missing = count - recorder.history.count
    if missing > 0:
        recorder.history.resize(module.epoch_loss_keys, count)
        recorder.diagnosis.losses_not_in_checkpoint(missing, count)


def end_resumed(module: Any, *_: Any) -> None:
    """End a restored epoch if Lightning found nothing left to do, so that it ran no end hook.

    An epoch that was not restored is open here only if the fit was interrupted in it, and stays open.
    """
    fit: Run = module._epoch_recorder.fit
    if run_of_call(module) is fit and fit.train.resumed_totals:
        end(module, fit.train)


def end_training(module: Any, name: str, *_: Any) -> None:
    """End a training epoch, ahead of the user's hook, which finds its mean in the history."""
    train = stage_of_call(module, name)
    # In a fit this hook may be called twice, by Lightning and by a callback. A loop need not open its epochs.
    if train is not None and (train.is_open or train.run.trainer is None):
        end(module, train)


def end_validation(module: Any, name: str, *_: Any) -> EndedValidation | None:
    """End a validation, ahead of the user's hook, which finds the mean of its steps in the history."""
    val = stage_of_call(module, name)
    if val is None or not val.is_open:
        return None
    state = end(module, val)
    keys = state["keys"] if state else val.keys
    totals = val.last["totals"]
    return EndedValidation(val, totals, {*keys} - given_keys(totals), is_written=state is not None)


def add_logged_at_end(module: Any, ended: EndedValidation | None) -> None:
    """Where no step gave a loss, take the one that the user's hook logged, as in Lightning's 2.0 migration guide.

    It counts like a validation of one step on each rank, for which the ranks synchronize once more.
    """
    if ended is None:
        return
    val, totals = ended.stage, ended.totals
    diagnosis = module._epoch_recorder.diagnosis
    if ended.missing:
        step = losses_of_step(val, None, ended)
        step = step.of_keys(ended.missing)
        diagnosis.end_of_validation(val, step, ended)
        val.begin(val.keys, val.mark)
        for key, loss in {each.key: each.loss for each in step.losses}.items():
            val.add(key, loss, 1.0)
        end(module, val)
        totals = added([totals, val.last["totals"]])
        if not ended.is_written:  # what the steps gave and what the hook logged are one validation
            val.ended[-2:] = [added(val.ended[-2:])]
    if ended.is_written:
        diagnosis.validation_ended(val, totals)


def end(module: Any, stage: Stage) -> RunState | None:
    """End an epoch on this rank. If all ranks synchronize here, write it, and return what `synchronize` returns."""
    run, in_training = stage.run, stage.name == "train"
    if in_training and run.val.is_open:
        end(module, run.val)  # without a Trainer, nobody need call the end hook of a validation
    stage.end(ranks_of(run.trainer).is_first)
    if in_training:
        state = synchronize(module, run)
        for totals in state["ended"]["val"]:
            module._epoch_recorder.diagnosis.validation_ended(run.val, totals)
        return state
    return synchronize(module, run, part=_trained_part(run)) if all_validate_together(module, run.trainer) else None


def synchronize(module: Any, run: Run, with_open: bool = False, part: float = math.nan) -> RunState:
    """Combine what all ranks have ended, and write it to the history.

    Args:
        module: the module.
        run: the run.
        with_open: whether to combine the open epochs, too.
        part: which part of the training epoch had been trained, if a validation ends here.

    Returns:
        The state of all ranks together; the ended epochs in it are now written.
    """
    ranks = ranks_of(run.trainer)
    state = combined(gather(run.trainer, run.state(ranks.is_first, with_open)), ranks.share)
    run.val.ended, run.train.ended = [], []
    for stage in (run.val, run.train):
        for totals in state["ended"][stage.name]:
            stage.last["totals"] = totals
            _write(module, stage, totals, part)
    return state


def _write(module: Any, stage: Stage, totals: Totals, part: float) -> None:
    """Write an epoch to the history."""
    recorder, trainer = module._epoch_recorder, stage.run.trainer
    check_sums(totals, recorder.owner, recorder.history.count)
    nan_keys = recorder.history.write(stage.name, totals, module.epoch_loss_keys, part)
    if stage.name == "train":
        # After some resumes Lightning finds no batch left, so that no step is missing.
        was_done = trainer is not None and has_batches(trainer) and stage.begun_at == batch_index(trainer)
        recorder.diagnosis.training_written(stage, totals, nan_keys, was_done)


def _trained_part(run: Run) -> float:
    """Which part of the open training epoch has been trained, from 0 to 1; NaN if that is not known."""
    if run.trainer is None:
        return math.nan if run.train.means else 0.0
    index = batch_index(run.trainer)
    has_begun = index != run.train.begun_at or run.train.resumed_totals
    if not (run.train.is_open and has_begun):
        return 0.0  # a user validates in `on_train_start`, or in `on_train_epoch_end`
    # A validation from a checkpoint may end some batches later.
    return math.nan if run.val.mark is None else trained_part(run.trainer, index - run.val.mark)
