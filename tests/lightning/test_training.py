import copy
import math
import pickle

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, Tracked, close, data, epoch_means, fit, loader, messages


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_mean_is_exact_at_every_precision(precision):
    model = Tracked()
    fit(model, loader(samples=153, batch_size=2), precision=precision)
    assert len(model.epoch_losses) == 2
    assert model.epoch_losses == close(epoch_means(model.steps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_mean_is_exact_whatever_the_default_dtype(dtype, default_dtype):
    default_dtype(dtype)
    model = Tracked()
    fit(model, loader(dtype=dtype))
    assert model.layer.weight.dtype == dtype
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_mean_of_float64_losses_is_exact_to_the_last_digits():
    model = Tracked()
    fit(model, loader(samples=203, batch_size=2), precision="64-true")
    assert model.epoch_losses == close(epoch_means(model.steps), rel=1e-12)


def test_mean_of_many_steps_is_exact():
    class Model(Tracked):
        def loss(self, batch):
            return super().loss(batch) * 10.0 ** (self.global_step % 17 - 8)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0)

    model = Model()
    fit(model, loader(samples=601, batch_size=2), max_epochs=1)
    assert len(model.steps) == 301
    assert model.epoch_losses == close(epoch_means(model.steps))


@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_gradient_accumulation_does_not_scale_the_loss(batches):
    model = Tracked()
    fit(model, accumulate_grad_batches=batches)
    assert model.epoch_losses == close(epoch_means(model.steps))


@pytest.mark.parametrize(
    "output",
    [
        lambda loss: loss,
        lambda loss: {"loss": loss},
        lambda loss: {"logits": torch.ones(3), "loss": loss, "text": "text"},
        lambda loss: loss.reshape(1),
    ],
    ids=["tensor", "dict", "dict with more", "tensor of shape (1,)"],
)
def test_outputs_that_lightning_takes(output, recwarn):
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return output(self.noted_loss(batch))

    model = Model()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert messages(recwarn, "Model") == []


def test_steps_that_return_none_do_not_count(recwarn):
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 4) else self.noted_loss(batch)

    model = Model()
    fit(model)
    assert len(model.steps) == 6
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert messages(recwarn, "Model") == []


