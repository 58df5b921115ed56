"""The GPU kernels against the float64 reference.

TK_GPU_KERNELS says where they run: "cuda" or "triton" on a card (make gpu-check), "interpreter" for Triton's (with
TRITON_INTERPRET=1), the path of the host build's library, or "triton:" and that path for what Triton compiles.
tests/test_triton_without_gpu.py and tests/test_cuda_on_host.py run the last three, in processes of their own.
"""

from __future__ import annotations

import os

import hypothesis
import kernels_on_host
import pytest
import torch
from combinations import cases, check_case
from common import (
    FORMS,
    INDEX_DTYPES,
    LOGITS_DTYPES,
    check_against_truth,
    check_immense_coefficients,
    check_nearly_right,
    inputs,
    loss_and_gradient,
    relative,
)

import tversky_kernels as tk
from tversky_kernels import _backends, _linear, _ops

WHERE = os.environ["TK_GPU_KERNELS"]
BACKEND = {"cuda": "cuda", "triton": "triton", "interpreter": "triton"}.get(WHERE) or kernels_on_host.use(WHERE)
DEVICE = "cuda" if WHERE in ("cuda", "triton") else "cpu"
OPERATORS = _ops.OPERATORS[BACKEND]
#: voxel_weight, activation, ignore_index, overlap, cross_entropy, focal_gamma
PLAIN = (None, 0, None, 0, 0, 0.0, False)


def kernel_loss(logits, target, voxel_weight=None, **options):
    weight = None if voxel_weight is None else voxel_weight.to(DEVICE)
    return tk.tversky_loss(logits.to(DEVICE), target.to(DEVICE), voxel_weight=weight, backend=BACKEND, **options).to(
        logits.device
    )


def kernel_ce_loss(logits, target, voxel_weight=None, **options):
    options = {"voxel_weight": voxel_weight, **options}
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return tk.tversky_ce_loss(logits.to(DEVICE), target.to(DEVICE), backend=BACKEND, **options).to(logits.device)


def check(logits, target, function=kernel_loss, **options):
    # Triton's interpreter cuts off where it should round to bfloat16, which is up to three times as far; compiled
    # code rounds.
    rounding = 3.0 if WHERE == "interpreter" and logits.dtype == torch.bfloat16 else 1.02
    reference = tk.reference.tversky_loss if function is kernel_loss else tk.reference.tversky_ce_loss
    check_against_truth(function, logits, target, rounding=rounding, reference=reference, **options)


#: Sizes of which whole 16-byte loads are made of every type, of single precision, and of none.
SIZES = [(4, 5, 8), (5, 4, 3), (5, 7, 3)]
if WHERE == "interpreter":  # to whose kernels the second is nothing new
    del SIZES[1]
#: The interpreter cuts off where it should round to bfloat16.
TWO_DTYPES = [torch.float32] if WHERE == "interpreter" else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOGITS_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 8, 9, 16, 17, 33])
@pytest.mark.parametrize("spatial", SIZES)
def test_softmax(classes, dtype, spatial):
    check(*inputs(2, classes, spatial, dtype))


@pytest.mark.parametrize("function", [kernel_loss, kernel_ce_loss])
@pytest.mark.parametrize("spatial", [(7, 11), (6, 10)] if WHERE == "interpreter" else [(7, 11), (6, 10), (8, 10)])
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(118, torch.float32), (118, torch.bfloat16), (1000, torch.float32)]
    + [(c, torch.float16) for c in (12, 13, 24, 32, 48, 49, 64, 65, 96, 97, 128, 129)]
    + ([] if BACKEND == "triton" else [(c, torch.bfloat16) for c in (18, 36, 37, 40, 66, 72, 73, 130, 144, 145)]),
    ids=str,
)
def test_many_classes(classes, dtype, spatial, function):
    check(*inputs(1, classes, spatial, dtype), function=function)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", TWO_DTYPES if WHERE == "interpreter" else [*TWO_DTYPES, torch.float64], ids=str)
def test_most_classes(dtype, dense):
    """What "auto" gives to cuda, with all that there can be to sum up; of Triton as many."""
    double = dtype == torch.float64
    classes = _backends.MOST_CLASSES_OF_CUDA_IN_FLOAT64 if double else _backends.MOST_CLASSES_OF_CUDA
    logits, target = inputs(1, classes, (3, 4), dtype)
    if dense:
        target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).to(torch.uint8)
    check(logits, target, function=kernel_ce_loss, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 5, 33])
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_other_activations(activation, classes, dtype):
    logits, target = inputs(2, classes, (5, 8), dtype)
    check(logits.sigmoid() if activation == "none" else logits, target, activation=activation)


@pytest.mark.parametrize("target_dtype", [*INDEX_DTYPES, torch.bool])
@pytest.mark.parametrize("classes", [2, 20])
def test_target_dtypes(target_dtype, classes):
    labels = 2 if target_dtype == torch.bool else None
    check(*inputs(1, classes, (9, 16), torch.float16, target_dtype, labels=labels))


