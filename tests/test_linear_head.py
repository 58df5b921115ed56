"""A loss with its head: the numbers of convolution and loss one after the other, without the logits."""

from __future__ import annotations

import copy

import pytest
import torch
from common import LOGITS_DTYPES, inputs, relative

import tversky_kernels as tk
from tversky_kernels import _linear
from tversky_kernels._ops import ops


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 voxels, so that a small volume has many and the last is not full."""
    monkeypatch.setattr(_linear, "ROUND", 7)
    monkeypatch.setattr(_linear, "BLOCK_BYTES", {"cpu": 0, "cuda": 0})


def head_inputs(samples, channels, classes, spatial, dtype=torch.float32, seed=0, with_bias=True):
    generator = torch.Generator().manual_seed(seed)
    features, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((samples, channels, *spatial), (classes, channels), (classes,))
    )
    _, target = inputs(samples, classes, spatial, seed=seed)
    return features, weight, bias if with_bias else None, target


def fused(*arguments, **options):
    return tk.linear_tversky_loss(*arguments, backend="cpu", **options)


def gradients_of(function, features, weight, bias, target, upstream=None, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (features, weight, bias) if x is not None]
    loss = function(*leaves, *(() if len(leaves) == 3 else (None,)), target, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def in_double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(features, weight, bias, target, upstream=None, **options):
    """The loss to float32's digits, and gradients too; in half precision, to one rounding of the true gradient."""
    exact = {name: in_double(x) for name, x in options.items()}
    run = (features, weight, bias, target, upstream)
    true = gradients_of(tk.reference.linear_tversky_loss, *map(in_double, run), **exact)
    found = gradients_of(fused, *run, **options)
    tiny = 1e-12 if features.dtype == torch.float64 else 2e-6
    least = 1e-3 * true[1].norm().item()  # what is nearly nothing has no relative error
    assert found[0].dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    assert found[0].shape == true[0].shape
    assert relative(found[0], true[0], least_norm=1.0) <= tiny
    for x, truth in zip(found[1:], true[1:], strict=True):
        assert x.shape == truth.shape
        assert x.dtype == features.dtype
        rounded_once = relative(truth.to(x.dtype), truth, least)
        assert relative(x, truth, least) <= tiny + (1.02 * rounded_once if x.dtype.itemsize == 2 else 0.0)


@pytest.mark.parametrize("dtype", LOGITS_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 5, 33, 118])
@pytest.mark.parametrize("loss", ["tversky", "tversky_ce"])
def test_against_float64(loss, classes, dtype, small_blocks):
    check(*head_inputs(2, 6, classes, (3, 4, 5), dtype), loss=loss)


