"""Joins ranks of `torch.distributed`: the counts of parts of one batch or volume, and the means of different samples.

What crosses the wire in a call is one table of counts (24 bytes a class and row, 48 with a cross-entropy) and eight
numbers that say whether the ranks agree and whether one of them has failed. So all ranks raise in the same step.
"""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ._options import GRAD_REDUCTIONS, one_of

#: Of each exchange: whether this rank failed, 1 for each rank, and three hashes of the arguments with their squares.
_TRAILER = 8
_HASHES = 3
#: Sizes of tables that the ranks of a group have agreed on: on GPUs they are not compared again.
_agreed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class RankError(RuntimeError):
    """Another rank has failed in this call; its own error says how."""


class Ranks(NamedTuple):
    """parts: the group that holds parts of the same batch or volumes. samples: the one that holds different samples.

    scale: what each rank multiplies the gradient of its part by.
    """

    parts: torch.distributed.ProcessGroup | None
    samples: torch.distributed.ProcessGroup | None
    scale: float


def ranks_of(process_group, sample_group, grad_reduction: str) -> Ranks | None:
    """The groups, looked up and checked; None where this process computes by itself."""
    one_of("grad_reduction", grad_reduction, GRAD_REDUCTIONS)
    if process_group is None and sample_group is None:
        return None
    parts, samples = _group("process_group", process_group), _group("sample_group", sample_group)
    size = 1
    for group in (parts, samples):
        size *= 1 if group is None else torch.distributed.get_world_size(group)
    return Ranks(parts, samples, float(size) if grad_reduction == "mean" else 1.0)


def is_initialised() -> bool:
    """Whether this process has a default group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _group(name: str, group):
    if group is None:
        return None
    if not is_initialised():
        raise ValueError(f"{name}: expected it after torch.distributed.init_process_group, which has not been called")
    if group is True:
        return torch.distributed.group.WORLD
    if not isinstance(group, torch.distributed.ProcessGroup):
        if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name}: expected a group that this rank is part of; it is not in this one")
        more = "; of a DeviceMesh give mesh.get_group(name)" if hasattr(group, "get_group") else ""
        raise TypeError(
            f"{name}: expected True for the default group, a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}{more}"
        )
    if torch.distributed.get_rank(group) < 0:
        raise ValueError(f"{name}: expected a group that this rank is part of; it is not in this one")
    return group


class _Sum(torch.autograd.Function):
    # Every rank computes the same loss of the same sum and differentiates it with respect to its own part, so the
    # gradient of a part is that of the sum, without communication; times what the caller's averaging divides by.
    @staticmethod
    def forward(ctx, x, group, scale):
        ctx.scale = scale
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _Scale.apply(grad, ctx.scale), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, scale):
        return grad * scale

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError("process_group, sample_group: second derivatives over several ranks")


def token_of(*what) -> tuple[int, ...]:
    """Numbers that are the same on ranks that were called with the same arguments. what: anything with a repr."""
    return _token_of(repr(what))


@functools.lru_cache(maxsize=256)
def _token_of(text: str) -> tuple[int, ...]:
    # Small enough for their squares, times a thousand ranks, to be exact in float64.
    return tuple(zlib.crc32(f"{i}{text}".encode()) & 0xFFFF for i in range(_HASHES))


def agree_on_sizes(group, tables: Sequence[tuple[int, ...]], device: torch.device, name: str) -> None:
    """Raises on all ranks where their tables have different sizes, which a sum would not survive.

    tables: (rows, classes, columns) of each. On a GPU it waits for the device, and so is done once for each size.
    """
    own = (len(tables), *(n for table in tables for n in table))
    known = _agreed.setdefault(group, set())
    if own in known and device.type != "cpu":
        return
    # As many numbers on every rank, whatever it was called with.
    text = ", ".join(str(tuple(t)) for t in tables)
    first = (*own, 0, 0, 0)[1:4]
    message = torch.tensor([len(tables), *first, *token_of(text)], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(message) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(everyone, message, group=group)
    found = torch.stack(everyone).tolist()
    if any(row != found[0] for row in found):
        ranks = "; ".join(f"rank {r}: {row[1]} x {row[2]} x {row[3]}" for r, row in enumerate(found))
        what = (
            "the ranks hold parts of the same samples, or with batch=True of one batch"
            if name == "process_group"
            else "the ranks hold other samples of the same classes"
        )
        raise ValueError(
            f"{name}: expected tables of counts of one size on all ranks (rows x classes x columns), for {what}; got "
            f"{ranks}. Samples that differ between ranks are joined by sample_group"
        )
    known.add(own)


class Joined(NamedTuple):
    """Sums over the ranks, and the error that this rank must raise (None: no error, or nobody has looked)."""

    values: list[torch.Tensor]
    error: Exception | None


def sum_over(
    group,
    values: Sequence[torch.Tensor],
    scale: float,
    token: tuple[int, ...],
    error: Exception | None,
    reads: bool,
    name: str,
) -> Joined:
    """The sums of all values over the group, in one exchange; their gradients are each rank's own part, times scale.

    error: what this rank failed with; all ranks then have something to raise. reads: look whether one did, which waits
    for the device; all ranks must say the same. Without it, values are NaN where one failed or arguments differ.
    """
    if torch.compiler.is_compiling():
        return Joined([_Sum.apply(x, group, scale) for x in values], None)
    hashes = [float(h) for token_hash in token for h in (token_hash, token_hash * token_hash)]
    trailer = values[0].new_tensor([float(error is not None), 1.0, *hashes])
    flat = torch.cat([*(x.reshape(-1) for x in values), trailer])
    summed = _Sum.apply(flat, group, scale)
    *parts, trailer = summed.split([*(x.numel() for x in values), _TRAILER])
    parts = [part.view(x.shape) for part, x in zip(parts, values, strict=True)]
    trailer = trailer.detach()
    if not reads:
        poison = torch.where(_differ(trailer) | (trailer[0] > 0), torch.nan, 0.0)
        return Joined([part + poison for part in parts], None)
    if error is None:
        if trailer[0] > 0:
            error = RankError(f"{name}: another rank has failed in this call; its error says why")
        elif _differ(trailer):
            error = ValueError(
                f"{name}: expected the same options and dtypes on all ranks; this rank's are not those of another one"
            )
    return Joined(parts, error)


def _differ(trailer: torch.Tensor) -> torch.Tensor:
    # n sum h^2 - (sum h)^2 is 0 where all n hashes are one, and n - 1 at the least where they are not.
    ranks = trailer[1]
    pairs = trailer[2:].view(_HASHES, 2)
    return (ranks * pairs[:, 1] - pairs[:, 0] ** 2 > (ranks - 1) / 2).any()


def attempt(function: Callable[[], torch.Tensor], empty: Callable[[], torch.Tensor]):
    """(result, None) or, where the function raises, (what stands for it, the error): the other ranks wait for it."""
    if torch.compiler.is_compiling():
        return function(), None
    try:
        return function(), None
    except Exception as error:  # also out of memory: all ranks stop in the same step
        return empty(), error
