"""The ranks of a fit, or of a loop without a Trainer, and what they tell each other in one collective."""

import json
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from epoch_mixin._lightning import validates_by_clock
from epoch_mixin._run import STAGES, Epoch, RunState, added


class Ranks(NamedTuple):
    """The ranks of a run.

    Attributes:
        number: how many there are.
        is_first: whether this one is the first, or shares a copy of the model, and the steps, with the first.
        share: how much each rank counts; less than 1 where several share a copy of the model.
    """

    number: int
    is_first: bool
    share: float


def ranks_of(trainer: Any) -> Ranks:
    """The ranks of a Trainer, or without one those of ``torch.distributed``."""
    if trainer is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return Ranks(torch.distributed.get_world_size(), torch.distributed.get_rank() == 0, 1.0)
    # A Trainer on one device does not take part in a group that others have set up around it.
    if trainer is None or trainer.world_size == 1:
        return Ranks(1, True, 1.0)
    # Under model parallelism there are fewer copies of the model, and samplers, than ranks.
    sampler = trainer.distributed_sampler_kwargs or {}
    copies = sampler.get("num_replicas", trainer.world_size)
    return Ranks(trainer.world_size, sampler.get("rank", trainer.global_rank) == 0, copies / trainer.world_size)


def all_validate_together(module: Any, trainer: Any) -> bool:
    """Whether no rank can be elsewhere while this one validates, so that all may synchronize there."""
    if ranks_of(trainer).number == 1:
        return True
    if trainer is None:
        return False  # in a loop of the user one rank may validate for all
    # A rank may go by its own clock, or have nothing to validate on and skip validation, hooks and all. Otherwise
    # Lightning refuses an empty dataloader (`has_len_all_ranks` of `utilities/data.py`).
    empty = "allow_zero_length_dataloader_with_multiple_devices"
    may_be_empty = any(getattr(place, empty, False) for place in (module, getattr(trainer, "datamodule", None)))
    return not validates_by_clock(trainer) and not may_be_empty


def gather(trainer: Any, state: RunState, size: int = 4096) -> list[RunState]:
    """Gather the states of all ranks in one collective of fixed size, or in a second one if a state is longer.

    As JSON in a tensor: strategies without ``torch.distributed``, such as those of TPUs, gather nothing else.
    """
    states = [state] * ranks_of(trainer).number
    if trainer is None and len(states) > 1:
        torch.distributed.all_gather_object(states, state)
    if trainer is None or len(states) == 1:
        return states
    # Rank 0's progress bar may have computed what is logged, with collectives that the other ranks have yet to join.
    _ = trainer.progress_bar_metrics
    message = json.dumps(state).encode()
    row = torch.tensor([*len(message).to_bytes(8, "big"), *message[:size].ljust(size)], dtype=torch.uint8)[None]
    # Not the device of the module, which may be back on the CPU: GPUs gather only what lies on a GPU.
    rows = trainer.strategy.all_gather(row.to(trainer.strategy.root_device))
    messages = [bytes(message) for message in rows.reshape(-1, row.size(1)).tolist()]
    longest = max(int.from_bytes(message[:8], "big") for message in messages)
    return [json.loads(m[8:]) for m in messages] if longest <= size else gather(trainer, state, longest)


def combined(states: list[RunState], share: float) -> RunState:
    """Combine what the ranks have not written.

    Args:
        states: `Run.state` of each rank.
        share: see `Ranks`.
    """
    opened, ended = dict[str, Epoch](), {}
    for stage in STAGES:
        # A rank may have skipped a validation.
        epochs_of_ranks = zip_longest(*(state["ended"][stage] for state in states), fillvalue={})
        ended[stage] = [added(totals, share) for totals in epochs_of_ranks]
        epochs = [state["open"][stage] for state in states if stage in state["open"]]
        if epochs:
            totals = added([epoch["totals"] for epoch in epochs], share)
            opened[stage] = {"mark": epochs[0]["mark"], "totals": totals}
    keys = list(dict.fromkeys(key for state in states for key in state["keys"]))
    return {"open": opened, "ended": ended, "keys": keys}
