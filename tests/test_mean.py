import math

import pytest
import torch

from epoch_mixin._mean import ExactMean
from tests.helpers import close, mean


def exact_mean(losses, weights):
    metric = ExactMean()
    for loss, weight in zip(losses, weights):
        metric.update(loss, weight)
    return metric


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_hard_values_are_averaged_exactly(dtype):
    high = 6e4 if dtype is torch.float16 else 1e8
    losses = torch.rand(20_000).double()
    losses[::3] *= high
    losses[1::3] *= 1e-6
    losses = losses.to(dtype)
    weights = torch.randint(1, 1000, (20_000,)).tolist()
    value = exact_mean(losses, weights).compute()
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == close(mean(zip(losses.double().tolist(), weights)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_default_dtype_does_not_matter(dtype, default_dtype):
    default_dtype(dtype)
    losses = torch.rand(200, dtype=torch.float64)
    weights = [3, 4] * 50 + [1.5] * 100
    assert exact_mean(losses, weights).compute().item() == close(mean(zip(losses.tolist(), weights)), rel=1e-14)


def test_numbers_and_tensors_of_any_type_can_be_mixed():
    losses = [torch.tensor(16_777_217), torch.tensor(0.5), torch.tensor(0.1, dtype=torch.float64), torch.tensor(True)]
    weights = [torch.tensor(1001), 0.3, torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(True)]
    expected = mean((loss.item(), float(weight)) for loss, weight in zip(losses, weights))
    assert exact_mean(losses, weights).compute().item() == close(expected, rel=1e-14)


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
    metric = exact_mean(map(torch.tensor, losses), [1, 2])
    assert metric.compute().item() == pytest.approx(expected, nan_ok=True)


def test_weights_count():
    # torchmetrics issue 3434: `MeanMetric` may ignore them
    assert exact_mean([torch.tensor(1.0), torch.tensor(5.0)], [3, 1]).compute() == 2.0


def test_a_weight_below_zero_cannot_hide_among_the_others():
    losses, weights = [torch.tensor(1.0)] * 3, [torch.tensor(5.0), torch.tensor(-1.0), 5]
    assert exact_mean(losses, weights).sums()[1].isnan()


def test_nothing_sums_up_to_nothing():
    assert ExactMean().sums() == (0.0, 0.0)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_reading_the_sums_changes_nothing(count):
    losses = torch.rand(count)
    metric = exact_mean(losses, [3] * count)
    buffered = len(metric.buffer)
    for _ in range(2):
        total, weight = metric.sums()
        assert total.item() == close(math.fsum(3 * loss for loss in losses.tolist()), rel=1e-14)
        assert weight == 3 * count
    assert len(metric.buffer) == buffered


def test_losses_are_buffered_and_all_in_the_mean():
    metric, pairs, buffered = ExactMean(), [], []
    for count in range(1, 1000):
        loss, weight = torch.rand(()), count % 7 + 1
        metric.update(loss, weight)
        pairs.append((loss.item(), weight))
        buffered.append(len(metric.buffer))
        if count % 31 == 0:
            total, weight = metric.sums()
            assert (total / weight).item() == close(mean(pairs), rel=1e-14)
    assert 30 < max(buffered) < 500


def test_a_mean_that_starts_in_inference_mode_goes_on_outside_and_back():
    with torch.inference_mode():
        metric = ExactMean()
        metric.update(torch.tensor(1.0), 1)
        metric.flush()
    metric.update(torch.tensor(2.0), 1)
    metric.flush()
    with torch.inference_mode():
        metric.update(torch.tensor(6.0), 2)
    assert metric.compute() == 3.75


def test_reset_forgets():
    metric = exact_mean([torch.tensor(1.0)] * 300, [1] * 300)
    metric.reset()
    metric.update(torch.tensor(3.0), 1)
    assert metric.compute() == 3.0


@pytest.mark.parametrize("order", [1, -1])
def test_sums_of_losses_on_several_devices_stay_off_the_cpu(order):
    # Nothing can be read of the meta device, so a copy to the CPU would raise.
    losses = [torch.tensor(1.0), torch.tensor(2.0, device="meta"), torch.tensor(3.0)]
    assert {part.device.type for part in exact_mean(losses[::order], [1, 2, 3]).sums()} == {"meta"}
