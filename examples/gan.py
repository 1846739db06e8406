"""Manual optimization with two optimizers: the losses of a generator and of a discriminator.

    python examples/gan.py

`epoch_loss_keys` names both losses, and the step returns them in a dict.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from epoch_mixin import EpochLossMixin


class GAN(EpochLossMixin, pl.LightningModule):
    epoch_loss_keys = ("g_loss", "d_loss")

    def __init__(self, latent=16):
        super().__init__()
        self.automatic_optimization = False
        self.latent = latent
        self.generator = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        (images,) = batch
        g_optimizer, d_optimizer = self.optimizers()
        fakes = self.generator(torch.randn(len(images), self.latent, device=self.device))
        d_loss = (self.verdict(images, real=True) + self.verdict(fakes.detach(), real=False)) / 2
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        g_loss = self.verdict(fakes, real=True)
        g_optimizer.zero_grad()
        self.manual_backward(g_loss)
        g_optimizer.step()

        return {"g_loss": g_loss, "d_loss": d_loss}

    def verdict(self, images, real):
        logits = self.discriminator(images)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.discriminator)]


pl.seed_everything(0)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)

model = GAN()
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, DataLoader(TensorDataset(images), batch_size=32, shuffle=True))

for epoch, (g_loss, d_loss) in enumerate(zip(model.epoch_history["g_loss"], model.epoch_history["d_loss"])):
    print(f"epoch {epoch}: g_loss {g_loss:.2f}, d_loss {d_loss:.2f}")
