"""Which of the names that a module logs or returns mean its loss: names as public modules have them, in real fits."""

import pytest
import torch

from epoch_mixin import EpochLossMixin
from tests.helpers import Net, close, epoch_means, fit, loader, messages, trainer
from tests.lightning.reference import Reference, SaveEverywhere, assert_exact, assert_history
from tests.lightning.reference import loader as reference_loader

VAL = dict(samples=11, batch_size=4)
WRONG = -1e6


def split(names):
    return names.split(", ") if names else []


class Named(EpochLossMixin, Net):
    """Logs its losses under the names that it is given; validation returns nothing.

    Args:
        train: the names that training logs: first that of the loss that it returns, then those of other values.
        right: the name as which validation logs its loss.
        wrong: the names as which it logs values that are far from it.
    """

    def __init__(self, train="", right="", wrong=""):
        super().__init__()
        self.train_names, self.right, self.wrong = split(train), split(right), split(wrong)

    def training_step(self, batch, batch_idx):
        loss = self.noted_loss(batch)
        for index, name in enumerate(self.train_names):
            self.log(name, loss + index * WRONG if index else loss)
        return loss

    def named_val_loss(self, batch, batch_idx):
        """The values of validation by name, the right one first or last."""
        loss = Net.validation_step(self, batch, batch_idx)
        values = {**dict.fromkeys(self.right, loss), **{name: WRONG * i for i, name in enumerate(self.wrong, 1)}}
        names = [*values] if batch_idx % 2 else reversed(values)
        return {name: values[name] for name in names}

    def validation_step(self, batch, batch_idx):
        for name, value in self.named_val_loss(batch, batch_idx).items():
            self.log(name, value)


def assert_right_curves(model):
    assert model.epoch_history == {
        "loss": close(epoch_means(model.steps)),
        "val_loss": close(epoch_means(model.val_steps)),
    }


# What training logs, first the loss that it returns; as what validation logs its loss; what else it logs.
FOUND = [
    # The name of the key itself.
    ("train_loss", "val_loss", "val_acc"),
    ("train_loss", "valid_loss", "valid_mse, train_acc_step"),
    ("train_loss", "validation_loss", "elbo_validation, reconstruction_loss_validation, kl_local_validation"),
    ("training_loss", "validation/loss", "validation/accuracy"),
    ("train/loss", "val/loss", "val/loss_best, val/acc"),
    ("loss", "val_loss", ""),
    ("loss", "loss", "acc"),
    ("", "loss_val", "loss_ctc_val, loss_avsr_val"),
    ("", "val_loss_epoch", "val_acc_epoch"),
    ("train/loss_step", "val/loss_epoch", "val/val_mae"),
    ("", "val_epoch_loss", "val_f1, epoch, step"),
    ("train_loss", "dev_loss", "dev_pearsonr, dev_acc"),
    ("", "eval_loss", "eval_accuracy, eval_f1"),
    ("trainer/loss", "eval/loss", "trainer/global_step"),
    ("Train Loss", "Val Loss", "Val Step Accuracy"),
    ("train loss", "val loss", "val displacement loss, val temperature loss"),
    ("train-loss", "val-loss", "val-psnr"),
    ("train.loss", "val.loss", "val.iou"),
    ("trainLoss", "valLoss", "valAcc, valLossBest, valKappa"),
    ("", "ValLoss", "ValPSNR"),
    ("train_loss", "validate_loss", "validate_acc"),
    ("loss/train", "loss/val", "acc/val"),
    ("Loss/train", "Loss/val", "Accuracy/val, LB/val"),
    ("LOSS/train", "LOSS/val", "ACC/val"),
    ("Loss/Train", "Loss/Validation", "Perplexity/Validation"),
    ("", "loss/val/0", "acc/val/0"),
    ("train_loss", "val_loss", "val_lossy_psnr, val_loss_weight, test_loss"),
    # Words that tell nothing beside "loss", where no closer name is there.
    ("", "val/total_loss", "val/actor_loss, val/critic_loss"),
    ("", "val/loss/total", "val/loss/detection, val/loss/size"),
    ("", "val_loss_total", "val_loss_l1, val_loss_ssim"),
    ("", "validation/avg_loss", "validation/mean_absolute_error"),
    ("", "avg_val_loss", "avg_val_acc"),
    ("", "val_mean_loss", "val_mean_iou"),
    ("", "average_dev_loss", "average_dev_acc"),
    ("", "val_loss", "val_total_loss, val_mean_loss"),
    ("train_loss", "val_loss", "val_total_loss"),
    # The partner.
    ("train_total_loss", "val_total_loss", "val_heatmap_loss, val_discriminator_loss"),
    ("train_total_loss, train_loss", "valid_total_loss", "valid_loss"),
    ("train_Total_Loss, train_CE_Loss", "valid_Total_Loss", "valid_CE_Loss, valid_CE_Weight"),
    ("total/train", "total/validation", "loss/validation"),
    ("train_supervised_loss", "val_supervised_loss", "val_loss, val_nlossterms"),
    ("train_contrastive_loss", "val_contrastive_loss", "val_loss, val_top1"),
    ("train_bpd", "val_bpd", ""),
    ("train_bpd", "val_bpd", "val_loss"),
    ("train_nll", "val_nll", "val_kl, val_log_prob"),
    ("train_elbo, train_kl", "val_elbo", "val_kl, val_recon_loss"),
    ("CE", "val_ce", "val_acc"),
    ("train_CE", "val_CE", "val_mean_iou"),
    ("train/mse", "val/mse", "val/mae"),
    ("mse_train", "mse_val_epoch", "r2_val"),
    ("train/aeloss, train/discloss", "val/aeloss", "val/rec_loss, val/discloss"),
    ("train/loss, train/loss_simple, train/loss_vlb", "val/loss", "val/loss_simple, val/loss_vlb, val/loss_ema"),
    ("train/mlm_loss", "valid/mlm_loss", "valid/ppl"),
    ("cls_loss/train", "cls_loss/val", "reg_loss/val"),
    ("ptl/train_loss", "ptl/val_loss", "ptl/val_accuracy"),
    ("metrics/train_loss", "metrics/epoch/val_loss", "metrics/epoch/val_acc"),
    ("train", "val", "epoch"),
]


