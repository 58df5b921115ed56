"""Sums the table of counts over the ranks that hold parts of one batch or of one volume."""

from __future__ import annotations

import torch


class _SumOverGroup(torch.autograd.Function):
    # Every rank computes the same loss of the same sum and differentiates it with respect to its own part, so the
    # gradient of a part is the gradient of the sum: the identity, without communication.
    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_over_group(x: torch.Tensor, process_group) -> torch.Tensor:
    """The sum of x over the ranks of a `torch.distributed` group; its gradient is each rank's own part."""
    return _SumOverGroup.apply(x, process_group)
