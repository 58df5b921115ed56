"""The passes of a loss whose logits are a 1x1x1 convolution, weight @ features + bias, and exist a block at a time.

A block's logits are made, and the backend's own pass is run over them; the gradient pass writes over them, and what
they stand for is carried on to features, weight and bias. So no tensor of the logits' size is ever there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ._layout import is_dense
from ._options import PassOptions

#: Of one block's features and logits: what the caches hold; on a card, where every block costs launches, what is little
#: beside the volume.
BLOCK_BYTES = {"cpu": 2**22, "cuda": 2**26}
ROUND = 1024


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    # Blocks are of float32 where the volumes are of half precision: it costs no memory, and nothing is rounded twice.
    return torch.promote_types(dtype, torch.float32)


def _block_voxels(features: torch.Tensor, classes: int) -> int:
    voxel_bytes = (features.size(1) + classes) * _compute_dtype(features.dtype).itemsize
    fitting = BLOCK_BYTES.get(features.device.type, BLOCK_BYTES["cuda"]) // voxel_bytes
    return max(ROUND, fitting // ROUND * ROUND)


def _of_voxels(x: torch.Tensor | None, first: int) -> torch.Tensor | None:
    # With one dimension for all voxels, the last.
    return x if x is None else x.flatten(first) if x.dim() > first else x.unsqueeze(first)


def _flat(features, target, voxel_weight):
    target = _of_voxels(target, 2 if target.dim() == features.dim() else 1)
    return _of_voxels(features, 2), target, _of_voxels(voxel_weight, 1)


class _Block:
    """Some voxels of one sample: where they are, their features (K, V) and their logits (1, C, V)."""

    def __init__(self, sample: int, first: int, last: int, features: torch.Tensor, logits: torch.Tensor):
        self.sample, self.first, self.last = sample, first, last
        self.features, self.logits = features, logits

    def of(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """These voxels of a tensor (N, ..., voxels), one sample of it."""
        return x if x is None else x[self.sample : self.sample + 1, ..., self.first : self.last]

    def row(self, x: torch.Tensor) -> torch.Tensor:
        """This sample's row, or that of the whole batch where it has no other."""
        return x if x.size(0) == 1 else x[self.sample : self.sample + 1]


def _blocks(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Iterator[_Block]:
    # All blocks share the same memory. weight and bias have the type of the computation.
    (samples, channels, voxels), classes = features.shape, weight.size(0)
    step = min(_block_voxels(features, classes), voxels)
    memory = weight.new_empty(classes * step)
    converted = None if features.dtype == weight.dtype else weight.new_empty(channels * step)
    for sample in range(samples):
        for first in range(0, voxels, max(1, step)):
            last = min(voxels, first + step)
            x = features[sample, :, first:last]
            if converted is not None:
                x = converted[: x.numel()].view(x.shape).copy_(x)
            logits = memory[: classes * (last - first)].view(classes, -1)
            if bias is None:
                torch.mm(weight, x, out=logits)
            else:
                torch.addmm(bias.unsqueeze(1), weight, x, out=logits)
            yield _Block(sample, first, last, x, logits.unsqueeze(0))


def _check(features, weight, bias, target, voxel_weight, regions) -> None:
    # Python's functions have checked their arguments in words; this is for direct calls of the operators.
    given = {"features": features, "weight": weight, "bias": bias, "target": target, "voxel_weight": voxel_weight}
    given["regions"] = regions
    for name, x in given.items():
        if x is not None and (x.layout is not torch.strided or x.is_nested or x.device != features.device):
            raise ValueError(f"{name}: expected a dense tensor on the features' device, got {x.layout} on {x.device}")
    if features.dim() < 2 or features.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"features: expected (N, K, *spatial), floating, got {tuple(features.shape)} {features.dtype}")
    (samples, channels), spatial = features.shape[:2], features.shape[2:]
    if weight.dim() != 2 or weight.size(0) == 0 or weight.size(1) != channels or weight.dtype != features.dtype:
        raise ValueError(f"weight: expected (C, {channels}) {features.dtype}, got {tuple(weight.shape)} {weight.dtype}")
    classes = weight.size(0)
    if bias is not None and (bias.shape != (classes,) or bias.dtype != features.dtype):
        raise ValueError(f"bias: expected ({classes},) {features.dtype}, got {tuple(bias.shape)} {bias.dtype}")
    if target.shape not in ((samples, *spatial), (samples, classes, *spatial)):
        raise ValueError(f"target: expected the features' samples and voxels, got {tuple(target.shape)}")
    if voxel_weight is not None and voxel_weight.shape != (samples, *spatial):
        raise ValueError(f"voxel_weight: expected ({samples}, *spatial), got {tuple(voxel_weight.shape)}")
    if regions is not None and regions.shape not in ((samples, 1, *spatial), (samples, classes, *spatial)):
        raise ValueError(f"regions: expected ({samples}, 1 or {classes}, *spatial), got {tuple(regions.shape)}")