@pytest.mark.parametrize(("train", "right", "wrong"), FOUND)
def test_the_loss_of_a_validation_is_found_by_its_name(train, right, wrong, recwarn):
    model = Named(train, right, wrong)
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)
    assert messages(recwarn, "Named") == []


# What training logs, first the loss that it returns; what validation logs; why none of it is the loss.
NOT_FOUND = [
    ("train_loss", "val_acc, val_f1", "other quantities"),
    ("train_loss", "epoch, step", "no quantity at all"),
    ("train_loss", "train_loss, training/loss", "names of training"),
    ("train_bpd", "train_bpd", "the partner's name without the stage exchanged"),
    ("train_loss", "test_loss", "another stage"),
    ("train_loss", "val_loss_best", "the best value"),
    ("train_loss", "val_kl_loss, val_recon_loss", "parts of the loss"),
    ("train_loss", "val_loss_ema", "the loss of another model"),
    ("train_loss, train_ce", "val_ce", "training logs another value as its name"),
    ("", "val_bpd", "training does not log it"),
    ("", "ptl/val_loss", "training does not log it, and the key has no such word"),
    ("train_loss", "metrics/epoch/val_loss", "training does not log it, and the key has no such word"),
    ("metrics/batch/loss", "metrics/epoch/val_loss", "one word of the two names differs"),
    ("training/loss", "evaluation/loss", "no word for validation"),
    ("train_loss", "valloss", "one word"),
    ("train_loss", "val_losses", "another word"),
    ("train_loss", "my_val_loss", "another word"),
    ("train_loss", "val", "the word is missing"),
    ("train", "epoch", "no quantity at all"),
    ("", "val_total, val_mean", "words that tell nothing, and not the key's"),
]


@pytest.mark.parametrize(("train", "names", "reason"), NOT_FOUND)
def test_a_name_that_means_something_else_is_not_taken(train, names, reason, recwarn):
    model = Named(train, wrong=names)
    fit(model, loader(), loader(**VAL))
    assert model.epoch_history == {"loss": close(epoch_means(model.steps))}, reason
    (message,) = messages(recwarn, "Named")
    assert message.startswith("Named: no step of a validation gave a loss: validation_step returned None and logged ")
    assert all(repr(name) in message for name in split(names))


