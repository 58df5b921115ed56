"""The treatments of imbalance that the study compares: each a loss and a way to draw patches, one line a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch

import tversky_kernels as tk

#: logits (N, 2, D, H, W) and labels (N, 1, D, H, W) -> a number
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Where patches come from. uniform: anywhere. balanced: a share of them (0.5) is centred on a lesion's voxel, the rest
#: on one of the background. foreground: a third of every batch, and at least one patch, is centred on a lesion's voxel,
#: the rest is drawn anywhere, as nnU-Net 2 oversamples foreground. two-step: balanced for the first half of the steps;
#: then uniform, and the last layer alone goes on learning (Havaei et al. 2017, "two-phase training").
Sampling = Literal["uniform", "balanced", "foreground", "two-step"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """loss: made once a run. draws: None takes the run's --sampling. words: for a figure's legend."""

    words: str
    loss: Callable[[], Loss]
    sampling: Sampling | None = None


def tversky(alpha: float, beta: float, gamma: float = 1.0) -> Callable[[], Loss]:
    """Salehi et al. 2017; with gamma < 1 Abraham and Khan 2018, whose exponent 1 / gamma with gamma = 4/3 is 0.75."""
    # The paper's loss is the lesion's alone. A patch without a lesion says nothing about overlap: the batch together.
    return lambda: tk.TverskyLoss(alpha=alpha, beta=beta, gamma=gamma, include_background=False, batch=True)


def regional_tversky(alpha: float, beta: float, **options) -> Callable[[], Loss]:
    """The mean of the Tversky loss of the batch and of that of each lesion's surroundings (Jaus et al. 2024).

    The regions are made here, on the host, for one small patch; a data set of one's own makes them in its workers
    (docs/every_lesion.md).
    """

    def make() -> Loss:
        whole = tk.TverskyLoss(alpha=alpha, beta=beta, include_background=False, batch=True, **options)
        # A patch without a lesion has one region, and says nothing about overlap.
        each = tk.TverskyLoss(alpha=alpha, beta=beta, include_background=False, absent="skip", **options)

        def loss(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            regions, number = tk.regions.voronoi(t[:, 0].cpu(), batch=True)
            return 0.5 * whole(z, t) + 0.5 * each(z, t, regions=regions.to(z.device), num_regions=number)

        return loss

    return make


def dice_ce() -> Loss:
    """What nnU-Net 2 trains with: Dice over the batch, without the background, plus cross-entropy."""
    return tk.TverskyCELoss(alpha=0.5, beta=0.5, include_background=False, batch=True)


def cross_entropy(weights: tuple[float, float] = (1.0, 1.0)) -> Callable[[], Loss]:
    """The mean over the voxels, with the weights of background and lesion as torch's cross-entropy takes them."""

    def make() -> Loss:
        weight = torch.tensor(weights)
        return lambda z, t: torch.nn.functional.cross_entropy(z.float(), t[:, 0].long(), weight.to(z.device))

    return make


RECIPES: dict[str, Recipe] = {
    "tversky-.5": Recipe("Tversky .5/.5 (Dice)", tversky(0.5, 0.5)),
    "tversky-.6": Recipe("Tversky .4/.6", tversky(0.4, 0.6)),
    "tversky-.7": Recipe("Tversky .3/.7", tversky(0.3, 0.7)),
    "tversky-.8": Recipe("Tversky .2/.8", tversky(0.2, 0.8)),
    "tversky-.9": Recipe("Tversky .1/.9", tversky(0.1, 0.9)),
    "focal-tversky": Recipe("focal Tversky .3/.7", tversky(0.3, 0.7, gamma=0.75)),
    "dice-ce": Recipe("Dice + CE", dice_ce),
    "ce": Recipe("CE", cross_entropy()),
    "ce-weighted": Recipe("CE, lesions 20-fold", cross_entropy((1.0, 20.0))),
    "ce-balanced": Recipe("CE, balanced patches", cross_entropy(), "balanced"),
    "ce-two-step": Recipe("CE, two-step", cross_entropy(), "two-step"),
}
#: What the others are compared with.
BASELINE = "tversky-.5"
#: The settings of the paper's Table 1, by beta.
BETAS = {0.5: "tversky-.5", 0.6: "tversky-.6", 0.7: "tversky-.7", 0.8: "tversky-.8", 0.9: "tversky-.9"}
