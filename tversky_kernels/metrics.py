"""Hard counts, and the metrics that are made of them: what a validation step reports.

`hard_counts` compares the predicted class of every voxel with its label, a block of voxels at a time: no arg-max and no
one-hot tensor of the volume's size is made. Tables of patches, of a sliding window's parts or of patients add up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _arguments, _options, distributed
from .functional import Group

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
    process_group: Group = None,
    check_target: bool | None = None,
) -> HardCounts:
    """True and false positives and negatives of the predicted classes. No gradient.

    Args:
        logits: (N, C, *spatial), as in `tversky_kernels.tversky_loss`.
        target: Class indices (N, *spatial) or (N, 1, *spatial); or a dense target (N, C, *spatial) of 0 and 1.
        activation: "softmax": the predicted class is the one with the largest logit, the lowest index of equals.
            "sigmoid" and "none": each channel by itself, predicted where its probability is >= threshold.
        threshold: In (0, 1]. Not read with "softmax".
        ignore_index: Voxels with this label do not count.
        voxel_weight: (N, *spatial) or (N, 1, *spatial), >= 0: each voxel counts so much.
        process_group: A group whose ranks hold parts of the same samples; True: the default group. Every rank gets the
            counts of the whole.
        check_target: None: a label out of range, or a dense value that is neither 0 nor 1, raises on the CPU.
            Elsewhere reading it would wait for the device: such a label counts nowhere, and a dense value is 1 from 0.5
            on. True: always raise. False: never raise.

    Returns:
        HardCounts(tp, fp, fn, tn), (N, C) each, exact: int64, or float64 with a voxel_weight.

    Examples:
        >>> counts = tk.hard_counts(logits, label)
        >>> tk.metrics.dice(counts)[:, 1:].nanmean()
    """
    threshold = _options.number("threshold", threshold, positive=True, most=1.0)
    options = {"activation": activation, "ignore_index": ignore_index}
    checked = _arguments.check_arguments(logits, target, voxel_weight, check_target=check_target, **options)
    ranks = distributed.ranks_of(process_group, None, "sum")
    raises = check_target is True or (check_target is None and logits.device.type == "cpu")
    target, weight, dense = checked.volumes
    samples, classes = logits.shape[:2]
    z = logits.detach().reshape(samples, classes, -1)
    labels = target.reshape(samples, classes, -1) if dense else target.reshape(samples, -1)
    weights = None if weight is None else weight.reshape(samples, -1)
    table = torch.zeros(3, samples, classes, dtype=torch.int64 if weight is None else torch.float64, device=z.device)
    total = table.new_zeros(samples, 1)
    first_label = 1 if classes == 1 and activation != "softmax" else 0
    step = max(1, BLOCK // classes)
    for n in range(samples):
        for at in range(0, z.size(2), step):
            part = slice(at, at + step)
            block, g = z[n, :, part], labels[n, ..., part]
            w = None if weights is None else weights[n, part].double()
            if raises:
                _raise_for_bad_values(logits, g, w, checked.options.ignore_index, dense)
            counted = _counted(g, checked.options.ignore_index, dense, classes + first_label)
            total[n] += _sum(counted.unsqueeze(0), w)[0]
            # max gives the first of equals, as argmax does, and is up to sixteen times as fast on the CPU.
            if activation == "softmax" and not dense:
                table[:, n] += _of_labels(block.max(0).indices, g, counted, w, classes)
                continue
            if activation == "softmax":
                predicted = torch.nn.functional.one_hot(block.max(0).indices, classes).T.bool()
            else:
                p = block.float() if block.dtype in (torch.float16, torch.bfloat16) else block
                predicted = (p.sigmoid() if activation == "sigmoid" else p) >= threshold
            channels = torch.arange(first_label, first_label + classes, device=z.device).unsqueeze(1)
            true = g >= 0.5 if dense else g.unsqueeze(0) == channels
            true, predicted = true & counted, predicted & counted
            table[:, n] += torch.stack([_sum(x, w) for x in (true & predicted, predicted, true)])
    if ranks is not None and ranks.parts is not None:
        distributed.agree_on_sizes(ranks.parts, [(samples, classes, 4)], z.device, "process_group")
        for x in (table, total):
            torch.distributed.all_reduce(x, group=ranks.parts)
    tp, positive, true = table.unbind()
    return HardCounts(tp, positive - tp, true - tp, total - positive - true + tp)


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
        table = table if weight is not None else table.round().long()
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