def _check_gradient(features, weight, grad_loss, coefficients, out, cross_entropy, regional: bool) -> None:
    if out is features and not is_dense(features):
        raise ValueError("features: in place, each must have a place of its own, with nothing in between")
    samples, classes = features.size(0), weight.size(0)
    if regional:
        expected = (samples, coefficients.size(1) if coefficients.dim() > 1 else 0, classes, 4 if cross_entropy else 2)
        if coefficients.shape != expected or coefficients.dtype != torch.float64:
            raise ValueError(f"coefficients: expected {expected} of float64, got {tuple(coefficients.shape)}")
        if coefficients.device != features.device:
            raise ValueError("coefficients: expected them on the features' device")
        return
    rows, columns = coefficients.size(0) if coefficients.dim() else 0, 4 if cross_entropy else 2
    if (
        coefficients.shape != (rows, classes, columns)
        or rows not in (1, samples)
        or coefficients.dtype != torch.float64
    ):
        raise ValueError(
            f"coefficients: expected ({samples} or 1, {classes}, {columns}) of float64, got "
            f"{tuple(coefficients.shape)} {coefficients.dtype}"
        )
    kept = (classes, classes - 1)
    shape = tuple(grad_loss.shape)
    if shape and not (shape[-1] in kept and shape[:-1] in ((rows,), () if rows == 1 else (rows,))):
        raise ValueError(f"grad_loss: its shape {shape} does not fit the coefficients {tuple(coefficients.shape)}")
    if grad_loss.device != features.device or coefficients.device != features.device:
        raise ValueError("grad_loss, coefficients: expected them on the features' device")


def count_pass(
    operators, features, weight, bias, target, voxel_weight, *arguments, regions=None, num_regions: int = 0
) -> torch.Tensor:
    """The counts (N, C, 3 or 6), by the operator count_pass on one block after the other.

    With regions (N, R, C, 4 or 7), by region_count_pass.
    """
    _check(features, weight, bias, target, voxel_weight, regions)
    features, target, voxel_weight = _flat(features, target, voxel_weight)
    *of_pass, _mode = arguments
    columns = 6 if PassOptions(*of_pass).cross_entropy else 3
    shape: tuple[int, ...] = (features.size(0), weight.size(0), columns)
    if regions is not None:
        regions, shape = _of_voxels(regions, 2), (features.size(0), num_regions, weight.size(0), columns + 1)
    counts = features.new_zeros(shape, dtype=torch.float64)
    for block in _blocks(features, *_head(weight, bias)):
        volumes = (block.logits, block.of(target), block.of(voxel_weight))
        if regions is None:
            found = operators.count_pass(*volumes, *arguments)
        else:
            found = operators.region_count_pass(*volumes, block.of(regions), None, num_regions, *arguments)
        counts[block.sample] += found[0]
    return counts


def _head(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = _compute_dtype(weight.dtype)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def gradient_pass(
    operators, out, grad_loss, coefficients, features, weight, bias, target, voxel_weight, *arguments, regions=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the gradient of the features to ``out`` (or not, where it is None) and returns those of weight and bias.

    ``out`` may be the features themselves. Gradients of the head are summed over the blocks in float64. With regions
    the coefficients have the upstream gradient in them.
    """
    _check(features, weight, bias, target, voxel_weight, regions)
    cross_entropy = PassOptions(*arguments).cross_entropy
    _check_gradient(features, weight, grad_loss, coefficients, out, cross_entropy, regions is not None)
    features, target, voxel_weight = _flat(features, target, voxel_weight)
    regions = _of_voxels(regions, 2)
    out, dtype = _of_voxels(out, 2), weight.dtype
    weight, bias = _head(weight, bias)
    grad_weight = torch.zeros_like(weight, dtype=torch.float64)
    grad_bias = grad_weight.new_zeros(weight.size(0))
    of_block = torch.empty_like(weight)
    for block in _blocks(features, weight, bias):
        volumes: tuple = block.of(target), block.of(voxel_weight)
        if regions is None:
            upstream = block.row(grad_loss) if grad_loss.dim() == 2 else grad_loss
            operators.gradient_pass_(block.logits, upstream, block.row(coefficients), *volumes, *arguments)
        else:
            volumes = (*volumes, block.of(regions), None)
            operators.region_gradient_pass_(block.logits, block.row(coefficients), *volumes, *arguments)
        gradient = block.logits[0]
        grad_weight += torch.mm(gradient, block.features.t(), out=of_block)
        grad_bias += gradient.sum(1)
        if out is None:
            continue
        # Last: `there` may be the features' own memory. The block's converted features are not used after this.
        (there,) = block.of(out)  # type: ignore[misc] # out is there
        if there.dtype == weight.dtype:
            torch.mm(weight.t(), gradient, out=there)
        else:
            there.copy_(torch.mm(weight.t(), gradient, out=block.features))
    return grad_weight.to(dtype), grad_bias.to(dtype)