class Manual(EpochLossMixin, Net):
    """Manual optimization; ``output`` makes the step output of the loss."""

    def __init__(self, output=lambda loss: loss):
        super().__init__()
        self.automatic_optimization = False
        self.output = output

    def training_step(self, batch, batch_idx):
        loss = self.noted_loss(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return self.output(loss)


@pytest.mark.parametrize(
    "output",
    [
        lambda loss: loss,
        lambda loss: loss.detach(),
        lambda loss: {"loss": loss},
        lambda loss: {"loss": loss.reshape(1, 1)},
    ],
    ids=["tensor", "detached", "dict", "tensor of shape (1, 1)"],
)
def test_manual_optimization(output, recwarn):
    model = Manual(output)
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert messages(recwarn, "Manual") == []


@pytest.mark.parametrize(
    ("key", "output"),
    [
        ("loss", lambda loss: loss.expand(3)),
        ("loss", lambda loss: loss.detach() * 1j),
        ("loss", lambda loss: {"lost": loss}),
        ("mse", lambda loss: loss),
        ("mse", lambda loss: {"mse": "low"}),
        ("mse", lambda loss: {"mse": [loss.detach()]}),
    ],
    ids=["vector", "complex", "no such key", "bare tensor", "text", "list"],
)
def test_training_goes_on_where_a_loss_cannot_be_recorded(key, output, recwarn):
    class Model(Manual):
        epoch_loss_keys = (key,)

    model = Model(output)
    fit(model)
    assert len(model.steps) == 10
    assert model.epoch_history[key] == pytest.approx([math.nan] * 2, nan_ok=True)
    (unread,) = messages(recwarn, "Model")
    assert unread.startswith(f"Model.training_step: no {key!r} is recorded")


def test_manual_optimization_without_an_output_is_nan_with_one_warning(recwarn):
    class Model(Manual):
        pass

    model = Model(lambda loss: None)
    fit(model)
    assert model.epoch_losses == pytest.approx([math.nan] * 2, nan_ok=True)
    assert len(messages(recwarn, "Model")) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_infinite_loss_shows_in_its_epoch(bad):
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            return loss + bad if (self.current_epoch, batch_idx) == (1, 2) else loss

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            closure()
            if batch_idx != 2:
                optimizer.step()

    model = Model()
    fit(model, max_epochs=3)
    first, _, last = epoch_means(model.steps)
    assert model.epoch_losses == pytest.approx([first, bad, last], rel=1e-9, abs=0, nan_ok=True)


def test_max_steps_in_mid_epoch_gives_the_mean_of_the_steps_made():
    model = Tracked()
    fit(model, max_epochs=-1, max_steps=8)
    assert [step[0] for step in model.steps] == [0] * 5 + [1] * 3
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_should_stop_in_mid_epoch_gives_the_mean_of_the_steps_made():
    class Model(Tracked):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.trainer.should_stop = self.global_step == 7

    model = Model()
    fit(model)
    assert [step[0] for step in model.steps] == [0] * 5 + [1] * 2
    assert model.epoch_losses == close(epoch_means(model.steps))


@pytest.mark.parametrize("stop", [0, 2])
def test_an_epoch_cut_short_by_on_train_batch_start(stop, recwarn):
    class Model(Tracked):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 and batch_idx == stop else None

    model = Model()
    fit(model, max_epochs=3)
    expected = epoch_means(model.steps)
    if stop == 0:
        expected.insert(1, math.nan)
    assert model.epoch_losses == pytest.approx(expected, rel=1e-9, abs=0, nan_ok=True)
    assert len(messages(recwarn, "Model")) == (stop == 0)


@pytest.mark.parametrize("options", [dict(limit_train_batches=3), dict(overfit_batches=2), dict(fast_dev_run=True)])
def test_only_part_of_the_data(options):
    model = Tracked()
    fit(model, **options)
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_dataloader_iter_steps_count_by_the_batch_they_fetched():
    class Model(EpochLossMixin, Net):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.noted_loss(batch)

    model = Model()
    fit(model)
    assert [size for _, _, size in model.steps] == [5, 5, 5, 5, 3] * 2
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_an_own_weight_is_given_the_batch_that_a_dataloader_iter_step_fetched():
    class Model(EpochLossMixin, Net):
        def epoch_loss_weight(self, batch):
            return len(batch[0]) ** 2

        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.noted_loss(batch)

    model = Model()
    fit(model)
    assert [size for _, _, size in model.steps] == [5, 5, 5, 5, 3] * 2
    assert model.epoch_losses == close(epoch_means([(epoch, loss, size**2) for epoch, loss, size in model.steps]))


def test_iterable_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(list(data()))

    model = Tracked()
    fit(model, DataLoader(Stream(), 4))
    assert [size for _, _, size in model.steps] == [4, 4, 4, 4, 4, 3] * 2
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_several_training_dataloaders():
    class Model(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch["a"]) + self.loss(batch["b"])
            self.steps.append((self.current_epoch, loss.item(), len(batch["a"][0])))
            return loss

    model = Model()
    with pytest.warns(UserWarning, match=r"Model\.training_step: .* disagree about the batch size: 5, 2\."):
        fit(model, {"a": loader(), "b": loader(batch_size=2)})
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_the_epoch_that_weight_averaging_adds_for_batch_norm_counts():
    class Model(Tracked):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def loss(self, batch):
            return (self.layer(self.norm(batch[0])) - batch[1]).square().mean()

    model = Model()
    fit(model, max_epochs=4, callbacks=[pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)])
    assert len(model.epoch_losses) == 5
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_second_fit_goes_on_appending():
    model = Tracked()
    fit(model)
    first = list(model.epoch_losses)
    model.steps.clear()
    fit(model, max_epochs=1)
    assert model.epoch_losses[:2] == first
    assert model.epoch_losses[2:] == close(epoch_means(model.steps))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_clone_made_in_mid_epoch_keeps_the_history_and_can_be_fitted(clone):
    class Cloner(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2):
                self.clone = clone(module)

    model, cloner = Tracked(), Cloner()
    fit(model, callbacks=[cloner])
    twin = cloner.clone
    assert twin.epoch_losses == model.epoch_losses[:1]
    assert model.epoch_losses == close(epoch_means(model.steps))
    twin.steps.clear()
    fit(twin)
    assert twin.epoch_losses[1:] == close(epoch_means(twin.steps))
    assert len(twin.epoch_losses) == 3 and len(model.epoch_losses) == 2


