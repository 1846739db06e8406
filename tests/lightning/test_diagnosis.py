"""All warnings about what was recorded, word for word, as a fit gives them; hints that work when they are followed."""

import math
import re

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, close, data, epoch_means, fit, loader, mean, messages, trainer

ALL_ZERO = "the weights of its steps are all 0; `epoch_loss_weight` or `batch_size=` must be above 0 for some of them"
SIZES = "; override `epoch_loss_weight`, or say `self.log(..., batch_size=...)` in the step"


class Steps(EpochLossMixin, Net):
    """Its steps are what the tests make them."""

    automatic_optimization = False
    epoch_loss_keys = ("loss",)

    def training_step(self, batch, batch_idx):
        return self.noted_loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return None


def model_of(train=None, val=None, end=None, keys=("loss",), **members):
    """A model whose steps call these functions with the model and the loss."""

    class Model(Steps):
        epoch_loss_keys = keys

        def __init__(self):
            super().__init__()
            self.metric = MeanMetric()

        if train:

            def training_step(self, batch, batch_idx):
                return train(self, self.noted_loss(batch))

        if val:

            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                return val(self, self.loss(batch))

        if end:

            def on_validation_epoch_end(self):
                end(self)

    return type("Model", (Model,), members)()


def logs(*names, value=0.5):
    return lambda model, loss: model.log_dict(dict.fromkeys(names, value))


def updates(model, loss):
    model.metric.update(loss)
    model.log("val_loss", model.metric)


def gives(output):
    return lambda model, loss: output


KL = dict(keys=("loss", "kl"))


def record(*keys):
    return f" (record {'it' if len(keys) == 2 else 'them'} with epoch_loss_keys = {keys})".replace("'", '"')


ONE = ", as one number such as its `.mean()`"


def no_val(what, as_one_number=""):
    how = 'return the loss, or self.log("val_loss", ...)' + as_one_number
    return [f"Model: no step of a validation gave a loss: validation_step {what}; {how}"]


def no_train(what, key="loss"):
    how = f'did the step return it, or self.log("train_{key}", ...) it?'
    return [f"Model: no step of epoch 0 gave a loss for {key!r}, so its mean is nan: it {what}; {how}"]


def no_key(stage, key, what, as_one_number=""):
    step = {"train": "training_step", "val": "validation_step"}[stage]
    how = f'return it as "{key}", or self.log("{stage}_{key}", ...)' + as_one_number
    where = f"Model.{step}: no {key!r} is recorded for this step"
    return [f"{where}: {key!r} is in epoch_loss_keys, but {step} {what}; {how}"]


NUMBERS = "; a number does not tell which of 'val_loss_1', 'val_loss_2' is the loss"
TIE = (
    "Model.validation_step: 'val_loss' is what it gives as 'val_loss_total', but 'val_loss_mean' is as close and has"
    ' another value; to choose, self.log("val_loss", ...), or return {"loss": ...}'
)
BARE = (
    "Model.validation_step: 'val_loss' is the value that it returns and logs as 'val_acc'; if that is not the loss, log"
    ' the loss: self.log("val_loss", ...)'
)
NO_SCALAR = "for it, which is no real scalar"

COMPLEX = f"returned only 'loss', 'kl' and gave a Tensor of shape () of complex numbers {NO_SCALAR}"

