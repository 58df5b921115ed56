"""What is at the ends of the numbers: infinite and immense upstream gradients, NaN, logits far apart, underflow."""

from __future__ import annotations

import math

import pytest
import torch
from common import inputs, loss_and_gradient, relative

import tversky_kernels as tk

BACKENDS = ("cpu", "reference")
FORMS = {
    "tversky": (tk.tversky_loss, {}),
    "focal tversky": (tk.tversky_loss, {"gamma": 0.75}),
    "by class": (tk.tversky_loss, {"alpha": [0.3, 0.4, 0.5], "class_weight": [1.0, 2.0, 3.0]}),
    "batch, none": (tk.tversky_loss, {"batch": True, "reduction": "none"}),
    "sigmoid": (tk.tversky_loss, {"activation": "sigmoid", "reduction": "sum"}),
    "squared": (tk.tversky_loss, {"squared": True, "alpha": 0.5, "beta": 0.5}),
    "ce": (tk.tversky_ce_loss, {}),
    "ce, none": (tk.tversky_ce_loss, {"reduction": "none"}),
    "ce, smoothed": (tk.tversky_ce_loss, {"label_smoothing": 0.1}),
    "ce, focal": (tk.tversky_ce_loss, {"focal_gamma": 2.0}),
    "ce, sigmoid": (tk.tversky_ce_loss, {"activation": "sigmoid", "focal_gamma": 1.5}),
    "generalised": (tk.generalized_dice_loss, {}),
    "counts": (lambda z, t, **o: torch.stack(tk.overlap_counts(z, t, **o)), {}),
    "own": (lambda z, t, **o: (1 - tk.overlap_counts(z, t, **o).tp / 99).prod(), {}),
    "deep": (lambda z, t, **o: tk.deep_supervision_loss([z, z[..., ::2]], t, loss="tversky_ce", **o), {}),
    "monai": (lambda z, t, **o: tk.compat.monai.DiceFocalLoss(sigmoid=True, to_onehot_y=True, **o)(z, t[:, None]), {}),
    "nnunet": (lambda z, t, **o: tk.compat.nnunet.DC_and_CE_loss({}, {}, **o)(z, t[:, None]), {}),
    "smp": (lambda z, t, **o: tk.compat.smp.TverskyLoss("multiclass", gamma=0.75, **o)(z, t), {}),
    "smp, focal": (lambda z, t, **o: tk.compat.smp.FocalLoss("multiclass", **o)(z, t), {}),
    "kornia": (lambda z, t, **o: tk.compat.kornia.tversky_loss(z, t, 0.3, 0.7, **o), {}),
}


