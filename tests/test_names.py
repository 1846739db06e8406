import pytest

from epoch_mixin._names import Partners, candidates, key_for, matches, without_stage


def assert_names(key, names, others, keys=(), stage="val", partners=()):
    """Assert that ``names`` mean the key, each more closely than the next one, and that ``others`` do not."""
    names, others = (
        {name: matches(name, keys or (key,), stage, ((key, partners),)).get(key) for name in some}
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
    assert_names("miou", ["val_mIoU", "mIoU"], ["val_IoU"])
    assert_names("verlust_ω", ["val_Verlust/Ω", "ω verlust"], ["val_Verlust"])


def test_a_name_means_the_key_that_it_is_closest_to():
    keys = ("loss", "total_loss", "kl", "kl_loss")
    assert_names("loss", ["val_loss", "val_avg_loss"], ["val_total_loss", "val_kl_loss"], keys)
    assert_names("total_loss", ["val_total_loss"], ["val_loss", "val_avg_total_loss"], keys)
    assert_names("kl_loss", ["val_kl_loss"], ["val_loss", "val_kl"], keys)


def names(returned, logged, keys=("loss",), partners=(), stage="val"):
    """For each key, the names in the order in which they count, and those that only a number tells apart."""
    found = candidates(returned, logged, keys, stage, partners)
    return {key: ([candidate.name for candidate in some], numbered) for key, (some, numbered) in found.items()}


def test_what_is_returned_comes_first_and_in_it_the_key_itself():
    returned, logged = ("val_loss", "kl", "loss"), ("loss", "val_loss")
    expected = {"loss": (["loss", "val_loss", "val_loss", "loss"], ()), "kl": (["kl"], ())}
    assert names(returned, logged, ("loss", "kl")) == expected
    found = candidates(returned, logged, ("loss",), "val", ())["loss"].names
    assert [candidate.is_logged for candidate in found] == [False, False, True, True]


def test_words_come_before_partners_and_a_name_that_has_both_comes_first():
    partners = (("loss", ("train_total_loss", "train_bpd")),)
    logged = ("val_bpd", "val_avg_loss", "val_loss", "val_total_loss", "val_acc")
    assert names((), logged, partners=partners)["loss"][0] == ["val_total_loss", "val_loss", "val_avg_loss", "val_bpd"]
    assert names((), logged, partners=partners, stage="train")["loss"][0] == []


def test_partners_count_with_the_stage_exchanged():
    bpd = ["val_loss", "val_bpd", "val_bpd_0"], ["train_bpd", "val_bpd_ema", "val_ce"]
    assert_names("loss", *bpd, partners=("train_bpd",))
    assert_names("loss", ["val_ce_loss", "val_loss", "loss"], ["val_ce"], partners=("train_bpd", "loss/CE/train"))
    assert_names("loss", ["val_loss", "val"], ["epoch", "", "step"], partners=("train",))


@pytest.mark.parametrize(
    ("logged", "kept", "numbered"),
    [
        (("val_loss_1", "val_loss_2"), [], ("val_loss_1", "val_loss_2")),
        (("val/loss/0", "loss_1", "val_acc"), [], ("val/loss/0", "loss_1")),
        (("val_loss_0.1", "val_loss_0.9"), [], ("val_loss_0.1", "val_loss_0.9")),
        (("val_loss_1", "val_loss_2", "val_loss"), ["val_loss"], ("val_loss_1", "val_loss_2")),
        (("val_loss_1", "val_loss_2", "val_total_loss"), ["val_total_loss"], ("val_loss_1", "val_loss_2")),
        (("val_loss_1", "val_loss_total_2"), ["val_loss_1", "val_loss_total_2"], ()),
        (("val_loss_3", "val_acc_1"), ["val_loss_3"], ()),
        (("0/val_loss",), ["0/val_loss"], ()),
    ],
    ids=str,
)
def test_names_that_differ_in_a_number_are_no_evidence(logged, kept, numbered):
    assert names((), logged)["loss"] == (kept, numbered)
    assert names(logged, ())["loss"] == (kept, numbered)
    assert names(logged[:1], logged[1:])["loss"] == (kept, numbered)  # also where one is returned and one is logged


def test_a_name_of_a_key_with_a_number_leaves_no_other_number_to_a_key_without():
    found = names((), ("val_loss_1", "val_loss_2"), ("loss", "loss_1"))
    assert found == {"loss": ([], ("val_loss_1", "val_loss_2")), "loss_1": (["val_loss_1"], ())}


def test_a_partner_with_another_number_or_of_another_key_is_none():
    partners = (("loss", ("train_mse_1", "train_kl")),)
    assert names((), ("val_mse_2", "val_mse_1"), partners=partners)["loss"] == ([], ("val_mse_2", "val_mse_1"))
    assert names((), ("val_mse_2",), partners=partners)["loss"] == ([], ())
    assert names((), ("val_mse_1",), partners=partners)["loss"] == (["val_mse_1"], ())
    assert names((), ("val_kl",), ("loss", "kl"), partners) == {"loss": ([], ()), "kl": (["val_kl"], ())}


def test_of_names_that_are_as_close_the_first_one_comes_first():
    logged = ("valid_loss", "val/loss", "val_loss", "loss")
    assert names((), logged)["loss"][0] == [*logged]
    assert names((), logged[::-1])["loss"][0] == ["val_loss", "val/loss", "valid_loss", "loss"]


def test_numbers_of_a_key_tell_something():
    keys, logged = ("loss_1", "loss_2"), ("val_loss_1", "val_loss_2")
    assert names((), logged, keys) == {"loss_1": (["val_loss_1"], ()), "loss_2": (["val_loss_2"], ())}
    assert names((), logged, ("loss_1",)) == {"loss_1": (["val_loss_1"], ())}


def test_a_partner_is_one_as_long_as_every_step_confirms_it():
    partners = Partners({"kl": {"train_kl": True, "other": False}})
    assert partners.of_keys == (("kl", ("train_kl",)),)
    partners.add("loss", {"train_rec": True, "train_loss": False})
    assert partners.of_keys == (("kl", ("train_kl",)), ("loss", ("train_rec",)))
    partners.add("loss", {"train_rec": False})
    partners.add("loss", {"train_rec": True, "train_loss": True, "train_total": True})
    assert partners.of_keys == (("kl", ("train_kl",)), ("loss", ("train_total",)))
    assert Partners(partners.evidence).of_keys == partners.of_keys


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("val_mse", "mse"), ("val/Loss_best", "loss_best"), ("Dev KL step", "kl"), ("val_loss", "loss")),
        *(("val_loss_1", "loss_1"), ("val/loss/0.1", "loss_0_1"), ("epoch", ""), ("step_1", ""), ("val", "")),
    ],
)
def test_the_key_for_a_name(name, key):
    assert key_for(name) == key
    if key:
        assert_names(key, [name], [], keys=("other", key))


@pytest.mark.parametrize(
    ("key", "without"), [("val_loss", "loss"), ("train", ""), ("Recon.2", "Recon.2"), ("top1_train_acc", "top1_acc")]
)
def test_a_key_without_its_stage(key, without):
    assert without_stage(key) == without
