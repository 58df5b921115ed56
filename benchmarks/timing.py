"""How long a call takes: on the CPU by the wall clock, on a card by its own clock, and its host's time beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

#: A card turns no faster, so that it sleeps at least as long as it is asked to.
MOST_CYCLES_A_SECOND = 2e9
SHORTEST_HEAD_START = 1e-3
#: Of a call that takes longer on the host something is made once: a compilation, say, in a warm-up.
LONGEST_HEAD_START = 0.1


class Timing(NamedTuple):
    """Seconds: of the work, and until the call returned, where that is something else."""

    work: float
    host: float | None = None


def timed(function: Callable[..., object], prepare: Callable[[], tuple], device: str) -> Timing:
    """Of ``function(*prepare())``, what `prepare` takes not counted. On a card both are called twice.

    There the card first sleeps while the host issues the whole call, so that what lies between the two events is the
    kernels one after the other, as in a training step whose host is ahead; a call that waits for the card shows that.
    """
    if device != "cuda":
        arguments = prepare()
        started = time.perf_counter()
        function(*arguments)
        return Timing(time.perf_counter() - started)
    arguments = prepare()
    torch.cuda.synchronize()
    started = time.perf_counter()
    function(*arguments)
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    arguments = prepare()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    head_start = min(max(SHORTEST_HEAD_START, 2 * host), LONGEST_HEAD_START)
    torch.cuda._sleep(int(head_start * MOST_CYCLES_A_SECOND))
    begin.record()
    function(*arguments)
    end.record()
    torch.cuda.synchronize()
    return Timing(1e-3 * begin.elapsed_time(end), host)


def spread(times: list[float]) -> float:
    """Half the distance of the quartiles, as a fraction of the median."""
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / statistics.median(times)
