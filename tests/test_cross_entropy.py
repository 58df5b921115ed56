"""Tversky loss plus cross-entropy against torch's own cross-entropy, MONAI's and the reference."""

from __future__ import annotations

import pytest
import torch
from common import LOGITS_DTYPES, check_against_truth, inputs, loss_and_gradient

import tversky_kernels as tk
from tversky_kernels._ops import ops

functional = torch.nn.functional


def cpu(logits, target, **options):
    return tk.tversky_ce_loss(logits, target, backend="cpu", **options)


def only_ce(logits, target, **options):
    return cpu(logits, target, tversky_weight=0.0, **options)


WEIGHT = [0.5, 1.0, 2.0, 0.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_softmax_is_torchs_cross_entropy(smoothing, weight, reduction):
    logits, target = inputs(2, 4, (5, 6), torch.float64)
    target[:, 0] = -100
    theirs = loss_and_gradient(
        lambda z, t: functional.cross_entropy(
            z, t, weight=weight and torch.tensor(weight).double(), label_smoothing=smoothing, reduction=reduction
        ),
        logits,
        target,
    )
    options = {"ce_class_weight": weight, "label_smoothing": smoothing, "reduction": reduction, "ignore_index": -100}
    for loss in (only_ce, lambda z, t, **o: tk.reference.tversky_ce_loss(z, t, tversky_weight=0.0, **o)):
        ours = loss_and_gradient(loss, logits, target, **options)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dense_softmax_is_torchs_cross_entropy(smoothing):
    logits, _ = inputs(2, 4, (5, 6), torch.float64)
    soft = torch.rand(2, 4, 5, 6, dtype=torch.float64).softmax(1)
    weight = torch.tensor(WEIGHT).double()
    theirs = loss_and_gradient(
        lambda z, t: functional.cross_entropy(z, t, weight=weight, label_smoothing=smoothing), logits, soft
    )
    ours = loss_and_gradient(only_ce, logits, soft, ce_class_weight=WEIGHT, label_smoothing=smoothing)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("dense", [False, True])
def test_sigmoid_is_torchs_binary_cross_entropy(dense):
    logits, target = inputs(2, 4, (5, 6), torch.float64)
    g = functional.one_hot(target, 4).movedim(-1, 1).double()
    if dense:
        target = g = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    weight = torch.tensor(WEIGHT).double().view(4, 1, 1)
    theirs = loss_and_gradient(
        lambda z, t: functional.binary_cross_entropy_with_logits(z, g, weight=weight), logits, target
    )
    ours = loss_and_gradient(only_ce, logits, target, activation="sigmoid", ce_class_weight=WEIGHT)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-16)


def test_focal_exponent_is_lins():
    logits, target = inputs(2, 4, (5, 6), torch.float64)
    p = logits.softmax(1).gather(1, target[:, None])[:, 0]
    expected = ((1 - p) ** 2 * -p.log()).mean()
    torch.testing.assert_close(only_ce(logits, target, focal_gamma=2.0), expected, rtol=1e-12, atol=0)


def test_monai_agrees():
    losses = pytest.importorskip("monai.losses")
    logits, target = inputs(2, 4, (6, 5, 4), torch.float64)
    weight = torch.tensor([0.5, 1.0, 2.0, 1.0]).double()
    for options in ({}, {"batch": True}, {"include_background": False}):
        theirs = losses.DiceCELoss(
            softmax=True, to_onehot_y=True, lambda_dice=0.7, lambda_ce=1.3, weight=weight, label_smoothing=0.1,
            **options,
        )  # fmt: skip
        # MONAI gives its weight to the Dice part too.
        expected = loss_and_gradient(lambda z, t: theirs(z, t[:, None]), logits, target)  # noqa: B023
        ours = loss_and_gradient(
            cpu, logits, target, alpha=0.5, beta=0.5, smooth_nr=5e-6, smooth_dr=5e-6, tversky_weight=0.7,
            ce_weight=1.3, ce_class_weight=weight, class_weight=weight, label_smoothing=0.1, **options,
        )  # fmt: skip
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-8, atol=1e-14)