OPTIONS = [
    {"activation": "sigmoid", "reduction": "none", "gamma": 0.75},
    {"activation": "none", "reduction": "sum"},
    {"alpha": [0.1, 0.5, 0.9], "class_weight": [1, 2, 0], "ignore_index": 1, "reduction": "none", "batch": True},
    {"include_background": False, "absent": "skip", "batch": True, "smooth_nr": 1.0},
    {"loss": "tversky_ce", "label_smoothing": 0.1, "ce_class_weight": [1.0, 2.0, 0.5], "reduction": "none"},
    {"loss": "tversky_ce", "focal_gamma": 2.0, "batch": True, "activation": "sigmoid"},
    {"loss": "tversky_ce", "alpha": 0.5, "beta": 0.5, "squared": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["index", "one-hot", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
def test_options_targets_and_weights(options, form, weighted, small_blocks):
    torch.manual_seed(0)
    options = dict(options)
    features, weight, bias, target = head_inputs(2, 4, 3, (5, 6))
    if form != "index":
        target = torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
        options.pop("ignore_index", None)
        if form == "soft":
            target = 0.7 * target + 0.3 * torch.rand(target.shape)
            options["soft_label"] = not options.get("squared", False)
    if weighted:
        options["voxel_weight"] = torch.rand(2, 1, 5, 6)
    shape = tk.linear_tversky_loss(features, weight, bias, target, **options).shape
    check(features, weight, bias, target, upstream=torch.rand(shape), **options)


def test_one_channel_is_the_binary_case(small_blocks):
    features, weight, bias, _ = head_inputs(2, 4, 1, (5, 6))
    check(features, weight, bias, torch.randint(0, 2, (2, 5, 6)), activation="sigmoid")


def test_without_bias(small_blocks):
    check(*head_inputs(1, 4, 3, (5, 6), with_bias=False))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted"])
def test_layouts(layout):
    features, weight, bias, target = head_inputs(2, 4, 3, (6, 5, 8))
    expected = gradients_of(fused, features, weight, bias, target)
    x = features.detach()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "sliced":
        x = torch.cat((x, x), -1)[..., :8]
    else:
        x = x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    x.requires_grad_()
    loss = fused(x, weight, bias, target)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])
    if layout == "channels_last":
        assert gradient.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("spatial", [(), (0,), (3, 0, 2)])
@pytest.mark.parametrize("samples", [0, 2])
def test_few_or_no_voxels(samples, spatial):
    check(*head_inputs(samples, 4, 3, spatial))


def test_gradcheck_and_gradgradcheck(small_blocks):
    *head, target = head_inputs(2, 3, 3, (3, 5), torch.float64)
    weight = torch.rand(2, 3, 5, dtype=torch.float64)
    for options in ({}, {"loss": "tversky_ce", "gamma": 2.0, "smooth_nr": 1e-2, "smooth_dr": 1.0}):

        def function(*head, options=options):
            return fused(*head, target, voxel_weight=weight, **options).square()

        assert torch.autograd.gradcheck(function, head)
        assert torch.autograd.gradgradcheck(function, head)


def test_second_derivative_where_features_come_from_the_weight(small_blocks):
    _, weight, bias, target = head_inputs(1, 3, 3, (4,), torch.float64)
    features = torch.randn(1, 3, 4, dtype=torch.float64)

    def tied(weight, bias):
        return fused(torch.einsum("ck,nkv->ncv", weight, features), weight, bias, target).square()

    assert torch.autograd.gradgradcheck(tied, (weight, bias))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(wanted):
    head = head_inputs(1, 4, 3, (5, 6))
    *leaves, target = head
    for x, needed in zip(leaves, wanted, strict=True):
        x.requires_grad_(needed)
    fused(*leaves, target).backward()
    assert [x.grad is not None for x in leaves] == list(wanted)
    one = wanted.index(True)
    expected = gradients_of(fused, *head)[1 + one]
    torch.testing.assert_close(leaves[one].grad, expected)


def test_inplace_backward(small_blocks):
    features, weight, bias, target = head_inputs(2, 4, 3, (5, 6))
    expected = gradients_of(fused, features, weight, bias, target)
    x = features.clone()
    loss = fused(x, weight, bias, target, inplace_backward=True)
    found = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    assert found[0].data_ptr() == x.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, small_blocks):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *a: tk.linear_tversky_loss(*a, loss="tversky_ce", inplace_backward=True), fullgraph=True, dynamic=dynamic
    )
    for spatial in ((5, 6), (4, 9)):
        arguments = head_inputs(2, 4, 3, spatial)
        expected = gradients_of(fused, *arguments, loss="tversky_ce")
        found = gradients_of(compiled, *arguments)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_opcheck(small_blocks):
    features, weight, bias, target = (x.detach() for x in head_inputs(2, 4, 3, (5, 6)))
    how = (torch.rand(2, 5, 6), 0, 1, 0, 1, 0.0, False)
    coefficients = torch.rand(2, 3, 4, dtype=torch.float64)
    torch.library.opcheck(ops.linear_count_pass.default, (features, weight, bias, target, *how, 2))
    of_loss = (torch.ones(()), coefficients)
    for to_features in (False, True):
        arguments = (*of_loss, features, weight, bias, target, *how, to_features)
        torch.library.opcheck(ops.linear_gradient_pass.default, arguments)
    torch.library.opcheck(ops.linear_gradient_pass_.default, (features, *of_loss, weight, None, target, *how))


