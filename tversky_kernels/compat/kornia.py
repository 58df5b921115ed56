"""kornia's `tversky_loss`, `dice_loss`, `TverskyLoss` and `DiceLoss` (0.9): their arguments, their numbers.

There an index is computed for each sample, averaged over the classes that its target has, then over the batch; a sample
of which every voxel is ignored has the loss 1. Any number of spatial dimensions; alpha weighs the false positives.
"""

from __future__ import annotations

import torch

from .. import functional
from .._options import number, one_of
from ._targets import of_one_class

__all__ = ["DiceLoss", "TverskyLoss", "dice_loss", "tversky_loss"]

AVERAGES = ("micro", "macro")


def tversky_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    beta: float,
    eps: float = 1e-8,
    ignore_index: int | None = -100,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`kornia.losses.tversky_loss`.

    Args:
        pred: Logits (N, C, *spatial).
        target: Class indices (N, *spatial).
        alpha: Weight of the false positives, >= 0.
        beta: Weight of the false negatives, >= 0.
        eps: Added to the denominator, >= 0.
        ignore_index: Label of what does not count; None: none.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.

    Returns:
        The loss, in pred's dtype.
    """
    alpha, beta, eps = number("alpha", alpha), number("beta", beta), number("eps", eps)
    tp, fp, fn = _counts(pred, target, ignore_index, inplace_backward, backend)
    error = alpha * fp + beta * fn + eps
    present = tp + fn > 0
    # 1 - index without cancellation, for the classes that there are.
    loss = torch.where(present, error / torch.where(present, tp + error, torch.ones_like(tp)), 0)
    return _mean(loss.sum(1), present.sum(1)).to(pred.dtype)


def dice_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    average: str = "micro",
    eps: float = 1e-8,
    weight: torch.Tensor | None = None,
    ignore_index: int | None = -100,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`kornia.losses.dice_loss`.

    Args:
        pred: Logits (N, C, *spatial).
        target: Class indices (N, *spatial).
        average: "micro": one index a sample, over all classes; "macro": one a class that the sample has.
        eps: Added to the denominator, >= 0.
        weight: One factor a class (C); None: 1.
        ignore_index: Label of what does not count; None: none.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.

    Returns:
        The loss, in the dtype to which those of pred and weight are promoted.
    """
    one_of("average", average, AVERAGES)
    eps, dtype = number("eps", eps), pred.dtype
    tp, fp, fn = _counts(pred, target, ignore_index, inplace_backward, backend)
    w = torch.ones_like(tp[0])
    if weight is not None:
        if not isinstance(weight, torch.Tensor) or weight.numel() != tp.size(1) or weight.shape[0] != tp.size(1):
            raise ValueError(f"weight: expected a tensor of {tp.size(1)} numbers, one a class, got {weight!r}")
        w, dtype = weight.reshape(-1).to(tp), torch.promote_types(dtype, weight.dtype)
    present, error, total = tp + fn > 0, fp + fn, 2 * tp + fp + fn
    if average == "micro":
        error, total = (error * w).sum(1), (total * w).sum(1)
        return _ratio(error, total, eps).mean().to(dtype)
    w = w * present
    return _mean((_ratio(error, total, eps) * w).sum(1), w.sum(1)).to(dtype)


def _counts(pred, target, ignore_index, inplace_backward, backend):
    # (N, C) each, in float64.
    options, weight, check_target = {"activation": "softmax", "ignore_index": ignore_index}, None, None
    if pred.dim() > 2 and pred.size(1) == 1:
        if target.shape != (pred.size(0), *pred.shape[2:]):
            raise ValueError(f"target: expected ({pred.size(0)}, *{tuple(pred.shape[2:])}), got {tuple(target.shape)}")
        pred, target, weight = of_one_class(pred, target, ignore_index)
        options, check_target, inplace_backward = {"activation": "none"}, False, False
    how = (check_target, inplace_backward, None, backend)
    return functional.exact_counts(pred, target, weight, options, *how).unbind(-1)


def _ratio(error: torch.Tensor, total: torch.Tensor, eps: float) -> torch.Tensor:
    # 1 - 2 TP / (total + eps); 1 where there is nothing.
    empty = total == 0
    return torch.where(empty, 1, (error + eps) / torch.where(empty, torch.ones_like(total), total + eps))


def _mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # Over the batch, of each sample's sum by its weights' sum; 1 for a sample without any.
    empty = weights == 0
    return torch.where(empty, 1, losses / torch.where(empty, torch.ones_like(weights), weights)).mean()


class TverskyLoss(torch.nn.Module):
    """`kornia.losses.TverskyLoss`: the arguments of `tversky_loss`."""

    def __init__(
        self,
        alpha: float,
        beta: float,
        eps: float = 1e-8,
        ignore_index: int | None = -100,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.alpha, self.beta, self.eps = number("alpha", alpha), number("beta", beta), number("eps", eps)
        self.ignore_index = ignore_index
        self.inplace_backward, self.backend = inplace_backward, backend

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (N, C, *spatial) and labels (N, *spatial)."""
        return tversky_loss(
            pred, target, self.alpha, self.beta, self.eps, self.ignore_index,
            inplace_backward=self.inplace_backward, backend=self.backend,
        )  # fmt: skip


class DiceLoss(torch.nn.Module):
    """`kornia.losses.DiceLoss`: the arguments of `dice_loss`."""

    weight: torch.Tensor | None

    def __init__(
        self,
        average: str = "micro",
        eps: float = 1e-8,
        weight: torch.Tensor | None = None,
        ignore_index: int | None = -100,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.average, self.eps = one_of("average", average, AVERAGES), number("eps", eps)
        self.ignore_index = ignore_index
        self.inplace_backward, self.backend = inplace_backward, backend
        if isinstance(weight, torch.nn.Parameter):
            self.weight = weight
        else:
            self.register_buffer("weight", None if weight is None else torch.as_tensor(weight))

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (N, C, *spatial) and labels (N, *spatial)."""
        return dice_loss(
            pred, target, self.average, self.eps, self.weight, self.ignore_index,
            inplace_backward=self.inplace_backward, backend=self.backend,
        )  # fmt: skip