@pytest.mark.parametrize(
    "name",
    ["loss", "train_loss", "training/loss", "loss/train", "Train Loss", "train_loss_step", "train/loss/0", "avg_loss"],
)
def test_a_training_that_returns_nothing_is_found_by_its_name(name, recwarn):
    class Manual(EpochLossMixin, Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.log_dict({"val_loss": WRONG, name: self.noted_loss(batch), "train_kl_loss": WRONG, "test_loss": WRONG})

    model = Manual()
    fit(model)
    assert model.epoch_history == {"loss": close(epoch_means(model.steps))}
    assert messages(recwarn, "Manual") == []


class Objective(Named):
    """Training returns its loss; how it is logged as ``train_objective`` is up to ``log_partner``."""

    def __init__(self):
        super().__init__(right="val_objective", wrong="val_loss")

    def training_step(self, batch, batch_idx):
        loss = self.log_partner(self.loss(batch), batch_idx)
        self.steps.append((self.current_epoch, loss.item(), len(batch[0])))
        return loss

    def log_partner(self, loss, batch_idx):
        self.log("train_objective", loss)
        return loss


def detached(self, loss, batch_idx):
    self.log_dict({"train_objective": loss.detach(), "train_loss": loss * 1})
    return loss


def before_a_change_in_place(self, loss, batch_idx):
    self.log("train_objective", loss)
    loss += 1
    return loss


def with_a_part_before_a_change_in_place(self, loss, batch_idx):
    self.log("train_a_part", loss)
    loss += 1
    self.log("train_objective", loss)
    return loss


def in_every_third_step(self, loss, batch_idx):
    if batch_idx % 3 == 2:
        self.log("train_objective", loss)
    return loss


@pytest.mark.parametrize(
    "log_partner",
    [detached, before_a_change_in_place, with_a_part_before_a_change_in_place, in_every_third_step],
    ids=lambda function: function.__name__,
)
def test_the_partner_is_the_name_of_the_tensor_that_training_returns(log_partner):
    class Model(Objective):
        pass

    Model.log_partner = log_partner
    model = Model()
    model.wrong.append("val_a_part")
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)


def test_a_loss_may_be_logged_without_and_with_a_term_that_is_added_in_place():
    class Model(Objective):
        def log_partner(self, loss, batch_idx):
            self.log("train_loss_wo_aux", loss)
            loss += 1
            self.log("train_loss", loss)
            return loss

    model = Model()
    model.right, model.wrong = ["eval_loss"], ["eval_loss_wo_aux"]
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)


@pytest.mark.parametrize("copy", [torch.clone, torch.Tensor.item, lambda loss: loss * 1], ids=["clone", "item", "* 1"])
def test_a_copy_of_the_loss_tells_no_partner(copy):
    class Model(Objective):
        def log_partner(self, loss, batch_idx):
            self.log("train_objective", copy(loss))
            return loss

    model = Model()
    model.right, model.wrong = model.wrong, model.right
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)


def test_the_partner_is_that_of_the_fit():
    model = Named("train_bpd", "val_bpd", "val_loss")
    fit(model, loader(), loader(**VAL), max_epochs=1)
    model.train_names, model.right, model.wrong = ["train_nll"], ["val_nll"], ["val_bpd", "val_loss"]
    fit(model, loader(), loader(**VAL), max_epochs=1)
    first, second = model.val_steps[:3], model.val_steps[3:]
    assert model.epoch_history["val_loss"] == close([*epoch_means(first), *epoch_means(second)])