@pytest.mark.parametrize("classes", [2, 4, 20])
@pytest.mark.parametrize("spatial", [(64,), (2, 35)])
@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 100},
        {"ignore_index": 1, "batch": True, "gamma": 0.75},
        {"ignore_index": -(2**40)},
        {"include_background": False, "reduction": "none"},
        {"batch": True, "reduction": "none", "include_background": False},
        {"absent": "skip", "ignore_index": 0, "reduction": "mean"},
        {"absent": "zero", "ignore_index": 0, "reduction": "sum", "batch": True},
        {"gamma": 2.0, "smooth_nr": 0.0, "smooth_dr": 1.0},
        {"per_class": True},
        {"weighted": torch.float32},
        {"weighted": torch.float16, "ignore_index": 1, "activation": "sigmoid"},
        {"weighted": torch.bool},
    ],
)
def test_options(classes, spatial, options):
    options = dict(options)
    logits, target = inputs(3, classes, spatial)
    if options.get("ignore_index") == 100:
        target[:, ..., ::3] = 100
    if options.pop("per_class", False):
        options.update(
            alpha=[0.1 * (c + 1) for c in range(classes)], class_weight=[1.0 / (c + 1) for c in range(classes)]
        )
    if "weighted" in options:
        options["voxel_weight"] = (torch.rand(3, *spatial) * 2).to(options.pop("weighted"))
    shape = tk.reference.tversky_loss(logits, target, **options).shape
    upstream = torch.randn(shape, dtype=torch.float64)
    # Where the only class that is kept is ignored, the reference itself has few digits.
    check(logits, target, upstream=upstream, least_norm=1e-4, **options)


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 4, 20])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack((x, x), 1)[:, 0].contiguous(memory_format=torch.channels_last)[:1],
        lambda x: (
            torch.cat((x.movedim(1, -1).flatten(1), x.movedim(1, -1).flatten(1)), 1)
            .unflatten(1, (2, *x.shape[2:], x.size(1)))[:, 1]
            .movedim(-1, 1)
        ),
        lambda x: torch.cat((x, x), 1)[:, : x.size(1)],
        lambda x: torch.stack((x, x), 1)[:, 0],
        lambda x: torch.cat((x, x), -1)[..., : x.size(-1)],
        lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
        lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    ],
    ids=["channels_last", "one of them", "half of them", "classes", "batch", "space", "every second", "offset by one"],
)
def test_layouts(classes, layout, dtype):
    logits, target = inputs(2, classes, (6, 8), dtype)
    strided = layout(logits)
    assert torch.equal(strided, logits[: len(strided)])
    check(strided, target[: len(strided)])


#: Of one lane and of many, which take pairs or single classes, in turn or not; some of several tiles a block.
CHANNELS_LAST = [(5, (8, 8)), (7, (5, 8)), (8, (7, 8)), (14, (20, 24)), (33, (72, 40)), (40, (72, 40)), (73, (8, 9))]
CHANNELS_LAST += [(6, (40, 56)), (9, (8, 9)), (16, (8, 9)), (17, (8, 9)), (30, (72, 40)), (32, (24, 25)), (34, (8, 9))]
CHANNELS_LAST += [(58, (8, 9)), (118, (24, 25)), (131, (8, 9))]


@pytest.mark.parametrize("function", [kernel_loss, kernel_ce_loss])
@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "spatial"), CHANNELS_LAST if BACKEND != "triton" else CHANNELS_LAST[1:4:2])
def test_channels_last(classes, spatial, dtype, function):
    logits, target = inputs(1, classes, spatial, dtype)
    last = logits.contiguous(memory_format=torch.channels_last)
    _, gradient = loss_and_gradient(function, last, target)
    assert gradient.stride() == last.stride()
    check(last, target, function=function)


@pytest.mark.parametrize("classes", [2, 4, 20])
@pytest.mark.parametrize("spatial", [(48,), (47,)])
def test_nothing_beyond_the_tensors_is_touched(classes, spatial):
    """Logits, target and gradient lie between NaN and labels out of range; nothing there is read or written."""
    logits, target = inputs(1, classes, spatial)
    expected = loss_and_gradient(tk.reference.tversky_loss, logits, target)
    pad = 64
    wide = torch.full((logits.numel() + 2 * pad,), torch.nan)
    labels = torch.full((target.numel() + 2 * pad,), 99)
    wide, labels = wide.to(DEVICE), labels.to(DEVICE)
    inside = wide[pad:-pad].view(logits.shape).copy_(logits)
    inside_labels = labels[pad:-pad].view(target.shape).copy_(target)
    leaf = torch.ones((), device=DEVICE, requires_grad=True)
    inside *= leaf
    loss = kernel_loss(inside, inside_labels, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, inside)
    torch.testing.assert_close(loss.detach().cpu(), expected[0])
    torch.testing.assert_close(gradient.cpu(), expected[1], rtol=1e-4, atol=1e-8)
    assert torch.isnan(wide[:pad]).all()
    assert torch.isnan(wide[-pad:]).all()


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("bad", [-1, "C", 2**33])
def test_a_bad_label_gives_nan(classes, bad):
    logits, target = inputs(2, classes, (40,))
    target[1, 17] = classes if bad == "C" else bad
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    loss, coefficients = OPERATORS.tversky_loss(
        logits, target, *PLAIN, 1, None, 0.3, 0.7, 1.0, 1e-5, 1e-5, True, False, 0, 0, 1.0, 0.0, 0.0, 0
    )
    assert torch.isnan(loss[1]).all()
    assert torch.isfinite(loss[0]).all()
    assert torch.isnan(OPERATORS.gradient_pass(loss, coefficients, logits, target, *PLAIN)[1]).any()


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("options", [None, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}, {"focal_gamma": 0.7}])
def test_what_does_not_count_may_be_nan(options, classes, dtype):
    function, options = kernel_ce_loss if options else kernel_loss, {"ignore_index": 99, **(options or {})}
    logits, target = inputs(1, classes, (96,), dtype)
    target[:, 7:60] = 99
    expected = loss_and_gradient(function, logits, target, **options)
    logits[:, :, 7:60] = torch.nan
    loss, gradient = loss_and_gradient(function, logits, target, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    logits[0, 0, 80] = torch.inf
    assert torch.isnan(function(logits, target, **options))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 20])