def truth_checked(logits, target, **options):
    check_against_truth(cpu, logits, target, reference=tk.reference.tversky_ce_loss, **options)


@pytest.mark.parametrize("dtype", LOGITS_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 33])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_weight": 0.3, "tversky_weight": 2.0, "ignore_index": 1},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "ce_class_weight": 2.0, "ignore_index": 1, "voxel_weight": True},
        {"focal_gamma": 2.0},
        {"focal_gamma": 0.7, "ce_class_weight": 2.0, "ignore_index": 1, "voxel_weight": True},
        {"focal_gamma": 2.0, "label_smoothing": 0.1},
        {"focal_gamma": 2.0, "squared": True, "alpha": 0.5, "beta": 0.5},
        {"activation": "sigmoid"},
        {"activation": "sigmoid", "focal_gamma": 2.0},
        {"activation": "sigmoid", "focal_gamma": 0.7, "ignore_index": 1, "voxel_weight": True},
    ],
    ids=str,
)
def test_classes_and_dtypes(capability, classes, dtype, options):
    logits, target = inputs(2, classes, (7, 11, 13), dtype)
    options = dict(options)
    if "voxel_weight" in options:
        options["voxel_weight"] = torch.rand(2, 7, 11, 13).where(torch.rand(2, 7, 11, 13) < 0.9, 0)
    if "ce_class_weight" in options:
        options["ce_class_weight"] = torch.linspace(0.0, 2.0, classes).tolist()
    truth_checked(logits, target, **options)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("dense", [False, True])