def gradient(name, logits, target, scale, **options):
    function, fixed = FORMS[name]
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target, **fixed, **options)
    return torch.autograd.grad(loss, logits, torch.full_like(loss, scale))[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", list(FORMS))
def test_upstream_gradients_up_to_the_types_limit(name, dtype, backend):
    """A scaled gradient is the gradient times the scale, or infinite; never another number."""
    logits, target = inputs(2, 3, (6, 10), dtype)
    one = gradient(name, logits, target, 1.0, backend=backend).double()
    most = 1023 if dtype == torch.float64 else 127
    # Not until a coefficient, of which p (1 - p) makes a gradient, is beyond the type itself.
    reach = torch.finfo(dtype).max / 64
    for exponent in (*range(0, most, 25), most - 2, most - 1, most):
        scaled = gradient(name, logits, target, 2.0**exponent, backend=backend).double()
        expected = one * 2.0**exponent
        fits = (expected.abs() < reach / 2**6).all()
        if fits:
            assert relative(scaled * 2.0**-exponent, one) <= {torch.float32: 1e-6, torch.bfloat16: 4e-3}.get(
                dtype, 1e-12
            )
        else:
            finite = torch.isfinite(scaled)
            ratio = (scaled[finite] * 2.0**-exponent - one[finite]).abs()
            assert (ratio <= 1e-2 * one.abs().max()).all()
    for upstream in (math.inf, -math.inf, math.nan):
        assert not torch.isfinite(gradient(name, logits, target, upstream, backend=backend)).all(1).any()


def test_a_scaler_backs_off_and_adam_stays_finite():
    logits, target = inputs(2, 3, (6, 10))
    parameter = torch.nn.Parameter(logits)
    optimizer = torch.optim.Adam([parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    for _ in range(40):
        optimizer.zero_grad()
        scaler.scale(1e3 * tk.tversky_ce_loss(parameter * 1, target, inplace_backward=True)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**127
    (state,) = optimizer.state.values()
    assert torch.isfinite(state["exp_avg_sq"]).all()
    assert state["exp_avg_sq"].max() > 0


def test_an_immense_coefficient_times_nothing_is_nothing():
    """gamma < 1 and a class that is absent but for its smoothing: with a scaler's factor, too."""
    logits = torch.zeros(1, 3, 64)
    logits[:, 0] = 60.0
    target = torch.zeros(1, 64, dtype=torch.uint8)
    options = {"gamma": 0.1, "smooth_nr": 0.0, "smooth_dr": 0.0}
    for scale in (1.0, 2.0**16):
        z = logits.clone().requires_grad_()
        (found,) = torch.autograd.grad(tk.tversky_loss(z, target, **options) * scale, z)
        assert torch.isfinite(found).all()


OPTIONS = {
    "tversky": {},
    "gamma": {"gamma": 0.5},
    "soft": {"soft_label": True},
    "squared": {"squared": True},
    "ce": {"ce_weight": 1.0},
    "smoothed": {"ce_weight": 1.0, "label_smoothing": 0.1},
    "focal 2": {"ce_weight": 1.0, "focal_gamma": 2.0},
    "focal 0.5": {"ce_weight": 1.0, "focal_gamma": 0.5},
    "focal 5": {"ce_weight": 1.0, "focal_gamma": 5.0},
    "focal, smoothed": {"ce_weight": 1.0, "focal_gamma": 2.0, "label_smoothing": 0.1},
    "focal, squared": {"ce_weight": 1.0, "focal_gamma": 1.5, "squared": True},
}
CASES = [(2, "softmax"), (3, "softmax"), (5, "softmax"), (17, "softmax"), (1, "sigmoid"), (3, "sigmoid")]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("classes", "activation"), CASES)
@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_scan_of_gaps_between_logits(capability, name, classes, activation, dense):
    """The largest logit above the label's, or below: from 0 to where nothing of the exponential is left."""
    options = {"alpha": 0.5, "beta": 0.5, "ce_weight": 0.0, "activation": activation, **OPTIONS[name]}
    options["reduction"] = "none"
    for dtype in (torch.float32, torch.float64):
        gaps = torch.arange(0, 110, 0.1, dtype=torch.float64)
        if dtype == torch.float64:
            gaps = torch.cat((torch.arange(0, 690, 3.0), torch.arange(690, 760, 0.1))).double()
        logits = torch.zeros(len(gaps), classes, 2, dtype=torch.float64)
        logits[:, -1, 0], logits[:, 0, 1] = gaps, gaps  # above the label's; the label's above
        target = torch.zeros(len(gaps), 2, dtype=torch.int64)
        if classes == 1:
            logits[:, 0, 0], target[:, 1] = gaps, 1
        if dense:
            target = torch.nn.functional.one_hot(target, max(2, classes)).movedim(-1, 1)[:, -classes:].to(dtype)
        loss, found = loss_and_gradient(tk.tversky_ce_loss, logits.to(dtype), target, backend="cpu", **options)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(found).all()
        exact = target.double() if dense else target
        true, expected = loss_and_gradient(tk.reference.tversky_ce_loss, logits, exact, **options)
        tolerance = 3e-6 if dtype == torch.float32 else 1e-12
        assert ((loss.double() - true).abs() <= tolerance * true.abs().clamp(min=1)).all()
        largest = expected.abs().amax((1, 2), keepdim=True)
        least = 1e-9 * expected.abs().max()  # of the cancellation in what is as good as 0 the truth has its share
        assert ((found.double() - expected).abs() <= tolerance * largest + least).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense", [None, "one-hot", "soft"])
@pytest.mark.parametrize(
    ("name", "classes", "activation"),
    [
        (name, *case)
        for name, options in OPTIONS.items()
        for case in [*CASES, (3, "none")]
        if case[1] != "none" or "ce_weight" not in options  # there is no cross-entropy of probabilities
    ],
)
def test_nan_is_nowhere_swallowed(name, classes, activation, dense, backend):
    options = {"alpha": 0.5, "beta": 0.5, "ce_weight": 0.0, "activation": activation, **OPTIONS[name]}
    logits, labels = inputs(2, classes, (40,))
    logits = logits.sigmoid() if activation == "none" else logits
    target = labels
    if dense is not None:
        target = torch.nn.functional.one_hot(labels, max(2, classes)).movedim(-1, 1)[:, -classes:].float()
        target = target * 0.6 + 0.2 if dense == "soft" else target
    logits[1, -1, 17] = torch.nan
    loss = tk.tversky_ce_loss(logits, target, backend=backend, reduction="none", **options)
    channels = slice(None) if activation == "softmax" or options["ce_weight"] else slice(-1, None)
    assert torch.isnan(loss[1, channels]).all()
    assert torch.isfinite(loss[0]).all()
    if options["ce_weight"] or "gamma" in options or "squared" in options:
        return
    kind = {name: options[name] for name in ("activation", "soft_label") if name in options}
    for counts in tk.overlap_counts(logits, target, backend=backend, **kind):
        assert torch.isnan(counts[1, channels]).all()
        assert torch.isfinite(counts[0]).all()


@pytest.mark.parametrize("soft_label", [False, True])
def test_nan_of_a_dense_target_that_is_not_checked(soft_label):
    logits, labels = inputs(1, 3, (40,))
    target = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    target[0, 1, 7] = torch.nan
    for backend in BACKENDS:
        loss = tk.tversky_loss(logits, target, soft_label=soft_label, check_target=False, backend=backend)
        assert torch.isnan(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("classes", "activation"), [(2, "softmax"), (3, "softmax"), (9, "softmax"), (1, "sigmoid")])
def test_exponentials_below_the_smallest_normal_number_are_nothing(capability, dtype, classes, activation):
    """So an absent class that nothing predicts costs nothing without smoothing; the kernels and the reference agree."""
    least = -math.log(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny)
    for gap in (0.9 * least, least - 1, least + 1, 1.1 * least):
        logits = torch.zeros(1, classes, 64, dtype=dtype)
        logits[:, -1] = -gap
        target = torch.zeros(1, 64, dtype=torch.uint8)
        options = {"activation": activation, "smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": "none"}
        found = tk.tversky_loss(logits, target, **options)
        assert found[0, -1] == (1.0 if gap < least else 0.0)
        torch.testing.assert_close(found, tk.reference.tversky_loss(logits, target, **options))
        of_counts = [tk.overlap_counts(logits, target, activation=activation, backend=b).fp for b in BACKENDS]
        torch.testing.assert_close(*of_counts, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_voxel_weights_below_the_smallest_normal_number_are_nothing(backend):
    logits, target = inputs(1, 3, (64,))
    weight = torch.full((1, 64), 1e-42)
    weight[:, ::2] = 0.5
    logits[..., 1] = torch.nan
    expected = loss_and_gradient(tk.tversky_loss, logits, target, voxel_weight=torch.where(weight < 0.1, 0, weight))
    found = loss_and_gradient(tk.tversky_loss, logits, target, voxel_weight=weight, backend=backend)
    torch.testing.assert_close(found, expected)
    assert found[1][..., 1::2].eq(0).all()
    in_double = loss_and_gradient(
        tk.tversky_loss, logits.double(), target, voxel_weight=weight.double(), backend=backend
    )
    assert torch.isnan(in_double[0])  # there 1e-42 is a number


def test_small_denominators_of_float64():
    """Whose square is 0: the gradient of a class that hardly anything predicts and nothing smooths."""
    logits = torch.zeros(1, 2, 8, dtype=torch.float64)
    logits[:, 1] = -600.0
    target = torch.zeros(1, 8, dtype=torch.uint8)
    options = {"alpha": 0.5, "beta": 0.5, "smooth_nr": 0.0, "smooth_dr": 0.0}
    for backend in BACKENDS:
        loss, found = loss_and_gradient(tk.tversky_loss, logits, target, backend=backend, **options)
        assert loss.item() == pytest.approx(0.5)
        assert torch.isfinite(found).all()


def test_generalised_dice_keeps_its_digits():
    """1 - Dice of a prediction that is nearly right is a difference; float32 has nothing of it left."""
    logits, target = inputs(2, 3, (40, 50))
    for sharpness in (4.0, 12.0, 20.0):
        right = sharpness * torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
        z = logits * 0.1 + right
        for options in ({}, {"weight": "simple"}, {"batch": True}, {"smooth_nr": 0.0, "smooth_dr": 0.0}):
            _, expected = loss_and_gradient(
                tk.generalized_dice_loss, z.double(), target, backend="reference", **options
            )
            _, found = loss_and_gradient(tk.generalized_dice_loss, z, target, **options)
            assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("value", [255, -1, 3, 2**40])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64, torch.float32])
def test_an_ignored_value_that_a_dense_target_cannot_hold(value, dtype):
    """It does not wrap around."""
    logits, labels = inputs(2, 3, (30,))
    target = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).to(dtype)
    holds = dtype.is_floating_point or torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
    for other in {-1, 255} - {value}:
        if not dtype.is_floating_point and not torch.iinfo(dtype).min <= other <= torch.iinfo(dtype).max:
            continue
        marked = target.clone()
        marked[:, :, 4] = other
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=f"target: expected values of a dense target in .0, 1., got {other}"):
                tk.tversky_loss(logits, marked, ignore_index=value, backend=backend)
    if holds:
        target[:, :, 4] = value
    found = [loss_and_gradient(tk.tversky_loss, logits, target, ignore_index=value, backend=b) for b in BACKENDS]
    torch.testing.assert_close(*found)
    assert found[0][1][:, :, 4].eq(0).all() == holds


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [255.0, -0.001, 1.001, math.nan, math.inf])
@pytest.mark.parametrize(
    ("classes", "activation"), [(2, "softmax"), (9, "softmax"), (1, "sigmoid"), (3, "sigmoid"), (2, "none")]
)
def test_a_dense_target_outside_of_0_and_1(classes, activation, bad, backend):
    logits, labels = inputs(2, classes, (70,))
    target = torch.nn.functional.one_hot(labels, max(2, classes)).movedim(-1, 1)[:, -classes:].float()
    options = {"activation": activation, "backend": backend}
    expected = tk.tversky_loss(logits, target, **options)
    target[1, -1, 63] = bad
    for check in (None, True):
        with pytest.raises(ValueError, match=r"target: expected values of a dense target in \[0, 1\], got"):
            tk.tversky_loss(logits, target, check_target=check, **options)
    found = tk.tversky_loss(logits, target, check_target=False, **options)
    assert not torch.equal(found, expected)
    if math.isfinite(bad):
        truth = tk.reference.tversky_loss(logits.double(), target.double(), activation=activation, check_target=False)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-7)
    # What does not count may hold anything.
    weight = torch.ones(2, 70)
    weight[1, 63] = 0
    assert torch.isfinite(tk.tversky_loss(logits, target, voxel_weight=weight, **options))
    ignored = target.clone()
    ignored[1, :, 63] = bad
    if math.isfinite(bad) and bad == int(bad):
        assert torch.isfinite(tk.tversky_loss(logits, ignored, ignore_index=int(bad), **options))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float16, torch.float64])