def test_nearly_perfect_prediction(classes, dense):
    logits, target = inputs(1, classes, (12, 16), torch.float64, scale=0.5)
    one_hot = torch.nn.functional.one_hot(target, classes).movedim(-1, 1)
    options = {"upstream": torch.tensor(2.0**20), "smooth_nr": 0.0, "smooth_dr": 0.0}
    check((logits + 14 * one_hot).float(), one_hot if dense else target, **options)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", list(FORMS))
def test_small_coefficients_beside_large_ones(form, activation, dense):
    check_nearly_right(kernel_loss, form, activation, dense)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_immense_coefficients(overlap):
    check_immense_coefficients(OPERATORS.gradient_pass, overlap, DEVICE)


#: Each family of kernels: options, classes and whether the target is dense.
KINDS = [
    ({}, 2, False),
    ({}, 4, False),
    ({}, 9, False),
    ({}, 130, False),
    ({"focal_gamma": 2.0}, 5, False),
    ({"focal_gamma": 0.5}, 3, False),
    ({"label_smoothing": 0.1}, 9, False),
    ({"squared": True, "alpha": 0.5, "beta": 0.5}, 5, False),
    ({"activation": "sigmoid"}, 3, False),
    ({"activation": "sigmoid", "focal_gamma": 2.0}, 3, True),
    ({}, 2, True),
    ({}, 7, True),
    ({"soft_label": True}, 3, True),
    ({"focal_gamma": 2.0}, 7, True),
    ({}, 130, True),
]
DENSE_KINDS = [kind for kind in KINDS if kind[2]]
if WHERE == "interpreter":  # to which a size is nothing new, and which takes seconds for many classes
    KINDS, DENSE_KINDS = ([kind for kind in kinds if kind[1] < 100] for kinds in (KINDS, DENSE_KINDS))
KINDS, DENSE_KINDS = (pytest.mark.parametrize(("options", "classes", "dense"), x) for x in (KINDS, DENSE_KINDS))
#: Sizes of which whole loads are made, and of none.
TWO_SIZES = pytest.mark.parametrize("voxels", [93] if WHERE == "interpreter" else [96, 93])


def volumes_of_kind(classes, dense, voxels, dtype=torch.float32):
    logits, target = inputs(2, classes, (voxels,), dtype)
    if dense:
        target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).float() * 0.6 + 0.2
    return logits, target


@KINDS
@TWO_SIZES
def test_upstream_gradients_up_to_infinity(options, classes, dense, voxels):
    """Up to there the gradient times the factor; then infinite or NaN, never another number."""
    logits, target = volumes_of_kind(classes, dense, voxels)
    one = loss_and_gradient(kernel_ce_loss, logits, target, **options)[1]
    for exponent in (118,) if WHERE == "interpreter" else (40, 100, 118):
        upstream = torch.tensor(2.0**exponent)
        scaled = loss_and_gradient(kernel_ce_loss, logits, target, upstream=upstream, **options)[1]
        assert relative(scaled.double() * 2.0**-exponent, one) <= 1e-6
    for upstream in (float("inf"), float("-inf"), float("nan")):
        scaled = loss_and_gradient(kernel_ce_loss, logits, target, upstream=torch.tensor(upstream), **options)[1]
        assert not torch.isfinite(scaled).all(1).any()


@KINDS
@TWO_SIZES
def test_nan_is_nowhere_swallowed(options, classes, dense, voxels):
    logits, target = volumes_of_kind(classes, dense, voxels)
    logits[1, -1, 17] = torch.nan
    channels = slice(-1, None) if options.get("activation") == "sigmoid" else slice(None)
    assert torch.isnan(kernel_ce_loss(logits, target, reduction="none", **options)[1]).all()
    overlap = {name: x for name, x in options.items() if name not in ("focal_gamma", "label_smoothing")}
    losses = kernel_loss(logits, target, reduction="none", **overlap)
    assert torch.isnan(losses[1, channels]).all()
    assert torch.isfinite(losses[0]).all()
    if "squared" in options:
        return
    for counts in tk.overlap_counts(logits.to(DEVICE), target.to(DEVICE), backend=BACKEND, **overlap):
        assert torch.isnan(counts[1, channels]).all()
        assert torch.isfinite(counts[0]).all()


