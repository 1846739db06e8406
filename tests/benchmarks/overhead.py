"""What it costs to keep the mean loss of an epoch: epoch-mixin beside the other ways, on one CPU core.

    python tests/benchmarks/overhead.py            # a minute or two
    python tests/benchmarks/overhead.py --quick    # a few seconds, rough numbers

All ways run in one process in turn, in another order each round, and each is compared with the bare step of its round:
a machine that slows down for a while slows all of them. Costs are microseconds of the training thread's own time, which
other processes on the machine do not add to.
"""

import argparse
import gc
import logging
import math
import os
import platform
import random
import statistics
import time
import warnings
from itertools import pairwise

import pytorch_lightning as pl
import torch
import torchmetrics
from tqdm import tqdm

import epoch_mixin
from epoch_mixin import EpochLossMixin

BATCH = (torch.ones(8, 4), torch.ones(8))
LOSS = torch.ones((), requires_grad=True).square()
KEYS = (1, 2, 4, 8, 16, 32)
MARKS = (1_000, 10_000, 100_000, 1_000_000)

clock = time.thread_time


class Bare(pl.LightningModule):
    """A step with a forward pass, in a Trainer that neither differentiates nor optimizes."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    @property
    def loss(self):
        return self.net(BATCH[0]).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss

    def configure_optimizers(self):
        return None


class Ours(EpochLossMixin, Bare):
    def training_step(self, batch, batch_idx):
        return self.loss


class OursInherited(EpochLossMixin, Bare):
    pass


class HandWritten(Bare):
    def on_train_epoch_start(self):
        self.total = torch.zeros(())
        self.count = 0

    def training_step(self, batch, batch_idx):
        loss, size = self.loss, len(batch[0])
        self.total += loss.detach() * size
        self.count += size
        return loss

    def on_train_epoch_end(self):
        self.mean = (self.total / self.count).item()


class HandWrittenInDict(Bare):
    """As above, but past the ``__setattr__`` of ``nn.Module``."""

    def on_train_epoch_start(self):
        self.sums = {"total": torch.zeros(()), "count": 0}

    def training_step(self, batch, batch_idx):
        loss, size, sums = self.loss, len(batch[0]), self.sums
        sums["total"] += loss.detach() * size
        sums["count"] += size
        return loss

    def on_train_epoch_end(self):
        self.mean = (self.sums["total"] / self.sums["count"]).item()


class HandWrittenFloats(Bare):
    """As above, but with floats, which waits for a device in each step."""

    def on_train_epoch_start(self):
        self.sums = {"total": 0.0, "count": 0}

    def training_step(self, batch, batch_idx):
        loss, size, sums = self.loss, len(batch[0]), self.sums
        sums["total"] += loss.item() * size
        sums["count"] += size
        return loss

    def on_train_epoch_end(self):
        self.mean = self.sums["total"] / self.sums["count"]


class Appended(Bare):
    def on_train_epoch_start(self):
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.loss
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.mean = torch.stack(self.losses).mean().item()


class Metric(Bare):
    def __init__(self):
        super().__init__()
        self.metric = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = self.loss
        self.metric.update(loss.detach(), len(batch[0]))
        return loss

    def on_train_epoch_end(self):
        self.mean = self.metric.compute().item()
        self.metric.reset()


class Logged(Bare):
    def training_step(self, batch, batch_idx):
        loss = self.loss
        self.log("loss", loss, on_epoch=True)
        return loss


class LoggedWithSize(Bare):
    def training_step(self, batch, batch_idx):
        loss = self.loss
        self.log("loss", loss, on_epoch=True, batch_size=len(batch[0]))
        return loss


class LoggedWithoutStep(Bare):
    def training_step(self, batch, batch_idx):
        loss = self.loss
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss


WAYS = {
    "bare step": Bare,
    "epoch-mixin": Ours,
    "epoch-mixin, an inherited step": OursInherited,
    "hand-written sum": HandWritten,
    "hand-written sum in a dict": HandWrittenInDict,
    "hand-written sum of floats": HandWrittenFloats,
    "appending to a list": Appended,
    "MeanMetric.update": Metric,
}
LOGGED = {
    "self.log(on_epoch=True)": Logged,
    "self.log(on_epoch=True, batch_size=n)": LoggedWithSize,
    "self.log(on_step=False, on_epoch=True, batch_size=n)": LoggedWithoutStep,
}


def with_keys(count):
    """The ways that go for many losses in one step output."""
    keys = ("loss", *(f"loss{index}" for index in range(1, count)))
    output = dict.fromkeys(keys, LOSS)

    class BareKeys(Bare):
        def training_step(self, batch, batch_idx):
            return output

    class OursKeys(EpochLossMixin, BareKeys):
        epoch_loss_keys = keys

    class HandWrittenKeys(Bare):
        def on_train_epoch_start(self):
            self.totals = {key: torch.zeros(()) for key in keys}
            self.count = 0

        def training_step(self, batch, batch_idx):
            size, totals = len(batch[0]), self.totals
            for key in keys:
                totals[key] += output[key].detach() * size
            self.count += size
            return output

    class AppendedKeys(Bare):
        def on_train_epoch_start(self):
            self.losses = {key: [] for key in keys}

        def training_step(self, batch, batch_idx):
            losses = self.losses
            for key in keys:
                losses[key].append(output[key].detach())
            return output

    return {
        "bare step": BareKeys,
        "epoch-mixin": OursKeys,
        "hand-written sums in a dict": HandWrittenKeys,
        "appending to lists": AppendedKeys,
    }


def time_steps(step, steps):
    """Microseconds that each of so many steps takes."""
    gc.collect()
    numbers = range(steps)
    start = clock()
    for batch_idx in numbers:
        step(BATCH, batch_idx)
    return (clock() - start) / steps * 1e6


def time_direct(way, steps):
    model = way()
    model.on_train_epoch_start()
    cost = time_steps(model.training_step, steps)
    model.on_train_epoch_end()
    return cost


def time_end(way, steps):
    """Microseconds that the end of an epoch takes."""
    model = way()
    model.on_train_epoch_start()
    time_steps(model.training_step, steps)
    start = clock()
    model.on_train_epoch_end()
    return (clock() - start) * 1e6


def time_local_sum(steps):
    """A hand-written sum that is no attribute but a local variable of a loop of one's own."""
    loss, numbers, total, count = LOSS, range(steps), torch.zeros(()), 0
    gc.collect()
    start = clock()
    for _ in numbers:
        size = len(BATCH[0])
        total += loss.detach() * size
        count += size
    return (clock() - start) / steps * 1e6


