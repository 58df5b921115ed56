"""The losses that are compared: each from its own package, asked for the same thing, and held to its own definition.

A provider makes ``loss(logits, target) -> scalar`` for a target of class indices (N, 1, *spatial). ``truth`` are the
arguments of `tversky_kernels.reference.tversky_loss` that define what it should return; a provider whose value
disagrees is marked wrong and gets no figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import tversky_kernels as tk

ALPHA, BETA, SMOOTH = 0.3, 0.7, 1e-5
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[], Loss]
    truth: dict = dataclasses.field(default_factory=dict)
    #: What is added to the truth: a loss that returns -Dice is 1 less.
    offset: float = 0.0
    devices: tuple[str, ...] = ("cpu", "cuda")


def _tversky_of_counts(tp, fp, fn):
    return (1 - (tp + SMOOTH) / (tp + ALPHA * fp + BETA * fn + SMOOTH)).mean()


def lean_gather(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The leanest eager loss we know: no one-hot, only the softmax is of the volume's size."""
    samples, classes = logits.shape[:2]
    p = logits.softmax(1).flatten(2)
    label = target.flatten(1).long()
    zeros = p.new_zeros(samples, classes)
    right = p.gather(1, label[:, None])[:, 0]
    tp = zeros.scatter_add(1, label, right)
    there = zeros.scatter_add(1, label, torch.ones_like(right))
    return _tversky_of_counts(tp, p.sum(-1) - tp, there - tp)


def lean_mask(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same with a mask, which a compiler fuses into the sums."""
    p = logits.softmax(1).flatten(2)
    is_class = target.flatten(2) == torch.arange(p.size(1), device=p.device)[:, None]
    zero = p.new_zeros(())
    tp = torch.where(is_class, p, zero).sum(-1)
    return _tversky_of_counts(tp, torch.where(is_class, zero, p).sum(-1), torch.where(is_class, 1 - p, zero).sum(-1))


def _compiled(function: Loss) -> Callable[[], Loss]:
    def make() -> Loss:
        torch._dynamo.reset()
        return torch.compile(function)

    return make


def _ours(backend: str, inplace: bool = False) -> Callable[[], Loss]:
    return lambda: tk.TverskyLoss(alpha=ALPHA, beta=BETA, backend=backend, inplace_backward=inplace)


def _monai_tversky() -> Loss:
    from monai.losses import TverskyLoss

    return TverskyLoss(softmax=True, to_onehot_y=True, alpha=ALPHA, beta=BETA)


def _monai_dice() -> Loss:
    from monai.losses import DiceLoss

    return DiceLoss(softmax=True, to_onehot_y=True)


PROVIDERS = {
    p.name: p
    for p in (
        Provider("ours", _ours("auto")),
        Provider("ours, in place", _ours("auto", inplace=True)),
        Provider("our reference", _ours("reference")),
        Provider("lean eager, gather", lambda: lean_gather),
        Provider("lean eager, mask", lambda: lean_mask),
        Provider("lean compiled, gather", _compiled(lean_gather)),
        Provider("lean compiled, mask", _compiled(lean_mask)),
        Provider("MONAI TverskyLoss", _monai_tversky),
        # MONAI's Dice with smoothing 2 s is a Tversky loss at 1/2, 1/2 with s.
        Provider("MONAI DiceLoss", _monai_dice, {"alpha": 0.5, "beta": 0.5, "smooth_nr": 5e-6, "smooth_dr": 5e-6}),
    )
}