@DENSE_KINDS
@TWO_SIZES
@pytest.mark.parametrize(
    "bad", [255.0, float("nan")] if WHERE == "interpreter" else [255.0, -0.01, 1.001, float("nan")]
)
def test_targets_outside_of_0_and_1_give_nan(options, classes, dense, voxels, bad):
    logits, target = volumes_of_kind(classes, dense, voxels)
    expected = tk.reference.tversky_ce_loss(logits, target, **options)
    target[1, classes // 2, 50] = bad
    how = (*_passes(options, 2), False)
    for check in (0, 1):
        counts = OPERATORS.count_pass(logits.to(DEVICE), target.to(DEVICE), *how, check).cpu()
        poisoned = torch.isnan(counts[1, classes // 2, :3]).any()
        assert torch.isfinite(counts[0]).all()
        assert poisoned == (check == 1 or bad != bad)
    if bad == bad:
        found = kernel_ce_loss(logits, target, check_target=False, **options)
        truth = tk.reference.tversky_ce_loss(logits.double(), target.double(), check_target=False, **options)
        assert relative(found, truth) <= 2e-6
    weight = torch.ones(2, voxels)
    weight[1, 50] = 0
    assert torch.isfinite(kernel_ce_loss(logits, target, weight, **options))
    target[1, :, 50] = 255.0
    torch.testing.assert_close(
        kernel_ce_loss(logits, target, ignore_index=255, **options),
        tk.reference.tversky_ce_loss(logits, target, ignore_index=255, **options),
    )
    assert torch.isfinite(expected)


def _passes(options, cross_entropy):
    # voxel_weight, activation, ignore_index, overlap, cross_entropy, focal_gamma
    overlap = 1 if options.get("soft_label") else 0
    activation = 1 if options.get("activation") == "sigmoid" else 0
    return None, activation, None, overlap, cross_entropy, options.get("focal_gamma", 0.0)


@KINDS
def test_a_scan_of_gaps_between_logits(options, classes, dense):
    """The largest logit above the label's, to where nothing of the exponential is left."""
    gaps = torch.arange(0, 110, 0.1, dtype=torch.float64)
    if WHERE == "interpreter" or "TK_EMULATION_PTX" in os.environ:  # most of them where p is subnormal
        gaps = torch.cat((torch.arange(0, 110, 10.0), torch.arange(82, 106, 0.5))).double()
    gaps = gaps if classes < 100 else gaps[::8]
    logits = torch.zeros(1, classes, 2 * len(gaps), dtype=torch.float64)
    logits[:, -1, : len(gaps)], logits[:, 0, len(gaps) :] = gaps, gaps
    target = torch.zeros(1, 2 * len(gaps), dtype=torch.int64)
    if dense:
        target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).float()
    loss, found = loss_and_gradient(kernel_ce_loss, logits.float(), target, **options)
    true, expected = loss_and_gradient(tk.reference.tversky_ce_loss, logits, target, **options)
    assert relative(loss, true) <= 3e-6
    assert torch.isfinite(found).all()
    assert (found.double() - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_exponentials_and_weights_below_the_smallest_normal_number(classes):
    logits = torch.zeros(1, classes, 64)
    target = torch.zeros(1, 64, dtype=torch.uint8)
    for gap in (80.0, 86.0, 88.0, 95.0):
        logits[:, -1] = -gap
        options = {"smooth_nr": 0.0, "smooth_dr": 0.0, "reduction": "none"}
        found = kernel_loss(logits, target, **options)
        torch.testing.assert_close(found, tk.reference.tversky_loss(logits, target, **options))
        assert found[0, -1] == (1.0 if gap < 87 else 0.0)
    logits, target = inputs(1, classes, (64,))
    logits[..., 5] = torch.nan
    weight = torch.ones(1, 64)
    weight[:, 5] = 1e-42
    check_finite = loss_and_gradient(kernel_loss, logits, target, voxel_weight=weight)
    assert torch.isfinite(check_finite[0])
    assert check_finite[1][..., 5].eq(0).all()


@pytest.mark.parametrize("size", [1e4, 1e10, 3e38])
@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 20])
def test_huge_logits(classes, dtype, size):
    logits, target = inputs(1, classes, (64,))
    logits = logits.sign() * size
    logits[..., ::5] = 0
    check(logits.to(dtype), target, least_norm=1e-3)


def test_nothing():
    for shape in ((0, 3, 4), (2, 3, 0)):
        for reduction in ("mean", "none"):
            logits, target = torch.randn(shape), torch.zeros(shape[0], *shape[2:], dtype=torch.long)
            loss, gradient = loss_and_gradient(kernel_loss, logits, target, reduction=reduction)
            assert (loss == 0).all()
            assert gradient.shape == logits.shape


@pytest.mark.parametrize(("classes", "options"), [(2, {}), (3, {"ignore_index": 1}), (9, {"gamma": 0.75})])
def test_gradcheck_and_gradgradcheck(classes, options):
    logits, target = inputs(1, classes, (3,), torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kernel_loss(z, target, **options), logits)
    assert torch.autograd.gradgradcheck(lambda z: kernel_loss(z, target, **options), logits)


@pytest.mark.parametrize("classes", [2, 4, 20] if BACKEND == "triton" else [2, 4, 20, 36, 70, 118])
def test_many_blocks(classes):
    """Several groups of blocks a sample, not all alike, and more than one turn of each."""
    small = WHERE == "interpreter" and classes == 20  # it takes a second a tile
    space = (5, 24, 32) if small or classes > 20 else (20, 24, 72)
    check(*inputs(1, classes, space, torch.float32, torch.uint8))


@pytest.mark.parametrize("function", [kernel_loss, kernel_ce_loss])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("samples", "classes"), [(3, 3), (6, 22), (7, 2), (33, 9), (400, 2)])
def test_many_samples(samples, classes, reduction, function):
    """Sums and coefficients of so many, by one block or several."""
    space = (3, 8) if samples > 6 else (16, 24)
    logits, target = inputs(samples if WHERE != "interpreter" else min(samples, 33), classes, space)
    upstream = torch.rand(len(logits), classes, generator=torch.manual_seed(1)) if reduction == "none" else None
    check(logits, target, function=function, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_voxels_that_are_all_alike(classes):
    """Every addition to a sum rounds the same way; a sum of too many would be wrong by more than their roundings."""
    space = (512, 256, 256) if DEVICE == "cuda" else (8, 32, 32) if WHERE == "interpreter" else (64, 64, 64)
    logits = torch.zeros(1, classes, *space)
    logits[:, 0] = 0.3
    target = torch.zeros(1, *space, dtype=torch.uint8)
    counts = tk.overlap_counts(logits.to(DEVICE), target.to(DEVICE), backend=BACKEND)
    p = logits[0, :, 0, 0, 0].double().softmax(0) * target.numel()
    expected = (p[:1], p[1:], p[1:].sum()[None])
    for actual, wanted in zip((counts.tp[0, :1], counts.fp[0, 1:], counts.fn[0, :1]), expected, strict=True):
        assert ((actual.cpu().double() - wanted) / wanted).abs().max() <= 4e-6


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_many_blocks_of_dense_targets(activation, classes):
    logits, target = inputs(1, classes, (2, 12, 16) if WHERE == "interpreter" else (10, 24, 64))
    target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).float() * 0.8 + 0.2 / classes
    check(logits, target, function=kernel_ce_loss, activation=activation)


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3] if BACKEND == "triton" else [2, 3, 18, 37])
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
def test_many_blocks_of_contiguous_dense_targets(target_dtype, classes, dtype):
    """In whole loads, brought ahead where they are; of lanes some of which have a class less."""
    logits, target = inputs(1, classes, (2, 12, 16) if WHERE == "interpreter" else (10, 24, 32), dtype)
    target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).contiguous()
    if target_dtype.is_floating_point:
        target = target * 0.75 + 0.25 / 4
    target = target.to(target_dtype)
    check(logits, target)
    weight = torch.rand(1, *target.shape[2:]).round(decimals=1)  # some are 0
    target[:, :, 1] = 7  # in every class: not counted
    check(logits, target, function=kernel_ce_loss, voxel_weight=weight, ignore_index=7)


