"""Hard counts, and the metrics that are made of them: what a validation step reports.

`hard_counts` compares the predicted class of every voxel with its label: no arg-max and no one-hot tensor of the
volume's size is made. A CPU kernel counts class indices with a softmax; torch's operators count the rest, a block of
voxels at a time. Tables of patches, of a sliding window's parts or of patients add up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _arguments, _options, distributed
from ._ops import CPU_MISSING, ops
from ._transforms import active_transforms
from .functional import Group, raise_for_argument

__all__ = ["HardCounts", "dice", "f_beta", "hard_counts", "iou", "precision", "sensitivity", "specificity"]

#: Logits of a block, by which memory stays small and a block stays in a cache.
BLOCK = 1 << 19


class HardCounts(NamedTuple):
    """Voxels of each sample and class, (N, C) each: int64, or float64 where a voxel_weight was given."""

    tp: torch.Tensor
    fp: torch.Tensor
    fn: torch.Tensor
    tn: torch.Tensor


@torch.no_grad()
def hard_counts(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    activation: str = "softmax",
    threshold: float = 0.5,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    regions: torch.Tensor | None = None,
    num_regions: int | None = None,
    process_group: Group = None,
    check_target: bool | None = None,
) -> HardCounts:
    """True and false positives and negatives of the predicted classes. No gradient.

    Args:
        logits: (N, C, *spatial), as in `tversky_kernels.tversky_loss`.
        target: Class indices (N, *spatial) or (N, 1, *spatial); or a dense target (N, C, *spatial) of 0 and 1.
        activation: "softmax": the predicted class is the one with the largest logit, the lowest index of equals; NaN is
            larger than any number, as in torch.
            "sigmoid" and "none": each channel by itself, predicted where its probability is >= threshold.
        threshold: In (0, 1]. Not read with "softmax".
        ignore_index: Voxels with this label do not count.
        voxel_weight: (N, *spatial) or (N, 1, *spatial), >= 0: each voxel counts so much.
        regions: As in `tversky_kernels.tversky_loss`: the counts of each region.
        num_regions: How many there are; None: the largest plus one, on the CPU alone.
        process_group: A group whose ranks hold parts of the same samples; True: the default group. Every rank gets the
            counts of the whole. A bad label on one rank raises on all.
        check_target: None: a label out of range, or a dense value that is neither 0 nor 1, raises on the CPU.
            Elsewhere reading it would wait for the device: such a label counts nowhere, and a dense value is 1 from 0.5
            on. True: always raise. False: never raise.

    Returns:
        HardCounts(tp, fp, fn, tn), (N, C) each, or (N, R, C) with regions, exact: int64, or float64 with a
        voxel_weight.

    Examples:
        >>> counts = tk.hard_counts(logits, label)
        >>> tk.metrics.dice(counts)[:, 1:].nanmean()
    """
    threshold = _options.number("threshold", threshold, positive=True, most=1.0)
    options: dict[str, Any] = {"activation": activation, "ignore_index": ignore_index}
    options |= {"regions": regions, "num_regions": num_regions}
    checked = _arguments.check_arguments(logits, target, voxel_weight, check_target=check_target, **options)
    ranks = distributed.ranks_of(process_group, None, "sum")
    raises = check_target is True or (check_target is None and logits.device.type == "cpu")
    count = functools.partial(_sums, logits, checked, activation, threshold, raises)
    sums = count() if ranks is None or ranks.parts is None else _joined(count, ranks.parts, logits, checked, raises)
    tp, positive, true, total = (sums if checked.volumes.voxel_weight is not None else sums.long()).unbind()
    return HardCounts(tp, positive - tp, true - tp, total - positive - true + tp)


def _joined(count, group, logits: torch.Tensor, checked, raises: bool) -> torch.Tensor:
    # Of all ranks. What fails on one of them raises on all, so that none waits for another.
    samples, classes = logits.shape[:2]
    rows = () if checked.regions is None else (checked.regions.number,)
    empty = functools.partial(logits.new_zeros, (4, samples, *rows, classes), dtype=torch.float64)
    sums, error = distributed.attempt(count, empty)
    try:
        size = (math.prod((samples, *rows)), classes, 4)
        distributed.agree_on_sizes(group, [size], logits.device, "process_group")
    except ValueError as different:
        raise (error or different) from None
    options = (checked.plan.options, checked.volumes.voxel_weight is None, checked.volumes.dense, rows)
    token = distributed.token_of(*options, count.args[2:])
    joined = distributed.sum_over(group, [sums], 1.0, token, error, raises, "process_group")
    if joined.error or error:
        raise joined.error or error
    return joined.values[0]


def _sums(logits: torch.Tensor, checked, activation: str, threshold: float, raises: bool) -> torch.Tensor:
    # (4, N, C) in float64, exact up to 2^53: true positives, predicted, true and all voxels.
    target, weight, dense = checked.volumes
    ignore_index = checked.options.ignore_index
    regions = checked.regions
    if activation == "softmax" and not dense and regions is None and _takes_kernel(logits):
        try:
            counts = ops.hard_count_pass(logits, target, weight, ignore_index, raises).movedim(1, 0)
        except RuntimeError as error:
            raise_for_argument(error)
            raise
        every = counts[2:].sum(-1, keepdim=True).expand_as(counts[2:])  # each voxel that counts has one label
        return torch.cat([counts, every])
    samples, classes = logits.shape[:2]
    z = logits.reshape(samples, classes, -1)
    labels = target.reshape(samples, classes, -1) if dense else target.reshape(samples, -1)
    weights = None if weight is None else weight.reshape(samples, -1)
    rows = () if regions is None else (regions.number,)
    sums = torch.zeros(4, samples, *rows, classes, dtype=torch.float64, device=z.device)
    ids = target  # not read
    if regions is not None:
        ids = regions.ids.reshape(samples, regions.ids.size(1), -1)
        if raises and bool((ids.long() >= regions.number).any()):
            bad = ids[ids.long() >= regions.number][0].item()
            raise ValueError(f"regions: expected values below num_regions = {regions.number}, got {bad}")
    first_label = 1 if classes == 1 and activation != "softmax" else 0
    step = max(1, BLOCK // classes)
    for n in range(samples):
        for at in range(0, z.size(2), step):
            part = slice(at, at + step)
            block, g = z[n, :, part], labels[n, ..., part]
            w = None if weights is None else weights[n, part].double()
            if raises:
                _raise_for_bad_values(logits, g, w, ignore_index, dense)
            counted = _counted(g, ignore_index, dense, classes + first_label)
            total: Callable[[torch.Tensor], torch.Tensor] = functools.partial(_sum, weight=w)
            if regions is not None:
                total = functools.partial(_sum_of_regions, ids[n, :, part], regions.number, classes, w)
            sums[3, n] += total(counted)
            if activation == "softmax":
                # max gives the first of equals, as argmax does, and is up to sixteen times as fast on the CPU.
                largest = block.max(0).indices
                if not dense and regions is None:
                    sums[:3, n] += _of_labels(largest, g, counted, w, classes)
                    continue
                predicted = torch.nn.functional.one_hot(largest, classes).T.bool()
            else:
                p = block.float() if block.dtype in (torch.float16, torch.bfloat16) else block
                predicted = (p.sigmoid() if activation == "sigmoid" else p) >= threshold
            channels = torch.arange(first_label, first_label + classes, device=z.device).unsqueeze(1)
            true = g >= 0.5 if dense else g.unsqueeze(0) == channels
            true, predicted = true & counted, predicted & counted
            sums[:3, n] += torch.stack([total(x) for x in (true & predicted, predicted, true)])
    return sums


def _takes_kernel(logits: torch.Tensor) -> bool:
    return logits.is_cpu and CPU_MISSING is None and not active_transforms()


def _counted(g: torch.Tensor, ignore_index: int | None, dense: bool, labels: int) -> torch.Tensor:
    # (voxels): neither ignored nor out of range.
    ignored = _arguments.is_ignored(g, ignore_index)
    if dense:
        kept = torch.ones(g.shape[1:], dtype=torch.bool, device=g.device)
        return kept if isinstance(ignored, bool) else ~ignored.all(0)
    known = (g >= 0) & (g < labels) if g.dtype != torch.bool else torch.ones_like(g)
    return known if isinstance(ignored, bool) else known & ~ignored


def _sum(mask: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return mask.sum(-1) if weight is None else (mask * weight).sum(-1)


def _sum_of_regions(ids, number: int, classes: int, weight: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    # (R, C): ids (1 or C, voxels), mask (C, voxels) or (voxels).
    ids = ids.long()
    ids = torch.where((ids < 0) | (ids >= number), number, ids)  # the last row is dropped
    values = (mask if weight is None else mask * weight).double().expand(classes, -1)
    of_all = values.new_zeros(classes, number + 1).scatter_add_(1, ids.expand(classes, -1), values)
    return of_all[:, :number].T


def _of_labels(predicted, g, counted, weight, classes: int) -> torch.Tensor:
    # tp, predicted and true voxels of each class, from the table of labels and predictions.
    if g.is_cpu:
        pairs = torch.add(predicted, g, alpha=classes) if g.dtype != torch.bool else predicted + g.long() * classes
        if not bool(counted.all()):
            pairs, weight = pairs[counted], None if weight is None else weight[counted]
        table = torch.bincount(pairs, weight, minlength=classes * classes)
    else:
        # In an order of its own on a GPU, where bincount's is not fixed and waits for the device.
        rows = torch.nn.functional.one_hot(torch.where(counted, g.long(), classes), classes + 1)[:, :classes].double()
        columns = torch.nn.functional.one_hot(predicted, classes).double()
        table = (rows if weight is None else rows * weight.unsqueeze(1)).T @ columns
    table = table.view(classes, classes)
    return torch.stack([table.diagonal(), table.sum(0), table.sum(1)])


def _raise_for_bad_values(logits, g, weight, ignore_index: int | None, dense: bool) -> None:
    weight = None if weight is None else weight.unsqueeze(0)
    _arguments.raise_for_bad_values(logits, _arguments.Volumes(g.unsqueeze(0), weight, dense), ignore_index)
    if not dense:
        return
    soft = (g != 0) & (g != 1)
    ignored = _arguments.is_ignored(g, ignore_index)
    if not isinstance(ignored, bool):
        soft &= ~ignored.all(0)
    if bool(soft.any()):
        raise ValueError(f"target: expected 0 and 1 in a dense target, got {g[soft][0].item():g}")


def _quotient(numerator: torch.Tensor, denominator: torch.Tensor, absent: float) -> torch.Tensor:
    nothing = denominator == 0
    return torch.where(nothing, absent, numerator.double() / torch.where(nothing, 1, denominator))


def dice(counts: HardCounts, *, absent: float = float("nan")) -> torch.Tensor:
    """Dice similarity, 2 TP / (2 TP + FP + FN), the F1 score: float64, of the counts' shape.

    Args:
        counts: `hard_counts`, or sums of them.
        absent: The value of a class that is neither in the target nor predicted.
    """
    return f_beta(counts, 1.0, absent=absent)


def iou(counts: HardCounts, *, absent: float = float("nan")) -> torch.Tensor:
    """Intersection over union, TP / (TP + FP + FN), the Jaccard index; arguments as `dice`."""
    return _quotient(counts.tp, counts.tp + counts.fp + counts.fn, absent)


def sensitivity(counts: HardCounts, *, absent: float = float("nan")) -> torch.Tensor:
    """Recall, TP / (TP + FN); absent: of a class that is not in the target."""
    return _quotient(counts.tp, counts.tp + counts.fn, absent)


def specificity(counts: HardCounts, *, absent: float = float("nan")) -> torch.Tensor:
    """TN / (TN + FP); absent: of a class that every voxel is."""
    return _quotient(counts.tn, counts.tn + counts.fp, absent)


def precision(counts: HardCounts, *, absent: float = float("nan")) -> torch.Tensor:
    """TP / (TP + FP); absent: of a class that is not predicted."""
    return _quotient(counts.tp, counts.tp + counts.fp, absent)


def f_beta(counts: HardCounts, beta: float, *, absent: float = float("nan")) -> torch.Tensor:
    """(1 + beta²) TP / ((1 + beta²) TP + beta² FN + FP): recall weighs beta times as much as precision.

    beta = 1 is Dice; the paper reports beta = 2. absent: as in `dice`.
    """
    squared = _options.number("beta", beta, positive=True) ** 2
    hit = (1 + squared) * counts.tp
    return _quotient(hit, hit + squared * counts.fn + counts.fp, absent)
