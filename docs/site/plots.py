"""Draws the pictures of the API pages: python docs/site/plots.py. Values and gradients are those of the kernels."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import tversky_kernels as tk

OUT = pathlib.Path(__file__).resolve().parents[1] / "api" / "plots"
VOXELS, LESION, ELSEWHERE = 10_000, 100, 0.02
CURVES = {
    "tversky": [
        (f"α = {a}, β = {b}", tk.tversky_loss, {"alpha": a, "beta": b}) for a, b in ((0.5, 0.5), (0.3, 0.7), (0.1, 0.9))
    ],
    "tversky_ce": [(f"ce_weight = {w}", tk.tversky_ce_loss, {"ce_weight": w}) for w in (0.0, 0.5, 1.0)],
    "dice": [("plain", tk.dice_loss, {}), ("squared=True", tk.dice_loss, {"squared": True})],
    "jaccard": [("Jaccard", tk.jaccard_loss, {}), ("Dice", tk.dice_loss, {})],
    "focal_tversky": [(f"gamma = {g}", tk.focal_tversky_loss, {"gamma": g}) for g in (1.0, 0.75, 0.5)],
    "generalized_dice": [
        (f'weight="{w}"', tk.generalized_dice_loss, {"weight": w}) for w in ("square", "simple", "uniform")
    ],
}


def values(loss, options: dict, probabilities: torch.Tensor) -> tuple[list[float], list[float]]:
    """The loss and the gradient by the logit of one lesion voxel, at each probability."""
    label = torch.zeros(1, VOXELS, dtype=torch.uint8)
    label[:, :LESION] = 1
    found = []
    for p in probabilities.tolist():
        of_voxels = torch.full((VOXELS,), ELSEWHERE, dtype=torch.float64)
        of_voxels[:LESION] = p
        logits = torch.stack((torch.zeros(VOXELS, dtype=torch.float64), torch.logit(of_voxels)))[None].requires_grad_()
        value = loss(logits, label, **options)
        (gradient,) = torch.autograd.grad(value, logits)
        found.append((value.item(), gradient[0, 1, 0].item()))
    return [x for x, _ in found], [x for _, x in found]


def main() -> None:
    """Draws all of them."""
    OUT.mkdir(parents=True, exist_ok=True)
    probabilities = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    for name, curves in CURVES.items():
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        for label, loss, options in curves:
            of_loss, of_gradient = values(loss, options, probabilities)
            left.plot(probabilities, of_loss, label=label)
            right.plot(probabilities, of_gradient, label=label)
        left.set(ylabel="loss", xlabel="probability of the lesion's voxels", ylim=(0, None))
        right.set(ylabel="gradient by one lesion voxel's logit", xlabel="probability of the lesion's voxels")
        for axis in (left, right):
            axis.grid(alpha=0.3)
        left.legend(fontsize=8)
        figure.savefig(OUT / f"{name}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
