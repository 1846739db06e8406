"""A notebook's ``%autoreload`` takes up an edited step, and the step goes on being recorded.

IPython is not needed: these are the parts of its `extensions/autoreload.py` that touch classes.
"""

import gc
import types
from contextlib import suppress

import torch

from tests.helpers import trainer

SOURCE = """
import pytorch_lightning as pl
import torch
from epoch_mixin import EpochLossMixin

class Base(EpochLossMixin, pl.LightningModule):
    weighed = 0

    def epoch_loss_weight(self, batch):
        self.weighed += 1
        return 1

    def training_step(self, batch):
        return torch.tensor(NUMBER, requires_grad=True)

class Model(Base):
    def training_step(self, batch):
        return super().training_step(batch) + 100

class Heir(Base):
    pass
"""


def made(number):
    space = {}
    exec(SOURCE.replace("NUMBER", f"{number}.0"), space)
    return [space[name] for name in ("Base", "Model", "Heir")]


def update_function(old, new):
    for name in ("__code__", "__defaults__", "__doc__", "__closure__", "__globals__", "__dict__"):
        with suppress(AttributeError, TypeError):
            setattr(old, name, getattr(new, name))


def update_class(old, new):
    """As IPython 8 does; IPython 9 does so wherever its `patch_function` finds nothing to write into."""
    for name in list(vars(old)):
        with suppress(AttributeError, TypeError):
            if not hasattr(new, name):
                delattr(old, name)
                continue
            before, after = getattr(old, name), getattr(new, name)
            if (before == after) is True:
                continue
            for kind, update in ((type, update_class), (types.FunctionType, update_function)):
                if isinstance(before, kind) and isinstance(after, kind):
                    update(before, after)
                    break
            else:
                setattr(old, name, after)
    for name in vars(new).keys() - vars(old).keys():
        with suppress(AttributeError, TypeError):
            setattr(old, name, getattr(new, name))
    for instance in gc.get_referrers(old):
        if type(instance) is old:
            object.__setattr__(instance, "__class__", new)


def step(model):
    """What the step gives, and how often it is recorded."""
    before = model.weighed
    return model.training_step(torch.zeros(1)).item(), model.weighed - before


def test_old_and_new_instances_run_the_edited_step_and_are_recorded():
    versions = [made(1)]
    instances = [cls() for cls in versions[0]]
    for number in (2, 3):
        new = made(number)
        for old in versions:  # as IPython, which remembers every old class that is alive
            for pair in zip(old, new):
                update_class(*pair)
        versions.append(new)
        expected = [(number, 1), (number + 100, 1), (number, 1)]
        assert [step(model) for model in instances] == expected
        for version in versions:
            assert [step(cls()) for cls in version] == expected


def test_no_class_holds_itself():
    for cls in made(1):
        assert not [value for value in vars(cls).values() if value is cls]


def test_a_method_that_has_left_the_file_and_one_that_has_come_are_recorded_from_the_next_fit():
    _, Model, _ = made(1)
    model, data = Model(), torch.utils.data.DataLoader(torch.zeros(2, 1))
    del Model.training_step  # as IPython 9 does with a method that has left the file
    Model.configure_optimizers, Model.on_train_epoch_end = lambda self: None, lambda self: None
    for expected in ([1.0], [1.0, 1.0]):
        trainer(max_epochs=1).fit(model, data)
        assert model.epoch_losses == expected