def time_copies(steps):
    loss, numbers = LOSS, range(steps)
    gc.collect()
    start = clock()
    for _ in numbers:
        loss.detach().clone()
    return (clock() - start) / steps * 1e6


class Batches:
    """A dataloader that notes when each batch is fetched."""

    def __init__(self, steps):
        self.steps = steps
        self.fetched = []

    def __len__(self):
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            self.fetched.append(clock())
            yield BATCH


def time_in_trainer(way, steps):
    """The median over the steps of a fit, each from one batch to the next. Whole fits scatter four times as much."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    batches = Batches(steps)
    gc.collect()
    trainer.fit(way(), batches)
    return statistics.median(later - earlier for earlier, later in pairwise(batches.fetched)) * 1e6


def in_turn(timers, steps, repeats, bar):
    """Call each timer in each round, in shuffled order; the first round is only to warm up. Returns costs by name."""
    costs = {name: [] for name in timers}
    order = list(timers)
    shuffle = random.Random(0).shuffle
    for repeat in range(-1, repeats):
        shuffle(order)
        for name in order:
            cost = timers[name](steps)
            if repeat >= 0:
                costs[name].append(cost)
            bar.update()
    return costs


def beyond_bare(costs):
    """What each way costs beyond the bare step of the same round."""
    return {name: [cost - bare for cost, bare in zip(costs[name], costs["bare step"])] for name in costs}


def memory():
    """The bytes that the process holds, or None on a system that does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def growth(way, marks, bar):
    """Two rows with a column for each mark: microseconds a step since the mark before, and memory since the start."""
    model = way()
    costs, sizes, done = [], [], 0
    for mark in (min(marks), *marks):  # the first epoch is there to warm up
        if len(costs) < 2:
            model.on_train_epoch_start()
            gc.collect()
            start, done = memory(), 0
        costs.append(time_steps(model.training_step, mark - done))
        sizes.append("?" if start is None else f"{(memory() - start) / 2**20:.1f} MiB")
        done = mark
        if len(costs) == 1:
            model.on_train_epoch_end()
        bar.update()
    return [f"{cost:.2f}" for cost in costs[1:]], sizes[1:]


