"""The losses as modules: they store the arguments and call the functions."""

from __future__ import annotations

import inspect

import torch

from . import functional

__all__ = ["DiceLoss", "FocalTverskyLoss", "JaccardLoss", "TverskyLoss"]


class _Loss(torch.nn.Module):
    """Stores the options of a function of `functional`, tensors among them as buffers that move with the module."""

    _function = staticmethod(functional.tversky_loss)
    _fixed = frozenset()

    def __init__(self, **options):
        super().__init__()
        known = inspect.signature(functional.tversky_loss).parameters
        for name, value in options.items():
            if name not in known or name in ("logits", "target", "voxel_weight", *self._fixed):
                raise TypeError(f"{type(self).__name__}: unexpected argument {name!r}")
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)
        self._names = tuple(options)

    def forward(self, logits: torch.Tensor, target: torch.Tensor, voxel_weight: torch.Tensor | None = None):
        """The loss of logits (N, C, *spatial) and a target; voxel_weight as in `tversky_loss`."""
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
