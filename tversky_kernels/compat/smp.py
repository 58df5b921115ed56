"""segmentation_models_pytorch's `TverskyLoss`, `DiceLoss`, `JaccardLoss`, `FocalLoss` and `MCCLoss` (0.6), its modes.

Their arguments, their numbers. There the counts are summed over the batch, an absent class costs nothing, and gamma is
the exponent of the mean over the classes, not of each class. The overlap is measured by |p - g|, which for hard labels
is the product. The loss has the prediction's dtype; the sums that it is made of are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import functional
from .._options import number, one_of
from ._errors import OptionError, ShapeError
from ._targets import as_dense, as_indices, is_hard, of_one_class

__all__ = [
    "BINARY_MODE",
    "MULTICLASS_MODE",
    "MULTILABEL_MODE",
    "DiceLoss",
    "FocalLoss",
    "JaccardLoss",
    "MCCLoss",
    "TverskyLoss",
]

BINARY_MODE = "binary"
MULTICLASS_MODE = "multiclass"
MULTILABEL_MODE = "multilabel"
MODES = (BINARY_MODE, MULTICLASS_MODE, MULTILABEL_MODE)


def _mode(mode: str) -> str:
    if mode not in MODES:
        raise OptionError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    return mode


def _check_samples(y_pred: torch.Tensor, y_true: torch.Tensor) -> None:
    if y_true.size(0) != y_pred.size(0):
        raise ShapeError(f"y_true: expected {y_pred.size(0)} samples as y_pred has, got {y_true.size(0)}")


class TverskyLoss(torch.nn.modules.loss._Loss):
    """`segmentation_models_pytorch.losses.TverskyLoss`.

    Args:
        mode: "binary", "multiclass" (class indices (N, *spatial)) or "multilabel" (a target of the input's shape).
        classes: Channels that count; None: all.
        log_loss: -log(index) instead of 1 - index.
        from_logits: False: the input holds probabilities.
        smooth: Added to numerator and denominator.
        ignore_index: Label of what does not count.
        eps: The least denominator.
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        gamma: Exponent of the mean over the classes.
        class_weights: One a class; the mean is divided by their sum.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.mode = _mode(mode)
        if mode == BINARY_MODE and (classes is not None or class_weights is not None):
            raise OptionError("classes, class_weights: expected None with mode='binary'")
        self.log_loss, self.from_logits, self.ignore_index = log_loss, from_logits, ignore_index
        self.smooth, self.eps = number("smooth", smooth), number("eps", eps)
        self.alpha, self.beta = number("alpha", alpha), number("beta", beta)
        self.gamma = number("gamma", gamma, positive=True)
        self.inplace_backward, self.backend = inplace_backward, backend
        self.classes: torch.Tensor | None
        self.class_weights: torch.Tensor | None
        for name, value, dtype in (("classes", classes, torch.long), ("class_weights", class_weights, torch.float)):
            self.register_buffer(name, None if value is None else torch.as_tensor(value, dtype=dtype))

    def _counts(self, y_pred: torch.Tensor, y_true: torch.Tensor):
        # tp, fp, fn of each channel, over the batch.
        activation = "softmax" if self.mode == MULTICLASS_MODE else "sigmoid"
        options = {"activation": activation if self.from_logits else "none", "soft_label": True}
        options["ignore_index"] = self.ignore_index
        check_target, voxel_weight, inplace = None, None, self.inplace_backward
        channels = y_pred.size(1)
        if self.mode == MULTICLASS_MODE:
            y_true = as_indices(y_true).view(y_pred.size(0), *y_pred.shape[2:])
            if channels == 1:
                certain, y_true, voxel_weight = of_one_class(y_pred, y_true, self.ignore_index)
                y_pred = certain if self.from_logits else y_pred
                options |= {"activation": "none", "ignore_index": None}
                check_target, inplace = False, False
        else:
            channels = 1 if self.mode == BINARY_MODE else channels
            y_pred = y_pred.reshape(y_pred.size(0), channels, -1)
            y_true = y_true.reshape(y_pred.shape)
            if self.ignore_index is not None:  # it is ignored channel by channel
                y_pred, y_true = (x.reshape(-1, 1, x.size(-1)) for x in (y_pred, y_true))
            y_true, check_target = as_dense(y_true), False  # as there, a dense target may hold anything
        how = (check_target, inplace, None, self.backend)
        counts = functional.exact_counts(y_pred, y_true, voxel_weight, options, *how)
        return (x.reshape(-1, channels).sum(0) for x in counts.unbind(-1))

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        """The loss of (N, C, *spatial) and a target."""
        _check_samples(y_pred, y_true)
        tp, fp, fn = self._counts(y_pred, y_true)
        for name in ("alpha", "beta", "smooth", "eps"):
            number(name, getattr(self, name))
        error = self.alpha * fp + self.beta * fn
        denominator = tp + error + self.smooth
        # 1 - index without cancellation, where the denominator is not the least one.
        least = denominator < self.eps
        loss = torch.where(
            least, 1 - (tp + self.smooth) / self.eps, error / torch.where(least, torch.ones_like(tp), denominator)
        )
        if self.log_loss:
            loss = -torch.log((1 - loss).clamp_min(self.eps))
        loss = loss * (tp + fn > 0)
        weights = self.class_weights
        if self.classes is not None:
            loss = loss[self.classes]
            weights = None if weights is None else weights[self.classes]
        mean = loss.mean() if weights is None else (loss * weights).sum() / weights.sum()
        gamma = number("gamma", self.gamma, positive=True)
        if gamma != 1:
            # Of a loss of 0 the slope of a power below 1 is infinite: 0 here, NaN there.
            above = mean > 0
            mean = torch.where(above, torch.where(above, mean, 1.0) ** gamma, 0.0)
        return mean.to(_result_dtype(y_pred))


def _result_dtype(y_pred: torch.Tensor) -> torch.dtype:
    # As there: the prediction's, but under autocast, which computes exponentials in float32.
    half = y_pred.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and torch.is_autocast_enabled(y_pred.device.type) else y_pred.dtype


class _EqualWeights(TverskyLoss):
    """False positives and false negatives weigh the same; takes no alpha, beta and gamma."""

    _weight = 0.5

    def __init__(
        self,
        mode: str,
        classes: Sequence[int] | None = None,
        log_loss: bool = False,
        from_logits: bool = True,
        smooth: float = 0.0,
        ignore_index: int | None = None,
        eps: float = 1e-7,
        class_weights: Sequence[float] | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            mode, classes, log_loss, from_logits, smooth, ignore_index, eps, self._weight, self._weight,
            class_weights=class_weights, inplace_backward=inplace_backward, backend=backend,
        )  # fmt: skip


class DiceLoss(_EqualWeights):
    """`segmentation_models_pytorch.losses.DiceLoss`: `TverskyLoss` with alpha = beta = 0.5."""


class JaccardLoss(_EqualWeights):
    """`segmentation_models_pytorch.losses.JaccardLoss`: `TverskyLoss` with alpha = beta = 1."""

    _weight = 1.0


FOCAL_REDUCTIONS = ("mean", "sum", "none", "batchwise_mean")


class FocalLoss(torch.nn.modules.loss._Loss):
    """`segmentation_models_pytorch.losses.FocalLoss`: of a sigmoid of every channel, in every mode.

    The mean and the sum of hard targets without ``alpha``, ``normalized`` and ``reduced_threshold`` are one count pass
    and one gradient pass; all else is computed by torch, and on a GPU a target of a floating type, which may be soft.

    Args:
        mode: "binary", "multiclass" (class indices (N, *spatial)) or "multilabel" (a target of the input's shape).
        alpha: Weight of the positives, 1 - alpha that of the negatives; None: without.
        gamma: The focal exponent.
        ignore_index: Label of what does not count; not for "multilabel".
        from_logits: False: the input holds probabilities.
        eps: With these, their least distance to 0 and 1.
        reduction: "mean", "sum", "none" or "batchwise_mean", of each class, before the mean over the classes.
        normalized: Divide by the sum of the focal factors.
        reduced_threshold: The factor is 1 where the probability of the label is below it.
        class_weights: One a class; the mean is divided by their sum.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(
        self,
        mode: str,
        alpha: float | None = None,
        gamma: float | None = 2.0,
        ignore_index: int | None = None,
        from_logits: bool = True,
        eps: float = 1e-7,
        reduction: str | None = "mean",
        normalized: bool = False,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | None = None,
        *,
        inplace_backward: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.mode = _mode(mode)
        if class_weights is not None and mode == BINARY_MODE:
            raise ValueError("class_weights: expected None with mode='binary'")
        if ignore_index is not None and mode == MULTILABEL_MODE:
            raise ValueError("ignore_index: expected None with mode='multilabel'")
        self.alpha, self.gamma = alpha, number("gamma", gamma)
        self.ignore_index, self.from_logits, self.eps = ignore_index, from_logits, number("eps", eps)
        self.reduction = one_of("reduction", reduction or "none", FOCAL_REDUCTIONS)
        self.normalized, self.reduced_threshold = normalized, reduced_threshold
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float)
        self.class_weights: torch.Tensor | None
        self.register_buffer("class_weights", weights)
        self.inplace_backward, self.backend = inplace_backward, backend

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        """The loss of (N, C, *spatial) and a target."""
        if not self.from_logits:
            p = y_pred.clamp(self.eps, 1 - self.eps)
            y_pred = p.log() if self.mode == MULTICLASS_MODE else (p / (1 - p)).log()
        if self.mode == BINARY_MODE:
            y_pred = y_pred.reshape(1, 1, -1)
            y_true = y_true.reshape(y_pred.shape)
        plain = self.alpha is None and not self.normalized and self.reduced_threshold is None
        labels = self.mode == MULTICLASS_MODE
        # Of one class the kernels take the label 1 for it, smp the label 0.
        takes = not (labels and y_pred.size(1) == 1) and (labels or self._is_hard(y_true))
        if plain and takes and self.reduction in ("mean", "sum"):
            return self._by_kernels(y_pred, y_true, labels)
        return self._by_torch(y_pred, y_true)

    def _is_hard(self, y_true: torch.Tensor) -> bool:
        return is_hard(y_true if self.ignore_index is None else y_true[y_true != self.ignore_index])

    def _by_kernels(self, y_pred, y_true, labels: bool) -> torch.Tensor:
        classes, weights = y_pred.size(1), self.class_weights
        weights = torch.ones(classes) if weights is None else weights
        share = weights / weights.sum()
        voxel_weight, ignore_index = None, self.ignore_index
        if labels:
            target = as_indices(y_true)
        else:
            target = as_dense(y_true)
            if ignore_index is not None:
                voxel_weight, ignore_index = y_true[:, 0] != ignore_index, None
                target = target.where(voxel_weight.unsqueeze(1), 0)
        loss = functional.tversky_ce_loss(
            y_pred, target, activation="sigmoid", tversky_weight=0.0, reduction=self.reduction,
            ce_class_weight=share * classes if self.reduction == "mean" else share, focal_gamma=self.gamma,
            ignore_index=ignore_index, voxel_weight=voxel_weight, check_target=None if labels else False,
            inplace_backward=self.inplace_backward, backend=self.backend,
        )  # fmt: skip
        return loss.to(_result_dtype(y_pred))

    def _by_torch(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        counted = None if self.ignore_index is None else y_true != self.ignore_index
        losses = []
        for c in range(y_pred.size(1)):
            g = y_true == c if self.mode == MULTICLASS_MODE else y_true[:, c]
            z, keep = y_pred[:, c], counted if self.mode == MULTICLASS_MODE or counted is None else counted[:, c]
            if self.mode == BINARY_MODE:
                z, g = z.reshape(-1), g.reshape(-1)
                keep = None if keep is None else keep.reshape(-1)
            losses.append(self._of_class(z if keep is None else z[keep], g if keep is None else g[keep]))
        if self.mode == BINARY_MODE:
            return losses[0]
        of_classes = torch.stack(losses)
        if self.class_weights is None:
            return of_classes.mean()
        weights = self.class_weights.to(of_classes.device)
        return (of_classes * weights).sum() / weights.sum()

    def _of_class(self, z: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        g = g.to(z.dtype)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(z, g, reduction="none")
        p = torch.exp(-entropy)
        # A power below 1 of 0 has no slope: the gradient is 0 there.
        others = (1 - p).clamp_min(torch.finfo(p.dtype).tiny)
        if self.reduced_threshold is None:
            factor = others.pow(self.gamma)
        else:
            factor = (others / self.reduced_threshold).pow(self.gamma)
            factor = factor.where(p >= self.reduced_threshold, torch.ones_like(p))
        loss = factor * entropy
        if self.alpha is not None:
            loss = loss * (self.alpha * g + (1 - self.alpha) * (1 - g))
        if self.normalized:
            loss = loss / factor.sum().clamp_min(1e-6)
        if self.reduction == "mean":
            return loss.mean()
        if self.reduction == "sum":
            return loss.sum()
        return loss.sum(0) if self.reduction == "batchwise_mean" else loss


class MCCLoss(torch.nn.modules.loss._Loss):
    """`segmentation_models_pytorch.losses.MCCLoss`: 1 - the Matthews correlation coefficient, of probabilities.

    Args:
        eps: Added to tp, tn, fp and fn.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
        backend: As in `tversky_kernels.tversky_loss`.
    """

    def __init__(self, eps: float = 1e-5, *, inplace_backward: bool = False, backend: str = "auto"):
        super().__init__()
        self.eps = number("eps", eps)
        self.inplace_backward, self.backend = inplace_backward, backend

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        """The loss of (N, *spatial) or (N, 1, *spatial) probabilities, and a target of 0 and 1."""
        _check_samples(y_pred, y_true)
        p = y_pred.reshape(y_pred.size(0), 1, -1)
        g = as_dense(y_true.reshape(p.shape))
        how = (False, self.inplace_backward, None, self.backend)
        counts = functional.exact_counts(p, g, None, {"activation": "none"}, *how).sum((0, 1))
        tp, fp, fn = counts.unbind(-1)
        tn = p.numel() - tp - fp - fn
        tp, tn, fp, fn = (x + self.eps for x in (tp, tn, fp, fn))
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return (1 - (tp * tn - fp * fn) / product.sqrt()).to(_result_dtype(y_pred))
