"""A LightningModule with a Tversky loss; on several devices the loss is that of the whole batch.

python examples/lightning_module.py DIR --steps 500 --devices 2 --accelerator cpu     DIR as for minimal.py
"""

import argparse
import pathlib

import lightning
import torch
from minimal import loaders
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet

import tversky_kernels as tk


class Segmentation(lightning.LightningModule):
    """A U-Net of two classes."""

    def __init__(self, patch: int = 64, lr: float = 1e-3):
        super().__init__()
        self.patch, self.lr = patch, lr
        self.network = UNet(3, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2), norm="instance")
        self.loss = tk.TverskyCELoss(alpha=0.3, beta=0.7, batch=True)

    def setup(self, stage: str) -> None:
        """The counts are summed over all processes, so that the parameters get the gradient of one process."""
        self.loss.process_group = True if self.trainer.world_size > 1 else None

    def training_step(self, batch, index: int) -> torch.Tensor:
        """The loss of a batch of patches."""
        loss = self.loss(self.network(batch["image"]), batch["label"])
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch, index: int) -> None:
        """Dice of the whole volume."""
        logits = sliding_window_inference(batch["image"], (self.patch,) * 3, 2, self.network, overlap=0.5)
        found, label = logits.argmax(1, keepdim=True) == 1, batch["label"] == 1
        dice = 2 * (found & label).sum() / (found.sum() + label.sum()).clamp_min(1)
        self.log("dice", dice, prog_bar=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    """Trains, then validates on the last volume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    given = parser.parse_args()
    training, validation = loaders(given.folder, given.patch, given.steps, given.workers)
    trainer = lightning.Trainer(
        max_steps=given.steps, accelerator=given.accelerator, devices=given.devices, logger=False,
        strategy="ddp" if given.devices > 1 else "auto", enable_checkpointing=False, num_sanity_val_steps=0,
        val_check_interval=None, check_val_every_n_epoch=None,
    )  # fmt: skip
    module = Segmentation(given.patch)
    trainer.fit(module, training)
    trainer.validate(module, validation)


if __name__ == "__main__":
    main()
