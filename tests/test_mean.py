import math

import pytest
import torch

from epoch_mixin._mean import ExactMean
from tests.helpers import close, mean

CPU = torch.device("cpu")


def value(metric):
    total, weight = metric.totals().tolist()
    return total / weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_hard_values_are_averaged_exactly(dtype):
    high = 6e4 if dtype is torch.float16 else 1e8
    losses = torch.rand(20_000).double()
    losses[::3] *= high
    losses[1::3] *= 1e-6
    losses = losses.to(dtype)
    weights = torch.randint(1, 1000, (20_000,)).tolist()
    metric = ExactMean(CPU)
    for start in range(0, len(losses), 1000):
        metric.update(list(losses[start : start + 1000]), weights[start : start + 1000])
    assert value(metric) == close(mean(zip(losses.double().tolist(), weights)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_default_dtype_does_not_matter(dtype, default_dtype):
    default_dtype(dtype)
    losses, weights = torch.rand(100, dtype=torch.float64), [3, 4] * 50
    metric = ExactMean(CPU)
    metric.update(list(losses), weights)
    metric.update(list(losses), [1.5] * 100)
    expected = mean([*zip(losses.tolist(), weights), *((loss, 1.5) for loss in losses.tolist())])
    assert value(metric) == close(expected, rel=1e-14)


def test_numbers_and_tensors_of_any_type_can_be_mixed():
    losses = [torch.tensor(16_777_217), torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)]
    weights = [torch.tensor(1001), 2, torch.tensor(0.5, dtype=torch.bfloat16)]
    metric = ExactMean(CPU)
    metric.update(losses, weights)
    assert value(metric) == close(mean(zip(map(float, losses), map(float, weights))), rel=1e-14)


def test_tensors_of_several_types_keep_each_its_precision():
    losses = [torch.tensor(16_777_217), torch.tensor(0.5), torch.tensor(0.1, dtype=torch.float64)]
    weights = [torch.tensor(1001), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(True)]
    metric = ExactMean(CPU)
    metric.update(losses[:2], weights[:2])
    metric.update(losses[1:], weights[1:])
    pairs = [(loss.item(), float(weight)) for loss, weight in zip(losses, weights)]
    assert value(metric) == close(mean(pairs[:2] + pairs[1:]), rel=1e-14)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, math.nan], math.nan),
        ([1.0, math.inf], math.inf),
        ([-math.inf, 1.0], -math.inf),
        ([math.inf, -math.inf], math.nan),
    ],
)
def test_nan_and_infinity_show_in_the_mean(losses, expected):
    metric = ExactMean(CPU)
    metric.update([torch.tensor(loss) for loss in losses], [1, 2])
    assert value(metric) == pytest.approx(expected, nan_ok=True)


def test_weights_count():
    # torchmetrics issue 3434: `MeanMetric` may ignore them
    metric = ExactMean(CPU)
    metric.update([torch.tensor(1.0), torch.tensor(5.0)], [3, 1])
    assert value(metric) == 2.0


def test_no_weight_means_no_mean():
    assert ExactMean(CPU).totals().tolist() == [0.0, 0.0]


def test_a_mean_begun_in_inference_mode_goes_on_outside_and_back():
    with torch.inference_mode():
        metric = ExactMean(CPU)
        metric.update([torch.tensor(1.0)], [1])
    metric.update([torch.tensor(2.0)], [1])
    with torch.inference_mode():
        metric.update([torch.tensor(6.0)], [2])
    assert value(metric) == 3.75


def test_reset_forgets():
    metric = ExactMean(CPU)
    metric.update([torch.tensor(1.0)], [1])
    metric.reset()
    metric.update([torch.tensor(3.0)], [1])
    assert value(metric) == 3.0
