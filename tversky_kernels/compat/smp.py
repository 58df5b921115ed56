"""segmentation_models_pytorch's `TverskyLoss`, `DiceLoss` and `JaccardLoss` (0.6): their arguments, their numbers.

There the counts are summed over the batch, an absent class costs nothing, and gamma is the exponent of the mean over
the classes, not of each class. The overlap is measured by |p - g|, which for hard labels is the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import functional
from .._arguments import compute_dtype, number, one_of
from ._targets import as_dense

__all__ = ["DiceLoss", "JaccardLoss", "TverskyLoss"]

MODES = ("binary", "multiclass", "multilabel")


class TverskyLoss(torch.nn.Module):
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
        self.mode = one_of("mode", mode, MODES)
        if mode == "binary" and (classes is not None or class_weights is not None):
            raise ValueError("classes, class_weights: expected None with mode='binary'")
        self.log_loss, self.from_logits, self.ignore_index = log_loss, from_logits, ignore_index
        self.smooth, self.eps = number("smooth", smooth), number("eps", eps)
        self.alpha, self.beta = number("alpha", alpha), number("beta", beta)
        self.gamma = number("gamma", gamma, positive=True)
        self.inplace_backward, self.backend = inplace_backward, backend
        for name, value, dtype in (("classes", classes, torch.long), ("class_weights", class_weights, torch.float)):
            value = None if value is None else torch.as_tensor(value, dtype=dtype)
            self.register_buffer(name, value)

    def _counts(self, y_pred: torch.Tensor, y_true: torch.Tensor):
        # tp, fp, fn of each channel, over the batch.
        activation = "softmax" if self.mode == "multiclass" else "sigmoid"
        options = {"activation": activation if self.from_logits else "none", "soft_label": True}
        options["ignore_index"] = self.ignore_index
        check_target = None
        channels = y_pred.size(1)
        if self.mode == "multiclass":
            y_true = y_true.view(y_pred.size(0), *y_pred.shape[2:])
        else:
            channels = 1 if self.mode == "binary" else channels
            y_pred = y_pred.reshape(y_pred.size(0), channels, -1)
            y_true = y_true.reshape(y_pred.shape)
            if self.ignore_index is not None:  # it is ignored channel by channel
                y_pred, y_true = (x.reshape(-1, 1, x.size(-1)) for x in (y_pred, y_true))
            y_true, check_target = as_dense(y_true), False  # as there, a dense target may hold anything
        how = (check_target, self.inplace_backward, None, self.backend)
        counts = functional.exact_counts(y_pred, y_true, None, options, *how)
        return (x.reshape(-1, channels).sum(0) for x in counts.unbind(-1))

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
        """The loss of (N, C, *spatial) and a target."""
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
        mean = mean.to(compute_dtype(y_pred))
        return mean if self.gamma == 1 else mean ** number("gamma", self.gamma, positive=True)


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