def test_functional_gradient():
    features, weight, bias, target = head_inputs(1, 4, 3, (5, 6))
    found = torch.func.grad(lambda w: fused(features, w, bias, target))(weight)
    torch.testing.assert_close(found, gradients_of(fused, features, weight, bias, target)[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    features, weight, bias, target = head_inputs(1, 4, 3, (5, 6))
    half = gradients_of(fused, *(x.detach().to(dtype) for x in (features, weight, bias)), target)
    with torch.autocast("cpu", dtype):
        loss = fused(features, weight, bias, target)
    loss.backward()
    assert torch.equal(loss.detach(), half[0])
    for x, expected in zip((features, weight, bias), half[1:], strict=True):
        assert x.grad.dtype == torch.float32
        assert torch.equal(x.grad, expected.float())


def test_autocast_leaves_float64_alone():
    *head, target = head_inputs(1, 4, 3, (5, 6), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(*head, target).dtype == torch.float64


def test_a_target_that_requires_a_gradient_gets_one():
    features, weight, bias, target = head_inputs(1, 4, 3, (5,), torch.float64)
    soft = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).double().requires_grad_()
    tk.linear_tversky_loss(features, weight, bias, soft).backward()
    assert soft.grad.abs().max() > 0


def test_no_tensor_of_the_logits_size_is_made():
    """What torch allocates, forward and backward, is the features' gradient and blocks."""
    features, weight, bias, target = head_inputs(1, 2, 256, (32, 32, 32))
    logits_bytes, block_bytes = 256 * 32**3 * 4, _linear.BLOCK_BYTES["cpu"]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    with Watch():
        fused(features, weight, bias, target).backward()
    assert largest <= max(block_bytes, features.nbytes) < logits_bytes // 3


def test_same_input_same_bits():
    arguments = head_inputs(2, 8, 5, (17, 9, 33))
    first = gradients_of(fused, *arguments)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients_of(fused, *arguments), first, strict=True))


def test_bad_values_are_named():
    features, weight, bias, target = head_inputs(1, 4, 3, (5, 6))
    target[0, 2, 2] = 7
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 7"):
        fused(features, weight, bias, target)
    assert fused(features, weight, bias, target, check_target=False).isnan()
    target[0, 2, 2] = 0
    with pytest.raises(ValueError, match="voxel_weight: expected values >= 0"):
        fused(features, weight, bias, target, voxel_weight=-torch.ones(1, 5, 6))


