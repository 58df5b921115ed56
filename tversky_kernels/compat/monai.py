"""MONAI's overlap losses, `FocalLoss` and their compounds (1.6): their arguments, attributes, state_dict and numbers.

The reduction "none" of DiceCELoss, a value a voxel, raises. What of a focal loss the kernels do not compute (alpha, a
value a voxel, soft targets, for which MONAI's factor is another, and ignore_index) is computed by torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import functional
from .._options import GENERALIZED_WEIGHTS, number, one_of
from ..reference import nearest_voxels
from ._attributes import attributes_of
from ._errors import ShapeError
from ._targets import as_dense, as_indices, is_hard

__all__ = [
    "DeepSupervisionLoss",
    "Dice",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "MCCLoss",
    "MaskedDiceLoss",
    "MaskedLoss",
    "TverskyLoss",
    "dice_ce",
    "dice_focal",
    "generalized_dice",
    "generalized_dice_focal",
]

REDUCTIONS = ("mean", "sum", "none")


def _warn_ignored(what: str) -> None:
    warnings.warn(f"single channel prediction, `{what}` ignored.", stacklevel=4)


class _Loss(torch.nn.modules.loss._Loss):
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
        super().__init__(reduction=one_of("reduction", getattr(reduction, "value", reduction), REDUCTIONS))
        if other_act is not None and not callable(other_act):
            raise TypeError(f"other_act: expected None or a callable, got {type(other_act).__name__}")
        if int(sigmoid) + int(softmax) + int(other_act is not None) > 1:
            raise ValueError("expected at most one of sigmoid=True, softmax=True and other_act")
        self.include_background, self.to_onehot_y = include_background, to_onehot_y
        self.sigmoid, self.softmax, self.other_act = sigmoid, softmax, other_act
        self.smooth_nr, self.smooth_dr = number("smooth_nr", smooth_nr), number("smooth_dr", smooth_dr)
        self.batch, self.soft_label, self.ignore_index = batch, soft_label, ignore_index
        self.inplace_backward, self.backend = inplace_backward, backend

    def _activation(self, input: torch.Tensor) -> tuple[torch.Tensor, str]:
        if self.softmax and input.size(1) == 1:
            _warn_ignored("softmax=True")
            return input, "none"
        if self.other_act is not None:
            return self.other_act(input), "none"
        return input, "sigmoid" if self.sigmoid else "softmax" if self.softmax else "none"

    def _prepared(self, input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """The logits, or probabilities, and the target with what belongs to it, as the kernels take them."""
        one_channel = input.size(1) == 1
        if one_channel and not self.include_background:
            _warn_ignored("include_background=False")
        if one_channel and self.to_onehot_y:
            _warn_ignored("to_onehot_y=True")
        logits, activation = self._activation(input)
        found = self._target(input, target)
        mask = found.pop("mask", None)
        if mask is None:
            return logits, {**found, "activation": activation}
        # As there, a mask that may be soft multiplies both, the probabilities and the target.
        p = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        p = p.sigmoid() if activation == "sigmoid" else p.softmax(1) if activation == "softmax" else p
        return p * mask, {**found, "target": found["target"] * mask, "activation": "none"}

    def _target(self, input: torch.Tensor, target: torch.Tensor) -> dict:
        # The target and, where it is one-hot, the mask of what is not ignored.
        if self.to_onehot_y and input.size(1) > 1:
            if target.dim() != input.dim() or target.size(1) != 1:
                raise ShapeError(
                    "target: with to_onehot_y=True expected class indices (B, 1, *spatial), got the shape "
                    f"{tuple(target.shape)}"
                )
            return {"target": as_indices(target), "ignore_index": self.ignore_index}
        if target.shape != input.shape:
            raise ShapeError(
                f"ground truth has different shape ({target.shape}) from input ({input.shape}); for class indices set "
                "to_onehot_y=True"
            )
        target, ignored = as_dense(target), self.ignore_index
        found = {"target": target, "check_target": False}  # as there, it may hold anything
        if ignored is not None and target.size(1) == 1:  # a label a voxel
            found["voxel_weight"] = target[:, 0] != ignored
        elif ignored is not None and 0 <= ignored < target.size(1):
            if target.is_floating_point():
                found["mask"] = 1 - target[:, ignored : ignored + 1]
            else:
                found["voxel_weight"] = target[:, ignored] == 0
        elif ignored is not None:
            found["voxel_weight"] = target.sum(1) > 0
        return found

    def _is_one_row(self, input: torch.Tensor) -> bool:
        # Without space MONAI sums over all that there is: samples and channels have one index.
        return input.dim() == 2 and not self.batch

    def _overlap(self, input, activated, of_target: dict, options: dict) -> torch.Tensor:
        """The Tversky loss of what `_prepared` gave for the input."""
        signed = options["soft_label"] and of_target["activation"] == "none" and _may_be_negative(activated)
        if not (signed or self._is_one_row(input)):
            return functional.tversky_loss(activated, **of_target, **options)
        p, of_target = _as_dense_probabilities(activated, of_target)
        factor = None
        if self._is_one_row(input):
            dropped = self._dropped(input.size(1))
            weight = of_target.pop("voxel_weight", None)
            p, g = (x if weight is None else x * weight.unsqueeze(1) for x in (p, of_target["target"]))
            p, of_target["target"] = (x[:, dropped:].reshape(1, 1, -1) for x in (p, g))
            factor = options.get("class_weight")
            factor = None if factor is None else factor[dropped:]
            options = {**options, "class_weight": None, "include_background": True, "reduction": "sum"}
        if signed:
            p, of_target = _split_by_sign(p, of_target)
        loss = functional.tversky_loss(p, **of_target, **options)
        if factor is None:
            return loss
        factor = factor.to(loss)
        return loss * (
            factor if self.reduction == "none" else factor.sum() if self.reduction == "sum" else factor.mean()
        )

    def _dropped(self, classes: int) -> int:
        return 0 if self.include_background or classes == 1 else 1

    def _options(self) -> dict:
        return {
            "include_background": self.include_background,
            "batch": self.batch,
            "soft_label": self.soft_label,
            "reduction": self.reduction,
            "inplace_backward": self.inplace_backward,
            "backend": self.backend,
        }


def _may_be_negative(p: torch.Tensor) -> bool:
    # As far as is known without waiting for a device.
    return not p.is_cpu or torch.compiler.is_compiling() or bool((p < 0).any())


def _as_dense_probabilities(logits: torch.Tensor, of_target: dict) -> tuple[torch.Tensor, dict]:
    # The probabilities themselves, and a dense target beside them, a label that is ignored as a weight of 0.
    p = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    activation, target = of_target["activation"], of_target["target"]
    found = {"activation": "none", "check_target": False}
    p = p.sigmoid() if activation == "sigmoid" else p.softmax(1) if activation == "softmax" else p
    if "ignore_index" not in of_target:
        return p, {**of_target, **found, "target": target.to(p.dtype)}
    ignored = of_target["ignore_index"]
    if ignored is not None:
        found["voxel_weight"] = target[:, 0] != ignored
        target = torch.where(target == ignored, 0, target)
    return p, {**found, "target": _one_hot(p, target)}


def _split_by_sign(p: torch.Tensor, of_target: dict) -> tuple[torch.Tensor, dict]:
    # MONAI's soft form sums |p|: a voxel with p < 0 is one with (0, g) and another with (-p, 0).
    p, g, weight = p.flatten(2), of_target["target"].flatten(2), of_target.get("voxel_weight")
    found = {**of_target, "target": torch.cat((g, torch.zeros_like(g)), 2)}
    if weight is not None:
        found["voxel_weight"] = torch.cat((weight.flatten(1), weight.flatten(1)), 1)
    return torch.cat((p.relu(), (-p).relu()), 2), found


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
        smoothing = {"smooth_nr": self.smooth_nr, "smooth_dr": self.smooth_dr}
        options = {"alpha": self.alpha, "beta": self.beta, **smoothing, **self._options()}
        return self._overlap(input, *self._prepared(input, target), options)


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
        self.class_weight: torch.Tensor | None
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
        assert weight is not None
        if weight.dim() == 0:
            return weight
        if weight.numel() != classes - dropped:
            raise ValueError(f"weight: expected {classes - dropped} numbers, one a class, got {weight.numel()}")
        return torch.cat((weight.new_ones(dropped), weight))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target."""
        loss = self._overlap(input, *self._prepared(input, target), {**self._options(), **self._dice(input)})
        return loss.reshape((*loss.shape, *(1,) * (input.dim() - 2))) if self.reduction == "none" else loss


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
@attributes_of("cross_entropy", "label_smoothing")
class DiceCELoss(torch.nn.modules.loss._Loss):
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
        torch.nn.Module.__init__(self)  # the reduction is that of the parts
        dice_weight = weight[1:] if weight is not None and not include_background else weight
        self.dice = DiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, dice_weight, inplace_backward=inplace_backward, backend=backend,
        )  # fmt: skip
        _check_not_voxelwise(self.dice.reduction)
        # Modules as there, for their attributes and their weights in the state_dict.
        weight = None if weight is None else torch.as_tensor(weight)
        smoothing = number("label_smoothing", label_smoothing, most=1.0)
        self.cross_entropy = torch.nn.CrossEntropyLoss(
            weight=weight, reduction=self.dice.reduction, label_smoothing=smoothing
        )
        self.binary_cross_entropy = torch.nn.BCEWithLogitsLoss(pos_weight=weight, reduction=self.dice.reduction)
        self.lambda_dice, self.lambda_ce = number("lambda_dice", lambda_dice), number("lambda_ce", lambda_ce)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target (B, 1, *spatial) or (B, C, *spatial)."""
        _check_channels(input, target)
        dice, classes = self.dice, input.size(1)
        ce_target = as_dense(target) if target.size(1) == classes else as_indices(target)
        activated, dice_target = dice._prepared(input, target)
        options = {**dice._options(), **dice._dice(input)}
        weight, pos_weight = self.cross_entropy.weight, self.binary_cross_entropy.pos_weight
        ce: dict[str, Any] = {
            "ce_weight": self.lambda_ce,
            "label_smoothing": self.label_smoothing,
            "ce_class_weight": weight,
        }
        wanted = "softmax" if classes > 1 else "sigmoid"
        if classes == 1:
            ce["label_smoothing"], ce["ce_class_weight"] = 0.0, None
        by_torch = classes == 1 and pos_weight is not None
        if dice_target["activation"] == wanted and not by_torch and not dice._is_one_row(input):
            return functional.tversky_ce_loss(input, **dice_target, tversky_weight=self.lambda_dice, **ce, **options)
        # Two different activations, or targets: two losses. The first must not overwrite what the second reads.
        first = {**options, "inplace_backward": False}
        overlap = dice._overlap(input, activated, dice_target, first)
        if by_torch and pos_weight is not None:
            # In float32 at the least: half precision would round the weight, or make it infinite.
            z = input if input.dtype == torch.float64 else input.float()
            entropy = self.lambda_ce * torch.nn.functional.binary_cross_entropy_with_logits(
                z, ce_target.to(z.dtype), pos_weight=pos_weight.to(z), reduction=dice.reduction
            )
        else:
            entropy = functional.tversky_ce_loss(
                input, ce_target, activation=wanted, tversky_weight=0.0, reduction=dice.reduction, **ce,
                check_target=False if target.size(1) == classes else None, backend=dice.backend,
            )  # fmt: skip
        return self.lambda_dice * overlap + entropy


def _one_hot(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # A dense float target of the input's shape from labels (B, 1, *spatial).
    labels = target.long().expand(-1, 1, *input.shape[2:])
    return torch.zeros_like(input, dtype=torch.float32).scatter_(1, labels, 1.0)


class FocalLoss(torch.nn.modules.loss._Loss):
    """`monai.losses.FocalLoss`: arguments as there.

    Of hard targets the mean and the sum are one count pass and one gradient pass. Soft targets (for which MONAI has
    another factor than the kernels), ``alpha``, ``ignore_index``, reduction "none" and a softmax without the background
    are computed by torch; and on a GPU a dense target of a floating type, which may be soft.

    Args:
        include_background: False leaves channel 0 out, before a softmax too.
        to_onehot_y: True for class indices (B, 1, *spatial); False for a target of the input's shape.
        gamma: The focal exponent.
        alpha: As there: one number, or one a class; None: without.
        weight: One factor, or one a class that is not left out.
        reduction: "mean", "sum" (of the means over space) or "none".
        use_softmax: Of a softmax in the place of a sigmoid of every channel.
        ignore_index: A label, or the channel of a one-hot target, whose voxels do not count.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None,
        weight: Sequence[float] | float | torch.Tensor | None = None,
        reduction: str = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__(reduction=one_of("reduction", getattr(reduction, "value", reduction), REDUCTIONS))
        self.include_background, self.to_onehot_y = include_background, to_onehot_y
        self.gamma, self.use_softmax = number("gamma", gamma), use_softmax
        self.alpha = alpha if alpha is None or isinstance(alpha, (int, float)) else torch.as_tensor(alpha)
        self.class_weight: torch.Tensor | None
        self.register_buffer("class_weight", None if weight is None else torch.as_tensor(weight))
        self.ignore_index = ignore_index
        self.inplace_backward, self.backend = inplace_backward, backend

    def _dropped(self, classes: int) -> int:
        return 0 if self.include_background or classes == 1 else 1

    def _weight_a_class(self, classes: int) -> torch.Tensor:
        # (C); 0 for a channel that is left out.
        dropped, weight = self._dropped(classes), self.class_weight
        if weight is None:
            weight = torch.ones(())
        elif weight.dim() > 0 and weight.numel() != classes - dropped:
            raise ValueError(f"weight: expected {classes - dropped} numbers, one a class, got {weight.numel()}")
        if weight.is_cpu and bool((weight < 0).any()):
            raise ValueError("weight: expected numbers >= 0")
        return torch.cat((weight.new_zeros(dropped), weight.expand(classes - dropped)))

    def takes_kernels(self, input: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether the kernels compute this loss of this target."""
        hard = (self.to_onehot_y and input.size(1) > 1) or is_hard(target)
        is_plain = self.alpha is None and self.reduction != "none" and self.ignore_index is None
        is_plain = is_plain and input.dim() > 2  # without space MONAI's sum is a mean
        return hard and is_plain and not (self.use_softmax and (self._dropped(input.size(1)) or input.size(1) == 1))

    def options(self, input: torch.Tensor, factor: float = 1.0) -> dict:
        """The cross-entropy's options with which a compound loss has this one in it, times a factor."""
        # Its mean is over the channels that are kept, and its sum that of the means over space.
        classes = input.size(1)
        kept, mean = classes - self._dropped(classes), self.reduction == "mean"
        voxels = max(1, math.prod(input.shape[2:]))
        if self.use_softmax:
            # The kernels' own mean is divided by the labels' class weights, MONAI's is not: their sum, scaled here.
            scale = 1 / (classes * max(1, input.size(0) * voxels)) if mean else 1 / voxels
        else:
            scale = classes / kept if mean else 1 / voxels
        return {
            "ce_weight": factor * scale,
            "ce_class_weight": self._weight_a_class(classes),
            "focal_gamma": self.gamma,
        }

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target (B, 1, *spatial) or (B, C, *spatial)."""
        one_channel = input.size(1) == 1
        if one_channel and self.to_onehot_y:
            _warn_ignored("to_onehot_y=True")
        if one_channel and not self.include_background:
            _warn_ignored("include_background=False")
        labels = self.to_onehot_y and not one_channel
        if target.shape != ((input.size(0), 1, *input.shape[2:]) if labels else input.shape):
            raise ShapeError(f"ground truth has different shape ({target.shape}) from input ({input.shape})")
        if not self.takes_kernels(input, target):
            return self._by_torch(input, target, labels)
        return functional.tversky_ce_loss(
            input, as_indices(target) if labels else as_dense(target), tversky_weight=0.0, check_target=None,
            activation="softmax" if self.use_softmax else "sigmoid",
            reduction="sum" if self.use_softmax else self.reduction, **self.options(input),
            inplace_backward=self.inplace_backward, backend=self.backend,
        )  # fmt: skip

    def _by_torch(self, input: torch.Tensor, target: torch.Tensor, labels: bool) -> torch.Tensor:
        mask, classes = self._mask(target), input.size(1)
        if labels:
            ignored = self.ignore_index
            if ignored is not None and not 0 <= ignored < classes:
                target = torch.where(target == ignored, 0, target)
            target = _one_hot(input, target)
        dropped = self._dropped(classes)
        z, g = input[:, dropped:].float(), target[:, dropped:].float()
        if mask is not None:
            z, g = z * mask, g * mask
        loss = self._voxelwise(z, g)
        if mask is not None:
            loss = loss * mask
        if self.class_weight is not None:
            weight = self._weight_a_class(classes)[dropped:].to(loss)
            loss = loss * weight.view(-1, *(1,) * (loss.dim() - 2))
        if self.reduction == "none":
            return loss
        least = torch.finfo(torch.float32).eps
        space = tuple(range(2, loss.dim()))
        if self.reduction == "mean":
            return loss.mean() if mask is None else loss.sum() / mask.sum().clamp(min=least)
        if mask is None:
            return loss.mean(space).sum()
        return (loss.sum(space) / mask.sum(space).clamp(min=least)).sum()

    def _mask(self, target: torch.Tensor) -> torch.Tensor | None:
        ignored = self.ignore_index
        if ignored is None:
            return None
        if target.size(1) == 1:
            return (target != ignored).float()
        if 0 <= ignored < target.size(1):
            return 1.0 - target[:, ignored : ignored + 1].float()
        return (target.sum(1, keepdim=True) > 0).float()

    def _voxelwise(self, z: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        alpha = self.alpha
        if isinstance(alpha, torch.Tensor):
            alpha = alpha.to(z)
            if alpha.dim() > 0 and alpha.numel() != z.size(1):
                raise ValueError(f"alpha: expected {z.size(1)} numbers, one a class, got {alpha.numel()}")
        of_class = (-1, *(1,) * (z.dim() - 2))
        if self.use_softmax:
            log_p = z.log_softmax(1)
            # A power below 1 of 0 has no slope: the gradient is 0 there.
            others = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)
            loss = -(others**self.gamma) * log_p * g
            if alpha is None or (not self.include_background and isinstance(alpha, (int, float))):
                return loss
            if not isinstance(alpha, torch.Tensor) or alpha.dim() == 0:
                # 1 - alpha for the background, alpha for all others
                alpha = torch.cat(
                    [loss.new_full((1,), 1 - float(alpha)), loss.new_full((z.size(1) - 1,), float(alpha))]
                )
            return alpha.view(of_class) * loss
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, g, reduction="none")
        loss = (self.gamma * torch.nn.functional.logsigmoid(-z * (2 * g - 1))).exp() * loss
        if alpha is None:
            return loss
        if isinstance(alpha, torch.Tensor) and alpha.dim() > 0:
            return torch.where(g == 1, alpha.view(of_class), 1.0) * loss
        return (g * alpha + (1 - g) * (1 - alpha)) * loss


#: Options that DiceFocalLoss's two parts have in common.
_OF_BOTH = ("include_background", "to_onehot_y", "reduction", "backend")


def _of_both(name: str) -> property:
    def set_both(self, value) -> None:
        setattr(self.dice, name, value)
        setattr(self.focal, name, value)

    return property(lambda self: getattr(self.dice, name), set_both)


@attributes_of("dice", *(name for name in _DICE_OPTIONS if name not in _OF_BOTH))
@attributes_of("focal", "gamma", "alpha")
class DiceFocalLoss(torch.nn.modules.loss._Loss):
    """`monai.losses.DiceFocalLoss`: arguments as there.

    As in MONAI, the focal loss is always that of a sigmoid of every channel, whatever activation the Dice loss has;
    with ``sigmoid=True`` both are computed in the same two passes where `FocalLoss` leaves them to the kernels.
    ``weight`` and ``include_background`` are of both. With reduction "none" the Dice loss is added to every voxel's.
    """

    include_background, to_onehot_y, reduction, backend = map(_of_both, _OF_BOTH)

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
        alpha: float | Sequence[float] | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        torch.nn.Module.__init__(self)  # the reduction is that of the parts
        self.dice = DiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, squared_pred, jaccard, reduction, smooth_nr,
            smooth_dr, batch, weight, inplace_backward=inplace_backward, backend=backend,
        )  # fmt: skip
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, alpha, weight, reduction, backend=backend)
        self.lambda_dice, self.lambda_focal = number("lambda_dice", lambda_dice), number("lambda_focal", lambda_focal)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target (B, 1, *spatial) or (B, C, *spatial)."""
        _check_channels(input, target)
        dice, focal = self.dice, self.focal
        activated, dice_target = dice._prepared(input, target)
        options = {**dice._options(), **dice._dice(input)}
        fused = focal.takes_kernels(input, target)
        if fused and dice_target["activation"] == "sigmoid" and not dice._is_one_row(input):
            of_focal = focal.options(input, self.lambda_focal)
            return functional.tversky_ce_loss(
                input, **dice_target, tversky_weight=self.lambda_dice, **of_focal, **options
            )
        # Two losses, neither of which may overwrite what the other reads.
        overlap = dice._overlap(input, activated, dice_target, {**options, "inplace_backward": False})
        if dice.reduction == "none":
            overlap = overlap.reshape((*overlap.shape, *(1,) * (input.dim() - 2)))
        return self.lambda_dice * overlap + self.lambda_focal * focal(input, target)


class _LossOfCounts(_Loss):
    """A loss of the overlap counts in float64."""

    def _counts(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # (N or 1, C', 3)
        logits, found = self._prepared(input, target)
        target, voxel_weight = found.pop("target"), found.pop("voxel_weight", None)
        check_target = found.pop("check_target", None)
        options = {**found, "soft_label": self.soft_label, "batch": self.batch}
        how = (check_target, self.inplace_backward, None, self.backend)
        counts = functional.exact_counts(logits, target, voxel_weight, options, *how)
        return counts if self.include_background or input.size(1) == 1 else counts[:, 1:]

    def _reduced(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.reduction == "none" else loss.sum() if self.reduction == "sum" else loss.mean()


class GeneralizedDiceLoss(_LossOfCounts):
    """`monai.losses.GeneralizedDiceLoss`: arguments as there."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch,
            soft_label, None, inplace_backward, backend,
        )  # fmt: skip
        self.w_type = one_of("w_type", getattr(w_type, "value", w_type), GENERALIZED_WEIGHTS)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target."""
        loss = functional.generalized_dice_of_counts(
            self._counts(input, target), self.w_type, self.smooth_nr, self.smooth_dr
        )
        loss = self._reduced(loss.to(torch.promote_types(input.dtype, torch.float32)))
        if self.reduction != "none":
            return loss
        return loss.view(*loss.shape, *(1,) * (input.dim() - 1 - self.batch))


class MCCLoss(_LossOfCounts):
    """`monai.losses.MCCLoss`: arguments as there (Abhishek and Hamarneh 2021, arXiv:2010.13454)."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        reduction: str = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, batch,
            False, None, inplace_backward, backend,
        )  # fmt: skip

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target."""
        counts = self._counts(input, target)
        voxels = math.prod(input.shape[2:]) * (input.size(0) if self.batch else 1)
        if self._is_one_row(input):
            voxels, counts = counts.size(0) * counts.size(1), counts.sum((0, 1))
        tp, fp, fn = (counts[0] if self.batch else counts).unbind(-1)
        tn = voxels - tp - fp - fn
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + self.smooth_dr
        score = 1 - (tp * tn - fp * fn + self.smooth_nr) / product.sqrt()
        # As there: a prediction without an error is right, also where there is nothing to be found.
        score = torch.where((fp == 0) & (fn == 0), 0.0, score)
        return self._reduced(score.to(torch.promote_types(input.dtype, torch.float32)))


class GeneralizedDiceFocalLoss(torch.nn.modules.loss._Loss):
    """`monai.losses.GeneralizedDiceFocalLoss`: arguments as there."""

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Sequence[float] | float | torch.Tensor | None = None,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        self.generalized_dice = GeneralizedDiceLoss(
            include_background, to_onehot_y, sigmoid, softmax, other_act, w_type, reduction, smooth_nr, smooth_dr,
            batch, backend=backend,
        )  # fmt: skip
        self.focal = FocalLoss(include_background, to_onehot_y, gamma, None, weight, reduction, backend=backend)
        self.lambda_gdl, self.lambda_focal = number("lambda_gdl", lambda_gdl), number("lambda_focal", lambda_focal)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of (B, C, *spatial) and a target (B, 1, *spatial) or (B, C, *spatial)."""
        _check_channels(input, target)
        overlap = self.generalized_dice(input, target)
        return self.lambda_gdl * overlap + self.lambda_focal * self.focal(input, target)


class MaskedLoss(torch.nn.modules.loss._Loss):
    """`monai.losses.MaskedLoss`: input and target times a mask (B or 1, 1, *spatial), then a loss of them.

    The product is a tensor of the logits' size. Where the mask is to say which voxels count, a `voxel_weight` of
    `tversky_kernels.tversky_loss` does so without one.
    """

    def __init__(self, loss: Callable | type, *loss_args, **loss_kwargs):
        super().__init__()
        self.loss = loss(*loss_args, **loss_kwargs) if isinstance(loss, type) else loss
        if not callable(self.loss):
            raise ValueError(f"loss: expected a callable or a class, got {type(loss).__name__}")

    def forward(self, input: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of the masked input and target."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            return self.loss(input, target)
        if mask.size(0) not in (1, input.size(0)) or (target.dim() > 1 and mask.size(1) != 1):
            raise ValueError(
                f"mask: for an input {tuple(input.shape)} expected (1 or {input.size(0)}, 1, *spatial), got "
                f"{tuple(mask.shape)}"
            )
        if input.shape[2:] != mask.shape[2:]:
            warnings.warn(f"Spatial size of input ({input.shape}) is different from mask ({mask.shape}).", stacklevel=2)
        return self.loss(input * mask, target * mask)


class MaskedDiceLoss(DiceLoss):
    """`monai.losses.MaskedDiceLoss`: probabilities and target times a mask, and the Dice loss of the products.

    As there, a masked voxel of class indices has the label 0 then, and the probability 0 of every class.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pre_sigmoid, self.pre_softmax, self.pre_other_act = self.sigmoid, self.softmax, self.other_act
        self.sigmoid = self.softmax = False
        self.other_act = None
        self.spatial_weighted = MaskedLoss(super().forward)

    def forward(self, input: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of (B, C, *spatial), a target, and a mask (B or 1, 1, *spatial)."""
        if self.pre_sigmoid:
            input = input.sigmoid()
        if self.pre_softmax:
            if input.size(1) == 1:
                _warn_ignored("softmax=True")
            else:
                input = input.softmax(1)
        if self.pre_other_act is not None:
            input = self.pre_other_act(input)
        return self.spatial_weighted(input, target, mask)


Dice = DiceLoss
dice_ce, dice_focal = DiceCELoss, DiceFocalLoss
generalized_dice, generalized_dice_focal = GeneralizedDiceLoss, GeneralizedDiceFocalLoss


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
        if isinstance(input, torch.Tensor):
            return self.loss(input.float(), target)
        weights = self.get_weights(levels=len(input))
        losses = [w * self.get_loss(x.float(), target) for w, x in zip(weights, input, strict=True)]
        return sum(losses)  # type: ignore[return-value] # there is one at least
