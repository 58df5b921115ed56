"""What a loss costs inside a training step: seconds, and memory beyond the logits and the target."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tversky_kernels._memory import peak_bytes


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loss_cost(
    losses: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
    forward: Callable[[], torch.Tensor],
    target: torch.Tensor,
    repeats: int = 5,
) -> dict[str, dict[str, float]]:
    """Times each loss, forward and backward, in a whole training step; the losses take turns, and medians are given.

    ``forward`` runs the network and returns logits that carry its graph. Returns per loss: seconds, its share of the
    step, and MiB.
    """
    spent: dict[str, list[float]] = {name: [] for name in losses}
    steps: dict[str, list[float]] = {name: [] for name in losses}
    memory: dict[str, float] = {}
    for _ in range(repeats + 1):  # the first is a warm-up
        for name, loss in losses.items():
            started = time.perf_counter()
            logits = forward()
            _synchronise(logits.device)
            before = time.perf_counter()
            (gradient,) = torch.autograd.grad(loss(logits, target), logits)
            _synchronise(logits.device)
            after = time.perf_counter()
            logits.backward(gradient)
            _synchronise(logits.device)
            spent[name].append(after - before)
            steps[name].append(time.perf_counter() - started)
    for name, loss in losses.items():
        logits = forward()
        memory[name] = (
            peak_bytes(lambda z=logits, loss=loss: torch.autograd.grad(loss(z, target), z), logits.device) / 2**20
        )
    return {
        name: {
            "seconds": statistics.median(spent[name][1:]),
            "share": statistics.median(s / w for s, w in zip(spent[name][1:], steps[name][1:], strict=True)),
            "MiB": memory[name],
        }
        for name in losses
    }
