import gc
import sys
import tracemalloc
import weakref
from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import epoch_mixin
from epoch_mixin import EpochLossMixin
from tests.helpers import lazy_device

STEPS = 1000
BATCH = (torch.ones(4, 2), torch.ones(4))
STAGES = {"train": ("training_step", "on_train_epoch_end"), "val": ("validation_step", "on_validation_epoch_end")}

READS = {"item", "tolist", "numpy", "cpu", "equal", "allclose", "is_nonzero", "nonzero"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__", "__repr__"}


class Operators(TorchDispatchMode):
    """Counts the tensor operators that run under it, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Notes how many numbers each look at the values of a tensor brought to the host."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in READS:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


class Plain(pl.LightningModule):
    """A step that costs one operator a key."""

    keys = ("loss",)
    ways = ("return",)

    def losses(self, batch, stage):
        losses = {key: batch[0].sum() for key in self.keys}
        if "log" in self.ways:
            self.log_dict({f"{stage}_{key}": loss for key, loss in losses.items()}, batch_size=3)
        if "return" in self.ways:
            return losses if len(losses) > 1 else losses["loss"]

    def training_step(self, batch, batch_idx):
        return self.losses(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self.losses(batch, "val")


def recorded(keys=("loss",), weight=None, ways=("return",)):
    class Recorded(EpochLossMixin, Plain):
        epoch_loss_keys = keys

        def epoch_loss_weight(self, batch):
            return weight

        if weight is None:
            epoch_loss_weight = EpochLossMixin.epoch_loss_weight

    model = Recorded()
    model.keys, model.ways = keys, ways
    return model


def on_device(batch):
    return [part.to(lazy_device()) for part in batch]


def operators_per_step(model, stage="train", ask=False):
    """How many operators a recorded step runs beyond those of the step itself, over a whole epoch."""
    step, end = STAGES[stage]
    with Operators() as operators:
        for batch_idx in range(STEPS):
            getattr(model, step)(BATCH, batch_idx)
            if ask:
                model.running_epoch_loss()
        getattr(model, end)()
    assert len(model.epoch_history) == len(model.keys)
    return operators.counts.total() / STEPS - len(model.keys)


WEIGHTS = [
    pytest.param(None, id="batch size"),
    pytest.param(2.5, id="number"),
    pytest.param(torch.ones(()), id="tensor"),
]


@pytest.mark.parametrize("weight", WEIGHTS[:2])
@pytest.mark.parametrize("stage", STAGES)
def test_recording_a_step_takes_at_most_three_operators(stage, weight):
    assert 0 < operators_per_step(recorded(weight=weight), stage) <= 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_further_key_takes_two_operators_and_a_bit(stage):
    one, eight = (operators_per_step(recorded(keys), stage) for keys in [("loss",), ("loss", *"abcdefg")])
    assert (eight - one) / 7 <= 2.5


def test_a_tensor_weight_takes_at_most_what_a_further_loss_takes():
    number, tensor = (operators_per_step(recorded(weight=weight)) for weight in (2.5, torch.ones(())))
    assert tensor - number <= 2.5


def test_the_end_of_an_epoch_takes_as_many_operators_after_many_steps_as_after_few():
    counts = []
    for steps in (10, STEPS):
        model = recorded()
        for batch_idx in range(steps):
            model.training_step(BATCH, batch_idx)
        with Operators() as operators:
            model.on_train_epoch_end()
        counts.append(operators.counts)
    assert counts[1].total() <= counts[0].total()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("keys", [("loss",), ("loss", "kl")])
def test_a_logged_loss_takes_no_more_operators_than_a_returned_one(stage, keys):
    returned, logged, both = (
        operators_per_step(recorded(keys, ways=ways), stage) for ways in (["return"], ["log"], ["return", "log"])
    )
    assert logged <= returned
    assert both <= returned


@pytest.mark.parametrize("weight", WEIGHTS[:2])
def test_asking_for_the_running_loss_in_every_step_takes_at_most_three_operators_more(weight):
    asking, silent = (operators_per_step(recorded(weight=weight), ask=ask) for ask in (True, False))
    assert asking - silent <= 3


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("ways", [["return"], ["log"], ["return", "log"]], ids="+".join)
@pytest.mark.parametrize("stage", STAGES)
def test_no_step_reads_a_device_and_an_epoch_reads_two_numbers_a_key_at_its_end(stage, ways, weight):
    step, end = STAGES[stage]
    model = recorded(("loss", "kl"), weight.to(lazy_device()) if isinstance(weight, torch.Tensor) else weight, ways)
    batch = on_device(BATCH)
    with Operators() as operators, HostReads() as reads:
        for batch_idx in range(600):
            getattr(model, step)(batch, batch_idx)
            if batch_idx % 10 == 0:
                model.running_epoch_loss()
        assert reads.sizes == []
        getattr(model, end)()
    assert reads.sizes == [4]
    assert "_local_scalar_dense" not in operators.counts
    assert [*model.epoch_history.values()] == [[8.0], [8.0]]


def calls_of_ours(keys):
    model, calls = recorded(keys), 0

    def profile(frame, event, _):
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(str(Path(epoch_mixin.__file__).parent))

    model.training_step(BATCH, 0)
    sys.setprofile(profile)
    model.training_step(BATCH, 1)
    sys.setprofile(None)
    return calls


def test_a_further_key_takes_as_many_calls_of_ours_beside_many_keys_as_beside_few():
    one, few, many = (calls_of_ours(("loss", *(f"key{i}" for i in range(count)))) for count in (0, 10, 500))
    assert (many - one) / 500 <= (few - one) / 10 <= 10


def test_a_step_with_two_keys_makes_at_most_twenty_calls_of_ours():
    assert 0 < calls_of_ours(("loss", "kl")) <= 20


@pytest.fixture
def tensors_alive():
    """Tells how many tensors there are that were not there before the test."""
    gc.collect()
    gc.freeze()  # what is frozen is not among gc.get_objects()
    yield lambda: sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    gc.unfreeze()


def most_alive(model, steps, tensors_alive):
    most, batch = 0, on_device(BATCH)
    for batch_idx in steps:
        model.training_step(batch, batch_idx)
        if batch_idx % 101 == 0:  # no divisor of a round number, to meet every phase of a buffer
            most = max(most, tensors_alive())
    return most


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_tensors_alive_do_not_grow_with_the_steps(weight, tensors_alive):
    model = recorded(("loss", "kl"), weight)
    most_alive(model, range(300), tensors_alive)
    # Two losses and a weight for each of the 256 steps that may wait, and the sums.
    assert 0 < most_alive(model, range(3_000), tensors_alive) < 800
    assert 0 < most_alive(model, range(3_000, 6_000), tensors_alive) < 800


def test_memory_does_not_grow_with_the_steps():
    model = recorded(("loss", "kl"))
    peaks = []
    tracemalloc.start()
    for steps in (1_000, 500, 4_000):  # the first for Python's own stores to fill
        tracemalloc.reset_peak()
        for batch_idx in range(steps):
            model.training_step(BATCH, batch_idx)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[2] - peaks[1] < 50_000  # where a number for each of 3,500 steps would be more


def test_tensors_are_freed_when_an_epoch_ends(tensors_alive):
    model, batch = recorded(("loss", "kl")), on_device(BATCH)
    at_rest = tensors_alive()
    for epoch in range(3):
        for batch_idx in range(100):
            model.training_step(batch, batch_idx)
            model.validation_step(batch, batch_idx)
        assert tensors_alive() > at_rest
        model.on_validation_epoch_end()
        model.on_train_epoch_end()
        gc.collect()
        assert tensors_alive() == at_rest


class Saved:
    """A tensor that a graph has saved for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_graph_is_kept_alive(weight):
    class Recorded(EpochLossMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return (batch[0] * self.scale).square().sum()

        def epoch_loss_weight(self, batch):
            return super().epoch_loss_weight(batch) if weight is None else self.scale * weight

    saved = []

    def pack(tensor):
        kept = Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    model = Recorded()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for batch_idx in range(10):
            loss = model.training_step(BATCH, batch_idx)
    assert [ref for ref in saved if ref() is not None]
    del loss
    assert not [ref for ref in saved if ref() is not None]


class Compiled(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().sum()


class CompiledAndRecorded(EpochLossMixin, Compiled):
    pass


class Calling(Compiled):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 2


class RecordedCalling(CompiledAndRecorded):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 2


def graphs(model, compile):
    """How many graphs there are after the first steps, and after many."""
    torch._dynamo.reset()
    counter = CompileCounter()
    step = compile(model, counter)
    counts = []
    for steps in (2, 200):
        for batch_idx in range(steps):
            step(BATCH)
        counts.append(counter.frame_count)
    return counts


def compiled_step(model, backend, fullgraph=False):
    step = torch.compile(model.training_step, backend=backend, fullgraph=fullgraph)
    return lambda batch: step(batch, 0)


def compiled_without_break(model, backend):
    return compiled_step(model, backend, fullgraph=True)


def compiled_loop(model, backend):
    return torch.compile(lambda batch: model.training_step(batch, 0) * 2, backend=backend)


@pytest.mark.parametrize("compile", [compiled_step, compiled_without_break, compiled_loop])
def test_a_compiled_step_has_at_most_one_more_graph(compile):
    bare = graphs(Compiled(), compile)
    model = CompiledAndRecorded()
    first, last = graphs(model, compile)
    assert bare[0] == bare[1] > 0
    assert first <= bare[0] + 1
    assert last == first
    model.on_train_epoch_end()
    assert len(model.epoch_losses) == 1


def test_a_compiled_step_that_calls_its_parents_has_at_most_one_more_graph():
    bare = graphs(Calling(), compiled_step)
    first, last = graphs(RecordedCalling(), compiled_step)
    assert bare[0] == bare[1] > 0
    assert first <= bare[0] + 1
    assert last == first
