import math
import random
import time

import pytest
import pytorch_lightning as pl
import torch

from tests.helpers import trainer
from tests.lightning.processes import CONTEXT, kill, start
from tests.lightning.reference import Tracked, assert_exact, loader


EPOCHS = 20


class Beacon(pl.Callback):
    """Sends a byte from every hook."""

    def __init__(self, connection):
        for hook in (
            "on_train_batch_start",
            "on_train_batch_end",
            "on_validation_batch_end",
            "on_validation_end",
            "on_train_epoch_end",
            "on_save_checkpoint",
        ):
            setattr(self, hook, lambda *args, **kwargs: connection.send_bytes(b"."))


def newest_checkpoint(root):
    """The newest checkpoint that was written to its end, if there is one."""
    for path in sorted(root.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:  # whatever half a file may raise
            continue
        return path
    return None


def train(root, connection):
    callbacks = [
        Beacon(connection),
        pl.callbacks.ModelCheckpoint(root, "{step}", save_top_k=-1, every_n_train_steps=2),
        pl.callbacks.ModelCheckpoint(root, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=False),
    ]
    model = Tracked()
    runner = trainer(max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True)
    runner.fit(model, loader(17), loader(5, 3), ckpt_path=newest_checkpoint(root))
    return model.notes, model.epoch_history


def train_until(root, signs, delay):
    """Train in a new process and kill it a moment after so many signs of life, or let it go on for ever.

    Returns what it returned, or ``None`` if it was killed.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process, answer = start(train, root, theirs)
    theirs.close()
    try:
        while signs > 0:
            assert ours.poll(60), "the process hangs"
            try:
                ours.recv_bytes()
            except EOFError:
                break
            signs -= 1
        else:
            time.sleep(delay)
            return None
        assert answer.poll(60), "the process hangs"
        fine, result = answer.recv()
        assert fine, result
        return result
    finally:
        kill(process)
        ours.close()
        answer.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(tmp_path, seed):
    rng = random.Random(seed)
    # An epoch gives 6 x 2 + 2 + 1 + 1 signs of life and some more, so that the kills are over before the epochs are.
    kills = [(rng.randint(1, 16), rng.uniform(0, 0.003)) for _ in range(EPOCHS)]
    assert [train_until(tmp_path, *moment) for moment in kills] == [None] * EPOCHS
    notes, history = train_until(tmp_path, math.inf, 0)
    assert len(history["loss"]) == EPOCHS
    assert_exact(history, notes)
