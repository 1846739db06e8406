from functools import partial
from itertools import chain

import pytest
import torch
from pytorch_lightning import strategies
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from epoch_mixin import EpochLossMixin
from tests.helpers import trainer
from tests.lightning.processes import run_ranks
from tests.lightning.reference import Reference, SaveEverywhere, Tracked, assert_exact
from tests.lightning.test_distributed import shard

HOOKS = ("on_train_batch_end", "on_validation_batch_end")


class Sharded(EpochLossMixin, Reference):
    """FSDP2: the ranks share the parameters out, and each has batches of its own."""

    sizes = dict(data_parallel_size=2, tensor_parallel_size=1)

    def configure_model(self):
        if not isinstance(self.layer.weight, DTensor):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])


class Parallel(EpochLossMixin, Reference):
    """Tensor parallel: the ranks share the layer out and see the same batches, and the loss is a DTensor."""

    sizes = dict(data_parallel_size=1, tensor_parallel_size=2)

    def configure_model(self):
        if not isinstance(self.layer.weight, DTensor):
            plan = RowwiseParallel(input_layouts=Replicate(), use_local_output=False)
            parallelize_module(self.layer, self.device_mesh["tensor_parallel"], plan)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        assert isinstance(loss, DTensor)
        self.note("train step", loss.full_tensor().item(), len(batch[0]))
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.note("val step", loss.full_tensor().item(), len(batch[0]))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.5)


def fit_on_rank(rank, cls, path=None, callbacks=(), **options):
    parts = cls.sizes["data_parallel_size"]
    loaders = shard(rank % parts, parts, 21, 4), shard(rank % parts, parts, 7, 2)
    strategy = strategies.ModelParallelStrategy(**cls.sizes, **options)
    model = cls()
    runner = trainer(devices=2, strategy=strategy, use_distributed_sampler=False, callbacks=list(callbacks))
    runner.fit(model, *loaders, ckpt_path=path)
    return model.notes, model.epoch_history


def save_on_rank(rank, cls, root, hooks=("on_train_batch_end",), **options):
    saving = SaveEverywhere(root, hooks)
    return *fit_on_rank(rank, cls, callbacks=[saving], **options), list(saving.saved)


# Lightning 2.4 brought it. Its other strategy for sharding, FSDP, is for GPUs only.
if hasattr(strategies, "ModelParallelStrategy"):

    @pytest.mark.slow
    @pytest.mark.parametrize("cls", [Sharded, Parallel])
    def test_model_shared_out_over_ranks(tmp_path, cls):
        ranks = run_ranks(save_on_rank, 2, cls, tmp_path)
        paths = ranks[0][2]
        for path in (None, paths[1], paths[-1]):
            ranks = run_ranks(fit_on_rank, 2, cls, path)
            for _, history in ranks:
                assert len(history["loss"]) == 2
                assert_exact(history, list(chain(*(notes for notes, _ in ranks))))

    class Alone(Tracked):
        """As `Parallel`, on one device."""

        # Lightning loads a checkpoint of one device on several only if its optimizer has a state.
        configure_optimizers = Parallel.configure_optimizers

        def loss(self, batch):
            return self.layer(batch[0]).square().mean()

    def fit_alone(path=None, callbacks=()):
        model = Alone()
        trainer(callbacks=list(callbacks)).fit(model, shard(0, 1, 21, 4), shard(0, 1, 7, 2), ckpt_path=path)
        return model.notes, model.epoch_history

    @pytest.mark.slow
    def test_ranks_that_share_a_copy_of_the_model_count_once(tmp_path):
        """What counted twice on two such ranks would weigh too much beside what one device adds, and the reverse."""
        saving = SaveEverywhere(tmp_path, HOOKS)
        fit_alone(callbacks=[saving])
        whole = partial(fit_on_rank, save_distributed_checkpoint=False)
        for path in list(saving.saved)[2::5]:
            for _, history in (ranks := run_ranks(whole, 2, Parallel, path)):
                assert_exact(history, ranks[0][0])
        paths = run_ranks(partial(save_on_rank, hooks=HOOKS, save_distributed_checkpoint=False), 2, Parallel, tmp_path)
        for path in paths[0][2][2::5]:
            notes, history = fit_alone(path)
            # Of the steps that both ranks made, and noted.
            assert_exact(history, list(dict.fromkeys(notes)))
