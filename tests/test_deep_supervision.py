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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dense", [False, True])
def test_nearest_exact_is_torchs(dense, backend):
    """For many ratios, up and down; of an image that is right by majority the corner says little."""
    for fine, coarse in (((12, 9), (5, 4)), ((8, 8), (1, 1)), ((3, 5), (7, 40)), ((2, 64), (5, 8)), ((7, 7), (7, 7))):
        logits, _ = inputs(2, 3, coarse)
        _, target = inputs(2, 3, fine)
        weight = torch.rand(2, *fine)
        target = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float() if dense else target
        for mode in ("nearest", "nearest-exact"):
            down, w = (
                torch.nn.functional.interpolate(x.float(), coarse, mode=mode)
                for x in (target if dense else target[:, None], weight[:, None])
            )
            down = down if dense else down[:, 0].long()
            expected = loss_and_gradient(tk.reference.tversky_loss, logits, down, voxel_weight=w)
            found = loss_and_gradient(
                lambda z, t, **o: tk.deep_supervision_loss([z], t, **o),
                logits, target, voxel_weight=weight, resample=mode, backend=backend,
            )  # fmt: skip
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_a_coarse_output_that_is_right_by_majority():
    """Blocks of 8 x 8 voxels of one label, but for their corners."""
    label = torch.randint(0, 2, (1, 6, 6))
    fine = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    fine[:, ::8, ::8] = 1 - fine[:, ::8, ::8]
    logits = 10.0 * torch.nn.functional.one_hot(label, 2).movedim(-1, 1)
    nearest, exact = (tk.deep_supervision_loss([logits], fine, resample=r) for r in ("nearest", "nearest-exact"))
    assert exact < 0.01
    assert nearest > 0.9


def test_resample_is_checked():
    logits, target = inputs(1, 2, (4, 4))
    with pytest.raises(ValueError, match="resample: expected one of 'nearest', 'nearest-exact', got 'linear'"):
        tk.deep_supervision_loss([logits], target, resample="linear")


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 0.5]), torch.tensor([1, 2]), (1.0, 0.5)])
def test_weights_of_any_kind(weights):
    levels, target = [inputs(1, 3, (8, 8))[0], inputs(1, 3, (4, 4))[0]], inputs(1, 3, (8, 8))[1]
    numbers = [float(w) for w in weights]
    expected = tk.deep_supervision_loss(levels, target, numbers)
    assert torch.equal(tk.deep_supervision_loss(levels, target, weights), expected)
    assert torch.equal(tk.DeepSupervisionLoss(weights=weights)(levels, target), expected)


def test_weights_that_are_wrong():
    levels, target = [inputs(1, 3, (8, 8))[0]], inputs(1, 3, (8, 8))[1]
    for weights, error in ((torch.tensor(1.0), TypeError), ("1", TypeError), (torch.ones(2), ValueError)):
        with pytest.raises(error, match="weights: expected 1 numbers"):
            tk.deep_supervision_loss(levels, target, weights)
    with pytest.raises(ValueError, match="weights: expected constants"):
        tk.deep_supervision_loss(levels, target, torch.ones(1, requires_grad=True))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, 0.0]])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, ()),
        ({"reduction": "none"}, (2, 3)),
        ({"reduction": "none", "include_background": False}, (2, 2)),
        ({"reduction": "none", "batch": True}, (3,)),
    ],
)
def test_levels_of_weight_0(options, shape, weights):
    """Nothing of them is read, and their gradient is 0."""
    levels, target = [inputs(2, 3, (8, 8))[0], torch.full((2, 3, 4, 4), torch.nan)], inputs(2, 3, (8, 8))[1]
    levels = [level.requires_grad_() for level in levels]
    loss = tk.deep_supervision_loss(levels, target, weights, **options)
    assert loss.shape == shape
    assert torch.isfinite(loss).all()
    gradients = torch.autograd.grad(loss.sum(), levels)
    assert torch.equal(gradients[1], torch.zeros_like(levels[1]))
    assert gradients[0].ne(0).any() == (weights[0] > 0)
