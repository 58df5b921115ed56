"""The passes as torch's own operators, a block of voxels at a time: for any device, without compiled kernels.

The arithmetic is the reference's. Its temporary tensors are a block's here, so that a loss takes one gradient's memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import _arguments, _options, reference
from ._ops import LINEAR_OPERATORS, OPERATORS, Operators, linear_passes
from ._options import ACTIVATIONS, CHECKS, OVERLAPS, PassOptions

#: Of one block's logits. The reference makes some ten tensors of that size.
BLOCK_BYTES = {"cpu": 2**20}
BLOCK_BYTES_ELSEWHERE = 2**25
ROUND = 1024

_ACTIVATION_NAMES = {number: name for name, number in ACTIVATIONS.items()}
_OVERLAP_NAMES = {number: name for name, number in OVERLAPS.items()}


def _options_of(of: PassOptions) -> _options.Options:
    # The passes do not read the other options, so these have any value.
    form = _OVERLAP_NAMES[of.overlap]
    return _options.Options(
        alpha=0.5, beta=0.5, gamma=1.0, smooth_nr=0.0, smooth_dr=0.0, activation=_ACTIVATION_NAMES[of.activation],
        include_background=True, ignore_index=of.ignore_index, batch=False, absent="keep",
        soft_label=form == "absolute", squared=form == "squared", reduction="none",
        ce_weight=float(of.cross_entropy > 0), label_smoothing=float(of.cross_entropy > 1), focal_gamma=of.focal_gamma,
        resample="nearest-exact" if of.nearest_exact else "nearest",
    )  # fmt: skip


def _flat(logits, target, voxel_weight, options: _options.Options, ids=None):
    # With one dimension for all voxels, the last, and the target and regions at the logits' voxels.
    dense = target.dim() == logits.dim()
    first, spatial = 2 if dense else 1, logits.shape[2:]
    if target.shape[first:] != spatial:
        target = reference.nearest_voxels(target, first, spatial, options.resample)
        voxel_weight = (
            None if voxel_weight is None else reference.nearest_voxels(voxel_weight, 1, spatial, options.resample)
        )

    def flat(x, at):
        return x if x is None else x.flatten(at) if x.dim() > at else x.unsqueeze(at)

    ids = None if ids is None else reference.nearest_voxels(ids, 2, spatial, options.resample)
    return flat(logits, 2), flat(target, first), flat(voxel_weight, 1), dense, flat(ids, 2)


def _blocks(logits: torch.Tensor) -> Iterator[tuple[int, slice]]:
    samples, classes, voxels = logits.shape
    fitting = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES_ELSEWHERE) // (classes * 4)
    step = max(ROUND, fitting // ROUND * ROUND)
    for sample in range(samples):
        for first in range(0, voxels, step):
            yield sample, slice(first, min(voxels, first + step))


def _of(sample: int, voxels: slice, z, target, voxel_weight, dense: bool):
    rows = slice(sample, sample + 1)
    weight = None if voxel_weight is None else voxel_weight[rows, voxels]
    return z[rows, :, voxels], _arguments.Volumes(target[rows, ..., voxels], weight, dense)


@torch.no_grad()
def count_pass(logits, target, voxel_weight, *arguments) -> torch.Tensor:
    """As the operator: (N, C, 3 or 6) in float64."""
    return _count(logits, target, voxel_weight, None, *arguments)


@torch.no_grad()
def region_count_pass(logits, target, voxel_weight, regions, _merged, num_regions, *arguments) -> torch.Tensor:
    """As the operator: (N, R, C, 4 or 7) in float64."""
    return _count(logits, target, voxel_weight, _arguments.CheckedRegions(regions, num_regions), *arguments)


def _count(logits, target, voxel_weight, regions: _arguments.CheckedRegions | None, *arguments) -> torch.Tensor:
    *of_pass, check = arguments
    options = _options_of(PassOptions(*of_pass))
    ids = None if regions is None else regions.ids
    z, target, voxel_weight, dense, ids = _flat(logits, target, voxel_weight, options, ids)
    columns = 6 if options.ce_weight else 3
    rows = () if regions is None else (regions.number,)
    shape = (logits.size(0), *rows, logits.size(1), columns + len(rows))
    counts = logits.new_zeros(shape, dtype=torch.float64)
    bad = torch.zeros((), dtype=torch.bool, device=logits.device)
    for sample, voxels in _blocks(z):
        block, volumes = _of(sample, voxels, z, target, voxel_weight, dense)
        of_block = None if regions is None else regions._replace(ids=ids[sample : sample + 1, :, voxels])
        if check == CHECKS["raise"]:
            _arguments.raise_for_bad_values(block, volumes, options.ignore_index, of_block)
        sums, is_bad = reference.sums(block, volumes, options, check != CHECKS["ignore"], of_block)
        counts[sample] += torch.stack(sums, -1)[0]
        bad |= is_bad
    return counts.masked_fill_(bad, torch.nan)


def _upstream(grad_loss, coefficients, options: _options.Options) -> torch.Tensor:
    # The gradient of the counts (rows, C, 3 or 6); the coefficients are its derivatives by p.
    rows, classes, columns = coefficients.shape
    grad_loss = grad_loss.double()
    if grad_loss.dim() == 0:
        of_row, of_class = grad_loss.expand(rows), grad_loss.expand(rows, classes)
    else:
        grad_loss = grad_loss.reshape(rows, -1)
        of_row = grad_loss.sum(1)  # of the cross-entropy, which each value of the row contains
        of_class = torch.nn.functional.pad(grad_loss, (classes - grad_loss.size(1), 0))
    background, foreground = (coefficients[..., :2] * of_class.unsqueeze(-1)).unbind(-1)
    nothing = torch.zeros_like(background)
    # dL/dp is the background's where g = 0 and the foreground's where g = 1. Squared errors have one weight for both.
    of_errors = background if options.squared else nothing
    parts = [foreground + of_errors, background, of_errors]
    if columns == 4:
        parts += [*(coefficients[..., 2:] * of_row.view(-1, 1, 1)).unbind(-1), nothing]
    return torch.stack(parts, -1)


def _write_gradient(out, upstream, logits, target, voxel_weight, regions, options: _options.Options) -> None:
    # upstream: the gradient of the counts.
    ids = None if regions is None else regions.ids
    z, target, voxel_weight, dense, ids = _flat(logits, target, voxel_weight, options, ids)
    upstream = upstream.to(_arguments.compute_dtype(logits))
    for sample, voxels in _blocks(z):
        block, volumes = _of(sample, voxels, z, target, voxel_weight, dense)
        of_block = None if regions is None else regions._replace(ids=ids[sample : sample + 1, :, voxels])
        with torch.enable_grad():
            block = block.detach().requires_grad_()
            sums, _ = reference.sums(block, volumes, options, False, of_block)
            row = upstream[sample if upstream.size(0) > 1 else 0]
            (gradient,) = torch.autograd.grad(torch.stack(sums, -1)[0], block, row)
        out[sample, :, voxels] = gradient[0]


def _write(out, grad_loss, coefficients, logits, target, voxel_weight, *arguments) -> None:
    options = _options_of(PassOptions(*arguments))
    upstream = _upstream(grad_loss, coefficients, options)
    _write_gradient(_voxels_last(out), upstream, logits, target, voxel_weight, None, options)


def _write_of_regions(out, coefficients, logits, target, voxel_weight, ids, _merged, *arguments) -> None:
    options = _options_of(PassOptions(*arguments))
    rows = coefficients.flatten(0, 1)
    upstream = _upstream(rows.new_ones(()), rows, options).unflatten(0, coefficients.shape[:2])
    upstream = torch.cat([upstream, torch.zeros_like(upstream[..., :1])], -1)
    regions = _arguments.CheckedRegions(ids, coefficients.size(1))
    _write_gradient(_voxels_last(out), upstream, logits, target, voxel_weight, regions, options)


def _voxels_last(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def gradient_pass(grad_loss, coefficients, logits, *volumes_and_arguments) -> torch.Tensor:
    """As the operator: the gradient of the logits, in a fresh tensor."""
    gradient = torch.empty_like(logits)
    _write(gradient, grad_loss, coefficients, logits, *volumes_and_arguments)
    return gradient


def gradient_pass_(logits, grad_loss, coefficients, *volumes_and_arguments) -> None:
    """As the operator: the gradient over the logits."""
    _write(logits, grad_loss, coefficients, logits, *volumes_and_arguments)


def region_gradient_pass(coefficients, logits, *volumes_and_arguments) -> torch.Tensor:
    """As the operator: the gradient of the logits, in a fresh tensor."""
    gradient = torch.empty_like(logits)
    _write_of_regions(gradient, coefficients, logits, *volumes_and_arguments)
    return gradient


def region_gradient_pass_(logits, coefficients, *volumes_and_arguments) -> None:
    """As the operator: the gradient over the logits."""
    _write_of_regions(logits, coefficients, logits, *volumes_and_arguments)


def _not_here(*_):
    raise NotImplementedError("blocks: a loss is made of the counts by torch's operators")


OPERATORS["blocks"] = Operators(
    count_pass,
    _not_here,
    _not_here,
    gradient_pass,
    gradient_pass_,
    region_count_pass,
    region_gradient_pass,
    region_gradient_pass_,
)
LINEAR_OPERATORS["blocks"] = linear_passes("blocks")
