"""Recording a step: its batch, what it returned and what it logged, on the way to the open epoch."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from epoch_mixin._hooks import running
from epoch_mixin._lightning import CURRENT_HOOK, TRAINER, current_hook, fetched_batch
from epoch_mixin._loop import EndedValidation, open_epoch
from epoch_mixin._losses import Logged, losses_of_step
from epoch_mixin._mean import BUFFER_SIZE, ExactMean
from epoch_mixin._names import matches
from epoch_mixin._recorder import stage_of_call
from epoch_mixin._run import LOADER, STEP, Stage
from epoch_mixin._settings import checked_weight
from epoch_mixin._values import Number, Value, as_number, as_size, place_of
from epoch_mixin._weights import BatchSize, batch_size, first_size, size_beside

__tracebackhide__ = True

# The arguments of `self.log` that reduce a value to its mean, in which alone a size is a weight.
_MEANS = ("mean", "avg", torch.mean)
# How much a step counts: a number; or what its batch tells of its size, to be judged when the step has given a loss; or
# `None` for an iterator: the step reads its batch later.
Weight = Number | BatchSize | None


def around_step(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Run a step and record its losses.

    The usual step makes no call of ours: its batch begins with a tensor, it logs nothing, and it returns a scalar as
    the only loss. In a Trainer, whose code fills the processor's caches, each call takes a microsecond or two. So the
    question whose run a call belongs to (`_recorder`) is answered here once more, for this step. What is not usual is
    left to `_prepare` and `_record`, and a compiler is told to leave those alone.
    """
    in_training = name == STEP["train"]
    prepare, record, flush = map(torch.compiler.disable, (_prepare, _record, ExactMean.flush))

    def step(module: Any, *args: Any, **kwargs: Any) -> Any:
        call = get_ident(), id(module), "step"
        if call in running:
            return method(module, *args, **kwargs)
        try:
            running[call] = None  # within `try`: an interrupt right behind it must not leave it there
            attributes = vars(module)
            recorder = attributes.get("_epoch_recorder")
            run = None
            # If Lightning keeps its Trainer elsewhere, `_prepare` finds it.
            if recorder is not None and TRAINER in attributes:
                trainer = attributes[TRAINER]
                if trainer is None:
                    run = recorder.without_trainer
                elif (
                    trainer is recorder.fit.trainer  # not the Trainer of a callback
                    and attributes.get(CURRENT_HOOK) == name  # not called by a callback
                    and str.__eq__(trainer.state.status, "running")  # not after an interrupt
                    and str.__eq__(trainer.state.fn, "fit")  # not in `validate`
                ):
                    run = recorder.fit  # also in the sanity check: no validation is open then, so `_prepare` decides
            stage = run and (run.train if in_training else run.val)

            batch = args[0] if args else None
            first = batch[0] if type(batch) in (tuple, list) and batch else batch
            if stage is not None and stage.size_is_length and type(first) is Tensor and first.ndim:
                mean, weight = stage.fast_mean, first.size(0)
            else:
                stage, batch, weight = prepare(module, name, args, kwargs)
                mean = None
            if stage is None:
                return method(module, *args, **kwargs)

            running[call] = logged = Logged()
            logged.stage = stage
            output = method(module, *args, **kwargs)

            loss: float | Tensor | None = None
            if mean is not None and not logged and type(output) is Tensor and not output.ndim:
                try:
                    if output.is_cpu:
                        loss = output.item()
                    elif output.is_cuda and output.is_floating_point() and output.data_ptr():
                        loss = output.data.to(torch.float64, copy=True)
                except Exception:  # `_record` reports it
                    pass
            if mean is not None and type(loss) in (float, Tensor):
                mean.buffer.append((loss, weight))
                if len(mean.buffer) >= BUFFER_SIZE:
                    flush(mean)
            else:
                loader = args[2] if len(args) > 2 else kwargs.get("dataloader_idx")
                record(module, stage, batch, loader, weight, output, logged)
            return output
        finally:
            running.pop(call, None)

    return step


