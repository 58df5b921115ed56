"""Losses over several resolutions against targets that torch's own interpolation resamples."""

from __future__ import annotations

import pytest
import torch
from common import inputs, loss_and_gradient

import tversky_kernels as tk

SIZES = [(16, 12, 10), (8, 6, 5), (4, 3, 3), (3, 5, 1)]  # halves, odd ratios, and one that is finer nowhere


def levels(classes, dtype=torch.float32):
    logits = [inputs(2, classes, size, dtype, seed=i)[0].requires_grad_() for i, size in enumerate(SIZES)]
    return logits, inputs(2, classes, SIZES[0])[1]


def resampled(x, size):
    return torch.nn.functional.interpolate(x[:, None].double(), size=size, mode="nearest")[:, 0].to(x.dtype)


@pytest.mark.parametrize("loss", ["tversky", "tversky_ce"])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int64])
def test_is_the_sum_over_resampled_targets(loss, classes, target_dtype):
    function = tk.tversky_ce_loss if loss == "tversky_ce" else tk.tversky_loss
    logits, target = levels(classes)
    weight, target = torch.rand(target.shape), target.to(target_dtype)
    weights = [1.0, 0.5, 0.25, 2.0]
    total = tk.deep_supervision_loss(logits, target, weights, loss=loss, voxel_weight=weight, batch=True)
    gradients = torch.autograd.grad(total, logits)
    expected = 0.0
    for z, w, size, gradient in zip(logits, weights, SIZES, gradients, strict=True):
        each, true = loss_and_gradient(
            lambda x, t, **o: w * function(x, t, **o),  # noqa: B023
            z, resampled(target, size), voxel_weight=resampled(weight, size), batch=True,
        )  # fmt: skip
        expected = expected + each
        assert torch.equal(gradient, true)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_dense_targets(soft):
    logits, target = levels(3)
    dense = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).to(torch.uint8)
    if soft:
        dense = torch.rand(dense.shape)
    total = tk.deep_supervision_loss(logits, dense, [1.0] * 4, soft_label=soft)
    expected = sum(
        tk.tversky_loss(z, torch.nn.functional.interpolate(dense.float(), size=s), soft_label=soft)
        for z, s in zip(logits, SIZES, strict=True)
    )
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", range(1, 40))
def test_any_ratio_takes_the_voxels_that_interpolation_takes(size):
    target = torch.arange(29) % 7
    for spatial in ((size,), (3, size), (2, 1, size)):
        full = target.expand(1, *(5,) * (len(spatial) - 1), 29)
        logits = torch.randn(1, 7, *spatial)
        loss = tk.deep_supervision_loss([logits], full, reduction="none")
        assert torch.equal(loss, tk.tversky_loss(logits, resampled(full, spatial), reduction="none"))
        expected = tk.deep_supervision_loss([logits], full, reduction="none", backend="reference")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


def test_default_weights():
    logits, target = levels(3)
    each = [tk.deep_supervision_loss([z], target) for z in logits]
    total = tk.deep_supervision_loss(logits, target)
    torch.testing.assert_close(total, sum(x * w for x, w in zip(each, (8, 4, 2, 1), strict=True)) / 15)
    # A level of weight 0 is not computed: its labels are not even read.
    target[0, 1, 1, 1] = 99
    nothing = tk.deep_supervision_loss(logits[:1], target, [0.0])
    assert nothing == 0
    assert torch.autograd.grad(nothing, logits[0])[0].abs().max() == 0


def test_module_compile_and_second_derivative():
    logits, target = levels(3, torch.float64)
    criterion = tk.DeepSupervisionLoss(weights=[0.5, 0.3, 0.2, 0.0], loss="tversky_ce", label_smoothing=0.1)
    total = criterion(logits, target)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(criterion, fullgraph=True)(logits, target), total)
    small = [inputs(1, 2, s, torch.float64)[0].requires_grad_() for s in ((2, 3), (1, 2))]
    label = torch.randint(0, 2, (1, 2, 3))
    assert torch.autograd.gradgradcheck(lambda *z: tk.deep_supervision_loss(z, label), small)


def test_bad_input():
    logits, target = levels(3)
    loss = tk.deep_supervision_loss
    with pytest.raises(TypeError, match="logits: expected a list of tensors, one a level, got Tensor"):
        loss(logits[0], target)
    with pytest.raises(ValueError, match="logits: expected at least one level, got none"):
        loss([], target)
    with pytest.raises(ValueError, match="weights: expected 4 numbers, one a level, got 2"):
        loss(logits, target, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"weights\[1\]: expected a finite number >= 0, got -1"):
        loss(logits, target, [1.0, -1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="loss: expected one of 'tversky', 'tversky_ce', got 'dice'"):
        loss(logits, target, loss="dice")
    with pytest.raises(TypeError, match="loss='tversky': unexpected argument 'ce_weight'"):
        loss(logits, target, ce_weight=1.0)
    with pytest.raises(
        ValueError, match=r"target: for logits \(2, 3, 16, 12, 10\) expected class indices \(2, \*any\)"
    ):
        loss(logits, target[:1])
    with pytest.raises(ValueError, match="target: for logits"):
        loss(logits, target[..., 0])
    with pytest.raises(ValueError, match="voxel_weight: expected the target's spatial sizes"):
        loss(logits, target, voxel_weight=torch.ones(2, 3, 3, 3))
    with pytest.raises(ValueError, match="logits: expected 1 to 3 spatial dimensions"):
        loss([torch.randn(2, 3)], target)
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 5"):
        loss(logits, target + 3)
    # The plain losses do not resample.
    with pytest.raises(ValueError, match="target: for logits"):
        tk.tversky_loss(logits[1], target)
