"""Targets as other libraries take them, brought into the form that the kernels read."""

from __future__ import annotations

import torch


def as_indices(target: torch.Tensor) -> torch.Tensor:
    """Class indices; labels that are stored as floating numbers, as image readers give them, become int32."""
    return target.to(torch.int32) if target.is_floating_point() else target


def as_dense(target: torch.Tensor) -> torch.Tensor:
    """A dense target of one channel, as the kernels tell it from class indices: by its floating type."""
    return target.float() if target.size(1) == 1 and not target.is_floating_point() else target


def is_hard(target: torch.Tensor) -> bool:
    """Whether all values of a dense target are 0 or 1, as far as that is known without waiting for a device."""
    if not target.is_floating_point():
        return True
    return target.is_cpu and not torch.compiler.is_compiling() and bool(((target == 0) | (target == 1)).all())


def of_one_class(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int | None):
    """A softmax of one channel, which is 1 everywhere, as the kernels take it.

    Returns probabilities (N, 1, *spatial), the dense target of the class 0, and the voxels that count, or None.
    """
    counted = None if ignore_index is None else labels != ignore_index
    bad = labels != 0 if counted is None else (labels != 0) & counted
    if labels.is_cpu and not torch.compiler.is_compiling() and bool(bad.any()):
        raise ValueError(f"target: expected labels in [0, 1), got {labels[bad][0].item()}")
    return logits.softmax(1), (labels == 0).to(torch.float32).unsqueeze(1), counted
