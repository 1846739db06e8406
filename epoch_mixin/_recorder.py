"""All that is known of a module's losses, and whose run a call of its steps and hooks belongs to.

A module has the run of its latest fit, and a run of its loops without a Trainer.

- While no Trainer is at work, a call belongs to the loops.
- While one is, a call belongs to the fit if that Trainer runs the fit, is in the stage of the step or hook, and calls
  it itself. Else it is not recorded: the sanity check, ``validate``, and a step that a callback calls.
- A callback may run a second Trainer within a fit. That is then the attached one, and stays so when it is done.

`run_of_call` answers the question for all but the usual step, which asks it itself (`_steps.around_step`).
"""

from typing import Any

from torch import Tensor

from epoch_mixin._diagnosis import Diagnosis
from epoch_mixin._history import History
from epoch_mixin._lightning import attached_trainer, current_hook, is_in_stage, is_running
from epoch_mixin._run import Run, Stage


class Recorder:
    """All that is known of a module's losses.

    Args:
        owner: the name of the module's class, for messages.

    Attributes:
        history: the written epochs.
        fit: the fit that began last, with its Trainer.
        without_trainer: the loops without a Trainer.
        diagnosis: tells what is missing.
    """

    def __init__(self, owner: str) -> None:
        self.owner, self.history, self.fit, self.without_trainer = owner, History(), Run(), Run()
        self.diagnosis = Diagnosis(owner, self.history)


def run_of_call(module: Any, name: str = "") -> Run | None:
    """The run that a call of the step or hook ``name`` belongs to, or any call; ``None`` if it is not recorded."""
    recorder: Recorder = module._epoch_recorder
    fit, attached = recorder.fit, attached_trainer(module)
    trainer = next((trainer for trainer in (attached, fit.trainer) if is_running(trainer)), None)
    if trainer is None:
        return recorder.without_trainer
    if trainer is not fit.trainer or not is_running(trainer, "fit"):
        return None
    is_its_own = not name or (is_in_stage(trainer, fit.stage(name).name) and current_hook(module, name) == name)
    return fit if is_its_own else None


def stage_of_call(module: Any, name: str) -> Stage | None:
    """The stage that a call of the step or hook ``name`` belongs to; ``None`` if it is not recorded."""
    run = run_of_call(module, name)
    return run.stage(name) if run else None


def running_mean(module: Any, key: str) -> Tensor:
    """The mean so far of the open training epoch."""
    run, fit = run_of_call(module), module._epoch_recorder.fit
    # While another Trainer is at work, and after a fit that was interrupted, the fit's epoch is the open one.
    train: Stage = run.train if run and run.train.is_open else fit.train
    return train.mean(key)


def remember_trainer(module: Any) -> None:
    """Remember the Trainer of a fit, and forget what an interrupted fit has left. A checkpoint is loaded after this."""
    recorder, trainer = module._epoch_recorder, attached_trainer(module)
    within_a_fit = recorder.fit.trainer is not trainer and is_running(recorder.fit.trainer, "fit")
    if is_running(trainer, "fit") and not within_a_fit:
        recorder.fit, recorder.without_trainer = Run(trainer), Run()