@pytest.mark.parametrize("classes", [7, 33, 130] if BACKEND == "triton" else [5, 7, 8, 9, 33, 64, 65, 118, 128, 145])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"focal_gamma": 1.5}, {"dense": True}])
def test_many_classes_of_other_options(options, classes):
    options = dict(options)
    logits, target = inputs(1, classes, (6, 10))
    if options.pop("dense", False):
        target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).to(torch.uint8)
        target[:, :, 2] = 7  # in every class: not counted
        options["ignore_index"] = 7
    check(logits, target, function=kernel_ce_loss, **options)


@pytest.mark.parametrize("classes", [2, 4, 20] if BACKEND == "triton" else [2, 3, 4, 7, 20, 118])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("spatial", [(4, 6, 8), (3, 5, 7)])
def test_targets_of_another_size(spatial, dense, activation, classes):
    """As deep supervision has them: the nearest voxels of a target and a weight twice, and not quite twice, as fine."""
    fine = tuple(2 * n - i for i, n in enumerate(spatial))
    logits, _ = inputs(2, classes, spatial)
    _, target = inputs(2, classes, fine)
    weight = torch.rand(2, *fine)
    weight[:, ::3] = 0
    if dense:
        target = torch.nn.functional.one_hot(target, classes).movedim(-1, 1).float() * 0.8 + 0.1
    options = {"loss": "tversky_ce", "activation": activation}
    for mode in ("nearest", "nearest-exact"):
        nearest = [
            torch.nn.functional.interpolate(x.float(), spatial, mode=mode).double()
            for x in (target if dense else target[:, None], weight[:, None])
        ]
        found_target = nearest[0] if dense else nearest[0][:, 0].long()
        truth = logits.detach().double().requires_grad_()
        expected = tk.reference.tversky_ce_loss(
            truth, found_target, voxel_weight=nearest[1][:, 0], activation=activation
        )
        there = logits.detach().to(DEVICE).requires_grad_()
        loss = tk.deep_supervision_loss(
            [there], target.to(DEVICE), voxel_weight=weight.to(DEVICE), backend=BACKEND, resample=mode, **options
        )
        assert relative(loss.cpu(), expected) <= 1e-6
        loss.backward()
        expected.backward()
        assert relative(there.grad.cpu(), truth.grad) <= 1e-6


