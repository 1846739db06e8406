import fractions
import math

import numpy as np
import pytest
import torch

from epoch_mixin import EpochLossMixin
from epoch_mixin._settings import checked_weight
from tests.helpers import Net


@pytest.mark.parametrize(
    ("keys", "right"),
    [
        (("train_loss", "val_loss"), '("loss",)'),
        (("loss", "val_loss"), '("loss",)'),
        (("train_loss", "train/kl", "val/kl"), '("loss", "kl")'),
        (("Val Loss", "Recon.2"), '("loss", "Recon.2")'),
        (("valLoss",), '("loss",)'),
        (("train",), '("loss",)'),
        (("loss", "dev_perplexity"), '("loss", "perplexity")'),
    ],
)
def test_a_key_with_a_stage_in_it_is_refused_with_the_tuple_to_write(keys, right):
    typed = "(" + ", ".join(f'"{key}"' for key in keys) + (",)" if len(keys) == 1 else ")")
    with pytest.raises(ValueError, match="stage") as error:
        type("Model", (EpochLossMixin, Net), {"epoch_loss_keys": keys})
    apart = "training and validation of a key are recorded apart"
    assert str(error.value) == f"Model.epoch_loss_keys = {typed} has a stage in it: write {right}; {apart}"


@pytest.mark.parametrize("keys", [("loss", "evaluation"), ("validity",), ("trained_loss", "devil", "interval")])
def test_a_key_may_have_words_like_those_of_a_stage(keys):
    assert type("Model", (EpochLossMixin, Net), {"epoch_loss_keys": keys}).epoch_loss_keys == keys


@pytest.mark.parametrize(
    "weight", [3, 2.5, 0, True, fractions.Fraction(5, 2), np.float64(2.5), np.int32(3), torch.ones(1), torch.tensor(3)]
)
def test_a_weight_may_be_any_real_number(weight):
    checked = checked_weight(weight, "Model")
    assert checked == weight and type(checked) is float


def test_a_negative_tensor_makes_the_weights_nan():
    assert math.isnan(checked_weight(torch.tensor(-1), "Model"))
