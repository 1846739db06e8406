"""Recording a step: its batch, what it returned and what it logged, on the way to the open epoch."""

import inspect
from collections.abc import Callable
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor

from epoch_mixin._epochs import STEP, epochs_of_call, open_epoch
from epoch_mixin._history import LOADER, Epochs
from epoch_mixin._hooks import running
from epoch_mixin._lightning import CURRENT_HOOK, TRAINER, current_hook, fetched_batch
from epoch_mixin._losses import Value, batch_sizes, checked_weight, described, entries_of, logged_values, losses_of_step
from epoch_mixin._mean import BUFFER_SIZE, ExactMean

__tracebackhide__ = True


def around_step(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Run a step and record its losses.

    The usual step makes no call of ours: its batch begins with a tensor, it logs nothing, and it returns a scalar as
    the only loss. In a Trainer, whose code fills the processor's caches, each call takes a microsecond or
    two. What is not usual is left to `_prepare` and `_record`, and a compiler is told to leave those alone.
    """
    in_training = name == STEP["train"]
    prepare, record, flush = map(torch.compiler.disable, (_prepare, _record, ExactMean.flush))

    def step(module: Any, *args: Any, **kwargs: Any) -> Any:
        call = get_ident(), id(module), "step"
        if call in running:
            return method(module, *args, **kwargs)
        try:
            running[call] = loss = None  # within `try`: an interrupt must not leave it there
            attributes, batch = vars(module), args[0] if args else None
            recorder, trainer = attributes.get("_epoch_recorder"), attributes.get(TRAINER, ...)
            run = recorder and (recorder.fit if trainer else recorder.without_trainer)
            is_called = run and run.trainer is trainer and (not trainer or attributes.get(CURRENT_HOOK) == name)
            if is_called and trainer:
                is_called = str.__eq__(trainer.state.status, "running") and str.__eq__(trainer.state.fn, "fit")
            epochs = (run.train if in_training else run.val) if is_called else None
            first = batch[0] if type(batch) in (tuple, list) and batch else batch
            if epochs and epochs.sizes and len(epochs.sizes) == 1 and type(first) is Tensor and first.ndim:
                mean, weight = epochs.usual_mean, first.size(0)
            else:
                mean, (epochs, batch, weight) = None, prepare(module, name, args, kwargs)
            if epochs is None:
                return method(module, *args, **kwargs)

            logged: list[Value] = []
            running[call] = epochs, logged
            output = method(module, *args, **kwargs)

            if mean is not None and not logged and type(output) is Tensor and not output.ndim:
                try:
                    if output.is_cpu:
                        loss = output.item()
                    elif output.is_cuda and output.is_floating_point() and output.data_ptr():
                        loss = output.data.to(torch.float64, copy=True)  # type: ignore[assignment]
                except Exception:  # `_record` says why
                    pass
            if mean is not None and type(loss) in (float, Tensor):
                mean.buffer.append((loss, weight))
                if len(mean.buffer) >= BUFFER_SIZE:
                    flush(mean)
            else:
                loader = args[2] if len(args) > 2 else kwargs.get("dataloader_idx")
                record(module, epochs, batch, loader, weight, output, logged)
            return output
        finally:
            running.pop(call, None)

    return step


def note_log(module: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Note what a running step, or the end of a validation, gives to ``self.log`` or ``self.log_dict``."""
    epochs, logged, *at_end = running.get((get_ident(), id(module), "step")) or cast(Any, (None, []))
    before = len(logged)
    # A step that optimizes manually calls hooks, and those of callbacks, which may log, too.
    if epochs and current_hook(module) in (None, STEP[epochs.stage], "on_validation_epoch_end"):
        logged += logged_values(epochs, args, kwargs, bool(at_end))
    return None if len(logged) > before else NotImplemented


def _prepare(module: Any, name: str, args: Any, kwargs: Any) -> tuple[Epochs | None, Any, Any]:
    """Give the epoch, the batch and the weight of a step before it runs, for it may change its batch.

    No epoch: the step is not recorded. No weight: it shows when the step has run.
    """
    epochs = epochs_of_call(module, name)
    if epochs is None:
        return None, None, None
    if not epochs.is_open:
        open_epoch(module, epochs)
    batch = args[0] if args else kwargs.get(next(iter(inspect.signature(getattr(module, name)).parameters), ""))
    # The step itself reads an iterator.
    return epochs, batch, None if hasattr(type(batch), "__next__") else _weight(module, epochs, batch)


def _weight(module: Any, epochs: Epochs, batch: Any) -> Any:
    if epochs.sizes is None and getattr(module.epoch_loss_weight, "is_default", False):
        epochs.sizes = batch_sizes(batch)
    return checked_weight(module.epoch_loss_weight(batch), type(module).__name__)


def _record(
    module: Any, epochs: Epochs, batch: Any, loader: Any, weight: Any, output: Any, logged: list[Value]
) -> None:
    """Add the losses of a step to its epoch, and note for a message why a key has none."""
    step, keys, in_training = STEP[epochs.stage], epochs.keys, epochs.stage == "train"
    if weight is None:
        batch, loader = fetched_batch(batch, loader)
        weight = _weight(module, epochs, batch)
    source = "" if in_training or not isinstance(loader, int) else f"{LOADER}{loader}"
    # Lightning differentiates what a training step returns, unless the module optimizes manually.
    losses, faults = losses_of_step(epochs, output, logged, bare_first=in_training and module.automatic_optimization)
    for key, loss, size in losses:
        epochs.add(key + source, loss, weight if size is None or epochs.sizes is None else size)
    if epochs.sizes is not None and len(epochs.sizes) != 1 and any(size is None for *_, size in losses):
        what = f"the tensors of its batch disagree about the batch size: {', '.join(map(str, epochs.sizes[:9]))}."
        none = f"found no tensor in a {type(batch).__name__} that tells the batch size, so its steps count 1;"
        hint = "override `epoch_loss_weight`, or say `self.log(..., batch_size=...)` in the step"
        what = f"{what} The first counts; {hint}" if epochs.sizes else f"{none} {hint}"
        module._epoch_recorder.warn_once(f"{step} sizes", f".{step}: {what}")
    if keys == ("loss",):
        epochs.usual_mean = epochs.means.get("loss")
    if faults and (in_training or (epochs.mark is not None and not losses)):
        what, entries = described(output, logged, keys), entries_of(output) or {}
        for key, fault in faults.items() if in_training else ():
            # Lightning skips a step that returns None; None for a key says the same of that loss.
            if fault or not (losses or output is None or None in (entries.get(key, ...) for key in keys)):
                module._epoch_recorder.warn_missing(key, step, fault or what)
        given = [fault for fault in faults.values() if fault and entries]
        epochs.fault = epochs.fault or " and ".join([what, *given[:1]])
