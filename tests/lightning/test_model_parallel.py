from itertools import chain

import pytest
from pytorch_lightning import strategies
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from epoch_mixin import EpochLossMixin
from tests.helpers import trainer
from tests.lightning.processes import run_ranks
from tests.lightning.reference import Reference, SaveEverywhere, assert_exact
from tests.lightning.test_distributed import shard


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


def fit_on_rank(rank, cls, path=None, callbacks=()):
    parts = cls.sizes["data_parallel_size"]
    loaders = shard(rank % parts, parts, 21, 4), shard(rank % parts, parts, 7, 2)
    strategy = strategies.ModelParallelStrategy(**cls.sizes)
    model = cls()
    runner = trainer(devices=2, strategy=strategy, use_distributed_sampler=False, callbacks=list(callbacks))
    runner.fit(model, *loaders, ckpt_path=path)
    return model.notes, model.epoch_history


def save_on_rank(rank, cls, root):
    saving = SaveEverywhere(root, ("on_train_batch_end",))
    return *fit_on_rank(rank, cls, callbacks=[saving]), list(saving.saved)


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
