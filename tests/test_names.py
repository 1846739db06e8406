import pytest

from epoch_mixin._names import candidates, distances, key_for


def assert_names(key, names, others, keys=(), stage="val", partners=()):
    """Assert that ``names`` mean the key, each more closely than the next one, and that ``others`` do not."""
    names, others = (
        {name: distances(name, keys or (key,), stage, ((key, partners),)).get(key) for name in some}
        for some in (names, others)
    )
    assert None not in names.values() and [*names.values()] == sorted(set(names.values())), names
    assert not any(others.values()), others


@pytest.mark.parametrize(
    ("stage", "names", "others"),
    [
        ("val", ["val_loss", "val_loss_step", "loss", "avg_val_loss", "loss/mean"], ["loss_train", "val_loss_best"]),
        ("val", ["Loss/Validation", "dev_loss_epoch/dataloader_idx_0", "val/avg/loss/mean"], ["", "test_loss", "val"]),
        ("val", ["eval loss 1"], ["losses", "val-losses", "valloss", "mean", "step", "1", "train_val_loss"]),
        ("train", ["train_loss", "training/loss_step", "trainer.total.loss"], ["val_loss", "train_kl_loss", "train"]),
    ],
)
def test_names_are_compared_by_their_words(stage, names, others):
    assert_names("loss", names, others, stage=stage)


def test_words_that_a_key_has_tell_something():
    assert_names("total", ["val_total", "total"], ["val_loss", "val_mean_total"])
    assert_names("step_time", ["val_step_time", "step_time"], ["val_time"])
    assert_names("top1_train_acc", ["top1_train_acc"], ["top1_acc", "val_top1_acc"])
    assert_names("miou", ["val_mIoU", "mIoU"], ["val_IoU"])
    assert_names("verlust_ω", ["val_Verlust/Ω", "ω verlust"], ["val_Verlust"])


def test_a_name_means_the_key_that_it_is_closest_to():
    keys = ("loss", "total_loss", "kl", "kl_loss")
    assert_names("loss", ["val_loss", "val_avg_loss"], ["val_total_loss", "val_kl_loss"], keys)
    assert_names("total_loss", ["val_total_loss"], ["val_loss", "val_avg_total_loss"], keys)
    assert_names("kl_loss", ["val_kl_loss"], ["val_loss", "val_kl"], keys)


def test_what_is_returned_comes_first_and_in_it_the_key_itself():
    names, keys = (("val_loss", "kl", "loss"), ("val_loss", "loss")), ("loss", "kl")
    returned, logged = [(False, "loss"), (False, "val_loss")], [(True, "val_loss"), (True, "loss")]
    assert candidates(*names, False, keys, "val", ()) == {"loss": returned + logged, "kl": [(False, "kl")]}
    assert candidates(*names, True, keys, "val", ()) == {"loss": logged + returned, "kl": [(False, "kl")]}


def test_partners_come_first_with_the_stage_exchanged():
    bpd = ["val_bpd", "val_bpd_0", "val_loss"], ["train_bpd", "val_bpd_ema", "val_ce"]
    assert_names("loss", *bpd, partners=("train_bpd",))
    assert_names("loss", ["val_ce_loss", "val_loss", "loss"], ["val_ce"], partners=("train_bpd", "loss/CE/train"))
    assert_names("loss", ["val", "val_loss"], ["epoch", "", "step"], partners=("train",))


@pytest.mark.parametrize(
    ("name", "key"),
    [("val_mse", "mse"), ("val/Loss_best", "loss_best"), ("Dev KL step 0", "kl"), ("val_loss", "loss"), ("epoch", "")],
)
def test_the_key_for_a_name(name, key):
    assert key_for(name) == key
    if key:
        assert_names(key, [name], [], keys=("other", key))