# On a card every new combination is a compilation of Triton's, and in its interpreter a second or more.
@hypothesis.settings(max_examples=60 if BACKEND == "triton" else 250, deadline=None, derandomize=True)
@hypothesis.given(cases(most_classes=20, largest=5 if WHERE == "interpreter" else 11))
def test_any_combination(case):
    check_case(case, BACKEND, DEVICE, rounding=2.0 if WHERE == "interpreter" else 1.0)


@pytest.mark.parametrize("classes", [2, 4, 20] if BACKEND == "triton" else [2, 3, 4, 7, 20, 129])
@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "ce_class_weight": True},
        {"label_smoothing": 0.1, "ignore_index": 1, "reduction": "none"},
        {"label_smoothing": 0.1, "focal_gamma": 2.0},
        {"label_smoothing": 0.1, "squared": True, "alpha": 0.5, "beta": 0.5},
        {"focal_gamma": 2.0, "ignore_index": 1},
        {"focal_gamma": 0.7, "ce_class_weight": True},
        {"focal_gamma": 3.0, "squared": True, "alpha": 0.5, "beta": 0.5},
        {"activation": "sigmoid", "focal_gamma": 2.0, "ignore_index": 1},
        {"activation": "sigmoid", "focal_gamma": 0.7},
        {"activation": "sigmoid"},
        {"reduction": "none", "include_background": False, "batch": True},
    ],
)
def test_cross_entropy(classes, dtype, options):
    options = dict(options)
    if options.pop("ce_class_weight", False):
        options["ce_class_weight"] = [0.5 + c for c in range(classes)]
    check(*inputs(2, classes, (5, 16), dtype), function=kernel_ce_loss, **options)


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("function", "options"),
    [(f, o) for f in (kernel_loss, kernel_ce_loss) for o in ({}, {"ignore_index": 0}, {"weighted": True})]
    + [(kernel_ce_loss, {"focal_gamma": 2.0})],
)
def test_sigmoid_of_channels(function, options, target_dtype, dtype):
    """Most voxels are of those that need no more than products; some have huge logits, some soft targets."""
    options = dict(options)
    logits, _ = inputs(2, 3, (16, 24), dtype)
    target = (torch.rand(2, 3, 16, 24) < 0.3).to(target_dtype)
    logits = torch.where(target == 1, logits + 8, logits - 8)  # nearly right
    logits[:, :, 3::7, 5::11] *= 20
    logits[:, 1, 2] = 1e4
    if target_dtype == torch.float32:
        target[:, 2, ::5, ::3] = 0.25
    if options.pop("weighted", False):
        options["voxel_weight"] = torch.rand(2, 16, 24) * (torch.rand(2, 16, 24) < 0.8)
    if options.pop("ignore_index", None) is not None:  # of class indices alone, a class a voxel
        target = target.argmax(1)
        options["ignore_index"] = 0
    check(logits.to(dtype), target, function=function, activation="sigmoid", **options)


@pytest.mark.parametrize("classes", [1, 2, 4, 20] if BACKEND == "triton" else [1, 2, 3, 4, 5, 10, 20, 40])
@pytest.mark.parametrize(
    "target_dtype",
    [torch.uint8, torch.bool, torch.float32, torch.bfloat16]
    + ([] if BACKEND == "triton" else [torch.int16, torch.int64, torch.float64]),
)
@pytest.mark.parametrize("soft_label", [False, True])
def test_dense_targets(classes, target_dtype, soft_label):
    """The classes of a voxel side by side, as one_hot makes them, and contiguous."""
    logits, target = inputs(2, classes, (5, 16))
    one_hot = torch.nn.functional.one_hot(target, max(classes, 2)).movedim(-1, 1)[:, -classes:]
    if target_dtype.is_floating_point:
        one_hot = 0.5 * one_hot + 0.5 * torch.rand(one_hot.shape)
    activation = "sigmoid" if classes == 1 else "softmax"
    for dense in (one_hot, one_hot.contiguous()):
        check(logits, dense.to(target_dtype), activation=activation, soft_label=soft_label)


@pytest.mark.parametrize("classes", [2, 4, 20])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("function", "options"), [(kernel_loss, {"activation": "sigmoid"}), (kernel_ce_loss, {"ignore_index": 1})]
)
def test_squared(function, options, dense, classes):
    logits, target = inputs(2, classes, (5, 16))
    if dense:
        options = {k: v for k, v in options.items() if k != "ignore_index"}
        target = 0.7 * torch.nn.functional.one_hot(target, classes).movedim(-1, 1) + 0.3 / classes
    check(logits, target, function=function, alpha=0.5, beta=0.5, squared=True, **options)


