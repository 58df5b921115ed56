"""Losses of a whole volume and of each of its lesions, from one count pass and one gradient pass."""

from __future__ import annotations

from typing import Any

import torch

from . import _arguments, _options, functional, reference
from .distributed import Ranks, ranks_of
from .functional import Group, PerClass, Scalar

__all__ = ["blob_loss", "cc_loss"]


def blob_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    regions: torch.Tensor,
    num_regions: int | None = None,
    global_weight: float = 2.0,
    blob_weight: float = 1.0,
    ce_weight: float = 0.0,
    alpha: PerClass = 0.5,
    beta: PerClass = 0.5,
    gamma: Scalar = 1.0,
    smooth_nr: Scalar = 1e-5,
    smooth_dr: Scalar = 1e-5,
    activation: str = "softmax",
    include_background: bool = False,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    process_group: Group = None,
    grad_reduction: str = "mean",
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Blob loss (Kofler et al. 2023, arXiv:2205.08209): a loss of the whole, and the mean of those of each lesion.

    ``global_weight * tversky_loss(all voxels) + blob_weight * mean of tversky_loss(voxels of a lesion and of the
    background)``: the other lesions are masked out. Their false positives are the background's, which region 0 has.
    The mean is over a sample's lesions, then over the samples that have any. (The authors' code masks logits before the
    sigmoid, which makes them 0.5; here, as in their paper, masked voxels do not count.)

    Args:
        logits: See `tversky_loss`, as for all that is not named here.
        target: Class indices or a dense target.
        regions: The lesions: `tversky_kernels.regions.components`, 0 for the background; with ``per_class=True`` the
            background of a class is what it is not.
        num_regions: The number of regions, the background's among them.
        global_weight: Factor of the loss of all voxels, >= 0. The paper's best is 2.
        blob_weight: Factor of the lesions' loss, >= 0.
        ce_weight: Factor of a cross-entropy of all voxels, >= 0.
        alpha: Weight of the false positives. 0.5 and 0.5 are Dice, as in the paper.
        beta: Weight of the false negatives.
        include_background: True takes channel 0 into both parts.

    Returns:
        The loss: float32, or float64 for float64 logits.

    Examples:
        >>> regions, num_regions = tk.regions.components(label, batch=True)
        >>> loss = tk.blob_loss(logits, label, regions=regions, num_regions=num_regions)
    """
    options: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "smooth_nr": smooth_nr,
        "smooth_dr": smooth_dr,
    }
    options |= {"activation": activation, "include_background": include_background, "ignore_index": ignore_index}
    options |= {"regions": regions, "num_regions": num_regions, "ce_weight": ce_weight, "check_target": check_target}
    ranks = ranks_of(process_group, None, grad_reduction)
    rows, checked = _rows(logits, target, voxel_weight, options, inplace_backward, ranks, backend)
    ce = _cross_entropy(rows, checked)
    part = _options.number("blob_weight", blob_weight)
    whole, _, _ = _losses(rows.sum(1), checked, logits.dtype)
    # A lesion's row has all its voxels but those of the background, in which only false positives count.
    background = torch.zeros_like(rows[..., :3])
    background[:, :, :, 1] = 1.0
    of_lesions = rows[..., :3] + background * rows[:, :1, :, :3]
    loss, is_absent, kept = _losses(of_lesions[:, 1:], checked, logits.dtype)
    lesions = _mean_of_samples(loss, ~is_absent & kept) if rows.size(1) > 1 else rows.new_zeros(())
    total = (
        _options.number("global_weight", global_weight)
        * _mean_of_samples(whole, torch.ones_like(whole, dtype=torch.bool))
        + part * lesions
        + ce
    )
    return total.to(_arguments.compute_dtype(logits))


def cc_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    regions: torch.Tensor,
    num_regions: int | None = None,
    global_weight: float = 1.0,
    region_weight: float = 1.0,
    ce_weight: float = 0.0,
    alpha: PerClass = 0.5,
    beta: PerClass = 0.5,
    gamma: Scalar = 1.0,
    smooth_nr: Scalar = 1e-5,
    smooth_dr: Scalar = 1e-5,
    activation: str = "softmax",
    include_background: bool = False,
    ignore_index: int | None = None,
    voxel_weight: torch.Tensor | None = None,
    process_group: Group = None,
    grad_reduction: str = "mean",
    inplace_backward: bool = False,
    check_target: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """A loss of the whole, and the mean of those of the space around each lesion (Kundu et al. 2026, arXiv:2604.24276).

    ``global_weight * tversky_loss(all voxels) + region_weight * tversky_loss(..., regions=regions)``, the second for
    `tversky_kernels.regions.voronoi`: each region has one lesion and all voxels that are nearest to it, so that false
    positives count against the lesion near which they are. With ``per_class=True`` each class has its own partition.

    Args:
        logits: See `tversky_loss`, as for all that is not named here.
        target: Class indices or a dense target.
        regions: `tversky_kernels.regions.voronoi`.
        num_regions: The number of regions.
        global_weight: Factor of the loss of all voxels, >= 0.
        region_weight: Factor of the regions' loss, >= 0.
        ce_weight: Factor of a cross-entropy of all voxels, >= 0.
        alpha: Weight of the false positives.
        beta: Weight of the false negatives.
        include_background: True takes channel 0 into both parts.

    Returns:
        The loss: float32, or float64 for float64 logits.

    Examples:
        >>> regions, num_regions = tk.regions.voronoi(label, batch=True)
        >>> loss = tk.cc_loss(logits, label, regions=regions, num_regions=num_regions)
    """
    options: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "smooth_nr": smooth_nr,
        "smooth_dr": smooth_dr,
    }
    options |= {"activation": activation, "include_background": include_background, "ignore_index": ignore_index}
    options |= {"regions": regions, "num_regions": num_regions, "ce_weight": ce_weight, "check_target": check_target}
    ranks = ranks_of(process_group, None, grad_reduction)
    rows, checked = _rows(logits, target, voxel_weight, options, inplace_backward, ranks, backend)
    ce = _cross_entropy(rows, checked)
    part = _options.number("region_weight", region_weight)
    whole, _, _ = _losses(rows.sum(1), checked, logits.dtype)
    loss, _, kept = _losses(rows, checked, logits.dtype)
    total = _options.number("global_weight", global_weight) * _mean_of_samples(
        whole, torch.ones_like(whole, dtype=torch.bool)
    )
    total = total + part * _mean_of_samples(loss, kept) + ce
    return total.to(_arguments.compute_dtype(logits))


def _rows(logits, target, voxel_weight, options: dict, inplace_backward, ranks: Ranks | None, backend):
    # The counts (N, R, C, 4 or 7) in float64, and the arguments, checked.
    if options["regions"] is None:
        raise ValueError("regions: expected the region of each voxel, for example tk.regions.components(label)")
    checked = _arguments.check_arguments(logits, target, voxel_weight, **options)
    how = (options["check_target"], inplace_backward, ranks, backend)
    return functional.rows_of_checked(logits, checked, *how), checked


def _cross_entropy(rows: torch.Tensor, checked) -> torch.Tensor:
    # The weighted mean over all voxels.
    if not _options.is_used(checked.plan.options.ce_weight):
        return rows.new_zeros(())
    counts = reference.Counts(*rows.sum(1)[..., :-1].unbind(-1))
    terms = reference.terms_of_counts(counts, checked.options, None, checked.volumes.dense)
    return reference.reduced_cross_entropy(terms, checked.options._replace(reduction="mean"))


def _losses(rows: torch.Tensor, checked, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # (..., C') each: the loss, whether the target lacks the class, and whether any voxel of the row counts.
    flat = rows.flatten(0, -3)
    loss, is_absent = reference.row_losses(
        reference.Counts(*flat[..., :3].unbind(-1)),
        checked.options,
        checked.class_parameters,
        reference.flat_below(dtype),
    )
    shape = (*rows.shape[:-2], loss.size(-1))
    some = ~(rows[..., -1] <= 0) if rows.size(-1) > 3 else torch.ones_like(rows[..., 0], dtype=torch.bool)
    return loss.view(shape), is_absent.view(shape), some[..., -loss.size(-1) :]


def _mean_of_samples(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    # Over what counts in each sample, then over the samples where anything does.
    total, number = torch.where(counted, values, 0.0).flatten(1).sum(1), counted.flatten(1).sum(1)
    return (total / number.clamp(min=1)).sum() / (number > 0).sum().clamp(min=1)