def test_a_deepcopy_made_inside_every_step():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            twin = copy.deepcopy(self)
            Tracked.training_step(twin, batch, batch_idx)
            return self.noted_loss(batch)

    model = Model()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_an_interrupted_epoch_does_not_leak_into_the_next_fit():
    class Model(Tracked):
        broken = True

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.broken and self.global_step == 3:
                raise RuntimeError("power cut")

    model = Model()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model)
    model.steps.clear()
    model.broken = False
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_running_loss_in_the_step_in_callbacks_and_after_the_epoch():
    class Reader(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            self.at_start = module.running_epoch_loss()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            steps = [step for step in module.steps if step[0] == trainer.current_epoch]
            assert [module.running_epoch_loss().item()] == close(epoch_means(steps))

        def on_train_epoch_end(self, trainer, module):
            self.at_end = module.running_epoch_loss().item()

    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            assert self.running_epoch_loss().isnan() == (batch_idx == 0)
            return self.noted_loss(batch)

    model, reader = Model(), Reader()
    fit(model, callbacks=[reader])
    assert reader.at_start.isnan()
    assert reader.at_end == model.epoch_losses[-1]
    assert model.running_epoch_loss().isnan()


def test_running_loss_on_the_progress_bar():
    class Model(Tracked):
        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            self.log("running", self.running_epoch_loss(), prog_bar=True)
            return loss

    model = Model()
    runner = fit(model)
    assert "running" in runner.progress_bar_metrics
    assert model.epoch_losses == close(epoch_means(model.steps))


class Gan(EpochLossMixin, Net):
    epoch_loss_keys = ("g_loss", "d_loss")

    def __init__(self, convert):
        super().__init__()
        self.automatic_optimization = False
        self.convert = convert
        self.noted = {"g_loss": [], "d_loss": []}

    def training_step(self, batch, batch_idx):
        output = {}
        for (key, noted), optimizer in zip(self.noted.items(), self.optimizers()):
            loss = self.loss(batch) * len(key)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            noted.append((self.current_epoch, loss.item(), len(batch[0])))
            output[key] = self.convert(loss)
        return output

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (0.01, 0.001)]


@pytest.mark.parametrize("convert", [lambda loss: loss, lambda loss: loss.item()], ids=["tensors", "plain numbers"])
def test_two_named_losses_with_two_optimizers(convert, recwarn):
    model = Gan(convert)
    fit(model)
    assert model.epoch_history == {key: close(epoch_means(noted)) for key, noted in model.noted.items()}
    assert messages(recwarn, "Gan") == []


def test_a_misspelt_key_is_warned_of_with_the_keys_that_were_there(recwarn):
    class Vae(Tracked):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            return {"loss": loss, "kld": loss.detach(), "rec": 1.0}

    model = Vae()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))
    (misspelt,) = messages(recwarn, "Vae")
    assert "'kl'" in misspelt and "'loss', 'kld', 'rec'" in misspelt
    assert 'epoch_loss_keys = ("loss", "kld")' in misspelt


@pytest.mark.parametrize(
    "weight",
    [lambda x: len(x) ** 2, lambda x: x.shape[0] / 3, lambda x: x.gt(0).sum(), lambda x: x.abs().sum().reshape(1)],
    ids=["int", "float", "0-dim tensor", "tensor of shape (1,)"],
)
def test_an_overridden_weight(weight):
    class Model(Tracked):
        def epoch_loss_weight(self, batch):
            return weight(batch[0])

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.steps.append((self.current_epoch, loss.item(), float(weight(batch[0]))))
            return loss

    model = Model()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (-1, ValueError),
        (math.nan, ValueError),
        (torch.tensor(-1.0), ValueError),
        (torch.tensor(math.nan), ValueError),
        (torch.tensor(math.inf), ValueError),
        (None, TypeError),
        ("3", TypeError),
        (torch.ones(2), TypeError),
    ],
)
def test_a_wrong_weight_ends_the_fit_with_an_error_that_names_it(weight, error):
    class Model(Tracked):
        def epoch_loss_weight(self, batch):
            return weight

    with pytest.raises(error, match=r"Model\.epoch_loss_weight "):
        fit(Model())


def test_a_batch_without_a_size_counts_1_with_one_warning(recwarn):
    class Texts(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            loss = self.layer(torch.full((4,), float(sum(map(len, batch))))).square().mean()
            self.steps.append((self.current_epoch, loss.item(), 1))
            return loss

    model = Texts()
    fit(model, DataLoader(["a", "bc", "d", "efg", "h"], batch_size=2))
    assert model.epoch_losses == close(epoch_means(model.steps))
    (message,) = messages(recwarn, "Texts")
    assert "epoch_loss_weight" in message and "list" in message


def test_what_is_logged_does_not_matter():
    class Logging(Tracked):
        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            self.log("loss", loss * 0, on_step=True, on_epoch=True)
            return loss

    model = Logging()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))