@pytest.mark.parametrize("classes", [2, 3, 33] if BACKEND == "triton" else [2, 3, 4, 5, 9, 20, 33, 118])
@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("function", [kernel_loss, kernel_ce_loss])
@pytest.mark.parametrize("weighted", [False, True])
def test_squared_of_labels(weighted, function, dtype, classes):
    """Several blocks a sample, and the weights of labels where a cross-entropy wants them."""
    space = (5, 16) if WHERE == "interpreter" else (20, 24, 16) if classes < 33 else (5, 24, 16)
    logits, target = inputs(2, classes, space, dtype, torch.uint8)
    options = {"class_weight": torch.linspace(0.5, 1.5, classes).tolist()}
    if weighted:
        generator = torch.Generator().manual_seed(1)
        options.update(voxel_weight=torch.rand(target.shape, generator=generator), ignore_index=0)
    check(logits, target, function=function, alpha=0.5, beta=0.5, squared=True, **options)


@pytest.mark.parametrize("classes", [2, 3, 33] if BACKEND == "triton" else [2, 3, 4, 5, 6, 8, 9, 20, 33, 118])
@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing(weighted, dtype, classes):
    """Several blocks a sample, weights of classes and voxels, and a class that is impossible at a few of them."""
    space = (5, 16) if WHERE == "interpreter" else (20, 24, 16) if classes < 33 else (5, 24, 16)
    logits, target = inputs(2, classes, space, dtype, torch.uint8)
    options = {"label_smoothing": 0.2, "ce_class_weight": torch.linspace(0.5, 1.5, classes).tolist()}
    if weighted:
        generator = torch.Generator().manual_seed(1)
        options.update(voxel_weight=torch.rand(target.shape, generator=generator), ignore_index=0)
    check(logits, target, function=kernel_ce_loss, **options)
    logits[1, 0, ..., 3] = -torch.inf
    target[1, ..., 3] = 1
    loss, gradient = loss_and_gradient(kernel_ce_loss, logits, target, **options)
    assert torch.isposinf(loss)
    assert torch.isfinite(gradient[0]).all()


@pytest.mark.parametrize("classes", [2, 4, 20])
def test_cross_entropy_of_huge_logits(classes):
    logits, target = inputs(1, classes, (64,))
    check(logits.sign() * 1e4, target, function=kernel_ce_loss)
    check(logits.sign() * 1e4, target, function=kernel_ce_loss, activation="sigmoid")
    check(logits.sign() * 1e4, target, function=kernel_ce_loss, label_smoothing=0.1)


@pytest.mark.parametrize("classes", [2, 4, 20])
def test_cross_entropy_of_a_nearly_perfect_prediction(classes):
    logits, target = inputs(1, classes, (12, 16), torch.float64, scale=0.5)
    one_hot = torch.nn.functional.one_hot(target, classes).movedim(-1, 1)
    logits = (logits + 14 * one_hot).float()
    options = {"upstream": torch.tensor(2.0**20), "smooth_nr": 0.0, "smooth_dr": 0.0}
    check(logits, target, function=kernel_ce_loss, **options)
    check(logits, one_hot.half(), function=kernel_ce_loss, **options)
    check(logits, target, function=kernel_ce_loss, label_smoothing=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"loss": "tversky_ce", "reduction": "none"}])
@pytest.mark.parametrize("classes", [3, 20])
def test_head(classes, options, dtype, monkeypatch):
    """The passes over one block of logits after the other, in the memory of the one before."""
    monkeypatch.setattr(_linear, "ROUND", 16)
    monkeypatch.setattr(_linear, "BLOCK_BYTES", {"cpu": 0, "cuda": 0})
    generator = torch.Generator().manual_seed(0)
    head = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((2, 4, 5, 11), (classes, 4), (classes,))
    ]
    _, target = inputs(2, classes, (5, 11))
    there = [x.to(DEVICE).requires_grad_() for x in head]
    loss = tk.linear_tversky_loss(*there, target.to(DEVICE), backend=BACKEND, **options).sum()
    exact = [x.double().requires_grad_() for x in head]
    true_loss = tk.reference.linear_tversky_loss(*exact, target, **options).sum()
    assert relative(loss.cpu(), true_loss) <= 1e-6
    found, truth = (torch.autograd.grad(*pair) for pair in ((loss, there), (true_loss, exact)))
    for x, y in zip(found, truth, strict=True):
        assert relative(x.cpu(), y) <= 1.02 * relative(y.to(dtype), y) + 2e-6


