"""Trains a U-Net on NIfTI volumes with a Tversky loss: a script to copy.

python examples/minimal.py DIR --steps 500        reads DIR/*_image.nii.gz and DIR/*_label.nii.gz (0 and 1)
"""

import argparse
import pathlib

import monai.transforms as mt
import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.networks.nets import UNet

import tversky_kernels as tk

KEYS = ("image", "label")


def loaders(folder: pathlib.Path, patch: int, steps: int, workers: int):
    """The training patches and the last volume, which validates."""
    pairs = [(p, p.with_name(p.name.replace("_image", "_label"))) for p in sorted(folder.glob("*_image.nii.gz"))]
    files = [dict(zip(KEYS, pair, strict=True)) for pair in pairs]
    read = [mt.LoadImaged(KEYS, ensure_channel_first=True), mt.NormalizeIntensityd("image", nonzero=True)]
    size = (patch,) * 3
    crop = mt.RandCropByPosNegLabeld(KEYS, label_key="label", spatial_size=size, pos=1, neg=1, num_samples=2)
    # MONAI reads labels as float32; class indices are best as uint8: a quarter of the memory.
    plain = mt.EnsureTyped(KEYS, dtype=(torch.float32, torch.uint8), track_meta=False)
    training = Dataset(files[:-1] * steps, mt.Compose([*read, mt.SpatialPadd(KEYS, size), crop, plain]))
    validation = Dataset(files[-1:], [*read, plain])
    return DataLoader(training, batch_size=1, shuffle=True, num_workers=workers), DataLoader(validation, batch_size=1)


def main() -> None:
    """Trains, then validates on the last volume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = UNet(3, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2), norm="instance").to(device)
    loss_of = tk.TverskyCELoss(alpha=0.3, beta=0.7, batch=True)  # takes logits and class indices
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    batches, validation = loaders(given.folder, given.patch, given.steps, given.workers)
    total = torch.zeros((), device=device)  # summed there: reading it would wait for the device at every step
    for _, batch in zip(range(given.steps), batches, strict=False):
        image, label = (batch[key].to(device, non_blocking=True) for key in KEYS)
        loss = loss_of(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    print(f"mean training loss {total.item() / given.steps:.3f}")
    dice = DiceMetric(include_background=False, num_classes=2)
    network.eval()
    with torch.inference_mode():
        for batch in validation:
            logits = sliding_window_inference(batch["image"].to(device), (given.patch,) * 3, 2, network, overlap=0.5)
            dice(decollate_batch(logits.argmax(1, keepdim=True)), decollate_batch(batch["label"].to(device)))
    print(f"Dice of the last volume {dice.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
