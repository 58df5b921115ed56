"""The shapes that are measured, and their inputs."""

from __future__ import annotations

import dataclasses

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
LABELS = {"uint8": torch.uint8, "int64": torch.int64, "int16": torch.int16, "int32": torch.int32}


@dataclasses.dataclass(frozen=True)
class Case:
    """One volume: samples, classes, side of the cube, types, device. ``name`` says all of it and can be parsed."""

    side: int
    classes: int
    samples: int = 1
    dtype: str = "float32"
    label: str = "uint8"
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.samples}x{self.classes}x{self.side}^3,{self.dtype},{self.label},{self.device}"

    @classmethod
    def parse(cls, name: str) -> Case:
        shape, dtype, label, device = name.split(",")
        samples, classes, side = shape.removesuffix("^3").split("x")
        return cls(int(side), int(classes), int(samples), dtype, label, device)

    @property
    def voxels(self) -> int:
        return self.samples * self.side**3

    @property
    def logits_bytes(self) -> int:
        return self.voxels * self.classes * DTYPES[self.dtype].itemsize

    @property
    def target_bytes(self) -> int:
        return self.voxels * LABELS[self.label].itemsize

    @property
    def floor_copies(self) -> float:
        """The fewest bytes of one forward and backward, 3U + 2T, in copies of the logits (2U each)."""
        return (3 * self.logits_bytes + 2 * self.target_bytes) / (2 * self.logits_bytes)

    def inputs(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and a target (N, 1, D, H, W): random balls of every class on background, as organs lie in a scan."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.samples, self.classes, *(self.side,) * 3)
        logits = torch.randn(shape, generator=generator)
        grid = torch.stack(torch.meshgrid(*(torch.arange(self.side, dtype=torch.float32),) * 3, indexing="ij"))
        target = torch.zeros(self.samples, *(self.side,) * 3, dtype=torch.int64)
        for n in range(self.samples):
            for c in range(1, self.classes):
                centre = torch.rand(3, generator=generator) * self.side
                radius = self.side * (0.1 + 0.15 * torch.rand((), generator=generator))
                target[n][((grid - centre[:, None, None, None]) ** 2).sum(0) < radius**2] = c
        return (
            logits.to(DTYPES[self.dtype]).to(self.device),
            target.unsqueeze(1).to(LABELS[self.label]).to(self.device),
        )


def core(device: str) -> list[Case]:
    """The cases by which the project is judged."""
    shapes = ((128, 2), (128, 4), (96, 14), (64, 32))
    return [Case(side, classes, label=label, device=device) for side, classes in shapes for label in ("uint8", "int64")]


def quick(device: str) -> list[Case]:
    """A few small ones, for a look."""
    return [Case(64, 2, device=device), Case(64, 4, device=device), Case(48, 14, device=device)]
