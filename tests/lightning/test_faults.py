import random
import time

import pytest
import pytorch_lightning as pl
import torch

from tests.helpers import trainer
from tests.lightning.processes import CONTEXT, kill, run, start
from tests.lightning.reference import Tracked, assert_exact, loader

EPOCHS = 20


class Beacon(pl.Callback):
    """Sends a byte from every hook."""

    def __init__(self, connection):
        self.connection = connection

    def send(self, *args, **kwargs):
        self.connection.send_bytes(b".")

    on_train_batch_start = on_train_batch_end = on_train_epoch_end = send
    on_validation_batch_end = on_validation_end = on_save_checkpoint = send


def newest_checkpoint(root):
    """The newest checkpoint that was written to its end, if there is one."""
    for path in sorted(root.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:  # whatever half a file may raise
            continue
        return path
    return None


def train(root, *callbacks):
    saving = [
        pl.callbacks.ModelCheckpoint(root, "{step}", save_top_k=-1, every_n_train_steps=2),
        pl.callbacks.ModelCheckpoint(root, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=False),
    ]
    model = Tracked()
    runner = trainer(max_epochs=EPOCHS, callbacks=[*callbacks, *saving], enable_checkpointing=True)
    runner.fit(model, loader(17), loader(5, 3), ckpt_path=newest_checkpoint(root))
    return model.notes, model.epoch_history


def train_and_kill(root, signs, delay):
    """Train in a new process, and kill it a moment after so many signs of life."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process, answer = start(train, root, Beacon(theirs))
    theirs.close()
    try:
        for _ in range(signs):
            assert ours.poll(60), "the process hangs"
            ours.recv_bytes()
        time.sleep(delay)
    finally:
        kill(process)
        ours.close()
        answer.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(tmp_path, seed):
    rng = random.Random(seed)
    # An epoch gives 6 x 2 + 2 + 1 + 1 signs of life and some more, so that the kills are over before the epochs are.
    for _ in range(EPOCHS):
        train_and_kill(tmp_path, signs=rng.randint(1, 16), delay=rng.uniform(0, 0.003))
    ((notes, history),) = run(train, [(tmp_path,)])
    assert len(history["loss"]) == EPOCHS
    assert_exact(history, notes)
