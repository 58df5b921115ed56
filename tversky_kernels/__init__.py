"""Fused softmax + Tversky loss, forward and backward, for large volumes in PyTorch."""

from . import compat, metrics, reference, regions
from ._backends import available_backends
from .functional import (
    OverlapCounts,
    OverlapCountsCE,
    deep_supervision_loss,
    dice_loss,
    focal_tversky_loss,
    generalized_dice_loss,
    jaccard_loss,
    linear_tversky_loss,
    overlap_counts,
    tversky_ce_loss,
    tversky_loss,
)
from .lesions import blob_loss, cc_loss
from .metrics import HardCounts, hard_counts
from .modules import (
    BlobLoss,
    CCLoss,
    DeepSupervisionLoss,
    DiceLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    TverskyCELoss,
    TverskyHead,
    TverskyLoss,
)

__version__ = "0.1.0"

__all__ = [
    "BlobLoss",
    "CCLoss",
    "DeepSupervisionLoss",
    "DiceLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "HardCounts",
    "JaccardLoss",
    "OverlapCounts",
    "OverlapCountsCE",
    "TverskyCELoss",
    "TverskyHead",
    "TverskyLoss",
    "available_backends",
    "blob_loss",
    "cc_loss",
    "compat",
    "deep_supervision_loss",
    "dice_loss",
    "focal_tversky_loss",
    "generalized_dice_loss",
    "hard_counts",
    "jaccard_loss",
    "linear_tversky_loss",
    "metrics",
    "overlap_counts",
    "reference",
    "regions",
    "tversky_ce_loss",
    "tversky_loss",
]
