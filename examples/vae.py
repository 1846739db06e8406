"""Several losses: a variational autoencoder, its loss and the two parts of it.

    python examples/vae.py

The step returns all three in a dict, and `epoch_loss_keys` names those to record.
"""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from epoch_mixin import EpochLossMixin


class VAE(EpochLossMixin, pl.LightningModule):
    epoch_loss_keys = ("loss", "reconstruction", "kl")  # all in nats per image

    def __init__(self, latent=4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.ReLU(), nn.Linear(64, 64))

    def losses(self, images):
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        logits = self.decoder(latent)
        reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(dim=1).mean()
        kl = (mean**2 + log_variance.exp() - log_variance - 1).sum(dim=1).mean() / 2
        return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}

    def training_step(self, batch, batch_idx):
        return self.losses(*batch)

    def validation_step(self, batch, batch_idx):
        return self.losses(*batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


pl.seed_everything(0)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
train, val = random_split(TensorDataset(images), [1400, 397], generator=torch.Generator().manual_seed(0))

model = VAE()
trainer = pl.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=256))

for key in model.epoch_loss_keys:
    for name in (key, "val_" + key):
        print(f"{name:18}", *(f"{loss:8.2f}" for loss in model.epoch_history[name]))
