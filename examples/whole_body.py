"""Trains on a whole-body CT with 62 structures; the last layer and the loss are one, so that the logits never exist.

python examples/whole_body.py                      fetches the CT into .data/whole_body, trains, prints Dice and memory
python examples/whole_body.py --head convolution   the same with a convolution, and the loss of its logits

The CT (122 x 101 x 112 voxels of 3 mm, one patient) is TotalSegmentator's example, Wasserthal et al. 2023,
doi:10.1148/ryai.230024, Apache-2.0, taken from that package's source archive. The labels are a model's output. The Dice
is that of the training data: it shows that a network learns with this head, not what it does on another patient.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import monai.transforms as mt
import nibabel
import numpy as np
import packages
import torch
from monai.data import DataLoader, Dataset
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from tqdm import tqdm

import tversky_kernels as tk
from tversky_kernels._memory import peak_bytes

PACKAGE = "TotalSegmentator==2.18.0"
SHA256 = "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03"  # of its source archive
FOLDER = "totalsegmentator-2.18.0/tests/reference_files/"
CT, LABEL = "example_ct.nii.gz", "example_seg_fast_force_split.nii.gz"
FEATURES = 32  # channels that the body hands to the head
LOSS = {"alpha": 0.5, "beta": 0.5, "batch": True, "absent": "skip"}  # a patch holds some of the structures
KEYS = ("image", "label")


class Convolution(torch.nn.Conv3d):
    """The usual last layer, called as `tk.TverskyHead` is."""

    def __init__(self, in_channels: int, classes: int):
        super().__init__(in_channels, classes, 1)
        self.loss = tk.TverskyCELoss(**LOSS)

    def forward(self, features: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(features)
        return logits if target is None else self.loss(logits, target)


HEADS = {
    "tversky": lambda classes: tk.TverskyHead(FEATURES, classes, loss="tversky_ce", **LOSS),
    "convolution": lambda classes: Convolution(FEATURES, classes),
}


def read(folder: pathlib.Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Image and labels (1, D, H, W), the labels uint8 and numbered without gaps, and how many classes there are."""
    if not all((folder / name).is_file() for name in (CT, LABEL)):
        packages.unpack(PACKAGE, SHA256, lambda name: name.endswith(("/" + CT, "/" + LABEL)), 3, FOLDER, folder, True)
    image, label = (np.asarray(nibabel.load(folder / name).dataobj) for name in (CT, LABEL))
    values, classes = np.unique(label, return_inverse=True)
    image = mt.ScaleIntensityRange(-1000, 1000, -1, 1, clip=True)(torch.from_numpy(image.astype(np.float32))[None])
    return image.as_tensor(), torch.from_numpy(classes.reshape(label.shape).astype(np.uint8))[None], len(values)


def main() -> None:
    """Trains, then segments the CT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path(".data/whole_body"))
    parser.add_argument("--head", choices=HEADS, default="tversky")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--patch", type=int, default=64, help="a multiple of 8 (%(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    image, label, classes = read(given.data)

    size = (given.patch,) * 3
    pad, crop = mt.SpatialPadd(KEYS, size), mt.RandSpatialCropd(KEYS, size, random_size=False)
    transform = mt.Compose([pad, crop, mt.EnsureTyped(KEYS, track_meta=False)]).set_random_state(0)
    data = Dataset([{"image": image, "label": label}] * given.steps, transform)
    patches = DataLoader(data, num_workers=given.workers)

    channels, strides = (16, 32, 64, 128), (2, 2, 2)
    body = UNet(3, in_channels=1, out_channels=FEATURES, channels=channels, strides=strides, norm="instance").to(device)
    head = HEADS[given.head](classes).to(device)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        loss = head(body(batch["image"].to(device)), batch["label"].to(device))
        loss.backward()
        optimizer.step()
        return loss.detach()

    total, started = torch.zeros((), device=device), time.perf_counter()
    for batch in tqdm(patches, desc=f"{given.head} head, {classes} classes", unit="step"):
        total += step(batch)
    mean, seconds = total.item() / given.steps, (time.perf_counter() - started) / given.steps
    print(f"mean training loss {mean:.3f}, {seconds:.2f} s a step")
    print(f"memory of a training step: {peak_bytes(lambda: step(batch), device) / 2**20:.0f} MiB")

    with torch.inference_mode():
        logits = sliding_window_inference(image[None].to(device), size, 1, lambda x: head(body(x)), overlap=0.25)
        dice = DiceMetric(include_background=False, num_classes=classes, ignore_empty=True)
        dice(logits.argmax(1, keepdim=True).cpu(), label[None])
    print(f"mean Dice over {classes - 1} structures of the training data {dice.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