# What the steps do, and all that is said.
MESSAGES = {
    "None": (dict(), no_val("returned None")),
    "text": (dict(val=gives("text")), no_val("returned only a str")),
    "vector": (dict(val=gives(torch.ones(4))), no_val("returned a Tensor of shape (4,)", ONE)),
    "prediction": (dict(val=gives(torch.ones(1))), no_val("returned a Tensor of shape (1,)", ONE)),
    "entries": (dict(val=gives({"x": 1})), no_val("returned only 'x'")),
    "no entries": (dict(val=gives({})), no_val("returned an empty dict")),
    "entry of None": (dict(val=gives({"loss": None, "x": 1})), no_val("returned a loss of None")),
    "entry of text": (dict(val=gives({"loss": "?"})), no_val(f"returned only 'loss' and gave a str {NO_SCALAR}")),
    "an accuracy alone": (
        dict(val=logs("val_acc", "val_f1")),
        no_val("returned None and logged 'val_acc', 'val_f1'" + record("loss", "acc")),
    ),
    "an accuracy and another": (
        dict(val=logs("val_acc", "val_nll")),
        no_val("returned None and logged 'val_acc', 'val_nll'" + record("loss", "nll")),
    ),
    "a metric": (dict(val=updates), no_val("returned None and logged 'val_loss' (a metric that was only updated)")),
    "the end": (
        dict(end=lambda model: model.log("val_kl_loss", 1.0)),
        no_val("returned None, and on_validation_epoch_end logged 'val_kl_loss'" + record("loss", "kl_loss")),
    ),
    "numbers": (
        dict(val=logs("val_loss_1", "val_loss_2")),
        no_val("returned None and logged 'val_loss_1', 'val_loss_2'" + NUMBERS + record("loss", "loss_1", "loss_2")),
    ),
    "training: None": (dict(train=gives(None), val=gives(1.0)), no_train("returned None")),
    "training: a key of None": (
        dict(train=lambda model, loss: {"loss": loss, "kl": None}, val=gives({"loss": 1.0, "kl": None}), **KL),
        [*no_key("val", "kl", "returned a kl of None"), *no_key("train", "kl", "returned a kl of None")],
    ),
    "training: logged": (
        dict(train=logs("my_loss", "acc"), val=gives(1.0)),
        no_train("returned None and logged 'my_loss', 'acc'" + record("loss", "my_loss")),
    ),
    "training: another key": (
        dict(train=lambda model, loss: {"loss": loss, "kld": 1.0, "acc": 0.5}, val=gives(1.0), **KL),
        [
            *no_key("val", "kl", "returned only a float"),
            *no_key("train", "kl", "returned only 'loss', 'kld', 'acc'" + record("loss", "kld")),
        ],
    ),
    "training: a vector": (
        dict(train=gives(torch.ones(3)), val=gives(1.0)),
        no_key("train", "loss", "returned a Tensor of shape (3,)", ONE),
    ),
    "training: complex": (
        dict(
            train=lambda model, loss: {"loss": loss, "kl": torch.tensor(1j)}, val=gives({"loss": 1.0, "kl": 1.0}), **KL
        ),
        no_key(
            "train",
            "kl",
            f"returned only 'loss', 'kl' and gave a Tensor of shape () of complex numbers {NO_SCALAR}",
            ONE,
        ),
    ),
    "weights of 0": (
        dict(val=gives(1.0), epoch_loss_weight=lambda self, batch: 0),
        [
            "Model: no step of a validation gave a loss: " + ALL_ZERO,
            "Model: no step of epoch 0 gave a loss for 'loss', so its mean is nan: " + ALL_ZERO,
        ],
    ),
    "as close": (
        dict(val=lambda model, loss: model.log_dict({"val_loss_total": loss, "val_loss_mean": 2 * loss})),
        [TIE],
    ),
    "bare": (dict(val=lambda model, loss: model.log("val_acc", loss) or loss), [BARE]),
}


@pytest.mark.parametrize(("made", "expected"), MESSAGES.values(), ids=MESSAGES)
def test_what_a_fit_says(made, expected, recwarn):
    model = model_of(**made)
    fit(model, loader(), loader(11, 4), max_epochs=3)
    assert messages(recwarn, "Model") == expected


BATCHES = {
    "disagree": (
        (torch.ones(2, 9), torch.ones(5)),
        "the tensors of its batch disagree about the batch size: 2, 5. The first counts",
    ),
    "none": (["some", "texts"], "found no tensor in a list that tells the batch size, so its steps count 1"),
}