def test_a_mask_of_0_and_255(dtype):
    """An image file, read as it is."""
    logits, labels = inputs(1, 1, (50,), labels=2)
    mask = (labels[:, None] * (255 if dtype != torch.int8 else 100)).to(dtype)
    if dtype.is_floating_point:
        with pytest.raises(ValueError, match="target: expected values of a dense target in"):
            tk.tversky_ce_loss(logits, mask, activation="sigmoid")
    else:  # of one channel integers are labels
        with pytest.raises(ValueError, match="target: expected labels in"):
            tk.tversky_ce_loss(logits, mask, activation="sigmoid")


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_bits_in_every_layout(capability, classes, dtype):
    logits, target = inputs(2, classes, (13, 17, 21), dtype, torch.uint8)
    dense = torch.nn.functional.one_hot(target.long(), classes).movedim(-1, 1)
    for options in (
        {"squared": True, "alpha": 0.5, "beta": 0.5},
        {"label_smoothing": 0.1, "ce_weight": 1.0},
        {"focal_gamma": 2.0, "ce_weight": 1.0},
        {"focal_gamma": 2.0, "label_smoothing": 0.1, "ce_weight": 1.0, "squared": True, "alpha": 0.5, "beta": 0.5},
        {"activation": "sigmoid"},
        {"activation": "sigmoid", "ce_weight": 1.0},
    ):
        for t in (target, dense, dense.contiguous()):
            options = {"ce_weight": 0.0, **options}
            expected = loss_and_gradient(tk.tversky_ce_loss, logits, t, **options)
            z = logits.contiguous(memory_format=torch.channels_last_3d)
            found = loss_and_gradient(tk.tversky_ce_loss, z, t, **options)
            assert torch.equal(found[0], expected[0]), options
            assert torch.equal(found[1], expected[1]), options