def note_log(module: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Note what a running step, or the end of a validation, gives to ``self.log`` or ``self.log_dict``."""
    logged = running.get((get_ident(), id(module), "step"))
    if not isinstance(logged, Logged):
        return NotImplemented
    # A step that optimizes manually calls hooks, and those of callbacks, which may log, too.
    if current_hook(module) not in (None, STEP[logged.stage.name], "on_validation_epoch_end"):
        return NotImplemented
    before = len(logged)
    logged.extend(_logged_values(logged.stage, args, kwargs, at_end=isinstance(logged, EndedValidation)))
    # The `log` of a user may take other arguments, and call the one of Lightning within.
    return None if len(logged) > before else NotImplemented


def _logged_values(stage: Stage, args: Any, kwargs: Any, at_end: bool) -> Iterator[Value]:
    """What is given to ``self.log`` or ``self.log_dict``, in a step or at the end of a validation."""
    given = args[0] if args else kwargs.get("name", kwargs.get("dictionary"))
    if isinstance(given, str):
        given = {given: args[1] if len(args) > 1 else kwargs.get("value")}
    size = as_size(kwargs["batch_size"]) if "batch_size" in kwargs and _is_mean(**kwargs) else None
    for name, value in given.items() if isinstance(given, Mapping) else ():
        if not isinstance(name, str):
            continue  # the `log_dict` of a user may take other names
        means_key = bool(matches(name, stage.keys, *stage.naming()))
        if isinstance(value, Metric):
            value = _metric_value(value, at_end and means_key)
        yield Value(name, value, place_of(value), as_number(value) if means_key else None, size)


def _is_mean(reduce_fx: Any = "mean", **_: Any) -> bool:
    return (reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx) in _MEANS


def _metric_value(metric: Metric, at_end: bool) -> Any:
    """The value of a metric's latest call, ``None`` if it was only updated; at the end, its value for all batches."""
    with suppress(Exception):  # it may not be able to compute yet
        return metric.compute() if at_end else metric._forward_cache
    return None


def _prepare(module: Any, name: str, args: Any, kwargs: Any) -> tuple[Stage | None, Any, Weight]:
    """Give the stage, the batch and the weight of a step before it runs, for it may change its batch.

    No stage: the step is not recorded.
    """
    stage = stage_of_call(module, name)
    if stage is None:
        return None, None, None
    if not stage.is_open:
        open_epoch(module, stage)
    batch = args[0] if args else kwargs.get(next(iter(inspect.signature(getattr(module, name)).parameters), ""))
    return stage, batch, None if hasattr(type(batch), "__next__") else _weigh(module, stage, batch)


def _weigh(module: Any, stage: Stage, batch: Any) -> Weight:
    if not stage.weight_is_default:
        return checked_weight(module.epoch_loss_weight(batch), type(module).__name__)
    # To look through a whole batch takes long, and those of a dataloader are alike.
    length = first_size(batch) if stage.size_is_length else None
    return batch_size(batch) if length is None else length


def _record(
    module: Any, stage: Stage, batch: Any, loader: Any, weight: Weight, output: Any, logged: list[Value]
) -> None:
    """Add the losses of a step to its epoch."""
    if weight is None:
        batch, loader = fetched_batch(batch, loader)
        weight = _weigh(module, stage, batch)
    diagnosis = module._epoch_recorder.diagnosis
    source = f"{LOADER}{loader}" if stage.name == "val" and isinstance(loader, int) else ""
    is_first = not stage.means
    found = losses_of_step(stage, output, logged)
    size = weight if isinstance(weight, BatchSize) else None
    for key, loss, own_size in found.losses:
        loss_weight: Any
        if own_size is not None and stage.weight_is_default:
            loss_weight = own_size
        elif size is not None:
            loss_weight = _size(size, stage, logged, diagnosis)
        else:
            loss_weight = weight
        stage.add(key + source, loss, loss_weight)
    if is_first and found.losses:
        stage.size_is_length = size is not None and size.agreed is not None
        # Not where there are several keys, or several dataloaders.
        is_usual = stage.size_is_length and [*stage.means] == ["loss"] and len(stage.keys) == 1
        stage.fast_mean = stage.means["loss"] if is_usual else None
    if found.missing or found.doubts:
        diagnosis.step(stage, found, output, logged)


def _size(size: BatchSize, stage: Stage, logged: list[Value], diagnosis: Any) -> Number:
    """How much a step counts by its batch; where that does not tell for certain, by what the step logged."""
    known = next((number for number in (size.agreed, size_beside(logged), size.itself) if number is not None), None)
    if known is None:
        diagnosis.size_in_doubt(stage, size)
        return size.inferred
    return known
