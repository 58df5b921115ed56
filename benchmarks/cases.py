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
        # On the device, so that a card does not wait for the host to draw them.
        of_device = generator if self.device == "cpu" else torch.Generator(self.device).manual_seed(seed)
        logits = torch.randn(shape, generator=of_device, device=self.device)
        axis = torch.arange(self.side, dtype=torch.float32, device=self.device)
        target = torch.zeros(self.samples, *(self.side,) * 3, dtype=torch.int64, device=self.device)
        for n in range(self.samples):
            for c in range(1, self.classes):
                z, y, x = (torch.rand(3, generator=generator) * self.side).tolist()
                radius = self.side * (0.1 + 0.15 * torch.rand((), generator=generator).item())
                squares = ((axis - z) ** 2)[:, None, None] + ((axis - y) ** 2)[:, None] + (axis - x) ** 2
                target[n].masked_fill_(squares < radius**2, c)
        target = target.unsqueeze(1)
        if self.form == "dense":
            target = torch.zeros(shape, dtype=torch.uint8, device=self.device).scatter_(1, target, 1)
        layout = torch.channels_last_3d if self.layout == "channels_last" else torch.contiguous_format
        return (
            logits.to(DTYPES[self.dtype]).to(memory_format=layout),
            target.to({**LABELS, **DTYPES}[self.label]).to(memory_format=layout),
        )


#: Sides, classes and samples. Of a card's, those of two classes are within its L2 cache, as a network leaves them.
SHAPES = {
    "cpu": ((128, 2, 1), (128, 4, 1), (96, 14, 1), (64, 32, 1), (64, 118, 1)),
    "cuda": ((128, 2, 2), (128, 4, 2), (128, 14, 2), (128, 32, 2), (128, 33, 1), (128, 118, 1)),
}
LARGER = ((192, 2, 2), (192, 4, 2), (192, 14, 2), (192, 32, 2))


def _cases(shapes, device: str, dtypes=("float32",), labels=("uint8",)) -> list[Case]:
    return [
        Case(side, classes, samples, dtype, label, device)
        for label in labels
        for side, classes, samples in shapes
        for dtype in dtypes
    ]


def core(device: str) -> list[Case]:
    """The cases by which the project is judged."""
    if device == "cuda":
        return _cases((*SHAPES["cuda"], *LARGER), device, ("float32", "bfloat16"), ("uint8", "int64"))
    return _cases(SHAPES[device], device, labels=("uint8", "int64"))


def plain(device: str) -> list[Case]:
    """Each shape once: float32, on a card bfloat16 too, uint8 labels."""
    return _cases(SHAPES[device], device, ("float32", "bfloat16") if device == "cuda" else ("float32",))


def half(device: str) -> list[Case]:
    """The same in both half precisions, float32 beside them."""
    return _cases(SHAPES[device], device, ("float32", "float16", "bfloat16"))


def small(device: str) -> list[Case]:
    """Volumes so small that it is the calls that cost."""
    return _cases([(side, classes, 1) for side in (16, 32) for classes in (2, 4, 14)], device)


def quick(device: str) -> list[Case]:
    """A few, for a look."""
    return _cases(((64, 2, 1), (64, 4, 1), (48, 14, 1)), device)


SETS = {function.__name__: function for function in (core, plain, half, small, quick)}
