import json

import torch

from epoch_mixin._ranks import combined
from epoch_mixin._run import Run
from tests.helpers import close, mean


def add(stage, *pairs, key="loss"):
    if not stage.is_open:
        stage.begin(("loss", "kl"), None)
    for loss, weight in pairs:
        stage.add(key, loss, weight)


def test_the_running_mean_is_exact_however_many_losses_there_are():
    train, pairs = Run().train, []
    train.begin(("loss",), None)
    assert train.mean("loss").isnan()
    for count in range(1, 300):
        loss, weight = torch.rand(()), count % 7 + 1
        train.add("loss", loss, weight)
        pairs.append((loss.item(), weight))
        assert train.mean("loss").item() == close(mean(pairs), rel=1e-14)


def test_each_key_has_its_own_weight():
    train = Run().train
    add(train, (1.0, 1), (2.0, 3))
    add(train, (10.0, 3), key="kl")
    assert train.mean("loss") == 7 / 4 and train.mean("kl") == 10.0
    assert train.totals(is_first_rank=True) == {"loss": [7.0, 4.0], "kl": [30.0, 3.0]}


def test_a_resumed_epoch_begins_with_the_sums_of_the_checkpoint_on_the_first_rank():
    train = Run().train
    train.begin(("loss", "kl"), 3)
    train.resumed_totals = {"loss": [8.0, 2.0], "kl": [1.0, 4.0]}
    assert train.mean("loss") == 4.0
    add(train, (1.0, 1))
    assert train.mean("loss") == 3.0
    assert train.totals(is_first_rank=True) == {"loss": [9.0, 3.0], "kl": [1.0, 4.0]}
    assert train.totals(is_first_rank=False) == {"loss": [1.0, 1.0]}


def test_an_epoch_ends_as_plain_data_and_the_next_starts_from_zero():
    train = Run().train
    for pairs in [(1.0, 1), (4.0, 2)], [(7.0, 1)]:
        add(train, *pairs)
        train.end(is_first_rank=True)
        assert not train.is_open and train.mean("loss").isnan()
    assert train.ended == [{"loss": [9.0, 3.0]}, {"loss": [7.0, 1.0]}]


def test_a_state_does_not_change_afterwards():
    run = Run()
    add(run.val, (9.0, 1))
    run.val.end(is_first_rank=True)
    run.train.begin(("loss",), 5)
    add(run.train, (5.0, 2))
    state = run.state()
    before = json.dumps(state)
    assert state["open"] == {"train": {"mark": 5, "totals": {"loss": [10.0, 2.0]}}}
    assert state["ended"] == {"train": [], "val": [{"loss": [9.0, 1.0]}]}
    add(run.train, (8.0, 8))
    run.train.end(is_first_rank=True)
    assert json.dumps(state) == before


def test_the_states_of_ranks_are_combined_whatever_each_of_them_ended():
    one, two = Run(), Run()
    add(one.val, (1.0, 1))
    one.val.end(is_first_rank=True)  # a validation that the other rank skipped
    for run, pair in ((one, (1.0, 1)), (two, (4.0, 2))):
        add(run.train, pair)
        run.train.end(is_first_rank=True)
        run.train.begin(("loss", "kl"), 7)
    add(two.train, (6.0, 1), key="kl")
    state = combined([{**run.state(), "keys": ["loss", "kl"]} for run in (one, two)], share=1.0)
    assert state["ended"] == {"train": [{"loss": [9.0, 3.0]}], "val": [{"loss": [1.0, 1.0]}]}
    assert state["open"] == {"train": {"mark": 7, "totals": {"kl": [6.0, 1.0]}}}


def test_ranks_that_share_one_copy_of_the_model_count_once():
    run = Run()
    add(run.train, (1.0, 2))
    alone = {**run.state(), "keys": ["loss"]}
    assert combined([alone, alone], share=0.5) == alone
