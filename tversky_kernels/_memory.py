"""The memory that a call takes beyond what is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

from ._backends import available_backends

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise announces itself at every start


@contextlib.contextmanager
def _gradients_from_torch() -> Iterator[None]:
    # Memory that the CPU kernels keep for their next gradient is not in the books of torch's allocator.
    if available_backends()["cpu"] is not True:
        yield
        return
    memory = torch.ops.tversky_kernels.cpu_gradient_memory
    keeps, *_ = memory(None)
    memory(False)
    try:
        yield
    finally:
        memory(keeps)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that torch's allocator held at once during the call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _gradients_from_torch(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
