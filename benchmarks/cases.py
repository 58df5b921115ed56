"""The shapes that are measured, and their inputs."""

from __future__ import annotations

import dataclasses

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
LABELS = {"uint8": torch.uint8, "int64": torch.int64, "int16": torch.int16, "int32": torch.int32}
FORMS, ACTIVATIONS, LAYOUTS = ("index", "dense"), ("softmax", "sigmoid"), ("contiguous", "channels_last")


@dataclasses.dataclass(frozen=True)
class Case:
    """One volume: samples, classes, side of the cube, types, device. ``name`` says all of it and can be parsed.

    form: "index" or "dense" target; activation: of the loss; layout: of the logits and of a dense target. They are in
    the name where they are not the first of `FORMS`, `ACTIVATIONS` and `LAYOUTS`.
    """

    side: int
    classes: int
    samples: int = 1
    dtype: str = "float32"
    label: str = "uint8"
    device: str = "cpu"
    form: str = FORMS[0]
    activation: str = ACTIVATIONS[0]
    layout: str = LAYOUTS[0]

    @property
    def name(self) -> str:
        name = f"{self.samples}x{self.classes}x{self.side}^3,{self.dtype},{self.label},{self.device}"
        return ",".join((name, *self.variant))

    @property
    def variant(self) -> tuple[str, ...]:
        """What is not the plain case: class indices, softmax, contiguous."""
        return tuple(
            value
            for value, usual in (
                (self.form, FORMS[0]),
                (self.activation, ACTIVATIONS[0]),
                (self.layout, LAYOUTS[0]),
            )
            if value != usual
        )

    @classmethod
    def parse(cls, name: str) -> Case:
        shape, dtype, label, device, *variant = name.split(",")
        samples, classes, side = shape.removesuffix("^3").split("x")
        found = {}
        for value in variant:
            (field,) = (
                f
                for f, values in (("form", FORMS), ("activation", ACTIVATIONS), ("layout", LAYOUTS))
                if value in values
            )
            found[field] = value
        if dtype not in DTYPES or label not in (*LABELS, *DTYPES):
            raise ValueError(name)
        return cls(int(side), int(classes), int(samples), dtype, label, device, **found)

    @property
    def voxels(self) -> int:
        return self.samples * self.side**3

    @property
    def logits_bytes(self) -> int:
        return self.voxels * self.classes * DTYPES[self.dtype].itemsize

    @property
    def target_bytes(self) -> int:
        values = self.voxels * (self.classes if self.form == "dense" else 1)
        return values * {**LABELS, **DTYPES}[self.label].itemsize

    @property
    def floor_copies(self) -> float:
        """The fewest bytes of one forward and backward, 3U + 2T, in copies of the logits (2U each)."""
        return (3 * self.logits_bytes + 2 * self.target_bytes) / (2 * self.logits_bytes)

    def inputs(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and a target (N, 1 or C, D, H, W): random balls of every class on background, as organs in a scan."""
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
        target = target.unsqueeze(1)
        if self.form == "dense":
            target = torch.zeros(shape, dtype=torch.uint8).scatter_(1, target, 1)
        layout = torch.channels_last_3d if self.layout == "channels_last" else torch.contiguous_format
        return (
            logits.to(DTYPES[self.dtype]).to(self.device, memory_format=layout),
            target.to({**LABELS, **DTYPES}[self.label]).to(self.device, memory_format=layout),
        )


SHAPES = ((128, 2), (128, 4), (96, 14), (64, 32), (64, 118))


def core(device: str) -> list[Case]:
    """The cases by which the project is judged."""
    return [Case(side, classes, label=label, device=device) for label in ("uint8", "int64") for side, classes in SHAPES]


def plain(device: str) -> list[Case]:
    """The core cases with uint8 labels."""
    return [Case(side, classes, device=device) for side, classes in SHAPES]


def half(device: str) -> list[Case]:
    """The same in both half precisions, float32 beside them."""
    dtypes = ("float32", "float16", "bfloat16")
    return [Case(side, classes, dtype=dtype, device=device) for side, classes in SHAPES for dtype in dtypes]


def small(device: str) -> list[Case]:
    """Volumes so small that it is the calls that cost."""
    return [Case(side, classes, device=device) for side in (16, 32) for classes in (2, 4, 14)]


def quick(device: str) -> list[Case]:
    """A few, for a look."""
    return [Case(64, 2, device=device), Case(64, 4, device=device), Case(48, 14, device=device)]


SETS = {function.__name__: function for function in (core, plain, half, small, quick)}
