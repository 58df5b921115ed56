"""MONAI's `TverskyLoss`, `DiceLoss`, `DiceCELoss`, `DiceFocalLoss` and `DeepSupervisionLoss` (1.6): their arguments,
their numbers.

What the kernels do not compute raises: the reduction "none" of the last two (a value a voxel), and the alpha of
DiceFocalLoss.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch

from .. import functional
from .._arguments import number, one_of
from ..reference import nearest_voxels
from ._attributes import attributes_of
from ._targets import as_dense, as_indices

__all__ = ["DeepSupervisionLoss", "DiceCELoss", "DiceFocalLoss", "DiceLoss", "TverskyLoss"]

REDUCTIONS = ("mean", "sum", "none")


class _Loss(torch.nn.Module):
    """What the three have in common: activation, target and ignore_index as MONAI understands them."""

    def __init__(
        self,
        include_background,
        to_onehot_y,
        sigmoid,
        softmax,
        other_act,
        reduction,
        smooth_nr,
        smooth_dr,
        batch,
        soft_label,
        ignore_index,
        inplace_backward,
        backend,
    ):
        super().__init__()
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act: expected None or a callable, got {type(other_act).__name__}")
        if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
            raise ValueError("expected at most one of sigmoid=True, softmax=True and other_act")
        self.include_background, self.to_onehot_y = include_background, to_onehot_y
        self.sigmoid, self.softmax, self.other_act = sigmoid, softmax, other_act
        self.reduction = one_of("reduction", getattr(reduction, "value", reduction), REDUCTIONS)
        self.smooth_nr, self.smooth_dr = number("smooth_nr", smooth_nr), number("smooth_dr", smooth_dr)
        self.batch, self.soft_label, self.ignore_index = batch, soft_label, ignore_index
        self.inplace_backward, self.backend = inplace_backward, backend

    def _activation(self, input: torch.Tensor) -> tuple[torch.Tensor, str]:
        if self.softmax and input.size(1) == 1:
            warnings.warn("single channel prediction, `softmax=True` ignored.", stacklevel=4)
            return input, "none"
        if self.other_act is not None:
            return self.other_act(input), "none"
        return input, "sigmoid" if self.sigmoid else "softmax" if self.softmax else "none"

    def _target(self, input: torch.Tensor, target: torch.Tensor) -> dict:
        # The target and, where it is one-hot, the mask of what is not ignored.
        if self.to_onehot_y and input.size(1) > 1:
            if target.dim() != input.dim() or target.size(1) != 1:
                raise ValueError(
                    "target: with to_onehot_y=True expected class indices (B, 1, *spatial), got the shape "
                    f"{tuple(target.shape)}"
                )
            return {"target": as_indices(target), "ignore_index": self.ignore_index}
        if target.shape != input.shape:
            raise ValueError(
                f"target: expected the input's shape {tuple(input.shape)}, got {tuple(target.shape)}; for class "
                "indices set to_onehot_y=True"
            )
        target, ignored = as_dense(target), self.ignore_index
        found = {"target": target, "check_target": False}  # as there, it may hold anything
        if ignored is not None and target.size(1) == 1:  # a label a voxel
            found["voxel_weight"] = target[:, 0] != ignored
        elif ignored is not None and 0 <= ignored < target.size(1):
            found["voxel_weight"] = target[:, ignored] == 0
        elif ignored is not None:
            found["voxel_weight"] = target.sum(1) > 0
        return found

    def _options(self) -> dict:
        return {
            "include_background": self.include_background,
            "batch": self.batch,
            "soft_label": self.soft_label,
            "reduction": self.reduction,
            "inplace_backward": self.inplace_backward,
            "backend": self.backend,
        }


class TverskyLoss(_Loss):
    """`monai.losses.TverskyLoss`.

    Args:
        include_background: False leaves channel 0 out.
        to_onehot_y: True for class indices (B, 1, *spatial); False for a target of the input's shape.
        sigmoid: Of the input.
        softmax: Of the input.
        other_act: Another activation, applied before; the kernels then take probabilities.
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        reduction: "mean", "sum" or "none".
        smooth_nr: Added to the numerator.
        smooth_dr: Added to the denominator.
        batch: Sum over the batch first.
        soft_label: The form for soft targets.
        ignore_index: A label, or the channel of a one-hot target, whose voxels do not count.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch,
            soft_label, ignore_index, inplace_backward, backend,
        )  # fmt: skip
        self.alpha, self.beta = alpha, beta

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target."""
        input, activation = self._activation(input)
        return functional.tversky_loss(
            input, **self._target(input, target), activation=activation, alpha=self.alpha, beta=self.beta,
            smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr, **self._options(),
        )  # fmt: skip


class DiceLoss(_Loss):
    """`monai.losses.DiceLoss`: arguments as there.

    ``squared_pred`` squares the probabilities in the denominator, whatever ``soft_label`` says. ``jaccard`` is the
    Jaccard loss. ``weight``: one a class, without the background where that is left out; it multiplies and is not
    renormalised.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Sequence[float] | float | torch.Tensor | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch,
            soft_label, ignore_index, inplace_backward, backend,
        )  # fmt: skip
        self.squared_pred, self.jaccard = squared_pred, jaccard
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))

    def _dice(self, input: torch.Tensor) -> dict:
        # MONAI's quotient is twice ours, smoothing apart.
        both = 1.0 if self.jaccard else 0.5
        options = {"alpha": both, "beta": both, "smooth_nr": self.smooth_nr / 2, "smooth_dr": self.smooth_dr / 2}
        if self.squared_pred:
            options.update(squared=True, soft_label=False)
        weight, classes = self.class_weight, input.size(1)
        if weight is not None and classes > 1 and (classes > 2 or self.include_background):
            options["class_weight"] = self._weight_a_class(classes)
        return options

    def _weight_a_class(self, classes: int) -> torch.Tensor:
        # One number, or one a class: that of a background which is left out is 1, for nothing reads it.
        weight, dropped = self.class_weight, self._dropped(classes)
        if weight.dim() == 0:
            return weight
        if weight.numel() != classes - dropped:
            raise ValueError(f"weight: expected {classes - dropped} numbers, one a class, got {weight.numel()}")
        return torch.cat((weight.new_ones(dropped), weight))

    def _dropped(self, classes: int) -> int:
        return 0 if self.include_background or classes == 1 else 1

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target."""
        input, activation = self._activation(input)
        loss = functional.tversky_loss(
            input, **self._target(input, target), activation=activation, **{**self._options(), **self._dice(input)}
        )
        if self.reduction == "none":
            loss = loss.view(*loss.shape, *(1,) * (input.dim() - 2))
        return loss


_DICE_OPTIONS = (
    *("include_background", "to_onehot_y", "sigmoid", "softmax", "other_act", "squared_pred", "jaccard", "reduction"),
    *("smooth_nr", "smooth_dr", "batch", "inplace_backward", "backend"),
)


def _check_not_voxelwise(reduction: str) -> None:
    if reduction == "none":
        raise ValueError("reduction: expected 'mean' or 'sum'; 'none' would be a value a voxel")


def _check_channels(input: torch.Tensor, target: torch.Tensor) -> None:
    classes = input.size(1)
    if input.dim() != target.dim() or target.size(1) not in (1, classes):
        raise ValueError(
            f"target: for an input {tuple(input.shape)} expected as many dimensions and 1 or {classes} channels, "
            f"got {tuple(target.shape)}"
        )


@attributes_of("dice", *_DICE_OPTIONS)
class DiceCELoss(torch.nn.Module):
    """`monai.losses.DiceCELoss`: arguments as there, but for reduction "none", which raises.

    With a softmax both parts are computed in the same two passes. As in MONAI, the cross-entropy of several channels is
    always that of a softmax, also with ``sigmoid=True``, and that of one channel a binary one, for which ``weight`` is
    the weight of the positive label (that case is left to torch).
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: torch.Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        dice_weight = weight[1:] if weight is not None and not include_background else weight
        self.dice = DiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, dice_weight, inplace_backward=inplace_backward, backend=backend,
        )  # fmt: skip
        _check_not_voxelwise(self.dice.reduction)
        self.register_buffer("ce_weight", None if weight is None else torch.as_tensor(weight))
        self.lambda_dice, self.lambda_ce = number("lambda_dice", lambda_dice), number("lambda_ce", lambda_ce)
        self.label_smoothing = number("label_smoothing", label_smoothing, most=1.0)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target (B, 1, *spatial) or (B, C, *spatial)."""
        _check_channels(input, target)
        dice, classes = self.dice, input.size(1)
        activated, activation = dice._activation(input)
        ce_target = as_dense(target) if target.size(1) == classes else as_indices(target)
        dice_target = dice._target(input, target)
        options = {**dice._options(), **dice._dice(input)}
        ce = {"ce_weight": self.lambda_ce, "label_smoothing": self.label_smoothing, "ce_class_weight": self.ce_weight}
        wanted = "softmax" if classes > 1 else "sigmoid"
        if classes == 1:
            ce["label_smoothing"] = 0.0
        if activation == wanted and not (classes == 1 and self.ce_weight is not None):
            return functional.tversky_ce_loss(
                input, **dice_target, activation=activation, tversky_weight=self.lambda_dice, **ce, **options
            )
        # Two different activations, or targets: two losses. The first must not overwrite what the second reads.
        first = {**options, "inplace_backward": False}
        overlap = functional.tversky_loss(activated, **dice_target, activation=activation, **first)
        if classes == 1 and self.ce_weight is not None:
            entropy = self.lambda_ce * torch.nn.functional.binary_cross_entropy_with_logits(
                input, ce_target.to(input.dtype), pos_weight=self.ce_weight.to(input), reduction=dice.reduction
            )
        else:
            entropy = functional.tversky_ce_loss(
                input, ce_target, activation=wanted, tversky_weight=0.0, reduction=dice.reduction, **ce,
                check_target=False if target.size(1) == classes else None, backend=dice.backend,
            )  # fmt: skip
        return self.lambda_dice * overlap + entropy


@attributes_of("dice", *_DICE_OPTIONS)
class DiceFocalLoss(torch.nn.Module):
    """`monai.losses.DiceFocalLoss`: arguments as there, but for ``alpha`` and reduction "none", which raise.

    As in MONAI, the focal loss is always that of a sigmoid of every channel, whatever activation the Dice loss has;
    with ``sigmoid=True`` both are computed in the same two passes. ``weight`` and ``include_background`` are of both.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Sequence[float] | float | torch.Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.dice = DiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, weight, inplace_backward=inplace_backward, backend=backend,
        )  # fmt: skip
        _check_not_voxelwise(self.dice.reduction)
        if alpha is not None:
            raise ValueError(f"alpha: expected None; the balanced focal loss is not computed, got {alpha!r}")
        self.gamma = number("gamma", gamma)
        self.lambda_dice, self.lambda_focal = number("lambda_dice", lambda_dice), number("lambda_focal", lambda_focal)

    def _focal(self, input: torch.Tensor) -> dict:
        # Its mean is over the channels that are kept, and its sum that of the means over space.
        dice, classes = self.dice, input.size(1)
        dropped = dice._dropped(classes)
        weight = torch.ones(()) if dice.class_weight is None else dice._weight_a_class(classes)
        per_class = weight.expand(classes).clone()
        per_class[:dropped] = 0
        mean = dice.reduction == "mean"
        scale = classes / (classes - dropped) if mean else 1 / max(1, math.prod(input.shape[2:]))
        return {
            "ce_weight": self.lambda_focal * scale,
            "ce_class_weight": per_class,
            "focal_gamma": self.gamma,
        }

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target (B, 1, *spatial) or (B, C, *spatial)."""
        _check_channels(input, target)
        dice = self.dice
        activated, activation = dice._activation(input)
        dice_target, focal = dice._target(input, target), self._focal(input)
        options = {**dice._options(), **dice._dice(input)}
        if activation == "sigmoid":
            return functional.tversky_ce_loss(
                input, **dice_target, activation=activation, tversky_weight=self.lambda_dice, **focal, **options
            )
        # Two activations: two losses, neither of which may overwrite what the other reads.
        first = {**options, "inplace_backward": False}
        overlap = functional.tversky_loss(activated, **dice_target, activation=activation, **first)
        return self.lambda_dice * overlap + functional.tversky_ce_loss(
            input, **dice_target, activation="sigmoid", tversky_weight=0.0, reduction=dice.reduction, **focal,
            backend=dice.backend,
        )  # fmt: skip


#: `interp_mode` of MONAI's `DeepSupervisionLoss` that these kernels know: those that take a voxel's value from another.
INTERP_MODES = ("nearest-exact", "nearest")


class DeepSupervisionLoss(torch.nn.Module):
    """`monai.losses.DeepSupervisionLoss`: the weighted sum of a loss over the outputs of several resolutions.

    Args:
        loss: Of one output and a target, one of this module or any other.
        weight_mode: "same": 1 a level, "exp": 1, 1/2, 1/4, ... but 1/16 at least, "two": 1, and 1/2 for all others.
        weights: One a level in the place of weight_mode's.

    Its attribute ``interp_mode`` says where a coarser voxel reads the target: "nearest-exact", as there, or "nearest".
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        weight_mode: str = "exp",
        weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.loss, self.weights = loss, weights
        self.weight_mode = one_of("weight_mode", weight_mode, ("same", "exp", "two"))
        self.interp_mode = "nearest-exact"

    def get_weights(self, levels: int = 1) -> list[float]:
        """The weights of so many levels."""
        if self.weights is not None and len(self.weights) >= levels:
            return list(self.weights[:levels])
        of_mode = {"same": lambda _: 1.0, "exp": lambda i: max(0.5**i, 0.0625), "two": lambda i: 0.5 if i else 1.0}
        return [of_mode[one_of("weight_mode", self.weight_mode, of_mode)](i) for i in range(levels)]

    def get_loss(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of one output; the target is read, in its own type, at the voxels that interpolate would take."""
        mode = one_of("interp_mode", self.interp_mode, INTERP_MODES)
        return self.loss(input, nearest_voxels(target, 2, input.shape[2:], mode))

    def forward(self, input: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """The loss of outputs (B, C, *spatial), the finest first, and a target (B, C or 1, *spatial)."""
        if not isinstance(input, (list, tuple)):
            return self.loss(input.float(), target)
        weights = self.get_weights(levels=len(input))
        return sum(w * self.get_loss(x.float(), target) for w, x in zip(weights, input, strict=True))
