"""The 3D fully convolutional network of Salehi, Erdogmus, Gholipour (2017), arXiv:1706.05721, section 2.2."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


def _double_convolution(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv3d(channels, outputs, 3, padding=1))
        if norm == "instance":
            layers.append(nn.InstanceNorm3d(outputs, affine=True))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class FCN(nn.Module):
    """A 3D U-Net: per level two padded 3x3x3 convolutions with ReLU, 2x2x2 max pooling on the way down with twice the
    features after each, 2x2x2 transposed convolutions and concatenation on the way up, a 1x1x1 convolution at the end.

    The paper mentions no normalisation (``norm="none"``); ``"instance"`` trains faster on few volumes. The size of its
    first layer is not in the paper's text. Returns logits: the loss applies the softmax.
    """

    def __init__(self, inputs: int = 1, classes: int = 2, features: int = 16, levels: int = 4, norm: str = "none"):
        super().__init__()
        widths = [features * 2**level for level in range(levels)]
        self.stride = 2 ** (levels - 1)  # the input's sizes must be multiples of it
        self.down = nn.ModuleList(
            _double_convolution(a, b, norm) for a, b in zip([inputs, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(_double_convolution(2 * a, a, norm) for a in widths[:-1])
        self.head = nn.Conv3d(features, classes, 1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, D, H, W) -> logits (N, classes, D, H, W)."""
        skips = []
        for level, convolution in enumerate(self.down):
            x = convolution(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat((skips.pop(), up(x)), dim=1))
        return self.head(x)
