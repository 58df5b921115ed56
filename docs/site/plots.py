"""Draws the pictures of the API pages: python docs/site/plots.py. Values and gradients are those of the kernels."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import SymLogNorm

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


#: A large lesion and six small ones: row, column, radius, and the probability that the network gives its voxels.
LESIONS = (
    (42, 44, 26, 0.95), (20, 96, 3, 0.9), (52, 112, 2, 0.9), (100, 20, 3, 0.9), (92, 96, 3, 0.05), (112, 60, 2, 0.05),
    (118, 116, 3, 0.05),
)  # fmt: skip


def lesions() -> tuple[torch.Tensor, torch.Tensor]:
    """The label of a slice (128, 128), and the network's probability: hardly anything elsewhere."""
    row, column = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    label, p = torch.zeros(128, 128, dtype=torch.uint8), torch.full((128, 128), 5e-4, dtype=torch.float64)
    for at_row, at_column, radius, found in LESIONS:
        inside = (row - at_row) ** 2 + (column - at_column) ** 2 <= radius**2
        label[inside], p[inside] = 1, found
    return label, p


def draw_every_lesion(path: pathlib.Path) -> None:
    """Where Dice, the blob loss and Dice by region put their gradient, on a large lesion and six small ones."""
    label, p = lesions()
    blobs, number_of_blobs = tk.regions.components(label)
    cells, number_of_cells = tk.regions.voronoi(label)
    how = {"include_background": False}
    losses = {
        "Dice": lambda z: tk.dice_loss(z, label[None], **how),
        "blob loss": lambda z: tk.blob_loss(
            z, label[None], regions=blobs[None], num_regions=number_of_blobs, global_weight=0.0
        ),
        "Dice by region": lambda z: tk.dice_loss(
            z, label[None], regions=cells[None], num_regions=number_of_cells, **how
        ),
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    above = (
        (label, "gray", "label: one large lesion, six small"),
        (p, "gray", "prediction: three small ones missed"),
        (cells, "tab10", "tk.regions.voronoi: 7 regions"),
    )
    for axis, (image, colours, title) in zip(axes[0], above, strict=True):
        axis.imshow(image, cmap=colours, interpolation="nearest")
        axis.set_title(title, fontsize=10)
    for axis, (name, loss) in zip(axes[1], losses.items(), strict=True):
        logits = torch.stack((torch.zeros_like(p), torch.logit(p)))[None].requires_grad_()
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value, logits)
        shown = axis.imshow(
            gradient[0, 1], cmap="RdBu", norm=SymLogNorm(1e-6, vmin=-3e-3, vmax=3e-3), interpolation="nearest"
        )
        axis.set_title(f"{name}: {value.item():.2f}", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[1], label="gradient by the lesion's logit (red: raise it)", shrink=0.9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draws all of them."""
    OUT.mkdir(parents=True, exist_ok=True)
    draw_every_lesion(OUT.parents[1] / "every_lesion.png")
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
