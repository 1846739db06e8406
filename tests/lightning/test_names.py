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
    ("total/train", "total/validation", "accuracy/validation"),
    ("total/train", "loss/validation", "total/validation"),
    ("train_rec", "val_loss", "val_rec"),
    ("train_supervised_loss", "val_supervised_loss", "val_loss, val_nlossterms"),
    ("train_contrastive_loss", "val_contrastive_loss", "val_loss, val_top1"),
    ("train_bpd", "val_bpd", ""),
    ("train_bpd", "val_loss", "val_bpd"),
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
    # Of 50 further packages, as they are.
    ("", "val_loss", "val_loss_12, val_loss_21"),
    ("train_nce_loss", "val_nce_loss", "val_nce_temperature"),
    ("train_loss", "val_loss", "val_wer, val_cer, learning_rate"),
    ("NMAE/Train", "NMAE/Validation", "MSE/Validation, MSE_EXP/Validation, MSE_forecast_horizon_0/Validation"),
    ("loss", "val_loss", "val_NED, val_accuracy"),
    ("train_loss, train_reg_loss, train_loss_0", "valid_loss", "valid_reg_loss, valid_loss_0, valid_loss_1"),
    ("train/loss, train/si_loss, train/ms_loss", "val/loss", "val/si_loss, val_metrics/a5"),
    ("train_cross_entropy, train_accuracy", "val_cross_entropy", "val_accuracy"),
    ("train_neg_cos_sim, train_class_loss", "val_neg_cos_sim", "val_acc1"),
    ("train/loss, train/loss_epoch", "val/loss", "val/fape, val/distogram, val/lddt_ca"),
    ("train/loss, train/top_5_accuracy", "val/loss", "val/base_loss, val/semantic_loss"),
    ("loss/train, sub_loss/train_dur_loss", "loss/val", "sub_loss/val_dur_loss, sub_loss/val_prior_loss"),
    ("train_loss, train_energy_MAE", "val_loss", "val_energy_MAE, val_forces_MAE"),
    ("trainer/loss", "val/loss", "val/accuracy, val/loss_ema"),
    ("train_loss", "valid_loss", "ptl/val_loss"),
    ("train_loss, elbo_train, kl_local_train", "validation_loss", "elbo_validation, kl_local_validation, kl_weight"),
    ("loss/train, loss_0/train, error_t_lig/train", "loss/val", "loss_0/val, error_t_lig/val, kl_prior/val"),
    ("train/aeloss, train/total_loss, train/nll_loss", "val/aeloss", "val/rec_loss, val/d_weight"),
    ("train_CELoss", "valid_CELoss", "pep_precision, aa_precision"),
    ("train_weighted_mse_loss", "val_weighted_mse_loss", "val_weighted_mse/2t"),
    ("train_loss_step/weighted_sum", "val_loss_epoch/weighted_sum", "val_metric_epoch/energy_mae"),
    ("loss, Reconstruction_Loss, KLD", "val_loss", "val_Reconstruction_Loss, val_KLD"),
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
    ("train_loss", "val_loss_1, val_loss_2", "they differ in a number"),
    ("train_loss", "val/loss/0, val/loss/1, val_acc", "they differ in a number"),
    ("train_loss", "val_loss_0.1, val_loss_0.5, val_loss_0.9", "quantiles"),
    ("train_loss, train_bpd_1", "val_bpd_1", "training logs another value as its name"),
    ("train_bpd_1", "val_bpd_1, val_bpd_2", "a number tells nothing of a partner either"),
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
        super().__init__(right="val_objective", wrong="val_objective_of_another")

    def training_step(self, batch, batch_idx):
        loss = self.log_partner(self.loss(batch), batch_idx)
        self.steps.append((self.current_epoch, loss.item(), len(batch[0])))
        return loss

    def log_partner(self, loss, batch_idx):
        self.log("train_objective", loss)
        return loss


def detached(self, loss, batch_idx):
    self.log_dict({"train_objective": loss.detach(), "train_objective_of_another": loss * 1})
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
    with pytest.warns(UserWarning, match="^Model: no step of a validation gave a loss"):
        fit(model, loader(), loader(**VAL))
    assert list(model.epoch_history) == ["loss"]


def test_the_partner_is_that_of_the_fit():
    model = Named("train_bpd", "val_bpd", "val_nll")
    fit(model, loader(), loader(**VAL), max_epochs=1)
    model.train_names, model.right, model.wrong = ["train_nll"], ["val_nll"], ["val_bpd"]
    fit(model, loader(), loader(**VAL), max_epochs=1)
    first, second = model.val_steps[:3], model.val_steps[3:]
    assert model.epoch_history["val_loss"] == close([*epoch_means(first), *epoch_means(second)])