def spread(values):
    """The median and the middle half of the values."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{statistics.median(values):.2f}", f"{low:.2f} to {high:.2f}"


def table(title, head, rows):
    """A Markdown table."""
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    print(f"\n{title}\n")
    print("\n".join(f"| {line} |" for line in lines))


def ratio(values, others):
    """How many times as dear, by the medians."""
    return statistics.median(values) / (statistics.median(others) or math.nan)


def print_costs(title, costs):
    beyond = beyond_bare(costs)
    rows = []
    for name in costs:
        total, _ = spread(costs[name])
        if name == "bare step":
            rows.append((name, total, "", "", ""))
        else:
            rows.append((name, total, *spread(beyond[name]), f"{ratio(beyond[name], beyond['epoch-mixin']):.2f}"))
    table(title, ("way", "whole step", "beyond the bare step", "middle half", "times epoch-mixin"), rows)
    return beyond


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="direct calls of the step that are timed at a time")
    parser.add_argument("--repeats", type=int, default=50, help="rounds of them")
    parser.add_argument("--trainer-steps", type=int, default=1000, help="steps of a fit")
    parser.add_argument("--trainer-repeats", type=int, default=40, help="rounds of fits")
    parser.add_argument("--growth-steps", type=int, default=max(MARKS), help="the longest epoch of the growth table")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps of everything")
    options = parser.parse_args(arguments)
    if options.quick:
        quick = {"steps": 500, "repeats": 10, "trainer_steps": 100, "trainer_repeats": 5, "growth_steps": 10_000}
        for name, most in quick.items():
            setattr(options, name, min(getattr(options, name), most))
    return options


def measure(options):
    steps, repeats = options.steps, options.repeats
    marks = [mark for mark in MARKS if mark < options.growth_steps] + [options.growth_steps]
    direct = {name: lambda steps, way=way: time_direct(way, steps) for name, way in WAYS.items()}
    direct["hand-written sum in a local variable"] = time_local_sum
    direct["loss.detach().clone()"] = time_copies
    fits = {name: lambda steps, way=way: time_in_trainer(way, steps) for name, way in {**WAYS, **LOGGED}.items()}
    growing = ("bare step", "epoch-mixin", "hand-written sum", "appending to a list")
    keyed = {count: with_keys(count) for count in KEYS}
    key_repeats = max(1, repeats // 5)
    rounds = len(direct) * (repeats + 1) + len(fits) * (options.trainer_repeats + 1)
    rounds += len(growing) * (len(marks) + 1) + len(KEYS) * (4 + 1) * (key_repeats + 1)

    with tqdm(total=rounds, unit="run") as bar:
        direct_costs = in_turn(direct, steps, repeats, bar)
        fit_costs = in_turn(fits, options.trainer_steps, options.trainer_repeats, bar)
        grown = {name: growth(WAYS[name], marks, bar) for name in growing}
        key_costs = {}
        end_costs = {}
        for count, ways in keyed.items():
            timers = {name: lambda steps, way=way: time_direct(way, steps) for name, way in ways.items()}
            key_costs[count] = beyond_bare(in_turn(timers, max(1, steps // 4), key_repeats, bar))
            timer = {"end": lambda steps, way=ways["epoch-mixin"]: time_end(way, steps)}
            end_costs[count] = in_turn(timer, max(1, steps // 4), key_repeats, bar)["end"]
    return direct_costs, fit_costs, marks, grown, key_costs, end_costs


def report(options, direct_costs, fit_costs, marks, grown, key_costs, end_costs):
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, pytorch-lightning {pl.__version__}, "
        f"torchmetrics {torchmetrics.__version__}, epoch-mixin {epoch_mixin.__version__}, {os.cpu_count()} CPU cores\n"
        f"Costs in microseconds a step, the medians of {options.repeats} rounds of {options.steps} steps and of "
        f"{options.trainer_repeats} fits of {options.trainer_steps} steps."
    )
    copies = direct_costs.pop("loss.detach().clone()")
    print_costs("A step called directly, without a Trainer", direct_costs)
    fits = print_costs("A step within Trainer.fit", fit_costs)
    beyond = [ours - bare for ours, bare in zip(direct_costs["epoch-mixin"], direct_costs["bare step"])]
    print(
        f"\nRecording a step that is called directly costs {ratio(beyond, copies):.2f} times "
        f"loss.detach().clone(), which costs {statistics.median(copies):.2f}."
    )
    for name in ("hand-written sum", *LOGGED):
        ours, other = fits["epoch-mixin"], fits[name]
        print(f"Within Trainer.fit, it costs {ratio(ours, other):.3f} times {name}, 1/{ratio(other, ours):.1f} of it.")

    head = ("way", "", *(f"{mark:,} steps" for mark in marks))
    rows = [row for name, (costs, sizes) in grown.items() for row in ((name, "cost", *costs), ("", "memory", *sizes))]
    table("As an epoch grows: cost of a step, the step itself included, and memory held since its start", head, rows)

    names = [name for name in key_costs[1] if name != "bare step"]
    rows = [(name, *(spread(key_costs[count][name])[0] for count in KEYS)) for name in names]
    head = ("way", *(f"{count} key{'s' * (count > 1)}" for count in KEYS))
    table("With more keys: cost of a step beyond the bare step", head, rows)

    rows = [("epoch-mixin", *(spread(end_costs[count])[0] for count in KEYS))]
    table("Cost of an epoch's end by keys, one process", head, rows)


def main(arguments=None):
    options = parse(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # what the Trainer says at each of many fits
    gc.freeze()  # what is here already is not looked through again and again
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = measure(options)
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
    report(options, *results)


if __name__ == "__main__":
    main()
