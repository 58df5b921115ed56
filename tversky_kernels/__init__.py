"""Fused softmax + Tversky loss, forward and backward, for large volumes in PyTorch."""

from . import reference
from ._backends import available_backends
from .functional import dice_loss, focal_tversky_loss, jaccard_loss, tversky_loss
from .modules import DiceLoss, FocalTverskyLoss, JaccardLoss, TverskyLoss

__version__ = "0.1.0"

__all__ = [
    "DiceLoss",
    "FocalTverskyLoss",
    "JaccardLoss",
    "TverskyLoss",
    "available_backends",
    "dice_loss",
    "focal_tversky_loss",
    "jaccard_loss",
    "reference",
    "tversky_loss",
]