@pytest.mark.parametrize(("batch", "what"), BATCHES.values(), ids=BATCHES)
def test_what_is_said_of_sizes(batch, what, recwarn):
    model = type("Model", (Steps,), {"training_step": lambda self, batch, batch_idx: 1.0})()
    for batch_idx in range(3):
        model.training_step(batch, batch_idx)
    model.on_train_epoch_end()
    assert messages(recwarn, "Model") == [f"Model.training_step: {what}{SIZES}"]


def test_what_is_said_of_a_checkpoint_without_losses(tmp_path, recwarn):
    path = tmp_path / "last.ckpt"
    fit(Net(), max_epochs=2).save_checkpoint(path)
    model = model_of()
    model.automatic_optimization = True
    trainer(max_epochs=3).fit(model, loader(), ckpt_path=path)
    how = "`epoch_history.clear()` removes them"
    assert messages(recwarn, "Model") == [f"Model: the checkpoint holds no loss of the last 2 of 2 epochs: nan; {how}"]


# Steps that gave no loss, and how the keys that the message names record it.
HINTED = {
    "another word": (("reconstruction",), dict(train=lambda model, loss: model.log("train_recon", loss)), ("recon",)),
    "beside one that works": (
        ("loss", "reconstruction"),
        dict(train=lambda model, loss: model.log("train_recon", loss) or loss),
        ("loss", "recon"),
    ),
    "a returned entry": (("loss", "kl"), dict(train=lambda model, loss: {"loss": loss, "kld": loss}), ("loss", "kld")),
    "two numbers": (
        ("loss",),
        dict(train=lambda model, loss: model.log_dict({"loss_1": loss, "loss_2": loss * 2})),
        ("loss_1", "loss_2"),
    ),
    "quantiles": (
        ("loss",),
        dict(val=lambda model, loss: model.log_dict({"val_loss_0.1": loss, "val_loss_0.9": loss * 2})),
        ("loss", "loss_0_1", "loss_0_9"),
    ),
    "several of them": (
        ("loss", "kl", "recon"),
        dict(train=lambda model, loss: model.log_dict({"train/kl_loss": loss, "train/recon_loss": loss * 2}) or loss),
        ("loss", "kl_loss", "recon_loss"),
    ),
    "no accuracy": (("loss",), dict(val=logs("val_acc", "val/bpd", "lr")), ("loss", "bpd")),
    "parts": (("loss",), dict(val=logs("val_acc", "val_kl_loss", "val_recon_loss")), ("loss", "kl_loss", "recon_loss")),
}


@pytest.mark.parametrize(("keys", "made", "right"), HINTED.values(), ids=HINTED)
def test_a_hint_can_be_typed_as_it_stands(keys, made, right, recwarn):
    fit(model_of(keys=keys, **made), loader(), loader(11, 4))
    (hint,) = {hint for text in messages(recwarn, "Model") for hint in re.findall(r"epoch_loss_keys = (\(.*?\))", text)}
    assert eval(hint) == right
    recwarn.clear()
    model = model_of(keys=eval(hint), **made)
    fit(model, loader(), loader(11, 4))
    assert {name.removeprefix("val_") for name in model.epoch_history} == {*right}
    assert not any(math.isnan(loss) for losses in model.epoch_history.values() for loss in losses)
    assert [text for text in messages(recwarn, "Model") if "no step" not in text or "validation" not in text] == []


def test_the_hint_names_the_losses_of_all_dataloaders(recwarn):
    class Model(Steps):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log(("val_loss_clean", "val_loss_noisy")[dataloader_idx], self.loss(batch), add_dataloader_idx=False)

    fit(Model(), loader(), [loader(6), loader(6)])
    (message,) = messages(recwarn, "Model")
    assert "logged 'val_loss_clean', 'val_loss_noisy'" in message
    assert 'epoch_loss_keys = ("loss", "loss_clean", "loss_noisy")' in message


def test_weights_of_0_are_told_before_the_first_validation(recwarn):
    model = model_of(val=gives(1.0), epoch_loss_weight=lambda self, batch: int(not self.trainer.training))
    fit(model, loader(), loader(), check_val_every_n_epoch=2)
    (message,) = messages(recwarn, "Model")
    assert message == "Model: no step of epoch 0 gave a loss for 'loss', so its mean is nan: " + ALL_ZERO


