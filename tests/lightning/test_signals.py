"""A handler of signals (SLURM's requeue) may save a checkpoint between any two bytecodes."""

import math
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

import epoch_mixin
from epoch_mixin import EpochLossMixin
from tests.helpers import close, trainer
from tests.lightning.reference import Tracked, loader

OURS = str(Path(epoch_mixin.__file__).parent)


class Given(EpochLossMixin, pl.LightningModule):
    """Its losses are what it is given."""

    epoch_loss_keys = ("loss", "kl")

    def training_step(self, batch, batch_idx=0):
        return {"loss": batch, "kl": 2 * batch}

    validation_step = training_step


def at_every_bytecode(function, handler):
    """Call a function, and the handler ahead of each of our bytecodes in the course of it."""
    if sys.version_info < (3, 12):
        return with_tracing(function, handler)
    # From Python 3.12 on, tracing does not see all bytecodes.
    monitoring, tool = sys.monitoring, sys.monitoring.DEBUGGER_ID
    handling = False

    def instruction(code, _):
        nonlocal handling
        if not code.co_filename.startswith(OURS):
            return monitoring.DISABLE
        if not handling:
            handling = True
            handler()
            handling = False
        return None

    monitoring.use_tool_id(tool, "tests")
    monitoring.register_callback(tool, monitoring.events.INSTRUCTION, instruction)
    monitoring.set_events(tool, monitoring.events.INSTRUCTION)
    try:
        return function()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, None)
        monitoring.free_tool_id(tool)


def with_tracing(function, handler):
    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            sys.settrace(None)
            handler()
            sys.settrace(trace)
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)


def saved(model):
    """What a checkpoint has of training: of each key the number of written epochs, and the sums of the others."""
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    record = checkpoint["epoch_mixin"]
    epochs = [*record["ended"].get("train", ()), *(record["open"][stage]["totals"] for stage in record["open"])]
    return {
        key: (len(record["history"].get(key, ())), [totals[key] for totals in epochs if key in totals])
        for key in model.epoch_loss_keys
    }


def test_every_step_is_in_a_checkpoint_whole_or_not_at_all():
    model = Given()
    for step in range(1, 258):
        batch, seen = torch.tensor(float(step)), []
        if step not in (1, 256, 257):  # the first, and those around the update of the sums
            model.training_step(batch)
            continue
        at_every_bytecode(lambda batch=batch: model.training_step(batch), lambda seen=seen: seen.append(saved(model)))
        assert len(seen) > 100
        for key, factor in (("loss", 1), ("kl", 2)):
            sums = [[[factor * n * (n + 1) / 2, float(n)]] for n in (step - 1, step)]
            allowed = [(0, found) for found in (*sums, *([[]] if step == 1 else []))]
            assert all(found[key] in allowed for found in seen), (step, key)


def test_no_epoch_is_in_a_checkpoint_twice():
    model = Given()
    for epoch in range(2):
        seen = []
        for step in range(3):
            model.training_step(torch.tensor(step + 1.0))
        at_every_bytecode(model.on_train_epoch_end, lambda seen=seen: seen.append(saved(model)))
        assert len(seen) > 500
        for ended, sums in (found[key] for found in seen for key in found):
            assert ended + len(sums) <= epoch + 1
        assert model.epoch_losses == close([2.0] * (epoch + 1))


class Saves(Tracked):
    """Is saved within each step, by a handler of signals or by its own code."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.saved.append(saved(self)["loss"])
        return loss


def test_a_save_within_a_step_has_the_steps_before():
    model = Saves()
    model.saved = []
    trainer(max_epochs=2).fit(model, loader())
    for epoch in range(2):
        steps = [note[4:] for note in model.notes if note[:2] == ("train step", epoch)]
        for count, (ended, sums) in enumerate(model.saved[4 * epoch : 4 * epoch + 4]):
            assert ended == epoch
            total = math.fsum(loss * weight for loss, weight in steps[:count])
            weight = sum(weight for _, weight in steps[:count])
            assert sums == ([close([total, weight])] if count else [])
