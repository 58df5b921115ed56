"""Which tensors the kernels read without a copy: their voxels must lie one stride apart."""

from __future__ import annotations

import torch


def voxel_stride(x: torch.Tensor, first: int) -> int | None:
    """The stride from voxel to voxel, in row-major order of the dimensions from ``first`` on; None: there is none."""
    stride, voxels = 1, 1
    if x.numel() == 0:
        return stride
    for size, step in zip(reversed(x.shape[first:]), reversed(x.stride()[first:]), strict=True):
        if size == 1:
            continue
        if voxels == 1:
            stride = step
        elif step != stride * voxels:
            return None
        voxels *= size
    return stride


def walkable(x: torch.Tensor, first: int) -> torch.Tensor:
    """The tensor itself where its voxels lie one stride apart, else a contiguous copy."""
    return x if x.is_contiguous() or voxel_stride(x, first) is not None else x.contiguous()


def is_dense(x: torch.Tensor) -> bool:
    """Whether the elements fill a block of memory, each one place of its own, in any order of the dimensions."""
    if x.is_contiguous() or x.numel() == 0:
        return True
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(x.shape, x.stride(), strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True