def test_bad_arguments_are_named():
    features, weight, bias, target = (x.detach() for x in head_inputs(1, 4, 3, (5, 6)))
    for arguments, options, error, message in (
        ((features.int(), weight, bias, target), {}, TypeError, "features: expected float16"),
        ((features[0, 0, 0], weight, bias, target), {}, ValueError, r"features: expected the shape \(N, K"),
        ((features[:, :0], weight, bias, target), {}, ValueError, r"features: expected the shape \(N, K"),
        ((None, weight, bias, target), {}, TypeError, "features: expected a tensor, got NoneType"),
        ((features, weight.T, bias, target), {}, ValueError, r"weight: .* expected \(C, 4\), .* got \(4, 3\)"),
        ((features, weight[:0], bias, target), {}, ValueError, "weight: "),
        ((features, weight[..., None].expand(3, 4, 2), bias, target), {}, ValueError, "weight: "),
        ((features, weight.double(), bias, target), {}, TypeError, "weight: expected the features' dtype"),
        ((features, weight, bias[:2], target), {}, ValueError, "bias: expected 3 values"),
        ((features, weight, bias.half(), target), {}, TypeError, "bias: expected the features' dtype"),
        ((features, weight.to("meta"), bias, target), {}, ValueError, "weight: expected it on the features' device"),
        ((features, weight, bias, target[:, :2]), {}, ValueError, r"target: for logits \(1, 3, 5, 6\)"),
        ((features, weight[:1], bias[:1], target), {}, ValueError, "softmax over one class"),
        ((features, weight, bias, target), {"loss": "dice"}, ValueError, "loss: expected one of 'tversky'"),
        ((features, weight, bias, target), {"alhpa": 1}, TypeError, "unexpected argument 'alhpa'"),
        ((features, weight, bias, target), {"ce_weight": 1}, TypeError, "unexpected argument 'ce_weight'"),
        ((features, weight, bias, target), {"inplace_backward": 1}, TypeError, "inplace_backward"),
    ):
        with pytest.raises(error, match=message):
            tk.linear_tversky_loss(*arguments, **options)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_module_is_the_layer_and_the_loss(dimensions, bias):
    torch.manual_seed(0)
    layer = getattr(torch.nn, f"Conv{dimensions}d")(6, 4, 1, bias=bias)
    options = {"loss": "tversky_ce", "alpha": 0.5, "beta": 0.5, "class_weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    head = tk.TverskyHead(6, 4, bias=bias, dimensions=dimensions, **options)
    assert set(head.state_dict()) == {*layer.state_dict(), "class_weight"}
    head.load_state_dict({**layer.state_dict(), "class_weight": options["class_weight"]})
    with_numbers = tk.TverskyHead(6, 4, bias=bias, dimensions=dimensions, class_weight=[1.0, 2.0, 3.0, 4.0])
    with_numbers.load_state_dict(layer.state_dict())
    features = torch.randn(2, 6, *(5, 4, 3)[:dimensions])
    _, target = inputs(2, 4, features.shape[2:])
    weight = torch.rand(target.shape)
    assert torch.equal(head(features), layer(features))
    loss = head(features, target, weight)
    del options["loss"]
    expected = tk.tversky_ce_loss(layer(features), target, voxel_weight=weight, **options)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for x, y in zip(head.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_module_trains_copies_and_moves():
    torch.manual_seed(0)
    head = tk.TverskyHead(6, 3, dimensions=2, class_weight=torch.ones(3))
    features, (_, target) = torch.randn(1, 6, 9, 9), inputs(1, 3, (9, 9))
    optimizer = torch.optim.SGD(head.parameters(), lr=5.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = head(features, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    twin = copy.deepcopy(head).double()
    assert twin.class_weight.dtype == torch.float64
    torch.testing.assert_close(twin(features.double(), target).float(), head(features, target))
    assert "6, 3" in repr(head)


def test_module_names_bad_options():
    for options, error, message in (
        ({"dimensions": 4}, ValueError, "dimensions: expected 1, 2 or 3"),
        ({"weights": 1}, TypeError, "TverskyHead: unexpected argument 'weights'"),
        ({"weight": 1}, TypeError, "TverskyHead: unexpected argument 'weight'"),
    ):
        with pytest.raises(error, match=message):
            tk.TverskyHead(6, 3, **options)


@pytest.mark.parametrize("loss", ["tversky", "tversky_ce"])
def test_upstream_gradients_beyond_the_type(loss, small_blocks):
    """As of the losses: scaled, or infinite or NaN, never another number."""
    head = head_inputs(2, 4, 3, (5, 6))
    one = gradients_of(fused, *head, loss=loss)[1:]
    for exponent in (40, 110):
        scaled = gradients_of(fused, *head, upstream=torch.tensor(2.0**exponent), loss=loss)[1:]
        for x, y in zip(scaled, one, strict=True):
            assert relative(x.double() * 2.0**-exponent, y) <= 2e-6
    for upstream in (float("inf"), float("nan")):
        for x in gradients_of(fused, *head, upstream=torch.tensor(upstream), loss=loss)[1:]:
            assert not torch.isfinite(x).any()


def test_values_out_of_range(small_blocks):
    features, weight, bias, target = head_inputs(2, 4, 3, (5, 6))
    with pytest.raises(ValueError, match=r"target: expected labels in \[0, 3\), got 7"):
        fused(features, weight, bias, target + 7 * (target == 2) - 2 * (target == 2))
    dense = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    dense[1, 2, 3, 3] = 255
    with pytest.raises(ValueError, match=r"target: expected values of a dense target in \[0, 1\], got 255"):
        fused(features, weight, bias, dense)
    found = fused(features, weight, bias, dense, check_target=False)
    logits = tk.reference.linear_logits(features, weight, bias)
    torch.testing.assert_close(found, tk.reference.tversky_loss(logits, dense, check_target=False))