def test_huge_logits(capability, activation, classes, dense):
    logits, target = inputs(1, classes, (64,))
    target = functional.one_hot(target, classes).movedim(-1, 1).to(torch.uint8) if dense else target
    truth_checked(logits.sign() * 1e4, target, activation=activation)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_nearly_perfect_prediction(capability, classes):
    """The cross-entropy itself keeps its relative accuracy: log1p, not log."""
    logits, target = inputs(1, classes, (12, 16), torch.float64, scale=0.5)
    # Multiples of 1/1024, whose differences are exact: a focal exponent raises their rounding to its power.
    logits = ((logits * 1024).round() / 1024 + 14 * functional.one_hot(target, classes).movedim(-1, 1)).float()
    upstream = torch.tensor(2.0**20)
    truth_checked(logits, target, upstream=upstream, smooth_nr=0.0, smooth_dr=0.0)
    truth_checked(logits, target, upstream=upstream, tversky_weight=0.0)
    truth_checked(logits, target, upstream=2.0**20 * upstream, tversky_weight=0.0, focal_gamma=2.0)
    truth_checked(logits, target, upstream=2.0**10 * upstream, tversky_weight=0.0, focal_gamma=1.5)
    truth_checked(logits, target, upstream=upstream, tversky_weight=0.0, label_smoothing=1e-4)
    truth_checked(logits, target, upstream=upstream, tversky_weight=0.0, activation="sigmoid", focal_gamma=1.0)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [2, 3, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}, {"focal_gamma": 0.7}, {"focal_gamma": 2.0, "squared": True}],
    ids=str,
)
def test_what_does_not_count_may_be_nan(capability, options, classes, activation):
    logits, target = inputs(1, classes, (300,))
    target[:, 7:200] = 99
    weight = torch.ones(1, 300)
    weight[:, 250:] = 0
    options = {"ignore_index": 99, "voxel_weight": weight, "activation": activation, "beta": 0.3, **options}
    expected = loss_and_gradient(cpu, logits, target, **options)
    logits[:, :, 7:200] = torch.nan
    logits[:, :, 250:] = torch.inf
    loss, gradient = loss_and_gradient(cpu, logits, target, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


def test_minus_infinity_excludes_a_class():
    logits, target = inputs(1, 4, (30,))
    target[target == 2] = 1
    logits[:, 2] = -torch.inf
    loss, gradient = loss_and_gradient(cpu, logits, target)
    expected = loss_and_gradient(only_ce, logits, target)[0] + tk.tversky_loss(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(only_ce(logits, target), functional.cross_entropy(logits, target))
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [3, 4, 20])
@pytest.mark.parametrize("focal_gamma", [0.5, 1.5, 2.0])
def test_an_excluded_class_meets_a_focal_exponent(capability, focal_gamma, classes, activation, dense):
    logits, target = inputs(1, classes, (30,))
    target[target == 2] = 1
    logits[:, 2] = -torch.inf
    target = functional.one_hot(target, classes).movedim(-1, 1).float() if dense else target
    truth_checked(logits, target, focal_gamma=focal_gamma, activation=activation)


def test_logarithms_to_two_ulp(capability):
    """One voxel, two classes: the cross-entropy is log(1 + e^-x), or that and x."""
    for dtype, ulp in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        x = torch.linspace(0, 60, 20001, dtype=dtype)
        for classes in (2, 3):
            logits = torch.stack((-x, torch.zeros_like(x), torch.full_like(x, -1e5))[:classes], 1)[..., None]
            for label in (0, 1):
                target = torch.full((len(x), 1), label, dtype=torch.uint8)
                counts = ops.count_pass(logits, target, None, 0, None, 0, 1, 0.0, False, 2)
                expected = torch.log1p(torch.exp(-x.double())) + (x.double() if label == 0 else 0)
                error = ((counts[:, label, 3] - expected).abs() / expected).max().item()
                # exp and log1p, and torch's own exp and log1p where both are float64
                assert error <= 3.5 * ulp, (dtype, classes, label, error / ulp)


def test_reduction_none_adds_each_samples_mean():
    logits, target = inputs(3, 4, (6, 7))
    options = {"ce_weight": 0.5, "include_background": False}
    each = cpu(logits, target, reduction="none", **options)
    tversky = tk.tversky_loss(logits, target, reduction="none", include_background=False)
    for n in range(3):
        ce = functional.cross_entropy(logits[n : n + 1], target[n : n + 1])
        torch.testing.assert_close(each[n], tversky[n] + 0.5 * ce)


def test_nothing_counts():
    logits, target = inputs(2, 3, (5,))
    for options in ({}, {"reduction": "none"}, {"reduction": "sum"}, {"activation": "sigmoid"}):
        loss, gradient = loss_and_gradient(cpu, logits, torch.full_like(target, 9), ignore_index=9, **options)
        assert (loss == 0).all()
        assert (gradient == 0).all()


def test_same_bits_for_any_number_of_threads(threads):
    logits, target = inputs(2, 5, (40, 41, 42))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(loss_and_gradient(cpu, logits, target))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_compiled():
    torch._dynamo.reset()
    logits, target = inputs(2, 3, (6, 7))
    expected = loss_and_gradient(cpu, logits, target, label_smoothing=0.1)
    compiled = torch.compile(lambda z, t: cpu(z, t, label_smoothing=0.1), fullgraph=True)
    loss, gradient = loss_and_gradient(compiled, logits, target)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("loss", [tk.tversky_ce_loss, tk.reference.tversky_ce_loss])
def test_bad_input(loss):
    logits, target = inputs(2, 3, (4, 5))
    for options, message in (
        ({"ce_weight": -1}, "ce_weight: expected a finite number >= 0, got -1"),
        ({"tversky_weight": float("inf")}, "tversky_weight: expected a finite number >= 0, got inf"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a finite number in \[0, 1\], got 1.5"),
        ({"focal_gamma": -2}, "focal_gamma: expected a finite number >= 0, got -2"),
        ({"ce_class_weight": [1, 2]}, "ce_class_weight: expected a number or 3 numbers"),
        ({"activation": "none"}, "activation: expected 'softmax' or 'sigmoid' for a cross-entropy"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(logits, target, **options)


def test_module():
    logits, target = inputs(2, 3, (4, 5))
    criterion = tk.TverskyCELoss(ce_weight=0.5, label_smoothing=0.1, ce_class_weight=torch.tensor([1.0, 2.0, 3.0]))
    expected = cpu(logits, target, ce_weight=0.5, label_smoothing=0.1, ce_class_weight=[1, 2, 3])
    assert torch.equal(criterion(logits, target), expected)
