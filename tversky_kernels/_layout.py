"""Which tensors the kernels walk where they are: those whose voxels lie one stride apart."""

from __future__ import annotations

import torch


def voxel_stride(x: torch.Tensor, first: int) -> int | None:
    """The stride from voxel to voxel, in row-major order of the dimensions from ``first`` on; None: there is none."""
    stride, voxels = 1, 1
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
