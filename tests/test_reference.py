"""The reference against formulas written out here, against numbers from elsewhere, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from common import inputs

import tversky_kernels as tk

reference = tk.reference.tversky_loss


def by_hand(p, g, alpha, beta, smooth_nr=0.0, smooth_dr=0.0):
    """1 - TI of one class, voxel by voxel in Python's own floats."""
    tp = fp = fn = 0.0
    for pi, gi in zip(p.flatten().tolist(), g.flatten().tolist(), strict=True):
        tp += pi * gi
        fp += pi * (1 - gi)
        fn += (1 - pi) * gi
    return 1 - (tp + smooth_nr) / (tp + alpha * fp + beta * fn + smooth_dr)


def test_two_voxels_on_paper():
    # p = (3/4, 1/4) and (1/2, 1/2), labels 0 and 1:
    # TP_0 = 3/4, FP_0 = 1/2, FN_0 = 1/4; TP_1 = 1/2, FP_1 = 1/4, FN_1 = 1/2.
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]], dtype=torch.float64)
    target = torch.tensor([[0, 1]])
    loss = reference(logits, target, alpha=0.3, beta=0.7, smooth_nr=0.0, smooth_dr=0.0, reduction="none")
    expected = [1 - 0.75 / (0.75 + 0.3 * 0.5 + 0.7 * 0.25), 1 - 0.5 / (0.5 + 0.3 * 0.25 + 0.7 * 0.5)]
    torch.testing.assert_close(loss, torch.tensor([expected], dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_formula(activation):
    logits, target = inputs(2, 3, (4, 3, 2), torch.float64)
    if activation == "none":
        logits = logits.softmax(1)
    p = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "none": logits}[activation]
    loss = reference(
        logits, target, alpha=[0.2, 0.5, 1.0], beta=[0.9, 0.5, 0.1], class_weight=[1.0, 2.0, 3.0], gamma=0.75,
        smooth_nr=0.1, smooth_dr=0.2, activation=activation, reduction="none",
    )  # fmt: skip
    for n in range(2):
        for c, (a, b, w) in enumerate(((0.2, 0.9, 1.0), (0.5, 0.5, 2.0), (1.0, 0.1, 3.0))):
            g = (target[n] == c).double()
            assert loss[n, c].item() == pytest.approx(w * by_hand(p[n, c], g, a, b, 0.1, 0.2) ** 0.75, rel=1e-12)


def test_alpha_weighs_false_positives():
    # Everything is predicted as class 1, half of it is: only false positives for class 1.
    logits = torch.tensor([[[-50.0] * 4, [50.0] * 4]])
    target = torch.tensor([[0, 0, 1, 1]])
    one = reference(logits, target, alpha=1.0, beta=0.0, reduction="none", smooth_nr=0, smooth_dr=0)[0, 1]
    none = reference(logits, target, alpha=0.0, beta=1.0, reduction="none", smooth_nr=0, smooth_dr=0)[0, 1]
    assert one.item() == pytest.approx(0.5, abs=1e-6)
    assert none.item() == pytest.approx(0.0, abs=1e-6)


def test_the_papers_gradient_corrected():
    """Eq. 4 and 5 as they should read: no factor 2, and g0 in the second. See docs/mathematics.md."""
    logits, target = inputs(1, 2, (50,), torch.float64)
    p = logits.softmax(1).requires_grad_()
    alpha, beta = 0.3, 0.7
    options = {"alpha": alpha, "beta": beta, "smooth_nr": 0.0, "smooth_dr": 0.0, "activation": "none"}
    # p1 = 1 - p0 enters the paper's T on its own: its false positives are p0 g1, its false negatives p1 g0.
    p0, p1, g0 = p[0, 0], p[0, 1], (target[0] == 0).double()
    g1 = 1 - g0
    numerator = (p0 * g0).sum()
    denominator = numerator + alpha * (p0 * g1).sum() + beta * (p1 * g0).sum()
    d0, d1 = torch.autograd.grad(numerator / denominator, (p0, p1))
    n, d = numerator.detach(), denominator.detach()
    torch.testing.assert_close(d0, (g0 * d - (g0 + alpha * g1) * n) / d**2)
    torch.testing.assert_close(d1, -beta * g0 * n / d**2)
    # and as a loss of probabilities, where p1 is 1 - p0: the two together.
    loss = reference(p, target, reduction="none", **options)[0, 0]
    (both,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(both[0, 0], -(d0 - d1))


def test_dice_and_jaccard_are_special_cases():
    logits, target = inputs(2, 4, (5, 6), torch.float64)
    p, g = logits.softmax(1), torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    both, total = (p * g).flatten(2).sum(-1), (p + g).flatten(2).sum(-1)
    dice = 1 - (2 * both + 2e-5) / (total + 2e-5)
    jaccard = 1 - (both + 1e-5) / (total - both + 1e-5)
    torch.testing.assert_close(tk.dice_loss(logits, target, backend="reference"), dice.mean())
    torch.testing.assert_close(tk.jaccard_loss(logits, target, backend="reference"), jaccard.mean())


def test_monai_agrees():
    TverskyLoss = pytest.importorskip("monai.losses").TverskyLoss  # the extra "examples"

    logits, target = inputs(2, 4, (6, 5, 4), torch.float64)
    for options in ({}, {"batch": True}, {"include_background": False}, {"alpha": 0.6, "beta": 0.4}):
        theirs = TverskyLoss(softmax=True, to_onehot_y=True, **{"alpha": 0.5, "beta": 0.5, **options})
        ours = reference(logits, target, **{"alpha": 0.5, "beta": 0.5, **options})
        torch.testing.assert_close(ours, theirs(logits, target[:, None]), rtol=1e-9, atol=0)


def test_dense_one_hot_is_the_index_target():
    logits, target = inputs(2, 4, (6, 5), torch.float64)
    one_hot = torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    for dtype in (torch.uint8, torch.bool, torch.float32, torch.int64):
        for soft in (False, True):
            torch.testing.assert_close(
                reference(logits, one_hot.to(dtype), soft_label=soft), reference(logits, target), rtol=1e-12, atol=0
            )


def test_soft_label_is_least_at_the_target():
    soft = torch.rand(1, 2, 20, dtype=torch.float64).softmax(1)
    at = reference(soft, soft, activation="none", soft_label=True)
    assert at.item() == pytest.approx(0, abs=1e-12)
    assert reference(soft, soft, activation="none").item() > 0.1  # the product form is not


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_squared_is_vnets_dice(activation):
    logits, _ = inputs(2, 3, (6, 5), torch.float64)
    z = logits.sigmoid() if activation == "none" else logits
    p = {"softmax": z.softmax(1), "sigmoid": z.sigmoid(), "none": z}[activation].flatten(2)
    g = torch.rand(p.shape, dtype=torch.float64)
    vnet = 1 - (2 * (p * g).sum(-1) + 2e-3) / ((p**2).sum(-1) + (g**2).sum(-1) + 2e-3)
    options = {"alpha": 0.5, "beta": 0.5, "smooth_nr": 1e-3, "smooth_dr": 1e-3, "reduction": "none"}
    found = reference(z, g.view_as(z), activation=activation, squared=True, **options)
    torch.testing.assert_close(found, vnet, rtol=1e-12, atol=0)
    at = reference(g.view_as(z), g.view_as(z), activation="none", squared=True, alpha=1.0, beta=1.0)
    assert at.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("absent", ["keep", "zero", "skip"])
@pytest.mark.parametrize("batch", [False, True])
def test_absent(absent, batch):
    logits, _ = inputs(2, 3, (10,), torch.float64)
    target = torch.stack([torch.arange(10) % 2, torch.arange(10) % 3])  # sample 0 lacks class 2
    target = target % 2 if batch else target
    each = reference(logits, target, batch=batch, reduction="none")
    missing = [(2,)] if batch else [(0, 2)]
    kept = each.clone()
    for at in missing:
        assert each[at] > 0.9  # the formula: false positives and nothing else
        kept[at] = 0
    expected = {"keep": each.mean(), "zero": kept.mean(), "skip": kept.sum() / (kept.numel() - 1)}[absent]
    torch.testing.assert_close(reference(logits, target, batch=batch, absent=absent), expected)


def test_nothing_to_average_is_zero():
    logits = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    target = torch.full((1, 5), 9)
    for options in ({"absent": "skip"}, {"absent": "zero"}, {}, {"smooth_nr": 0, "smooth_dr": 0}):
        loss = reference(logits, target, ignore_index=9, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0
        assert (gradient == 0).all()
    assert reference(torch.randn(0, 2, 5), torch.zeros(0, 5, dtype=torch.long)).item() == 0
    assert reference(torch.randn(2, 2, 0), torch.zeros(2, 0, dtype=torch.long)).item() == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.75, "batch": True},
        {"alpha": [0.1, 0.5, 0.9], "class_weight": [1, 2, 0], "ignore_index": 1, "reduction": "none"},
        {"activation": "sigmoid", "include_background": False, "absent": "skip", "reduction": "sum"},
        {"soft_label": True, "dense": True},
        {"activation": "none", "weighted": True, "gamma": 2.0},
    ],
)
def test_gradcheck_and_gradgradcheck(options):
    options = dict(options)
    logits, target = inputs(2, 3, (2, 3), torch.float64)
    if options.pop("dense", False):
        target = torch.rand(2, 3, 2, 3, dtype=torch.float64).softmax(1)
    if options.pop("weighted", False):
        options["voxel_weight"] = torch.rand(2, 2, 3, dtype=torch.float64)
        logits = logits.softmax(1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference(z, target, **options), logits)
    assert torch.autograd.gradgradcheck(lambda z: reference(z, target, **options), logits)


def test_half_precision_is_computed_in_float32():
    logits, target = inputs(1, 3, (40, 40, 40), torch.float16, scale=20)
    loss = reference(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(logits.double(), target).item(), rel=1e-5)


def test_dense_target_may_require_a_gradient():
    logits, _ = inputs(1, 2, (3, 3), torch.float64)
    target = torch.rand(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: tk.tversky_loss(logits, g), target)
