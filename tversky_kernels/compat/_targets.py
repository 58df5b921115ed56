"""Targets as other libraries take them, brought into the form that the kernels read."""

from __future__ import annotations

import torch


def as_indices(target: torch.Tensor) -> torch.Tensor:
    """Class indices; labels that are stored as floating numbers, as image readers give them, become int32."""
    return target.to(torch.int32) if target.is_floating_point() else target


def as_dense(target: torch.Tensor) -> torch.Tensor:
    """A dense target of one channel, as the kernels tell it from class indices: by its floating type."""
    return target.float() if target.size(1) == 1 and not target.is_floating_point() else target
