"""The CPU kernels, every instruction set, against the float64 reference."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from combinations import cases, check_case, check_second_derivatives
from common import (
    CPU_CAPABILITIES,
    FORMS,
    INDEX_DTYPES,
    LOGITS_DTYPES,
    check_against_truth,
    check_immense_coefficients,
    check_nearly_right,
    inputs,
    loss_and_gradient,
    truth,
)

import tversky_kernels as tk
from tversky_kernels._ops import ops

WIDEST = max(CPU_CAPABILITIES.values())


def cpu(logits, target, **options):
    return tk.tversky_loss(logits, target, backend="cpu", **options)


@pytest.mark.parametrize("dtype", LOGITS_DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 33, 118])
def test_classes_and_dtypes(capability, classes, dtype):
    check_against_truth(cpu, *inputs(2, classes, (7, 11, 13), dtype))


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 33])
@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("dtype", LOGITS_DTYPES)
def test_other_activations(capability, activation, classes, dtype):
    logits, target = inputs(2, classes, (5, 7, 11), dtype)
    check_against_truth(cpu, logits.sigmoid() if activation == "none" else logits, target, activation=activation)


@pytest.mark.parametrize("target_dtype", [*INDEX_DTYPES, torch.bool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_dtypes(capability, target_dtype, dtype):
    logits, target = inputs(1, 2, (9, 10, 11), dtype, target_dtype)
    check_against_truth(cpu, logits, target)
    check_against_truth(cpu, logits, target[:, None])


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("loss", ["tversky_loss", "tversky_ce_loss"])
def test_labels_of_one_byte(capability, loss, layout, dtype, classes):
    """The kernels for few classes read them where they are; all others are converted first."""
    logits, target = inputs(2, classes, (11, 13, 17), dtype)
    logits = logits.contiguous(memory_format=layout)
    for target_dtype in (torch.uint8, torch.int8, torch.int32) + ((torch.bool,) if classes == 2 else ()):
        check_against_truth(getattr(tk, loss), logits, target.to(target_dtype), reference=getattr(tk.reference, loss))


@pytest.mark.parametrize(
    ("variant", "classes", "spatial", "dtype"),
    [
        ("softmax", 2, (128, 128, 66), torch.float32),
        ("softmax", 2, (128, 128, 130), torch.float16),
        ("softmax", 4, (80, 80, 84), torch.float64),
        ("softmax", 4, (81, 83, 79), torch.float32),
        ("softmax", 14, (64, 64, 76), torch.bfloat16),
        ("softmax", 14, (64, 63, 38), torch.float32),
        ("channels_last", 4, (80, 84, 80), torch.float32),
        ("channels_last", 3, (112, 112, 113), torch.bfloat16),
        ("channels_last", 6, (64, 64, 90), torch.float32),
        ("channels_last", 14, (64, 63, 38), torch.float32),
        ("channels_last", 16, (64, 64, 33), torch.float32),
        ("channels_last", 33, (64, 64, 33), torch.bfloat16),
        ("sigmoid", 4, (80, 84, 80), torch.float32),
        ("dense", 4, (80, 84, 80), torch.float32),
    ],
)
def test_a_large_fresh_gradient_is_the_one_in_place(capability, variant, classes, spatial, dtype):
    """From 8 MiB on a fresh one is stored past the caches, where its rows are aligned."""
    logits, target = inputs(1, classes, spatial, dtype, torch.uint8)
    assert logits.numel() * logits.itemsize >= 8 << 20
    if variant == "channels_last":
        logits = logits.contiguous(memory_format=torch.channels_last_3d)
    elif variant == "dense":
        target = torch.nn.functional.one_hot(target.long(), classes).movedim(-1, 1).to(torch.uint8)
    activation = "sigmoid" if variant == "sigmoid" else "softmax"
    gradients = []
    for inplace in (False, True):
        z = logits * torch.ones((), dtype=dtype, requires_grad=True)
        loss = cpu(z, target, activation=activation, inplace_backward=inplace)
        (gradient,) = torch.autograd.grad(loss * 2.0**20, z)  # float16 would be 0 without
        assert (gradient.data_ptr() == z.data_ptr()) == inplace
        gradients.append(gradient)
    assert gradients[0].isfinite().all()
    assert gradients[0].ne(0).sum() > gradients[0].numel() // 2
    assert torch.equal(*gradients)


@pytest.mark.parametrize("classes", [2, 4, 5])
@pytest.mark.parametrize(
    ("target_dtype", "label"), [(torch.uint8, 255), (torch.uint8, 5), (torch.int8, -1), (torch.int8, -128)]
)
@pytest.mark.parametrize("at", [0, 63, 1023, 1024, 2000, 2430])
def test_one_bad_label_among_good_ones(capability, at, target_dtype, label, classes):
    logits, target = inputs(1, classes, (2431,), target_dtype=target_dtype)
    target[0, at] = label
    with pytest.raises(ValueError, match=f"label.* {label}$|{label} is outside|got {label}"):
        cpu(logits, target)
    assert cpu(logits, target, check_target=False).isnan()
    check_against_truth(cpu, logits, target, ignore_index=label)


@pytest.mark.parametrize("spatial", [(), (1,), (1, 1, 1), (17,), (1, 31, 1), (2, 3, 5, 7), (64,), (4099,), (13, 79, 7)])
def test_spatial_sizes(capability, spatial):
    check_against_truth(cpu, *inputs(3, 3, spatial))
    check_against_truth(cpu, *inputs(3, 7, spatial, torch.bfloat16))


def test_a_thousand_classes(capability):
    check_against_truth(cpu, *inputs(1, 1000, (3, 5, 7), target_dtype=torch.int16))
    check_against_truth(cpu, *inputs(2, 999, (70,), torch.float16, target_dtype=torch.int32))


def test_many_chunks_and_tiles(capability):
    check_against_truth(cpu, *inputs(1, 2, (61, 62, 63), target_dtype=torch.uint8))
    check_against_truth(cpu, *inputs(2, 14, (40, 41, 42), target_dtype=torch.uint8))


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(
        memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    ),
    "sliced classes": lambda x: torch.cat((x, x), 1)[:, : x.size(1)],
    "sliced batch": lambda x: torch.stack((x, x), 1)[:, 0],
    "sliced space": lambda x: torch.cat((x, x), -1)[..., : x.size(-1)],
    "every second voxel": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "permuted": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "flipped classes": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset by one": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spatial", [(6, 7, 9), (12, 17)])
def test_layouts(capability, layout, dtype, spatial):
    logits, target = inputs(2, 5, spatial, dtype)
    strided = LAYOUTS[layout](logits)
    assert torch.equal(strided, logits)
    assert layout == "offset by one" or not strided.is_contiguous()
    for options in ({}, {"activation": "sigmoid"}):
        expected = loss_and_gradient(cpu, logits, target, **options)
        loss, gradient = loss_and_gradient(cpu, strided, target, **options)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])
    if layout == "channels_last":
        assert gradient.stride() == strided.stride()


@pytest.mark.parametrize("classes", [5, 8, 9, 14, 16, 17, 33, 118])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_classes_side_by_side(capability, classes, dtype):
    """The same bits as contiguous, with every option of the kernels for one label a voxel."""
    logits, target = inputs(2, classes, (7, 11, 31), dtype, torch.uint8)  # two whole tiles and a rest
    memory = torch.stack((logits.movedim(1, -1),) * 2, 1)  # of every second sample: empty_like leaves no gaps
    layouts = {
        "channels_last": lambda one: logits.contiguous(memory_format=torch.channels_last_3d) * one,
        "with gaps": lambda one: (memory * one)[:, 0].movedim(-1, 1),
    }
    for loss, options in (
        (tk.tversky_loss, {}),
        (tk.tversky_ce_loss, {"voxel_weight": torch.rand(target.shape), "ignore_index": 2}),
        (tk.tversky_loss, {"squared": True, "alpha": 0.5, "beta": 0.5}),
        (tk.tversky_ce_loss, {"label_smoothing": 0.1}),
        (tk.tversky_ce_loss, {"focal_gamma": 2.0}),
    ):
        expected = loss_and_gradient(loss, logits, target, backend="cpu", **options)
        assert expected[1].ne(0).any()
        for layout, inplace in itertools.product(layouts, (False, True)):
            z = layouts[layout](torch.ones((), dtype=dtype, requires_grad=True))
            assert z.stride(1) == 1
            found = loss(z, target, backend="cpu", inplace_backward=inplace, **options)
            (gradient,) = torch.autograd.grad(found, z)
            assert torch.equal(found, expected[0])
            assert torch.equal(gradient, expected[1])
            assert (gradient.data_ptr() == z.data_ptr()) == (inplace and layout == "channels_last")


@pytest.mark.parametrize("classes", [2, 3, 4, 6, 8, 14, 17, 33, 118])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_targets_as_one_hot_leaves_them(capability, classes, dtype):
    """The classes of a voxel lie side by side: the same bits as contiguous, of every type."""
    logits, labels = inputs(2, classes, (5, 7, 13), dtype, torch.int64)  # whole vectors and a rest
    one_hot = torch.nn.functional.one_hot(labels, classes).movedim(-1, 1)
    one_hot[:, :, 1:3] = 7  # of no class: an ignore_index
    integers = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    for target_dtype in (*integers, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        options = {} if target_dtype == torch.bool else {"ignore_index": 7}
        target = one_hot.to(target_dtype)
        if target_dtype.is_floating_point:
            target = torch.where(target == 7, target, target * 0.8 + 0.1)
            options["soft_label"] = True
        assert target.stride(1) == 1
        for activation in ("softmax", "sigmoid"):
            expected = loss_and_gradient(cpu, logits, target.contiguous(), activation=activation, **options)
            found = loss_and_gradient(cpu, logits, target, activation=activation, **options)
            assert expected[1].ne(0).any()
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def test_expanded_inputs(capability):
    logits, target = inputs(1, 3, (5, 6, 7))
    many = logits.expand(4, -1, -1, -1, -1)
    check_against_truth(cpu, many, target.expand(4, -1, -1, -1))
    one_slice = torch.randint(0, 3, (4, 1, 1, 7)).expand(-1, 5, 6, -1)
    check_against_truth(cpu, many, one_slice)


@pytest.mark.parametrize("ignore_index", [0, 1, -1, 255, -(2**40)])
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("classes", [2, 4, 9])
def test_ignore_index(capability, ignore_index, target_dtype, classes):
    logits, target = inputs(2, classes, (9, 10, 11), target_dtype=target_dtype)
    limits = torch.iinfo(target_dtype)
    if limits.min <= ignore_index <= limits.max:
        target[:, ::3] = ignore_index
    check_against_truth(cpu, logits, target, ignore_index=ignore_index)
    _, gradient = loss_and_gradient(cpu, logits, target, ignore_index=ignore_index)
    assert (gradient.movedim(1, -1)[target.long() == ignore_index] == 0).all()


@pytest.mark.parametrize(
    ("classes", "activation"), [(2, "softmax"), (4, "softmax"), (9, "softmax"), (1, "sigmoid"), (3, "sigmoid")]
)
def test_what_does_not_count_may_be_nan(capability, classes, activation):
    logits, target = inputs(1, classes, (300,))
    target[:, 7:200] = 99
    weight = torch.ones(1, 300)
    weight[:, 250:] = 0
    expected = loss_and_gradient(cpu, logits, target, ignore_index=99, voxel_weight=weight, activation=activation)
    logits[:, :, 7:200] = torch.nan
    logits[:, :, 250:] = torch.inf
    loss, gradient = loss_and_gradient(cpu, logits, target, ignore_index=99, voxel_weight=weight, activation=activation)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
def test_a_nan_that_counts_is_seen(capability, classes):
    for bad in (torch.nan, torch.inf):
        for at in range(classes):
            logits, target = inputs(1, classes, (130,))
            logits[0, at, 77] = bad
            assert torch.isnan(cpu(logits, target))


def test_minus_infinity_is_probability_zero(capability):
    for classes in (2, 3, 9):
        logits, target = inputs(1, classes, (130,))
        target[target == 1] = 0
        logits[:, 1] = -torch.inf
        finite = torch.where(torch.isinf(logits), -1e6, logits)
        assert torch.equal(cpu(logits, target, reduction="none"), cpu(finite, target, reduction="none"))


@pytest.mark.parametrize(
    "weight_dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8]
)
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_voxel_weight(capability, weight_dtype, classes):
    logits, target = inputs(2, classes, (9, 10, 11))
    weight = (torch.rand(2, 9, 10, 11) * 4).to(weight_dtype)
    check_against_truth(cpu, logits, target, voxel_weight=weight)
    check_against_truth(cpu, logits, target, voxel_weight=weight[:, None], ignore_index=1, batch=True)
    check_against_truth(cpu, logits, target, voxel_weight=weight, activation="sigmoid")


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
@pytest.mark.parametrize("dtype", LOGITS_DTYPES)
def test_huge_logits(capability, classes, dtype):
    logits, target = inputs(1, classes, (500,), dtype)
    check_against_truth(cpu, (logits.sign() * 1e4).to(dtype), target, least_norm=1e-3)
    check_against_truth(cpu, (logits * 1e3).to(dtype), target, least_norm=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 4, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nearly_perfect_prediction(capability, classes, dtype):
    """1 - TI around 1e-6 without smoothing: loss and gradient keep the accuracy that they have everywhere."""
    logits, target = inputs(1, classes, (40, 40, 40), torch.float64, scale=0.5)
    logits = (logits + 14 * torch.nn.functional.one_hot(target, classes).movedim(-1, 1)).to(dtype)
    options = {"smooth_nr": 0.0, "smooth_dr": 0.0}
    upstream = torch.tensor(2.0**30)  # as a gradient scaler would, or float16 has no number for the gradient
    expected, _ = truth(logits, target, **options)
    assert 1e-7 < expected.item() < 2e-5
    check_against_truth(cpu, logits, target, upstream=upstream, **options)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", list(FORMS))
def test_small_coefficients_beside_large_ones(capability, form, activation, dense):
    check_nearly_right(cpu, form, activation, dense)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_immense_coefficients(capability, overlap):
    check_immense_coefficients(ops.gradient_pass, overlap)


def test_float16_of_the_issues_size(capability):
    logits, target = inputs(1, 4, (96, 96, 96), torch.float16, torch.uint8)
    check_against_truth(cpu, logits, target)


def test_exponential_to_one_ulp(capability):
    """One voxel, two classes: fp of class 0 is e^-x / (1 + e^-x), where e^-x decides the error."""
    for dtype, ulp in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        # Exact in the type, so that the difference of the logits is.
        x = torch.linspace(0, 80, 20001, dtype=dtype)
        logits = torch.stack((-x, torch.zeros_like(x)), 1)[..., None]  # (N, 2, 1)
        counts = ops.count_pass(logits, torch.ones(len(x), 1, dtype=torch.uint8), None, 0, None, 0, 0, 0.0, False, 2)
        e = torch.exp(-x.to(torch.float64)) if dtype == torch.float32 else torch.exp(-x)
        expected = e / (1 + e)
        error = ((counts[:, 0, 1] - expected).abs() / expected).max().item()
        assert error <= 2.5 * ulp, error / ulp  # exponential, sum, reciprocal and product each round once


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0, "beta": 1.0},
        {"alpha": [0.1, 0.2, 0.3], "beta": (0.9, 0.8, 0.7)},
        {"class_weight": torch.tensor([0.5, 0.0, 2.0])},
        {"gamma": 0.5},
        {"gamma": 4 / 3, "smooth_nr": 1.0, "smooth_dr": 1.0},
        {"smooth_nr": 0.0, "smooth_dr": 0.0},
        {"smooth_nr": 3.0, "smooth_dr": 1.0},
        {"include_background": False},
        {"batch": True},
        {"batch": True, "include_background": False, "gamma": 2.0},
        {"absent": "zero", "ignore_index": 2},
        {"absent": "skip", "ignore_index": 2},
        {"absent": "skip", "ignore_index": 2, "batch": True},
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_table_options(options, reduction):
    logits, target = inputs(3, 3, (6, 7, 8))
    shape = tk.reference.tversky_loss(logits, target, reduction=reduction, **options).shape
    upstream = torch.randn(shape, dtype=torch.float64)
    check_against_truth(cpu, logits, target, upstream=upstream, reduction=reduction, **options)
    check_against_truth(cpu, logits.double(), target, upstream=upstream, reduction=reduction, **options)


@pytest.mark.parametrize("smooth", [0.0, 1e-5])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_perfect_prediction_has_no_infinite_gradient(smooth, gamma):
    target = torch.arange(12).view(1, 12) % 3
    logits = 1e4 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    loss, gradient = loss_and_gradient(cpu, logits, target, gamma=gamma, smooth_nr=smooth, smooth_dr=smooth)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_nothing(capability):
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        for reduction in ("mean", "sum", "none"):
            logits = torch.randn(shape)
            target = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
            expected, _ = truth(logits, target, reduction=reduction)
            loss, gradient = loss_and_gradient(cpu, logits, target, reduction=reduction)
            assert torch.equal(loss.double(), expected)
            assert gradient.shape == logits.shape
    logits, target = inputs(2, 3, (100,))
    loss, gradient = loss_and_gradient(cpu, logits, torch.full_like(target, 7), ignore_index=7)
    assert loss.item() == 0
    assert (gradient == 0).all()


def test_same_bits_for_any_number_of_threads(capability, threads):
    logits, target = inputs(2, 5, (40, 50, 60))
    results = []
    for count in (1, 2, 3, 8, 1):
        threads(count)
        results.append(loss_and_gradient(cpu, logits, target, reduction="none", upstream=torch.ones(2, 5)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_capability_can_only_be_narrowed():
    widest = ops.cpu_capability(WIDEST)
    assert ops.cpu_capability(0) == 0
    assert ops.cpu_capability(WIDEST) == widest == ops.cpu_capability(None)


def test_loss_on_128_cubed_to_one_in_a_million():
    logits, target = inputs(1, 2, (128, 128, 128), target_dtype=torch.uint8)
    expected = tk.reference.tversky_loss(logits.double(), target).item()
    for capability in CPU_CAPABILITIES.values():
        ops.cpu_capability(capability)
        assert cpu(logits, target).item() == pytest.approx(expected, rel=1e-6)
    ops.cpu_capability(WIDEST)


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
@hypothesis.given(cases(), st.sampled_from(list(CPU_CAPABILITIES.values())))
def test_any_combination(case, capability):
    ops.cpu_capability(capability)
    try:
        check_case(case, "cpu")
    finally:
        ops.cpu_capability(WIDEST)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(cases(tiny=True))
def test_second_derivatives_of_any_combination(case):
    check_second_derivatives(case, "cpu")
