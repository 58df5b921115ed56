"""Losses of a whole volume and of each of its lesions, from one count pass and one gradient pass."""

from __future__ import annotations

from typing import Any

import torch

from . import _arguments, _joint, _options, functional, reference
from .distributed import ranks_of
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
    how = locals()
    rows, checked, ce = _rows(how)
    part = _options.number("blob_weight", blob_weight)
    whole, _, _ = _losses(rows.sum(1), checked, logits.dtype)
    # A lesion's row has all its voxels but those of the background, in which only false positives count.
    background = torch.zeros_like(rows[..., :3])
    background[:, :, :, 1] = 1.0
    of_lesions = rows[..., :3] + background * rows[:, :1, :, :3]
    loss, is_absent, kept = _losses(of_lesions[:, 1:], checked, logits.dtype)
    lesions = _mean_of_samples(loss, ~is_absent & kept) if rows.size(1) > 1 else rows.new_zeros(())
    total = _options.number("global_weight", global_weight) * whole.mean() + part * lesions + ce
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
    how = locals()
    rows, checked, ce = _rows(how)
    part = _options.number("region_weight", region_weight)
    whole, _, _ = _losses(rows.sum(1), checked, logits.dtype)
    loss, _, kept = _losses(rows, checked, logits.dtype)
    total = _options.number("global_weight", global_weight) * whole.mean()
    total = total + part * _mean_of_samples(loss, kept) + ce
    return total.to(_arguments.compute_dtype(logits))


_LOSS = ("alpha", "beta", "gamma", "smooth_nr", "smooth_dr", "activation", "include_background", "ignore_index")


def _rows(how: dict[str, Any]) -> tuple[torch.Tensor, _arguments.Checked, torch.Tensor]:
    # The counts (N, R, C, 4 or 7) in float64, and the weighted cross-entropy.
    logits, target = how["logits"], how["target"]
    if how["regions"] is None:
        raise ValueError("regions: expected the region of each voxel, for example tk.regions.components(label)")
    options = {name: how[name] for name in (*_LOSS, "ce_weight", "regions", "num_regions")}
    check_target, inplace_backward, backend = how["check_target"], how["inplace_backward"], how["backend"]
    checked = _arguments.check_arguments(logits, target, how["voxel_weight"], check_target=check_target, **options)
    ranks = ranks_of(how["process_group"], None, how["grad_reduction"])
    if ranks is not None:
        part = functional.part_of(logits, checked, ranks, check_target, inplace_backward, backend)
        rows = _joint.counts(part, ranks, check_target)
    else:
        rows = functional.counts_of(logits, checked, check_target, inplace_backward, backend)
    whole = rows.sum(1)[..., :-1]
    ce = rows.new_zeros(())
    if _options.is_used(checked.plan.options.ce_weight):
        terms = reference.terms_of_counts(
            reference.Counts(*whole.unbind(-1)), checked.options, None, checked.volumes.dense
        )
        ce = reference.reduced_cross_entropy(terms, checked.options._replace(reduction="mean"))
    return rows, checked, ce


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
