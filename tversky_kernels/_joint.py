"""Losses over several ranks: each rank counts its part, the counts are summed, the loss is computed from the sum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import _arguments, _options, distributed, reference
from ._transforms import active_transforms
from .distributed import Ranks


class Part(NamedTuple):
    """This rank's part of a loss.

    counts: Computes (N, C, 3 or 6), or the counts of regions, differentiable. like: Has the shape, dtype and device of
    the logits.
    """

    counts: Callable[[], torch.Tensor]
    checked: _arguments.Checked
    like: torch.Tensor

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of this rank's table: samples, and regions where there are any."""
        samples = 1 if self.checked.plan.options.batch else self.like.size(0)
        return (samples,) if self.checked.regions is None else (samples, self.checked.regions.number)

    @property
    def size(self) -> tuple[int, int, int]:
        """Rows, classes and columns of this rank's table."""
        columns = self.checked.columns + (self.checked.has_members and self.checked.regions is None)
        return math.prod(self.rows), self.like.size(1), columns


# A hash of everything that must be the same on all ranks. Values that are on a GPU are left out.
def _token(parts: Sequence[Part], check_target: bool | None) -> tuple[int, ...]:
    what: list[object] = [check_target]
    for part in parts:
        checked = part.checked
        parameters = checked.class_parameters
        numbers: object = parameters is not None
        if parameters is not None and parameters.is_cpu and not parameters.requires_grad:
            numbers = parameters.tolist()
        of_tensors = {name: float(x) if x.is_cpu else None for name, x in checked.scalars.items()}
        what += [
            checked.plan.options,
            checked.volumes.dense,
            None if checked.regions is None else checked.regions.number,
            checked.annotated is None,
            part.like.size(1),
            part.like.dtype,
            numbers,
            of_tensors,
        ]
    return distributed.token_of(*what)


def _reads(like: torch.Tensor, check_target: bool | None) -> bool:
    # Whether the exchange's numbers are looked at: on the host that is free.
    return (like.device.type == "cpu" or check_target is True) and not active_transforms()


def _summed_counts(parts: Sequence[Part], ranks: Ranks, check_target: bool | None):
    # The counts of each part, summed over the batch where that is asked for and over the ranks that hold parts; the
    # error to be raised, or None; the token of the arguments.
    if active_transforms():
        raise NotImplementedError("process_group, sample_group: torch.func transforms over several ranks")
    found, error = [], None
    token = () if torch.compiler.is_compiling() else _token(parts, check_target)
    for part in parts:
        shape = (*part.rows, *part.size[1:])
        empty = functools.partial(part.like.new_zeros, shape, dtype=torch.float64)
        counts, failed = distributed.attempt(functools.partial(_rows, part), empty)
        error = error or failed
        found.append(counts)
    if ranks.parts is None:
        return found, error, token
    if not torch.compiler.is_compiling():
        sizes = [part.size for part in parts]
        try:
            distributed.agree_on_sizes(ranks.parts, sizes, parts[0].like.device, "process_group")
        except ValueError as different:
            return found, error or different, token  # raised later, for ranks with other samples wait
    reads = _reads(parts[0].like, check_target)
    joined = distributed.sum_over(ranks.parts, found, ranks.scale, token, error, reads, "process_group")
    return joined.values, joined.error or error, token


def _rows(part: Part) -> torch.Tensor:
    return reference.rows_of(part.counts().double(), part.checked)


def counts(part: Part, ranks: Ranks, check_target: bool | None) -> torch.Tensor:
    """(rows, C, 3) of all ranks together, in float64."""
    (values,), error, _ = _summed_counts([part], ranks, check_target)
    if error is not None:
        raise error
    return values


def losses(parts: Sequence[Part], ranks: Ranks, check_target: bool | None) -> list[torch.Tensor]:
    """The loss of each part, of all ranks together; one exchange for all of them."""
    values, error, token = _summed_counts(parts, ranks, check_target)
    terms = []
    for part, value in zip(parts, values, strict=True):
        terms.append(reference.terms_of_table(value, part.checked, reference.flat_below(part.like.dtype)))
    if ranks.samples is not None:
        # Where ranks of `parts` hold the same samples, each of them brings these; the ranks of `samples` bring others.
        scale = ranks.scale if ranks.parts is None else 1.0
        terms, error = _over_samples(parts, terms, ranks, scale, token, error, _reads(parts[0].like, check_target))
    if error is not None:
        raise error
    results = []
    for part, of in zip(parts, terms, strict=True):
        loss = reference.reduced(of, part.checked.options)
        results.append(loss.to(_arguments.compute_dtype(part.like)))
    return results


def _over_samples(parts, terms, ranks, scale, token, error, reads):
    # Sums, and their divisors, over the ranks that hold other samples.
    values = []
    for of in terms:
        kept = of.kept if isinstance(of.kept, torch.Tensor) else of.loss.new_tensor(float(of.kept))
        nothing = of.loss.new_zeros(())
        ce = (nothing, nothing) if of.cross_entropy is None else (of.cross_entropy.sum(), of.divisor.sum())
        values.append(torch.stack([of.loss.sum(), kept.to(of.loss.dtype), *ce]))
    if not torch.compiler.is_compiling():
        sizes = [(1, 4, part.like.size(1)) for part in parts]
        distributed.agree_on_sizes(ranks.samples, sizes, parts[0].like.device, "sample_group")
    joined = distributed.sum_over(ranks.samples, values, scale, token, error, reads, "sample_group")
    summed = []
    for of, value in zip(terms, joined.values, strict=True):
        loss, kept, ce, divisor = value.unbind()
        has_ce = of.cross_entropy is not None
        summed.append(
            reference.Terms(loss, kept.detach(), ce if has_ce else None, divisor.detach() if has_ce else None)
        )
    return summed, joined.error or error


def over_samples(loss: torch.Tensor, ranks: Ranks, scale: float, token, error, check_target, like: torch.Tensor):
    """The sum of the samples' losses (N) over all ranks of the samples' group, and how many they are."""
    values = [torch.stack([loss.sum(), loss.new_tensor(float(loss.numel()))])]
    token, reads = distributed.token_of(*token), _reads(like, check_target)
    joined = distributed.sum_over(ranks.samples, values, scale, token, error, reads, "sample_group")
    error = joined.error or error
    if error is not None:
        raise error
    total, samples = joined.values[0].unbind()
    return total, samples.detach()


def check_ranks(ranks: Ranks, options: _options.Options) -> None:
    """Raises where a loss has no meaning over these groups."""
    if ranks.samples is None:
        return
    if options.batch:
        raise ValueError(
            "sample_group: expected batch=False, for a loss of each sample; the ranks of one batch are a process_group"
        )
    if options.reduction == "none":
        raise ValueError("sample_group: expected reduction='mean' or 'sum', for each rank has rows of its own")