class Partners(Reference):
    """Keeps account through a resume; validation logs another value as ``val_loss``."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_objective", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_objective", super().validation_step(batch, batch_idx))
        self.log("val_loss", WRONG)


class TrackedPartners(EpochLossMixin, Partners):
    pass


def test_the_partner_is_known_in_a_validation_that_a_resume_begins_in(tmp_path):
    saver = SaveEverywhere(tmp_path, ("on_validation_epoch_start", "on_validation_batch_end"))
    loaders, options = (reference_loader(), reference_loader(7, 2)), dict(max_epochs=2, val_check_interval=2)
    model = TrackedPartners()
    trainer(callbacks=[saver], **options).fit(model, *loaders)
    assert_history(model)
    assert len(saver.saved) == 4 * (1 + 4)
    for path, where in saver.saved.items():
        resumed = TrackedPartners()
        trainer(**options).fit(resumed, *loaders, ckpt_path=path)
        assert (where, min(resumed.epoch_history["val_loss"]) > 0) == (where, True)
        assert_exact(resumed.epoch_history, resumed.notes)


def test_each_key_has_its_partner():
    class Vae(EpochLossMixin, Net):
        epoch_loss_keys = ("loss", "kl")

        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            kl = loss.detach() * 2
            self.log_dict({"train_elbo": loss, "train_divergence": kl})
            return {"loss": loss, "kl": kl}

        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            self.log_dict({"val_kl": WRONG, "val_loss": 2 * WRONG, "val_divergence": loss * 2, "val_elbo": loss})

    model = Vae()
    fit(model, loader(), loader(**VAL))
    train, val = epoch_means(model.steps), epoch_means(model.val_steps)
    twice = [[2 * loss for loss in losses] for losses in (train, val)]
    assert model.epoch_history == {
        "loss": close(train),
        "kl": close(twice[0]),
        "val_loss": close(val),
        "val_kl": close(twice[1]),
    }


# As above, but what validation returns.
ENTRIES = [
    ("", "loss", "val_loss, total_loss"),
    ("", "val_loss", "total_loss, val_acc"),
    ("", "total_loss", "actor_loss, critic_loss"),
    ("", "val_loss_step", "val_acc_step"),
    ("", "valid/loss", "train/loss, test/loss"),
    ("", "avg_loss", "preds"),
    ("train_objective", "objective", "val_loss, total_loss"),
    ("train_objective", "loss", "val_objective, val_loss"),
]


@pytest.mark.parametrize(("train", "right", "wrong"), ENTRIES)
def test_entries_that_validation_returns_have_the_same_names(train, right, wrong):
    class Model(Named):
        def validation_step(self, batch, batch_idx):
            self.log_dict({"val_loss": 9 * WRONG, "val_objective": 8 * WRONG})
            return self.named_val_loss(batch, batch_idx)

    model = Model(train, right, wrong)
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)


@pytest.mark.parametrize("entries", [{"actor_loss": WRONG}, {"val_loss": WRONG, "loss_critic": WRONG}])
@pytest.mark.parametrize("name", ["total_loss", "train_loss", "loss_step", "train/loss/avg"])
def test_entries_that_training_returns_have_the_same_names(name, entries):
    class Manual(EpochLossMixin, Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return {**entries, name: self.noted_loss(batch)}

    model = Manual()
    fit(model)
    assert model.epoch_history == {"loss": close(epoch_means(model.steps))}


@pytest.mark.parametrize("filler", ["total", "avg", "average", "mean"])
def test_words_that_tell_nothing_beside_loss_tell_something_beside_another_key(filler, recwarn):
    class Model(Named):
        epoch_loss_keys = ("loss", "kl")

    model = Model("train_loss", "val_loss", f"val_{filler}_kl, val_kl_{filler}")
    fit(model, loader(), loader(**VAL))
    assert "val_kl" not in model.epoch_history
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))
    assert len(messages(recwarn, "Model")) == 2  # training has no "kl" either


@pytest.mark.parametrize("keys", [("loss", "total_loss"), ("total_loss", "loss")])
@pytest.mark.parametrize("names", [["val_loss"], ["val_total_loss"], ["val_avg_loss"], ["val_loss", "val_total_loss"]])
def test_a_name_means_the_key_that_it_is_closest_to(keys, names):
    class Model(Named):
        epoch_loss_keys = keys

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "total_loss": loss}

    right, wrong = (", ".join(name for name in names if ("total" in name) is total) for total in (False, True))
    model = Model(right=right, wrong=wrong)
    fit(model, loader(), loader(**VAL))
    history = {name: means for name, means in model.epoch_history.items() if name.startswith("val")}
    expected = {"val_loss": close(epoch_means(model.val_steps))} if right else {}
    assert history == expected | ({"val_total_loss": [WRONG] * 2} if wrong else {})


def test_only_the_closest_name_counts_where_it_gives_a_loss(recwarn):
    class Model(Named):
        def validation_step(self, batch, batch_idx):
            loss = Net.validation_step(self, batch, batch_idx)
            return {"loss": None, "val_loss": "none", "val_total_loss": loss, "val_mean_loss_avg": WRONG}

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)
    assert messages(recwarn, "Model") == []
