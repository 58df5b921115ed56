"""Training patches: drawn anywhere or centred on lesions, flipped and scaled, by MONAI's transforms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import monai.transforms as mt
import numpy as np
import torch
from recipes import Sampling
from torch.utils.data import DataLoader, Dataset
from volumes import Volume, plain

#: The share of patches that nnU-Net 2 centres on the foreground.
FOREGROUND_SHARE = 1 / 3
KEYS = ("image", "label")


class PatchDataset(Dataset):
    """Patch i of a fold is the same whatever came before and whoever loads it, so that a run can be resumed.

    Items are dictionaries of image (M, D, H, W) float32 and label (1, D, H, W) uint8.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        patch_size: Sequence[int],
        batch_size: int,
        steps: int,
        sampling: Sampling,
        lesion_share: float = 0.5,
        key: Sequence[int] = (0, 0),
    ):
        self.batch_size, self.steps, self.sampling = batch_size, steps, sampling
        self.key = tuple(key)
        pad, indices = mt.SpatialPad(patch_size), mt.FgBgToIndicesd("label")
        self.items = []
        for v in volumes:
            lowest = v.image.flatten(1).min(1).values.view(-1, 1, 1, 1)
            image = plain(pad(v.image - lowest)) + lowest  # padded with each modality's lowest value
            self.items.append(indices({"image": image, "label": plain(pad(v.label))}))
        augment = [
            *(mt.RandFlipd(KEYS, prob=0.5, spatial_axis=axis) for axis in range(3)),
            mt.RandScaleIntensityd("image", factors=0.1, prob=0.5),
            mt.RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        ]
        self.anywhere = mt.Compose([mt.RandSpatialCropd(KEYS, patch_size, random_size=False), *augment])
        self.centred = {
            share: mt.Compose(
                [
                    mt.RandCropByPosNegLabeld(
                        KEYS,
                        label_key="label",
                        spatial_size=patch_size,
                        pos=share,
                        neg=1 - share,
                        fg_indices_key="label_fg_indices",
                        bg_indices_key="label_bg_indices",
                    ),
                    *augment,
                ]
            )
            for share in (lesion_share, 1.0)
        }
        self.lesion_share = lesion_share

    def __len__(self) -> int:
        return self.steps * self.batch_size

    def crop_of(self, index: int) -> mt.Compose:
        """How patch ``index`` is drawn."""
        if self.sampling == "balanced" or (self.sampling == "two-step" and index < len(self) // 2):
            return self.centred[self.lesion_share]
        if self.sampling == "foreground":
            plain = min(round(self.batch_size * (1 - FOREGROUND_SHARE)), self.batch_size - 1)
            return self.anywhere if index % self.batch_size < plain else self.centred[1.0]
        return self.anywhere

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = np.random.RandomState(np.random.SeedSequence((*self.key, index)).generate_state(4))
        item, crop = self.items[random.randint(len(self.items))], self.crop_of(index)
        crop.set_random_state(state=random)
        patch = crop(item)
        patch = patch[0] if isinstance(patch, list) else patch
        return {key: plain(patch[key]).contiguous() for key in KEYS}

    def batches(
        self, first_step: int, workers: int = 0, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(image, label) of every step from ``first_step`` on; of several ranks, this one's share of each batch."""
        own = [i for i in range(first_step * self.batch_size, len(self)) if i % self.batch_size % ranks == rank]
        loader = DataLoader(
            torch.utils.data.Subset(self, own),
            self.batch_size // ranks,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )
        for batch in loader:
            yield batch["image"], batch["label"]