@pytest.mark.parametrize("in_fit", [True, False])
def test_a_missing_key_is_told_at_the_first_step_where_no_validation_may_give_it(in_fit):
    class Model(EpochLossMixin, Net):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            if batch_idx:
                raise InterruptedError
            return {"loss": self.loss(batch)}

    model = Model()

    def loop(model):
        return [model.training_step(batch, batch_idx) for batch_idx, batch in enumerate(loader())]

    said = pytest.warns(UserWarning, match="^Model.training_step: no 'kl' is recorded for this step")
    with said, pytest.raises(InterruptedError):
        (fit if in_fit else loop)(model)


def test_a_key_that_a_later_step_gives_is_not_told(recwarn):
    model = model_of(**KL)
    loss, kl = torch.tensor(1.0), torch.tensor(2.0)
    model.training_step = lambda batch, batch_idx: {"loss": loss, "kl": kl} if batch_idx % 2 else None
    fit(model)
    model.training_step = lambda batch, batch_idx: {"loss": loss} if batch_idx % 2 else {"loss": loss, "kl": kl}
    fit(model)
    assert messages(recwarn, "Model") == []


@pytest.mark.parametrize("empty", [None, [], {}], ids=str)
@pytest.mark.parametrize("in_fit", [True, False])
def test_an_empty_first_batch_says_nothing_of_the_size(empty, in_fit, recwarn):
    class Model(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            if not batch:
                return None
            loss = self.loss(batch)
            self.steps.append((0, loss.item(), len(batch[0])))
            return loss

    def collate(rows):
        return empty if rows[0][1] == 0 else torch.utils.data.default_collate(rows)

    model, batches = Model(), DataLoader(data(), 5, collate_fn=collate)
    if in_fit:
        fit(model, batches, max_epochs=1)
    else:
        for batch_idx, batch in enumerate(batches):
            model.training_step(batch, batch_idx)
        model.on_train_epoch_end()
    assert len(model.steps) == 4
    assert model.epoch_losses == close(epoch_means(model.steps))
    assert messages(recwarn, "Model") == []


# What a step logs beside its loss; each batch has 4, then 2 samples, with losses of 1 and 2.
BESIDE = {
    "batch_size of another": lambda model, loss: model.log("lr", 0.1, batch_size=1),
    "sum": lambda model, loss: model.log("n_tokens", 100.0, reduce_fx="sum", batch_size=1),
    "log_dict": lambda model, loss: model.log_dict({"val_acc": 0.5, "train_acc": 0.5}, batch_size=int(100 * loss)),
    "the loss as a sum": lambda model, loss: model.log("loss", loss, reduce_fx=torch.sum, batch_size=1),
    "nothing": lambda model, loss: None,
}


@pytest.mark.parametrize("logged_too", [True, False], ids=["logged", "returned"])
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("in_fit", [True, False])
def test_the_size_of_the_batch_comes_before_that_of_another_value(beside, logged_too, in_fit, recwarn):
    class Model(EpochLossMixin, Net):
        automatic_optimization = False

        def step(self, batch, name):
            loss = batch[0].mean()
            beside(self, loss)
            if logged_too:
                return self.log(name, loss)
            return loss

        def training_step(self, batch, batch_idx):
            return self.step(batch, "train_loss")

        def validation_step(self, batch, batch_idx):
            return self.step(batch, "val_loss")

    batches = [[torch.full((4, 2), 1.0), torch.ones(4)], [torch.full((2, 2), 2.0), torch.ones(2)]]
    model, rows = Model(), DataLoader(batches, batch_size=None)
    if in_fit:
        fit(model, rows, rows, max_epochs=1)
    else:
        for batch_idx, batch in enumerate(batches):
            model.training_step(batch, batch_idx)
            model.validation_step(batch, batch_idx)
        model.on_validation_epoch_end()
        model.on_train_epoch_end()
    assert model.epoch_history["loss"] == close([mean([(1.0, 4), (2.0, 2)])])
    assert model.epoch_history["val_loss"] == close([4 / 3])
    assert messages(recwarn, "Model") == []


def test_a_sum_gives_no_size_where_the_tensors_disagree_either(recwarn):
    model = type("Model", (Steps,), {})()

    def step(batch, batch_idx):
        model.log("n_nodes", 100.0, reduce_fx="sum", batch_size=1)
        model.log("acc", 0.5, reduce_fx="mean", batch_size=1 + batch_idx)
        return 4.0 * batch_idx

    model.training_step = step
    for batch_idx in range(2):
        model.training_step((torch.ones(2, 9), torch.ones(5)), batch_idx)
    model.on_train_epoch_end()
    assert model.epoch_losses == close([mean([(0.0, 1), (4.0, 2)])])
    assert messages(recwarn, "Model") == []


# Other values with a size of their own, beside a loss without one.
OTHERS = {
    "a name as close but one": lambda model, loss: model.log_dict({"val_mean_loss": 5 * loss}, batch_size=1),
    "a numbered name": lambda model, loss: model.log("val_loss_2", 5 * loss, batch_size=1),
    "a part": lambda model, loss: model.log("val_kl_loss", 5 * loss, batch_size=1),
}


@pytest.mark.parametrize("log", OTHERS.values(), ids=OTHERS)
def test_the_size_of_another_loss_is_not_that_of_the_loss(log, recwarn):
    def step(model, loss):
        log(model, loss)
        model.log("val_loss", loss)

    model = model_of(val=step)
    val_steps = []

    def validation_step(batch, batch_idx):
        if not model.trainer.sanity_checking:
            val_steps.append((model.current_epoch, model.loss(batch).item(), len(batch[0])))
        step(model, model.loss(batch))

    model.validation_step = validation_step
    fit(model, loader(), loader(11, 4))
    assert model.epoch_history["val_loss"] == close(epoch_means(val_steps))


def test_the_size_that_is_logged_with_a_copy_of_the_loss_counts():
    class Model(EpochLossMixin, Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train_loss", loss.detach().item(), batch_size=7 + batch_idx)
            self.steps.append((self.current_epoch, loss.item(), 7 + batch_idx))
            return loss

    model = Model()
    fit(model)
    assert model.epoch_losses == close(epoch_means(model.steps))


def test_a_tie_at_the_end_of_validation_names_that_hook(recwarn):
    def end(model):
        model.log_dict({"val_loss_total": 1.0, "val_loss_mean": 2.0})

    model = model_of(end=end)
    fit(model, loader(), loader())
    (message,) = messages(recwarn, "Model")
    assert message.startswith("Model.on_validation_epoch_end: 'val_loss' is what it gives as 'val_loss_total', but ")
    assert model.epoch_history["val_loss"] == [1.0, 1.0]


def test_names_that_the_end_of_validation_logs_cast_no_doubt_on_what_the_steps_gave(recwarn):
    def end(model):
        model.log_dict({"val_loss_total": 1.0, "val_loss_mean": 2.0, "val_kl": 3.0})

    model = model_of(
        train=lambda model, loss: {"loss": loss, "kl": loss},
        val=lambda model, loss: model.log("val_loss", loss),
        end=end,
        **KL,
    )
    fit(model, loader(), loader())
    assert model.epoch_history["val_kl"] == [3.0, 3.0]
    assert messages(recwarn, "Model") == []


def test_losses_that_a_manual_optimization_logs_in_turn_are_not_told(recwarn):
    class Gan(Steps):
        epoch_loss_keys = ("g_loss", "d_loss")

        def training_step(self, batch, batch_idx):
            self.log(("g_loss", "d_loss")[batch_idx % 2], self.loss(batch))

    model = Gan()
    fit(model)
    assert [len(losses) for losses in model.epoch_history.values()] == [2, 2]
    assert messages(recwarn, "Gan") == []