REGION_OPTIONS = [
    (2, {}),
    (3, {"label_smoothing": 0.1, "focal_gamma": 2.0, "ignore_index": 1}),
    (5, {"squared": True, "alpha": 0.5, "beta": 0.5}),
    (3, {"activation": "sigmoid"}),
    (4, {"activation": "sigmoid", "focal_gamma": 1.5}),
    (33, {}),
]


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize(("classes", "options"), REGION_OPTIONS)
def test_regions(classes, options, by_class):
    """Runs of one region and voxels of many, against the reference."""
    logits, target = inputs(2, classes, (6, 7, 9))
    shape = (2, classes, 6, 7, 9) if by_class else (2, 6, 7, 9)
    for regions in (
        torch.arange(target.numel() // 2).view(1, 6, 7, 9).expand(2, 6, 7, 9) // 90,
        torch.randint(-1, 5, shape),
    ):
        ids = regions.unsqueeze(1).expand(shape) if by_class and regions.dim() == 4 else regions
        check(logits, target, function=kernel_ce_loss, regions=ids, num_regions=5, reduction="none", **options)


@pytest.mark.parametrize("dtype", LOGITS_DTYPES, ids=str)
@pytest.mark.parametrize(("classes", "regions"), [(1, 2), (2, 1), (2, 300), (7, 40), (20, 3), (140, 7)])
def test_regions_of_any_number_and_type(classes, regions, dtype):
    activation = "sigmoid" if classes == 1 else "softmax"
    logits, target = inputs(2, classes, (6, 5, 11), dtype)
    target = target if classes > 1 else torch.randint(0, 2, target.shape)
    ids = torch.randint(0, regions, target.shape, dtype=torch.int16)
    how = {"regions": ids, "num_regions": regions, "activation": activation}
    check(logits, target, function=kernel_ce_loss, **how)


def test_regions_of_any_layout():
    """channels_last, dense targets, weights, every second voxel, and over the logits."""
    logits, target = inputs(2, 3, (6, 4, 10))
    ids = torch.randint(-1, 4, target.shape)
    weight = torch.rand(target.shape)
    how = {"num_regions": 4, "function": kernel_ce_loss}
    check(logits.contiguous(memory_format=torch.channels_last_3d), target, regions=ids, **how)
    check(logits, torch.rand(logits.shape), regions=ids, soft_label=True, voxel_weight=weight, **how)
    check(logits[..., ::2], target[..., ::2], regions=ids[..., ::2], **how)
    fresh = loss_and_gradient(kernel_ce_loss, logits, target, regions=ids, num_regions=4)[1]
    z = logits.to(DEVICE).requires_grad_()
    kernel_ce_loss(z * 1, target, regions=ids, num_regions=4, inplace_backward=True).backward()
    torch.testing.assert_close(z.grad.cpu(), fresh, atol=0, rtol=0)


@pytest.mark.parametrize("by_class", [False, True])
def test_regions_of_another_size(by_class):
    """As deep supervision has them: the nearest voxel's region."""
    logits, _ = inputs(2, 3, (4, 5, 6))
    _, target = inputs(2, 3, (8, 9, 12))
    ids = torch.randint(-1, 4, (2, 3, 8, 9, 12) if by_class else target.shape)
    how = {"loss": "tversky_ce", "num_regions": 4}
    true_loss, true = loss_and_gradient(
        lambda z: tk.deep_supervision_loss([z], target, regions=ids, backend="reference", **how), logits.double()
    )
    there = {"target": target.to(DEVICE), "regions": ids.to(DEVICE), "backend": BACKEND}
    loss, gradient = loss_and_gradient(lambda z: tk.deep_supervision_loss([z], **there, **how), logits.to(DEVICE))
    assert relative(loss.cpu(), true_loss) <= 1e-6
    assert relative(gradient.cpu(), true) <= 1e-6


def test_what_is_in_no_region_may_be_anything():
    logits, target = inputs(2, 3, (5, 40))
    ids = torch.randint(-1, 3, target.shape)
    logits.movedim(1, -1)[ids < 0] = float("nan")
    how = {"regions": ids, "num_regions": 3}
    loss, gradient = loss_and_gradient(kernel_ce_loss, logits, target, **how)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert (gradient.movedim(1, -1)[ids < 0] == 0).all()


def test_a_region_out_of_range_gives_nan():
    logits, target = inputs(2, 3, (5, 40))
    ids = torch.zeros_like(target)
    ids[0, 3, 7] = 2
    found = tk.overlap_counts(
        logits.to(DEVICE), target.to(DEVICE), regions=ids.to(DEVICE), num_regions=2, backend=BACKEND, check_target=False
    )
    assert torch.isnan(found.tp[0]).any()
    assert torch.isfinite(found.tp[1]).all()


def test_regions_of_many_blocks():
    """Neighbouring slabs, and voxels at random, over more tiles than there are blocks."""
    space = (10, 40, 50) if WHERE == "interpreter" else (40, 60, 70)  # which takes half a minute otherwise
    logits, target = inputs(1, 2, space)
    for ids in (torch.arange(target.numel()).view(target.shape) // 3001, torch.randint(-1, 56, target.shape)):
        check(logits, target, function=kernel_ce_loss, regions=ids, num_regions=56)


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize(
    ("classes", "options"),
    [(c, o) for c, o in [*REGION_OPTIONS, (150, {"label_smoothing": 0.2})] if o.get("activation") is None],
)
def test_annotated(classes, options, regional):
    logits, target = inputs(2, classes, (6, 7, 9))
    annotated = torch.rand(2, classes, generator=torch.Generator().manual_seed(classes)) < 0.6
    annotated[:, 0] = True
    annotated[1, classes - 1] = False  # one at the least
    for n in range(2):
        target[n][~annotated[n][target[n].long()]] = 0
    logits[0, :, 0, 0] *= 60
    how = {"regions": torch.randint(-1, 4, target.shape), "num_regions": 4} if regional else {}
    check(logits, target, function=kernel_ce_loss, annotated=annotated, **how, **options)