class Partners(Reference):
    """Keeps account through a resume; validation logs its loss under the partner alone."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_objective", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_objective", super().validation_step(batch, batch_idx))
        self.log("val_other", WRONG)


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
            self.log_dict({"val_other": WRONG, "val_divergence": loss * 2, "val_elbo": loss})

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


class WarmUp(EpochLossMixin, Net):
    """The loss has a second term from the second epoch on; it is logged as a number, its first term as a tensor."""

    def training_step(self, batch, batch_idx):
        reconstruction = self.loss(batch)
        loss = reconstruction + 10 if self.current_epoch else reconstruction
        self.log("train_rec", reconstruction)
        self.log("train_loss", loss.item())
        self.steps.append((self.current_epoch, loss.item(), len(batch[0])))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_rec", self.loss(batch))
        self.log("val_loss", self.loss(batch) + 10)
        if not self.trainer.sanity_checking:
            self.val_steps.append((self.current_epoch, (self.loss(batch) + 10).item(), len(batch[0])))


def test_a_loss_that_is_its_first_term_in_a_warm_up_is_the_one_that_is_called_loss(recwarn):
    model = WarmUp()
    runner = fit(model, loader(), loader(**VAL), max_epochs=3)
    assert_right_curves(model)
    assert model.epoch_history["val_loss"][-1] == pytest.approx(runner.callback_metrics["val_loss"].item())
    assert messages(recwarn, "WarmUp") == []


class WarmUpUnderOtherNames(WarmUp):
    """As above, but validation logs the loss as nothing that has the word."""

    def validation_step(self, batch, batch_idx):
        self.log("val_rec", self.loss(batch))
        Net.validation_step(self, batch, batch_idx)


def test_a_partner_ends_with_the_first_step_that_does_not_confirm_it(tmp_path):
    model, path = WarmUpUnderOtherNames(), tmp_path / "last.ckpt"
    with pytest.warns(UserWarning, match="^WarmUpUnderOtherNames: no step of a validation gave a loss"):
        fit(model, loader(), loader(**VAL), max_epochs=2).save_checkpoint(path)
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps)[:1])  # that of the warm-up
    resumed = WarmUpUnderOtherNames()

    def warm_up_again(batch, batch_idx):  # what the name was in between is not forgotten
        loss = resumed.loss(batch)
        resumed.log("train_rec", loss)
        return loss

    resumed.training_step = warm_up_again
    with pytest.warns(UserWarning, match="^WarmUpUnderOtherNames: no step of a validation gave a loss"):
        trainer(max_epochs=4).fit(resumed, loader(), loader(**VAL), ckpt_path=path)
    assert len(resumed.epoch_losses) == 4
    assert resumed.epoch_history["val_loss"] == model.epoch_history["val_loss"]


@pytest.mark.parametrize("names", ["val_loss_1, val_loss_2", "val/loss/0, val/loss/1", "val_loss_0.1, val_loss_0.9"])
def test_a_returned_value_counts_where_names_differ_in_a_number(names, recwarn):
    class Model(Named):
        def validation_step(self, batch, batch_idx):
            for name in split(names):
                self.log(name, WRONG)
            return Net.validation_step(self, batch, batch_idx)

    model = Model("train_loss")
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)
    assert messages(recwarn, "Model") == []


def test_a_returned_value_counts_in_manual_optimization_too(recwarn):
    class Manual(EpochLossMixin, Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.log("loss_1", WRONG)
            self.log("loss_2", 2 * WRONG)
            return self.noted_loss(batch)

    model = Manual()
    fit(model)
    assert model.epoch_history == {"loss": close(epoch_means(model.steps))}
    assert messages(recwarn, "Manual") == []


def test_names_that_differ_in_a_number_are_told_with_keys_that_record_them(recwarn):
    class Manual(EpochLossMixin, Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.noted_loss(batch)
            self.log("loss_1", loss)
            self.log("loss_2", 2 * loss)

    fit(Manual())
    (message,) = messages(recwarn, "Manual")
    assert "a number does not tell which of 'loss_1', 'loss_2' is the loss" in message
    assert '(record them with epoch_loss_keys = ("loss_1", "loss_2"))' in message
    model = type("Model", (Manual,), {"epoch_loss_keys": ("loss_1", "loss_2")})()
    fit(model)
    first = epoch_means(model.steps)
    assert model.epoch_history == {"loss_1": close(first), "loss_2": close([2 * loss for loss in first])}
    assert model.epoch_losses is model.epoch_history["loss_1"]
    assert messages(recwarn, "Model") == []


def test_losses_of_each_dataloader_that_the_end_of_validation_logs_are_told(recwarn):
    class Model(EpochLossMixin, Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            pass

        def on_validation_epoch_end(self):
            self.log("val_loss_0", 1.0)
            self.log("val_loss_1", 2.0)

    fit(Model(), loader(), [loader(6), loader(6)])
    (message,) = messages(recwarn, "Model")
    assert 'record them with epoch_loss_keys = ("loss", "loss_0", "loss_1")' in message
    hinted = type("Hinted", (Model,), {"epoch_loss_keys": ("loss", "loss_0", "loss_1")})()
    fit(hinted, loader(), [loader(6), loader(6)])
    assert (hinted.epoch_history["val_loss_0"], hinted.epoch_history["val_loss_1"]) == ([1.0, 1.0], [2.0, 2.0])
    assert messages(recwarn, "Hinted") == []


def test_one_numbered_name_counts(recwarn):
    class Model(EpochLossMixin, Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log(f"val_loss_{dataloader_idx}", Net.validation_step(self, batch, batch_idx))

    model = Model()
    fit(model, loader(), [loader(6), loader(9)])
    assert model.epoch_history["val_loss"] == close(epoch_means(model.val_steps))
    assert messages(recwarn, "Model") == []


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (("val_loss_total", "val_loss_mean"), 'self.log("val_loss", ...), or return {"loss": ...}'),
        (("valid_loss", "val_loss"), 'log one of them under another name, or return {"loss": ...}'),
        (("val_loss", "val/loss"), 'log one of them under another name, or return {"loss": ...}'),
    ],
)
@pytest.mark.parametrize(("other", "differs"), [(lambda loss: loss * 2, True), (lambda loss: loss.clone(), False)])
def test_another_name_that_is_as_close_is_told_if_its_value_differs(names, how, other, differs, recwarn):
    class Model(EpochLossMixin, Net):
        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            self.log_dict({names[0]: loss, names[1]: other(loss)})

    model = Model()
    fit(model, loader(), loader(**VAL))
    assert_right_curves(model)
    what = f"'val_loss' is what it gives as {names[0]!r}, but {names[1]!r} is as close and has another value"
    expected = [f"Model.validation_step: {what}; to choose, {how}"] if differs else []
    assert messages(recwarn, "Model") == expected


@pytest.mark.parametrize(
    ("train", "logged_as", "warned"),
    [
        *(("train_loss", "val_acc", 1), ("train_acc", "val_acc", 0), ("", "val_lossy_psnr", 1)),
        *(("", "vloss", 0), ("", "val_CELoss/main", 0), ("", "val_loss_ema", 0)),
    ],
)
@pytest.mark.parametrize(
    ("convert", "copy"),
    [
        *((lambda loss: loss, lambda loss: loss), (lambda loss: loss, torch.clone)),
        *((torch.Tensor.item, lambda loss: loss), (torch.Tensor.item, torch.tensor), (lambda loss: loss, float)),
    ],
    ids=["tensor", "clone", "number", "tensor of a number", "number of a tensor"],
)
def test_a_bare_value_that_is_logged_under_another_name_counts_and_is_told(
    train, logged_as, warned, convert, copy, recwarn
):
    class Model(Named):
        def validation_step(self, batch, batch_idx):
            value = convert(Net.validation_step(self, batch, batch_idx))
            self.log(logged_as, copy(value))
            return value

    model = Model(train)
    fit(model, loader(), loader(**VAL), max_epochs=2)
    assert_right_curves(model)
    found = messages(recwarn, "Model")
    assert len(found) == warned
    assert all(f"'val_loss' is the value that it returns and logs as {logged_as!r}; if" in text for text in found)


# As above, but what validation returns.
ENTRIES = [
    ("", "loss", "val_loss, total_loss"),
    ("", "val_loss", "total_loss, val_acc"),
    ("", "total_loss", "actor_loss, critic_loss"),
    ("", "val_loss_step", "val_acc_step"),
    ("", "valid/loss", "train/loss, test/loss"),
    ("", "avg_loss", "preds"),
    ("train_objective", "objective", "preds"),
    ("train_objective", "val_loss", "objective, total_loss"),
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
