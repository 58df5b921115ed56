"""The losses as modules: they store the arguments and call the functions."""

from __future__ import annotations

import inspect

import torch

from . import functional

__all__ = [
    "DeepSupervisionLoss",
    "DiceLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "TverskyCELoss",
    "TverskyLoss",
]


class _Loss(torch.nn.Module):
    """Stores the options of a function of `functional`, tensors among them as buffers that move with the module."""

    _function = staticmethod(functional.tversky_loss)
    _takes = (functional.tversky_loss,)
    _fixed = frozenset()

    def __init__(self, **options):
        super().__init__()
        known = {name for function in self._takes for name in inspect.signature(function).parameters} - {"options"}
        for name, value in options.items():
            if name not in known or name in ("logits", "target", "voxel_weight", *self._fixed):
                raise TypeError(f"{type(self).__name__}: unexpected argument {name!r}")
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self._names = tuple(options)

    def forward(self, logits, target: torch.Tensor, voxel_weight: torch.Tensor | None = None):
        """The loss of logits and a target, as the function takes them; voxel_weight as in `tversky_loss`."""
        options = {name: getattr(self, name) for name in self._names}
        return self._function(logits, target, voxel_weight=voxel_weight, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)


class TverskyLoss(_Loss):
    """`tversky_kernels.tversky_loss` as a module: takes its keyword arguments, but for voxel_weight.

    Example:
        >>> criterion = tk.TverskyLoss(alpha=0.3, beta=0.7)
        >>> criterion(model(image), label).backward()
    """


class DiceLoss(_Loss):
    """`tversky_kernels.dice_loss` as a module."""

    _function = staticmethod(functional.dice_loss)
    _fixed = frozenset({"alpha", "beta"})


class JaccardLoss(_Loss):
    """`tversky_kernels.jaccard_loss` as a module."""

    _function = staticmethod(functional.jaccard_loss)
    _fixed = frozenset({"alpha", "beta"})


class FocalTverskyLoss(_Loss):
    """`tversky_kernels.focal_tversky_loss` as a module: gamma = 0.75 unless given."""

    _function = staticmethod(functional.focal_tversky_loss)


class TverskyCELoss(_Loss):
    """`tversky_kernels.tversky_ce_loss` as a module."""

    _function = staticmethod(functional.tversky_ce_loss)
    _takes = (functional.tversky_ce_loss,)


class GeneralizedDiceLoss(_Loss):
    """`tversky_kernels.generalized_dice_loss` as a module."""

    _function = staticmethod(functional.generalized_dice_loss)
    _takes = (functional.generalized_dice_loss, functional.overlap_counts)


class DeepSupervisionLoss(_Loss):
    """`tversky_kernels.deep_supervision_loss` as a module: takes its keyword arguments, weights and loss among them.

    Example:
        >>> criterion = tk.DeepSupervisionLoss(loss="tversky_ce", alpha=0.5, beta=0.5, batch=True)
        >>> criterion([full, half, quarter], label).backward()
    """

    _function = staticmethod(functional.deep_supervision_loss)
    _takes = (functional.deep_supervision_loss, functional.tversky_ce_loss)
