"""overlap_counts, and what is built from it: every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from common import inputs, loss_and_gradient, relative

import tversky_kernels as tk

BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", [False, True])
def test_counts_are_the_sums(backend, dense):
    logits, target = inputs(2, 3, (5, 7))
    g = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).double()
    p = logits.double().softmax(1)
    weight = torch.rand(2, 5, 7)
    counts = tk.overlap_counts(logits, g if dense else target, voxel_weight=weight, backend=backend)
    w = weight.double().unsqueeze(1)
    expected = ((w * p * g), (w * p * (1 - g)), (w * (1 - p) * g))
    for x, y in zip(counts, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y.sum((2, 3)), rtol=1e-6, atol=0)
    assert counts.tp is counts[0]


@pytest.mark.parametrize("backend", [*BACKENDS, "blocks"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["index", "dense", "ignored"])
def test_cross_entropy_in_the_counts(backend, activation, form):
    logits, target = inputs(2, 3, (5, 7), torch.float64)
    g = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).double()
    dense = (g + torch.rand_like(g)) / 2
    w = torch.rand(2, 5, 7, dtype=torch.float64)
    options = {"voxel_weight": w, "activation": activation, "backend": backend, "cross_entropy": True}
    if form == "ignored":
        options["ignore_index"], w = 1, w * (target != 1)
    g = dense if form == "dense" else g
    found = tk.overlap_counts(logits, dense if form == "dense" else target, **options)
    plain = tk.overlap_counts(logits, dense if form == "dense" else target, **{**options, "cross_entropy": False})
    for x, y in zip(found[:3], plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=0)
    if activation == "softmax":
        terms = -g * logits.log_softmax(1)
    else:
        terms = torch.nn.functional.binary_cross_entropy_with_logits(logits, g, reduction="none")
    torch.testing.assert_close(found.ce, (w.unsqueeze(1) * terms).sum((2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.voxels, w.sum((1, 2)), rtol=1e-12, atol=0)
    batch = tk.overlap_counts(logits, dense if form == "dense" else target, batch=True, **options)
    torch.testing.assert_close(batch.ce, found.ce.sum(0, keepdim=True), rtol=1e-12, atol=0)
    assert batch.voxels.shape == (1,)


@pytest.mark.parametrize("backend", [*BACKENDS, "blocks"])
def test_a_loss_with_a_cross_entropy_built_from_counts_is_the_loss(backend):
    logits, target = inputs(2, 4, (6, 9), torch.float64)

    def built(z, t, **o):
        tp, fp, fn, ce, voxels = tk.overlap_counts(z, t, cross_entropy=True, **o)
        return (1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5)).mean() + ce.sum() / voxels.sum()

    found = loss_and_gradient(built, logits, target, backend=backend)
    expected = loss_and_gradient(tk.tversky_ce_loss, logits, target, backend=backend)
    for x, y in zip(found, expected, strict=True):
        assert relative(x, y) < 1e-12
    z = logits[:1, :, :2, :3].clone().requires_grad_()
    small = target[:1, :2, :3]
    assert torch.autograd.gradcheck(lambda z: tk.overlap_counts(z, small, cross_entropy=True, backend=backend).ce, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"activation": "sigmoid"}])
def test_a_loss_built_from_counts_is_the_loss(dtype, options):
    logits, target = inputs(2, 4, (6, 9), dtype)

    def built(z, t, **o):
        tp, fp, fn = tk.overlap_counts(z, t, backend="cpu", **o)
        return (1 - (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5)).mean()

    loss, gradient = loss_and_gradient(built, logits, target, **options)
    expected = loss_and_gradient(tk.tversky_loss, logits, target, **options)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert relative(gradient, expected[1]) < (1e-3 if dtype == torch.bfloat16 else 1e-6)


def test_counts_of_a_nearly_perfect_prediction_keep_their_digits():
    logits, target = inputs(1, 3, (12, 16), torch.float64, scale=0.5)
    logits = logits + 14 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
    exact = tk.overlap_counts(logits, target)
    for x, y in zip(tk.overlap_counts(logits.float(), target), exact, strict=True):
        assert ((x.double() - y).abs() / y).max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", [False, True])
def test_derivatives(backend, dense):
    logits, target = inputs(1, 3, (2, 3), torch.float64)
    if dense:
        target = torch.rand(1, 3, 2, 3, dtype=torch.float64)
    logits.requires_grad_()

    def stacked(z):
        return torch.stack(tk.overlap_counts(z, target, backend=backend), -1)

    assert torch.autograd.gradcheck(stacked, logits)
    assert torch.autograd.gradgradcheck(stacked, logits)
    assert torch.autograd.gradgradcheck(lambda z: (stacked(z) ** 3).sum(), logits)


def test_in_place():
    logits, target = inputs(2, 3, (9, 11))
    _, expected = loss_and_gradient(lambda z, t: tk.overlap_counts(z, t).tp.square().sum(), logits, target)
    logits = logits.requires_grad_() * 1
    (gradient,) = torch.autograd.grad(
        tk.overlap_counts(logits, target, inplace_backward=True).tp.square().sum(), logits
    )
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()


def test_compiled():
    torch._dynamo.reset()
    logits, target = inputs(2, 3, (9, 11))

    def log_cosh_dice(z, t):
        tp, fp, fn = tk.overlap_counts(z, t)
        return ((fp + fn) / (2 * tp + fp + fn)).cosh().log().mean()

    expected = loss_and_gradient(log_cosh_dice, logits, target)
    loss, gradient = loss_and_gradient(torch.compile(log_cosh_dice, fullgraph=True), logits, target)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])


def test_bad_input():
    logits, target = inputs(2, 3, (4, 5))
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 3"):
        tk.overlap_counts(logits, target + 1)
    with pytest.raises(ValueError, match="activation: expected one of"):
        tk.overlap_counts(logits, target, activation="relu")
    counts = tk.overlap_counts(logits, target + 1, check_target=False)
    assert torch.isnan(counts.tp).all()


# ---- Generalised Dice


@pytest.mark.parametrize("weight", ["square", "simple", "uniform"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_generalized_dice_is_monais(weight, batch, background):
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(2, 4, (6, 5, 4), torch.float64)
    target[target == 2] = 1  # a class that is absent
    theirs = losses.GeneralizedDiceLoss(
        softmax=True, to_onehot_y=True, w_type=weight, batch=batch, include_background=background
    )
    expected = loss_and_gradient(lambda z, t: theirs(z, t[:, None]), logits, target)
    options = {"weight": weight, "batch": batch, "include_background": background}
    loss, gradient = loss_and_gradient(tk.generalized_dice_loss, logits, target, **options)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)  # its weights are float32
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-9)
    assert torch.equal(tk.GeneralizedDiceLoss(**options)(logits, target), loss)


def test_generalized_dice_options():
    logits, target = inputs(3, 4, (6, 5))
    each = tk.generalized_dice_loss(logits, target, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), tk.generalized_dice_loss(logits, target))
    torch.testing.assert_close(each.sum(), tk.generalized_dice_loss(logits, target, reduction="sum"))
    nothing = torch.full_like(target, 255)
    loss, gradient = loss_and_gradient(
        lambda z, t: tk.generalized_dice_loss(z, t, ignore_index=255, smooth_nr=0.0, smooth_dr=0.0), logits, nothing
    )
    assert loss == 0
    assert (gradient == 0).all()
    with pytest.raises(ValueError, match="weight: expected one of 'square', 'simple', 'uniform', got 'cube'"):
        tk.generalized_dice_loss(logits, target, weight="cube")
    with pytest.raises(TypeError, match="colour"):
        tk.generalized_dice_loss(logits, target, colour=1)
    with pytest.raises(ValueError, match="smooth_dr: expected"):
        tk.generalized_dice_loss(logits, target, smooth_dr=-1)
